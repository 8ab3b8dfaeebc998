import copy
import json

import pytest
import torch
from peft import LoraConfig
from rich.console import Console

from lohp_peft import evaluation
from lohp_peft.baselines import AdamWBaseline
from lohp_peft.evaluation import METHODS, EvaluationConfig, evaluate_tasks, mean_scores, scores
from lohp_peft.generation import GenerationConfig, generate_adapters
from lohp_peft.tasks import Examples, Head, Task, solve_head
from tiny import build_encoder, build_policy, build_task

TASKS = [
    build_task("spam", family="spam", test_rows=30),
    build_task("mood", n_classes=3, seed=1, family="emotion", test_rows=30),
]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def encoder():
    return build_encoder()


@pytest.fixture(scope="module")
def policy(encoder):
    return build_policy(encoder, [*TASKS, build_task("news", seed=5, family="news")], size=0.3)


def evaluate(policy, encoder, tasks=TASKS[:1], **kwargs):
    return evaluate_tasks(policy, encoder.base_model, encoder.tokenizer, tasks, console=QUIET, **kwargs)


@pytest.fixture(scope="module")
def results(policy, encoder):
    seen = {}
    config = EvaluationConfig(shots=6, draws=2, seed=3, adamw_steps=3)
    found = evaluate(policy, encoder, TASKS, config=config, on_task=seen.__setitem__)
    assert seen == found["tasks"]
    return json.loads(json.dumps(found))


def test_the_json_has_every_method_of_every_task(results):
    assert list(results) == ["tasks"]
    assert list(results["tasks"]) == ["spam", "mood"]
    for methods in results["tasks"].values():
        assert set(methods) == set(METHODS) >= {
            "none", "mean_adapter", "nearest_adapter", "generated", "generated_raw", "wrong_task", "shuffled_labels", "adamw",
        }  # fmt: skip
        for entry in methods.values():
            assert len(entry["per_draw"]) == 2
            assert entry["accuracy"] == pytest.approx(sum(entry["per_draw"]) / 2)
            assert 0 <= entry["macro_f1"] <= 1
            assert entry["seconds"] > 0


def test_a_policy_by_its_name(policy, encoder, results, tmp_path):
    policy.save_pretrained(tmp_path)
    config = EvaluationConfig(shots=6, draws=2, seed=3, methods=("generated_raw",))
    found = evaluate_tasks(
        str(tmp_path), encoder.base_model, encoder.tokenizer, TASKS[:1], console=QUIET, config=config
    )["tasks"]["spam"]["generated_raw"]
    assert found["per_draw"] == results["tasks"]["spam"]["generated_raw"]["per_draw"]


def test_neither_the_policys_dropout_nor_an_adapter_that_is_held_counts(policy, encoder, results):
    """Methods other than AdamW, which has random numbers of its own."""
    other, model = copy.deepcopy(policy).train(), copy.deepcopy(encoder.base_model)
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    methods = tuple(name for name in METHODS if name != "adamw")
    config = EvaluationConfig(shots=6, draws=2, seed=3, methods=methods)
    found = evaluate_tasks(other, model, encoder.tokenizer, TASKS[:1], console=QUIET, config=config)["tasks"]["spam"]
    assert {name: found[name]["per_draw"] for name in methods} == {
        name: results["tasks"]["spam"][name]["per_draw"] for name in methods
    }


def test_the_notes_say_where_adapters_came_from(results):
    for name, methods in results["tasks"].items():
        assert all(task != name for task in methods["wrong_task"]["task"])
        assert methods["adamw"]["optimizer_steps"] == [3, 3]
        assert set(methods["generated"]["nearest_adapter"]) <= {"spam", "mood", "news", None}
    assert mean_scores(results["tasks"], "none") == pytest.approx(
        (results["tasks"]["spam"]["none"]["accuracy"] + results["tasks"]["mood"]["none"]["accuracy"]) / 2
    )


def test_everything_is_seeded(policy, encoder):
    config = EvaluationConfig(shots=4, draws=1, adamw_steps=2)
    first, second = (evaluate(policy, encoder, config=config)["tasks"]["spam"] for _ in range(2))
    for method in METHODS:
        assert first[method]["per_draw"] == second[method]["per_draw"], method


def test_the_method_none_is_the_frozen_model_with_its_head(policy, encoder):
    found = evaluate(policy, encoder, config=EvaluationConfig(shots=5, draws=1, seed=2, methods=("none",)))
    support, test = TASKS[0].draw_support(5, 2), TASKS[0].split("test")
    embed = lambda examples: encoder.embed(encoder.prepare(examples.texts))  # noqa: E731
    head = solve_head(embed(support), support.targets, 2, policy.config.head, ridge=policy.config.ridge)
    accuracy = (head.logits(embed(test)).argmax(1) == test.targets).float().mean()
    assert found["tasks"]["spam"]["none"]["accuracy"] == pytest.approx(float(accuracy))


def test_raw_is_the_generated_adapter_without_a_choice(policy, encoder):
    config = EvaluationConfig(shots=6, draws=1, methods=("generated", "generated_raw"))
    found = evaluate(policy, encoder, config=config, generation=GenerationConfig(choose=False))["tasks"]["spam"]
    assert found["generated"]["per_draw"] == found["generated_raw"]["per_draw"]
    assert found["generated"]["chosen"] == ["generated"]


@pytest.mark.parametrize("name", ["generated_raw", "wrong_task", "shuffled_labels", "mean_adapter", "nearest_adapter"])
def test_controls_change_the_conditioning_and_keep_the_true_support_for_the_head(policy, encoder, name):
    one = evaluation._TaskEvaluation(policy, encoder, TASKS[0], EvaluationConfig(), GenerationConfig())
    support = TASKS[0].draw_support(8, 1)
    state, head, _ = one._conditioned(name, support, 1)
    embeddings = encoder.embed(encoder.prepare(support.texts), state[None])
    expected = solve_head(embeddings, support.targets, 2, policy.config.head, ridge=policy.config.ridge)
    torch.testing.assert_close(head.weight, expected.weight, atol=1e-4, rtol=1e-3)
    (made,) = generate_adapters(
        policy, encoder.base_model, encoder.tokenizer, [support], GenerationConfig(choose=False)
    )
    if name == "generated_raw":
        torch.testing.assert_close(state, made.state, atol=1e-5, rtol=1e-4)
    else:
        assert (state - made.state).norm() > 1e-3 * made.state.norm()


def test_shuffled_labels_are_a_permutation_of_the_true_ones(policy, encoder, monkeypatch):
    seen, features = [], evaluation.task_features

    def watch(statistics, labels, *rest):
        seen.append(labels)
        return features(statistics, labels, *rest)

    monkeypatch.setattr(evaluation, "task_features", watch)
    one = evaluation._TaskEvaluation(policy, encoder, TASKS[0], EvaluationConfig(), GenerationConfig())
    support = TASKS[0].draw_support(8, 1)
    one._conditioned("shuffled_labels", support, 1)
    assert not seen[0].equal(support.targets)
    assert seen[0].sort().values.equal(support.targets.sort().values)


def test_adamw_learns_from_the_support(policy, encoder):
    support = TASKS[1].draw_support(10, 0)
    before = {name: value.clone() for name, value in encoder.base_model.state_dict().items()}
    baseline = AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, learning_rate=0.02, steps=25)
    fitted = baseline.fit(support, 0, checkpoints=(1,))
    assert len(fitted) == 2
    losses = []
    for adapted, head in fitted:
        with torch.no_grad():
            logits = head.logits(adapted.embed(adapted.prepare(support.texts)))
        losses.append(float(torch.nn.functional.cross_entropy(logits, support.targets)))
    assert losses[1] < losses[0]  # the copy at one step was not trained on
    names = {
        name.rsplit(".lora_A", 1)[0] for name, _ in fitted[1][0].base_model.named_parameters() if "lora_A" in name
    }
    assert names == {spec.name for spec in policy.layout.modules}
    after = encoder.base_model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    with pytest.raises(ValueError, match="at least 1 step of at least 1 example, got 0 steps of 32"):
        AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, steps=0)
    with pytest.raises(ValueError, match=r"`init` must be one of \['default', 'eva'\], got 'pissa'"):
        AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, init="pissa")


def test_eva_starts_along_the_inputs_of_the_support_set(policy, encoder):
    """With next to no step, B is zero and A is what differs between starts."""
    support = TASKS[0].draw_support(8, 0)
    rows = {}
    for init in ("default", "eva"):
        settings = {"learning_rate": 1e-12, "steps": 1, "init": init}
        baseline = AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, **settings)
        ((adapted, _),) = baseline.fit(support, 0)
        rows[init] = next(p for name, p in adapted.base_model.named_parameters() if "lora_A" in name)
    products = rows["eva"] @ rows["eva"].T
    torch.testing.assert_close(products, products.diag().diag(), atol=1e-4, rtol=0)  # singular vectors
    assert not torch.allclose(rows["eva"], rows["default"])


def test_adamw_starts_from_a_given_adapter(policy, encoder):
    support = TASKS[0].draw_support(8, 0)
    baseline = AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, learning_rate=0.02, steps=3)
    torch.manual_seed(1)
    state = torch.randn(tuple(policy.space.shape)) * policy.state_mask * 0.1
    start = policy.space.decode(state)
    (before, _), (after, _) = baseline.fit(support, 0, checkpoints=(0,), start=start)
    with torch.no_grad():
        expected = encoder.embed(encoder.prepare(support.texts), state[None])
        found, moved = (one.embed(one.prepare(support.texts)) for one in (before, after))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(moved, expected, atol=1e-3)
    name = next(iter(start))
    with pytest.raises(
        ValueError, match=rf"`start` must be a LoRA of rank .* \(missing \['{name}'\], unknown \['head'\]"
    ):
        baseline.fit(support, 0, start={"head" if key == name else key: pair for key, pair in start.items()})


def test_scores():
    examples = Examples(("w", "x", "y", "z"), (0, 0, 0, 1), ("a", "b", "never"))
    head = Head(torch.eye(3), torch.zeros(3))
    found = scores(head, torch.eye(3)[[0, 0, 1, 1]], examples)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_few_test_rows_are_drawn_balanced(policy, encoder):
    config = EvaluationConfig(max_test=10, methods=("none",))
    one = evaluation._TaskEvaluation(policy, encoder, TASKS[0], config, GenerationConfig())
    assert one.test.targets.bincount().tolist() == [5, 5]


def test_errors(policy, encoder):
    with pytest.raises(
        ValueError, match=r"^Evaluation: `shots` .* got 1; `draws` .* got 0; `methods` .* got \['sgd'\]\.$"
    ):
        EvaluationConfig(methods=("none", "sgd"), shots=1, draws=0)
    with pytest.raises(ValueError, match=r"^Evaluation: `max_test` .* got 0; `adamw_steps` .* got 1 and 0\.$"):
        EvaluationConfig(max_test=0, adamw_steps=1, adamw_learning_rate=0)
    with pytest.raises(ValueError, match=r"'spam' has no rows in split 'test' \(its splits: \['train'\]\); task 'b'"):
        evaluate(
            policy, encoder, [TASKS[1], build_task("spam"), build_task("b")], on_task=lambda *_: pytest.fail("scored")
        )
    bare = build_policy(encoder)
    with pytest.raises(ValueError, match="'mean_adapter' needs the policy's reference set"):
        evaluate(bare, encoder, config=EvaluationConfig(shots=4, methods=("mean_adapter",)))
    alone = ("none", "generated_raw", "shuffled_labels")  # need the policy only
    assert set(evaluate(bare, encoder, config=EvaluationConfig(shots=4, draws=1, methods=alone))["tasks"]["spam"]) == {
        *alone
    }


@pytest.mark.filterwarnings("ignore:.*examples repeat others")
def test_repeated_rows_count_once_for_every_method(policy, encoder):
    """Of one adapter, `generated` without a choice and the raw rollout, the heads are the same."""
    task = TASKS[0]
    train, test = task.split("train"), task.split("test")
    rows = [*range(6)] + [0] * 10 + [1] * 6
    texts, labels = zip(*((train.texts[i], train.labels[i]) for i in rows), strict=True)
    examples = Examples((*texts, *test.texts), (*labels, *test.labels), train.label_names)
    repeated = Task("repeated", examples, ("train",) * len(rows) + ("test",) * len(test))
    config = EvaluationConfig(shots=20, draws=1, methods=("generated", "generated_raw"))
    found = evaluate(policy, encoder, [repeated], config=config, generation=GenerationConfig(choose=False))
    scored = found["tasks"]["repeated"]
    assert scored["generated"]["per_draw"] == scored["generated_raw"]["per_draw"]
    assert scored["generated"]["macro_f1"] == scored["generated_raw"]["macro_f1"]

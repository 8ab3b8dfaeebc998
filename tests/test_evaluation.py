import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from rich.console import Console

from lohp_peft import evaluation
from lohp_peft.baselines import AdamWBaseline
from lohp_peft.evaluation import METHODS, EvaluationConfig, evaluate_tasks, mean_scores, scores
from lohp_peft.generation import GenerationConfig, generate_adapters
from lohp_peft.tasks import Examples, Head, Task, TextEncoder, solve_head
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
    one = Task("one", Examples(("a", "b", "c"), (0, 0, 1), ("x", "y")), ("train", "train", "test"))
    with pytest.raises(ValueError, match="task 'one' has one class in split 'train', 'x'"):
        evaluate(policy, encoder, [TASKS[0], one], on_task=lambda *_: pytest.fail("scored"))
    bare = build_policy(encoder)
    with pytest.raises(
        ValueError, match="Nothing can be scored on task 'spam': 'mean_adapter' needs the policy's reference"
    ):
        evaluate(bare, encoder, config=EvaluationConfig(shots=4, methods=("mean_adapter",)))
    alone = ("none", "generated_raw", "shuffled_labels")  # need the policy only
    assert set(evaluate(bare, encoder, config=EvaluationConfig(shots=4, draws=1, methods=alone))["tasks"]["spam"]) == {
        *alone
    }


def test_methods_that_a_policy_has_nothing_for_are_left_out(encoder):
    """As the wrong task where all training tasks are of one family; the rest is scored, and it is told before any work."""
    alike = build_policy(encoder, [build_task(name, seed=i, family="spam") for i, name in enumerate("ab")])
    told, config = [], EvaluationConfig(shots=4, draws=1, methods=("none", "wrong_task"))
    with pytest.warns(UserWarning, match="Not scored on task 'spam': 'wrong_task' needs a training task") as caught:
        found = evaluate(alike, encoder, TASKS, config=config, on_task=lambda *_: told.append(len(caught)))
    assert told[0] == 1
    assert caught[0].filename == __file__
    assert {name: list(scored) for name, scored in found["tasks"].items()} == {
        "spam": ["none"],
        "mood": ["none", "wrong_task"],
    }
    with pytest.warns(
        UserWarning, match="'mean_adapter' needs the policy's reference set.*'nearest_adapter'.*'wrong_task'"
    ):
        evaluate(build_policy(encoder), encoder, config=EvaluationConfig(shots=4, draws=1, adamw_steps=1))


def test_unknown_families_have_a_wrong_task(encoder):
    """Training tasks from files alone."""
    alone = build_policy(encoder, [build_task(name, seed=i) for i, name in enumerate("abc")])
    config = EvaluationConfig(shots=4, draws=4, methods=("nearest_adapter", "wrong_task"))
    scored = evaluate(alone, encoder, [build_task("new", seed=9, test_rows=30)], config=config)["tasks"]["new"]
    assert all(
        one != other
        for one, other in zip(scored["nearest_adapter"]["task"], scored["wrong_task"]["task"], strict=True)
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_others_have_switched_gradients_off(policy, encoder, mode):
    config = EvaluationConfig(shots=4, draws=1, adamw_steps=2, adamw_learning_rate=0.05)
    expected = evaluate(policy, encoder, config=config)["tasks"]["spam"]
    with mode():
        found = evaluate(policy, encoder, config=config)["tasks"]["spam"]
        AdamWBaseline(encoder.base_model, encoder.tokenizer, policy, steps=1).fit(TASKS[0].draw_support(4, 0), 0)
    assert {name: row["per_draw"] for name, row in found.items()} == {
        name: row["per_draw"] for name, row in expected.items()
    }


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_adamw_reads_every_text_in_its_own_precision(policy, encoder, mixed, monkeypatch):
    base_model = copy.deepcopy(encoder.base_model)
    base_model.set_attn_implementation("eager")  # that of the baseline, which rounds otherwise
    encoder = TextEncoder(base_model, encoder.tokenizer, encoder.space, max_length=encoder.max_length)
    read, original = [], TextEncoder.embed

    def embed(self, encoded, states=None, owner=None):
        read.append((self.dtype, encoded))
        return original(self, encoded, states, owner)

    monkeypatch.setattr(TextEncoder, "embed", embed)
    precision = {"no": None, "bf16": torch.bfloat16}
    config = EvaluationConfig(shots=4, draws=2, methods=("adamw",), adamw_steps=1, adamw_mixed_precision=mixed)
    for generation in ("no", "bf16"):
        read.clear()
        evaluate(policy, encoder, config=config, generation=GenerationConfig(mixed_precision=generation))
        assert {dtype for dtype, _ in read} == {precision[mixed]}
        tests = [encoded for _, encoded in read if len(encoded.attention_mask) == len(TASKS[0].split("test"))]
        reading = {"max_length": encoder.max_length, "pooling": policy.config.pooling, "dtype": precision[mixed]}
        alone = TextEncoder(encoder.base_model, encoder.tokenizer, encoder.space, **reading)
        hidden = alone.prepare(TASKS[0].split("test").texts).hidden
        assert len(tests) == 2
        for encoded in tests:
            torch.testing.assert_close(encoded.hidden, hidden, rtol=0, atol=1e-5)


def test_raw_rollouts_have_the_settings_of_the_generation(policy, encoder):
    """`generated` without a choice is the raw rollout, whatever the settings."""
    for settings in ({"policy_steps": 1}, {"optimizer": policy.config.optimizers[-1]}):
        generation = GenerationConfig(choose=False, **settings)
        raw = _embedded(policy, encoder, "generated_raw", generation)
        torch.testing.assert_close(raw, _embedded(policy, encoder, "generated", generation))
        assert not torch.allclose(raw, _embedded(policy, encoder, "generated_raw", None), atol=1e-4)
    with pytest.raises(ValueError, match="`closed_loop` measures .* which \\['wrong_task'\\] cannot"):
        evaluate(
            policy,
            encoder,
            config=EvaluationConfig(methods=("wrong_task",)),
            generation=GenerationConfig(closed_loop=True),
        )
    with pytest.raises(ValueError, match="must be one of the recorded"):
        evaluate(policy, encoder, generation=GenerationConfig(optimizer="nobody"))


def _embedded(policy, encoder, method, generation):
    """The test texts under the adapter of a method."""
    found, original = [], evaluation.scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "scores", lambda head, x, examples: found.append(x) or original(head, x, examples))
        config = EvaluationConfig(shots=4, draws=1, methods=(method,))
        evaluate(policy, encoder, config=config, generation=generation)
    return found[0]


def test_test_rows_that_are_in_train_are_told(policy, encoder):
    rows = TASKS[0].split("test")
    twice = Examples(rows.texts * 2, rows.labels * 2, rows.label_names)
    task = replace(TASKS[0], examples=twice, splits=("train",) * len(rows) + ("test",) * len(rows))
    different = len(set(rows.texts))
    with pytest.warns(
        UserWarning, match=f"'spam': {different} of {different} different texts of split test are in split train"
    ):
        evaluate(policy, encoder, [task], config=EvaluationConfig(shots=4, draws=1, methods=("none",)))


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

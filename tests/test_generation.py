import copy
import dataclasses
import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import normalize
from transformers import BertTokenizer

from lohp_peft import CoreSpace, LoHpConfig, candidates
from lohp_peft.candidates import Candidate, GenerationConfig, _decide
from lohp_peft.generation import generate_adapter, generate_adapters
from lohp_peft.tasks import Examples, TaskFeatures, TextEncoder, VerifiedSteps, calibrated_cross_entropy, solve_head
from tiny import WORDS, build_base_model, build_encoder, build_policy, build_task

TASKS = [
    build_task("spam", family="spam", test_rows=40),
    build_task("ham", seed=2, family="spam"),
    build_task("mood", n_classes=3, seed=1, family="emotion"),
]
SUPPORTS = [task.draw_support(6, seed) for seed, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(max_length=24)


@pytest.fixture(scope="module")
def policy(encoder):
    return build_policy(encoder, TASKS, size=0.3)


@pytest.fixture
def generate(policy, encoder):
    def run(supports, config=None, policy=policy):
        return generate_adapters(policy, encoder.base_model, encoder.tokenizer, supports, config)

    return run


def assert_same(mine, theirs, exact=True):
    tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(mine.state, theirs.state, **tolerance)
    torch.testing.assert_close(mine.head.weight, theirs.head.weight, **tolerance)
    assert mine.report.chosen == theirs.report.chosen
    assert [c.name for c in mine.report.candidates] == [c.name for c in theirs.report.candidates]


EVERYTHING = GenerationConfig(num_candidates=3, amplitudes=(0.5, 1.0, 2.0), seed=4)


@pytest.mark.parametrize(
    "config", [None, EVERYTHING, GenerationConfig(closed_loop=True)], ids=["plain", "all", "loop"]
)
def test_seeded(generate, config):
    assert_same(generate(SUPPORTS[:1], config)[0], generate(SUPPORTS[:1], config)[0])


def test_the_seed_decides_the_rollouts(generate):
    scores = [
        {
            c.name: c.score
            for c in generate(SUPPORTS[:1], dataclasses.replace(EVERYTHING, seed=seed))[0].report.candidates
        }
        for seed in (1, 2)
    ]
    assert scores[0]["rollout 1"] != scores[1]["rollout 1"]
    assert scores[0]["rollout 1"] != scores[0]["rollout 2"]


@pytest.mark.parametrize(
    "config", [None, EVERYTHING, GenerationConfig(closed_loop=True, choose=False)], ids=["plain", "all", "loop"]
)
def test_a_batch_equals_single_calls(generate, config):
    batch = generate(SUPPORTS, config)
    for made, support in zip(batch, SUPPORTS, strict=True):
        (single,) = generate([support], config)
        assert_same(made, single, exact=False)
        for mine, theirs in zip(made.report.candidates, single.report.candidates, strict=True):
            assert mine.score == (theirs.score if theirs.score is None else pytest.approx(theirs.score, abs=1e-3))


def test_the_adapter_is_the_state_and_the_head_is_solved_on_it(generate, encoder, policy):
    (made,) = generate(SUPPORTS[2:], GenerationConfig(choose=False))
    assert made.state.equal(made.path[-1])
    assert not made.path[0].any()
    model = copy.deepcopy(encoder.base_model)
    for name, (a, b) in made.lora.items():
        assert (a.shape, b.shape) == ((2, 16), (16, 2))
        model.get_submodule(name).weight.data += b @ a
    support = SUPPORTS[2]
    batch = encoder.tokenizer(list(support.texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = (tokens * mask).sum(1) / mask.sum(1)
    head = solve_head(embeddings, support.targets, 3, policy.config.head, ridge=policy.config.ridge)
    torch.testing.assert_close(made.head.weight, head.weight, atol=1e-3, rtol=1e-3)
    assert made.label_names == support.label_names


def test_every_iterate_is_the_adapter_of_fewer_steps(generate):
    (whole,) = generate(SUPPORTS[:1], GenerationConfig(choose=False))
    for steps in (1, 2):
        (made,) = generate(SUPPORTS[:1], GenerationConfig(choose=False, policy_steps=steps))
        torch.testing.assert_close(made.state, whole.path[steps])
        assert made.report.policy_steps == steps


def test_no_gradients(generate, policy, encoder):
    (made,) = generate(SUPPORTS[:1], EVERYTHING)
    tensors = [made.state, made.path, made.head.weight, *(x for pair in made.lora.values() for x in pair)]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(p.grad is None for p in policy.parameters())


def test_bfloat16_is_close_and_not_the_same(generate, policy, encoder):
    (exact,) = generate(SUPPORTS[:1])
    (half,) = generate(SUPPORTS[:1], GenerationConfig(mixed_precision="bf16"))
    assert half.path.dtype == half.head.weight.dtype == torch.float32
    torch.testing.assert_close(half.path, exact.path, atol=0.05 * float(exact.path.abs().max()), rtol=0.1)
    assert not half.path.equal(exact.path)
    model = get_peft_model(copy.deepcopy(encoder.base_model), LoHpConfig(task_type="FEATURE_EXTRACTION"))
    reports = [
        model.generate_adapter(SUPPORTS[0], policy=policy, tokenizer=encoder.tokenizer, config=config)
        for config in (GenerationConfig(mixed_precision="bf16"), None)
    ]
    scores = [report.candidates[0].score for report in reports]
    assert scores[0] == pytest.approx(half.report.candidates[0].score, rel=1e-4)
    assert scores[0] != scores[1]


def test_rows_and_datasets_are_read(generate):
    support = SUPPORTS[0]
    rows = [
        {"text": text, "label": support.label_names[label]}
        for text, label in zip(support.texts, support.labels, strict=True)
    ]
    expected, *others = generate([support, rows, Dataset.from_list(rows)])
    for made in others:
        assert_same(made, expected, exact=False)
        assert made.label_names == expected.label_names


@pytest.mark.parametrize("config", [GenerationConfig(choose=False), EVERYTHING, GenerationConfig(gradient_steps=2)])
def test_classes_without_examples_change_nothing(generate, config):
    """A dataset may name more classes than the support set has; they are never predicted."""
    few = SUPPORTS[2]
    many = Examples(few.texts, tuple(2 * label + 1 for label in few.labels), tuple("abcdefgh"))
    (mine,), (theirs,) = generate([many], config), generate([few], config)
    torch.testing.assert_close(mine.state, theirs.state)
    torch.testing.assert_close(mine.head.weight[[1, 3, 5]], theirs.head.weight)
    assert mine.report.chosen == theirs.report.chosen
    assert set(mine.head.logits(torch.randn(50, mine.head.weight.shape[1])).argmax(-1).tolist()) <= {1, 3, 5}


def test_pairs(generate):
    support = build_task("pairs", pair=True).draw_support(4, 0)
    (made,) = generate([support])
    (swapped,) = generate([Examples(support.texts_b, support.labels, support.label_names, support.texts)])
    assert not torch.allclose(made.path, swapped.path)


@pytest.fixture
def harmful(encoder, policy):
    """Its adapters drown the class words in the same direction for every text."""
    bad = build_policy(encoder, TASKS, size=0.3)
    torch.manual_seed(3)
    with torch.no_grad():
        bad.forward_network.start.copy_(40 * torch.randn_like(bad.forward_network.start))
        bad.forward_network.gates.weight.zero_()
        bad.forward_network.gates.bias.zero_()
    bad.reference_set = dataclasses.replace(bad.reference_set, states=torch.full_like(bad.reference_set.states, 40))
    return bad


def test_a_harmful_policy_abstains_and_says_why(generate, harmful):
    support = TASKS[0].draw_support(16, 0)
    (made,) = generate([support], GenerationConfig(margin=0.5), policy=harmful)
    report = made.report
    assert (report.chosen, report.abstained) == ("none", True)
    assert not made.state.any()
    assert made.path[-1].any()
    assert all(not b.any() for _, b in made.lora.values())
    assert "'none' has a lower leave-one-out loss on the support set" in report.reason
    scores = {c.name: c.score for c in report.candidates}
    assert scores["none"] < scores["generated"]
    (forced,) = generate([support], GenerationConfig(choose=False), policy=harmful)
    assert forced.state.any()
    assert not forced.report.abstained


@pytest.mark.parametrize("kept", [False, True])
def test_gradient_steps_begin_at_the_choice_so_far(generate, harmful, monkeypatch, kept):
    """Not at a generated adapter that was not chosen, than which they might be better and "none" better still."""
    starts = []

    def steps(encoder, encoded, labels, n_classes, start, scale, **kwargs):
        starts.append(start)
        return VerifiedSteps(start + 1, (-0.1, 0.01), 4, kept)

    monkeypatch.setattr(candidates, "verified_steps", steps)
    (made,) = generate([TASKS[0].draw_support(16, 0)], GenerationConfig(gradient_steps=4, margin=0.5), policy=harmful)
    assert not starts[0].any()
    report = made.report
    assert (report.chosen, report.abstained) == (("none + 4 gradient steps", False) if kept else ("none", True))
    assert (report.gradient_steps, float(made.state.mean())) == ((4, 1.0) if kept else (0, 0.0))
    assert "'none' has a lower leave-one-out loss" in report.reason
    assert ("not kept" in report.reason) != kept


def test_a_smaller_amplitude_of_a_harmful_adapter_is_better(generate, harmful):
    harmful.reference_set = None
    support = TASKS[0].draw_support(16, 0)
    config = GenerationConfig(amplitudes=(1e-4, 1.0), margin=0.5)
    (made,) = generate([support], config, policy=harmful)
    names = [c.name for c in made.report.candidates]
    assert names == ["generated", "generated x 0.0001", "none"]
    assert made.report.chosen in ("generated x 0.0001", "none")
    if made.report.chosen != "none":
        torch.testing.assert_close(made.state, 1e-4 * made.path[-1])


def test_a_rollout_wins_when_it_is_convincingly_better(generate, harmful):
    harmful.reference_set = None
    harmful.config.noise_scale = 0.0
    support = TASKS[0].draw_support(16, 0)
    (same,) = generate([support], GenerationConfig(num_candidates=2, margin=0.0), policy=harmful)
    scores = {c.name: c.score for c in same.report.candidates}
    assert scores["rollout 1"] == pytest.approx(scores["generated"], abs=1e-5)
    assert list(scores) == ["generated", "rollout 1", "rollout 2", "none"]


def test_decisions_need_a_margin():
    found = {
        "generated": Candidate("generated", 1.0, (0.0, 0.0)),
        "mean": Candidate("mean", 0.9, (-0.1, 0.2)),
        "rollout 1": Candidate("rollout 1", 0.7, (-0.3, 0.2)),
        "none": Candidate("none", 0.8, (-0.2, 0.1)),
    }
    assert _decide(found, 1.0)[0] == "rollout 1"
    assert _decide(found, 1.8)[0] == "none"
    best, reason = _decide(found, 3.0)
    assert best == "generated"
    assert reason.startswith("No candidate beat")
    assert _decide(found, 0.0)[1] == (
        "'rollout 1' has a lower leave-one-out loss on the support set than the generated adapter: 0.300 +- 0.200 nats."
    )


def test_the_chosen_state_is_that_of_the_winner(generate, policy, monkeypatch):
    monkeypatch.setattr(candidates, "_decide", lambda found, margin: ("mean", "because"))
    (made,) = generate(SUPPORTS[:1])
    torch.testing.assert_close(made.state, policy.reference_set.mean_state())
    assert (made.report.chosen, made.report.reason, made.report.abstained) == ("mean", "because", True)
    for name, state in (("half generated, half mean", (made.path[-1] + made.state) / 2), ("none", 0 * made.state)):
        monkeypatch.setattr(candidates, "_decide", lambda found, margin, name=name: (name, "because"))
        (other,) = generate(SUPPORTS[:1])
        torch.testing.assert_close(other.state, state)
        assert other.report.abstained == (name == "none")
    monkeypatch.setattr(candidates, "_decide", lambda found, margin: ("rollout 2", "because"))
    (made,) = generate(SUPPORTS[:1], GenerationConfig(num_candidates=2))
    assert not torch.allclose(made.state, made.path[-1])
    assert not made.report.abstained


@pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (1, 2, 3)], ids=str)
def test_classes_of_one_example_work(generate, sizes):
    task = TASKS[len(sizes) - 1].examples
    rows = [i for c, size in enumerate(sizes) for i in [j for j, y in enumerate(task.labels) if y == c][:size]]
    (made,) = generate([task.select(rows)], EVERYTHING)
    assert made.state.isfinite().all()
    assert made.head.weight.isfinite().all()
    assert list(made.report.support.values())[: len(sizes)] == list(sizes)


def test_the_report_is_json_without_texts(generate, policy):
    (made,) = generate(SUPPORTS[2:], EVERYTHING)
    report = made.report.to_dict()
    text = json.dumps(report)
    assert not any(example in text for example in SUPPORTS[2].texts)
    assert not any(word in text for word in WORDS if word.startswith(("good", "word")))
    assert report["support"] == {"class 0": 6, "class 1": 6, "class 2": 6}
    assert report["policy"]["base_fingerprint"] == policy.config.base_fingerprint
    assert report["config"]["num_candidates"] == 3
    assert report["bytes"] == 4 * 2 * 2 * 32
    assert report["seconds"] > 0
    assert report["nearest_task"] in policy.reference_set.names
    assert {c["name"] for c in report["candidates"]} == {
        "none", "mean", "half generated, half mean", "generated", "generated x 0.5", "generated x 2", "rollout 1",
        "rollout 2", "rollout 3",
    }  # fmt: skip


def test_long_texts_are_reported(generate):
    rows = [
        {"text": "word1 " * length, "label": label} for length, label in ((30, "a"), (3, "a"), (4, "b"), (40, "b"))
    ]
    with pytest.warns(UserWarning, match="2 of 4 support texts are longer than 24 tokens and were truncated"):
        (made,) = generate([rows])
    assert made.report.truncated_texts == 2


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ([], r"at least two classes, got 0 examples of 0 \(none\)"),
        ([{"text": "x", "label": "a"}] * 3, r"at least two classes, got 3 examples of 1 \(a\)"),
        (Examples(("x",), (1,), ("a", "b")), r"got 1 examples of 1 \(b\)"),
        ([{"text": "x"}, {"label": 1}], "2 malformed support rows"),
    ],
)
def test_bad_supports(generate, support, message):
    with pytest.raises(ValueError, match=message):
        generate([support])


def test_no_supports(generate):
    with pytest.raises(ValueError, match="`supports` must hold at least one support set, got none"):
        generate([])


def test_all_that_does_not_fit_is_named_on_both_sides(policy, encoder):
    words = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    short = build_base_model(2)
    short.config._name_or_path = "other/bert"
    with pytest.raises(ValueError, match="policy does not fit") as error:
        generate_adapter(policy, short, tokenizer, SUPPORTS[0])
    message = str(error.value)
    assert "encoder.layer.2.attention.self.query: layout (16, 16), model absent" in message
    assert (
        f"trained on base model 'tiny' (fingerprint {policy.config.base_fingerprint[:12]}), got 'other/bert'"
        in message
    )
    assert f"tokenizer has fingerprint {policy.config.tokenizer_fingerprint[:12]}, got" in message


def test_other_weights_are_another_base_model(policy, encoder):
    other = build_base_model(3)
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight.add_(0.1)
    with pytest.raises(ValueError, match="trained on base model 'tiny'"):
        generate_adapter(policy, other, encoder.tokenizer, SUPPORTS[0])


def test_settings_that_do_not_fit(generate):
    with pytest.raises(ValueError, match=r"`optimizer` must be one of the recorded \['adamw', 'sam'\], got 'lion'"):
        generate(SUPPORTS[:1], GenerationConfig(optimizer="lion"))
    with pytest.raises(ValueError, match=r"`policy_steps` must be in 1..3"):
        generate(SUPPORTS[:1], GenerationConfig(policy_steps=9))
    with pytest.raises(ValueError, match="`num_candidates`.*`amplitudes`.*`scored_texts`.*`mixed_precision`.*`head`"):
        GenerationConfig(num_candidates=-1, amplitudes=(0.0,), scored_texts=1, mixed_precision="fp8", head="svm")


def test_an_imitated_optimizer_changes_the_adapter(generate):
    plain, adamw, sam = (
        generate(SUPPORTS[:1], GenerationConfig(choose=False, optimizer=name))[0].state
        for name in (None, "adamw", "sam")
    )
    assert not plain.equal(adamw)
    assert not adamw.equal(sam)


def test_an_imitated_optimizer_is_told_on_the_policys_device(policy, encoder, monkeypatch):
    """The meta device stands in for an accelerator; it alone would look up an index of another device."""
    job = candidates.CandidateSet(policy, encoder, SUPPORTS[:2], GenerationConfig(optimizer="sam"))
    features = TaskFeatures.stack([job.features(i) for i in range(2)]).map(lambda part: part.to("meta"))
    job.policy, told = copy.deepcopy(policy).to("meta"), []
    rollout = candidates.rollout
    monkeypatch.setattr(candidates, "rollout", lambda *a, **k: told.append(k["optimizer"]) or rollout(*a, **k))
    assert job.rollout(features).device == told[0].device == torch.device("meta")


def test_a_peft_model_gives_what_its_base_model_gives(generate, policy, encoder):
    """Also when it already holds another adapter."""
    (expected,) = generate(SUPPORTS[:1])
    wrapped = get_peft_model(copy.deepcopy(encoder.base_model), LoraConfig(target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    made = generate_adapter(policy, wrapped, encoder.tokenizer, SUPPORTS[0])
    assert_same(made, expected, exact=False)


def test_a_policy_by_its_name(generate, policy, encoder, tmp_path, monkeypatch):
    (expected,) = generate(SUPPORTS[:1])
    policy.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    made = generate_adapter("mine", encoder.base_model, encoder.tokenizer, SUPPORTS[0])
    assert_same(made, expected)
    assert made.record().provenance["policy"] == made.report.policy["name"] == "mine"
    with pytest.raises(ValueError, match="Policy 'absent' is none of: 'shipped', an existing folder"):
        generate_adapter("absent", encoder.base_model, encoder.tokenizer, SUPPORTS[0])


def test_a_policy_on_the_hub_is_recorded_with_its_commit(policy, encoder, tmp_path, monkeypatch):
    folder, revision = tmp_path / "snapshots" / "abc", "0" * 40
    policy.save_pretrained(folder)
    monkeypatch.setattr("lohp_peft.generation.find_policy", lambda _name: folder)
    made = generate_adapter(f"me/mine@{revision}", encoder.base_model, encoder.tokenizer, SUPPORTS[0])
    provenance = made.record().provenance
    assert (provenance["policy"], provenance["revision"]) == ("me/mine", revision)


def test_a_folder_with_an_at_sign_is_recorded_by_its_own_name(generate, tmp_path, monkeypatch):
    (made,) = generate(SUPPORTS[:1])
    (tmp_path / "user@host" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("user@host/mine", str(tmp_path / "user@host" / "mine"), "/gone/user@host/mine"):
        provenance = made.record(policy_name=name).provenance
        assert (provenance["policy"], provenance["revision"]) == ("mine", None), name


@pytest.mark.parametrize("how", ["transformers", "unwrapped", "compiled"])
def test_an_adapter_that_is_held_in_another_way_does_not_count_either(how, generate, policy, encoder):
    (expected,) = generate(SUPPORTS[:1])
    model, config = copy.deepcopy(encoder.base_model), LoraConfig(target_modules=["query"], init_lora_weights=False)
    if how == "transformers":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
        model = model.get_base_model() if how == "unwrapped" else torch.compile(model, backend="eager")
    assert_same(generate_adapter(policy, model, encoder.tokenizer, SUPPORTS[0]), expected)
    held = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert held
    assert not any(layer.disable_adapters for layer in held)


def test_a_policy_in_training_mode_generates_without_dropout(generate, policy):
    raw = GenerationConfig(choose=False)
    (expected,) = generate(SUPPORTS[:1], raw)
    other = copy.deepcopy(policy).train()
    other.log_flow_network.eval()
    before = {name: module.training for name, module in other.named_modules()}
    assert_same(generate(SUPPORTS[:1], raw, other)[0], expected)
    assert {name: module.training for name, module in other.named_modules()} == before


def test_in_inference_mode_the_same_is_generated_and_can_be_trained(generate):
    config = GenerationConfig(gradient_steps=2, gradient_margin=-100.0)
    (expected,) = generate(SUPPORTS[:1], config)
    with torch.inference_mode():
        (made,) = generate(SUPPORTS[:1], config)
    assert_same(made, expected)
    assert expected.report.gradient_steps
    tensors = [made.state, made.path, made.head.weight, *(x for pair in made.lora.values() for x in pair)]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("name", ["generated", "none", "mean", "half generated, half mean"])
@pytest.mark.parametrize("scored_texts", [4, 64], ids=["some compared", "all compared"])
def test_the_head_is_that_of_the_chosen_adapter_on_all_examples(
    generate, policy, encoder, monkeypatch, name, scored_texts
):
    """Whichever embeddings were at hand from the comparison, in a batch where tasks choose differently."""
    names = iter([name, "generated", name])
    monkeypatch.setattr(candidates, "_decide", lambda found, margin: (next(names), "because"))
    for made, support in zip(generate(SUPPORTS, GenerationConfig(scored_texts=scored_texts)), SUPPORTS, strict=True):
        with torch.no_grad():
            x = encoder.embed(encoder.prepare(support.texts), made.state[None])
        head = solve_head(x, support.targets, support.n_classes, policy.config.head, ridge=policy.config.ridge)
        torch.testing.assert_close(made.head.weight, head.weight, atol=1e-3, rtol=1e-3)


def test_scores_are_losses_of_heads_that_did_not_see_the_example(generate, policy, encoder):
    """Against the same thing done the long way: the head solved anew without each group."""
    support = SUPPORTS[2]
    (made,) = generate([support], GenerationConfig(scored_texts=64))
    with torch.no_grad():
        x = normalize(encoder.embed(encoder.prepare(support.texts), made.path[-1][None]), dim=-1)
    y, logits = support.targets, torch.zeros(len(support), 3)
    order = x[:, 0].argsort()
    rank = torch.zeros_like(y)
    for c in range(3):
        rank[order[y[order] == c]] = torch.arange(6)
    for group in range(6):
        seen = rank != group
        head = solve_head(x[seen], y[seen], 3, policy.config.head, ridge=policy.config.ridge)
        logits[~seen] = head.logits(x[~seen])
    score = {c.name: c.score for c in made.report.candidates}["generated"]
    expected = calibrated_cross_entropy(logits, y)
    assert score == pytest.approx(float(expected), rel=0.1)  # centring is that of all examples


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"policy_steps": 0}, "`policy_steps` must be at least 1, got 0"),
        ({"noise": -1.0}, "`noise` must be at least 0, got -1.0"),
        ({"noise": float("nan")}, "`noise` must be at least 0, got nan"),
        ({"margin": float("nan")}, "`margin` must be a number, got nan"),
        ({"gradient_margin": float("nan")}, "`gradient_margin` must be a number, got nan"),
        ({"gradient_learning_rate": float("nan")}, "`gradient_learning_rate` must be a positive number, got nan"),
        ({"amplitudes": 1.0}, "`amplitudes` must be a sequence of one or more numbers, got 1.0"),
        ({"amplitudes": (1.0, float("nan"))}, "`amplitudes` must be positive numbers"),
        ({"amplitudes": ("a",)}, "`amplitudes` must be positive numbers"),
        ({"amplitudes": (float("inf"),)}, "`amplitudes` must be positive numbers"),
        ({"noise": "x"}, "`noise` must be at least 0, got 'x'"),
        ({"noise": 10**400}, "`noise` must be at least 0, got 1000"),
        ({"noise": float("inf")}, "`noise` must be at least 0, got inf"),
        ({"margin": None}, "`margin` must be a number, got None"),
        ({"gradient_learning_rate": None}, "`gradient_learning_rate` must be a positive number, got None"),
        ({"seed": 2**64}, "`seed` must be in 0..2"),
        ({"seed": -1}, "`seed` must be in 0..2"),
        ({"choose": False, "num_candidates": 4}, "are candidates, which `choose=False` does not compare, got 4"),
        ({"choose": False, "amplitudes": (0.5,)}, "are candidates, which `choose=False` does not compare, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(setting, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        GenerationConfig(**setting)


def test_an_encoder_of_another_policy_is_refused(policy, encoder):
    """Its features would be measured along other bases than those that the adapter is written in."""
    given = policy, encoder.base_model, encoder.tokenizer, SUPPORTS[:1]
    same = TextEncoder(encoder.base_model, encoder.tokenizer, policy.space, max_length=24)
    assert generate_adapters(*given, encoder=same)[0].state.equal(generate_adapters(*given)[0].state)
    random = CoreSpace.from_trajectories(policy.layout, 2, [_random_adapter(policy.layout)])
    for other, message in (
        (TextEncoder(encoder.base_model, encoder.tokenizer, random, max_length=24), "the bases of its weight space"),
        (build_encoder(max_length=12), "around another model"),
        (
            TextEncoder(encoder.base_model, encoder.tokenizer, policy.space, max_length=12, pooling="first"),
            r"it reads texts with \(pooling, max_length\) = \('first', 12\), the policy with \('mean', 24\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"{message}.*make it with `encoder_for`"):
            generate_adapters(*given, encoder=other)


def _random_adapter(layout):
    return {s.name: (torch.randn(2, s.d_in), torch.randn(s.d_out, 2)) for s in layout.modules}


def test_a_switch_is_true_or_false():
    with pytest.raises(ValueError, match="GenerationConfig: true or false is needed, got {'choose': 'false'}"):
        GenerationConfig(choose="false")

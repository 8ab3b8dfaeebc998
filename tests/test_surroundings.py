"""What surrounds a generation does not change it: autocast, default types, padding sides, other and merged adapters."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from lohp_peft import (
    AdamWBaseline,
    EvaluationConfig,
    GenerationConfig,
    LoHpConfig,
    evaluate_tasks,
    initialize_lohp_weights,
)
from lohp_peft.adapters.classifier import classifier_features, classifier_linear
from lohp_peft.candidates import TOO_FEW_TO_COMPARE
from lohp_peft.generating import _batches
from lohp_peft.generation import as_trained, encoder_for, generate_adapter, generate_adapters
from lohp_peft.tasks import Examples, Task, solve_head
from tiny_world import (
    WORDS,
    build_bert,
    build_bert_classifier,
    build_policy,
    build_rows,
    build_tokenizer,
)

TARGETS = {"r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]}
CLASSIFIER = {"task_type": "SEQ_CLS", **TARGETS}


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def bert():
    return build_bert()


@pytest.fixture
def policy(bert):
    return build_policy(bert)


def lora_of(model, side):
    return [p for name, p in model.named_parameters() if side in name]


def test_an_autocast_around_it_changes_nothing(bert, policy, tokenizer):
    plain = generate_adapter(policy, bert, tokenizer, build_rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = generate_adapter(policy, bert, tokenizer, build_rows())
    torch.testing.assert_close(inside.state, plain.state, rtol=0, atol=0)
    torch.testing.assert_close(inside.head.weight, plain.head.weight, rtol=0, atol=0)


def test_a_wide_default_type_changes_nothing_with_one_example_a_class(bert, policy, tokenizer):
    rows = list({row["label"]: row for row in build_rows()}.values())
    plain = generate_adapter(policy, bert, tokenizer, rows)
    torch.set_default_dtype(torch.float64)
    try:
        wide = generate_adapter(policy, bert, tokenizer, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(wide.state, plain.state, rtol=0, atol=1e-6)


def test_a_merged_adapter_is_named_before_weights_are_compared(bert, policy, tokenizer):
    model = get_peft_model(bert, LoraConfig(init_lora_weights=False, **TARGETS))
    model.merge_adapter()
    with pytest.raises(ValueError, match="one is merged into .*; unmerge it first"):
        generate_adapter(policy, model, tokenizer, build_rows())


def test_a_policy_in_half_precision_is_refused(bert, policy, tokenizer):
    with pytest.raises(ValueError, match=r"computes in float32 or wider, got torch\.bfloat16"):
        generate_adapter(policy.bfloat16(), bert, tokenizer, build_rows())


def test_an_encoder_that_is_given_counts_and_is_of_the_same_model(bert, policy, tokenizer):
    asked = GenerationConfig(mixed_precision="bf16")
    (made,) = generate_adapters(
        policy, bert, tokenizer, [build_rows()], asked, encoder=encoder_for(policy, bert, tokenizer)
    )
    assert made.report.config["mixed_precision"] == "no"
    (made,) = generate_adapters(policy, bert, tokenizer, [build_rows()], asked)
    assert made.report.config["mixed_precision"] == "bf16"
    with pytest.raises(ValueError, match="`encoder` must be around `base_model`"):
        generate_adapters(
            policy, build_bert(), tokenizer, [build_rows()], encoder=encoder_for(policy, bert, tokenizer)
        )


def test_an_autocast_around_it_changes_no_classifier(tokenizer):
    written = []
    for enabled in (False, True):
        model, policy = build_bert_classifier(), build_policy(build_bert_classifier())
        model = get_peft_model(model, LoHpConfig(**CLASSIFIER))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)
        written.append(dict(model.named_parameters()))
    for name, parameter in written[0].items():
        torch.testing.assert_close(written[1][name], parameter, rtol=0, atol=0)


def test_the_default_type_does_not_round_what_is_written(bert, policy, tokenizer):
    made = generate_adapter(policy, bert, tokenizer, build_rows())
    model = get_peft_model(bert, LoraConfig(**TARGETS))
    torch.set_default_dtype(torch.bfloat16)
    try:
        initialize_lohp_weights(model, policy, build_rows(), tokenizer=tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(
        lora_of(model, "lora_B")[0].data, next(iter(made.lora.values()))[1], rtol=1e-6, atol=1e-7
    )


def test_an_adapter_of_rank_one_shares_no_memory_with_the_policy(bert, tokenizer):
    policy = build_policy(bert, r=1)
    made = generate_adapter(policy, bert, tokenizer, build_rows())
    basis = policy.space.input_basis(0).clone()
    next(iter(made.lora.values()))[0].zero_()
    assert policy.space.input_basis(0).equal(basis)


def test_a_frozen_dora_adapter_stays_frozen(bert, policy, tokenizer):
    model = get_peft_model(bert, LoraConfig(use_dora=True, **TARGETS))
    model.add_adapter("frozen", LoraConfig(use_dora=True, **TARGETS))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    initialize_lohp_weights(model, policy, build_rows(), tokenizer=tokenizer, adapter_name="frozen")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_merged_adapter_is_refused_and_stays_merged(bert, policy, tokenizer):
    model = get_peft_model(bert, LoraConfig(r=2, target_modules=["key"]))  # changes nothing, so that the weights agree
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into \['.*key', '.*key'\]; unmerge it first"):
        generate_adapter(policy, model, tokenizer, build_rows())
    assert all(layer.merged for layer in model.modules() if hasattr(layer, "lora_A"))


def test_the_padding_side_of_the_tokenizer_does_not_count(tokenizer):
    """GPT-2 numbers positions from the left: its features would depend on the padding."""
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(WORDS)}
    config = GPT2Config(**size, pad_token_id=0, bos_token_id=2, eos_token_id=3, num_labels=2, initializer_range=0.3)
    model = get_peft_model(
        GPT2ForSequenceClassification(config).eval(),
        LoHpConfig(task_type="SEQ_CLS", r=2, lora_alpha=2, target_modules=["c_attn"], fan_in_fan_out=True),
    ).base_model.model
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    linear, examples, found = classifier_linear(model, "default", 2), Examples.from_rows(build_rows()), []

    class Reading:
        batch_size, max_length, device = 64, 16, "cpu"

    for side in ("right", "left"):
        tokenizer.padding_side = side
        found.append(classifier_features(model, linear, _batches(tokenizer, examples, Reading)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_trained_copy_of_another_module_is_refused_where_the_head_would_not_see_it(bert, policy, tokenizer):
    config = {"modules_to_save": ["word_embeddings"], "task_type": "FEATURE_EXTRACTION", **TARGETS}
    model = get_peft_model(bert, LoHpConfig(**config))
    model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)  # untrained, it is the base model's
    with torch.no_grad():
        model.get_submodule("base_model.model.embeddings.word_embeddings.modules_to_save.default").weight.add_(1)
    with pytest.raises(ValueError, match=r"has trained \['embeddings.word_embeddings'\]"):
        model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)


def test_trained_tokens_are_refused_where_the_head_would_not_see_them(bert, policy, tokenizer):
    config = {"trainable_token_indices": [5, 6], "task_type": "FEATURE_EXTRACTION", **TARGETS}
    model = get_peft_model(bert, LoHpConfig(**config))
    model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(1)
    with pytest.raises(ValueError, match=r"has trained \['embeddings.word_embeddings.*`trainable_token_indices`"):
        model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)


@pytest.mark.filterwarnings("ignore:.*truncated")
def test_long_texts_are_cut_at_their_end_whatever_the_tokenizer_does(bert, policy, tokenizer):
    rows = [{**row, "text": row["text"] + " word1" * 100} for row in build_rows()]
    expected = generate_adapter(policy, bert, tokenizer, rows)
    tokenizer.truncation_side = "left"
    found = generate_adapter(policy, bert, tokenizer, rows)
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0)
    assert tokenizer.truncation_side == "left"


def test_a_classifier_that_returns_tuples_is_solved(policy, tokenizer):
    made = []
    for return_dict in (True, False):
        model = build_bert_classifier()
        model.config.return_dict = return_dict
        model = get_peft_model(model, LoHpConfig(**CLASSIFIER))
        model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=policy)
        made.append(model.get_base_model().classifier.modules_to_save["default"].weight)
    assert torch.equal(*made)


def test_an_unfit_classifier_is_found_before_injection(tmp_path, tokenizer):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 16))

        def forward(self, x):
            return x @ self.weight.T

    model = build_bert_classifier()
    model.classifier, names = Head(), None
    build_policy(model).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    (tmp_path / "support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_rows()))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="needs one classifier with 2 outputs"):
        get_peft_model(
            model,
            LoHpConfig(policy=str(tmp_path / "policy"), support=str(tmp_path / "support.jsonl"), task_type="SEQ_CLS"),
        )
    assert [name for name, _ in model.named_modules()] == names


def test_a_class_without_examples_has_a_finite_score_in_float16(tokenizer):
    labels = {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
    classifier = build_bert_classifier(num_labels=3, **labels).half()
    model = get_peft_model(classifier, LoHpConfig(**CLASSIFIER))
    model.generate_adapter(build_rows(), tokenizer=tokenizer, policy=build_policy(classifier))
    bias = model.get_submodule("base_model.model.classifier.modules_to_save.default").bias
    assert bias.isfinite().all()
    assert bias.argmin() == 2


def test_the_gradient_baseline_trains_beside_adapters_that_are_off(bert, policy, tokenizer):
    """They are off for everything that is compared; the baseline's own must not be."""
    examples, found = Examples.from_rows(build_rows()), []
    for wrapped in (False, True):
        base = build_bert()
        base = get_peft_model(base, LoraConfig(init_lora_weights=False, **TARGETS)) if wrapped else base
        encoder = encoder_for(policy, base, tokenizer)
        with as_trained(policy, base):
            baseline = AdamWBaseline(encoder.base_model, tokenizer, policy, steps=10, learning_rate=1e-2)
            ((adapted, _),) = baseline.fit(examples, 0)
            found.append(adapted.embed(adapted.prepare(examples.texts)).detach())
            before = encoder.embed(encoder.prepare(examples.texts)).detach()
    assert (found[0] - before).abs().max() > 0.1
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_text_without_tokens_is_named(bert, policy, tokenizer):
    tokenizer.build_inputs_with_special_tokens = None
    examples = Examples(("good1", "", "bad1"), (0, 0, 1), ("a", "b"))
    encoder = encoder_for(policy, bert, tokenizer)
    real = encoder.tokenizer
    encoder.tokenizer = lambda *args, **kwargs: real(*args, **{**kwargs, "add_special_tokens": False})
    with pytest.raises(ValueError, match=r"needs at least one token, but 1 have none: rows \[1\]"):
        generate_adapters(policy, bert, tokenizer, [examples], encoder=encoder)


# One example a class, and the same example twice


def test_one_example_a_class_compares_no_candidates(bert, policy, tokenizer):
    """All leave-one-out scores are those of chance there, and rounding would choose."""
    rows = build_rows()
    one = [next(row for row in rows if row["label"] == label) for label in sorted({row["label"] for row in rows})]
    report = generate_adapter(policy, bert, tokenizer, one).report
    assert (report.chosen, report.reason) == ("generated", TOO_FEW_TO_COMPARE)
    assert len(generate_adapter(policy, bert, tokenizer, rows).report.candidates) > 1


def test_repeated_examples_count_once(bert, policy, tokenizer):
    """Twice, one of them would be seen when the other is left out; under another label it is another example."""
    rows = build_rows()
    once = generate_adapter(policy, bert, tokenizer, rows, GenerationConfig(gradient_steps=4))
    with pytest.warns(UserWarning, match=f"{len(rows)} of {2 * len(rows)} examples repeat others"):
        twice = generate_adapter(policy, bert, tokenizer, [*rows, *rows], GenerationConfig(gradient_steps=4))
    torch.testing.assert_close(twice.head.weight, once.head.weight, rtol=0, atol=0)
    assert twice.report.support == once.report.support
    other = Examples(("a", "a", "b"), (0, 1, 1), ("x", "y"))
    assert other.distinct() is other


# Evaluation


def test_tasks_of_one_name_are_refused(bert, policy, tokenizer):
    task = Task("same", Examples.from_rows(build_rows()), ("train",) * len(build_rows()))
    with pytest.raises(ValueError, match=r"names of their own.*\['same'\]"):
        evaluate_tasks(policy, bert, tokenizer, [task, task])


def test_the_head_that_is_asked_for_is_every_methods(bert, policy, tokenizer, monkeypatch):
    asked = []

    def record(features, labels, n_classes, kind="ridge", **kwargs):
        asked.append(kind)
        return solve_head(features, labels, n_classes, kind, **kwargs)

    for module in ("evaluation", "baselines", "candidates"):
        monkeypatch.setattr(f"lohp_peft.{module}.solve_head", record)
    rows = [*build_rows(), *build_rows()]
    half = len(rows) // 2
    task = Task("task", Examples.from_rows(rows), ("train",) * half + ("test",) * half)
    generation = GenerationConfig(head="prototype")
    config = EvaluationConfig(shots=4, draws=1, methods=("none", "generated", "adamw"), adamw_steps=1)
    evaluate_tasks(policy, bert, tokenizer, [task], config=config, generation=generation)
    assert len(asked) > 3
    assert set(asked) == {"prototype"}

"""LOHP as a PEFT method: registration, configuration, injection, generation into a model."""

import copy
import enum
import gzip
import importlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.warning import PeftWarning
from transformers import BertModel, DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Model

import lohp_peft
import tiny_world as tiny
from lohp_peft import GenerationConfig, LoHpConfig, LoHpModel, generate_adapter, initialize_lohp_weights
from lohp_peft.adapters import injected
from lohp_peft.adapters.classifier import classifier_columns
from lohp_peft.cards import adapter_card_of
from lohp_peft.config import generation_record
from lohp_peft.hub import check_fingerprint, push_folder
from lohp_peft.registration import ensure_peft_type
from lohp_peft.tasks import Examples, solve_head

RAW = GenerationConfig(choose=False)
ROWS = tiny.build_rows()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture(scope="module")
def policy():
    return tiny.build_policy(tiny.build_bert())


@pytest.fixture(scope="module")
def policy_folder(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch(tokenizer):
    return tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")


def hidden(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def updates(model, adapter_name="default"):
    """scaling * B @ A of every adapted module."""
    return {
        name: layer.scaling[adapter_name] * layer.lora_B[adapter_name].weight @ layer.lora_A[adapter_name].weight
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }


def expected(policy, base, tokenizer, rows=ROWS, config=RAW):
    return generate_adapter(policy, base, tokenizer, rows, config)


# Registration


def test_the_enum_member_is_like_any_other():
    class Lookalike(str, enum.Enum):
        LORA = "LORA"

    for kind in (Lookalike, PeftType):
        member = ensure_peft_type(kind)
        assert member is ensure_peft_type(kind) is kind.LOHP is kind("LOHP") is kind["LOHP"]
        assert member in list(kind)
        assert member == "LOHP"
        assert hash(member) == hash("LOHP")
        assert (member.name, member.value) == ("LOHP", "LOHP")
        assert str(member) == str(kind.LORA).replace("LORA", "LOHP")
        assert json.dumps(member) == '"LOHP"'
        assert copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(PeftType.LOHP, protocol)) is PeftType.LOHP


def test_reloading_changes_nothing():
    before = (PeftType.LOHP, len(PeftType))
    importlib.reload(lohp_peft)
    assert (PeftType.LOHP, len(PeftType)) == before
    assert get_peft_model(tiny.build_bert(), LoHpConfig(target_modules=["query"])).peft_type == "LOHP"


def run(code, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(Path(lohp_peft.__file__).parents[1])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pickles_of_configurations_and_models_need_no_import(tmp_path):
    """The class they name brings the package in before the enum is asked."""
    model = get_peft_model(tiny.build_bert(), LoHpConfig(target_modules=["query"], r=3))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(LoHpConfig(target_modules=["query"], r=3)))
    torch.save(model, tmp_path / "model.pt")
    code = """
import pickle, torch
config = pickle.load(open("config.pickle", "rb"))
model = torch.load("model.pt", weights_only=False)
print(config.r, config.peft_type.value, type(model.base_model).__name__)
"""
    assert run(code, cwd=tmp_path) == "3 LOHP LoHpModel\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["import lohp_peft, peft", "import peft, lohp_peft", "import transformers, lohp_peft"]
)
def test_import_order(first, tmp_path):
    LoHpConfig(target_modules=["query"], r=3).save_pretrained(tmp_path)
    code = f"{first}\nfrom peft import PeftConfig\nprint(type(PeftConfig.from_pretrained('.')).__name__)"
    assert run(code, cwd=tmp_path) == "LoHpConfig\n"


# Configuration


def test_configuration_round_trip(tmp_path):
    config = LoHpConfig(r=4, target_modules=["query"], policy="someone/policy", seed=3, task_type="SEQ_CLS")
    config.save_pretrained(tmp_path)
    for loaded in (LoHpConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoHpConfig
        assert loaded.to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_everything_wrong_with_a_configuration_is_named():
    with pytest.raises(ValueError, match="`support` needs a `policy`.*`num_candidates`.*`policy_steps`"):
        LoHpConfig(support="a.jsonl", num_candidates=-1, policy_steps=0)
    with pytest.raises(ValueError, match="give it once"):
        LoHpConfig(policy="a/b@" + "0" * 40, policy_revision="0" * 40)
    assert LoHpConfig(policy="a/b", policy_revision="0" * 40).policy_id == "a/b@" + "0" * 40


# Injection


def test_without_a_policy_it_is_lora(batch):
    base = tiny.build_bert()
    before = hidden(base, batch)
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(base), LoHpConfig(target_modules=["query"]))
    torch.manual_seed(1)
    theirs = get_peft_model(base, LoraConfig(target_modules=["query"]))
    assert torch.equal(hidden(ours, batch), before)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    with pytest.raises(ValueError, match="has no policy"):
        ours.generate_adapter(ROWS)


def test_init_weights_false_changes_the_output(batch, policy_folder):
    base = tiny.build_bert()
    before = hidden(base, batch)
    model = get_peft_model(base, LoHpConfig(policy=policy_folder, init_weights=False))
    assert not torch.allclose(hidden(model, batch), before)


def test_rank_and_targets_come_from_the_policy(policy, policy_folder, batch):
    base = tiny.build_bert()
    before = hidden(base, batch)
    config = LoHpConfig(policy=policy_folder)
    model = get_peft_model(base, config)
    mine = model.peft_config["default"]
    assert (mine.r, mine.lora_alpha) == (2, 2)
    assert set(updates(model)) == {spec.name for spec in policy.layout.modules}
    assert torch.equal(hidden(model, batch), before)
    assert (config.r, config.target_modules) == (8, None)  # one configuration may serve several models
    get_peft_model(tiny.build_bert_classifier(), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "`r` is 4, the policy's is 2"),
        ({"lora_alpha": 16}, "`lora_alpha` is 16, the policy's is 2"),
        ({"target_modules": ["key"]}, "`target_modules` matches .*key.*, the policy's are .*query"),
        ({"rank_pattern": {"query": 3}}, "one rank"),
        ({"layers_to_transform": [1]}, r"`layers_to_transform`.* leaves out \['encoder.layer.0.attention.self.query'"),
        ({"layers_to_transform": 0}, r"leaves out \['encoder.layer.1.attention.self.query'"),
        (
            {"exclude_modules": ["key", "value"]},
            r"leaves out \['encoder.layer.0.attention.self.value', '[^,]*1[^,]*value'\]",
        ),
        ({"modules_to_save": ["query"]}, "`modules_to_save` leaves out .*query"),
    ],
)
def test_what_contradicts_the_policy_is_refused(fields, message, policy_folder):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder, **fields))


def test_what_agrees_with_the_policy_is_accepted(policy_folder):
    config = LoHpConfig(policy=policy_folder, r=2, lora_alpha=2, target_modules=["query", "value"])
    assert len(updates(get_peft_model(tiny.build_bert(), config))) == 4
    config = LoHpConfig(policy=policy_folder, layers_to_transform=[0, 1], exclude_modules=["key"])
    assert len(updates(get_peft_model(tiny.build_bert(), config))) == 4


def test_a_classifier_that_is_left_as_it_was_is_told(policy_folder, tokenizer):
    model = get_peft_model(
        tiny.build_bert_classifier(), LoHpConfig(policy=policy_folder, modules_to_save=["classifier"])
    )
    with pytest.warns(
        PeftWarning, match="classifier of BertForSequenceClassification stays .*task_type=None.*'SEQ_CLS'"
    ):
        model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)


def test_numbers_of_numpy_and_torch_can_be_saved(policy_folder, tokenizer, tmp_path):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder, seed=np.int64(3)))
    model.generate_adapter(
        ROWS, tokenizer=tokenizer, config=GenerationConfig(policy_steps=np.int64(2), seed=np.int64(1))
    )
    model.add_adapter("other", LoHpConfig(policy=policy_folder))
    model.generate_adapter(ROWS, tokenizer=tokenizer, adapter_name="other", config=RAW)
    weights = list(torch.tensor([0.5, 0.25]))
    model.add_weighted_adapter(["default", "other"], weights, "both", combination_type="cat")
    model.save_pretrained(tmp_path)
    combined = json.loads((tmp_path / "both" / "lohp_provenance.json").read_text())["combined"]
    assert combined == {"default": 0.5, "other": 0.25}
    for wrong in (0.5, "3", True):
        with pytest.raises(ValueError, match=f"LoHpConfig: whole numbers are needed, got {{'seed': {wrong!r}}}"):
            LoHpConfig(seed=wrong)
        with pytest.raises(ValueError, match=f"GenerationConfig: whole numbers are needed, got {{'seed': {wrong!r}}}"):
            GenerationConfig(seed=wrong)


def test_another_architecture_is_refused(policy_folder):
    with pytest.raises(ValueError, match="4 of 4 modules differ"):
        get_peft_model(tiny.build_llama(), LoHpConfig(policy=policy_folder))


# Generation


def test_generated_weights_are_the_adapter(policy, policy_folder, tokenizer, batch):
    base = tiny.build_bert()
    made = expected(policy, base, tokenizer)
    with injected(base, policy.space, made.state[None]):
        wanted = hidden(base, batch)
    model = get_peft_model(base, LoHpConfig(policy=policy_folder, task_type="FEATURE_EXTRACTION"))
    report = model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    assert report.chosen == "generated"
    for name, update in updates(model).items():
        a, b = made.lora[name]
        assert torch.equal(update, b @ a)
        assert update.any()
    torch.testing.assert_close(hidden(model, batch), wanted, atol=1e-5, rtol=1e-4)
    head = model.adapter_head()
    assert torch.equal(head.weight, made.head.weight)
    assert type(model.base_model) is LoHpModel


def test_generation_leaves_the_model_as_it_was(policy_folder, tokenizer):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder)).train()
    model.base_model.model.pooler.eval()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    training = {name: m.training for name, m in model.named_modules()}
    untouched = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    random = torch.get_rng_state()
    model.generate_adapter(ROWS, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert {name: m.training for name, m in model.named_modules()} == training
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in untouched.items())
    assert model.active_adapters == ["default"]


def test_generating_again_does_not_see_what_was_generated(policy_folder, tokenizer):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder))
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    first = updates(model)
    model.generate_adapter(tiny.build_rows(seed=5), tokenizer=tokenizer, config=RAW)
    assert any(not torch.equal(update, first[name]) for name, update in updates(model).items())
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    assert all(torch.equal(update, first[name]) for name, update in updates(model).items())


def test_settings_of_the_configuration_are_used(policy_folder, tokenizer):
    config = LoHpConfig(policy=policy_folder, policy_steps=1, num_candidates=2, seed=7)
    report = get_peft_model(tiny.build_bert(), config).generate_adapter(ROWS, tokenizer=tokenizer)
    assert (report.policy_steps, report.config["seed"]) == (1, 7)
    assert [c.name for c in report.candidates] == ["generated", "rollout 1", "rollout 2", "none"]


def test_a_second_adapter_that_is_not_active(policy, policy_folder, tokenizer, batch):
    base = tiny.build_bert()
    made = expected(policy, base, tokenizer, tiny.build_rows(seed=5))
    model = get_peft_model(base, LoHpConfig(policy=policy_folder))
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    before = hidden(model, batch)
    model.add_adapter("other", LoHpConfig(policy=policy_folder))
    model.generate_adapter(tiny.build_rows(seed=5), tokenizer=tokenizer, adapter_name="other", config=RAW)
    assert torch.equal(hidden(model, batch), before)
    for name, update in updates(model, "other").items():
        a, b = made.lora[name]
        assert torch.equal(update, b @ a)
    with pytest.raises(ValueError, match=r"one of \['default', 'other'\]"):
        model.generate_adapter(ROWS, tokenizer=tokenizer, adapter_name="third")


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_base_gets_exact_weights(autocast, tokenizer, batch):
    base = tiny.build_bert().to(torch.bfloat16)
    policy = tiny.build_policy(base)
    made = expected(policy, base, tokenizer)
    model = get_peft_model(
        base, LoHpConfig(target_modules=["query", "value"], r=2, lora_alpha=2), autocast_adapter_dtype=autocast
    )
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW, policy=policy)
    for name, update in updates(model).items():
        a, b = made.lora[name]
        assert torch.equal(update, b @ a)
    assert hidden(model, batch).dtype == torch.bfloat16


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_variants_compute_the_generated_update(fields, policy, policy_folder, tokenizer, batch):
    base = tiny.build_bert()
    made = expected(policy, base, tokenizer)
    with injected(base, policy.space, made.state[None]):
        wanted = hidden(base, batch)
    model = get_peft_model(base, LoHpConfig(policy=policy_folder, **fields))
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    torch.testing.assert_close(hidden(model, batch), wanted, atol=1e-4, rtol=1e-3)


def test_a_plain_lora_of_larger_rank_and_more_modules(policy, tokenizer, batch):
    base = tiny.build_bert()
    made = expected(policy, base, tokenizer)
    with injected(base, policy.space, made.state[None]):
        wanted = hidden(base, batch)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["query", "key", "value"])
    model = get_peft_model(base, config)
    report = initialize_lohp_weights(model, policy, ROWS, tokenizer=tokenizer, config=RAW)
    assert not report.abstained
    torch.testing.assert_close(hidden(model, batch), wanted, atol=1e-5, rtol=1e-4)
    layer = model.get_base_model().encoder.layer[0].attention.self.query
    assert layer.lora_A["default"].weight[2:].any()  # the rows beyond the policy's rank can be trained
    assert model.peft_type == "LORA"
    assert type(model.base_model) is LoraModel
    assert "_generation_record" not in config.__dict__


@pytest.mark.parametrize("kind", ["ours", "plain", "dora", "classifier"])
def test_what_was_generated_in_inference_mode_can_be_trained(kind, policy, policy_folder, tokenizer, batch):
    states = []
    for in_inference_mode in (False, True):
        if kind in ("plain", "dora"):
            config = LoraConfig(r=2, target_modules=["query", "value"], use_dora=kind == "dora")
        else:
            config = LoHpConfig(policy=policy_folder, task_type="SEQ_CLS" if kind == "classifier" else None)
        base = tiny.build_bert_classifier() if kind == "classifier" else tiny.build_bert()
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        with torch.inference_mode(in_inference_mode):
            initialize_lohp_weights(model, policy, ROWS, tokenizer=tokenizer, config=RAW)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())
    model.train()(**batch)[0].square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name}
    assert trained
    assert all(gradient is not None and gradient.any() for gradient in trained.values())


def test_everything_that_stands_in_the_way_is_named(policy, tokenizer):
    def initialize(model, **changes):
        initialize_lohp_weights(model, policy, ROWS, **{"tokenizer": tokenizer, "config": RAW, **changes})

    with pytest.raises(ValueError, match="lacks the policy's modules .*value.*rank 1 is below the policy's 2"):
        initialize(get_peft_model(tiny.build_bert(), LoraConfig(r=1, target_modules=["query"])))
    random = LoraConfig(target_modules=["query", "value", "key"], init_lora_weights=False)
    with pytest.raises(ValueError, match="key is no module of the policy, but its update is not zero"):
        initialize(get_peft_model(tiny.build_bert(), random))
    changed = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'pissa' changes the base weights"):
        initialize(get_peft_model(tiny.build_bert(), changed))
    model = get_peft_model(tiny.build_bert(), LoraConfig(r=2, target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="one of"):
        initialize(model, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        initialize(model)
    with pytest.raises(TypeError, match="PeftModel with a LoraConfig, got BertModel"):
        initialize(tiny.build_bert())


def test_another_base_model_or_tokenizer_is_refused_before_anything_is_written(policy_folder, tokenizer):
    other = tiny.build_bert()
    torch.nn.init.normal_(other.embeddings.word_embeddings.weight)
    model = get_peft_model(other, LoHpConfig(policy=policy_folder))
    with pytest.raises(ValueError, match="was trained on base model 'someone/tiny'"):
        model.generate_adapter(ROWS, tokenizer=tokenizer)
    assert not any(update.any() for update in updates(model).values())
    with pytest.raises(ValueError, match="pass `tokenizer`"):
        model.generate_adapter(ROWS)


def test_the_tokenizer_beside_the_base_model_is_found(policy_folder, tokenizer, tmp_path):
    tiny.build_bert().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = get_peft_model(BertModel.from_pretrained(tmp_path), LoHpConfig(policy=policy_folder))
    assert model.generate_adapter(ROWS, config=RAW).chosen == "generated"


# Classifiers


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_classifier_is_solved_on_what_it_reads(family, tokenizer):
    build = {"bert": tiny.build_bert_classifier, "llama": tiny.build_llama_classifier}[family]
    base = build(num_labels=3)
    policy = tiny.build_policy(base)
    original = {name: p.clone() for name, p in base.named_parameters()}
    rows = tiny.build_rows(n_classes=3, shots=8)
    config = LoHpConfig(target_modules=tiny.TARGETS[family], r=2, lora_alpha=2, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    model.generate_adapter(rows, tokenizer=tokenizer, policy=policy, config=RAW)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    if family == "llama":
        batch.pop("token_type_ids", None)
    names = sorted({row["label"] for row in rows})
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    inner, last = model.get_base_model(), batch["attention_mask"].sum(-1) - 1
    with torch.no_grad():
        if family == "bert":
            features = inner.bert(**batch).pooler_output
        else:
            features = inner.model(**batch).last_hidden_state[torch.arange(len(rows)), last]
    wanted = solve_head(features, labels, 3, policy.config.head, ridge=policy.config.ridge).logits(features)
    found = logits(model, batch)
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.8
    assert (found.argmax(-1) == labels).float().mean() > 0.4  # chance is a third, and a random base model knows little
    with model.disable_adapter():
        disabled = logits(model, batch)
    fresh = build(num_labels=3)
    assert torch.equal(disabled, logits(fresh, batch))
    assert all(torch.equal(p, original[name]) for name, p in fresh.named_parameters())


def test_labels_follow_the_model(tokenizer):
    """By name where the model knows the names, by number where they are numbers."""
    policy = tiny.build_policy(tiny.build_bert_classifier())
    named = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    rows = tiny.build_rows(shots=8)

    def predictions(base, rows):
        config = LoHpConfig(target_modules=["query", "value"], r=2, lora_alpha=2, task_type="SEQ_CLS")
        model = get_peft_model(base, config)
        model.generate_adapter(rows, tokenizer=tokenizer, policy=policy, config=RAW)
        return logits(model, tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))

    plain = predictions(tiny.build_bert_classifier(), rows)
    renamed = predictions(tiny.build_bert_classifier(**named), rows)
    torch.testing.assert_close(plain, renamed.flip(-1))
    numbered = [{**row, "label": {"bad": 0, "good": 2}[row["label"]]} for row in rows]
    wide = predictions(tiny.build_bert_classifier(num_labels=3), numbered)
    torch.testing.assert_close(wide[:, [0, 2]], plain)
    assert (wide[:, 1] < -50).all()
    with pytest.raises(ValueError, match=r"has the labels \['bad', 'good'\], the model 3 classes"):
        predictions(tiny.build_bert_classifier(num_labels=3), rows)
    others = {"id2label": {0: "GOOD", 1: "Bad"}, "label2id": {"GOOD": 0, "Bad": 1}}
    torch.testing.assert_close(predictions(tiny.build_bert_classifier(**others), rows), renamed)
    for names in ("positive", "negative"), ("good", "LABEL_1"), ("good", "Good"):
        base = tiny.build_bert_classifier(
            id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )
        with pytest.raises(ValueError, match=f"labels .'bad', 'good'., the model 2 classes .*{names[0]}.*{names[1]}"):
            predictions(base, rows)


@pytest.mark.parametrize(
    ("classes", "labels", "columns"),
    [
        (["no", "yes"], ["yes", "no"], [1, 0]),
        (["No", "YES"], ["yes", "no"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["yes", "no"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (["x", "y", "z"], ["2", "0"], [2, 0]),
        (["1", "0"], ["0", "1"], [1, 0]),
        (["No", "yes"], ["no", "No"], None),
        (["No", "NO", "yes"], ["no", "yes"], None),
        (["LABEL_0", "LABEL_1"], ["1", "01"], [0, 1]),
        (["x", "y"], ["1", "01"], None),
        (["x", "y"], ["1", "2"], None),
        (["x", "y"], ["a", "b"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["a", "b"], None),
    ],
)
def test_columns_of_labels(classes, labels, columns):
    config = SimpleNamespace(id2label=dict(enumerate(classes)), num_labels=len(classes))
    if columns is None:
        with pytest.raises(ValueError, match=f"the model {len(classes)} classes"):
            classifier_columns(config, labels)
    else:
        assert classifier_columns(config, labels) == columns


@pytest.mark.parametrize("what", ["classifier_features", "solve_head", "write_classifier"])
@pytest.mark.parametrize(("use_dora", "lean"), [(False, False), (True, False), (False, True)])
def test_a_generation_that_fails_halfway_leaves_the_adapter_as_it_was(
    what, use_dora, lean, policy_folder, tokenizer, monkeypatch
):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    config = LoHpConfig(policy=policy_folder, task_type="SEQ_CLS", use_dora=use_dora)
    model = get_peft_model(tiny.build_bert_classifier(), config, low_cpu_mem_usage=lean)
    if not lean:
        model.generate_adapter(tiny.build_rows(seed=5), tokenizer=tokenizer, config=RAW)
    before = {name: tensor if tensor.is_meta else tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    record = generation_record(model.peft_config["default"])
    with monkeypatch.context() as patch:
        patch.setattr(f"lohp_peft.{'tasks' if what == 'solve_head' else 'generating'}.{what}", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta == before[name].is_meta
        assert tensor.is_meta or torch.equal(tensor, before[name]), name
    assert all(p is trained[name] for name, p in model.named_parameters() if p.requires_grad)
    assert generation_record(model.peft_config["default"]) is record
    assert model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW).chosen == "generated"


def test_language_models_can_be_adapted_without_a_head(tokenizer):
    base = tiny.build_llama()
    policy = tiny.build_policy(base, kind="lora_b")
    config = LoHpConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=2, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    before = model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    model.generate_adapter(ROWS, tokenizer=tokenizer, policy=policy, config=RAW)
    assert any(update.any() for update in updates(model).values())
    assert model.adapter_head() is None
    assert model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False).shape == before.shape


# Generation at injection


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_support_generates_at_injection(suffix, policy_folder, tokenizer, tmp_path):
    base = tmp_path / "base"
    tiny.build_bert_classifier().save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = [json.dumps(row) for row in [*ROWS, {"text": "", "label": "x", "split": "test"}]]
    path = tmp_path / f"task.{suffix}"
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(path, "wt") as stream:
        stream.write("\n".join(lines))
    load = lambda: type(tiny.build_bert_classifier()).from_pretrained(base)  # noqa: E731
    batch = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    config = LoHpConfig(policy=policy_folder, support=str(path), task_type="SEQ_CLS", num_candidates=1)
    at_once = get_peft_model(load(), config).eval()
    later = get_peft_model(load(), LoHpConfig(policy=policy_folder, task_type="SEQ_CLS", num_candidates=1)).eval()
    later.generate_adapter(ROWS, tokenizer=tokenizer)
    assert torch.equal(logits(at_once, batch), logits(later, batch))
    with at_once.disable_adapter():
        assert torch.equal(logits(at_once, batch), logits(load().eval(), batch))
    at_once.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "_generation_record" not in config.__dict__
    untouched = get_peft_model(
        load(), copy.deepcopy(LoHpConfig(policy=policy_folder, support=str(path), init_weights=False))
    )
    assert untouched.peft_config["default"].__dict__.get("_generation_record") is None


def test_an_ungenerated_adapter_loads_without_its_policy(policy_folder, batch, tmp_path):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder, init_weights=False))
    config = model.peft_config["default"]
    config.policy, config.support = "someone/gone", "someone/gone"
    model.save_pretrained(tmp_path)
    wanted = hidden(model.eval(), batch)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny.build_bert(), tmp_path, **options).eval()
        assert loaded.peft_type == "LOHP"
        assert torch.equal(hidden(loaded, batch), wanted)


def test_nothing_is_generated_on_meta_tensors(policy_folder, tokenizer, tmp_path, policy):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    config = LoHpConfig(policy=policy_folder, support=str(path))
    model = get_peft_model(tiny.build_bert(), config, low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in model.named_parameters() if "lora_" in name)
    model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    made = expected(policy, tiny.build_bert(), tokenizer)
    for name, update in updates(model).items():
        assert torch.equal(update, made.lora[name][1] @ made.lora[name][0])


@pytest.mark.parametrize(
    ("content", "message"), [("not json\n[", "line 1.*line 2"), (None, "does not exist")], ids=["damaged", "missing"]
)
def test_support_files_that_cannot_be_read(content, message, policy_folder, tokenizer, tmp_path):
    path = tmp_path / "task.jsonl"
    if content is not None:
        path.write_text(content)
    tiny.build_bert().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoHpConfig(policy=policy_folder, support=str(path)))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


# Together with PEFT's own methods


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_combining_generated_adapters_does_not_run_the_policy(
    combination, policy_folder, tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    base = tiny.build_bert()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoHpConfig(policy=policy_folder, support=str(path)))
    model.add_adapter("other", LoHpConfig(policy=policy_folder))
    model.generate_adapter(tiny.build_rows(seed=5), tokenizer=tokenizer, adapter_name="other", config=RAW)
    parts = updates(model), updates(model, "other")
    monkeypatch.setattr("lohp_peft.generation.load_policy", lambda _policy: pytest.fail("the policy was loaded"))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=combination)
    combined = updates(model, "both")
    if combination != "linear":
        for name, update in combined.items():
            torch.testing.assert_close(update, 0.5 * parts[0][name] + 0.5 * parts[1][name], atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "both" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_tuner_shadows_nothing_of_the_base_model():
    """PeftModelForCausalLM reaches `generate` and `config` through the tuner."""
    own = {name for cls in (LoHpModel,) for name in vars(cls) if not name.startswith("_")}
    assert not {name for name in own - set(dir(LoraModel)) if hasattr(tiny.build_llama(), name)}


def test_a_classifier_that_reads_something_else_than_the_policy_is_told(policy_folder, tokenizer):
    config = LoHpConfig(policy=policy_folder, task_type="SEQ_CLS")
    with pytest.warns(PeftWarning, match="BertForSequenceClassification reads other features .* pools by 'mean'"):
        get_peft_model(tiny.build_bert_classifier(), config).generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    base = tiny.build_llama_classifier()
    last = tiny.build_policy(base, pooling="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
        initialize_lohp_weights(model, last, ROWS, tokenizer=tokenizer, config=RAW)


def test_classes_without_examples_are_named(policy, tokenizer):
    examples = Examples.from_rows(ROWS)
    more = Examples(examples.texts, examples.labels, (*examples.label_names, "other"))
    with pytest.warns(UserWarning, match="There are no examples of other, which will not be predicted"):
        generate_adapter(policy, tiny.build_bert(), tokenizer, more, RAW)


def test_trainable_tokens_of_another_adapter(policy_folder, tokenizer, batch):
    """PEFT's layer of trained tokens raises for adapters that have none."""
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder, trainable_token_indices=[5, 6]))
    model.add_adapter("plain", LoHpConfig(policy=policy_folder))
    for name in ("plain", "default"):
        model.set_adapter(name)
        model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
    hidden(model, batch)
    assert all(update.any() for name in ("plain", "default") for update in updates(model, name).values())


def test_a_combination_tells_what_its_parts_share_and_whether_they_were_trained(policy_folder, tokenizer, tmp_path):
    model = get_peft_model(tiny.build_bert(), LoHpConfig(policy=policy_folder, task_type="FEATURE_EXTRACTION"))
    model.add_adapter("other", LoHpConfig(policy=policy_folder, task_type="FEATURE_EXTRACTION"))
    for name in ("default", "other"):
        model.generate_adapter(ROWS, tokenizer=tokenizer, adapter_name=name, config=RAW)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "fresh", combination_type="svd")
    next(p for n, p in model.named_parameters() if "lora_B.other" in n).data.add_(1)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "trained", combination_type="svd")
    model.save_pretrained(tmp_path)
    told = {n: json.loads((tmp_path / n / "lohp_provenance.json").read_text()) for n in ("fresh", "trained")}
    for record in told.values():
        assert record["base_model"] == "someone/tiny"
        assert record["base_fingerprint"] == record["default"]["base_fingerprint"]
        assert record["gradient_steps"] == 0
    assert "weights_changed" not in told["fresh"]
    assert told["trained"]["weights_changed"] is True
    for name in told:
        push_folder(tmp_path / name, "me/both", dry_run=True)
        assert "A weighted sum of adapters for " in adapter_card_of(tmp_path / name)
        check_fingerprint(tmp_path / name, tiny.build_bert())


def test_a_policy_may_be_a_path(policy_folder, tokenizer):
    made = generate_adapter(Path(policy_folder), tiny.build_bert(), tokenizer, ROWS, RAW)
    assert made.report.policy["name"] == policy_folder
    model = get_peft_model(tiny.build_bert(), LoraConfig(r=2, target_modules=tiny.TARGETS["bert"]))
    initialize_lohp_weights(model, Path(policy_folder), ROWS, tokenizer=tokenizer, config=RAW)
    assert all(update.any() for update in updates(model).values())


def test_parts_before_the_classifier_that_are_not_saved_are_named(tokenizer, tmp_path):
    """Their weights are nobody's but this model's: a classifier solved behind them is worth nothing on others."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = DebertaV2Config(vocab_size=len(tiny.WORDS), initializer_range=0.3, pad_token_id=0, **size)
    torch.manual_seed(0)
    DebertaV2Model(config).save_pretrained(tmp_path / "base")
    build = lambda: DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "base").eval()  # noqa: E731
    tiny.build_policy(build(), targets=["value_proj"]).save_pretrained(tmp_path / "policy")
    options = {"policy": str(tmp_path / "policy"), "task_type": "SEQ_CLS"}
    texts = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    for saved, warns in ((None, True), (["pooler"], False)):
        model = get_peft_model(build(), LoHpConfig(**options, modules_to_save=saved))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model.generate_adapter(ROWS, tokenizer=tokenizer, config=RAW)
        messages = [str(w.message) for w in told if "modules_to_save=['pooler']" in str(w.message)]
        assert bool(messages) == warns
        model.eval().save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
        same = torch.allclose(logits(loaded, texts), logits(model, texts), atol=1e-5)
        assert same != warns

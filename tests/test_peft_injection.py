"""What a LOHP configuration does at injection, and what it must not do when an adapter is only loaded."""

import copy
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from transformers import BertForQuestionAnswering, BertForTokenClassification

import tiny_world as tiny
from lohp_peft import LoHpConfig
from lohp_peft.config import generation_record


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model, its tokenizer, a policy and a support file."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny.build_bert()
    base.save_pretrained(folder / "base")
    tiny.build_tokenizer().save_pretrained(folder / "base")
    tiny.build_policy(base).save_pretrained(folder / "policy")
    (folder / "support.jsonl").write_text("\n".join(map(json.dumps, tiny.build_rows())))
    return folder


@pytest.fixture
def base(world):
    return load_base(world)


def load_base(world):
    return type(tiny.build_bert()).from_pretrained(world / "base").eval()


def configuration(world, **fields):
    return LoHpConfig(**{"policy": str(world / "policy"), "support": str(world / "support.jsonl"), **fields})


def matrices(model, adapter_name="default"):
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.scaling]
    return [side[adapter_name].weight for layer in layers for side in (layer.lora_A, layer.lora_B)]


def names(model):
    return [name for name, _ in model.named_modules()]


def test_a_support_set_that_does_not_do_leaves_the_model_alone(world, base, tmp_path):
    (tmp_path / "one_class.jsonl").write_text('{"text": "word1", "label": "x"}\n')
    before = names(base)
    with pytest.raises(ValueError, match="at least two classes"):
        get_peft_model(base, configuration(world, support=str(tmp_path / "one_class.jsonl")))
    assert names(base) == before


def test_excluded_modules_leave_the_model_alone(world, base):
    before = names(base)
    with pytest.raises(ValueError, match="`exclude_modules`.* leaves out .*query"):
        get_peft_model(base, configuration(world, exclude_modules=["query"]))
    assert names(base) == before


def test_a_merged_adapter_is_named_before_another_is_generated(world, base):
    model = get_peft_model(base, configuration(world))
    model.merge_adapter()
    with pytest.raises(ValueError, match="one is merged into .*; unmerge it first"):
        model.add_adapter("other", configuration(world))
    assert list(model.peft_config) == ["default"]


def test_rows_without_a_split_are_for_training(world, base, tmp_path):
    rows = [{**row, "split": None} for row in tiny.build_rows()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = matrices(get_peft_model(base, configuration(world, support=str(tmp_path / "rows.jsonl"))))
    theirs = matrices(get_peft_model(load_base(world), configuration(world)))
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("support", [True, False])
def test_more_steps_than_the_policy_has_leave_the_model_alone(support, world, base):
    before = names(base)
    fields = {} if support else {"support": None}
    with pytest.raises(ValueError, match="`policy_steps` is 99, the policy has 2"):
        get_peft_model(base, configuration(world, policy_steps=99, **fields))
    assert names(base) == before
    get_peft_model(base, configuration(world, policy_steps=2, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pad_token_id": None}, "has no padding token"),
        ({"num_labels": 3}, "the model 3 classes"),
        ({"id2label": {0: "left", 1: "right"}}, "labels .'bad', 'good'., the model 2 classes .*'left'.*'right'"),
    ],
)
def test_a_classifier_that_does_not_fit_is_left_alone(fields, message, world, tmp_path):
    tiny.build_bert_classifier().save_pretrained(tmp_path)
    tiny.build_tokenizer().save_pretrained(tmp_path)
    options = {"ignore_mismatched_sizes": True, **fields}
    base = type(tiny.build_bert_classifier()).from_pretrained(tmp_path, **options)
    before = names(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, configuration(world, task_type="SEQ_CLS"))
    assert names(base) == before


def test_a_missing_tokenizer_leaves_the_model_alone(world):
    base = tiny.build_bert()
    before = names(base)
    with pytest.raises(ValueError, match="pass `tokenizer`"):
        get_peft_model(base, configuration(world))
    assert names(base) == before


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_never_asks_for_the_policy(is_trainable, world, base, tmp_path, monkeypatch):
    saved = get_peft_model(base, configuration(world, init_weights=False))
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOHP"

    def refuse(name):
        raise RuntimeError(f"the policy {name} was asked for")

    monkeypatch.setattr("lohp_peft.hub.find_policy", refuse)
    loaded = PeftModel.from_pretrained(load_base(world), tmp_path, is_trainable=is_trainable)
    loaded.load_adapter(tmp_path, "second", is_trainable=is_trainable)
    direct = load_base(world)
    direct.load_adapter(str(tmp_path), is_trainable=is_trainable)
    lean = PeftModel.from_pretrained(load_base(world), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=True)
    for found in (matrices(loaded), matrices(loaded, "second"), matrices(direct), matrices(lean)):
        assert all(torch.equal(a, b) for a, b in zip(found, matrices(saved), strict=True))


@pytest.mark.parametrize("reader", [LoHpConfig, PeftConfig])
def test_a_configuration_saved_without_weights_follows_its_policy(reader, world, base, tmp_path):
    configuration(world).save_pretrained(tmp_path)
    model = get_peft_model(base, reader.from_pretrained(tmp_path))
    assert model.peft_config["default"].r == 2
    assert generation_record(model.peft_config["default"]) is not None


def test_without_memory_nothing_is_generated_yet(world, base):
    with pytest.warns(UserWarning, match="not generated"):
        model = get_peft_model(base, configuration(world), low_cpu_mem_usage=True)
    assert all(matrix.is_meta for matrix in matrices(model))
    model.generate_adapter(tiny.build_rows(), tokenizer=tiny.build_tokenizer())
    assert not any(matrix.is_meta for matrix in matrices(model))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_type_of_generated_weights_is_the_one_asked_for(autocast, dtype, use_dora, world, base, tmp_path):
    tiny.build_policy(base.to(torch.bfloat16)).save_pretrained(tmp_path)
    config = configuration(world, policy=str(tmp_path), use_dora=use_dora)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    assert any(matrix.any() for matrix in matrices(model))
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


@pytest.mark.parametrize(
    ("task_type", "model_class", "head"),
    [
        ("TOKEN_CLS", BertForTokenClassification, "classifier"),
        ("QUESTION_ANS", BertForQuestionAnswering, "qa_outputs"),
    ],
)
def test_the_head_of_every_task_is_trained_and_saved(task_type, model_class, head, world, tmp_path):
    config = configuration(world, support=None, task_type=task_type)
    model = get_peft_model(tiny.build_bert(model_class), config)
    assert head in model.peft_config["default"].modules_to_save
    model.get_base_model().get_submodule(head).modules_to_save["default"].bias.data.fill_(7.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build_bert(model_class), tmp_path)
    assert (loaded.get_base_model().get_submodule(head).modules_to_save["default"].bias == 7.0).all()


def test_biases_that_an_old_peft_would_not_save_are_told(base, monkeypatch):
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict", raising=False)
    with pytest.warns(UserWarning, match="saves no biases"):
        get_peft_model(base, LoHpConfig(target_modules=["query"], bias="lora_only"))


def test_a_configuration_holds_names_only():
    with pytest.raises(TypeError, match="must be strings: {'policy': 'object'}"):
        LoHpConfig(policy=object())


def test_a_new_configuration_in_inference_mode_follows_its_policy(world, base):
    """The wish for a frozen adapter; what is loaded with weights has its targets."""
    model = get_peft_model(base, configuration(world, inference_mode=True))
    config = model.peft_config["default"]
    assert config.r == 2
    assert generation_record(config) is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_and_patterns_are_compared_as_peft_reads_them(world, base):
    pattern = r".*(query|value).*"
    model = get_peft_model(base, configuration(world, support=None, target_modules=pattern))
    model.add_adapter("second", configuration(world, support=None, target_modules=pattern))
    with pytest.raises(ValueError, match=r"`target_modules` matches \['encoder.*dense'.*, the policy's are"):
        get_peft_model(load_base(world), configuration(world, target_modules="all-linear"))


@pytest.mark.parametrize("support", ["data/train.json", "train", "../rows.csv"])
def test_a_support_set_that_is_nowhere_is_told_without_a_look_at_the_hub(world, base, support, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=f"`support` must be a file .* '{support}' does not exist"):
        get_peft_model(base, configuration(world, support=support))


def test_a_data_set_that_cannot_be_loaded_is_named(world, base, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("nobody there")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="'me/rows@abc' of `support` cannot be loaded: nobody there"):
        get_peft_model(base, configuration(world, support="me/rows@abc"))


def test_an_empty_name_of_a_policy_is_refused():
    with pytest.raises(ValueError, match="`policy` is empty"):
        LoHpConfig(policy="")


def test_a_data_set_names_its_classes(world, base, monkeypatch):
    rows = tiny.build_rows()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad", "never seen"])})
    data = Dataset.from_list([{**row, "label": int(row["label"] == "bad")} for row in rows], features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    with pytest.warns(UserWarning, match="no examples of never seen"):
        model = get_peft_model(base, configuration(world, support="me/rows", task_type="FEATURE_EXTRACTION"))
    record = generation_record(model.peft_config["default"])
    assert record.provenance["label_names"] == ["good", "bad", "never seen"]


def test_a_seed_out_of_range_leaves_the_model_alone(world, base):
    with pytest.raises(ValueError, match=r"LoHpConfig: `seed` must be in 0..2\*\*63 - 1, got -1"):
        configuration(world, seed=-1)


def test_variants_that_change_base_weights_are_refused_first(world, base):
    kasa = pytest.importorskip("peft.tuners.lora").__dict__.get("KasaConfig")
    if kasa is None:
        pytest.skip("this PEFT has no KaSA")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="kasa_config makes another update, or other base weights"):
        get_peft_model(base, configuration(world, kasa_config=kasa()))
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from adapters.conftest import TARGETS, build_model
from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec, base_model_fingerprint


def test_modules_are_those_of_peft(model, kind, layout):
    peft_model = get_peft_model(model, LoraConfig(target_modules=TARGETS[kind]))
    assert [s.name for s in layout.modules] == peft_model.base_model.targeted_module_names
    for spec in layout.modules:
        layer = model.get_submodule(spec.name)
        assert layer.lora_A["default"].weight.shape == (8, spec.d_in)
        assert layer.lora_B["default"].weight.shape == (spec.d_out, 8)


def test_names_tell_kind_and_layer():
    layout = AdapterLayout.from_model(build_model("llama"), TARGETS["llama"], [1])
    assert layout.modules == (
        ModuleSpec("layers.1.self_attn.q_proj", 16, 16, "q_proj", 1),
        ModuleSpec("layers.1.self_attn.k_proj", 16, 8, "k_proj", 1),
        ModuleSpec("layers.1.self_attn.v_proj", 16, 8, "v_proj", 1),
        ModuleSpec("layers.1.mlp.down_proj", 24, 16, "down_proj", 1),
    )


def test_default_targets_are_those_of_peft(model):
    found = AdapterLayout.from_model(model)
    peft_model = get_peft_model(model, LoraConfig())
    assert [s.name for s in found.modules] == peft_model.base_model.targeted_module_names


def test_an_adapted_model_has_the_same_layout(model, kind, layout):
    get_peft_model(model, LoraConfig(target_modules=TARGETS[kind]))
    assert AdapterLayout.from_model(model, TARGETS[kind]) == layout
    layout.check_fits(model)


def test_round_trip(layout):
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.fingerprint() == layout.fingerprint()
    assert AdapterLayout(layout.modules[1:]).fingerprint() != layout.fingerprint()


def test_every_difference_is_named():
    layout = AdapterLayout.from_model(build_model("bert"), ["query", "value"])
    wrong = AdapterLayout((ModuleSpec("encoder.layer.9.query", 16, 16, "query", 9), *layout.modules[1:]))
    wider = ModuleSpec(layout.modules[3].name, 17, 16, "value", 1)
    wrong = AdapterLayout((*wrong.modules[:3], wider))
    with pytest.raises(ValueError, match="2 of 4 modules differ") as error:
        wrong.check_fits(build_model("bert"))
    assert "encoder.layer.9.query: layout (16, 16), model absent" in str(error.value)
    assert "layout (16, 17), model (16, 16)" in str(error.value)


def test_targets_that_cannot_be_generated():
    with pytest.raises(ValueError, match="word_embeddings"):
        AdapterLayout.from_model(build_model("bert"), ["word_embeddings", "query"])
    with pytest.raises(ValueError, match="matches no module"):
        AdapterLayout.from_model(build_model("bert"), ["q_proj"])
    with pytest.raises(ValueError, match="of BertModel, but 'keey', 'valeu', layer 7, layer 9 did not"):
        AdapterLayout.from_model(build_model("bert"), ["query", "valeu", "keey"], [0, 7, 9])
    with pytest.raises(ValueError, match="no default"):
        AdapterLayout.from_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_fingerprint_survives_saving_and_adapting(model, kind, tmp_path):
    before = base_model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert base_model_fingerprint(type(model).from_pretrained(tmp_path)) == before
    peft_model = get_peft_model(model, LoraConfig(target_modules=TARGETS[kind], use_dora=kind != "gpt2"))
    assert base_model_fingerprint(peft_model) == before
    assert base_model_fingerprint(peft_model.get_base_model()) == before


def test_fingerprint_tells_models_apart():
    before = base_model_fingerprint(build_model("bert"))
    assert base_model_fingerprint(build_model("bert")) == before
    changed = build_model("bert")
    with torch.no_grad():
        changed.encoder.layer[1].attention.self.query.weight.mul_(1.01)
    assert base_model_fingerprint(changed) != before
    assert base_model_fingerprint(build_model("bert", layers=1)) != before


def test_fingerprint_ignores_the_head():
    base = build_model("bert")
    with_head = BertForSequenceClassification(base.config)
    with_head.bert.load_state_dict(base.state_dict())
    assert base_model_fingerprint(with_head) == base_model_fingerprint(base)


def test_what_lies_inside_adapters_is_not_matched():
    pattern = r".*(query|value).*"
    alone = AdapterLayout.from_model(build_model("bert"), pattern)
    adapted = get_peft_model(build_model("bert"), LoraConfig(target_modules=pattern, modules_to_save=["pooler"]))
    assert AdapterLayout.from_model(adapted, pattern) == alone


def test_all_linear_is_that_of_peft():
    layout = AdapterLayout.from_model(build_model("bert"), "all-linear")
    adapted = get_peft_model(build_model("bert"), LoraConfig(target_modules="all-linear"))
    assert [spec.name for spec in layout.modules] == adapted.base_model.targeted_module_names

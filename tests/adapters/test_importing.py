import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from adapters.conftest import TARGETS, build_model
from lohp_peft.adapters.importing import read_checkpoints, read_plain_lora
from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import CoreSpace


def updates(model):
    """What PEFT itself says the update of every module is, as (d_out, d_in)."""
    return {
        name: layer.get_delta_weight("default").T if layer.fan_in_fan_out else layer.get_delta_weight("default")
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


def save(folder, kind="bert", **fields):
    fields = {"target_modules": TARGETS[kind], "init_lora_weights": False, **fields}
    model = get_peft_model(build_model(kind), LoraConfig(**fields))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"^encoder.*value": 5}},
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_the_update_is_that_of_peft(tmp_path, fields):
    model = save(tmp_path, **fields)
    adapter = read_plain_lora(tmp_path)
    expected = updates(model)
    assert set(adapter) == set(expected)
    for name, (a, b) in adapter.items():
        torch.testing.assert_close(b @ a, expected[name])


def test_every_architecture_fits_its_layout(tmp_path, kind):
    model = save(tmp_path, kind, r=2)
    adapter = read_plain_lora(tmp_path)
    layout = AdapterLayout.from_model(model, TARGETS[kind])
    space = CoreSpace.from_trajectories(layout, 2, [adapter])
    assert min(space.encode(adapter).energy_kept.values()) > 0.999
    for name, delta in updates(model).items():
        torch.testing.assert_close(space.delta_weight(space.encode(adapter).state)[name], delta, atol=1e-4, rtol=1e-3)


def test_adapters_that_transformers_saved(tmp_path):
    model = build_model("bert")
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False, r=3))
    model.save_pretrained(tmp_path)
    assert {a.shape[0] for a, _ in read_plain_lora(tmp_path).values()} == {3}


def test_half_precision_is_widened(tmp_path):
    save(tmp_path)
    tensors = {name: x.half() for name, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert {x.dtype for pair in read_plain_lora(tmp_path).values() for x in pair} == {torch.float32}


def test_the_classifier_is_left_out(tmp_path):
    base = BertForSequenceClassification(build_model("bert").config)
    get_peft_model(base, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert sum("classifier" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 2
    assert all("query" in name for name in read_plain_lora(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "neither lora_A nor lora_B of a linear layer"),
        ({"target_modules": ["word_embeddings"]}, "lora_embedding_A"),
    ],
    ids=["dora", "lora_bias", "embedding"],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, fields, message):
    save(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        read_plain_lora(tmp_path)


def test_everything_wrong_with_the_weights_is_named(tmp_path):
    save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lone, rank, shape, nan = [name for name in tensors if "lora_A" in name][:4]
    del tensors[lone]
    tensors[rank] = tensors[rank][:2].contiguous()
    tensors[shape] = tensors[shape][:5].contiguous()
    tensors[shape.replace("lora_A", "lora_B")] = tensors[shape.replace("lora_A", "lora_B")][:, :5].contiguous()
    tensors[nan][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="cannot be read as a plain LoRA") as error:
        read_plain_lora(tmp_path)
    for part in ("only lora_B", "are not of one rank", "rank 5, but the configuration says 8", "not finite"):
        assert part in str(error.value)


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), r"cannot read adapter_config\.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"cannot read adapter_config\.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no JSON object but a list"),
        (lambda folder: change_config(folder, peft_type="IA3"), "'IA3'"),
        (lambda folder: change_config(folder, r=0, lora_alpha=None), "r=0, lora_alpha=None"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "only safetensors are read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 50), "is damaged"),
        (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "no lora_A or lora_B"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_plain_lora(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ],
)
def test_adapters_that_do_more_than_their_update_are_refused(tmp_path, fields, message):
    save(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=rf"is not all that the adapter .* does: .*{message}"):
        read_plain_lora(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        read_plain_lora(tmp_path)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3):
        model = save(tmp_path / f"checkpoint-{step}", r=2)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("no folder")
    found = read_checkpoints(tmp_path)
    assert [step for step, _ in found] == [3, 20, 100]
    for name, (a, b) in found[0][1].items():
        torch.testing.assert_close(b @ a, updates(model)[name])


def test_checkpoints_that_cannot_be_read_are_all_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-1" / "adapter_config.json").unlink()
    change_config(tmp_path / "checkpoint-3", r=5)
    with pytest.raises(ValueError, match=r"checkpoint-1 .*checkpoint-3 "):
        read_checkpoints(tmp_path)


def test_checkpoints_of_other_modules(tmp_path):
    save(tmp_path / "checkpoint-1")
    save(tmp_path / "checkpoint-2", target_modules=["query"])
    with pytest.raises(ValueError, match=r"checkpoint-2 differ from checkpoint-1"):
        read_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="no folder named checkpoint-"):
        read_checkpoints(tmp_path / "checkpoint-1")

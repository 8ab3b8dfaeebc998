"""Each model family: its weight spaces, what is generated for it, and what stock PEFT makes of the saved folder."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM

import tiny_world as tiny
from lohp_peft import (
    AdapterLayout,
    CoreSpace,
    LoHpConfig,
    LoraBSpace,
    generate_adapter,
    generate_adapters,
    initialize_lohp_weights,
    save_uniform_lora,
)
from lohp_peft.adapters import injected
from lohp_peft.adapters.export import plain_lora_config, save_plain_lora
from lohp_peft.tasks import TextEncoder
from models.zoo import BY_NAME, RAW, ROWS, TEXT_FAMILIES, TOKENIZER, VIT, build_bart, build_resnet, policy_of, run

TEXTS = [row["text"] for row in ROWS]
HEADS = [
    (family, task)
    for family in TEXT_FAMILIES
    for task in ("FEATURE_EXTRACTION", *family.heads)
    if task != "SEQ_2_SEQ_LM"
]


def name_of(value):
    return getattr(value, "name", value)


def random_state(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(space.shape, generator=generator) * space.mask


@pytest.mark.parametrize("kind", ["core", "lora_b"])
@pytest.mark.parametrize("family", [*TEXT_FAMILIES, VIT], ids=name_of)
def test_a_state_is_the_same_adapter_in_the_space_and_on_disk(family, kind, tmp_path):
    model, layout = family.build(), family.layout()
    space = CoreSpace.from_base_weights(model, layout, 2) if kind == "core" else LoraBSpace.seeded(layout, 2)
    state = random_state(space)
    adapter = space.decode(state)
    torch.testing.assert_close(space.encode(adapter).state, state, atol=1e-5, rtol=1e-5)
    with injected(model, space, state[None]):
        wanted = run(model, family.inputs())
    assert (wanted - run(model, family.inputs())).abs().max() > 0.01
    save_plain_lora(tmp_path, adapter, plain_lora_config("someone/tiny", layout, 2))
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    torch.testing.assert_close(run(loaded, family.inputs()), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["LoHpConfig", "LoraConfig"])
@pytest.mark.parametrize(("family", "task_type"), HEADS, ids=name_of)
def test_what_is_generated_is_what_stock_peft_loads(family, task_type, method, tmp_path):
    policy, inputs = policy_of(family.name), family.inputs()
    model = family.build(task_type)
    if method == "LoHpConfig":
        policy.save_pretrained(tmp_path / "policy")
        model = get_peft_model(model, LoHpConfig(policy=str(tmp_path / "policy"), task_type=task_type))
        model.generate_adapter(ROWS, tokenizer=TOKENIZER, config=RAW)
    else:
        kinds = sorted({spec.kind for spec in policy.layout.modules})
        patterns = {"rank_pattern": {kinds[0]: 5}, "alpha_pattern": {kinds[0]: 3}}
        config = LoraConfig(r=3, use_rslora=True, target_modules=kinds, task_type=task_type, **patterns)
        model = get_peft_model(model, config)
        initialize_lohp_weights(model, policy, ROWS, tokenizer=TOKENIZER, config=RAW)
    wanted = run(model, inputs)
    with model.disable_adapter():
        assert (run(model, inputs) - wanted).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(family.build(task_type), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(run(loaded, inputs), wanted)
    torch.testing.assert_close(run(loaded.merge_and_unload(), inputs), wanted, atol=1e-4, rtol=1e-4)
    if task_type != "SEQ_CLS":  # a uniform LoRA leaves the classifier out
        save_uniform_lora(model, tmp_path / "uniform")
        uniform = PeftModel.from_pretrained(family.build(task_type), tmp_path / "uniform")
        torch.testing.assert_close(run(uniform, inputs), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=name_of)
def test_adapters_of_several_tasks_are_those_of_each(family):
    policy, supports = policy_of(family.name), [ROWS, tiny.build_rows(3, 4, seed=3)]
    together = generate_adapters(policy, family.build(), TOKENIZER, supports, RAW)
    for support, made in zip(supports, together, strict=True):
        alone = generate_adapter(policy, family.build(), TOKENIZER, support, RAW)
        torch.testing.assert_close(made.state, alone.state, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(made.head.weight, alone.head.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", TEXT_FAMILIES, ids=name_of)
def test_embeddings_are_those_of_the_whole_model(family):
    """Whether or not the layers below the first adapted one are skipped."""
    model, layout = family.build(), family.layout([1] if family.name != "ALBERT" else None)
    space = CoreSpace.from_base_weights(model, layout, 2)
    encoder = TextEncoder(model, TOKENIZER, space)
    assert (encoder.layers is not None) is family.skips
    state = random_state(space)
    batch = TOKENIZER(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad(), injected(model, space, state[None]):
        tokens = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None]
    wanted = (tokens * weight).sum(1) / weight.sum(1)
    with torch.no_grad():
        found = encoder.embed(encoder.prepare(TEXTS), state[None])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_shapes_differ_by_layer_and_module():
    assert [(s.d_in, s.d_out) for s in BY_NAME["Llama"].layout().modules] == [(16, 16), (16, 8)] * 2
    assert [s.d_out for s in BY_NAME["Gemma 4"].layout().modules] == [16, 8, 32, 16]
    assert [(s.d_in, s.d_out) for s in BY_NAME["GPT-2"].layout().modules] == [(16, 48)] * 2  # Conv1D


def test_an_adapter_for_the_encoder_of_t5_loads_into_the_whole_model(tmp_path):
    family = BY_NAME["T5"]
    whole = family.build("SEQ_2_SEQ_LM")
    whole.save_pretrained(tmp_path / "base")
    encoder = family.build()
    encoder.load_state_dict(whole.state_dict(), strict=False)
    policy = tiny.build_policy(encoder, TOKENIZER)
    made = generate_adapter(policy, encoder, TOKENIZER, ROWS, RAW)
    made.save_pretrained(tmp_path / "adapter", task_type=None)
    hidden = {}
    for name, cls, inputs in (
        ("encoder", type(encoder), family.inputs()),
        ("whole", AutoModelForSeq2SeqLM, family.inputs("SEQ_2_SEQ_LM")),
    ):
        loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        output = loaded(**inputs)
        hidden[name] = output.encoder_last_hidden_state if name == "whole" else output.last_hidden_state
    assert torch.equal(hidden["encoder"], hidden["whole"])
    assert (hidden["whole"] - whole.encoder(**family.inputs()).last_hidden_state).abs().max() > 0.01
    with pytest.raises(ValueError, match="pass its encoder alone"):
        generate_adapter(policy, whole, TOKENIZER, ROWS, RAW)


def encode(model, targets):
    TextEncoder(model, TOKENIZER, LoraBSpace.seeded(AdapterLayout.from_model(model, targets), 2))


REFUSED = {
    "BART": (build_bart, "q_proj", ["it is an encoder with a decoder"]),
    "ViT": (VIT.build, "q_proj", ["it reads `pixel_values`"]),
    "ResNet": (build_resnet, "convolution", ["Only linear layers can be generated", "layer.0.convolution (Conv2d)"]),
}
PARTLY = {
    "DeBERTa-v3": (
        BY_NAME["DeBERTa-v3"].build,
        "query_proj",
        ["do not read one row per token", "encoder.layer.1.attention.self.query_proj: [1, 16, 16]"],
    ),
    "Qwen3-MoE": (
        BY_NAME["Qwen3-MoE"].build,
        "experts",
        ["Only linear layers can be generated", "layers.1.mlp.experts (Qwen3MoeExperts)"],
    ),
    "a model with a head": (lambda: BY_NAME["Llama"].build("CAUSAL_LM"), "lm_head", ["pass `model.model`"]),
}


@pytest.mark.parametrize("name", [*REFUSED, *PARTLY])
def test_what_cannot_work_is_refused_by_name(name):
    build, target, messages = (REFUSED | PARTLY)[name]
    with pytest.raises(ValueError, match=re.escape(messages[0])) as refusal:
        encode(build(), [target])
    assert all(message in str(refusal.value) for message in messages)


def test_models_without_weights_and_tokenizers_without_padding_are_refused():
    family = BY_NAME["Llama"]
    with pytest.raises(ValueError, match="not loaded.*embed_tokens"):
        encode(family.build().to("meta"), ["q_proj"])
    bare = tiny.build_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        generate_adapter(policy_of("Llama"), family.build(), bare, ROWS, RAW)


def test_a_classifier_without_a_padding_token_is_refused():
    model = BY_NAME["Llama"].build("SEQ_CLS", pad_token_id=None)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="set `model.config.pad_token_id"):
        initialize_lohp_weights(model, policy_of("Llama"), ROWS, tokenizer=TOKENIZER, config=RAW)
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_an_adapter_of_a_base_model_is_not_saved_for_a_model_with_a_head(tmp_path):
    made = generate_adapter(policy_of("Llama"), BY_NAME["Llama"].build(), TOKENIZER, ROWS, RAW)
    with pytest.raises(ValueError, match="would change nothing.*initialize_lohp_weights"):
        made.save_pretrained(tmp_path / "adapter", task_type="CAUSAL_LM")
    assert not (tmp_path / "adapter").exists()

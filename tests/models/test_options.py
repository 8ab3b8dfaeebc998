"""Each option of PEFT, transformers and torch around a generated adapter: exact, or refused before anything is done."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny_world as tiny
from lohp_peft import LoHpConfig, generate_adapter, initialize_lohp_weights, save_uniform_lora
from models.zoo import BY_NAME, RAW, ROWS, TOKENIZER, policy_of, run

LLAMA = BY_NAME["Llama"]
INPUTS = LLAMA.inputs()


def generated(family=LLAMA, base=None, policy=None, low_cpu_mem_usage=False, **fields):
    """A causal language model whose LoRA was generated."""
    policy = policy or policy_of(family.name)
    base = base or family.build("CAUSAL_LM")
    targets = sorted({spec.kind for spec in policy.layout.modules})
    config = LoraConfig(**{"r": 2, "target_modules": targets, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(base, config, low_cpu_mem_usage=low_cpu_mem_usage)
    initialize_lohp_weights(model, policy, ROWS, tokenizer=TOKENIZER, config=RAW)
    return model


@pytest.fixture(scope="module")
def wanted():
    """Outputs under the adapter as the plainest configuration holds it."""
    return run(generated(), INPUTS)


def reloaded(model, folder, base):
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, folder)
    assert type(loaded.peft_config["default"]) is LoraConfig
    return loaded


WORKS = {
    "rsLoRA": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "DoRA": {"use_dora": True},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "further modules": {"target_modules": ["q_proj", "v_proj", "k_proj", "embed_tokens", "lm_head"]},
    "other starts": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("option", WORKS)
def test_an_option_changes_nothing_about_the_adapter(option, wanted, tmp_path):
    model = generated(**WORKS[option])
    found = run(model, INPUTS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    loaded = reloaded(model, tmp_path, LLAMA.build("CAUSAL_LM"))
    assert torch.equal(run(loaded, INPUTS), found)
    torch.testing.assert_close(run(loaded.merge_and_unload(), INPUTS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_dora_is_exact_and_saved(name, tmp_path):
    family = BY_NAME[name]
    model = generated(family, use_dora=True)
    torch.testing.assert_close(run(model, INPUTS), run(generated(family), INPUTS), atol=1e-4, rtol=1e-4)
    assert torch.equal(run(reloaded(model, tmp_path / "a", family.build("CAUSAL_LM")), INPUTS), run(model, INPUTS))
    with pytest.raises(ValueError, match="Dora"):
        save_uniform_lora(model, tmp_path / "b")


def test_tied_embeddings(wanted, tmp_path):
    base = LLAMA.build("CAUSAL_LM", tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = generated(base=base)
    loaded = reloaded(model, tmp_path, LLAMA.build("CAUSAL_LM", tie_word_embeddings=True))
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not torch.allclose(run(model, INPUTS), wanted)  # another head


@pytest.mark.parametrize("kind", ["core", "lora_b"])
def test_bfloat16_weights(kind, tmp_path):
    def base():
        return LLAMA.build("CAUSAL_LM").to(torch.bfloat16)

    policy = tiny.build_policy(base().model, TOKENIZER, kind=kind)
    model = generated(base=base(), policy=policy)
    found = run(model, INPUTS)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    with model.disable_adapter():
        assert (run(model, INPUTS) - found).abs().max() > 0.1
    loaded = reloaded(model, tmp_path / "adapter", base())
    assert torch.equal(run(loaded, INPUTS), found)
    save_uniform_lora(model, tmp_path / "uniform")
    assert torch.equal(run(PeftModel.from_pretrained(base(), tmp_path / "uniform"), INPUTS), found)
    # merging rounds the weights: 8 bits of each
    torch.testing.assert_close(run(loaded.merge_and_unload(), INPUTS), found, atol=0.3, rtol=0.05)
    with pytest.raises(ValueError, match="in torch.bfloat16; the same weights in another type"):
        generated(base=base())


def test_gradient_checkpointing(wanted):
    base = LLAMA.build("CAUSAL_LM").train()
    base.gradient_checkpointing_enable()
    checkpointed, plain = generated(base=base), generated()
    assert base.training
    assert base.model.gradient_checkpointing
    torch.testing.assert_close(run(checkpointed, INPUTS), wanted)
    checkpointed.enable_input_require_grads()
    gradients = []
    for model in (checkpointed, plain):
        model.train()
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".lora_" in name})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_sees_what_is_generated_into_it(backend, wanted, tmp_path):
    torch.compiler.reset()
    policy_of("Llama").save_pretrained(tmp_path)
    base = LLAMA.build("CAUSAL_LM")
    model = get_peft_model(base, LoHpConfig(policy=str(tmp_path), task_type="CAUSAL_LM")).eval()
    compiled = torch.compile(model, backend=backend)
    before = run(compiled, INPUTS)
    compiled.generate_adapter(ROWS, tokenizer=TOKENIZER, config=RAW)
    torch.testing.assert_close(run(compiled, INPUTS), wanted, atol=1e-5, rtol=1e-5)
    assert (before - wanted).abs().max() > 0.01


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_base_model_is_read_as_it_is(how):
    torch.compiler.reset()
    base = LLAMA.build()
    expected = generate_adapter(policy_of("Llama"), base, TOKENIZER, ROWS, RAW)
    if how == "wrapped":
        base = torch.compile(base, backend="eager")
    else:
        base.compile(backend="eager")
    run(base, INPUTS)
    made = generate_adapter(policy_of("Llama"), base, TOKENIZER, ROWS, RAW)
    torch.testing.assert_close(made.state, expected.state)
    torch.testing.assert_close(made.head.weight, expected.head.weight)


REFUSED = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "changes the base weights"),
    "layer_replication": ({"layer_replication": [(0, 2), (1, 2)]}, "another base model"),
    "lora_bias": ({"lora_bias": True}, "a bias that no policy generates"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "leaves the adapter out"),
}


NO_PATTERNS = "the policy has one rank and alpha"
NOT_ZERO = "is no module of the policy, but its update is not zero"


@pytest.mark.parametrize("option", REFUSED)
def test_a_plain_configuration_that_cannot_hold_it_is_refused(option):
    fields, message = REFUSED[option]
    with pytest.raises(ValueError, match=message):
        generated(**fields)


@pytest.mark.parametrize("option", REFUSED)
def test_our_configuration_is_refused_before_the_model_is_touched(option, tmp_path):
    fields, message = REFUSED[option]
    policy_of("Llama").save_pretrained(tmp_path)
    base = LLAMA.build("CAUSAL_LM")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoHpConfig(policy=str(tmp_path), task_type="CAUSAL_LM", **fields))
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_patterns_are_refused_in_our_configuration(tmp_path):
    policy_of("Llama").save_pretrained(tmp_path)
    config = LoHpConfig(policy=str(tmp_path), rank_pattern={"q_proj": 5})
    with pytest.raises(ValueError, match=NO_PATTERNS):
        get_peft_model(LLAMA.build(), config)


def test_experts_of_a_mixture_start_at_zero_and_are_never_exported_as_linear_layers(tmp_path):
    family, targets = BY_NAME["Qwen3-MoE"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = generated(family, target_parameters=targets)
    found = run(model, INPUTS)
    torch.testing.assert_close(found, run(generated(family), INPUTS), atol=1e-4, rtol=1e-4)
    loaded = reloaded(model, tmp_path / "adapter", family.build("CAUSAL_LM"))
    torch.testing.assert_close(run(loaded, INPUTS), found)
    with pytest.raises(ValueError, match=f"mlp.experts {NOT_ZERO}"):
        generated(family, target_parameters=targets, init_lora_weights=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: the parameter 'down_proj'"):
        save_uniform_lora(model, tmp_path / "uniform")
    assert not (tmp_path / "uniform").exists()

"""Base weights of 8 and 4 bits."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import tiny_world as tiny
from lohp_peft import (
    Examples,
    LoraBSpace,
    PolicyLearningConfig,
    Task,
    WeightPreparationConfig,
    generate_adapter,
    gradient_space,
    initialize_lohp_weights,
    prepare_trajectories,
    save_uniform_lora,
    train_policy,
)
from lohp_peft.adapters import base_model_fingerprint
from lohp_peft.tasks import TextEncoder
from lohp_peft.tasks.requirements import check_gradients
from models.zoo import BY_NAME, RAW, ROWS, TOKENIZER, run

LLAMA = BY_NAME["Llama"]
INPUTS = LLAMA.inputs()
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
QUIET = Console(quiet=True)
NO_GRADIENTS = "bitsandbytes passes no gradients"
NO_DORA = "needs the norms of weights that are quantised"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    LLAMA.build("CAUSAL_LM", **SIZES).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(params=[8, 4], ids=["8-bit", "4-bit"])
def load(request, folder):
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(**{f"load_in_{request.param}bit": True})
    if request.param == 4:
        quantised.bnb_4bit_compute_dtype = torch.bfloat16
    return lambda cls: cls.from_pretrained(folder, quantization_config=quantised, device_map="cpu").eval()


@pytest.fixture
def policy(load):
    return tiny.build_policy(load(AutoModel), TOKENIZER, embedding_size=64)


def generated(load, policy, **fields):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(load(AutoModelForCausalLM), config)
    initialize_lohp_weights(model, policy, ROWS, tokenizer=TOKENIZER, config=RAW)
    return model


def test_an_adapter_over_quantised_weights(load, policy, folder, tmp_path):
    model = generated(load, policy)
    found = run(model, INPUTS)
    with model.disable_adapter():
        assert (run(model, INPUTS) - found).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    save_uniform_lora(model, tmp_path / "uniform")
    for name in ("adapter", "uniform"):
        loaded = PeftModel.from_pretrained(load(AutoModelForCausalLM), tmp_path / name)
        assert torch.equal(run(loaded, INPUTS), found)
    with pytest.raises(ValueError, match="another type or quantised"):
        generate_adapter(policy, AutoModel.from_pretrained(folder), TOKENIZER, ROWS, RAW)


def test_a_fingerprint_does_not_change_with_use(load):
    model = load(AutoModel)
    before = base_model_fingerprint(model)
    run(model, INPUTS)
    assert base_model_fingerprint(model) == before == base_model_fingerprint(load(AutoModelForCausalLM))


def test_dora_over_quantised_weights_is_refused(load, policy):
    with pytest.raises(ValueError, match=NO_DORA):
        generated(load, policy, use_dora=True)


def test_both_stages(load, policy, tmp_path, request):
    model = load(AutoModel)
    encoder = TextEncoder(model, TOKENIZER, LoraBSpace.seeded(policy.layout, 2), pooling="last", max_length=16)
    tasks = [Task(f"t{k}", Examples.from_rows(tiny.build_rows(2, 20, k)), ("train",) * 40) for k in range(2)]
    config = WeightPreparationConfig(optimizers=("adamw",), optimizer_steps=2, record_every=1, rows_per_task=40)
    if "4-bit" in request.node.name:
        for stage in (gradient_space, prepare_trajectories):
            with pytest.raises(ValueError, match="4-bit weights on a CPU, such as layers.0"):
                stage(tasks, encoder, 2 if stage is gradient_space else tmp_path / "runs", config)
        assert not (tmp_path / "runs").exists()
        return
    space = gradient_space(tasks, encoder, 2, config)
    encoder = TextEncoder(model, TOKENIZER, space, pooling="last", max_length=16)
    runs = prepare_trajectories(tasks, encoder, tmp_path / "runs", config, Accelerator(cpu=True), QUIET)
    sizes = {"policy_steps": 2, "hidden_size": 8, "num_directions": 2}
    learning = PolicyLearningConfig(training_steps=1, cloning_steps=1, **sizes)
    learned = train_policy(tasks, encoder, runs, tmp_path / "policy", learning, console=QUIET)
    assert set(generate_adapter(learned, load(AutoModel), TOKENIZER, ROWS, RAW).lora) == {
        spec.name for spec in policy.layout.modules
    }


class FourBit(torch.nn.Linear):
    """Stands in where bitsandbytes is not installed: a weight with the mark of 4 bits."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight.quant_state = object()


def test_4_bit_weights_on_a_cpu_are_told_by_their_mark():
    check_gradients(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=f"1 modules have 4-bit weights on a CPU, such as 1: {NO_GRADIENTS}"):
        check_gradients(torch.nn.Sequential(torch.nn.Linear(4, 4), FourBit()))

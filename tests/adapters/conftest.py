import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import CoreSpace, LoraBSpace

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],  # grouped-query attention: three different shapes
    "gpt2": ["c_attn", "c_proj"],  # Conv1D
}


def build_model(kind, layers=2):
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24
        )
        return BertModel(config).eval()
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
        )
        return LlamaModel(config).eval()
    return GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=layers, n_head=2, n_positions=128)).eval()


def random_adapter(layout, r, dtype=torch.float32, seed=1):
    """Another full rank for every module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: (
            torch.randn(r, s.d_in, generator=generator, dtype=dtype),
            torch.randn(s.d_out, r, generator=generator, dtype=dtype) * 0.1,
        )
        for s in layout.modules
    }


@pytest.fixture(params=sorted(TARGETS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return build_model(kind)


@pytest.fixture
def layout(model, kind):
    return AdapterLayout.from_model(model, TARGETS[kind])


@pytest.fixture(params=["core", "lora_b"])
def space(request, model, layout):
    if request.param == "core":
        return CoreSpace.from_base_weights(model, layout, r=3)
    return LoraBSpace.seeded(layout, r=3, seed=0)


@pytest.fixture
def state(space):
    return torch.randn(space.shape).masked_fill(~space.mask, 0.0) * 0.1

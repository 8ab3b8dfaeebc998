import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters.conftest import TARGETS
from lohp_peft.adapters.injection import injected
from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec
from lohp_peft.adapters.space import LoraBSpace


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


@pytest.fixture
def ids():
    return torch.randint(0, 20, (3, 7))


def merged(model, space, state):
    """The model with the updates added to its weights."""
    with torch.no_grad():
        for name, delta in space.delta_weight(state).items():
            module = model.get_submodule(name)
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta


def test_it_is_the_model_with_merged_weights(model, space, state, ids):
    plain = run(model, ids)
    with injected(model, space, state[None]):
        found = run(model, ids)
    assert torch.equal(run(model, ids), plain)
    merged(model, space, state)
    torch.testing.assert_close(found, run(model, ids), atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-3


def test_the_zero_state_changes_nothing(model, space, ids):
    plain = run(model, ids)
    with injected(model, space, torch.zeros(1, *space.shape)):
        assert torch.equal(run(model, ids), plain)


def test_every_row_has_its_adapter(model, space, ids):
    states = 0.1 * torch.randn(2, *space.shape).masked_fill(~space.mask, 0.0)
    owner = torch.tensor([1, 0, 1])
    with injected(model, space, states, owner):
        together = run(model, ids)
    for n in range(3):
        with injected(model, space, states[owner[n]][None]):
            torch.testing.assert_close(together[n : n + 1], run(model, ids[n : n + 1]), atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_states_only(model, space, state, ids):
    model.requires_grad_(False)
    states = state[None].clone().requires_grad_(True)
    with injected(model, space, states):
        model(input_ids=ids).last_hidden_state.square().mean().backward()
    assert states.grad[0][space.mask].ne(0).float().mean() > 0.9


def test_inside_a_peft_model_it_adds_to_the_adapter(model, kind, space, state, ids):
    peft_model = get_peft_model(model, LoraConfig(target_modules=TARGETS[kind], init_lora_weights=False))
    with injected(peft_model, space, state[None]), peft_model.disable_adapter():
        found = run(peft_model, ids)
    with injected(peft_model, space, state[None]):
        both = run(peft_model, ids)
    base = peft_model.unload()
    with injected(base, space, state[None]):
        torch.testing.assert_close(found, run(base, ids))
    assert (both - found).abs().max() > 1e-3


def test_hooks_go_even_after_an_error(model, space, state, ids):
    plain = run(model, ids)
    with pytest.raises(RuntimeError, match="mine"), injected(model, space, state[None]):
        raise RuntimeError("mine")
    assert torch.equal(run(model, ids), plain)


def test_unknown_modules_are_all_named(model, kind):
    specs = tuple(ModuleSpec(f"nowhere.{i}.{kind}", 4, 4, kind, i) for i in range(2))
    space = LoraBSpace.seeded(AdapterLayout(specs), 2)
    with (
        pytest.raises(ValueError, match=rf"nowhere\.0\.{kind}, nowhere\.1\.{kind}"),
        injected(model, space, torch.zeros(1, *space.shape)),
    ):
        pass


def test_outputs_keep_their_type(model, space, state, ids):
    model.to(torch.bfloat16)
    with injected(model, space, state[None]):
        assert run(model, ids).dtype == torch.bfloat16

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from lohp_peft.adapters import AdapterLayout, CoreSpace, LoraBSpace
from lohp_peft.adapters.importing import read_checkpoints
from lohp_peft.trajectories.importing import import_checkpoints

STEPS = (5, 20, 10)


@pytest.fixture
def run(tmp_path):
    """Three checkpoints of a LoRA, their scaling not 1, and the layout they cover."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    base = BertModel(config)
    layout = AdapterLayout.from_model(base, ["query", "value"])
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    return tmp_path, layout


def test_bases_of_the_run_keep_all_of_it(run):
    folder, layout = run
    checkpoints = read_checkpoints(folder)
    space = CoreSpace.from_trajectories(layout, 6, [adapter for _, adapter in checkpoints])
    trajectory = import_checkpoints(folder, space, "spam", optimizer="adamw", seed=3, min_energy=0.999)
    assert trajectory.optimizer_steps.tolist() == [0, *sorted(STEPS)]
    assert not trajectory.states[0].any()
    torch.testing.assert_close(trajectory.metrics["energy_kept"], torch.ones(4), atol=1e-4, rtol=0)
    assert trajectory.losses.isnan().all()
    for state, (_, adapter) in zip(trajectory.states[1:], checkpoints, strict=True):
        for name, delta in space.delta_weight(state).items():
            a, b = adapter[name]
            torch.testing.assert_close(delta, b @ a, atol=1e-4, rtol=1e-3)


def test_what_a_shared_space_loses_is_reported_and_can_be_refused(run):
    folder, layout = run
    space = LoraBSpace.seeded(layout, 4, seed=0)
    trajectory = import_checkpoints(folder, space, "spam")
    kept = trajectory.metrics["energy_kept"]
    assert kept[0] == 1
    assert ((kept[1:] > 0) & (kept[1:] < 0.7)).all()
    with pytest.raises(ValueError, match=r"less than `min_energy`=0.9 of: checkpoint-5: .*checkpoint-20: "):
        import_checkpoints(folder, space, "spam", min_energy=0.9)
    with pytest.raises(ValueError, match=r"`min_energy` must be in 0\.\.1"):
        import_checkpoints(folder, space, "spam", min_energy=2)


def test_a_prefix_of_the_run_is_taken_off(run):
    folder, layout = run
    inner = AdapterLayout(
        tuple(type(s)(s.name.removeprefix("encoder."), s.d_in, s.d_out, s.kind, s.layer) for s in layout.modules)
    )
    space = LoraBSpace.seeded(inner, 2, seed=0)
    with pytest.raises(ValueError, match="not in the layout"):
        import_checkpoints(folder, space, "spam")
    assert len(import_checkpoints(folder, space, "spam", prefix="encoder.")) == 4

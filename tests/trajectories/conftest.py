import pytest
import torch

from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.trajectories import Trajectory, TrajectoryDataset


@pytest.fixture(scope="session")
def space():
    """Two modules of different width, so that the narrower one is padded."""
    modules = (
        ModuleSpec("layer.0.query", d_in=6, d_out=5, kind="query", layer=0),
        ModuleSpec("layer.1.value", d_in=6, d_out=3, kind="value", layer=1),
    )
    return LoraBSpace.seeded(AdapterLayout(modules), r=2, seed=0)


@pytest.fixture(scope="session")
def make_trajectory(space):
    def make(seed=0, task="spam", transitions=6, **changes):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(transitions + 1, *space.shape, generator=generator).cumsum(0) * space.mask
        states[0] = 0
        values = {
            "states": states,
            "optimizer_steps": torch.arange(transitions + 1) * 10,
            "losses": torch.linspace(1, 0.1, transitions + 1),
            "metrics": {"accuracy": torch.rand(transitions + 1, generator=generator)},
            "task": task,
            "optimizer": "adamw",
            "hyperparameters": {"lr": 0.01, "betas": [0.9, 0.999]},
            "seed": seed,
        }
        return Trajectory(**{**values, **changes})

    return make


@pytest.fixture
def dataset(tmp_path, space, make_trajectory):
    """Three shards of two trajectories."""
    dataset = TrajectoryDataset.create(
        tmp_path / "recordings", space=space, base_fingerprint="f" * 64, base_model_name="tiny", metadata={"note": 1}
    )
    for i, task in enumerate(("spam", "mood", "topic")):
        dataset.append(task, [make_trajectory(2 * i, task), make_trajectory(2 * i + 1, task)])
    return dataset

import math

import pytest
import torch
from accelerate import Accelerator

from lohp_peft.adapters import base_model_fingerprint
from lohp_peft.policy_learning import LoHpTrainer, PolicyLearningConfig
from lohp_peft.policy_learning.recordings import Recordings, fit_scales
from lohp_peft.tasks import EpisodeSampler, TaskBank
from lohp_peft.trajectories import Trajectory, TrajectoryDataset
from tiny import build_encoder, build_policy, build_task

TASKS = [
    build_task("spam", family="spam"),
    build_task("ham", seed=2, family="spam"),
    build_task("mood", n_classes=3, seed=1, family="emotion"),
]


@pytest.fixture(scope="session")
def encoder():
    return build_encoder(adapted=(1, 2))


def build_bank(encoder, dtype=torch.float32):
    bank = TaskBank(encoder, rows_per_task=40, dtype=dtype)
    for task in TASKS:
        bank.add(task)
    return bank


@pytest.fixture(scope="session")
def bank(encoder):
    return build_bank(encoder)


def build_trajectory(space, task="spam", optimizer="adamw", seed=0, time=6, **changes):
    """From no adapter towards one of its own, losses falling to another end in every run."""
    generator = torch.Generator().manual_seed(100 + seed)
    goal = torch.randn(space.shape, generator=generator) * space.mask
    share = torch.linspace(0, 1, time + 1)
    values = {
        "states": share[:, None, None] * goal,
        "optimizer_steps": torch.arange(time + 1),
        "losses": 1 - share * (0.5 + 0.05 * seed),
        "metrics": {},
        "task": task,
        "optimizer": optimizer,
        "hyperparameters": {},
        "seed": seed,
    }
    return Trajectory(**{**values, **changes})


def build_trajectories(space):
    names = [(task.name, optimizer) for task in TASKS for optimizer in ("adamw", "sam")]
    return [build_trajectory(space, *name, seed=seed) for seed, name in enumerate(names)]


def build_dataset(encoder, folder):
    """The same runs in a folder."""
    fingerprint = base_model_fingerprint(encoder.base_model)
    dataset = TrajectoryDataset.create(
        folder, space=encoder.space, base_fingerprint=fingerprint, base_model_name="someone/tiny"
    )
    for task in TASKS:
        dataset.append(task.name, [run for run in build_trajectories(encoder.space) if run.task == task.name])
    return dataset


@pytest.fixture(scope="session")
def trajectories(encoder):
    return build_trajectories(encoder.space)


@pytest.fixture
def recordings(trajectories):
    return Recordings.from_trajectories(trajectories, 3)


def tiny_config(**changes):
    settings = {
        "preset": "lohp+path",
        "cloning_steps": 3,
        "training_steps": 5,
        "batch_size": 2,
        "recorded_batch_size": 4,
        "rollouts_per_task": 2,
        "on_policy_every": 2,
        "buffer_size": 8,
        "policy_steps": 3,
        "save_every": 1,
        "validate_every": 2,
        "validation_episodes": 2,
        "hidden_size": 16,
        "num_directions": 4,
        "rows_per_task": 40,
    }
    return PolicyLearningConfig(**{**settings, **changes})


def make_trainer(encoder, bank, recordings, *, validate=False, dropout=0.2, options=(), **changes):
    """A trainer of a fresh policy, the same for the same arguments, in the type of the base model."""
    torch.manual_seed(0)
    policy = build_policy(encoder, dropout=dropout)
    fit_scales(policy, recordings)
    sampler = EpisodeSampler(bank.labels, [["spam", "ham"]], support_size=12, query_size=12)
    generator = torch.Generator().manual_seed(3)
    validation = (bank, [sampler.sample(generator) for _ in range(2)]) if validate else None
    return LoHpTrainer(
        policy.to(encoder.base_model.dtype),
        bank,
        recordings,
        sampler,
        tiny_config(**changes),
        validation=validation,
        accelerator=Accelerator(cpu=True),
        **dict(options),
    )


@pytest.fixture
def build_trainer(encoder, bank, recordings):
    """See `make_trainer`."""

    def build(log=None, recordings=recordings, options=(), **changes):
        return make_trainer(encoder, bank, recordings, options={"log": log, **dict(options)}, **changes)

    return build


def assert_same_weights(mine, theirs):
    assert mine.keys() == theirs.keys()
    differ = [name for name in mine if not mine[name].equal(theirs[name])]
    assert not differ


def finite(scalars):
    return all(math.isfinite(value) for value in scalars.values())

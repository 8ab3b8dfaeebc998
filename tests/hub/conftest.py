"""A running server, the Hub's own client set to it, and something to publish."""

import pytest
import torch
from huggingface_hub import constants

import tiny_world as tiny
from hub.server import Hub
from lohp_peft import GenerationConfig, Trajectory, TrajectoryDataset, generate_adapter
from lohp_peft.adapters import base_model_fingerprint
from lohp_peft.adapters.space import LoraBSpace

BASE = "someone/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server for one test, with the client's settings as its environment variables would set them."""
    with Hub() as running:
        settings = {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # large files go over LFS
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.url)  # of an instance made at import
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # of one made at its first use
        monkeypatch.setenv("HF_TOKEN", "token-of-me")
        yield running


@pytest.fixture(scope="session")
def base_model():
    return tiny.build_bert()


@pytest.fixture(scope="session")
def policy(base_model):
    return tiny.build_policy(base_model)


@pytest.fixture(scope="session")
def made(policy, base_model):
    """A generated adapter."""
    config = GenerationConfig(choose=False)
    return generate_adapter(policy, base_model, tiny.build_tokenizer(), tiny.build_rows(), config)


@pytest.fixture
def recordings(tmp_path, base_model, policy):
    """Two tasks of two runs each."""
    space = LoraBSpace.seeded(policy.layout, 2, 0)
    dataset = TrajectoryDataset.create(
        tmp_path / "recordings",
        space=space,
        base_fingerprint=base_model_fingerprint(base_model),
        base_model_name=BASE,
        metadata={"recorded_by": "test"},
    )
    for task in ("mood", "topic"):
        dataset.append(task, [run(space, task, seed) for seed in (0, 1)])
    return dataset


def run(space, task, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4, *space.shape, generator=generator).cumsum(0) * space.mask
    states[0] = 0
    return Trajectory(
        states=states,
        optimizer_steps=torch.arange(4) * 10,
        losses=torch.tensor([0.7, 0.5, 0.4, 0.3 + seed / 100]),
        metrics={},
        task=task,
        optimizer=("adamw", "sam")[seed],
        hyperparameters={"lr": 0.01},
        seed=seed,
    )

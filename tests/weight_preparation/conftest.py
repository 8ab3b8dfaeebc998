import pytest
from rich.console import Console

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.weight_preparation import WeightPreparationConfig
from tiny import build_base_model, build_task, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def base_model():
    return build_base_model()


@pytest.fixture
def space(base_model):
    return LoraBSpace.seeded(AdapterLayout.from_model(base_model, ["query", "value"]), r=2, seed=0)


@pytest.fixture
def encoder(base_model, tokenizer, space):
    return TextEncoder(base_model, tokenizer, space)


@pytest.fixture
def tasks():
    return [build_task("spam"), build_task("mood", n_classes=3, seed=1)]


@pytest.fixture
def config():
    return WeightPreparationConfig(
        optimizers=("adamw", "sam"),
        seeds=(0, 1),
        optimizer_steps=8,
        record_every=3,
        rows_per_task=32,
        score_query_rows=8,
    )


@pytest.fixture
def quiet():
    return Console(quiet=True)

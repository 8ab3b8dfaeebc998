import json

import numpy as np
import pytest

from lohp_peft.weight_preparation import WeightPreparationConfig


def test_all_problems_are_listed():
    with pytest.raises(ValueError, match="Weight preparation") as caught:
        WeightPreparationConfig(
            optimizers=("adamw", "adamw", "nope"),
            seeds=(),
            optimizer_steps=4,
            record_every=5,
            rows_per_class=1,
            head="linear",
            hyperparameters={"sgd": {}, "adamw": {"lrr": 1}},
        )
    for part in (
        "`rows_per_class` must be at least 2, got 1",
        "`record_every` (5) must not exceed `optimizer_steps` (4)",
        "`optimizers` must hold",
        "`seeds` must hold",
        "`head` must be one of",
        "['sgd'], which are not among",
        "Unknown optimizer 'nope'",
        "but got ['lrr']",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given"),
    [("adamw", {"lr": "1e-3"}), ("adamw", {"betas": 0.9}), ("sgd", {"momentum": -1}), ("sam", {"rho": -0.1})],
)
def test_hyperparameters_that_build_no_optimizer_are_named(name, given):
    """Before any work: a run would fail when the dataset is there, with these settings written into it."""
    with pytest.raises(ValueError, match=rf"optimizer '{name}' cannot be built with {{'{next(iter(given))}': "):
        WeightPreparationConfig(optimizers=(name,), hyperparameters={name: given})


@pytest.mark.parametrize(("steps", "every", "states"), [(10, 5, 3), (11, 5, 4), (1, 1, 2), (9, 5, 3)])
def test_states_per_run_counts_start_and_end(steps, every, states):
    assert WeightPreparationConfig(optimizer_steps=steps, record_every=every).states_per_run == states


def test_to_dict_is_json():
    values = WeightPreparationConfig().to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["optimizers"] == list(WeightPreparationConfig().optimizers)


def test_values_of_other_types_are_named():
    for wrong in (dict(seeds=3), dict(optimizers="adamw"), dict(hyperparameters={"adamw": 0.1}), dict(seeds=(True,))):
        (name,) = wrong
        with pytest.raises(TypeError, match=rf"Weight preparation: `{name}` must hold "):
            WeightPreparationConfig(**wrong)
    with pytest.raises(
        ValueError, match="whole numbers are needed, got {'optimizer_steps': '10', 'record_every': 2.0}"
    ):
        WeightPreparationConfig(optimizer_steps="10", record_every=2.0)


def test_numbers_of_others_are_taken():
    config = WeightPreparationConfig(seeds=range(2), optimizers=["sgd"], optimizer_steps=np.int64(8))
    assert config == WeightPreparationConfig(seeds=(0, 1), optimizers=("sgd",), optimizer_steps=8)
    assert json.dumps(config.to_dict())

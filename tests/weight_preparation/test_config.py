import json

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


@pytest.mark.parametrize(("steps", "every", "states"), [(10, 5, 3), (11, 5, 4), (1, 1, 2), (9, 5, 3)])
def test_states_per_run_counts_start_and_end(steps, every, states):
    assert WeightPreparationConfig(optimizer_steps=steps, record_every=every).states_per_run == states


def test_to_dict_is_json():
    values = WeightPreparationConfig().to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["optimizers"] == list(WeightPreparationConfig().optimizers)

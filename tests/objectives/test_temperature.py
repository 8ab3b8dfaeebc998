"""Temperatures: the stated KL is reached, and what cannot be calibrated is refused."""

import math

import pytest
import torch

from lohp_peft.objectives import calibrate_path_temperature, calibrate_temperature


@pytest.mark.parametrize("kl_target", [0.5, 3.0])
def test_tilting_costs_the_wanted_kl(kl_target):
    """Normal losses of one spread: tilting N(m, s²) by exp(-loss / T) shifts it by s² / T, a KL of s² / 2T² exactly."""
    losses = 2 + 0.008 * torch.randn((200, 400), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperature = calibrate_temperature(losses, kl_target)
    assert 0.008**2 / (2 * temperature**2) == pytest.approx(kl_target, rel=0.02)


def test_tasks_may_differ_in_level_and_spread():
    losses = torch.tensor([[0.0, 2.0], [100.0, 104.0]])  # variances 2 and 8
    assert calibrate_temperature(losses, 2.5) == pytest.approx(1.0)
    assert calibrate_temperature(1000 * losses, 2.5) == pytest.approx(1000.0)


def test_refuses_rollouts_without_information():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        calibrate_temperature(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="do not vary"):
        calibrate_temperature(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"tasks \[1, 3\]"):
        calibrate_temperature(torch.tensor([[0.0, 1.0], [math.nan, 1.0], [0.0, 1.0], [0.0, math.inf]]))
    with pytest.raises(ValueError, match="kl_target"):
        calibrate_temperature(torch.tensor([[0.0, 1.0]]), 0.0)


def test_path_temperature_balances_the_recordings_on_average():
    initial, final = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.7])
    cost = torch.tensor([10.0, 26.0])
    temperature = calibrate_path_temperature(initial, final, cost)
    residuals = cost + (final - initial) / temperature  # forward-looking: log F = -loss / T at both ends
    assert residuals.mean().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("decrease", "cost"), [(1.0, -5.0), (-1.0, 5.0), (-1.0, -5.0), (math.nan, 1.0)])
def test_path_temperature_refuses_the_impossible(decrease, cost):
    with pytest.raises(ValueError, match="No temperature"):
        calibrate_path_temperature(torch.tensor([decrease]), torch.tensor([0.0]), torch.tensor([cost]))

"""Joining sources, the schedule of their shares, and the diagnostics."""

import math

import pytest
import torch

from lohp_peft.objectives import (
    SOURCES,
    Segments,
    effective_sample_size,
    end_to_end_residuals,
    hybrid_loss,
    schedule_fractions,
    sub_trajectory_balance_loss,
)


def segments(seed: int, batch: int, time: int, **options) -> Segments:
    generator = torch.Generator().manual_seed(seed)
    log_pf, log_ref = torch.randn((2, batch, time), generator=generator)
    log_flow = torch.randn((batch, time + 1), generator=generator)
    return Segments(log_pf=log_pf.requires_grad_(), log_ref=log_ref, log_flow=log_flow, **options)


def test_one_weighted_mean_of_sources_of_any_size():
    sources = {name: segments(seed, 3 + seed, 2 + seed) for seed, name in enumerate(SOURCES)}
    weights = {"recorded": 2.0, "spliced": 1.0, "on_policy": 5.0}
    loss, diagnostics = hybrid_loss(sources, weights, lam=0.9, robust_delta=None)
    losses = {
        name: sub_trajectory_balance_loss(s.log_pf, s.log_ref, s.log_flow, lam=0.9) for name, s in sources.items()
    }
    expected = sum(weights[name] * losses[name] for name in SOURCES) / 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(s.log_pf.grad.any() for s in sources.values())
    assert all(diagnostics[f"{name}/loss"] == losses[name] for name in SOURCES)
    assert not any(value.requires_grad or value.ndim for value in diagnostics.values())


def test_missing_sources_leave_the_scale_alone():
    only = {"recorded": segments(0, 4, 3)}
    half, _ = hybrid_loss(only, {"recorded": 0.5, "on_policy": 0.5})
    assert half == hybrid_loss(only, {"recorded": 1.0})[0]


def test_a_source_of_weight_zero_is_only_watched():
    broken = Segments(log_pf=torch.full((2, 2), math.inf), log_flow=torch.zeros(2, 3))
    sources = {"recorded": segments(0, 4, 3), "spliced": broken}
    loss, diagnostics = hybrid_loss(sources, {"recorded": 1.0, "spliced": 0.0})
    assert loss.isfinite()
    assert not diagnostics["spliced/residual"].isfinite()


def test_residuals_are_reported_per_source():
    tasks, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1, 2, 3])
    states = torch.zeros(4, 4, 2, 2)
    states[2, 1, 0, 1] = -7.0
    sources = {
        "recorded": segments(0, 4, 3, lengths=lengths),
        "on_policy": segments(1, 4, 3, tasks=tasks, states=states),
    }
    _, diagnostics = hybrid_loss(sources, {"recorded": 1.0, "on_policy": 1.0})
    recorded = sources["recorded"]
    log_ratio, log_flow = (recorded.log_pf - recorded.log_ref).detach(), recorded.log_flow
    expected = [float(log_flow[b, 0] - log_flow[b, n] + log_ratio[b, :n].sum()) for b, n in enumerate(lengths)]
    assert diagnostics["recorded/residual"].item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert diagnostics["recorded/residual_squared"].item() == pytest.approx(sum(r * r for r in expected) / 4, rel=1e-5)
    gap = diagnostics["on_policy/residual"] - diagnostics["recorded/residual"]
    assert diagnostics["evidence_gap"] == gap
    assert diagnostics["on_policy/max_abs_state"] == 7
    assert diagnostics["on_policy/effective_sample_size_min"] <= diagnostics["on_policy/effective_sample_size"]


def test_end_to_end_residuals_ignore_padding():
    log_pf, log_flow = torch.tensor([[1.0, math.nan]]), torch.tensor([[2.0, 5.0, math.nan]])
    assert end_to_end_residuals(log_pf, None, log_flow, torch.tensor([1])).tolist() == [-2.0]


def test_effective_sample_size_counts_within_tasks():
    tasks = torch.tensor([7, 2, 7, 2, 7, 7])
    log_weights = torch.tensor([1000.0, 0.0, 1000.0, -800.0, 1000.0, 1000.0])
    assert effective_sample_size(log_weights, tasks).tolist() == pytest.approx([0.5, 1.0])
    assert effective_sample_size(torch.tensor([0.0, math.log(3.0)])).item() == pytest.approx(16 / 10 / 2)


def test_errors_list_every_wrong_source():
    batch = segments(0, 2, 2)
    with pytest.raises(ValueError, match=r"(?s)'dreamt' is no source.*'spliced' has no weight.*weight -1.0"):
        hybrid_loss({"dreamt": batch, "spliced": batch, "recorded": batch}, {"recorded": -1.0, "dreamt": 1.0})
    with pytest.raises(ValueError, match="sum to 0"):
        hybrid_loss({"recorded": batch}, {"recorded": 0.0})
    with pytest.raises(ValueError, match="sum to 0"):
        hybrid_loss({}, {"recorded": 1.0})


@pytest.mark.parametrize(
    ("progress", "shares"),
    [
        (0.0, (1, 0, 0)),
        (0.125, (0.75, 0.15, 0.1)),
        (0.25, (0.5, 0.3, 0.2)),
        (0.5, (0.25, 0.25, 0.5)),
        (1.0, (0.25, 0.25, 0.5)),
    ],
)
def test_hybrid_schedule(progress, shares):
    assert tuple(schedule_fractions(progress).values()) == pytest.approx(shares)


def test_schedules_are_distributions_and_hybrid_never_forgets_the_recordings():
    for mode in ("hybrid", "on_policy", "off_policy"):
        for progress in torch.linspace(0, 1, 41).tolist():
            shares = schedule_fractions(progress, mode)
            assert tuple(shares) == SOURCES
            assert sum(shares.values()) == pytest.approx(1)
            assert min(shares.values()) >= 0
            assert mode != "hybrid" or shares["recorded"] >= 0.25
    assert schedule_fractions(0.7, "on_policy")["on_policy"] == 1
    assert schedule_fractions(0.7, "off_policy")["recorded"] == 1


def test_schedule_refuses_the_unknown():
    with pytest.raises(ValueError, match="mode"):
        schedule_fractions(0.5, "both")
    with pytest.raises(ValueError, match="progress"):
        schedule_fractions(1.5)

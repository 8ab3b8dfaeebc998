"""The fitted backward policy: maximum likelihood, point mass at the start, saving."""

import pytest
import torch
from torch.distributions import Normal

from lohp_peft.objectives import BackwardReference, sub_trajectory_balance_loss

MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.fixture
def states() -> torch.Tensor:
    """Noisy recordings that start from 0, shape (50, 4 + 1, 2, 3)."""
    generator = torch.Generator().manual_seed(0)
    steps = 0.2 + torch.rand((1, 4, 2, 1), generator=generator) * torch.randn((50, 4, 2, 3), generator=generator)
    return torch.nn.functional.pad(steps.cumsum(1), (0, 0, 0, 0, 1, 0)) * MASK


def log_prob(reference: BackwardReference, states: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(states.shape[1] - 1).expand(states.shape[0], -1)
    return reference.log_prob(states[:, :-1], states[:, 1:], steps)


def test_first_step_is_a_point_mass(states):
    reference = BackwardReference.fit(states, MASK)
    assert not reference.sigma[0].any()
    assert not log_prob(reference, states)[:, 0].any()
    assert reference.point_masses.tolist() == [True] + [False] * (states.shape[1] - 2)
    assert (reference.sigma[1:] > 0).all()


def test_density_is_the_stated_gaussian(states):
    reference = BackwardReference.fit(states, MASK)
    mean = reference.contraction[2][:, None] * states[7, 3]
    expected = (Normal(mean, reference.sigma[2][:, None].expand_as(mean)).log_prob(states[7, 2]) * MASK).sum()
    assert log_prob(reference, states)[7, 2].item() == pytest.approx(expected.item(), rel=1e-5)


def test_fit_is_the_maximum_of_the_likelihood(states):
    fitted = BackwardReference.fit(states, MASK)
    best = log_prob(fitted, states)[:, 1:].sum()
    for name in ("contraction", "sigma"):
        for factor in (0.99, 1.01):
            worse = BackwardReference(**{**fitted.to_tensors(), name: factor * getattr(fitted, name)})
            assert log_prob(worse, states)[:, 1:].sum() < best


def test_fit_recovers_a_bridge():
    """For a Brownian motion with sigma² per step, P_B(s_k | s_{k+1}) = N(k / (k+1) s_{k+1}, sigma² k / (k+1))."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.nn.functional.pad(
        0.5 * torch.randn((4000, 6, 1, 4), generator=generator).cumsum(1), (0, 0, 0, 0, 1, 0)
    )
    reference = BackwardReference.fit(walk)
    k = torch.arange(6.0)[:, None]
    assert torch.allclose(reference.contraction, k / (k + 1), atol=0.02)
    assert torch.allclose(reference.sigma.square(), 0.25 * k / (k + 1), atol=0.01)


def test_a_module_that_never_moved_stays_possible(states):
    states = states.clone()
    states[:, :, 1] = 0
    reference = BackwardReference.fit(states, MASK)
    assert (reference.sigma[1:, 1] > 0).all()
    assert log_prob(reference, states + 0.01).isfinite().all()


def test_segments_use_the_step_they_are_at(states):
    reference = BackwardReference.fit(states, MASK)
    assert torch.equal(
        reference.log_prob(states[:3, 2], states[:3, 3], torch.full((3,), 2)), log_prob(reference, states)[:3, 2]
    )


def test_frozen_and_detached(states):
    reference = BackwardReference.fit(states.requires_grad_(), MASK)
    assert not any(t.requires_grad for t in reference.to_tensors().values())
    assert not log_prob(reference, states).requires_grad


def test_save_and_restore(states):
    reference = BackwardReference.fit(states, MASK)
    restored = BackwardReference.from_tensors(reference.to_tensors()).to("cpu")
    assert torch.equal(log_prob(restored, states), log_prob(reference, states))


def test_padding_has_no_part(states):
    noisy = states.masked_fill(~MASK, 1e3)
    plain, other = BackwardReference.fit(states, MASK), BackwardReference.fit(noisy, MASK)
    assert torch.equal(plain.contraction, other.contraction)
    assert torch.equal(plain.sigma, other.sigma)
    assert torch.equal(log_prob(plain, states), log_prob(plain, noisy))


def test_fit_refuses_what_cannot_be_fitted(states):
    with pytest.raises(ValueError, match="at least one trajectory"):
        BackwardReference.fit(states[:, :1])
    broken = states.clone()
    broken[3, 2, 0, 0], broken[8, 1, 1, 1] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"\[3, 8\]"):
        BackwardReference.fit(broken, MASK)


def test_recordings_are_natural_under_the_fit_and_not_under_a_bridge(states):
    """Recorded optimizer paths are nearly deterministic: the reason for fitting (each path a line from 0)."""
    generator = torch.Generator().manual_seed(2)
    ends = torch.randn((64, 1, 1, 200), generator=generator)
    line = torch.linspace(0, 1, 6)[:, None, None] ** 0.7 * ends
    line = line + 0.02 * torch.randn(line.shape, generator=generator) * (torch.arange(6) > 0)[:, None, None]
    sigma = 0.3 * line.diff(dim=1).square().mean().sqrt()
    k = torch.arange(5.0)
    shrink = k / (k + 1)
    bridge = BackwardReference(
        contraction=shrink[:, None], sigma=(sigma * shrink.sqrt())[:, None], mask=torch.ones(1, 200, dtype=torch.bool)
    )
    fitted = log_prob(BackwardReference.fit(line), line).sum(1)
    assert (fitted - log_prob(bridge, line).sum(1)).mean() > 100
    loss = sub_trajectory_balance_loss(fitted[:, None], fitted[:, None], torch.zeros(64, 2))
    assert loss == 0

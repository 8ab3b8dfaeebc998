"""What balance promises about learning: unbiased gradients on policy, and the target recovered after training."""

import math

import pytest
import torch

from lohp_peft.objectives import (
    effective_sample_size,
    end_to_end_residuals,
    gaussian_log_prob,
    gaussian_log_ratio,
    sub_trajectory_balance_loss,
    sub_trajectory_potentials,
)

from .reference import BridgeToy

SIGMA, STEPS, V, TARGET, SAMPLES = 0.6, 3, 0.5, 1.2, 400_000
SHIFTS = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


def rollouts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rollouts of the 1-D policy `N(s + shift_t, SIGMA²)`: log-ratio to `N(s, SIGMA²)`, log reward, shift per sample."""
    generator = torch.Generator().manual_seed(0)
    noise = SIGMA * torch.randn((SAMPLES, STEPS), generator=generator, dtype=torch.float64)
    states = torch.nn.functional.pad((SHIFTS + noise).cumsum(1), (1, 0))
    shifts = SHIFTS.expand(SAMPLES, -1).clone().requires_grad_()  # a copy per sample, for gradients per sample
    x, before = states[:, 1:, None, None], states[:, :-1, None, None]
    ratio = gaussian_log_ratio(x, before + shifts[..., None, None], before, SIGMA)
    return ratio, -(states[:, -1] - TARGET).square() / (2 * V), shifts


def check_unbiased(per_sample: torch.Tensor) -> None:
    """The mean equals the gradient of `KL(P_F || P_ref R / Z)`, known in closed form, to 4.5 standard errors."""
    exact = SHIFTS / SIGMA**2 + (SHIFTS.sum() - TARGET) / V
    error = per_sample.mean(0) - exact
    assert (error.abs() < 4.5 * per_sample.std(0) / math.sqrt(len(per_sample))).all()
    assert (4.5 * per_sample.std(0) / math.sqrt(len(per_sample)) < 0.1).all()  # the test can tell


@pytest.mark.parametrize("log_z", [0.0, -2.0])
def test_half_trajectory_balance_is_the_gradient_of_the_kl(log_z):
    ratio, log_reward, shifts = rollouts()
    log_flow = torch.zeros(SAMPLES, STEPS + 1, dtype=torch.float64)
    log_flow[:, 0], log_flow[:, -1] = log_z, log_reward
    loss = sub_trajectory_balance_loss(ratio, None, log_flow, lam=math.inf, reduction="none")
    check_unbiased(torch.autograd.grad(0.5 * loss.sum(), shifts)[0])


def test_log_variance_is_the_gradient_of_the_kl():
    ratio, log_reward, shifts = rollouts()
    log_flow = torch.zeros(SAMPLES, STEPS + 1, dtype=torch.float64)
    log_flow[:, -1] = log_reward
    ends = sub_trajectory_potentials(ratio, None, log_flow)[:, -1].view(-1, 8)
    gradient = torch.autograd.grad(0.5 * ends.var(1, unbiased=True).sum(), shifts)[0]
    check_unbiased(gradient.view(-1, 8, STEPS).sum(1))


class AffinePolicy(torch.nn.Module):
    """Gaussian steps with an affine mean and a free spread per step and axis, and a quadratic log flow."""

    def __init__(self, steps: int, dim: int):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(steps, dim))
        self.shift = torch.nn.Parameter(torch.zeros(steps, dim))
        self.log_sigma = torch.nn.Parameter(torch.full((steps, dim), -0.3))
        self.flow = torch.nn.Parameter(torch.zeros(steps, 1 + 2 * dim))

    @torch.no_grad()
    def rollout(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        states = [torch.zeros(batch, self.gain.shape[1])]
        for gain, shift, log_sigma in zip(self.gain, self.shift, self.log_sigma, strict=True):
            noise = torch.randn(states[0].shape, generator=generator)
            states.append(gain * states[-1] + shift + log_sigma.exp() * noise)
        return torch.stack(states, 1)

    def paths(self, states: torch.Tensor, toy: BridgeToy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        before, after = states[:, :-1], states[:, 1:]
        mean = self.gain * before + self.shift
        log_pf = gaussian_log_prob(after[..., None, :], mean[..., None, :], self.log_sigma.exp()[:, None, :])
        features = torch.cat([torch.ones_like(before[..., :1]), before, before.square()], -1)
        log_flow = torch.cat([(features * self.flow).sum(-1), toy.log_reward(states[:, -1:])], 1)
        return log_pf, toy.log_pb(states), log_flow


@pytest.mark.parametrize("lam", [0.9, 1.0])
def test_training_recovers_the_target(lam):
    toy = BridgeToy(m=torch.tensor([0.8, -0.5]), steps=4)
    policy, generator = AffinePolicy(toy.steps, 2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        loss = sub_trajectory_balance_loss(*policy.paths(policy.rollout(128, generator), toy), lam=lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    states = policy.rollout(20_000, generator)
    paths = policy.paths(states, toy)
    assert states[:, -1].mean(0).tolist() == pytest.approx(toy.m.tolist(), abs=0.05)
    assert states[:, -1].var(0).tolist() == pytest.approx([toy.v] * 2, rel=0.06)
    assert effective_sample_size(-end_to_end_residuals(*paths)).item() > 0.8
    assert paths[2][0, 0].item() == pytest.approx(toy.log_z, abs=0.05)

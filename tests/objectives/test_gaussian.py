"""Gaussian transitions against torch.distributions, and their precision at the size of an adapter."""

import pytest
import torch
from torch.distributions import Normal

from lohp_peft.objectives import (
    behaviour_cloning_loss,
    gaussian_log_prob,
    gaussian_log_ratio,
    sub_trajectory_potentials,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.fixture
def means() -> list[torch.Tensor]:
    """Next states, means and reference means, shape (4, 5, 2, 3)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((4, 5, 2, 3), generator=generator, dtype=torch.float64) for _ in range(3)]


def test_log_prob_is_that_of_torch_distributions(means):
    x, mean, _ = means
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)[:, None]
    expected = Normal(mean, sigma.expand_as(mean)).log_prob(x)
    assert torch.allclose(gaussian_log_prob(x, mean, sigma), expected.sum((-2, -1)), rtol=1e-12)
    assert torch.allclose(gaussian_log_prob(x, mean, sigma, MASK), (expected * MASK).sum((-2, -1)), rtol=1e-12)


def test_log_ratio_is_the_difference_of_log_probs(means):
    x, mean, ref_mean = means
    sigma = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    ratio = gaussian_log_ratio(x, mean, ref_mean, sigma, MASK)
    expected = gaussian_log_prob(x, mean, sigma, MASK) - gaussian_log_prob(x, ref_mean, sigma, MASK)
    assert torch.allclose(ratio, expected, rtol=1e-10)
    gradient = [
        torch.autograd.grad(f(mean.requires_grad_()).sum(), mean)[0]
        for f in (
            lambda mu: gaussian_log_ratio(x, mu, ref_mean, sigma, MASK),
            lambda mu: gaussian_log_prob(x, mu, sigma, MASK),
        )
    ]
    assert torch.allclose(*gradient, rtol=1e-10)


def test_log_ratio_of_equal_means_is_exactly_zero(means):
    x, mean, _ = (t.float() for t in means)
    assert not gaussian_log_ratio(1e6 * x, mean, mean.clone(), 1e-4, MASK).any()


def test_padding_has_no_part(means):
    changed = [t.masked_fill(~MASK, value) for t, value in zip(means, (1e6, -1e6, 1e3), strict=True)]
    assert torch.equal(gaussian_log_prob(*changed[:2], 0.5, MASK), gaussian_log_prob(*means[:2], 0.5, MASK))
    assert torch.equal(gaussian_log_ratio(*changed, 0.5, MASK), gaussian_log_ratio(*means, 0.5, MASK))
    cloned = behaviour_cloning_loss(changed[1], changed[0], 0.5, MASK)
    assert torch.equal(cloned, behaviour_cloning_loss(means[1], means[0], 0.5, MASK))


def test_float32_agrees_with_float64_for_a_whole_adapter():
    """10 000 entries, 8 steps, a policy that left its reference by a tenth of sigma."""
    generator = torch.Generator().manual_seed(1)
    sigma, shape = 0.05, (4, 8, 10, 1000)
    ref_mean = torch.randn(shape, generator=generator)
    mean = ref_mean + 0.1 * sigma * torch.randn(shape, generator=generator)
    x = ref_mean + sigma * torch.randn(shape, generator=generator)
    log_flow = 10 * torch.randn((4, 9), generator=generator)
    potentials = {
        dtype: sub_trajectory_potentials(
            gaussian_log_ratio(x.to(dtype), mean.to(dtype), ref_mean.to(dtype), sigma), None, log_flow.to(dtype)
        )
        for dtype in (torch.float32, torch.float64)
    }
    assert potentials[torch.float64].abs().max() > 100  # nats: the comparison is not one of zeros
    assert (potentials[torch.float32].double() - potentials[torch.float64]).abs().max() < 1e-2
    mean_rounded, x_rounded = mean.bfloat16(), x.bfloat16()
    expected = gaussian_log_ratio(x_rounded.double(), mean_rounded.double(), ref_mean.double(), sigma)
    assert torch.allclose(gaussian_log_ratio(x_rounded, mean_rounded, ref_mean, sigma).double(), expected, rtol=1e-3)


def test_autocast_changes_nothing(means):
    x, mean, ref_mean = (t.float() for t in means)
    plain = gaussian_log_ratio(x, mean, ref_mean, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_log_ratio(x, mean, ref_mean, 0.3), plain)


def test_cloning_loss_is_zero_for_a_perfect_clone_and_in_nats_per_entry(means):
    x, mean, _ = means
    assert behaviour_cloning_loss(x, x, 0.1, MASK) == 0
    target = x.clone().requires_grad_()
    loss = behaviour_cloning_loss(mean.requires_grad_(), target, 0.5, MASK)
    normaliser = gaussian_log_prob(mean, mean, 0.5, MASK).mean()
    expected = (normaliser - gaussian_log_prob(x, mean, 0.5, MASK).mean()) / MASK.sum()
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert target.grad is None
    assert not mean.grad[..., ~MASK].any()
    assert mean.grad[..., MASK].all()

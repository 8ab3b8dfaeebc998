"""Gaussian transitions between states of shape (..., modules, width): log-densities, log-ratios and imitation.

Everything is computed in float32 or wider, also under autocast. States and references are detached here; a policy that
made `mean` must itself have read detached states.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lohp_peft.objectives.subtb import at_least_float32


def gaussian_log_prob(
    next_states: Float[Tensor, "*batch modules width"],
    mean: Float[Tensor, "*batch modules width"],
    sigma: float | Tensor,
    mask: Bool[Tensor, "modules width"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Log-density of a step under a Gaussian with independent entries.

    Args:
        next_states: States reached, shape (..., modules, width); detached.
        mean: Means of the policy, same shape. Gradients flow through it.
        sigma: Standard deviation, a number or a tensor broadcastable to `mean`; > 0.
        mask: Real entries, shape (modules, width); None if there is no padding.

    Returns:
        Log-densities, shape (...), in nats.
    """
    sigma = _sigma_like(sigma, mean)
    standardised = (at_least_float32(next_states.detach()) - at_least_float32(mean)) / sigma
    return _sum_entries(-0.5 * standardised.square() - sigma.log() - 0.5 * math.log(2 * math.pi), mask)


def gaussian_log_ratio(
    next_states: Float[Tensor, "*batch modules width"],
    mean: Float[Tensor, "*batch modules width"],
    ref_mean: Float[Tensor, "*batch modules width"],
    sigma: float | Tensor,
    mask: Bool[Tensor, "modules width"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Log-ratio of a step under two Gaussians of the same covariance, `log pi - log pi_ref`.

    `(mean - ref_mean) · (2 next_states - mean - ref_mean) / (2 sigma²)`: the normalisers cancel, so that the ratio is
    of the order of the difference of the policies and not of the number of entries, and exactly 0 where the means are
    equal, whatever the data (Ours: factored from `|x - ref_mean|² - |x - mean|²`, which cancels badly).

    Args:
        next_states: States reached, shape (..., modules, width); detached.
        mean: Means of the policy, same shape. Gradients flow through it.
        ref_mean: Means of the frozen reference, same shape; detached.
        sigma: Standard deviation of both, a number or a tensor broadcastable to `mean`; > 0.
        mask: Real entries, shape (modules, width); None if there is no padding.

    Returns:
        Log-ratios, shape (...), in nats: pass them as `log_pf` with `log_ref=None`.
    """
    x, mu, ref = (at_least_float32(t) for t in (next_states.detach(), mean, ref_mean.detach()))
    sigma = _sigma_like(sigma, mean)
    return _sum_entries((mu - ref) / sigma * ((x - mu) + (x - ref)) / (2 * sigma), mask)


def behaviour_cloning_loss(
    mean: Float[Tensor, "*batch modules width"],
    target: Float[Tensor, "*batch modules width"],
    sigma: float | Tensor,
    mask: Bool[Tensor, "modules width"] | None = None,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Negative log-likelihood of recorded steps per real entry, without the constant: `mean of (target - mean)² / 2 sigma²`.

    Sigma is fixed, so its normaliser is left out; the mean over entries keeps the loss of order 1 whatever the size of
    the adapter (Ours).

    Args:
        mean: Means of the policy, shape (..., modules, width), at (possibly noisy) recorded states.
        target: Recorded next states, same shape; detached.
        sigma: Standard deviation, a number or a tensor broadcastable to `mean`; > 0, detached.
        mask: Real entries, shape (modules, width); None if there is no padding.
        reduction: `"mean"`, or `"none"` for one loss per step.

    Returns:
        The loss in nats per entry, a scalar, or shape (...) if not reduced; 0 for a perfect clone.

    Raises:
        ValueError: On an unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'`reduction` must be "mean" or "none", got {reduction!r}.')
    standardised = (at_least_float32(target.detach()) - at_least_float32(mean)) / _sigma_like(sigma, mean).detach()
    entries = mean.shape[-2:].numel() if mask is None else mask.sum()
    loss = _sum_entries(0.5 * standardised.square(), mask) / entries
    return loss.mean() if reduction == "mean" else loss


def _sigma_like(sigma: float | Tensor, mean: Tensor) -> Tensor:
    """Sigma as a tensor on the device of `mean`, in float32 or wider."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return torch.as_tensor(sigma, dtype=dtype, device=mean.device)


def _sum_entries(terms: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over modules and width, real entries only."""
    return (terms if mask is None else terms.masked_fill(~mask, 0.0)).sum((-2, -1))

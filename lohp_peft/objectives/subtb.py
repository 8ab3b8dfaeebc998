"""Sub-trajectory balance, SubTB(λ), on the trajectories of a policy that walks through weight space.

Symbols (the only place where they are mapped to code):

| symbol                | code                                                                              |
|-----------------------|-----------------------------------------------------------------------------------|
| `P_F(s_{t+1} | s_t)`  | `log_pf`, shape (batch, time): the forward policy                                 |
| `P_B(s_t | s_{t+1})`  | `log_ref`, shape (batch, time): the backward policy, or the reference policy      |
| `F(s_t)`              | `log_flow`, shape (batch, time + 1): the flow, or the soft value of a state       |
| `R(s_T) = F(s_T)`     | the last `log_flow` of a complete trajectory, `-loss / temperature`               |
| `u_t`                 | `sub_trajectory_potentials(...)`, shape (batch, time + 1)                         |
| `r_ij = u_j - u_i`    | the residual of the sub-trajectory from state i to state j, in nats               |
| `λ`                   | `lam`                                                                             |
| `n`                   | `lengths`: transitions of each trajectory; whatever lies behind them is padding   |

A trajectory has `time + 1` states and `time` transitions; batches come first.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


def sub_trajectory_potentials(
    log_pf: Float[Tensor, "batch time"],
    log_ref: Float[Tensor, "batch time"] | None,
    log_flow: Float[Tensor, "batch states"],
) -> Float[Tensor, "batch states"]:
    """Potentials whose differences are the residuals of all sub-trajectories.

    `u_t = sum_{k<t} (log_pf_k - log_ref_k) - log_flow_t`, so that `r_ij = u_j - u_i`; a trajectory is balanced if and
    only if `u` is constant along it, and then equals `-log F(s_0)` (Ours: a rearrangement of SubTB, Known: 2209.12782).

    Args:
        log_pf: Log-probabilities of the transitions, shape (batch, time), in nats. Gradients flow through it.
        log_ref: Those of the reference, shape (batch, time); it is frozen, so its gradient is cut. None if `log_pf`
            already is the log ratio (see `gaussian_log_ratio`).
        log_flow: Log flow of the states, shape (batch, time + 1), in nats.

    Returns:
        The potentials, shape (batch, time + 1), in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check_shapes(log_pf, log_ref, log_flow)
    log_ratio = at_least_float32(log_pf)
    if log_ref is not None:
        log_ratio = log_ratio - at_least_float32(log_ref.detach())
    return pad(log_ratio.cumsum(1), (1, 0)) - at_least_float32(log_flow)


def sub_trajectory_balance_loss(
    log_pf: Float[Tensor, "batch time"],
    log_ref: Float[Tensor, "batch time"] | None,
    log_flow: Float[Tensor, "batch states"],
    *,
    lam: float = 1.0,
    lengths: Int[Tensor, " batch"] | None = None,
    robust_delta: float | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """SubTB(λ): the weighted mean of the squared residuals of all sub-trajectories.

    `sum_{i<j} λ^{j-i} ρ(u_j - u_i) / sum_{i<j} λ^{j-i}` within a trajectory, then the mean over trajectories (Known:
    2209.12782). `lam=0` is the limit of detailed balance (one-step sub-trajectories only), `lam=inf` that of trajectory
    balance. With `lam=1` and the square the sum over pairs is twice the sample variance of `u`, in O(time); otherwise
    memory is O(batch · time²).

    Args:
        log_pf: Log-probabilities of the transitions, shape (batch, time), in nats.
        log_ref: Those of the frozen reference, shape (batch, time), or None if `log_pf` is already the log ratio.
        log_flow: Log flow of the states, shape (batch, time + 1), in nats; see `forward_looking_log_flow`.
        lam: Weight ratio of sub-trajectories that differ by one transition in length, from 0 to `math.inf`.
        lengths: Transitions of each trajectory, shape (batch,), from 1 to time; None if there is no padding. Padding
            may hold any values, NaN included.
        robust_delta: Residual in nats at which the square turns into the pseudo-Huber loss
            `ρ(r) = 2 δ² (sqrt(1 + (r / δ)²) - 1)`; None for the square (Ours: residuals of 10-1000 nats occur, and the
            square of them diverged).
        reduction: `"mean"`, or `"none"` for one loss per trajectory.

    Returns:
        The loss in nats², a scalar, or shape (batch,) if not reduced.

    Raises:
        ValueError: On shapes that do not fit together or arguments out of range.
    """
    _check_arguments(lam, robust_delta, reduction)
    _check_shapes(log_pf, log_ref, log_flow, lengths)
    if lengths is None:
        lengths = torch.full((1,), log_pf.shape[1], device=log_pf.device)
    else:
        log_pf, log_flow = _without_padding(log_pf, lengths), _without_padding(log_flow, lengths + 1)
        log_ref = None if log_ref is None else _without_padding(log_ref, lengths)
    potentials = sub_trajectory_potentials(log_pf, log_ref, log_flow)
    potentials = potentials - potentials[:, :1]  # a balanced trajectory gives an exact zero, in any precision
    if lam == 1 and robust_delta is None:
        loss = _twice_the_variance(potentials, lengths)
    else:
        residuals = potentials[:, None, :] - potentials[:, :, None]
        weights = _pair_weights(lam, lengths, potentials)
        loss = (weights * _penalty(residuals, robust_delta)).flatten(1).sum(1)
    return loss.mean() if reduction == "mean" else loss


def forward_looking_log_flow(
    residual_flow: Float[Tensor, "batch states"],
    losses: Float[Tensor, "batch states"],
    temperature: float | Float[Tensor, "..."],
    weights: float | Float[Tensor, "..."] | None = None,
    *,
    is_terminal: Bool[Tensor, "batch states"] | None = None,
) -> Float[Tensor, "batch states"]:
    """Log flow made of the known loss of a state and a learned rest: `log F = log F~ - w · loss / temperature`.

    At terminal states `F = R = exp(-loss / temperature)`, whatever `residual_flow` and `weights` say there (Known:
    2302.01687, forward-looking GFlowNets). Every transition then carries its decrease of the loss as a reward, so that
    incomplete trajectories can be learned from.

    Args:
        residual_flow: What the network predicts, `log F~`, shape (batch, time + 1), in nats.
        losses: Task loss of every state, same shape; its gradient is cut. NaN is allowed where `weights` is 0.
        temperature: Loss per nat, > 0: a number, or a tensor broadcastable to (batch, time + 1).
        weights: Share of the known loss in the flow, broadcastable to (batch, time + 1), in [0, 1]; None for 1, which
            suits nearly noise-free states such as recorded ones (Ours); `t / time` suits noisy ones.
        is_terminal: States that end a complete trajectory, shape (batch, time + 1). None marks the last state of each
            row; mark none in a row that is a segment cut out before the end.

    Returns:
        The log flow, shape (batch, time + 1), in nats.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    if residual_flow.shape != losses.shape:
        raise ValueError(
            f"`residual_flow` and `losses` must have the same shape (batch, time + 1), got "
            f"{tuple(residual_flow.shape)} and {tuple(losses.shape)}."
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"`temperature` must be > 0 (loss per nat), got {temperature}.")
    if is_terminal is None:
        is_terminal = torch.zeros_like(losses, dtype=torch.bool)
        is_terminal[:, -1] = True
    share = torch.as_tensor(1.0 if weights is None else weights, dtype=losses.dtype, device=losses.device)
    share = share.expand_as(losses).masked_fill(is_terminal, 1.0)
    energy = (share * losses.detach() / temperature).masked_fill(share == 0, 0.0)
    return residual_flow.masked_fill(is_terminal, 0.0) - energy


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is if wider: log-probabilities sum thousands of terms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _twice_the_variance(u: Tensor, lengths: Tensor) -> Tensor:
    """The mean of all squared differences along a trajectory, shape (batch,), by its variance."""
    inside = torch.arange(u.shape[1], device=u.device) <= lengths[:, None]
    mean = u.masked_fill(~inside, 0.0).sum(1, keepdim=True) / (lengths + 1)[:, None]
    return 2 * (u - mean).masked_fill(~inside, 0.0).square().sum(1) / lengths


def _pair_weights(lam: float, lengths: Tensor, like: Tensor) -> Tensor:
    """Weights of the pairs i<j, `λ^{j-i}` normalised within each trajectory, shape (batch or 1, states, states)."""
    index = torch.arange(like.shape[1], device=like.device)
    spans = index[None, :] - index[:, None]
    # Powers count from the heaviest span, so that none overflows and 0 and infinity need no case of their own.
    heaviest = lengths[:, None, None] if lam > 1 else 1
    powers = torch.pow(lam, (spans - heaviest).to(like.dtype))
    real = (spans >= 1) & (index <= lengths[:, None, None])
    powers = torch.where(real, powers, 0.0)
    return powers / powers.sum((1, 2), keepdim=True)


def _penalty(residuals: Tensor, delta: float | None) -> Tensor:
    """The square, or the pseudo-Huber loss in a form that does not cancel at small residuals."""
    if delta is None:
        return residuals.square()
    return 2 * residuals.square() / (1 + (1 + (residuals / delta).square()).sqrt())


def _without_padding(x: Tensor, limit: Tensor) -> Tensor:
    """Zeros from `limit` on, in value and gradient."""
    return x.masked_fill(torch.arange(x.shape[1], device=x.device) >= limit[:, None], 0.0)


def _check_shapes(log_pf: Tensor, log_ref: Tensor | None, log_flow: Tensor, lengths: Tensor | None = None) -> None:
    batch, time = log_pf.shape if log_pf.ndim == 2 else (-1, -1)
    expected = {"log_ref": (batch, time), "log_flow": (batch, time + 1), "lengths": (batch,)}
    given = {"log_ref": log_ref, "log_flow": log_flow, "lengths": lengths}
    wrong = [
        f"`{name}` has {tuple(x.shape)} instead of {expected[name]}"
        for name, x in given.items()
        if x is not None and tuple(x.shape) != expected[name]
    ]
    if log_pf.ndim != 2 or time < 1 or wrong:
        raise ValueError(
            f"`log_pf` must be (batch, time) with time >= 1 and the rest must follow it; "
            f"`log_pf` has {tuple(log_pf.shape)}" + "".join(f", {w}" for w in wrong) + "."
        )
    if lengths is not None and bool(((lengths < 1) | (lengths > time)).any()):
        rows = ((lengths < 1) | (lengths > time)).nonzero().flatten().tolist()
        raise ValueError(f"`lengths` must be 1 to {time} transitions, got {lengths[rows].tolist()} in rows {rows}.")


def _check_arguments(lam: float, robust_delta: float | None, reduction: str) -> None:
    wrong = []
    if math.isnan(lam) or lam < 0:
        wrong.append(f"`lam` must be >= 0 (`math.inf` is allowed), got {lam}")
    if robust_delta is not None and not robust_delta > 0:
        wrong.append(f"`robust_delta` must be > 0 nats or None, got {robust_delta}")
    if reduction not in ("mean", "none"):
        wrong.append(f'`reduction` must be "mean" or "none", got {reduction!r}')
    if wrong:
        raise ValueError("; ".join(wrong) + ".")

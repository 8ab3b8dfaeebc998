"""The hybrid objective: recorded, spliced and on-policy segments in one mean, and the schedule of their shares."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lohp_peft.objectives.diagnostics import effective_sample_size, end_to_end_residuals
from lohp_peft.objectives.subtb import sub_trajectory_balance_loss

SOURCES = ("recorded", "spliced", "on_policy")
"""Where a segment comes from: an optimizer's recording, a recorded prefix that the policy continued, or the policy."""

# Shares of SOURCES at a progress of training; linear in between (Ours: on-policy alone was the unstable one, and
# recordings alone never show the policy its own mistakes).
_SCHEDULES = {
    "hybrid": {0.0: (1.0, 0.0, 0.0), 0.25: (0.5, 0.3, 0.2), 0.5: (0.25, 0.25, 0.5), 1.0: (0.25, 0.25, 0.5)},
    "on_policy": {0.0: (0.0, 0.0, 1.0), 1.0: (0.0, 0.0, 1.0)},
    "off_policy": {0.0: (1.0, 0.0, 0.0), 1.0: (1.0, 0.0, 0.0)},
}


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A batch of sub-trajectories of one source, as `sub_trajectory_balance_loss` takes it.

    Args:
        log_pf: Log-probabilities of the transitions, or log-ratios, shape (batch, time), in nats.
        log_flow: Log flow of the states, shape (batch, time + 1), in nats.
        log_ref: Log-probabilities under the reference, shape (batch, time), or None if `log_pf` is a ratio.
        lengths: Transitions of each segment, shape (batch,), or None if there is no padding.
        tasks: Index of the task of each segment, shape (batch,); only diagnostics read it.
        states: The states, shape (batch, time + 1, modules, width); only diagnostics read it.
    """

    log_pf: Float[Tensor, "batch time"]
    log_flow: Float[Tensor, "batch states"]
    log_ref: Float[Tensor, "batch time"] | None = None
    lengths: Int[Tensor, " batch"] | None = None
    tasks: Int[Tensor, " batch"] | None = None
    states: Float[Tensor, "batch states modules width"] | None = None


def hybrid_loss(
    segments: Mapping[str, Segments],
    weights: Mapping[str, float],
    *,
    lam: float = 1.0,
    robust_delta: float | None = 20.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """SubTB(λ) of all sources in one weighted mean: `sum_s w_s · mean loss of s / sum_s w_s`.

    No importance weights are needed off-policy (Known: 2210.00580), but the sources decide what is fitted when the
    capacity of the policy is limited (Ours: hence the explicit weights).

    Args:
        segments: One batch for each source at hand, keys from `SOURCES`.
        weights: Weight of each source at hand, >= 0, such as `schedule_fractions(...)`; normalised over these sources.
        lam: See `sub_trajectory_balance_loss`.
        robust_delta: See `sub_trajectory_balance_loss`, in nats (Ours: stable at 20 where the square diverged).

    Returns:
        The loss, a scalar in nats², and detached scalars to log: `<source>/loss`, `<source>/residual` and
        `<source>/residual_squared` (means of end-to-end residuals), `<source>/max_abs_state` where states are given,
        `on_policy/effective_sample_size` and its minimum over tasks, and `evidence_gap` (evidence upper bound on
        recordings minus lower bound on rollouts, in nats, for segments that start alike and end at the end).

    Raises:
        ValueError: On unknown sources, missing or negative weights, or weights that sum to 0.
    """
    _check_sources(segments, weights)
    losses, residuals, diagnostics = {}, {}, {}
    for source, batch in segments.items():
        paths = batch.log_pf, batch.log_ref, batch.log_flow
        losses[source] = sub_trajectory_balance_loss(*paths, lam=lam, lengths=batch.lengths, robust_delta=robust_delta)
        residuals[source] = end_to_end_residuals(*paths, batch.lengths)
        diagnostics[f"{source}/loss"] = losses[source].detach()
        diagnostics[f"{source}/residual"] = residuals[source].mean()
        diagnostics[f"{source}/residual_squared"] = residuals[source].square().mean()
        if batch.states is not None:
            diagnostics[f"{source}/max_abs_state"] = batch.states.detach().abs().max()
    if "on_policy" in segments:
        shares = effective_sample_size(-residuals["on_policy"], segments["on_policy"].tasks)
        diagnostics["on_policy/effective_sample_size"] = shares.mean()
        diagnostics["on_policy/effective_sample_size_min"] = shares.min()
        if "recorded" in segments:
            diagnostics["evidence_gap"] = residuals["on_policy"].mean() - residuals["recorded"].mean()
    total = sum(weights[source] for source in segments)
    loss = torch.stack([weights[source] / total * losses[source] for source in segments if weights[source] > 0]).sum()
    return loss, diagnostics


def schedule_fractions(progress: float, mode: str = "hybrid") -> dict[str, float]:
    """Shares of recorded, spliced and on-policy segments in a batch.

    `hybrid` goes from 100/0/0 over 50/30/20 at a quarter of the training to 25/25/50 at half of it, and stays there:
    never without recordings (Ours: without them training blew up). `on_policy` and `off_policy` are its ablations.

    Args:
        progress: Share of the training that is over, from 0 to 1.
        mode: `"hybrid"`, `"on_policy"` or `"off_policy"`.

    Returns:
        A share for each of `SOURCES`; they sum to 1.

    Raises:
        ValueError: On an unknown mode or a progress outside [0, 1].
    """
    if mode not in _SCHEDULES:
        raise ValueError(f"`mode` must be one of {sorted(_SCHEDULES)}, got {mode!r}.")
    if not 0 <= progress <= 1:
        raise ValueError(f"`progress` must be from 0 to 1, got {progress}.")
    knots = sorted(_SCHEDULES[mode].items())
    (start, before), (end, after) = next(pair for pair in pairwise(knots) if progress <= pair[1][0])
    way = (progress - start) / (end - start)
    return {name: (1 - way) * a + way * b for name, a, b in zip(SOURCES, before, after, strict=True)}


def _check_sources(segments: Mapping[str, Segments], weights: Mapping[str, float]) -> None:
    wrong = [f"{name!r} is no source" for name in segments if name not in SOURCES]
    wrong += [f"{name!r} has no weight" for name in segments if name not in weights]
    wrong += [f"{name!r} has weight {weights[name]}" for name in segments if not weights.get(name, 0.0) >= 0]
    if wrong or not sum(weights[name] for name in segments) > 0:
        reason = ", ".join(wrong) or "the weights sum to 0"
        raise ValueError(f"`segments` need sources from {SOURCES} with weights >= 0, not all 0; got: {reason}.")

"""Temperatures by rule: how much loss one nat of the reward is worth.

Too large a temperature pulls the policy to the reference, too small a one makes residuals of 1e4 nats² and diverges.
"""

import math

from jaxtyping import Float
from torch import Tensor


def calibrate_temperature(final_losses: Float[Tensor, "tasks rollouts"], kl_target: float = 3.0) -> float:
    """The temperature for the relative form, from rollouts of the reference policy.

    Tilting the reference by `exp(-loss / T)` costs `KL ≈ Var(loss) / (2 T²)` when the tilt is small, and gains
    `Var(loss) / T` of loss; so `T = sqrt(mean over tasks of Var(loss) / (2 kl_target))` (Ours: the mean over tasks of
    the KL per trajectory then is `kl_target`).

    Args:
        final_losses: Loss at the end of each rollout, shape (tasks, rollouts), at least 2 rollouts per task, in units
            that are the same for all tasks (such as loss over loss without adapter).
        kl_target: Wanted KL per trajectory in nats; 2 to 5 is sensible (Ours).

    Raises:
        ValueError: If there are too few rollouts, losses are not finite, or they do not vary.
    """
    if final_losses.ndim != 2 or final_losses.shape[1] < 2 or final_losses.shape[0] < 1:
        raise ValueError(
            f"`final_losses` must be (tasks, rollouts) with at least 2 rollouts, got {tuple(final_losses.shape)}."
        )
    if not kl_target > 0:
        raise ValueError(f"`kl_target` must be > 0 nats, got {kl_target}.")
    variances = final_losses.detach().double().var(1)
    if not variances.isfinite().all():
        tasks = (~variances.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"`final_losses` of tasks {tasks} are not finite; leave them out.")
    if not variances.any():
        raise ValueError("`final_losses` do not vary between rollouts of a task; roll out with noise (sigma > 0).")
    return math.sqrt(float(variances.mean()) / (2 * kl_target))


def calibrate_path_temperature(
    initial_losses: Float[Tensor, " trajectories"],
    final_losses: Float[Tensor, " trajectories"],
    log_ratios: Float[Tensor, " trajectories"],
) -> float:
    """The temperature for the form with a backward policy, from recorded trajectories.

    `T = mean(initial - final loss) / mean(sum_k log P_F - log P_B)`: the range of the reward equals the cost of the
    path on recorded data, where the residual of a full trajectory then vanishes on average (Ours).

    A step whose backward policy is a point mass (`BackwardReference.point_masses`) belongs in neither mean: a density
    against a probability has a unit, and `T` would follow the unit of the weights. What it costs is a constant, which the
    log flow of its first state learns.

    Args:
        initial_losses: Loss of the first state, or of the one behind the point mass, shape (trajectories,).
        final_losses: Loss of the last state, shape (trajectories,).
        log_ratios: `sum_k (log P_F - log P_B)` over the steps between the two, under the behaviour clone, shape
            (trajectories,), in nats.

    Raises:
        ValueError: If the losses do not fall on average or the path cost is not positive.
    """
    decrease = float((initial_losses.double() - final_losses.double()).mean())
    cost = float(log_ratios.detach().double().mean())
    if not (decrease > 0 and cost > 0 and math.isfinite(decrease / cost)):
        raise ValueError(
            f"No temperature balances the recordings: the mean decrease of the loss ({decrease:.4g}) and the mean path "
            f"cost ({cost:.4g} nats) must both be finite and > 0. Refit the reference, or use the relative form."
        )
    return decrease / cost

"""What to watch while a policy learns by balance: is it balanced, and do its rollouts cover the target?"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lohp_peft.objectives.subtb import sub_trajectory_potentials


@torch.no_grad()
def end_to_end_residuals(
    log_pf: Float[Tensor, "batch time"],
    log_ref: Float[Tensor, "batch time"] | None,
    log_flow: Float[Tensor, "batch states"],
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """The residual `u_n - u_0` from the first to the last state of each segment, in nats, without gradient.

    Its negative is the log importance weight of the segment, `log F(s_n) P_B / (P_F F(s_0))`. Arguments are those of
    `sub_trajectory_balance_loss`; means of a few nats are healthy. A positive mean on recordings says that they are more
    likely under the policy than the flows justify, so that balance will push them down: the temperature is too large.

    Args:
        log_pf: Shape (batch, time), in nats.
        log_ref: Shape (batch, time), or `None` if `log_pf` is already the log ratio.
        log_flow: Shape (batch, time + 1), in nats.
        lengths: Transitions of each segment, shape (batch,); all by default.
    """
    potentials = sub_trajectory_potentials(log_pf, log_ref, log_flow)
    if lengths is None:
        return potentials[:, -1] - potentials[:, 0]
    return potentials.gather(1, lengths[:, None]).squeeze(1) - potentials[:, 0]


@torch.no_grad()
def effective_sample_size(
    log_weights: Float[Tensor, " batch"], tasks: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " tasks"]:
    """Effective share of the rollouts of each task, `(sum w)² / (count · sum w²)`, from 1 / count to 1.

    Args:
        log_weights: Log importance weights, `-end_to_end_residuals(...)` of on-policy rollouts, shape (batch,).
        tasks: Task of each rollout, shape (batch,); None if all share one. Weights of different tasks have different
            normalisers and are never compared.

    Returns:
        One share per task, in the order of `tasks.unique()`.
    """
    tasks = torch.zeros_like(log_weights, dtype=torch.long) if tasks is None else tasks
    members = tasks == tasks.unique()[:, None]
    weights = log_weights.expand(members.shape).masked_fill(~members, -torch.inf).softmax(1)
    return 1 / (members.sum(1) * weights.square().sum(1))

"""The fitted backward policy: a reference under which recorded trajectories are natural.

Two references fit the `log_ref` of `sub_trajectory_balance_loss`. A frozen clone of the recordings makes the balance
*relative* (Known: 2405.20971, 2509.01632): use `gaussian_log_ratio`. `BackwardReference` is a backward policy fitted on
the recordings. A fixed Brownian bridge is left out on purpose: recorded optimizer trajectories are hundreds of nats
more likely than it allows, and balance then unlearns them (Ours: measured).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lohp_peft.objectives.gaussian import gaussian_log_prob


@dataclass(frozen=True, kw_only=True)
class BackwardReference:
    """Frozen backward policy `P_B(s_k | s_{k+1}) = N(contraction · s_{k+1}, sigma²)`, one pair of numbers per step and module.

    A step from which all recordings come back to the same point (state 0, no adapter) has sigma 0: a point mass, whose
    log-probability is 0 by convention (Ours: as the first step of a pinned bridge).

    Args:
        contraction: Shape (time, modules).
        sigma: Standard deviation, shape (time, modules).
        mask: Real entries of a state, shape (modules, width).
    """

    contraction: Float[Tensor, "time modules"]
    sigma: Float[Tensor, "time modules"]
    mask: Bool[Tensor, "modules width"]

    @classmethod
    def fit(
        cls,
        states: Float[Tensor, "trajectories states modules width"],
        mask: Bool[Tensor, "modules width"] | None = None,
        *,
        min_relative_sigma: float = 0.01,
    ) -> "BackwardReference":
        """Fit by maximum likelihood, in closed form, on recorded trajectories.

        `contraction = <s_k, s_{k+1}> / <s_{k+1}, s_{k+1}>` and `sigma² = mean |s_k - contraction · s_{k+1}|²`, sums over
        trajectories and real entries (Known: least squares). Fit on states as the policy will meet them: with the noise
        that training adds to recordings, if it does.

        Args:
            states: Shape (trajectories, time + 1, modules, width), the same number of steps in each.
            mask: Real entries, shape (modules, width); None if there is no padding.
            min_relative_sigma: Floor of sigma, in units of its root mean square over the modules of the step (Ours:
                a module that never moved in the recordings must not forbid moving).

        Returns:
            The reference, one contraction and sigma for every step and module.

        Raises:
            ValueError: If there is no transition or a state is not finite.
        """
        if states.ndim != 4 or states.shape[0] < 1 or states.shape[1] < 2:
            raise ValueError(
                f"`states` must be (trajectories, time + 1, modules, width) with at least one trajectory and one "
                f"transition, got {tuple(states.shape)}."
            )
        mask = torch.ones(states.shape[2:], dtype=torch.bool, device=states.device) if mask is None else mask
        states = states.detach().double().masked_fill(~mask, 0.0)
        if not states.isfinite().all():
            rows = (~states.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"`states` must be finite, but trajectories {rows} are not; leave them out.")
        earlier, later = states[:, :-1], states[:, 1:]
        energy = later.square().sum((0, 3))
        contraction = (earlier * later).sum((0, 3)) / energy.masked_fill(energy == 0, 1.0)
        count = states.shape[0] * mask.sum(1)
        variance = (earlier - contraction[..., None] * later).square().sum((0, 3)) / count
        floor = min_relative_sigma**2 * variance.mean(1, keepdim=True)
        return cls(contraction=contraction.float(), sigma=variance.maximum(floor).sqrt().float(), mask=mask)

    @property
    def point_masses(self) -> Bool[Tensor, " time"]:
        """The steps that come back to one point for certain: they have no density, so log-ratios at them have a unit."""
        return (self.sigma == 0).all(-1)

    def log_prob(
        self,
        states: Float[Tensor, "*batch modules width"],
        next_states: Float[Tensor, "*batch modules width"],
        steps: Int[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch"]:
        """Log-density of going back from `next_states` to `states`.

        Args:
            states: The earlier states, shape (..., modules, width); detached.
            next_states: The later states, same shape; detached.
            steps: Index of the earlier state in its trajectory, shape (...), from 0 to time - 1.

        Returns:
            Log-densities, shape (...), in nats: the `log_ref` of `sub_trajectory_balance_loss`.
        """
        contraction, sigma = self.contraction[steps][..., None], self.sigma[steps][..., None]
        sigma = sigma.masked_fill(sigma == 0, 1.0)
        log_prob = gaussian_log_prob(states, contraction * next_states.detach(), sigma, self.mask)
        return log_prob.masked_fill(self.point_masses[steps], 0.0)

    def to(self, device: torch.device | str) -> "BackwardReference":
        """The same reference on another device.

        Args:
            device: The device.
        """
        return type(self)(**{name: tensor.to(device) for name, tensor in self.to_tensors().items()})

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors to save; `from_tensors` reads them back."""
        return {"contraction": self.contraction, "sigma": self.sigma, "mask": self.mask}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "BackwardReference":
        """Restore what `to_tensors` gave.

        Args:
            tensors: Its tensors by name.

        Returns:
            The same reference.
        """
        return cls(**tensors)

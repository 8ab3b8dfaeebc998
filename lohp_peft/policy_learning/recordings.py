"""Recorded trajectories as the policy learns from them: K knots, relative losses, indexed by task."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lohp_peft.policy import LoHpPolicy
from lohp_peft.trajectories import Trajectory
from lohp_peft.trajectories.trajectory import LOW_SHARE, SCORED_SHARE

logger = logging.getLogger(__name__)

MAX_RELATIVE_LOSS = 2.0
"""Relative losses are clipped here, so that one failed run cannot dominate (Ours: notes on clipping at 2 L_0)."""
HOW_TO_SCORE = (
    "A run of `TrajectoryRecorder` is scored by evaluations: at the start (`eval_on_start=True`), during training and at "
    "the end."
)


@dataclass(frozen=True)
class Recordings:
    """All runs at the same number of knots.

    Args:
        states: Shape (runs, time + 1, modules, width).
        losses: Loss over the loss without adapter, shape (runs, time + 1).
        tasks: Task of each run.
        optimizers: Index of each run's optimizer plus one, int64, shape (runs,).
        optimizer_names: Names by index.
    """

    states: Tensor
    losses: Tensor
    tasks: tuple[str, ...]
    optimizers: Tensor
    optimizer_names: tuple[str, ...]

    @classmethod
    def from_trajectories(
        cls, trajectories: Sequence[Trajectory], policy_steps: int, final_weights_only: bool = False
    ) -> "Recordings":
        """All scored runs, resampled at `policy_steps + 1` of their scored states; a warning names the others.

        Args:
            trajectories: Recorded runs, each from no adapter on. The first and the last state need a loss, and
                `policy_steps + 1` in all.
            policy_steps: Steps of the policy.
            final_weights_only: Replace the path by a straight line from no adapter to the last state, which
                supervises nothing but the final weights (ablation).

        Raises:
            ValueError: When no run can be learned from, saying why.
        """
        reasons = [_unusable(trajectory, policy_steps) for trajectory in trajectories]
        kept = [trajectory for trajectory, reason in zip(trajectories, reasons, strict=True) if reason is None]
        left_out = Counter((t.task, reason) for t, reason in zip(trajectories, reasons, strict=True) if reason)
        why = ", ".join(f"{count} of {task!r} ({reason})" for (task, reason), count in left_out.items())
        if not kept:
            raise ValueError(
                f"None of the {len(trajectories)} recorded trajectories can be learned from: {why or 'there are none'}. "
                f"{HOW_TO_SCORE}"
            )
        if left_out:
            logger.warning(
                "Left out %d of %d recorded runs: %s. %s", left_out.total(), len(reasons), why, HOW_TO_SCORE
            )
        shares = {t: float(t.metrics[SCORED_SHARE][-1]) for t in kept if SCORED_SHARE in t.metrics}
        if poor := [f"{t.task!r} by {t.optimizer} {x:.0%}" for t, x in shares.items() if x < LOW_SHARE]:
            logger.warning(
                "The losses of %d of %d runs were measured on updates of which their states hold little: %s. Record all runs "
                "with one `space`, or fit one to their checkpoints with `lohp-peft import-checkpoints`.",
                len(poor),
                len(kept),
                ", ".join(poor),
            )
        states, losses = [], []
        for trajectory in kept:
            knots = trajectory.at(trajectory.losses.isfinite().nonzero().flatten()).knots(policy_steps)
            path, loss = knots.states.float(), (knots.losses / knots.losses[0]).clamp(max=MAX_RELATIVE_LOSS)
            if final_weights_only:
                share = torch.linspace(0, 1, policy_steps + 1)
                path, loss = share[:, None, None] * path[-1], 1 + share * (loss[-1] - 1)
            states.append(path)
            losses.append(loss.float())
        names = tuple(sorted({t.optimizer for t in kept}))
        optimizers = torch.tensor([names.index(t.optimizer) + 1 for t in kept])
        return cls(torch.stack(states), torch.stack(losses), tuple(t.task for t in kept), optimizers, names)

    def __len__(self) -> int:
        return len(self.tasks)

    def of_tasks(self, allowed: Collection[str]) -> "Recordings":
        """The runs of the tasks `allowed`; a warning names the tasks of the others.

        Raises:
            ValueError: When there are none.
        """
        kept = [i for i, task in enumerate(self.tasks) if task in allowed]
        others = sorted(set(self.tasks) - set(allowed))
        why = f"Episodes need two classes of four texts, and these recorded tasks have fewer: {others}."
        if not kept:
            raise ValueError(f"None of the recorded tasks can be trained on. {why} Record tasks with more texts.")
        if others:
            logger.warning("Left out %d of %d recorded runs. %s", len(self) - len(kept), len(self), why)
        tasks = tuple(self.tasks[i] for i in kept)
        return Recordings(self.states[kept], self.losses[kept], tasks, self.optimizers[kept], self.optimizer_names)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Recordings":
        """The same on another `device`, with states and losses in `dtype`."""
        states, losses = self.states.to(device, dtype), self.losses.to(device, dtype)
        return Recordings(states, losses, self.tasks, self.optimizers.to(device), self.optimizer_names)

    def scales(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The root mean square per module of final states, (modules, 1), and of steps, (time, modules, 1).

        Normalised over the real entries of `mask` (modules, width).
        """
        entries = mask.sum(-1, keepdim=True)
        rms = lambda x: (x.square().sum(-1, keepdim=True) / entries).mean(0).sqrt()  # noqa: E731
        scale, steps = rms(self.states[:, -1]), rms(self.states.diff(dim=1))
        floor = 1e-3 * scale.mean().clamp(min=1e-6)
        return scale.clamp(min=float(floor)), steps.clamp(min=float(0.1 * floor))

    def task_indices(self, index: Tensor) -> Tensor:
        """The number of the task of each run in `index`, in the order of their names."""
        names = sorted(set(self.tasks))
        return torch.tensor([names.index(self.tasks[int(i)]) for i in index])

    def best_states(self) -> dict[str, Tensor]:
        """The final state of every task's run with the lowest final loss, shape (modules, width)."""
        best: dict[str, tuple[float, Tensor]] = {}
        for i, name in enumerate(self.tasks):
            loss = float(self.losses[i, -1])
            if name not in best or loss < best[name][0]:
                best[name] = (loss, self.states[i, -1])
        return {name: state for name, (_, state) in best.items()}

    def sample(self, size: int, generator: torch.Generator, allowed: Collection[str]) -> Tensor:
        """The indices of some runs, good ones first: weights fall with the rank of the final loss.

        Args:
            size: How many, with replacement.
            generator: Source of the draw.
            allowed: Names of the tasks they may be of.
        """
        usable = torch.tensor([name in allowed for name in self.tasks])
        rank = self.losses[:, -1].cpu().argsort().argsort().float()
        weight = usable / (0.5 * len(self) + rank)
        return torch.multinomial(weight, size, replacement=True, generator=generator)


def _unusable(trajectory: Trajectory, policy_steps: int) -> str | None:
    """Why nothing can be learned from a run, or `None`."""
    losses = trajectory.losses
    scored = int(losses.isfinite().sum())
    if trajectory.states[0].any():
        return "it does not start without an adapter, as a policy does"
    if not losses[[0, -1]].isfinite().all():
        return "no loss of the first or the last state"
    if losses[0] <= 0:
        return "no loss to lower at the first state"
    if scored <= policy_steps:
        return f"{scored} scored states, `policy_steps`={policy_steps} needs {policy_steps + 1}"
    return None


def fit_scales(policy: LoHpPolicy, recordings: Recordings) -> None:
    """Set the policy's `scale` and `step_rms` from the recordings."""
    scale, steps = recordings.scales(policy.state_mask)
    policy.scale.copy_(scale)
    policy.step_rms.copy_(steps)

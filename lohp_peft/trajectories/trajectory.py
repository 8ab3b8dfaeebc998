"""One recorded fine-tuning run as a sequence of points in a weight space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KNOT_POWER = 1.5
SCORED_SHARE = "scored_share"
"""Metric of a run that was scored before it was encoded: the share of the scored update's squared norm that a state holds."""
LOW_SHARE = 0.9
"""Below it the losses of such a run are not those of its states, and it is named (Ours: a tenth of the update)."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States that an optimizer went through on one task: `time + 1` states joined by `time` transitions.

    Args:
        states: Points of a `WeightSpace`, float32, shape (time + 1, modules, width).
        optimizer_steps: Optimizer steps taken before each state, int64, shape (time + 1,), strictly increasing.
        losses: Task loss of each state on a fixed query batch in nats, float32, shape (time + 1,); NaN where a state
            has not been scored.
        metrics: Further float32 series of shape (time + 1,), NaN where nothing was measured.
        task: Name of the task.
        optimizer: Name of the optimizer.
        hyperparameters: Hyper-parameters of the optimizer, values that JSON can hold.
        seed: Seed of the run.

    Raises:
        ValueError: Listing every field whose type, shape or values break these rules.
    """

    states: Tensor
    optimizer_steps: Tensor
    losses: Tensor
    metrics: Mapping[str, Tensor]
    task: str
    optimizer: str
    hyperparameters: Mapping[str, Any]
    seed: int

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError(
                f"Malformed trajectory of task {self.task!r} ({self.optimizer!r}): " + "; ".join(problems)
            )

    def _problems(self) -> list[str]:
        states = self.states
        if states.dtype != torch.float32 or states.ndim != 3 or not len(states):
            found = f"{_name(states.dtype)} {tuple(states.shape)}"
            return [f"`states` must be float32 of shape (time + 1, modules, width), got {found}"]
        kinds = {"task": str, "optimizer": str, "seed": int}
        problems = [
            f"`{name}` must be {kind.__name__}, got {getattr(self, name)!r}"
            for name, kind in kinds.items()
            if type(getattr(self, name)) is not kind
        ]
        broken = sorted({int(i) for i in (~states.isfinite()).nonzero()[:, 0]})
        if broken:
            problems.append(f"`states` must be finite, but states {broken} hold NaN or infinite values")
        series = {"optimizer_steps": (self.optimizer_steps, torch.int64), "losses": (self.losses, torch.float32)}
        series |= {f"metrics[{name!r}]": (values, torch.float32) for name, values in self.metrics.items()}
        for name, (values, dtype) in series.items():
            if values.dtype != dtype or values.shape != states.shape[:1]:
                found = f"{_name(values.dtype)} {tuple(values.shape)}"
                problems.append(f"`{name}` must be {_name(dtype)} of shape ({len(states)},), got {found}")
            elif dtype == torch.float32 and values.isinf().any():
                problems.append(f"`{name}` must hold finite values, or NaN where nothing was measured, got infinities")
            elif name == "optimizer_steps" and (values[0] < 0 or (values.diff() <= 0).any()):
                problems.append(f"`{name}` must increase strictly from at least 0, got {values.tolist()}")
        return problems

    def __len__(self) -> int:
        """Number of states, `time + 1`."""
        return len(self.states)

    def at(self, indices: Sequence[int] | Tensor) -> "Trajectory":
        """The trajectory seen only at the states `indices`, strictly increasing positions in `range(time + 1)`.

        Raises:
            ValueError: When the indices do not increase strictly or leave the trajectory.
        """
        index = torch.as_tensor(indices, dtype=torch.long)
        if index.ndim != 1 or not len(index) or index[0] < 0 or index[-1] >= len(self) or (index.diff() <= 0).any():
            raise ValueError(
                f"`indices` must increase strictly within 0..{len(self) - 1} ({len(self)} states), got {index.tolist()}."
            )
        return replace(
            self,
            states=self.states[index],
            optimizer_steps=self.optimizer_steps[index],
            losses=self.losses[index],
            metrics={name: values[index] for name, values in self.metrics.items()},
        )

    def knots(self, policy_steps: int) -> "Trajectory":
        """The trajectory at `policy_steps + 1` knots, the first and the last state among them.

        Knots lie at equal decreases of the lowest loss so far. Where the first or last state has no loss, or the loss
        never falls below its start, they lie at `N (k / K) ** 1.5` of the `N` optimizer steps: early steps are larger
        (Ours: makes the lengths of the recorded policy steps similar). Unscored states in between are interpolated
        for the choice only.

        Raises:
            ValueError: When the trajectory has fewer than `policy_steps` transitions.
        """
        if not 1 <= policy_steps < len(self):
            raise ValueError(
                f"`policy_steps` must be between 1 and the {len(self) - 1} recorded transitions of task {self.task!r} "
                f"({self.optimizer!r}), got {policy_steps}. Record more often or use fewer policy steps."
            )
        progress = self._loss_progress()
        if progress is None:
            steps = (self.optimizer_steps - self.optimizer_steps[0]).double()
            progress = (steps / steps[-1]) ** (1 / KNOT_POWER)
        levels = torch.linspace(0, 1, policy_steps + 1, dtype=torch.float64)
        above = torch.searchsorted(progress, levels - 1e-9).clamp(max=len(self) - 1)
        below = (above - 1).clamp(min=0)
        nearest = torch.where(levels - progress[below] < progress[above] - levels, below, above).tolist()
        chosen = [0]
        for k in range(1, policy_steps):
            latest = len(self) - 1 - (policy_steps - k)
            chosen.append(min(max(nearest[k], chosen[-1] + 1), latest))
        return self.at([*chosen, len(self) - 1])

    def _loss_progress(self) -> Tensor | None:
        """Share of the whole loss decrease reached at each state, float64 (time + 1,), or `None` without one."""
        losses, steps = self.losses.double(), self.optimizer_steps.double()
        scored = losses.isfinite()
        if not (scored[0] and scored[-1]):
            return None
        after = torch.searchsorted(steps[scored], steps).clamp(min=1)
        x0, x1 = steps[scored][after - 1], steps[scored][after]
        y0, y1 = losses[scored][after - 1], losses[scored][after]
        lowest = (y0 + (y1 - y0) * (steps - x0) / (x1 - x0)).cummin(0).values
        decrease = lowest[0] - lowest[-1]
        return (lowest[0] - lowest) / decrease if decrease > 0 else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What a preparation will do, before it does it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import WeightSpace
from lohp_peft.tasks.fingerprint import rows_at_hand
from lohp_peft.tasks.task import Task
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.trajectories.manifest import MANIFEST_NAME
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.optimizers import OFFLINE_OPTIMIZERS
from lohp_peft.weight_preparation.rows import TaskRows, select_rows

FLOAT_BYTES = 4
METADATA_KEY = "weight_preparation"


@dataclass(frozen=True)
class PreparationPlan:
    """Tasks x optimizers x seeds, and what they cost.

    Args:
        tasks: Tasks still to record.
        recorded: Tasks that the dataset already has.
        optimizers: Names in `OFFLINE_OPTIMIZERS`.
        seeds: Seeds of every task and optimizer.
        runs: Runs to do.
        optimizer_steps: Optimizer steps of all of them.
        gradient_passes: Forward and backward passes of all of them; sharpness-aware steps take two.
        states: States to record and score.
        bytes: Size of the states on disk.
    """

    tasks: tuple[str, ...]
    recorded: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: int
    optimizer_steps: int
    gradient_passes: int
    states: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def table(self) -> Table:
        """The plan as a table for a terminal."""
        table = Table(title="Weight preparation: plan")
        table.add_column("what")
        table.add_column("how much", justify="right")
        rows: Mapping[str, Any] = {
            "tasks to record": len(self.tasks),
            "tasks recorded before": len(self.recorded),
            "optimizers": ", ".join(self.optimizers),
            "seeds": len(self.seeds),
            "runs": self.runs,
            "optimizer steps": self.optimizer_steps,
            "gradient passes": self.gradient_passes,
            "states": self.states,
            "megabytes on disk": f"{self.bytes / 1e6:.1f}",
        }
        for what, value in rows.items():
            table.add_row(what, str(value))
        return table


def plan_preparation(
    tasks: Sequence[Task], space: WeightSpace, config: WeightPreparationConfig, output_dir: str | Path | None = None
) -> PreparationPlan:
    """Count what `prepare_trajectories` would do; nothing is computed or written.

    Args:
        tasks: Tasks to record.
        space: Weight space of the states.
        config: What to record.
        output_dir: Where a dataset may already hold some of the tasks.

    Returns:
        The numbers of runs, states and bytes.

    Raises:
        ValueError: Listing every task that cannot be recorded, or every setting in which the existing dataset was
            recorded differently; when its weight space has another kind or rank or other modules, or a recorded task
            had other rows.
    """
    select_all_rows(tasks, config)
    recorded: set[str] = set()
    if output_dir is not None and (Path(output_dir) / MANIFEST_NAME).exists():
        dataset = TrajectoryDataset.open(output_dir, on_damage="skip")
        check_same_space(dataset, space.kind, space.r, space.layout)
        check_same_settings(dataset, config)
        dataset.check_rows(rows_at_hand(tasks))
        recorded = set(dataset.keys())
    pending = tuple(task.name for task in tasks if task.name not in recorded)
    passes = sum(OFFLINE_OPTIMIZERS[name].gradient_passes for name in config.optimizers)
    runs = len(pending) * len(config.optimizers) * len(config.seeds)
    modules, width = space.shape
    return PreparationPlan(
        tasks=pending,
        recorded=tuple(task.name for task in tasks if task.name in recorded),
        optimizers=config.optimizers,
        seeds=config.seeds,
        runs=runs,
        optimizer_steps=runs * config.optimizer_steps,
        gradient_passes=len(pending) * len(config.seeds) * passes * config.optimizer_steps,
        states=runs * config.states_per_run,
        bytes=runs * config.states_per_run * modules * width * FLOAT_BYTES,
    )


def select_all_rows(tasks: Sequence[Task], config: WeightPreparationConfig) -> dict[str, TaskRows]:
    """The rows of every task by its name.

    Raises:
        ValueError: Listing every task that has too few rows or shares its name with another.
    """
    problems = [
        f"{count} tasks are named {name!r}" for name, count in Counter(t.name for t in tasks).items() if count > 1
    ]
    chosen = {}
    for task in tasks:
        try:
            chosen[task.name] = select_rows(task, config)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
    if not tasks:
        problems.append("there are no tasks")
    if problems:
        raise ValueError("Cannot prepare trajectories: " + "; ".join(problems) + ".")
    return chosen


def check_same_space(dataset: TrajectoryDataset, kind: str, r: int, layout: AdapterLayout) -> None:
    """Make sure that the weight space of an existing dataset has this kind, rank and layout; its bases may be its own.

    Raises:
        ValueError: Naming both sides.
    """
    space = dataset.space
    found, wanted = (space.kind, space.r, space.layout.to_dict()), (kind, r, layout.to_dict())
    if found != wanted:
        raise ValueError(
            f"{dataset.folder} holds trajectories of another weight space: (kind, rank) {found[:2]}, asked for {wanted[:2]}; "
            f"modules {[spec.name for spec in space.layout.modules]}, asked for {[spec.name for spec in layout.modules]}. "
            "Choose another folder, or the same settings."
        )


def check_same_settings(dataset: TrajectoryDataset, config: WeightPreparationConfig) -> None:
    """Make sure that an existing dataset was recorded with the same settings.

    Raises:
        ValueError: Listing every setting that differs.
    """
    before, now = dataset.manifest.metadata.get(METADATA_KEY), config.to_dict()
    if not isinstance(before, dict):
        raise ValueError(
            f"{dataset.folder} was not written by weight preparation, so it cannot be continued; choose another folder."
        )
    names = sorted(set(before) | set(now))
    changed = [f"`{n}` was {before.get(n)!r}, now {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    if changed:
        raise ValueError(
            f"{dataset.folder} was recorded with other settings: " + "; ".join(changed) + ". Use the same settings to "
            "continue it, or choose another folder."
        )

"""Weight preparation: record how offline optimizers solve many tasks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table

from lohp_peft.adapters.layout import base_model_fingerprint
from lohp_peft.progress import Work
from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.fingerprint import rows_at_hand
from lohp_peft.tasks.requirements import check_gradients, frozen
from lohp_peft.tasks.task import Task
from lohp_peft.trajectories import Trajectory, TrajectoryDataset
from lohp_peft.trajectories.manifest import MANIFEST_NAME, READING_KEY
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.optimizers import build_optimizer, hyperparameters, take_step
from lohp_peft.weight_preparation.plan import METADATA_KEY, check_same_settings, select_all_rows
from lohp_peft.weight_preparation.process import process_of
from lohp_peft.weight_preparation.rows import TaskRows, keyed_generator
from lohp_peft.weight_preparation.scoring import query_loss, score_trajectory


@dataclass(frozen=True)
class RunReport:
    """One run.

    Args:
        task: Name of the task.
        optimizer: Name of the optimizer.
        seed: Seed of its minibatches.
        first_loss: Query loss of the start in nats; NaN when the run diverged.
        last_loss: That of the end.
        seconds: Duration.
        bytes: Size of its states.
    """

    task: str
    optimizer: str
    seed: int
    first_loss: float
    last_loss: float
    seconds: float
    bytes: int


def prepare_trajectories(
    tasks: Sequence[Task],
    encoder: TextEncoder,
    output_dir: str | Path,
    config: WeightPreparationConfig | None = None,
    accelerator: Accelerator | None = None,
    console: Console | None = None,
) -> TrajectoryDataset:
    """Record every task with every optimizer and seed into `output_dir`, one shard a task.

    What is trained is the state itself, from zero. Every optimizer step draws a class-balanced minibatch, solves the
    head on half of it and takes the cross-entropy of the other half (Known: 1805.08136). Afterwards every recorded
    state is scored forward-only on a fixed query batch that no step has seen. Tasks that the dataset already has are
    skipped, so a killed preparation is continued by the same call; under `accelerate launch` each process takes a
    share of the tasks. Runs are deterministic in task name, optimizer and seed.

    Args:
        tasks: Tasks to learn from, with different names.
        encoder: Encoder of the frozen base model; its weight space is the one recorded.
        output_dir: Folder of the dataset.
        config: What to record.
        accelerator: Moves the base model to its device; `None` leaves it where it is, but for an accelerator that a
            launcher such as `accelerate launch` gave to this process or that it uses already.
        console: Where progress and the closing table go; `None` is standard error, `Console(quiet=True)` is silence.

    Returns:
        The whole dataset, with the shards of all processes.

    Raises:
        ValueError: When a task cannot be recorded, or `output_dir` holds a dataset of another base model, weight
            space, reading of texts or configuration, or of tasks that had other rows; all offenders are listed. When the
            base model passes no gradients.
    """
    config = config or WeightPreparationConfig()
    console = console or Console(stderr=True)
    process = process_of(encoder, accelerator)
    check_gradients(encoder.base_model)
    rows = select_all_rows(tasks, config)
    dataset = _open_or_create(Path(output_dir), encoder, config, process)
    dataset.check_rows(rows_at_hand(tasks))
    recorded = set(dataset.keys())
    process.wait_for_everyone()  # nobody writes before all have seen the same pending tasks
    pending = [task for task in tasks if task.name not in recorded]
    reports: list[RunReport] = []
    with Work(console, disable=not process.is_main_process) as progress:
        mine = _my_share(pending, process)
        bar = progress.add_task("weight preparation", total=len(mine) * len(config.optimizers) * len(config.seeds))
        for task in mine:
            chosen = rows[task.name]
            encoded = encoder.prepare(chosen.examples.texts, chosen.examples.texts_b)
            trajectories = []
            for optimizer in config.optimizers:
                for seed in config.seeds:
                    progress.update(bar, note=f"{task.name}, {optimizer}")
                    trajectory, report = _record(task.name, encoder, chosen, encoded, optimizer, seed, config)
                    trajectories += [] if trajectory is None else [trajectory]
                    reports.append(report)
                    progress.advance(bar)
            if trajectories:
                dataset.append(task.name, trajectories, metadata=chosen.to_metadata())
    process.wait_for_everyone()
    reports = gather_object(reports)
    if process.is_main_process:
        console.print(_summary(reports, len(tasks) - len(pending)))
    return TrajectoryDataset.open(output_dir, on_damage="skip")  # of tasks that were not asked for


def record_run(
    encoder: TextEncoder,
    rows: TaskRows,
    encoded: EncodedTexts,
    *,
    task: str,
    optimizer: str,
    seed: int,
    config: WeightPreparationConfig,
) -> Trajectory | None:
    """Train one state from zero.

    Args:
        encoder: Encoder in the weight space to record in.
        rows: The task's rows.
        encoded: The same rows, from `encoder.prepare`.
        task: Name of the task.
        optimizer: Name of the optimizer.
        seed: Seed of the minibatches.
        config: Settings.

    Returns:
        The trajectory without scores, or `None` when the run diverged.
    """
    state = torch.zeros(tuple(encoder.space.shape), device=encoder.device, requires_grad=True)
    hyper = hyperparameters(optimizer, config.hyperparameters.get(optimizer))
    rule = build_optimizer(optimizer, [state], **hyper)
    generator = keyed_generator(task, optimizer, seed)
    states, steps, losses = [state.detach().cpu().clone()], [0], []
    with frozen(encoder.base_model):
        for step in range(1, config.optimizer_steps + 1):
            batch = rows.sample(config, generator)
            losses.append(take_step(rule, partial(query_loss, encoder, encoded, batch, state, config.head)))
            if step % config.record_every == 0 or step == config.optimizer_steps:
                states.append(state.detach().cpu().clone())
                steps.append(step)
                if not states[-1].isfinite().all():
                    return None
    unscored = torch.full((len(steps),), float("nan"))
    trained = torch.stack(losses).float().cpu()
    means = [trained[a:b].mean() for a, b in zip(steps, steps[1:], strict=False)]
    return Trajectory(
        states=torch.stack(states),
        optimizer_steps=torch.tensor(steps),
        losses=unscored,
        metrics={"train_loss": torch.stack([unscored[0], *means])},
        task=task,
        optimizer=optimizer,
        hyperparameters=hyper,
        seed=seed,
    )


def _record(
    task: str,
    encoder: TextEncoder,
    rows: TaskRows,
    encoded: EncodedTexts,
    optimizer: str,
    seed: int,
    config: WeightPreparationConfig,
) -> tuple[Trajectory | None, RunReport]:
    start = time.perf_counter()
    trajectory = record_run(encoder, rows, encoded, task=task, optimizer=optimizer, seed=seed, config=config)
    first, last, size = float("nan"), float("nan"), 0
    if trajectory is not None:
        trajectory = score_trajectory(trajectory, encoder, encoded, rows.score, config.head)
        first, last = float(trajectory.losses[0]), float(trajectory.losses[-1])
        size = trajectory.states.nbytes
    seconds = time.perf_counter() - start
    return trajectory, RunReport(task, optimizer, seed, first, last, seconds, size)


def _open_or_create(
    folder: Path, encoder: TextEncoder, config: WeightPreparationConfig, process: Accelerator | PartialState
) -> TrajectoryDataset:
    fingerprint = base_model_fingerprint(encoder.base_model)
    if process.is_main_process and not (folder / MANIFEST_NAME).exists():
        name = getattr(getattr(encoder.base_model, "config", None), "_name_or_path", "")
        TrajectoryDataset.create(
            folder,
            space=encoder.space,
            base_fingerprint=fingerprint,
            base_model_name=name,
            metadata={METADATA_KEY: config.to_dict(), READING_KEY: encoder.reading},
        )
    process.wait_for_everyone()
    dataset = TrajectoryDataset.open(folder, on_damage="skip")  # damaged shards are recorded again
    dataset.check_matches(space=encoder.space, base_fingerprint=fingerprint, reading=encoder.reading)
    check_same_settings(dataset, config)
    return dataset


def _my_share(tasks: list[Task], process: Accelerator | PartialState) -> list[Task]:
    if process.process_index >= len(tasks):  # accelerate would hand the last task to surplus processes as well
        return []
    with process.split_between_processes(tasks) as share:
        return list(share)


def _summary(reports: Sequence[RunReport], recorded: int) -> Table:
    table = Table(title=f"Weight preparation: {len({r.task for r in reports})} tasks, {recorded} recorded before")
    for column in ("optimizer", "runs", "diverged", "loss at start", "loss at end", "minutes", "megabytes"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for name in dict.fromkeys(report.optimizer for report in reports):
        mine = [report for report in reports if report.optimizer == name]
        finished = [report for report in mine if report.bytes]
        mean = [sum(getattr(r, k) for r in finished) / max(len(finished), 1) for k in ("first_loss", "last_loss")]
        losses = [f"{value:.3f}" for value in mean] if finished else ["-", "-"]
        minutes, size = sum(r.seconds for r in mine) / 60, sum(r.bytes for r in mine) / 1e6
        table.add_row(name, str(len(mine)), str(len(mine) - len(finished)), *losses, f"{minutes:.1f}", f"{size:.2f}")
    return table

"""Trajectories out of fine-tuning runs that nobody recorded: PEFT's checkpoints, in a weight space and scored."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.space import Adapter, WeightSpace
from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.fingerprint import rows_at_hand
from lohp_peft.tasks.task import Task
from lohp_peft.trajectories import Trajectory, TrajectoryDataset
from lohp_peft.trajectories.importing import project_checkpoints
from lohp_peft.trajectories.manifest import MANIFEST_NAME, READING_KEY
from lohp_peft.weight_preparation.checkpoints import CheckpointRun
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.plan import METADATA_KEY, select_all_rows
from lohp_peft.weight_preparation.rows import Batch, TaskRows
from lohp_peft.weight_preparation.scoring import query_logits, score_trajectory

MIN_ENERGY, MIN_GAIN = 0.0, 0.5
"""Ours: measured, 41 % of the energy held 75 % of the loss improvement, and 3 % of it, in bases of gradients, held 45 %."""
SCORING = ("rows_per_class", "rows_per_task", "score_shots", "score_query_rows", "split", "head")
"""Settings that choose the rows and the head of a score; an import uses and keeps no others."""


@dataclass(frozen=True)
class ImportReport:
    """What came of one run.

    Args:
        task: Name of the task.
        run: Name of the run's folder.
        optimizer_steps: Of every state, the start without adapter included.
        energy_kept: Share of each update's squared Frobenius norm that the weight space holds.
        losses: Loss of every state in nats; empty when nothing was scored.
        exact_losses: Loss under the adapter as it was saved; empty when nothing was scored.
        refused: Why it was not imported, or `None`.
        imported_before: Whether the dataset had it already.
    """

    task: str
    run: str
    optimizer_steps: list[int]
    energy_kept: list[float]
    losses: list[float]
    exact_losses: list[float]
    refused: str | None = None
    imported_before: bool = False

    @property
    def gain_kept(self) -> float | None:
        """Share of the last checkpoint's loss improvement that is left, or `None` where there is none to keep."""
        if not self.losses or not self.exact_losses[0] > self.exact_losses[-1]:
            return None
        return (self.losses[0] - self.losses[-1]) / (self.exact_losses[0] - self.exact_losses[-1])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "gain_kept": self.gain_kept}


def import_runs(
    runs: Sequence[CheckpointRun],
    tasks: Sequence[Task],
    encoder: TextEncoder,
    output_dir: str | Path,
    config: WeightPreparationConfig | None = None,
    *,
    optimizer: str = "unknown",
    min_energy: float = MIN_ENERGY,
    min_gain: float = MIN_GAIN,
    dry_run: bool = False,
    console: Console | None = None,
) -> list[ImportReport]:
    """Project runs onto a weight space, score every state as preparation does, and append those that survive.

    A run is refused when the last state keeps less than `min_gain` of the loss improvement, or a state less than
    `min_energy` of its update (Ours: what a shared space loses of runs with a `lora_A` of their own says little of the
    loss). Each accepted run is a shard of its own. A run that the dataset has already is skipped, so that the same call continues
    an import that was killed.

    Args:
        runs: From `find_runs`.
        tasks: Their tasks.
        encoder: Encoder of the base model in the weight space of the import: that of an existing dataset or policy, or
            `checkpoint_space`.
        output_dir: Folder of the dataset; made when the first run is accepted.
        config: Which rows and which head score a state (`SCORING`; what else it says is not used); `None` is what an
            existing dataset was scored with. Its `split` should be one that the runs were not trained on.
        optimizer: Name of the runs' optimizer.
        min_energy: Share in 0..1.
        min_gain: Share in 0..1.
        dry_run: Project only: nothing is scored or written.
        console: Where progress and the closing table go; `None` is standard error, `Console(quiet=True)` is silence.

    Returns:
        A report a run.

    Raises:
        ValueError: When a share is out of range, a run's task is missing or has too few rows or others than when it was
            imported, or a run or the dataset does not fit the weight space or, of texts, the encoder's reading, listing all.
    """
    wrong = [f"`{n}`={x}" for n, x in {"min_energy": min_energy, "min_gain": min_gain}.items() if not 0 <= x <= 1]
    if wrong:
        raise ValueError(f"The shares that an imported run must keep lie in 0..1, got {', '.join(wrong)}.")
    console = console or Console(stderr=True)
    dataset = _existing(Path(output_dir), encoder)
    if dataset is not None:
        dataset.check_rows(rows_at_hand(tasks))
    config = _scoring(dataset, config)
    _check_all(runs, tasks, encoder.space)
    chosen = select_all_rows([task for task in tasks if any(run.task == task.name for run in runs)], config)
    encoded: dict[str, EncodedTexts] = {}
    reports = []
    for run in track(runs, "importing", console=console, transient=True, disable=console.quiet):
        if dataset is not None and run.key in dataset.keys():
            reports.append(_report(run, dataset[run.key][0], imported_before=True))
            continue
        adapters, rows = run.adapters(), chosen[run.task]
        trajectory = project_checkpoints(adapters, encoder.space, run.task, optimizer=optimizer)
        if not dry_run:
            if run.task not in encoded:
                encoded = {run.task: encoder.prepare(rows.examples.texts, rows.examples.texts_b)}
            trajectory = _score(trajectory, adapters, encoder, encoded[run.task], rows, config.head)
        report = _judged(_report(run, trajectory), min_energy, min_gain)
        reports.append(report)
        if report.refused is None and not dry_run:
            dataset = dataset or _create(Path(output_dir), encoder, config)
            dataset.append(run.key, [trajectory], metadata=rows.to_metadata())
    console.print(report_table(reports))
    return reports


def report_table(reports: Sequence[ImportReport]) -> Table:
    """The `reports` as a table for a terminal; losses are those of the last checkpoint, in nats."""
    accepted = sum(report.refused is None for report in reports)
    table = Table(title=f"Import of checkpoints: {accepted} of {len(reports)} runs accepted")
    for column in ("task", "run"):
        table.add_column(column, overflow="fold")
    for column in ("states", "energy: least, mean", "loss: without, exact, imported", "gain kept"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for report in reports:
        energies = report.energy_kept[1:]
        losses = (report.losses[0], report.exact_losses[-1], report.losses[-1]) if report.losses else ()
        table.add_row(
            report.task,
            report.run,
            str(len(report.optimizer_steps)),
            f"{min(energies):.2f}, {fmean(energies):.2f}",
            ", ".join(f"{loss:.3f}" for loss in losses) or "-",
            "-" if report.gain_kept is None else f"{report.gain_kept:.2f}",
            "refused" if report.refused else "before" if report.imported_before else "accepted",
        )
    refused = [f"{report.run} ({report.task}): {report.refused}" for report in reports if report.refused]
    table.caption = "\n".join(["Refused:", *refused]) if refused else None
    return table


def _existing(folder: Path, encoder: TextEncoder) -> TrajectoryDataset | None:
    if not (folder / MANIFEST_NAME).exists():
        return None
    dataset = TrajectoryDataset.open(folder, on_damage="skip")  # damaged runs are imported again
    fingerprint = base_model_fingerprint(encoder.base_model)
    dataset.check_matches(space=encoder.space, base_fingerprint=fingerprint, reading=encoder.reading)
    return dataset


def _create(folder: Path, encoder: TextEncoder, config: WeightPreparationConfig) -> TrajectoryDataset:
    return TrajectoryDataset.create(
        folder,
        space=encoder.space,
        base_fingerprint=base_model_fingerprint(encoder.base_model),
        base_model_name=getattr(getattr(encoder.base_model, "config", None), "_name_or_path", ""),
        metadata={METADATA_KEY: {name: getattr(config, name) for name in SCORING}, READING_KEY: encoder.reading},
    )


def _scoring(dataset: TrajectoryDataset | None, config: WeightPreparationConfig | None) -> WeightPreparationConfig:
    """The settings of the scores: those of the dataset, which given ones must not contradict."""
    before = None if dataset is None else dataset.manifest.metadata.get(METADATA_KEY)
    if not isinstance(before, dict):
        return config or WeightPreparationConfig()
    kept = {name: before[name] for name in SCORING if name in before}
    changed = [
        f"`{n}` was {x!r}, now {getattr(config, n)!r}" for n, x in kept.items() if config and getattr(config, n) != x
    ]
    if changed:
        raise ValueError(
            f"{cast(TrajectoryDataset, dataset).folder} was scored with other settings: {'; '.join(changed)}. Use the "
            "same, or choose another folder."
        )
    return config or WeightPreparationConfig(**kept)


def _check_all(runs: Sequence[CheckpointRun], tasks: Sequence[Task], space: WeightSpace) -> None:
    names, held = {task.name for task in tasks}, {spec.name for spec in space.layout.modules}
    problems = [f"no task is named {name!r}" for name in sorted({run.task for run in runs} - names)]
    for run in runs:
        if missing := [name for name in run.modules.values() if name not in held]:
            problems.append(f"{run.folder} adapts {', '.join(missing)}, which the weight space lacks")
    if problems:
        raise ValueError("Cannot import checkpoints: " + "; ".join(problems) + ".")


def _report(run: CheckpointRun, trajectory: Trajectory, *, imported_before: bool = False) -> ImportReport:
    scored = "exact_loss" in trajectory.metrics
    return ImportReport(
        run.task,
        run.folder.name,
        trajectory.optimizer_steps.tolist(),
        trajectory.metrics["energy_kept"].tolist(),
        trajectory.losses.tolist() if scored else [],
        trajectory.metrics["exact_loss"].tolist() if scored else [],
        imported_before=imported_before,
    )


def _judged(report: ImportReport, min_energy: float, min_gain: float) -> ImportReport:
    """The report with the reasons against the run."""
    problems = []
    unknown = [s for s, x in zip(report.optimizer_steps, report.energy_kept, strict=True) if not math.isfinite(x)]
    if unknown:
        problems.append(f"the energy of checkpoints {unknown} is not finite")
    elif (least := min(report.energy_kept)) < min_energy:
        step = report.optimizer_steps[report.energy_kept.index(least)]
        problems.append(f"checkpoint-{step} keeps {least:.3f} of its energy, `min_energy` is {min_energy:g}")
    if report.gain_kept is not None and report.gain_kept < min_gain:
        problems.append(f"it keeps {report.gain_kept:.3f} of the loss improvement, `min_gain` is {min_gain:g}")
    if not all(map(math.isfinite, report.losses)):
        problems.append("its losses are not finite")
    return replace(report, refused="; ".join(problems) or None)


def _score(
    trajectory: Trajectory,
    adapters: Sequence[tuple[int, Adapter]],
    encoder: TextEncoder,
    encoded: EncodedTexts,
    rows: TaskRows,
    head: str,
) -> Trajectory:
    """The trajectory with losses, and the losses of the adapters as they were saved in `metrics["exact_loss"]`."""
    trajectory = score_trajectory(trajectory, encoder, encoded, rows.score, head)
    exact = [_exact_loss(adapter, encoder, encoded, rows.score, head) for _, adapter in adapters]
    metrics = {**trajectory.metrics, "exact_loss": torch.stack([trajectory.losses[0], *exact])}
    return replace(trajectory, metrics=metrics)


@torch.no_grad()
def _exact_loss(adapter: Adapter, encoder: TextEncoder, encoded: EncodedTexts, batch: Batch, head: str) -> Tensor:
    """Loss of an adapter in nats, as it was saved."""
    layout = AdapterLayout(tuple(spec for spec in encoder.space.layout.modules if spec.name in adapter))
    own = copy(encoder)
    own.space = cast(WeightSpace, _AsSaved(layout, adapter))
    logits = query_logits(own, encoded, batch, torch.zeros(len(layout.modules), 1), head).cpu()
    return cross_entropy(logits, batch.query_labels).float()


@dataclass(frozen=True)
class _AsSaved:
    """An adapter in the place of a weight space, each module with a rank of its own; its one state is not read."""

    layout: AdapterLayout
    adapter: Adapter

    def apply(self, index: int, x: Tensor, states: Tensor, owner: Tensor | None = None) -> Tensor:
        a, b = self.adapter[self.layout.modules[index].name]
        return x @ a.to(x).T @ b.to(x).T

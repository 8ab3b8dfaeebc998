"""Record the adapter's trajectory during anybody's `Trainer` run."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lohp_peft.adapters.layout import base_model_fingerprint
from lohp_peft.adapters.space import CoreSpace, WeightSpace
from lohp_peft.trajectories import Trajectory, TrajectoryDataset
from lohp_peft.trajectories.manifest import MANIFEST_NAME
from lohp_peft.weight_preparation.snapshots import LiveAdapter, SnapshotStore

logger = logging.getLogger(__name__)

SNAPSHOT_FOLDER = "trajectory_snapshots"
LOW_ENERGY = 0.9
LOSS_KEY = "eval_loss"
NOT_METRICS = ("step", "epoch", "total_flos")
NOT_METRIC_ENDINGS = ("_runtime", "_per_second")
ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class RecordingReport:
    """What a recording kept.

    Args:
        key: Its key in the dataset.
        dataset: Folder of the dataset.
        states: Recorded states.
        energy_kept: Share of the squared norm of the last update that the weight space holds, in 0..1.
        energy_kept_by_module: The same for each module.
    """

    key: str
    dataset: str
    states: int
    energy_kept: float
    energy_kept_by_module: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


class TrajectoryRecorder(TrainerCallback):
    """Records the LoRA of a `Trainer` run as a trajectory and appends it to a `TrajectoryDataset` when it ends.

    ```python
    recorder = TrajectoryRecorder("recordings", task="my-task")
    Trainer(peft_model, args, train_dataset=..., callbacks=[recorder]).train()
    recorder.report.energy_kept
    ```

    During training it only copies the LoRA matrices: at the start, every `record_every` optimizer steps, at every
    evaluation and at the end. With every checkpoint the new copies go to `trajectory_snapshots` in the output folder,
    from where a resumed run continues. `losses` are the `eval_loss` of evaluated states and NaN elsewhere; everything
    else that was logged at a recorded step is in `metrics`. Modules have the names of the base model without a head.
    Needs whole parameters: not FSDP or ZeRO-3.

    Stage 2 learns from the evaluated states of a run, the first and the last among them: set `eval_on_start=True`, and
    `eval_steps` so that there are more of them than policy steps and the last step is one.

    Args:
        dataset_dir: Folder of the dataset; made when it does not exist.
        task: Name of the task.
        record_every: Optimizer steps between recorded states.
        space: Weight space of the recording. `None` takes that of an existing dataset, or else core bases from a joint
            singular value decomposition of this run's own updates.
        r: Rank of such bases; `None` is the rank of the adapter.
        key: Key in the dataset, numbered when it is taken; `None` is task, optimizer and seed.

    Raises:
        ValueError: When `record_every` is below 1.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        task: str,
        *,
        record_every: int = 10,
        space: WeightSpace | None = None,
        r: int | None = None,
        key: str | None = None,
    ) -> None:
        if record_every < 1:
            raise ValueError(f"`record_every` must be at least 1 optimizer step, got {record_every}.")
        if space is not None and r is not None:
            raise ValueError(f"Give `space` or the rank `r` of bases from the run itself, not both (got r={r}).")
        self.dataset_dir, self.task, self.record_every, self.r, self.key = (
            Path(dataset_dir),
            task,
            record_every,
            r,
            key,
        )
        self.space = space
        self.report: RecordingReport | None = None
        self._adapter: LiveAdapter | None = None  # only between the begin and the end of training
        self._snapshots: dict[int, Tensor] = {}
        self._flushed: set[int] = set()
        self._fingerprint = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check that the run can be recorded, so that nothing fails after hours, and take the first snapshot."""
        if not state.is_world_process_zero:
            return
        model = extract_model_from_parallel(model)
        adapter = LiveAdapter(model)
        self._fingerprint = base_model_fingerprint(model)
        dataset = self._existing_dataset()
        space = self.space
        if dataset is not None:
            space = space or dataset.space
            dataset.check_matches(space=space, base_fingerprint=self._fingerprint)
        if space is not None:
            _check_modules(space, adapter)
        store, self._snapshots = self._store(args), {}
        if state.global_step == 0:
            store.clear()
        else:
            self._snapshots = store.load(state.global_step, adapter.signature())
            if not self._snapshots:
                logger.warning(
                    f"No snapshots of this run before step {state.global_step}: the recording starts there."
                )
        self._flushed = set(self._snapshots)
        self._adapter = adapter
        if not self._snapshots:
            self._take(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a snapshot every `record_every` optimizer steps and after the last one."""
        if state.global_step % self.record_every == 0 or state.global_step >= state.max_steps:
            self._take(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a snapshot of the evaluated state."""
        self._take(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the new snapshots beside the checkpoint."""
        self._flush(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Encode the snapshots and append the trajectory to the dataset."""
        if self._adapter is None:
            return
        if not args.load_best_model_at_end:  # else the model is no longer at its last step
            self._take(state)
        self._flush(args)
        adapters = {step: self._adapter.adapter(values) for step, values in sorted(self._snapshots.items())}
        dataset = self._dataset(list(adapters.values()), extract_model_from_parallel(model))
        encoded = [dataset.space.encode(adapter) for adapter in adapters.values()]
        steps = list(adapters)
        series = _logged_series(state, steps)
        trajectory = Trajectory(
            states=torch.stack([item.state.float().cpu() for item in encoded]),
            optimizer_steps=torch.tensor(steps),
            losses=series.pop(LOSS_KEY, torch.full((len(steps),), float("nan"))),
            metrics=series,
            task=self.task,
            optimizer=getattr(args.optim, "value", str(args.optim)),
            hyperparameters={name: _plain(getattr(args, name)) for name in ARGUMENTS},
            seed=args.seed,
        )
        key = self._free_key(dataset, trajectory)
        dataset.append(key, [trajectory])
        self.report = _report(key, dataset, encoded[-1].energy_kept, adapters[steps[-1]], len(steps))
        if not trajectory.losses[[0, -1]].isfinite().all():
            logger.warning(
                f"The first or the last state of {key!r} was not evaluated; policy learning will leave the run out. Set "
                "`eval_on_start=True`, and `eval_steps` so that the last step is one of them."
            )
        if self.report.energy_kept < LOW_ENERGY:
            logger.warning(
                f"The weight space of {dataset.folder} holds only {self.report.energy_kept:.0%} of the last update of "
                f"{key!r}. Record into bases of a higher rank, or train with a shared frozen lora_A."
            )
        self._adapter = None

    def _store(self, args: TrainingArguments) -> SnapshotStore:
        return SnapshotStore(Path(args.output_dir) / SNAPSHOT_FOLDER)

    def _take(self, state: TrainerState) -> None:
        if self._adapter is not None and state.global_step not in self._snapshots:
            self._snapshots[state.global_step] = self._adapter.snapshot()

    def _flush(self, args: TrainingArguments) -> None:
        new = {step: values for step, values in self._snapshots.items() if step not in self._flushed}
        if self._adapter is not None and new:
            follows = max(self._flushed, default=-1)
            self._store(args).flush(new, follows=follows, signature=self._adapter.signature())
            self._flushed |= set(new)

    def _existing_dataset(self) -> TrajectoryDataset | None:
        if not (self.dataset_dir / MANIFEST_NAME).exists():
            return None
        return TrajectoryDataset.open(self.dataset_dir)

    def _dataset(self, adapters: list[dict[str, tuple[Tensor, Tensor]]], model: nn.Module) -> TrajectoryDataset:
        existing = self._existing_dataset()
        if existing is not None:
            return existing
        if self._adapter is None:
            raise RuntimeError("The recorder has no adapter: training has not begun.")
        space = self.space or CoreSpace.from_trajectories(self._adapter.layout, self.r or self._adapter.rank, adapters)
        return TrajectoryDataset.create(
            self.dataset_dir,
            space=space,
            base_fingerprint=self._fingerprint,
            base_model_name=getattr(getattr(model, "config", None), "_name_or_path", ""),
            metadata={"recorded_by": type(self).__name__},
        )

    def _free_key(self, dataset: TrajectoryDataset, trajectory: Trajectory) -> str:
        wanted = self.key or f"{self.task}-{trajectory.optimizer}-{trajectory.seed}"
        key, number = wanted, 1
        while key in dataset.keys():
            number += 1
            key = f"{wanted}-{number}"
        if key != wanted:
            logger.warning(f"{dataset.folder} already has a recording {wanted!r}; this one is {key!r}.")
        return key


def _logged_series(state: TrainerState, steps: list[int]) -> dict[str, Tensor]:
    """Everything that was logged at exactly the recorded steps, NaN elsewhere; float32, shape (time + 1,)."""
    series: dict[str, Tensor] = {}
    position = {step: i for i, step in enumerate(steps)}
    for entry in state.log_history:
        i = position.get(entry.get("step", -1))
        for name, value in entry.items() if i is not None else ():
            measured = isinstance(value, int | float) and name not in NOT_METRICS and "train_runtime" not in entry
            if measured and not name.endswith(NOT_METRIC_ENDINGS):
                series.setdefault(name, torch.full((len(steps),), float("nan")))[i] = value
    return {name: values.where(values.isfinite(), torch.nan) for name, values in series.items()}


def _report(
    key: str,
    dataset: TrajectoryDataset,
    kept: Mapping[str, float],
    adapter: Mapping[str, tuple[Tensor, Tensor]],
    states: int,
) -> RecordingReport:
    energy = {name: float(((B.T @ B) * (A @ A.T)).sum()) for name, (A, B) in adapter.items()}
    total = sum(energy.values())
    share = sum(energy[name] * float(kept[name]) for name in energy if energy[name] > 0) / total if total > 0 else 1.0
    by_module = {name: float(kept[name]) for name in energy}
    return RecordingReport(key, str(dataset.folder), states, share, by_module)


def _check_modules(space: WeightSpace, adapter: LiveAdapter) -> None:
    held = {module.name: (module.d_out, module.d_in) for module in space.layout.modules}
    trained = {module.name: (module.d_out, module.d_in) for module in adapter.layout.modules}
    strange = [f"{n!r}: adapter {shape}, space {held.get(n)}" for n, shape in trained.items() if held.get(n) != shape]
    if strange:
        raise ValueError(
            "The weight space of the recording must hold every module that is trained, shapes (d_out, d_in); "
            "it differs in " + "; ".join(strange) + ". Record into another folder, or adapt the modules of the space."
        )


def _plain(value: Any) -> Any:
    return (
        value if isinstance(value, bool | int | float | str) or value is None else str(getattr(value, "value", value))
    )

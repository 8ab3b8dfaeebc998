"""Record the adapter's trajectory during anybody's `Trainer` run."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.sketch import unit_updates
from lohp_peft.adapters.space import Adapter, CoreSpace, WeightSpace
from lohp_peft.trajectories import Trajectory, TrajectoryDataset
from lohp_peft.trajectories.manifest import MANIFEST_NAME, Manifest
from lohp_peft.trajectories.trajectory import LOW_SHARE, SCORED_SHARE
from lohp_peft.weight_preparation.snapshots import LiveAdapter, SnapshotStore

logger = logging.getLogger(__name__)

SNAPSHOT_FOLDER = "trajectory_snapshots"
LOSS_KEY = "eval_loss"
NOT_METRICS = ("step", "epoch", "total_flos")
NOT_METRIC_ENDINGS = ("_runtime", "_per_second")
OPTIMIZER_ARGUMENTS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
RUN_ARGUMENTS = (
    "lr_scheduler_type",
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
        r: Rank of such bases; `None` is the rank of the adapter, at most the smallest side of a module.
        key: Key in the dataset, numbered when it is taken; `None` is task, optimizer and seed.

    Raises:
        ValueError: When `record_every` or `r` is below 1, or both `space` and `r` are given.
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
        if r is not None and r < 1:
            raise ValueError(f"The rank `r` of the bases must be at least 1, got {r}; leave it out for the adapter's.")
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
        self._optimizer: tuple[str, dict[str, Any]] = "", {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the run can be recorded, so that nothing fails after hours, and take the first snapshot."""
        if not state.is_world_process_zero:
            return
        model = extract_model_from_parallel(model)
        adapter = LiveAdapter(model)
        self._fingerprint, self._optimizer = base_model_fingerprint(model), _optimizer_of(args, optimizer)
        if (self.dataset_dir / MANIFEST_NAME).exists():
            self._check(TrajectoryDataset.open(self.dataset_dir), adapter)
        elif self.space is not None:
            _check_modules(self.space, adapter)
        else:
            self._rank(adapter)
        outside = [spec.name for spec in adapter.layout.modules if spec.layer < 0]
        if outside:
            logger.warning(
                f"{', '.join(outside)} lie outside the layers of the base model. Policy learning refuses a dataset with "
                "modules that do not read every token of a text, as poolers and heads; leave such out of `target_modules`."
            )
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
        # A run that was killed between writing a checkpoint and `on_save` has lost the state of the checkpoint.
        evaluated = any(LOSS_KEY in entry and entry.get("step") == state.global_step for entry in state.log_history)
        if not self._snapshots or evaluated or state.global_step % self.record_every == 0:
            self._take(state)
        if state.global_step == 0 and any(
            a.any() and b.any() for a, b in adapter.adapter(self._snapshots[0]).values()
        ):
            logger.warning(
                "This run starts from an adapter that is not zero; policy learning will leave it out, because a policy starts from "
                "none. Record it from a fresh adapter."
            )

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
        """Encode the snapshots and append the trajectory to the dataset; a run that diverged is left out with a warning."""
        if self._adapter is None:
            return
        if not args.load_best_model_at_end:  # else the model is no longer at its last step
            self._take(state)
        self._flush(args)
        live, self._adapter = self._adapter, None
        diverged = [step for step, values in sorted(self._snapshots.items()) if not values.isfinite().all()]
        if diverged:  # an error would end a training that is over and not yet saved
            logger.warning(
                f"This run of task {self.task!r} is not recorded: its adapter is not finite from optimizer step {diverged[0]} on."
            )
            return
        adapters = {step: live.adapter(values) for step, values in sorted(self._snapshots.items())}
        dataset = self._dataset(live, list(adapters.values()), extract_model_from_parallel(model))
        encoded = [dataset.space.encode(adapter) for adapter in adapters.values()]
        steps = list(adapters)
        series = _logged_series(state, steps)
        shares = [_share(item.energy_kept, adapter) for item, adapter in zip(encoded, adapters.values(), strict=True)]
        series[SCORED_SHARE] = torch.tensor(shares)
        trajectory = Trajectory(
            states=torch.stack([item.state.float().cpu() for item in encoded]),
            optimizer_steps=torch.tensor(steps),
            losses=series.pop(LOSS_KEY, torch.full((len(steps),), float("nan"))),
            metrics=series,
            task=self.task,
            optimizer=self._optimizer[0],
            hyperparameters=self._optimizer[1],
            seed=args.seed,
        )
        key = self._append(dataset, trajectory)
        by_module = {name: float(encoded[-1].energy_kept[name]) for name in adapters[steps[-1]]}
        self.report = RecordingReport(key, str(dataset.folder), len(steps), shares[-1], by_module)
        if not trajectory.losses[[0, -1]].isfinite().all():
            logger.warning(
                f"The first or the last state of {key!r} was not evaluated; policy learning will leave the run out. Set "
                "`eval_on_start=True`, and `eval_steps` so that the last step is one of them."
            )
        if self.report.energy_kept < LOW_SHARE:
            logger.warning(
                f"The weight space of {dataset.folder} holds only {self.report.energy_kept:.0%} of the last update of "
                f"{key!r}. Pass `space` with bases for all runs (`LoraBSpace` where they share a frozen lora_A), or keep "
                "checkpoints and fit one space to all of them with `lohp-peft import-checkpoints`."
            )

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

    def _check(self, dataset: TrajectoryDataset, adapter: LiveAdapter) -> None:
        """Raise unless the run can be recorded into an existing dataset."""
        space = self.space or dataset.space
        dataset.check_matches(space=space, base_fingerprint=self._fingerprint)
        _check_modules(space, adapter)

    def _rank(self, adapter: LiveAdapter) -> int:
        """The rank of bases from the run itself."""
        sides = {spec.name: min(spec.d_in, spec.d_out) for spec in adapter.layout.modules}
        most = min(sides.values())
        if self.r is not None and self.r > most:
            narrow = [name for name, side in sides.items() if side < self.r]
            raise ValueError(
                f"The rank `r` of the bases must be at most the smallest side of a module, here {most}, got {self.r}, which "
                f"exceeds {', '.join(narrow)}."
            )
        return min(adapter.rank, most) if self.r is None else self.r

    def _dataset(self, live: LiveAdapter, adapters: list[Adapter], model: nn.Module) -> TrajectoryDataset:
        """The dataset of the recording, checked: another process may have made one during training."""
        if not (self.dataset_dir / MANIFEST_NAME).exists():
            space = self.space or _own_space(live.layout, self._rank(live), adapters)
            try:
                return TrajectoryDataset.create(
                    self.dataset_dir,
                    space=space,
                    base_fingerprint=self._fingerprint,
                    base_model_name=getattr(getattr(model, "config", None), "_name_or_path", ""),
                    metadata={"recorded_by": type(self).__name__},
                )
            except FileExistsError:
                logger.info(f"{self.dataset_dir} was made by another recording meanwhile; this one is added to it.")
        dataset = TrajectoryDataset.open(self.dataset_dir, on_damage="skip")  # nobody else's damage loses this run
        try:
            self._check(dataset, live)
        except ValueError as error:
            raise ValueError(
                f"{error} It appeared during training. The snapshots of this run are kept: resume it from its last "
                "checkpoint with a recorder of another `dataset_dir`."
            ) from error
        return dataset

    def _append(self, dataset: TrajectoryDataset, trajectory: Trajectory) -> str:
        """Append under the first free key, which another process may take meanwhile, and return it."""
        while True:
            key = self._free_key(dataset, trajectory)
            try:
                dataset.append(key, [trajectory])
                return key
            except ValueError:
                current = Manifest.read(dataset.folder)
                if key not in current.shards or current.dataset_id != dataset.manifest.dataset_id:
                    raise
                dataset.manifest = current

    def _free_key(self, dataset: TrajectoryDataset, trajectory: Trajectory) -> str:
        wanted = self.key or f"{self.task}-{trajectory.optimizer}-{trajectory.seed}"
        key, number = wanted, 1
        while key in dataset.manifest.shards:
            number += 1
            key = f"{wanted}-{number}"
        if key != wanted:
            logger.warning(f"{dataset.folder} already has a recording {wanted!r}; this one is {key!r}.")
        return key


def _own_space(layout: AdapterLayout, r: int, adapters: list[Adapter]) -> CoreSpace:
    """Core bases from the run's own updates; random ones for modules that have none, as in `LoraBSpace`."""
    updated = {name for name, _, _ in unit_updates(adapters)}
    generator = torch.Generator().manual_seed(0)
    idle = {
        spec.name: (
            torch.randn(r, spec.d_in, generator=generator),
            torch.randn(spec.d_out, r, generator=generator),
        )
        for spec in layout.modules
        if spec.name not in updated
    }
    return CoreSpace.from_trajectories(layout, r, [*adapters, idle])


def _optimizer_of(args: TrainingArguments, optimizer: Any) -> tuple[str, dict[str, Any]]:
    """Name and hyper-parameters of the optimizer: from the arguments, or its own where the Trainer was given it."""
    name = str(getattr(args.optim, "value", args.optim))
    run = {key: getattr(args, key) for key in RUN_ARGUMENTS}
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not type(optimizer).__module__.startswith("deepspeed"):  # which wraps once more
        group = optimizer.param_groups[0]
        kind = type(optimizer).__name__.lower()
        rate = group.get("initial_lr", group.get("lr"))  # warm-up has moved `lr`
        named = kind in (name.replace("_", ""), *name.split("_"))  # GaLoreAdamW of galore_adamw, AdamW of adamw_torch
        same = rate == args.learning_rate and group.get("weight_decay", args.weight_decay) == args.weight_decay
        if not (named and same):
            own = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            return kind, _plain({"learning_rate": rate, **own, **run})
    return name, _plain({**{key: getattr(args, key) for key in OPTIMIZER_ARGUMENTS}, **run})


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


def _share(kept: Mapping[str, float], adapter: Adapter) -> float:
    """Share of an update's squared norm that a state holds, from that of each module."""
    energy = {name: float(((B.T @ B) * (A @ A.T)).sum()) for name, (A, B) in adapter.items()}
    total = sum(energy.values())
    return sum(energy[name] * float(kept[name]) for name in energy if energy[name] > 0) / total if total > 0 else 1.0


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
    """A value as JSON holds it; what JSON cannot, as text."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else getattr(value, "value", value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)

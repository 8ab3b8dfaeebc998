"""Training runs by the checkpoints that PEFT saved of them, and weight spaces along their updates."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lohp_peft.adapters.importing import read_checkpoints
from lohp_peft.adapters.layout import AdapterLayout, base_of, linear_shape, spec_of
from lohp_peft.adapters.space import Adapter, CoreSpace, LoraBSpace, WeightSpace


@dataclass(frozen=True)
class CheckpointRun:
    """A readable training run over modules of the base model.

    Args:
        task: Name of the task.
        folder: Folder with `checkpoint-<optimizer step>` folders.
        steps: Their optimizer steps above 0.
        modules: By the name of each adapted module in the checkpoints, its name in the base model.
        r: Highest rank of a module.
        digest: SHA-256 of the adapters.
    """

    task: str
    folder: Path
    steps: tuple[int, ...]
    modules: dict[str, str]
    r: int
    digest: str

    @property
    def key(self) -> str:
        """Key in a dataset: the same for the same adapters, wherever they lie."""
        return f"{self.task}-{self.digest[:16]}"

    def adapters(self) -> list[tuple[int, Adapter]]:
        """The optimizer steps and adapters, by the base model's names of the modules."""
        named = ((step, _renamed(adapter, self.modules)) for step, adapter in read_checkpoints(self.folder))
        return [(step, adapter) for step, adapter in named if step > 0]


def find_runs(folders: Sequence[tuple[str, str | Path]], base_model: nn.Module) -> list[CheckpointRun]:
    """Read every run once and make sure that it adapts the base model.

    Args:
        folders: Names of tasks and output folders of a `transformers.Trainer`.
        base_model: The base model; where a run's names begin with its prefix, as those of a model with a head do
            (`"bert."`), the prefix is taken off.

    Returns:
        The runs, in the order given.

    Raises:
        ValueError: Listing every run that cannot be read or does not fit, with all its modules that differ, and runs that
            are given twice.
    """
    runs: list[CheckpointRun] = []
    problems = [] if folders else ["there are no runs"]
    for task, folder in folders:
        try:
            run = _read_run(task, Path(folder), base_of(base_model))
            twins = [str(other.folder) for other in runs if other.digest == run.digest]
            problems += [f"{run.folder} holds the same adapters as {twin}" for twin in twins]
            runs.append(run)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise ValueError("Cannot import checkpoints: " + "; ".join(problems) + ".")
    return runs


def checkpoint_space(
    runs: Sequence[CheckpointRun], base_model: nn.Module, kind: str = CoreSpace.kind, r: int | None = None
) -> WeightSpace:
    """A weight space along the leading directions of all checkpoints of all runs, over every module that one adapts.

    Args:
        runs: From `find_runs`.
        base_model: The base model.
        kind: `"core"`, or `"lora_b"`, which is exact where all runs share a frozen `lora_A` of rank `r`.
        r: Rank; by default the runs' highest, at most the smallest side of a module.

    Raises:
        ValueError: When `kind` is unknown, or the rank exceeds the smaller side of a module.
    """
    spaces: dict[str, type[CoreSpace] | type[LoraBSpace]] = {CoreSpace.kind: CoreSpace, LoraBSpace.kind: LoraBSpace}
    if kind not in spaces:
        raise ValueError(f"`kind` of a weight space must be one of {sorted(spaces)}, got {kind!r}.")
    layout = _layout(runs, base_model)
    if r is None:
        r = min(max(run.r for run in runs), *(min(spec.d_in, spec.d_out) for spec in layout.modules))
    return spaces[kind].from_trajectories(layout, r, (adapter for run in runs for _, adapter in run.adapters()))


def _read_run(task: str, folder: Path, base_model: nn.Module) -> CheckpointRun:
    checkpoints = [(step, adapter) for step, adapter in read_checkpoints(folder) if step > 0]
    if not checkpoints:
        raise ValueError(f"{folder} holds no checkpoint after optimizer step 0")
    present = {name: linear_shape(module) for name, module in base_model.named_modules()}
    prefix = f"{getattr(base_model, 'base_model_prefix', '')}."
    modules = {name: name if name in present else name.removeprefix(prefix) for name in checkpoints[0][1]}
    digest, r, wrong = hashlib.sha256(), 0, {}
    for step, adapter in checkpoints:
        digest.update(str(step).encode())
        for name, (a, b) in sorted(adapter.items()):
            for side in (a, b):
                digest.update(side.contiguous().numpy().tobytes())
            digest.update(name.encode())
            r, shape = max(r, len(a)), (a.shape[1], b.shape[0])
            if present.get(modules[name]) != shape:
                found = present.get(modules[name])
                here = "absent" if modules[name] not in present else "not linear" if found is None else found[::-1]
                wrong[name] = f"{name} {shape[::-1]}, base model {here}"
            elif len(a) > min(shape):
                wrong[name] = f"{name} {shape[::-1]} has rank {len(a)}"
    if wrong:
        raise ValueError(
            f"{folder} does not fit {type(base_model).__name__}, shapes (d_out, d_in): {', '.join(wrong.values())}"
        )
    return CheckpointRun(task, folder, tuple(step for step, _ in checkpoints), modules, r, digest.hexdigest())


def _renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    return {names[name]: pair for name, pair in adapter.items()}


def _layout(runs: Sequence[CheckpointRun], base_model: nn.Module) -> AdapterLayout:
    """Every module that a run adapts, in the order of the base model."""
    wanted = {name for run in runs for name in run.modules.values()}
    shapes = ((name, linear_shape(module)) for name, module in base_of(base_model).named_modules() if name in wanted)
    return AdapterLayout(tuple(spec_of(name, *shape) for name, shape in shapes if shape is not None))

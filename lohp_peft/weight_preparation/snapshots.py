"""Cheap copies of the LoRA matrices of a model in training, and their way to disk between checkpoints."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from torch import Tensor, nn

from lohp_peft.adapters.export import BASE_CHANGING_INITS
from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec, linear_shape, spec_of
from lohp_peft.files import read_tensors, write_atomically


@dataclass(frozen=True)
class _LiveModule:
    spec: ModuleSpec
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


class LiveAdapter:
    """The active LoRA of a `PeftModel` in training; its parameters are read, never written.

    Modules have the names of the base model without a head, as stage 2 and policies know them: of a classifier's
    `bert.encoder...`, the prefix is taken off.

    Raises:
        TypeError: When the model is no `PeftModel`.
        ValueError: Listing everything about the adapter that updates `scaling * B @ A` of linear layers cannot hold.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"Recording needs a PeftModel with a LoRA adapter, got {type(model).__name__}.")
        config = model.active_peft_config
        init = getattr(config, "init_lora_weights", True)
        problems = []
        if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
            problems.append(f"init_lora_weights={init!r} changes the base weights, so B @ A is not the whole update")
        if getattr(config, "bias", "none") != "none":
            problems.append(f"bias={config.bias!r} trains biases, which B @ A does not hold")
        self._modules: list[_LiveModule] = []
        base_model = model.get_base_model()
        prefix = f"{getattr(base_model, 'base_model_prefix', '')}."
        for path, layer in base_model.named_modules():
            if isinstance(layer, LoraLayer):
                active = [name for name in layer.active_adapters if name in layer.scaling]
                found = _unsupported(layer, active)
                problems += [f"module {path!r} {problem}" for problem in found]
                if active and not found:
                    self._modules.append(_live_module(path.removeprefix(prefix), layer, active[0]))
        if not problems and not self._modules:
            problems.append("the model has no active LoRA layer")
        if problems:
            raise ValueError("This adapter cannot be recorded: " + "; ".join(problems) + ".")
        self.layout = AdapterLayout(tuple(module.spec for module in self._modules))
        self.rank = max(module.lora_A.shape[0] for module in self._modules)

    def signature(self) -> str:
        """Names and shapes as JSON, by which a continued recording recognises its adapter."""
        return json.dumps(
            [[m.spec.name, list(m.lora_A.shape), list(m.lora_B.shape), m.scaling] for m in self._modules]
        )

    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """All matrices, one after another, as a float32 vector on the CPU: one copy off the device."""
        parts = [part.reshape(-1).float() for m in self._modules for part in (m.lora_A, m.lora_B)]
        return torch.cat(parts).cpu()

    def adapter(self, snapshot: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Matrices (A, B) of each module from a `snapshot`, with the scaling folded into B."""
        sizes = [part.numel() for m in self._modules for part in (m.lora_A, m.lora_B)]
        parts: Iterator[Tensor] = iter(snapshot.split(sizes))
        return {
            m.spec.name: (next(parts).view_as(m.lora_A), next(parts).view_as(m.lora_B) * m.scaling)
            for m in self._modules
        }


class SnapshotStore:
    """Snapshots of a run on disk, so that a resumed run continues its recording.

    Each flush adds one file with the new snapshots only, and says in it which step it follows. Later steps in earlier
    files are of a branch that was discarded when the run was resumed from an older checkpoint; they are not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove the snapshots of an earlier run."""
        for path in self._parts():
            path.unlink()

    def flush(self, snapshots: dict[int, Tensor], *, follows: int, signature: str) -> None:
        """Write snapshots by optimizer step; `follows` is the last step that was on disk before, or -1."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = self._parts()
        number = 1 + int(parts[-1].stem.split("-")[1]) if parts else 0
        header = {"follows": str(follows), "signature": signature}
        data = save({str(step): values for step, values in snapshots.items()}, metadata=header)
        write_atomically(self.folder / f"part-{number:06d}.safetensors", data)

    def load(self, until: int, signature: str) -> dict[int, Tensor]:
        """Snapshots up to and including optimizer step `until`.

        Raises:
            ValueError: When a file is damaged or was recorded from another adapter.
        """
        snapshots: dict[int, Tensor] = {}
        for path in self._parts():
            try:
                tensors, header = read_tensors(path)
                values, follows = {int(step): x for step, x in tensors.items()}, int(header.get("follows", "missing"))
                if any(x.dtype != torch.float32 or x.ndim != 1 for x in values.values()):
                    raise ValueError("a snapshot is no float32 vector")
            except (OSError, ValueError) as error:
                raise ValueError(f"Recorded snapshots {path} are damaged ({error}); remove the folder.") from error
            if header.get("signature") != signature:
                raise ValueError(f"{path} was recorded from an adapter of other modules, ranks or scaling; remove it.")
            snapshots = {step: old for step, old in snapshots.items() if step <= follows} | values
        return {step: snapshots[step] for step in sorted(snapshots) if step <= until}

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))


def _live_module(module: str, layer: LoraLayer, name: str) -> _LiveModule:
    lora_A, lora_B = layer.lora_A[name].weight, layer.lora_B[name].weight
    spec = spec_of(module, lora_A.shape[1], lora_B.shape[0])
    return _LiveModule(spec, lora_A, lora_B, float(layer.scaling[name]))


def _unsupported(layer: LoraLayer, active: list[str]) -> list[str]:
    problems = []
    if len(active) > 1:
        problems.append(f"has several active adapters {active}")
    if linear_shape(layer) is None:
        problems.append(f"is a {type(layer.get_base_layer()).__name__}, not Linear or Conv1D")
    for name in active:
        if name in layer.lora_variant:
            problems.append(f"uses the variant {type(layer.lora_variant[name]).__name__}")
        if layer.lora_bias.get(name):
            problems.append("has a LoRA bias")
        if name in layer.lora_A and not layer.lora_A[name].weight.numel():
            problems.append("is sharded over processes (an empty parameter)")
    return problems

"""Which modules an adapter covers, and fingerprints that tell one base model from another."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

MAX_FEATURES = 2**20
"""Above any side of a linear layer known; what a file says about sizes is not allocated beyond it."""


@dataclass(frozen=True)
class ModuleSpec:
    """One target module.

    Args:
        name: Dotted name in the base model.
        d_in: Input features.
        d_out: Output features.
        kind: Last part of the name, such as `"query"`.
        layer: First integer in the name, or -1.
    """

    name: str
    d_in: int
    d_out: int
    kind: str
    layer: int


@dataclass(frozen=True)
class AdapterLayout:
    """The ordered target modules of an adapter.

    Args:
        modules: At least one, with different names.
    """

    modules: tuple[ModuleSpec, ...]

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        target_modules: str | list[str] | set[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
    ) -> "AdapterLayout":
        """The modules PEFT would match, in the model's order; `None` takes PEFT's default for the model type.

        Layers are told by the first number in a module's name. (PEFT's own `layers_to_transform` finds none in a decoder
        without its head, whose modules are named `layers.0...`.)

        Args:
            model: A base model, or a `PeftModel` around it.
            target_modules: Names as in `LoraConfig`, a regular expression, or `"all-linear"`.
            layers_to_transform: Layers to adapt; all by default.

        Raises:
            ValueError: When nothing matches, a name of a list or a layer matches nothing, or a matched module is neither
                `nn.Linear` nor `Conv1D`.
        """
        model = base_of(model)
        given = () if target_modules is None or isinstance(target_modules, str) else target_modules
        if target_modules is None:
            model_type = getattr(getattr(model, "config", None), "model_type", None)
            target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
            if target_modules is None:
                raise ValueError(f"PEFT has no default `target_modules` for model type {model_type!r}; name them.")
        config = _maybe_include_all_linear_layers(LoraConfig(target_modules=target_modules), model)
        layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform or ())
        specs, refused = [], []
        wrapped: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(wrapped):
                continue
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                wrapped += (f"{name}.",)  # what lies inside belongs to adapters
            if not check_target_module_exists(config, name) or (layers and spec_of(name, 0, 0).layer not in layers):
                continue
            shape = linear_shape(module)
            if shape is None:
                refused.append(f"{name} ({type(module).__name__})")
            else:
                specs.append(spec_of(name, *shape))
        if refused:
            raise ValueError(
                f"Only linear layers can be generated, but `target_modules` matches {refused}. Leave them out of "
                "`target_modules`."
            )
        if not specs:
            where = f" in layers {sorted(layers)}" if layers else ""
            raise ValueError(
                f"`target_modules`={target_modules!r} matches no module of {type(model).__name__}{where}."
            )
        alone = {one: LoraConfig(target_modules=[one]) for one in sorted(given)}
        missing = [
            repr(one)
            for one, only in alone.items()
            if not any(check_target_module_exists(only, spec.name) for spec in specs)
        ]
        missing += [f"layer {layer}" for layer in sorted(layers - {spec.layer for spec in specs})]
        if missing:
            raise ValueError(
                f"Every name of `target_modules` and every layer must match a module of {type(model).__name__}, but "
                f"{', '.join(missing)} did not. Correct them or leave them out."
            )
        return cls(tuple(specs))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"modules": [asdict(spec) for spec in self.modules]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AdapterLayout":
        """The inverse of `to_dict`.

        Args:
            data: What `to_dict` gave.

        Raises:
            ValueError: When `data` is no layout, listing every module that is not described as `to_dict` does or is
                given twice.
        """
        modules = data.get("modules") if isinstance(data, dict) else None
        if not isinstance(modules, list) or not modules:
            raise ValueError(f"A layout must list its target modules under 'modules', got {_short(data)}.")
        wrong = [f"module {i}: {_short(spec)}" for i, spec in enumerate(modules) if not _is_spec(spec)]
        if wrong:
            raise ValueError(
                f"A layout's modules need name, kind, layer, d_in and d_out, sizes in 1..{MAX_FEATURES}; got {'; '.join(wrong)}."
            )
        specs = tuple(ModuleSpec(**spec) for spec in modules)
        twice = sorted(name for name, count in Counter(spec.name for spec in specs).items() if count > 1)
        if twice:
            raise ValueError(f"A layout must name a module once, but {', '.join(twice)} are repeated.")
        return cls(specs)

    def fingerprint(self) -> str:
        """The SHA-256 of names and shapes."""
        text = json.dumps([[s.name, s.d_in, s.d_out] for s in self.modules])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless every module is in `model` with its shape.

        Args:
            model: A base model, or a `PeftModel` around it.

        Raises:
            ValueError: Listing every module that differs, with both shapes as (d_out, d_in).
        """
        present = {name: linear_shape(module) for name, module in base_of(model).named_modules()}
        wrong = []
        for spec in self.modules:
            if present.get(spec.name) != (spec.d_in, spec.d_out):
                shape = present.get(spec.name)
                found = "absent" if spec.name not in present else "not linear" if shape is None else shape[::-1]
                wrong.append(f"{spec.name}: layout ({spec.d_out}, {spec.d_in}), model {found}")
        if wrong:
            raise ValueError(
                f"The adapter layout does not fit {type(base_of(model)).__name__}; {len(wrong)} of {len(self.modules)} "
                f"modules differ: {'; '.join(wrong)}. Use the base model the layout was made for."
            )


def _is_spec(data: Any) -> bool:
    types = {field.name: field.type for field in fields(ModuleSpec)}
    if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != types:
        return False
    return 0 < data["d_in"] <= MAX_FEATURES and 0 < data["d_out"] <= MAX_FEATURES


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."


def spec_of(name: str, d_in: int, d_out: int) -> ModuleSpec:
    """The spec of a module by its dotted name."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return ModuleSpec(name, d_in, d_out, name.rsplit(".", 1)[-1], int(numbers[0]) if numbers else -1)


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a `PeftModel` or a compiled model, or the model itself."""
    while (inner := getattr(model, "_orig_mod", None)) is not None or isinstance(model, PeftModel):
        model = model.get_base_model() if inner is None else inner
    return model


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear module, adapted or not; `None` for any other."""
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def base_model_fingerprint(model: nn.Module) -> str:
    """The SHA-256 over names, shapes and a strided sample of the base weights; adapter weights are ignored.

    Stable across saving and loading; cheap (at most 64 values a tensor).

    Args:
        model: A base model, with or without adapters.

    Raises:
        ValueError: When weights are not loaded.
    """
    digest, parameters = hashlib.sha256(), _base_parameters(base_of(model))
    if problem := unloaded(parameters):
        raise ValueError(f"A base model is told by its weights, but of {type(base_of(model)).__name__} {problem}.")
    for name, tensor in sorted(parameters.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def unloaded(parameters: Mapping[str, torch.Tensor]) -> str:
    """What is to be said of weights by their names that are not there yet, or nothing."""
    meta = [name for name, tensor in parameters.items() if tensor.is_meta]
    if not meta:
        return ""
    return f"{len(meta)} weights are not loaded (meta device, or offloaded), such as {meta[0]}; load them first"


def _base_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of the backbone by their names before adaptation; a task's head is not part of it."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    for module in backbone.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # undoes what bitsandbytes does to 4-bit weights when a CPU first uses them
    found = {}
    for name, tensor in backbone.named_parameters():
        if re.search(r"\.(lora_|modules_to_save\.|trainable_tokens_)", name):
            continue
        name = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)
        if not name.startswith("pooler."):
            found[name] = tensor
    return found

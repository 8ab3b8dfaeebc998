"""Adapters in the one form that servers of many adapters and hot swapping need."""

import os
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper

from lohp_peft.adapters.export import (
    differs_from_base,
    plain_lora_config,
    save_plain_lora,
    unsupported,
    unsupported_options,
)
from lohp_peft.warn import warn


def save_uniform_lora(
    model: PeftModel, folder: str | os.PathLike, adapter_name: str = "default", *, allow_identity: bool = False
) -> Path:
    """Write an adapter of a model in the form that servers and hot swapping need.

    One rank (smaller ones are padded), scaling 1 (folded into `lora_B`), no patterns and no `modules_to_save`; a classifier
    that was trained or solved is left out with a warning.

    Args:
        model: Model with a LoRA or LOHP adapter on linear layers.
        folder: Folder to write. Not one inside a trainer's checkpoint, which would read it as another adapter.
        adapter_name: The adapter.
        allow_identity: See `save_plain_lora`.

    Returns:
        The folder.

    Raises:
        TypeError: When `model` is no `PeftModel`.
        ValueError: Listing everything that this form cannot hold, or when the adapter changes nothing.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"Only adapters of a PeftModel can be exported, got {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` must be one of {sorted(model.peft_config)}, got {adapter_name!r}.")
    current = model.peft_config[adapter_name]
    adapter, problems = {}, unsupported_options(current)
    heads: list[str] = []
    if current.bias != "none":
        problems.append(f"bias={current.bias!r} trains biases of the base model")
    if current.trainable_token_indices:
        problems.append("trainable_token_indices trains embeddings of the base model")
    base = model.get_base_model()
    backbone = f"{getattr(base, 'base_model_prefix', '')}."
    for name, layer in base.named_modules():
        if isinstance(layer, ModulesToSaveWrapper) and differs_from_base(layer, adapter_name):
            is_head = current.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not name.startswith(backbone)
            (heads if is_head else problems).append(f"{name} is another than the base model's (`modules_to_save`)")
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.scaling:
            continue
        problem = unsupported(layer, adapter_name)
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        dtype = torch.promote_types(layer.lora_A[adapter_name].weight.dtype, torch.float32)
        a, b = (side[adapter_name].weight.detach().to(dtype) for side in (layer.lora_A, layer.lora_B))
        adapter[name] = (a, b * layer.scaling[adapter_name])
    if problems:
        raise ValueError(f"A uniform LoRA cannot hold adapter {adapter_name!r}: {'; '.join(problems)}.")
    if heads:
        warn(f"A uniform LoRA holds no head: {'; '.join(heads)}, and is not saved in {folder}.")
    rank = max((a.shape[0] for a, _ in adapter.values()), default=1)
    name = current.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    task_type = current.task_type if current.modules_to_save is None else None
    fields = {"revision": current.revision, "fan_in_fan_out": current.fan_in_fan_out}
    if task_type is None:  # by which PEFT's auto classes load the base model
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config = plain_lora_config(name, adapter, rank, task_type, **fields)
    return save_plain_lora(folder, adapter, config, allow_identity=allow_identity)

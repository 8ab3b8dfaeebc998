"""Generated adapters as plain LoRA folders, which load without this package."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import CONFIG_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save
from torch import Tensor

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import Adapter
from lohp_peft.files import FLOAT_TYPES, read_json, read_tensors, sha256, write_atomically
from lohp_peft.warn import warn

WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
PROVENANCE_FILE = "lohp_provenance.json"
DIGEST_KEY = "weights_sha256"
"""Entry of the provenance: `lora_digest` of the weights that it tells of."""
SHARED_KEYS = (
    "policy",
    "revision",
    "preset",
    "base_model",
    "base_fingerprint",
    "label_names",
    "pooling",
    "max_length",
)
"""What is told of a combination of adapters where it is the same for all of them."""
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
Fingerprints = Mapping[torch.dtype, frozenset[str]]
"""Of a set of tensors, see `fingerprints`."""


@dataclass(frozen=True)
class GenerationRecord:
    """What an adapter folder says of its generation beside the adapter itself.

    Args:
        provenance: Values that JSON can hold (a `TypeError` or `ValueError` where it cannot); no texts.
        head: `weight` (classes, d) and `bias` (classes,) of the classifier on pooled embeddings, or `None`.
        weights: Fingerprints of the weights that it tells of; `None` where they are sure to lie in the folder.
    """

    provenance: Mapping[str, Any]
    head: Mapping[str, Tensor] | None = None
    weights: Fingerprints | None = None

    def __post_init__(self) -> None:
        json.dumps(self.provenance, allow_nan=False)  # a mistake shows here, not once half of a folder is saved

    def write(self, folder: str | os.PathLike) -> None:
        """Write `lohp_provenance.json` and, where there is a head, `head.safetensors`, beside the weights they tell of.

        A configuration is saved without a word on what became of the weights, so those in `adapter_model.safetensors`
        are asked. Where they have changed since, the head is left out and the provenance says `weights_changed`; where
        there are none, or they still change nothing, nothing is written. A record of before is removed. Their digest is
        kept, by which `tells_of_other_weights` knows those that somebody else saves over them.
        """
        folder, provenance, head = Path(folder), dict(self.provenance), self.head
        path = folder / WEIGHTS_FILE
        saved = read_tensors(path)[0] if path.exists() else {}
        if saved:
            provenance.setdefault(DIGEST_KEY, lora_digest(saved))
        if self.weights is not None:
            if not saved and (folder / "adapter_model.bin").exists():
                warn(
                    f"Neither head nor provenance is saved in {folder}: only weights in {WEIGHTS_FILE} can be compared with "
                    "those that were generated. Save with `safe_serialization=True`.",
                )
            if not holds(saved.values(), self.weights):
                if not any(tensor.any() for name, tensor in saved.items() if ".lora_B" in name):
                    remove_record(folder)
                    return
                provenance["weights_changed"], head = True, None
        text = json.dumps(provenance, indent=2, allow_nan=False)
        remove_record(folder)  # a kill on the way leaves no head of other weights
        write_atomically(folder / PROVENANCE_FILE, (text + "\n").encode())
        if head is not None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.items()}
            write_atomically(folder / HEAD_FILE, save(tensors, metadata={"format": "pt"}))


def remove_record(folder: str | os.PathLike) -> None:
    """Remove what a `GenerationRecord` wrote into `folder`, which belongs to an adapter of before.

    A `head.safetensors` without the provenance is somebody else's and stays.
    """
    provenance = Path(folder) / PROVENANCE_FILE
    if provenance.exists():
        (Path(folder) / HEAD_FILE).unlink(missing_ok=True)  # first, for it is known as ours by the other
        provenance.unlink()


def fingerprints(tensors: Iterable[Tensor], exact: bool = False) -> Fingerprints:
    """By type the SHA-256 of shape and values of each tensor in that type.

    In the half-precision types too, so that weights that were cast to one are still the same. (Ours: a version counter
    would miss optimizers that write `.data`, and would count a checkpoint of the same weights as a change.)

    Args:
        tensors: The tensors.
        exact: Leave out, by type, tensors that it does not hold exactly.
    """
    found: dict[torch.dtype, set[str]] = {dtype: set() for dtype in FLOAT_TYPES}
    for tensor in tensors:
        tensor = tensor.detach().cpu()
        for dtype, digests in found.items():
            cast = tensor.to(dtype)
            if not exact or torch.equal(cast.to(tensor.dtype), tensor):
                values = cast.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                digests.add(sha256(f"{tuple(tensor.shape)}".encode() + values))
    return {dtype: frozenset(digests) for dtype, digests in found.items()}


def lora_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the LoRA weights among tensors by their names, in float32, whatever their order and the rest of their names."""
    lora = fingerprints(tensor for name, tensor in tensors.items() if ".lora_" in name)[torch.float32]
    return sha256("".join(sorted(lora)).encode())


def tells_of_other_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder's record of a generation was written for other weights than lie in it, and nobody has noted that.

    As after further training of the adapter as a plain LoRA, which is saved beside the record without a word of it.
    """
    weights, provenance = Path(folder) / WEIGHTS_FILE, Path(folder) / PROVENANCE_FILE
    if not (weights.exists() and provenance.exists()):
        return False
    told = read_json(provenance).get(DIGEST_KEY)
    return told is not None and told != lora_digest(read_tensors(weights)[0])


def holds(tensors: Iterable[Tensor], weights: Fingerprints) -> bool:
    """Whether the weights of these fingerprints are among the tensors, in one of the types.

    Args:
        tensors: The tensors.
        weights: From `fingerprints`.
    """
    found = fingerprints(tensors, exact=True)
    return any(digests <= found[dtype] for dtype, digests in weights.items())


def plain_lora_config(
    base_model_name_or_path: str | None,
    layout: AdapterLayout | Iterable[str],
    r: int,
    task_type: str | None = None,
    **fields: Any,
) -> LoraConfig:
    """The configuration of a LoRA of one rank with scaling 1 on the modules of a layout.

    Args:
        base_model_name_or_path: Hub id or folder of the base model.
        layout: Target modules, or their dotted names.
        r: Rank of every module; `lora_alpha` equals it.
        task_type: PEFT's task type, such as `"FEATURE_EXTRACTION"`.
        **fields: Further fields of `LoraConfig`.
    """
    names = [spec.name for spec in layout.modules] if isinstance(layout, AdapterLayout) else list(layout)
    config = LoraConfig(
        base_model_name_or_path=base_model_name_or_path,
        target_modules=names,
        r=r,
        lora_alpha=r,
        task_type=task_type,
        inference_mode=True,
        **fields,
    )
    config.target_modules = names  # in their order, so that two exports are the same file
    return config


def plain_lora_tensors(adapter: Adapter, r: int) -> dict[str, Tensor]:
    """The tensors of a LoRA of one rank by the keys that PEFT saves them under; smaller ranks are padded with zeros.

    Args:
        adapter: By module name `lora_A` (rank, d_in) and `lora_B` (d_out, rank) with the scaling folded in.
        r: Rank of all.
    """
    tensors = {}
    for name, (a, b) in adapter.items():
        rows = r - a.shape[0]
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.nn.functional.pad(a.detach().cpu(), (0, 0, 0, rows)).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = torch.nn.functional.pad(b.detach().cpu(), (0, rows)).contiguous()
    return tensors


def save_plain_lora(
    folder: str | os.PathLike,
    adapter: Adapter,
    config: LoraConfig,
    *,
    record: GenerationRecord | None = None,
    allow_identity: bool = False,
) -> Path:
    """Write an adapter as a LoRA of one rank and scaling 1; smaller ranks are padded with zeros, which is exact.

    Args:
        folder: Folder to write; created when it does not exist.
        adapter: By module name `lora_A` (rank, d_in) and `lora_B` (d_out, rank) with the scaling folded in.
        config: From `plain_lora_config`.
        record: Provenance and head to write beside it; those of an adapter of before are removed.
        allow_identity: Whether an adapter that changes nothing may be written, as after an abstention.

    Returns:
        The folder.

    Raises:
        ValueError: When the configuration is not of one rank and scaling 1, the adapter covers other modules than its
            targets, a rank is larger than the configuration's, values are not finite, or the adapter is all zero.
    """
    problems = _problems(adapter, config)
    if not problems and not allow_identity and not any(a.any() and b.any() for a, b in adapter.values()):
        problems.append(
            "every update is zero, so it would change nothing; pass `allow_identity=True` if that is meant"
        )
    if problems:
        raise ValueError("The adapter cannot be exported: " + "; ".join(problems) + ".")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save(plain_lora_tensors(adapter, config.r), metadata={"format": "pt"})
    # A kill on the way leaves no weights under another scaling.
    write_atomically(folder / WEIGHTS_FILE, data, removing=folder / CONFIG_NAME)
    config.save_pretrained(str(folder))
    if record is None:
        remove_record(folder)
    else:
        record.write(folder)
    return folder


def differs_from_base(module: ModulesToSaveWrapper, adapter_name: str) -> bool:
    """Whether an adapter has a copy of a module of the base model (`modules_to_save`), and its weights are others."""
    if adapter_name not in module.modules_to_save:
        return False
    copies, originals = module.modules_to_save[adapter_name].parameters(), module.original_module.parameters()
    return any(not mine.equal(theirs.to(mine)) for mine, theirs in zip(copies, originals, strict=True))


def unsupported_options(config: LoraConfig) -> list[str]:
    """Options of a configuration under which `scaling * B @ A` is not all that an adapter does, with reasons."""
    init, problems = config.init_lora_weights, []
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
        problems.append(f"init_lora_weights={init!r} changes the base weights")
    for name in ("kasa_config", "velora_config", "monteclora_config"):
        if getattr(config, name, None) is not None:
            problems.append(f"{name} makes another update, or other base weights")
    if config.layer_replication:
        problems.append("layer_replication makes another base model")
    if config.lora_bias:
        problems.append("lora_bias=True adds a bias that no policy generates")
    if config.alora_invocation_tokens:
        problems.append("alora_invocation_tokens leaves the adapter out of the tokens before them")
    return problems


def unsupported(layer: LoraLayer, adapter_name: str) -> str | None:
    """Why a LoRA layer's update is not `scaling * B @ A` of a linear layer, or `None` when it is."""
    if isinstance(layer, ParamWrapper):
        return f"the parameter {layer.parameter_name!r} (`target_parameters`), not a linear layer"
    if adapter_name not in layer.lora_A:
        return "an embedding or a layer without lora_A"
    if layer.lora_A[adapter_name].weight.dim() != 2:
        return "not a linear layer"
    if adapter_name in layer.lora_variant:
        return f"uses {type(layer.lora_variant[adapter_name]).__name__}"
    if layer.lora_B[adapter_name].bias is not None:
        return "has lora_bias"
    return None


def _problems(adapter: Adapter, config: LoraConfig) -> list[str]:
    """Everything that keeps an adapter from being written under a configuration."""
    problems = []
    if config.lora_alpha != config.r or config.use_rslora or config.rank_pattern or config.alpha_pattern:
        problems.append(
            f"the configuration must have lora_alpha == r and neither use_rslora nor patterns, got r={config.r}, "
            f"lora_alpha={config.lora_alpha}, use_rslora={config.use_rslora}, rank_pattern={config.rank_pattern}, "
            f"alpha_pattern={config.alpha_pattern}"
        )
    targets = set(config.target_modules or ())
    if not adapter:
        problems.append("it matches no module")
    if set(adapter) != targets:
        problems.append(
            f"it covers {sorted(set(adapter) - targets)} beside the targets, and lacks {sorted(targets - set(adapter))}"
        )
    for name, (a, b) in adapter.items():
        if a.shape[0] != b.shape[1] or a.shape[0] > config.r:
            problems.append(f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} are not of one rank up to {config.r}")
        if not (a.isfinite().all() and b.isfinite().all()):
            problems.append(f"{name}: values that are not finite")
    return problems


def provenance_of(
    report: Mapping[str, Any], label_names: Iterable[str], policy_name: str | None = None
) -> dict[str, Any]:
    """What a folder tells of a generation: where it came from and how it was chosen, no texts, no local paths.

    Args:
        report: A `GenerationReport` as a dict.
        label_names: Class names in the order of the head's or classifier's rows.
        policy_name: Name the policy was asked for by; that of its folder by default.
    """
    policy = report["policy"]
    name, revision = str(policy_name or policy["name"] or "in memory"), ""
    if not _is_folder(name):
        name, _, revision = name.partition("@")
    scores = {c["name"]: _finite(c["score"]) for c in report["candidates"]}
    provenance = {
        "policy": _without_path(name),
        "revision": revision or None,
        "preset": policy["preset"],
        "base_model": _without_path(policy["base_model"]),
        "base_fingerprint": policy["base_fingerprint"],
        "seed": report["config"]["seed"],
        "policy_steps": report["policy_steps"],
        "gradient_steps": report["gradient_steps"],
        "chosen": report["chosen"],
        "candidates": list(scores),
        "scores": scores,
        "nearest_task": report["nearest_task"],
        "label_names": list(label_names),
        "support": dict(report["support"]),
        "pooling": policy["pooling"],
        "max_length": policy["max_length"],
    }
    if report["abstained"]:
        provenance["reason"] = report["reason"].rstrip(".")
    return provenance


def combined_provenance(
    weights: Mapping[str, float], parts: Mapping[str, GenerationRecord], changed: bool
) -> dict[str, Any]:
    """What is told of a combination of adapters: what holds of all generated parts, and what was told of each.

    Args:
        weights: Of every part in the combination.
        parts: The records of those that were generated.
        changed: Whether one of these has other weights than it was generated with.
    """
    told = {name: dict(record.provenance) for name, record in parts.items()}
    first = next(iter(told.values()))
    shared = {
        key: first[key] for key in SHARED_KEYS if key in first and all(x.get(key) == first[key] for x in told.values())
    }
    steps = max(int(x.get("gradient_steps") or 0) for x in told.values())
    changed = changed or any(x.get("weights_changed") for x in told.values())
    about = {"combined": dict(weights), "gradient_steps": steps, **({"weights_changed": True} if changed else {})}
    return {**told, **shared, **about}


def _without_path(name: str) -> str:
    """A folder's own name: where it lies on this machine is nobody's business."""
    return Path(name).name if _is_folder(name) else name


def _is_folder(name: str) -> bool:
    """Whether it names a place on this machine rather than a repository; one that is gone is known by an absolute path."""
    return Path(name).is_absolute() or Path(name).exists()


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None

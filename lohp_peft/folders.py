"""What makes a folder an adapter, a policy or recorded trajectories, and what of it can be published."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from lohp_peft.adapters.export import HEAD_FILE, PROVENANCE_FILE, tells_of_other_weights
from lohp_peft.cards import is_hub_id, public_base_model
from lohp_peft.files import read_json

SAFE_SUFFIXES = (".json", ".md", ".safetensors")
SAFE_NAMES = ("LICENSE",)
_LEFT_OUT = re.compile(r"checkpoint(-\d+)?|log\.jsonl|runs|trajectory_snapshots|\.lock|\.cache")
"""What training leaves beside its result: states to resume from, logs of reporters, recordings on the way."""


def check_folder(folder: str | os.PathLike) -> tuple[str, dict[str, int]]:
    """Check that `folder` is an adapter, a policy or a trajectory data set and holds nothing else.

    What training leaves beside its result is left out: `checkpoint` and `checkpoint-<number>`, `log.jsonl`, `runs`,
    `trajectory_snapshots`, `.lock` and `.cache`.

    Returns:
        Its kind and the size of every file that is to be published in bytes, by relative path.

    Raises:
        ValueError: Naming every file that is neither safetensors, JSON nor Markdown, every link and hidden file; when
            the kind cannot be told or what tells it is damaged; when the base model is named by a path of this machine and no
            generation has recorded its repository; or when an adapter was trained after its head had been solved.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    problems, sizes = [], {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _LEFT_OUT.fullmatch(Path(name).parts[0]):
            continue
        if path.is_symlink():
            problems.append(f"{name} (a link)")
        elif path.is_dir():
            continue
        elif any(part.startswith(".") for part in Path(name).parts):
            problems.append(f"{name} (hidden)")
        elif not is_safe(path):
            problems.append(name)
        else:
            sizes[name] = path.stat().st_size
    if problems:
        allowed = ", ".join((*SAFE_SUFFIXES, *SAFE_NAMES))
        raise ValueError(
            f"Only {allowed} files are published, but {folder} also holds {len(problems)} others: "
            f"{', '.join(problems)}. Remove them or publish another folder."
        )
    kind, file, key = _kind(folder, sizes)
    if kind == "adapter":
        named = {name: public_base_model((folder / name).parent) for name in adapters_in(sizes)}
        heads = [(folder / name).with_name(HEAD_FILE) for name in named]
        if stale := [str(head) for head in heads if head.exists() and tells_of_other_weights(head.parent)]:
            raise ValueError(
                f"The adapters' weights have changed since these heads were solved; remove them: {stale}."
            )
    else:
        named = {file: read_json(folder / file).get(key)}
    local = {name: base for name, base in named.items() if base and not is_hub_id(base)}
    if local:
        raise ValueError(
            f"The {kind} in {folder} names its base model by a local path, which nobody else has: "
            f"{', '.join(sorted({repr(base) for base in local.values()}))}. "
            f"Write the repository id of the base model into `{key}` of {', '.join(local)} instead."
        )
    return kind, sizes


def is_safe(path: Path) -> bool:
    """Whether a file is of a kind that is published and fetched."""
    return path.suffix in SAFE_SUFFIXES or path.name in SAFE_NAMES


def adapters_in(sizes: Iterable[str]) -> list[str]:
    """The configurations of an adapter and of further ones, which PEFT saves in folders inside."""
    return [name for name in sizes if Path(name).name == "adapter_config.json"]


def owned_by(kind: str, sizes: Iterable[str]) -> list[str]:
    """Patterns of the files that a folder of a kind alone decides on: in a repository, those that it lacks are of before."""
    if kind == "adapter":
        folders = [Path(name).parent for name in adapters_in(sizes)]
        return [(folder / name).as_posix() for folder in folders for name in (HEAD_FILE, PROVENANCE_FILE)]
    return ["shards/*.safetensors"] if kind == "trajectories" else []


def _kind(folder: Path, sizes: dict[str, int]) -> tuple[str, str, str]:
    """The kind of a folder, and the file and the key in it that name its base model."""
    if "adapter_config.json" in sizes:
        return "adapter", "adapter_config.json", "base_model_name_or_path"
    if "manifest.json" in sizes and read_json(folder / "manifest.json").get("format") == "lohp_peft.trajectories":
        return "trajectories", "manifest.json", "base_model_name"
    if "config.json" in sizes and str(read_json(folder / "config.json").get("model_type", "")).startswith("lohp"):
        return "policy", "config.json", "base_model_name"
    raise ValueError(
        f"{folder} is neither an adapter (adapter_config.json), a policy (config.json with a model_type of lohp) "
        "nor recorded trajectories (manifest.json)."
    )

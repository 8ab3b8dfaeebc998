"""The manifest of a trajectory folder: what it was recorded on and which shards it consists of."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from lohp_peft.files import parse_json, read_json

SCHEMA_VERSION = 1
FORMAT = "lohp_peft.trajectories"
MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"
SPACE_NAME = "weight_space.safetensors"
READING_KEY = "reading"
"""Entry of the metadata that says how the texts were read that states were scored on: `TextEncoder.reading`."""
ROWS_KEYS = ("split", "rows_sha256")
"""Entries of a shard's metadata that say which rows a task had: the split, and `tasks.rows_fingerprint` of it."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard: the trajectories appended under one key.

    Args:
        file: Path inside the folder, with forward slashes.
        sha256: Checksum of the file.
        trajectories: One mapping a trajectory: task, optimizer, hyperparameters, seed, states (their number), metrics
            (their names), first_loss and last_loss (nats, `None` where not scored).
        metadata: Whatever the writer wants to keep with the shard.
    """

    file: str
    sha256: str
    trajectories: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What the trajectories of a folder have in common, and its shards.

    Args:
        dataset_id: Random id, repeated inside every shard, by which a shard of another folder is recognised.
        base_model_name: Name or path under which the base model was loaded.
        base_fingerprint: From `base_model_fingerprint`.
        space_kind: Kind of the weight space, `"core"` or `"lora_b"`.
        space_r: Rank of the weight space.
        space_file: File of the bases, inside the folder.
        space_sha256: Its checksum.
        layout: `AdapterLayout.to_dict()`.
        metadata: Whatever the writer wants to keep, for instance the configuration of the recording.
        shards: Shards by key.
    """

    dataset_id: str
    base_model_name: str
    base_fingerprint: str
    space_kind: str
    space_r: int
    space_file: str
    space_sha256: str
    layout: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    shards: Mapping[str, ShardEntry] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The manifest as UTF-8 JSON, with its format and schema version.

        Raises:
            ValueError: When metadata holds something that JSON cannot, or it could not be read again.
        """
        record = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        record["shards"] = dict(sorted(record["shards"].items()))
        try:
            data = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
            again = parse_json(data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Metadata and hyper-parameters must be plain finite JSON values: {error}.") from error
        if problems := _check_record(again):
            raise ValueError(f"It could not be read again: {'; '.join(problems)}.")
        return data

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `folder / "manifest.json"`.

        Raises:
            FileNotFoundError: When the folder holds no manifest.
            ValueError: When it is damaged, of a newer version, or names files outside the folder (all are listed).
        """
        path = folder / MANIFEST_NAME
        try:
            record = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{folder} holds no trajectories: there is no {MANIFEST_NAME}.") from None
        if record.get("format") != FORMAT:
            raise ValueError(f"{path} is not a manifest of trajectories: its 'format' must be {FORMAT!r}.")
        version = record.get("schema_version")
        if type(version) is not int or version < 1:
            raise ValueError(f"{path}: 'schema_version' must be a whole number of at least 1, got {version!r}.")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {version}, but this version of lohp_peft reads up to {SCHEMA_VERSION}. "
                "Upgrade lohp_peft to read these trajectories."
            )
        problems = _check_record(record)
        if problems:
            raise ValueError(f"{path} is damaged: " + "; ".join(problems) + ".")
        shards = {key: _entry(entry) for key, entry in record["shards"].items()}
        values = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        return cls(**{**values, "shards": shards})


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`.

    Raises:
        ValueError: When `name` is absolute, climbs with `..`, or leads out of the folder through a link.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name:
        raise ValueError(f"{name!r} must be a relative path inside the folder")
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is a link that leads out of the folder")
    return path


def _check_record(record: Mapping[str, Any]) -> list[str]:
    texts = ("dataset_id", "base_model_name", "base_fingerprint", "space_kind", "space_file", "space_sha256")
    rules = {**dict.fromkeys(texts, str), "space_r": int, "layout": dict, "metadata": dict, "shards": dict}
    problems = _wrong_types(record, rules, "the manifest")
    shards = record.get("shards")
    names = [record["space_file"]] if isinstance(record.get("space_file"), str) else []
    for key, entry in shards.items() if isinstance(shards, dict) else ():
        rules = {"file": str, "sha256": str, "trajectories": list, "metadata": dict}
        found = _wrong_types(entry, rules, f"shard {key!r}")
        problems += found
        if found:
            continue
        names.append(entry["file"])
        rules = {"task": str, "optimizer": str, "hyperparameters": dict, "seed": int, "states": int, "metrics": list}
        for i, item in enumerate(entry["trajectories"]):
            problems += _wrong_types(item, rules, where := f"trajectory {i} of shard {key!r}")
            metrics = item.get("metrics") if isinstance(item, dict) else None
            if isinstance(metrics, list) and not all(isinstance(name, str) for name in metrics):
                problems.append(f"'metrics' of {where} must name its metrics, got {metrics}")
    for name in names:
        try:
            inside(Path(), name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _wrong_types(record: Any, rules: Mapping[str, type], where: str) -> list[str]:
    if not isinstance(record, dict):
        return [f"{where} must be an object, got {type(record).__name__}"]
    wrong = [name for name, kind in rules.items() if type(record.get(name)) is not kind]  # true is no whole number
    return [
        f"{name!r} of {where} must be {rules[name].__name__}, got {type(record.get(name)).__name__}" for name in wrong
    ]


def _entry(record: Mapping[str, Any]) -> ShardEntry:
    return ShardEntry(record["file"], record["sha256"], tuple(record["trajectories"]), record["metadata"])

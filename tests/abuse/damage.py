"""Ways to make a good file bad; each gives a function of the world's folder."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from lohp_peft.files import sha256

Damage = Callable[[Path], None]
DEEP = "[" * 100_000 + "]" * 100_000


def find(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def cut(pattern: str, share: float = 0.5) -> Damage:
    """Only the first `share` of the file is left."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def flip(pattern: str, position: int = -1) -> Damage:
    """One bit is another."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern)
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return damage


def fill(pattern: str, content: str | bytes) -> Damage:
    """Another content, in a new file where there is none."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern) if "*" in pattern else folder / pattern
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def remove(pattern: str) -> Damage:
    return lambda folder: find(folder, pattern).unlink()


def link(pattern: str, target: str) -> Damage:
    """The file is moved out of the world, and a link leads there."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern)
        path.rename(folder.parent / target)
        path.symlink_to(folder.parent / target)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def edit(pattern: str, change: Callable[[dict], object]) -> Damage:
    """A JSON object after `change`, which alters it in place."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def put(pattern: str, **values: object) -> Damage:
    """A JSON object with other entries."""
    return edit(pattern, lambda content: content.update(values))


def tensors(pattern: str, change: Callable[[dict], dict], **header: str) -> Damage:
    """A safetensors file of the tensors that `change` makes of the old ones."""

    def damage(folder: Path) -> None:
        path = find(folder, pattern)
        with safe_open(path, framework="pt") as stream:
            old, metadata = {name: stream.get_tensor(name).clone() for name in stream.keys()}, stream.metadata() or {}
        path.write_bytes(save(change(old), metadata={**metadata, **header} or None))

    return damage


def in_manifest(damage_file: Damage, pattern: str, key: str | None = None) -> Damage:
    """A damage that the manifest's checksum agrees with, of the shard `key` or of the bases."""

    def damage(folder: Path) -> None:
        damage_file(folder)
        found = sha256(find(folder, pattern).read_bytes())
        manifest = json.loads((folder / "store/manifest.json").read_text())
        if key is None:
            manifest["space_sha256"] = found
        else:
            manifest["shards"][key]["sha256"] = found
        (folder / "store/manifest.json").write_text(json.dumps(manifest))

    return damage


def first(change: Callable[[torch.Tensor], torch.Tensor], name: str = "") -> Callable[[dict], dict]:
    """Tensors of which the first whose name ends in `name` is changed."""

    def changed(old: dict) -> dict:
        chosen = next(key for key in sorted(old) if key.endswith(name))
        return {key: change(x).contiguous() if key == chosen else x for key, x in old.items()}

    return changed


def renamed(old: dict) -> dict:
    """Tensors of which the first has another name."""
    chosen = min(old)
    return {"stranger" if key == chosen else key: x for key, x in old.items()}


def safetensors(header: object, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


PICKLE = pickle.dumps({"weight": [1.0, 2.0]})
HUGE = safetensors({"x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}})
OVERFLOWING = safetensors({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, bytes(16))
LONG_HEADER = struct.pack("<Q", 2**63) + b"{}"
STRANGE_TYPE = safetensors({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3))

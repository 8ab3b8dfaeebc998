"""Reading and writing files: safetensors and JSON from anybody, and writes that survive a kill."""

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights; others that safetensors knows are refused where weights are meant."""
TEMPORARY_SUFFIX = ".tmp"
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: When it is not JSON in UTF-8, repeats a key, is nested too deeply, or spells half of a character, which
            could be read but not written again.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it spells half of a character, {error.object[error.start : error.end]!r}") from None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: When the file cannot be read.
        ValueError: Naming the file, see `parse_json`; also when it holds something else than an object.
    """
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object but a {type(content).__name__}.")
    return content


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file.

    Raises:
        ValueError: When they are no safetensors file, or of a type without a counterpart in torch.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError) as error:  # a KeyError is an unknown type
        raise ValueError(f"not a safetensors file of known types ({error})") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the text entries of the header of a safetensors file.

    Raises:
        OSError: When the file cannot be read.
        ValueError: Naming the file, when it is no safetensors file, or of a type without a counterpart in torch.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}
    except (SafetensorError, KeyError, AttributeError) as error:  # the last two are types unknown to this torch
        raise ValueError(f"{path} is damaged, it is not a safetensors file of known types: {error}.") from error


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def write_atomically(path: Path, data: bytes, *, removing: Path | None = None) -> None:
    """Write `data` beside `path`, flush it to the disk and move it into place.

    A killed process leaves the old file, or none, and a temporary file ending in `.tmp`; a write that fails, as on a full
    disk, leaves none.

    Args:
        path: The file.
        data: Its content.
        removing: A file that must not lie beside the new one, removed just before that takes its place.

    Raises:
        OSError: When the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if removing is not None:
            removing.unlink(missing_ok=True)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush its entries
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"keys are repeated: {sorted({name for name in names if names.count(name) > 1})}")
    return found

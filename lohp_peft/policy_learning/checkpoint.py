"""The state of a training run on disk: safetensors and JSON, written atomically, the latest only."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Groups = dict[str, dict[str, Tensor]]


def write_checkpoint(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], record: dict) -> None:
    """Write `groups` of tensors and a JSON-able `record`; the record names the tensors, so that a kill loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": tensor for group, part in groups.items() for name, tensor in part.items()}
    file = f"state-{step}.safetensors"
    save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, folder / file)
    temporary = folder / "state.json.tmp"
    temporary.write_text(json.dumps({**record, "step": step, "file": file}))
    os.replace(temporary, folder / "state.json")
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def read_checkpoint(folder: Path, config: Mapping[str, Any], device: str) -> tuple[Groups, dict[str, Any]]:
    """What `write_checkpoint` wrote.

    Raises:
        ValueError: When the checkpoint was made with other settings than `config`, naming them with both values.
    """
    record = json.loads((folder / "state.json").read_text())
    mine = json.loads(json.dumps(config))
    differ = {k: (record["config"].get(k), v) for k, v in mine.items() if record["config"].get(k) != v}
    if differ:
        raise ValueError(
            f"The checkpoint in {folder} has other settings, (checkpoint, now): {differ}. Use a new folder."
        )
    groups: Groups = {}
    for name, tensor in load_file(folder / record["file"], device=device).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups, record

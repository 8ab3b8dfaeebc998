"""The state of a training run on disk: safetensors and JSON, written atomically, the latest only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from lohp_peft.files import TEMPORARY_SUFFIX, parse_tensors, read_json, sha256, write_atomically
from lohp_peft.policy_learning.sharding import place

Groups = dict[str, dict[str, Tensor]]
STATE_FILE = "state.json"


def write_checkpoint(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], record: dict) -> None:
    """Write `groups` of tensors and a JSON-able `record`; the record names the tensors, so that a kill loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": tensor for group, part in groups.items() for name, tensor in part.items()}
    file = f"state-{step}.safetensors"
    data = save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})
    write_atomically(folder / file, data)
    text = json.dumps({**record, "step": step, "file": file, "sha256": sha256(data)})
    write_atomically(folder / STATE_FILE, text.encode())
    for old in [*folder.glob("state-*.safetensors"), *folder.glob(f".state*{TEMPORARY_SUFFIX}")]:
        if old.name != file:
            old.unlink()


def read_checkpoint(
    folder: Path, config: Mapping[str, Any], data: Mapping[str, Any], device: str
) -> tuple[Groups, dict[str, Any]]:
    """What `write_checkpoint` wrote; the settings may ask for more `training_steps` than it was made with.

    At which step of the hybrid phase they did is added to `extended_at` of the record.

    Raises:
        ValueError: When the checkpoint is damaged, or was made with other settings than `config` or from other `data`,
            naming all that differ with both values.
    """
    record = {
        "data": {},
        "events": {},
        "extended_at": [],
        **read_json(folder / STATE_FILE),
    }  # earlier versions wrote none
    rules = {"config": dict, "data": dict, "events": dict, "step": int, "file": str, "sha256": str, "best": list}
    rules |= {"temperature": float, "reference_loss": float, "extended_at": list}
    wrong = [f"{name!r} is {record.get(name)!r}" for name, kind in rules.items() if type(record.get(name)) is not kind]
    if not wrong and [type(value) for value in record["best"]] != [float, int]:
        wrong.append(f"'best' is {record['best']!r}")
    if not wrong and not all(type(step) is int for step in record["extended_at"]):
        wrong.append(f"'extended_at' is {record['extended_at']!r}")
    if wrong:
        raise ValueError(_damaged(folder, f"in {STATE_FILE} {'; '.join(wrong)}"))
    changed = _differences(record["config"], config)
    before, now = changed.get("training_steps", (None, None))
    if type(before) is type(now) is int and before < now:
        del changed["training_steps"]
        if record["step"] > config["cloning_steps"]:
            record["extended_at"] = [*record["extended_at"], record["step"]]
    differ = changed | _differences(record["data"], data)
    if differ:
        raise ValueError(
            f"The checkpoint in {folder} has other settings or was trained on other data, (checkpoint, now): {differ}. "
            "Use a new folder, or what it was made with; only `training_steps` may grow."
        )
    if record["file"] != f"state-{record['step']}.safetensors":
        raise ValueError(_damaged(folder, f"of step {record['step']} it names the file {record['file']!r}"))
    try:
        content = (folder / record["file"]).read_bytes()
    except OSError as error:
        raise ValueError(_damaged(folder, str(error))) from error
    if sha256(content) != record["sha256"]:
        raise ValueError(_damaged(folder, f"{record['file']} is not what was written, its checksum differs"))
    groups: Groups = {}
    for name, tensor in parse_tensors(content).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor.to(device)
    return groups, record


def check_same_shapes(folder: Path, groups: Groups, state: Mapping[str, Tensor], names: set[str]) -> None:
    """Make sure that the groups `names` of a checkpoint can be loaded in the place of `state`.

    Raises:
        ValueError: Listing every tensor that differs, with both shapes.
    """
    mine = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems: dict[str, tuple] = {}
    for group in sorted(names):
        found = {name: tuple(tensor.shape) for name, tensor in groups.get(group, {}).items()}
        pairs = {name: (found.get(name), mine.get(name)) for name in sorted(mine.keys() | found.keys())}
        problems |= {f"{group}.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if problems:
        raise ValueError(
            f"The checkpoint in {folder} is of another policy, shapes (checkpoint, now): {problems}. Use a new folder."
        )


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by "index of the parameter.name"."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; tensors are sharded as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = place(tensor, parameters[int(i)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every entry that differs as JSON; `None` where one side lacks it."""
    now = json.loads(json.dumps(now))
    return {name: (before.get(name), now.get(name)) for name in {**now, **before} if before.get(name) != now.get(name)}


def _damaged(folder: Path, problem: str) -> str:
    return f"The checkpoint in {folder} is damaged: {problem}. Restore it, or remove the folder to start again."

"""Trajectories to and from the bytes of one safetensors shard."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lohp_peft.adapters.space import WeightSpace
from lohp_peft.files import parse_json, parse_tensors, sha256
from lohp_peft.trajectories.manifest import ShardEntry
from lohp_peft.trajectories.trajectory import Trajectory


def encode_shard(trajectories: Sequence[Trajectory], dataset_id: str, key: str) -> bytes:
    """The safetensors bytes of a shard; its header repeats the folder's id and the shard's key."""
    tensors: dict[str, Tensor] = {}
    for i, trajectory in enumerate(trajectories):
        tensors |= {
            name: values.detach().to("cpu", copy=True).contiguous() for name, values in _tensors(i, trajectory).items()
        }
    return save(tensors, metadata={"dataset_id": dataset_id, "key": key})


def describe(trajectory: Trajectory) -> dict[str, Any]:
    """What the manifest says about a trajectory."""
    first, last = float(trajectory.losses[0]), float(trajectory.losses[-1])
    return {
        "task": trajectory.task,
        "optimizer": trajectory.optimizer,
        "hyperparameters": dict(trajectory.hyperparameters),
        "seed": trajectory.seed,
        "states": len(trajectory),
        "metrics": sorted(trajectory.metrics),
        "first_loss": first if math.isfinite(first) else None,
        "last_loss": last if math.isfinite(last) else None,
    }


def misfits(trajectories: Sequence[Trajectory], space: WeightSpace) -> list[str]:
    """What keeps trajectories from being points of `space`."""
    problems = []
    for i, trajectory in enumerate(trajectories):
        shape = tuple(trajectory.states.shape[1:])
        if shape != tuple(space.shape):
            problems.append(f"trajectory {i} has states of shape {shape}, the weight space {tuple(space.shape)}")
        elif trajectory.states[:, ~space.mask.cpu()].any():
            problems.append(f"trajectory {i} is not zero in the padding of the weight space")
    return problems


def decode_shard(data: bytes, entry: ShardEntry, *, dataset_id: str, key: str, space: WeightSpace) -> list[Trajectory]:
    """Read a shard back, checking everything that the manifest and the weight space say about it.

    Raises:
        ValueError: Saying what is damaged or foreign.
    """
    found = sha256(data)
    if found != entry.sha256:
        raise ValueError(f"damaged: its SHA-256 is {found[:12]}..., the manifest says {entry.sha256[:12]}...")
    header = shard_header(data)
    if header.get("dataset_id") != dataset_id or header.get("key") != key:
        raise ValueError(f"foreign: it was written as {header.get('key')!r} of folder {header.get('dataset_id')!r}")
    tensors = parse_tensors(data)
    expected = {name for i, item in enumerate(entry.trajectories) for name in _names(i, item["metrics"])}
    if set(tensors) != expected:
        missing, surplus = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(f"damaged: tensors missing {missing}, unexpected {surplus}")
    trajectories = [_trajectory(i, item, tensors) for i, item in enumerate(entry.trajectories)]
    problems = misfits(trajectories, space)
    problems += [
        f"trajectory {i} has {len(trajectory)} states, the manifest says {item['states']}"
        for i, (trajectory, item) in enumerate(zip(trajectories, entry.trajectories, strict=True))
        if len(trajectory) != item["states"]
    ]
    if problems:
        raise ValueError("damaged: " + "; ".join(problems))
    return trajectories


def shard_header(data: bytes) -> Mapping[str, str]:
    """The text entries of a safetensors header.

    Raises:
        ValueError: When the bytes are no safetensors file.
    """
    try:
        parse_tensors(data)
        size = int.from_bytes(data[:8], "little")
        return parse_json(data[8 : 8 + size]).get("__metadata__", {})
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from error


def _names(i: int, metrics: Sequence[str]) -> list[str]:
    return [f"{i}.states", f"{i}.optimizer_steps", f"{i}.losses", *(f"{i}.metrics.{name}" for name in metrics)]


def _tensors(i: int, trajectory: Trajectory) -> dict[str, Tensor]:
    metrics = sorted(trajectory.metrics)
    values = [trajectory.states, trajectory.optimizer_steps, trajectory.losses]
    return dict(zip(_names(i, metrics), [*values, *(trajectory.metrics[name] for name in metrics)], strict=True))


def _trajectory(i: int, item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trajectory:
    states, steps, losses, *metrics = (tensors[name] for name in _names(i, item["metrics"]))
    return Trajectory(
        states=states,
        optimizer_steps=steps,
        losses=losses,
        metrics=dict(zip(item["metrics"], metrics, strict=True)),
        task=item["task"],
        optimizer=item["optimizer"],
        hyperparameters=item["hyperparameters"],
        seed=item["seed"],
    )

"""A training that was stopped goes on where it last validated, and ends as one that was not."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def flatten(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One level of names, `part/name`; copies, since tensors that share memory cannot be saved."""
    return {f"{part}/{name}": x.detach().clone() for part, tensors in parts.items() for name, x in tensors.items()}


class Unfinished:
    """Where a training stands: its step, its cost, its random generators and named groups of tensors, all in one file.

    Args:
        file: A safetensors file, written anew at every `save`; without one nothing is kept.
        generator: That of the training's draws; torch's own, of dropout and noise, is kept too.
    """

    def __init__(self, file: Path | None, generator: torch.Generator) -> None:
        self.file, self.generator = file, generator
        self.start, self.before = time.perf_counter(), 0.0

    def save(self, step: int, **parts: Mapping[str, Tensor]) -> None:
        """Keep what is needed to go on at `step`."""
        if self.file is None:
            return
        random = {"draws": self.generator.get_state(), "torch": torch.get_rng_state()}
        seconds = self.before + time.perf_counter() - self.start
        at = {"step": torch.tensor(step), "seconds": torch.tensor(seconds)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file(flatten({**parts, "random": random, "at": at}), part)
        part.replace(self.file)

    def load(self) -> tuple[int, dict[str, dict[str, Tensor]]]:
        """The step to go on at and the groups that were kept there; 0 and none at the start."""
        if self.file is None or not self.file.exists():
            return 0, {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.file).items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        self.generator.set_state(parts["random"]["draws"])
        torch.set_rng_state(parts["random"]["torch"])
        self.before = float(parts["at"]["seconds"])
        return int(parts["at"]["step"]), parts


def minutes(folder: Path) -> float:
    """What the loops kept in a folder took so far, those of earlier starts with them."""
    return sum(float(load_file(file)["at/seconds"]) for file in sorted(folder.glob("*.safetensors"))) / 60


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimizer, `PARAMETER.NAME`; none before its first step."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The other way round."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})

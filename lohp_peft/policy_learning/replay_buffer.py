"""First-in first-out memory of on-policy rollouts and their scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lohp_peft.tasks.features import TaskFeatures

FEATURES = tuple(field.name for field in fields(TaskFeatures))


@dataclass(frozen=True)
class Rollout:
    """A scored rollout.

    Args:
        states: Shape (time + 1, modules, width).
        losses: Task loss of every state over that of the first, shape (time + 1,).
        features: Features of its task.
        prefix: Number of recorded transitions it started from; 0 is fully on-policy.
    """

    states: Tensor
    losses: Tensor
    features: TaskFeatures
    prefix: int


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of one source, as `segments` takes them.

    Args:
        states: Shape (batch, time + 1, modules, width).
        losses: Shape (batch, time + 1).
        features: Features of this process's rollouts.
        tasks: A number for each rollout, the same for those of one support set, shape (batch,).
    """

    states: Tensor
    losses: Tensor
    features: TaskFeatures
    tasks: Tensor


def batches_by_source(
    rollouts: Sequence[Rollout], mine: Callable[[int], Sequence[int]]
) -> Iterator[tuple[str, RolloutBatch]]:
    """The batch of each source that has a rollout: `"on_policy"` and `"spliced"`, which begin with a recorded prefix.

    Args:
        rollouts: Rollouts of either source.
        mine: Items of this process in a batch of that size, see `Processes.mine`.
    """
    for source, spliced in (("on_policy", False), ("spliced", True)):
        batch = [item for item in rollouts if (item.prefix > 0) == spliced]
        if batch:
            # Rollouts of one support set share their features, bit for bit.
            labels = torch.stack([item.features.labels for item in batch])
            yield (
                source,
                RolloutBatch(
                    torch.stack([item.states for item in batch]),
                    torch.stack([item.losses for item in batch]),
                    TaskFeatures.stack([batch[i].features for i in mine(len(batch))]),
                    torch.unique(labels, dim=0, return_inverse=True)[1],
                ),
            )


class ReplayBuffer:
    """Keeps the latest `capacity` rollouts; log-probabilities are never stored, so none can be stale.

    Args:
        capacity: Number of rollouts.

    Raises:
        ValueError: When the capacity is below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1 rollout, got {capacity}.")
        self.capacity = capacity
        self.rollouts: list[Rollout] = []

    def __len__(self) -> int:
        return len(self.rollouts)

    def add(self, rollouts: list[Rollout]) -> None:
        """Append, dropping the oldest beyond the capacity.

        Args:
            rollouts: The newest.
        """
        self.rollouts = [*self.rollouts, *rollouts][-self.capacity :]

    def sample(self, size: int, generator: torch.Generator) -> list[Rollout]:
        """A draw of up to `size` different rollouts.

        Args:
            size: Most rollouts.
            generator: Source of the draw.
        """
        order = torch.randperm(len(self.rollouts), generator=generator)[:size]
        return [self.rollouts[int(i)] for i in order]

    def state_dict(self) -> dict[str, Tensor]:
        """The rollouts as tensors only, so that they can be saved without pickle."""
        tensors: dict[str, Tensor] = {}
        for i, item in enumerate(self.rollouts):
            parts = {"states": item.states, "losses": item.losses, "prefix": torch.tensor(item.prefix)}
            parts |= {name: getattr(item.features, name) for name in FEATURES}
            tensors |= {f"{i:06d}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`.

        Args:
            tensors: What `state_dict` gave.
        """
        items: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, part = name.split(".")
            items.setdefault(index, {})[part] = tensor
        self.rollouts = [
            Rollout(x["states"], x["losses"], TaskFeatures(*(x[name] for name in FEATURES)), int(x["prefix"]))
            for _, x in sorted(items.items())
        ]

"""The training tasks as the policy remembers them: adapters, embeddings and features, no texts."""

import json
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lohp_peft.files import parse_json
from lohp_peft.tasks.features import TaskFeatures

FEATURES = tuple(field.name for field in fields(TaskFeatures))


@dataclass(frozen=True)
class ReferenceSet:
    """Adapters and features of the training tasks; controls and baselines come from it.

    Args:
        names: Names of the `n` tasks.
        families: Their families.
        states: Their recorded adapters, shape (n, modules, width).
        features: Features of one support set each, batched over tasks.

    Raises:
        ValueError: When its parts are not of the same number of tasks.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    states: Tensor
    features: TaskFeatures

    def __post_init__(self) -> None:
        sizes = {"families": len(self.families), "states": len(self.states), "features": len(self.features.set)}
        wrong = {name: size for name, size in sizes.items() if size != len(self.names)}
        if wrong:
            raise ValueError(
                f"A reference set of {len(self.names)} tasks needs as many entries in each part, got {wrong}."
            )

    def to(self, device: torch.device | str) -> "ReferenceSet":
        """The same tasks on another device.

        Args:
            device: The device.
        """
        moved = self.features.map(lambda part: part.to(device))
        return ReferenceSet(self.names, self.families, self.states.to(device), moved)

    def mean_state(self) -> Tensor:
        """The average adapter, shape (modules, width)."""
        return self.states.mean(0)

    def nearest(self, features: TaskFeatures) -> int:
        """The index of the task whose texts lie nearest, by cosine of the standardised set features (mean part).

        Args:
            features: Features of one task, without a batch axis.
        """
        half = self.features.set.shape[-1] // 2
        return int(cosine_similarity(self.features.set[:, :half], features.set[None, :half]).argmax())

    def nearest_state_distance(self, state: Tensor) -> tuple[int, float]:
        """The index of the nearest adapter and its relative Frobenius distance to `state` (modules, width)."""
        distance = (self.states - state).flatten(1).norm(dim=-1) / state.norm().clamp(min=1e-12)
        index = int(distance.argmin())
        return index, float(distance[index])

    def wrong_task(self, family: str, name: str, seed: int, nearest: int | None = None) -> int:
        """The index of a seeded task of another family.

        For a task of unknown family it is of another family than its nearest task, where there is any, and not that task.

        Args:
            family: Family of the task; empty when unknown.
            name: Its name.
            seed: Seed of the choice.
            nearest: Index of its nearest task, for an unknown family.

        Raises:
            ValueError: When there is no such task.
        """
        others = self._apart(family, name)
        if not family and nearest is not None:
            others = [i for i in others if i != nearest]
            apart = self._apart(self.families[nearest], name)
            others = [i for i in others if i in apart] or others
        if not others:
            raise ValueError(
                f"The wrong-task control needs a reference task that is not like {name!r}, of family {family or 'unknown'}; "
                f"there are {len(self.names)}, of families {sorted(set(self.families))}."
            )
        generator = torch.Generator().manual_seed(seed)
        return others[int(torch.randint(len(others), (1,), generator=generator))]

    def has_wrong_task(self, family: str, name: str) -> bool:
        """Whether `wrong_task` finds one, whichever task is nearest.

        Args:
            family: Family of the task; empty when unknown.
            name: Its name.
        """
        return len(self._apart(family, name)) > (0 if family else 1)

    def _apart(self, family: str, name: str) -> list[int]:
        """Indices of tasks of another name and, where it is known, of another family."""
        return [
            i for i, other in enumerate(self.families) if not (family and other == family) and self.names[i] != name
        ]

    def task_features(self, index: int) -> TaskFeatures:
        """The stored features of one task.

        Args:
            index: Of the task.
        """
        return self.features[index]

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and metadata for a safetensors file."""
        tensors = {name: getattr(self.features, name) for name in FEATURES} | {"states": self.states}
        tensors["moments"] = tensors["moments"].half()  # of order 1, and most of the file
        names = json.dumps({"names": self.names, "families": self.families})
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"tasks": names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "ReferenceSet":
        """The inverse of `to_tensors`.

        Args:
            tensors: What `to_tensors` gave.
            metadata: What `to_tensors` gave.

        Raises:
            ValueError: When a tensor or the names of the tasks are missing or malformed.
        """
        missing = sorted({*FEATURES, "states"} - set(tensors))
        if missing:
            raise ValueError(f"A reference set needs the tensors {missing}.")
        try:
            tasks = parse_json(metadata.get("tasks", "null"))
        except ValueError as error:
            raise ValueError(f"The header of a reference set must name its tasks in JSON: {error}") from error
        lists = [tasks.get(name) for name in ("names", "families")] if isinstance(tasks, dict) else [None]
        if not all(isinstance(x, list) and all(isinstance(name, str) for name in x) for x in lists):
            raise ValueError(
                "A reference set needs `names` and `families` of its tasks, lists of texts, in its header."
            )
        features = TaskFeatures(*(tensors[name].float() for name in FEATURES))
        return cls(tuple(tasks["names"]), tuple(tasks["families"]), tensors["states"].float(), features)

"""Configuration of weight preparation."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

import torch

from lohp_peft.fields import document_fields, take_whole_numbers
from lohp_peft.tasks.heads import HEADS
from lohp_peft.weight_preparation.optimizers import build_optimizer, hyperparameters


@document_fields
@dataclass(frozen=True, kw_only=True)
class WeightPreparationConfig:
    """What to record: every task with every optimizer and every seed.

    Defaults are Ours unless said otherwise: runs that are still descending when they end, at seconds a run on one core.

    Raises:
        TypeError: Listing every field of another type.
        ValueError: Listing every value out of range, or every one that is no whole number.
    """

    optimizers: tuple[str, ...] = field(
        default=("adamw", "sam", "sgd"),
        metadata={"help": "Names in OFFLINE_OPTIMIZERS; SAM because it improves convergence: Lo-Hp (abstract)."},
    )
    seeds: tuple[int, ...] = field(default=(0,), metadata={"help": "One run per seed, task and optimizer."})
    optimizer_steps: int = field(default=60, metadata={"help": "Length of a run, in optimizer steps."})
    record_every: int = field(default=5, metadata={"help": "Optimizer steps between recorded states."})
    classes_per_step: int = field(default=8, metadata={"help": "Most classes in a minibatch."})
    rows_per_class: int = field(
        default=4, metadata={"help": "Rows of each class in a minibatch; half are support, half query. At least 2."}
    )
    rows_per_task: int = field(default=256, metadata={"help": "Most rows of a task that are used at all."})
    score_shots: int = field(default=8, metadata={"help": "Support rows per class behind the score of a state."})
    score_query_rows: int = field(
        default=64, metadata={"help": "Most query rows behind the score of a state; never trained on."}
    )
    split: str = field(default="train", metadata={"help": "Split of the tasks that rows are drawn from."})
    head: str = field(default="ridge", metadata={"help": "Head solved on support rows: 'ridge' or 'prototype'."})
    hyperparameters: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict, metadata={"help": "Optimizer name to hyper-parameters that replace its defaults."}
    )

    def __post_init__(self) -> None:
        take_whole_numbers(self)
        self._take_lists()
        least = {
            "optimizer_steps": 1,
            "record_every": 1,
            "classes_per_step": 2,
            "rows_per_class": 2,
            "rows_per_task": 6,
            "score_shots": 1,
            "score_query_rows": 1,
        }
        problems = [
            f"`{name}` must be at least {low}, got {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.record_every > self.optimizer_steps:
            problems.append(
                f"`record_every` ({self.record_every}) must not exceed `optimizer_steps` ({self.optimizer_steps})"
            )
        for name in ("optimizers", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                problems.append(f"`{name}` must hold at least one entry and none twice, got {list(values)}")
        if self.head not in HEADS:
            problems.append(f"`head` must be one of {list(HEADS)}, got {self.head!r}")
        unused = sorted(set(self.hyperparameters) - set(self.optimizers))
        if unused:
            problems.append(f"`hyperparameters` are given for {unused}, which are not among {list(self.optimizers)}")
        for name in self.optimizers:
            given = self.hyperparameters.get(name) or {}
            try:
                hyperparameters(name, given)
            except ValueError as error:
                problems.append(str(error).rstrip("."))
                continue
            try:
                build_optimizer(name, [torch.zeros(1, requires_grad=True)], **given)
            except (TypeError, ValueError) as error:
                problems.append(f"optimizer {name!r} cannot be built with {dict(given)}: {error}")
        if problems:
            raise ValueError("Weight preparation: " + "; ".join(problems) + ".")

    def _take_lists(self) -> None:
        """Make tuples of what was given for them, of Python's ints for seeds; refuse what holds something else."""
        wanted = {"optimizers": "names", "seeds": "whole numbers", "hyperparameters": "optimizer names to mappings"}
        wrong = {}
        for name in ("optimizers", "seeds"):
            value = getattr(self, name)
            entry = Integral if name == "seeds" else str
            listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
            values = tuple(value) if listed else ()
            if not listed or not all(isinstance(x, entry) and not isinstance(x, bool) for x in values):
                wrong[name] = value
            else:
                object.__setattr__(self, name, tuple(map(int, values)) if name == "seeds" else values)
        given = self.hyperparameters
        if not isinstance(given, Mapping) or not all(isinstance(x, Mapping | None) for x in given.values()):
            wrong["hyperparameters"] = given
        if wrong:
            problems = [f"`{name}` must hold {wanted[name]}, got {value!r}" for name, value in wrong.items()]
            raise TypeError(f"Weight preparation: {'; '.join(problems)}.")

    @property
    def states_per_run(self) -> int:
        """Recorded states of a run: the start, every `record_every`-th step, and the end."""
        return 1 + -(-self.optimizer_steps // self.record_every)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return json.loads(json.dumps(asdict(self)))

"""Which rows of a task are trained on and which score its states; and the minibatches of a run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lohp_peft.tasks.fingerprint import rows_fingerprint
from lohp_peft.tasks.task import Examples, Task
from lohp_peft.warn import warn
from lohp_peft.weight_preparation.config import WeightPreparationConfig

FEWEST_ROWS_PER_CLASS = 3  # one support and one query row to train on, one query row to score


@dataclass(frozen=True)
class Batch:
    """A small classification problem: rows of a task with labels counted from zero.

    Args:
        support: Row indices, shape (support rows,).
        support_labels: Shape (support rows,).
        query: Row indices, shape (query rows,).
        query_labels: Shape (query rows,).
        n_classes: Number of classes.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    n_classes: int


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task that preparation uses.

    Args:
        source: Which rows there were to choose from, as JSON values: the split and its fingerprint.
        examples: The rows, `n` in all.
        rows: Their positions in the split, shape (n,).
        train: For each class the rows to train on, as indices into `examples`.
        score: The fixed problem that scores a state. Its query rows are not in `train` (Ours: a score on rows that
            the run trained on would reward memorizing).
    """

    source: Mapping[str, str]
    examples: Examples
    rows: Tensor
    train: tuple[Tensor, ...]
    score: Batch

    def to_metadata(self) -> dict[str, Any]:
        """What is kept beside recordings: `source`, and the positions in the split of the rows behind the scores."""
        return {
            **self.source,
            "score_support_rows": self.rows[self.score.support].tolist(),
            "score_query_rows": self.rows[self.score.query].tolist(),
        }

    def sample(self, config: WeightPreparationConfig, generator: torch.Generator) -> Batch:
        """A class-balanced minibatch of the rows to train on, halved into support and query."""
        classes = torch.randperm(len(self.train), generator=generator)[: config.classes_per_step]
        support, query = [], []
        for label in classes.tolist():
            rows = self.train[label]
            rows = rows[torch.randperm(len(rows), generator=generator)[: config.rows_per_class]]
            half = len(rows) // 2
            support.append(rows[:half])
            query.append(rows[half:])
        return _batch(support, query)


def select_rows(task: Task, config: WeightPreparationConfig) -> TaskRows:
    """Choose the rows of a task, the same ones for every optimizer and seed.

    Rows that repeat others count once; a warning says how many. Classes with fewer than 3 rows are left out, and so are
    random ones when `rows_per_task` cannot hold two minibatches of each class.

    Raises:
        ValueError: When fewer than two classes remain.
    """
    examples = task.split(config.split)
    generator = keyed_generator(task.name, "rows")
    distinct = torch.tensor(examples.distinct_rows())
    if repeated := len(examples) - len(distinct):
        warn(f"{repeated} of {len(examples)} rows of task {task.name!r} repeat others and count once.")
    by_class = [distinct[examples.targets[distinct] == label] for label in range(examples.n_classes)]
    usable = [rows for rows in by_class if len(rows) >= FEWEST_ROWS_PER_CLASS]
    if len(usable) < 2:
        raise ValueError(
            f"task {task.name!r} has {len(usable)} classes with at least {FEWEST_ROWS_PER_CLASS} different rows in split "
            f"{config.split!r}, but needs 2"
        )
    most = max(config.rows_per_task // max(2 * config.rows_per_class, FEWEST_ROWS_PER_CLASS), 2)
    chosen = torch.randperm(len(usable), generator=generator)[:most].sort().values
    usable = [usable[i] for i in chosen.tolist()]
    each = max(config.rows_per_task // len(usable), FEWEST_ROWS_PER_CLASS)
    queries = max(config.score_query_rows // len(usable), 1)
    kept, train, support, query, start = [], [], [], [], 0
    for rows in usable:
        rows = rows[torch.randperm(len(rows), generator=generator)[:each]]
        position = torch.arange(start, start + len(rows))
        held_out = min(queries, max(len(rows) // 4, 1))
        query.append(position[:held_out])
        train.append(position[held_out:])
        support.append(train[-1][: config.score_shots])
        kept.append(rows)
        start += len(rows)
    rows = torch.cat(kept)
    source = {"split": config.split, "rows_sha256": rows_fingerprint(examples)}
    return TaskRows(source, examples.select(rows.tolist()), rows, tuple(train), _batch(support, query))


def keyed_generator(*key: str | int) -> torch.Generator:
    """A generator seeded by the words of `key`, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _batch(support: list[Tensor], query: list[Tensor]) -> Batch:
    labels = [torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(side)]) for side in (support, query)]
    return Batch(torch.cat(support), labels[0], torch.cat(query), labels[1], len(support))

"""The texts of several domains under two labelings, by class and by domain."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from text_suite import load_tasks
from torch import Tensor

from lohp_peft.tasks import Examples, Task, contrast_groups, draw


@dataclass(frozen=True)
class Pool:
    """The rows of several domains; labels are cells, `domain * classes + class`."""

    train: Examples
    test: Examples
    domains: int
    classes: int

    def labels(self, cells: Tensor, labeling: str) -> Tensor:
        """Labels of one of the two labelings."""
        return cells % self.classes if labeling == "class" else cells // self.classes

    def size(self, labeling: str) -> int:
        """Number of its classes."""
        return self.classes if labeling == "class" else self.domains

    def draw(self, shots: int, labeling: str, seed: int) -> Examples:
        """`shots` support rows per class of a labeling, equally many from every cell."""
        per_cell, rest = divmod(shots * self.size(labeling), self.domains * self.classes)
        if rest or not per_cell:
            raise SystemExit(f"--shots must be a multiple of {self.domains} and of {self.classes}, got {shots}.")
        fewest = int(self.train.targets.bincount().min())
        if per_cell > fewest:
            raise SystemExit(
                f"--shots {shots} takes {per_cell} texts of each domain and class; one has only {fewest}."
            )
        return draw(self.train, per_cell, seed)

    def accuracy(self, predicted: Tensor, labeling: str) -> float:
        """Accuracy of labels predicted for the test rows; every cell counts alike, however many rows it has."""
        cells = self.test.targets
        right = (predicted == self.labels(cells, labeling)).double()
        return float(torch.stack([right[cells == cell].mean() for cell in cells.unique()]).mean())


def load_domains(names: Sequence[str]) -> list[Task]:
    """Tasks that share their classes, without the texts that more than one of them has: they have no domain."""
    tasks = load_tasks(names)
    groups = contrast_groups(tasks)
    if groups != [list(names)]:
        raise SystemExit(f"The domains {', '.join(names)} must share their label names; groups that do: {groups}.")
    owners = Counter(text for task in tasks for text in set(task.examples.texts))
    kept = [[i for i, text in enumerate(task.examples.texts) if owners[text] == 1] for task in tasks]
    return [
        replace(task, examples=task.examples.select(rows), splits=tuple(task.splits[i] for i in rows))
        for task, rows in zip(tasks, kept, strict=True)
    ]


def pool(names: Sequence[str], max_test: int, trained_on: bool = False, seed: int = 0) -> Pool:
    """Pool domains with one label set; as many test rows from every cell, or all that it has.

    Of domains that were trained on, both sides are of split test, which training does not see: half of every cell each.
    """
    tasks = load_domains(names)
    classes = tasks[0].examples.n_classes
    count = len(tasks) * classes
    if max_test < count:
        raise SystemExit(f"--max-test must be at least {count}, one of each domain and class, got {max_test}.")

    def pooled(split: str) -> Examples:
        parts = [task.split(split) for task in tasks]
        cells = [i * classes + y for i, part in enumerate(parts) for y in part.labels]
        texts = tuple(text for part in parts for text in part.texts)
        return Examples(texts, tuple(cells), tuple(map(str, range(count))))

    test = pooled("test")
    if trained_on:
        rows = [(test.targets == cell).nonzero().flatten() for cell in range(count)]
        train, test = [test.select(torch.cat([each[side::2] for each in rows])) for side in (0, 1)]
    else:
        train = pooled("train")
    return Pool(train, draw(test, max_test // count, seed), len(tasks), classes)

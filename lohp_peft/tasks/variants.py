"""Task variants: many tasks out of few, among them conflicting labelings of the same texts.

Without conflicts nothing makes a policy read the labels: the domain of the texts would be enough to tell the task.
A variant is a list of rows of its source tasks with new labels, so that features cached per text can be reused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lohp_peft.tasks.task import Examples, Task, draw


@dataclass(frozen=True)
class Episode:
    """A support and a query set drawn from one or more tasks.

    Args:
        known: Pairs (task name, row indices): the rows the policy is conditioned on, the support rows and more, for their
            features are measured already and cost nothing (Ours: up to as many a class as a user gives).
        known_labels: Class indices of all of them in that order, shape (k,).
        support: Pairs (task name, row indices): the rows the head is solved on.
        support_labels: Class indices of all support rows in that order, shape (n,).
        query: Pairs (task name, row indices).
        query_labels: Class indices of all query rows, shape (m,).
        n_classes: Number of classes.
        kind: `"subset"`, `"merge"` or `"contrast"`.
    """

    known: tuple[tuple[str, Tensor], ...]
    known_labels: Tensor
    support: tuple[tuple[str, Tensor], ...]
    support_labels: Tensor
    query: tuple[tuple[str, Tensor], ...]
    query_labels: Tensor
    n_classes: int
    kind: str


class EpisodeSampler:
    """Draws episodes: class subsets, class merges, and contrasts between pooled tasks.

    Args:
        labels: Class index of every row, by task.
        groups: Tasks with one and the same label set; pooled, they can be labelled by class or by task. Tasks with a
            class of fewer than four rows are left out.
        contrast: Share of contrast episodes (Ours: 0.3, DESIGN measurements).
        merge: Share of the remaining episodes whose classes are merged into two or three.
        max_classes: Most classes in an episode (Ours: users' tasks have as many; alone it made no difference on validation).
        support_size: Support texts in an episode, at most, but two classes of two (Ours: 16 examples of six classes, as users
            give them).
        query_size: Query texts in an episode, at most, but one of every class, of every merged one too.
        max_shots: Support texts per class, at most, and known ones.

    Raises:
        ValueError: When a group names an unknown task, or no task has two classes with four rows.
    """

    def __init__(
        self,
        labels: Mapping[str, Tensor],
        groups: Sequence[Sequence[str]] = (),
        *,
        contrast: float = 0.3,
        merge: float = 0.15,
        max_classes: int = 20,
        support_size: int = 96,
        query_size: int = 24,
        max_shots: int = 16,
    ) -> None:
        unknown = sorted({name for group in groups for name in group} - set(labels))
        if unknown:
            raise ValueError(f"Contrast groups name tasks that are not among the training tasks: {unknown}.")
        self.rows = {}
        for name, y in labels.items():
            by_class = [(y == c).nonzero().flatten() for c in range(int(y.max()) + 1)]
            by_class = [rows for rows in by_class if len(rows) >= 4]
            if len(by_class) > 1:
                self.rows[name] = by_class
        if not self.rows:
            raise ValueError("No task has two classes with at least four rows each.")
        self.names = list(self.rows)
        whole = {name for name, by_class in self.rows.items() if len(by_class) == int(labels[name].max()) + 1}
        self.groups = [kept for group in groups if len(kept := [n for n in group if n in whole]) > 1]
        self.contrast, self.merge, self.max_classes = contrast if self.groups else 0.0, merge, max_classes
        self.support_size, self.query_size, self.max_shots = support_size, query_size, max_shots

    def sample(self, generator: torch.Generator) -> Episode:
        """An episode; the generator alone decides which.

        Args:
            generator: Source of all choices.
        """
        if _uniform(generator) < self.contrast:
            group = self.groups[_integer(len(self.groups), generator)]
            size = min(len(group), 2 + _integer(2, generator))
            names = [group[int(i)] for i in torch.randperm(len(group), generator=generator)[:size]]
            return self.contrast_episode(names, by_task=_uniform(generator) < 0.5, generator=generator)
        name = self.names[_integer(len(self.names), generator)]
        return self.task_episode(name, generator)

    def task_episode(self, name: str, generator: torch.Generator) -> Episode:
        """A random subset of one task's classes, now and then merged into fewer.

        Args:
            name: The task.
            generator: Source of all choices.
        """
        by_class = self.rows[name]
        most = min(len(by_class), self.max_classes, max(2, self.support_size // 2))
        size = 2 + _integer(most - 1, generator)
        merge = len(by_class) >= 4 and _uniform(generator) < self.merge
        if merge:
            size = min(len(by_class), 2 * self.max_classes, max(4, self.support_size))
        chosen = [by_class[int(i)] for i in torch.randperm(len(by_class), generator=generator)[:size]]
        n_classes = 2 + _integer(2, generator) if merge else size
        cells = [((name, rows), i % n_classes) for i, rows in enumerate(chosen)]
        return self._draw(cells, n_classes, "merge" if merge else "subset", generator)

    def whole_task_episode(self, name: str, generator: torch.Generator) -> Episode:
        """An episode of as many of one task's classes as the support set has room for.

        Args:
            name: The task.
            generator: Source of all choices.
        """
        by_class = self.rows[name]
        size = min(len(by_class), max(2, self.support_size // 2))
        chosen = [by_class[int(i)] for i in torch.randperm(len(by_class), generator=generator)[:size]]
        return self._draw([((name, rows), i) for i, rows in enumerate(chosen)], size, "subset", generator)

    def contrast_episode(self, names: Sequence[str], by_task: bool, generator: torch.Generator) -> Episode:
        """The pooled texts of several tasks, labelled by task or by their common classes.

        Args:
            names: Tasks of one contrast group.
            by_task: Whether the task is the label.
            generator: Source of all choices.
        """
        cells = [
            ((name, rows), i if by_task else c)
            for i, name in enumerate(names)
            for c, rows in enumerate(self.rows[name])
        ]
        n_classes = len(names) if by_task else max(len(self.rows[name]) for name in names)
        return self._draw(cells, n_classes, "contrast", generator)

    def _draw(self, cells, n_classes: int, kind: str, generator: torch.Generator) -> Episode:
        """Draw support and query rows, disjoint, and more known ones, the same number from every cell (task, class)."""
        most = max(2, self.max_shots * n_classes // len(cells))
        shots = max(1 if kind == "merge" else 2, min(self.support_size // len(cells), most))
        if shots > 3 and _uniform(generator) < 0.3:
            shots = 2 + _integer(shots - 2, generator)
        asked = max(1, self.query_size // len(cells))
        more = shots + _integer(max(most - shots, 0) + 1, generator)
        parts: tuple[list, list, list] = ([], [], [])
        labels: tuple[list, list, list] = ([], [], [])
        for (name, rows), label in cells:
            order = rows[torch.randperm(len(rows), generator=generator)]
            first = min(shots, len(order) - 1)
            support, query, rest = order[:first], order[first : first + asked], order[first + asked :]
            known = torch.cat([support, rest[: max(more - first, 0)]])
            for side, part in enumerate((known, support, query)):
                parts[side].append((name, part))
                labels[side].extend([label] * len(part))
        known, support, query = ((tuple(part), torch.tensor(side)) for part, side in zip(parts, labels, strict=True))
        return Episode(*known, *support, *query, n_classes, kind)


def contrast_groups(tasks: Sequence[Task], max_classes: int = 3) -> list[list[str]]:
    """The names of tasks that share their label names, in one order, in groups of two or more.

    Pooled, their texts can be labelled by class or by task: two conflicting tasks out of the same texts. A task that
    shares half of its texts with earlier ones of its group, such as a pool of them, stays out.

    Args:
        tasks: The tasks.
        max_classes: Most classes of a task that takes part.
    """
    groups: dict[tuple[str, ...], tuple[list[str], set[str]]] = {}
    for task in tasks:
        names, texts = task.examples.label_names, set(task.examples.texts)
        if len(names) <= max_classes and task.examples.texts_b is None:
            group, pooled = groups.setdefault(names, ([], set()))
            if 2 * len(texts & pooled) < len(texts):
                group.append(task.name)
                pooled |= texts
    return [group for group, _ in groups.values() if len(group) > 1]


def contrast_task(
    tasks: Sequence[Task], by_task: bool, name: str, split: str = "train", rows_per_task: int = 200
) -> Task:
    """The pooled rows of several tasks with one label set, labelled by class or by task, as a task of its own.

    Args:
        tasks: Tasks with one label set.
        by_task: Label rows by the task they come from; else by class.
        name: Name of the new task.
        split: Split the rows come from.
        rows_per_task: Most rows of each task, the same number of every class, drawn at random but always the same.

    Raises:
        ValueError: When the tasks do not share their label names, naming both sides, or some are of pairs and some are not.
    """
    names = tasks[0].examples.label_names
    different = {task.name: task.examples.label_names for task in tasks if task.examples.label_names != names}
    if different:
        raise ValueError(f"A contrast needs tasks with one label set; {tasks[0].name!r} has {names}, but {different}.")
    if len({task.examples.texts_b is None for task in tasks}) > 1:
        pairs = [task.name for task in tasks if task.examples.texts_b is not None]
        raise ValueError(
            f"A contrast needs texts or pairs of texts throughout; of {len(tasks)} tasks {pairs} have pairs."
        )
    texts: list[str] = []
    texts_b: list[str] = []
    labels: list[int] = []
    for i, task in enumerate(tasks):
        rows = draw(task.split(split), max(1, rows_per_task // len(names)), seed=0)
        texts += rows.texts
        texts_b += rows.texts_b or ()
        labels += [i] * len(rows) if by_task else list(rows.labels)
    label_names = tuple(task.name for task in tasks) if by_task else names
    family = "domain" if by_task else tasks[0].family
    licence = "; ".join(sorted({task.licence for task in tasks}))
    examples = Examples(tuple(texts), tuple(labels), label_names, tuple(texts_b) or None)
    return Task(name, examples, (split,) * len(texts), family, licence)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(high, 1), (1,), generator=generator))

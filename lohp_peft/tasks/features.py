"""Forward-only features of a labelled support set: what the policy sees of a task.

Every feature is a sum over examples, so the order of the examples cannot matter; labels enter only through class
means and scatters, so their names cannot matter either; but exchanging labels between examples changes them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


@dataclass(frozen=True)
class TextStatistics:
    """What one forward pass keeps of each text.

    Args:
        embeddings: Pooled sentence embeddings, shape (n, d).
        modules: Mean over tokens of each target module's input and output in the module's own bases, concatenated,
            shape (n, modules, f).
    """

    embeddings: Tensor
    modules: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: Tensor) -> "TextStatistics":
        return TextStatistics(self.embeddings[index], self.modules[index])

    @classmethod
    def concatenate(cls, parts: Sequence["TextStatistics"]) -> "TextStatistics":
        """Stack the texts of several sets."""
        return cls(torch.cat([p.embeddings for p in parts]), torch.cat([p.modules for p in parts]))


@dataclass(frozen=True)
class TaskFeatures:
    """Features of one or more support sets.

    Args:
        set: Where the texts lie: mean and log variance in the reference's principal directions, shape (..., 2 p).
        labels: How labels lie in them: log F ratios by direction, their mean, and sizes, shape (..., p + 3).
        modules: Log F ratios by module and basis direction, then mean activations, shape (..., modules, 2 f).
    """

    set: Tensor
    labels: Tensor
    modules: Tensor

    @classmethod
    def stack(cls, items: Sequence["TaskFeatures"]) -> "TaskFeatures":
        """Batch features along a new first axis."""
        return cls(*(torch.stack([getattr(item, name) for item in items]) for name in ("set", "labels", "modules")))


def fit_reference(statistics: Sequence[TextStatistics], directions: int = 64) -> dict[str, Tensor]:
    """Coordinates for the features, from texts of the training tasks; kept in the policy.

    Principal directions of the normalised embeddings of all training tasks (Ours: task-independent axes in which
    ratios are comparable between tasks) and per-module activation means and deviations.

    Args:
        statistics: One entry per training task.
        directions: Number `p` of principal directions, at most the size of an embedding.

    Raises:
        ValueError: When there are fewer texts than directions.
    """
    x = torch.cat([normalize(s.embeddings.float(), dim=-1) for s in statistics])
    directions = min(directions, x.shape[1])
    if len(x) < directions:
        raise ValueError(f"{directions} principal directions need at least as many texts, got {len(x)}.")
    mean = x.mean(0)
    _, _, axes = torch.linalg.svd(x - mean, full_matrices=False)
    axes = axes[:directions].T.contiguous()
    modules = torch.cat([s.modules.float() for s in statistics])
    return {
        "embedding_mean": mean,
        "axes": axes,
        "axes_std": ((x - mean) @ axes).std(0).clamp(min=1e-6),
        "module_mean": modules.mean(0),
        "module_std": modules.std(0).clamp(min=1e-6),
    }


def log_f_ratio(x: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Log of the F statistic, between-class over within-class variance, per coordinate.

    Around 0 whatever the scale when labels say nothing about a coordinate; large where they do
    (Known: Fisher's analysis of variance; as gates, Ours: ratios are a signal the network cannot miss).

    Args:
        x: Shape (n, f).
        labels: Class indices, shape (n,).
        n_classes: Number of classes; those without examples do not count.
    """
    y = one_hot(labels, n_classes).to(x.dtype)
    count = y.sum(0)
    means = (y / count.clamp(min=1)).T @ x
    present = int((count > 0).sum())
    between = (count[:, None] * (means - x.mean(0)).square()).sum(0) / max(present - 1, 1)
    within = (x - means[labels]).square().sum(0) / max(len(x) - present, 1)
    return torch.log((between + 1e-4 * within + 1e-8) / (within + 1e-8))


def task_features(
    statistics: TextStatistics, labels: Tensor, n_classes: int, reference: Mapping[str, Tensor]
) -> TaskFeatures:
    """Features of one support set in the coordinates of `reference`.

    Args:
        statistics: Of the `n` support texts.
        labels: Class indices, shape (n,).
        n_classes: Number of classes.
        reference: From `fit_reference`.
    """
    x = (normalize(statistics.embeddings.float(), dim=-1) - reference["embedding_mean"]) @ reference["axes"]
    x = x / reference["axes_std"]
    modules = (statistics.modules.float() - reference["module_mean"]) / reference["module_std"]
    ratios = log_f_ratio(x, labels, n_classes)
    sizes = torch.tensor([math.log(n_classes), math.log(len(labels) / n_classes)], dtype=x.dtype, device=x.device)
    module_ratios = log_f_ratio(modules.flatten(1), labels, n_classes).view(modules.shape[1:])
    return TaskFeatures(
        set=torch.cat([x.mean(0), (x.var(0, correction=0) + 1e-3).log()]),
        labels=torch.cat([ratios, ratios.mean()[None], sizes]),
        modules=torch.cat([module_ratios, modules.mean(0)], -1),
    )

"""Forward-only features of a labelled support set: what the policy sees of a task.

Every feature is a sum over examples, so the order of the examples cannot matter; labels enter only through class
means, scatters and errors, so their names cannot matter either; but exchanging labels between examples changes them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot, pad

from lohp_peft.tasks.heads import leave_one_out


@dataclass(frozen=True)
class TextStatistics:
    """What one forward pass keeps of each text.

    Args:
        embeddings: Pooled sentence embeddings, shape (n, d).
        inputs: Mean over tokens of each target module's input in the module's input basis, shape (n, modules, r).
        outputs: The same of its output in its output basis, shape (n, modules, r), or `None` in a space without one.
    """

    embeddings: Tensor
    inputs: Tensor
    outputs: Tensor | None = None

    @property
    def modules(self) -> Tensor:
        """Inputs and outputs side by side, shape (n, modules, f)."""
        return self.inputs if self.outputs is None else torch.cat([self.inputs, self.outputs], -1)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, index: Tensor) -> "TextStatistics":
        outputs = None if self.outputs is None else self.outputs[index]
        return TextStatistics(self.embeddings[index], self.inputs[index], outputs)

    @classmethod
    def concatenate(cls, parts: Sequence["TextStatistics"]) -> "TextStatistics":
        """All texts of `parts`, which are of one encoder, in order."""
        outputs = [p.outputs for p in parts if p.outputs is not None]
        inputs = torch.cat([p.inputs for p in parts])
        return cls(torch.cat([p.embeddings for p in parts]), inputs, torch.cat(outputs) if outputs else None)


@dataclass(frozen=True)
class TaskFeatures:
    """Features of one or more support sets.

    Args:
        set: Where the texts lie: mean and log variance in the reference's principal directions, shape (..., 2 p).
        labels: How labels lie in them: log F ratios by direction, their mean, how the base model does without an
            adapter, and sizes, shape (..., p + 6).
        modules: Log F ratios by module and basis direction, then mean activations, shape (..., modules, 2 f).
        moments: What the support set's errors ask of each module: mean products of the error of an embedding, in the
            principal directions, and the module's input, with a constant appended; root mean square 1,
            shape (..., modules, p, r + 1).
    """

    set: Tensor
    labels: Tensor
    modules: Tensor
    moments: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskFeatures":
        """The features with a function applied to every part.

        Args:
            function: From a tensor to a tensor.
        """
        return TaskFeatures(*(function(getattr(self, field.name)) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int | slice | Tensor) -> "TaskFeatures":
        return self.map(lambda part: part[index])

    @classmethod
    def stack(cls, items: Sequence["TaskFeatures"]) -> "TaskFeatures":
        """Batch features along a new first axis.

        Args:
            items: Features of one task each, without a batch axis.

        Returns:
            The batch.
        """
        return cls(*(torch.stack([getattr(item, field.name) for item in items]) for field in fields(cls)))


def fit_reference(statistics: Sequence[TextStatistics], directions: int = 64) -> dict[str, Tensor]:
    """The coordinates for the features, from texts of the training tasks; kept in the policy.

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
        raise ValueError(
            f"{directions} principal directions need at least as many texts, got {len(x)}; give more tasks, or more texts of each "
            "(`rows_per_task`)."
        )
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


def support_errors(embeddings: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each support text's embedding should go, and how the head does without going there.

    The negative gradient of the cross-entropy at the leave-one-out scores with respect to the normalised embeddings, with
    the head held fixed, in closed form: no backward pass. The head is ridge with its defaults, whatever head is used
    later. Where the head already separates the classes it vanishes (Ours: an optimizer's first step is made
    of it, and a policy that imitates optimizers has to know it; leave-one-out, because the head fits its own examples).

    Args:
        embeddings: Shape (n, d), float32 or wider.
        labels: Class indices, shape (n,).
        n_classes: Number of classes.

    Returns:
        Errors, shape (n, d), of the mean loss over classes; leave-one-out loss in nats and error rate, scalars.
    """
    x = normalize(embeddings, dim=-1)
    head, logits = leave_one_out(x, labels, n_classes)
    wrong = one_hot(labels, n_classes).to(x.dtype) - logits.softmax(-1)
    count = one_hot(labels, n_classes).sum(0)
    errors = (wrong / (count[labels, None] * (count > 0).sum())) @ head.weight
    errors = errors - (errors * x).sum(-1, keepdim=True) * x  # the length of an embedding does not count
    error_rate = (logits.argmax(-1) != labels).float().mean()
    if count.max() < 2:  # one example a class: all scores are equal but for rounding, which tells nothing
        error_rate = 1 - 1 / (count > 0).sum().to(logits.dtype)
    return errors, cross_entropy(logits, labels), error_rate


def task_features(
    statistics: TextStatistics, labels: Tensor, n_classes: int, reference: Mapping[str, Tensor]
) -> TaskFeatures:
    """The features of one support set in the coordinates of `reference`.

    Computed on the device of `reference` and in its type, float32 or wider. The moments stand for the gradient of a module's update: with the
    mean over tokens in the place of each token and a learned matrix of the policy in the place of the Jacobian from
    module to embedding, `matrix @ moments` is that gradient (Known: 1609.01596, direct feedback alignment; as features
    of a policy, Ours).

    Args:
        statistics: Of the `n` support texts.
        labels: Class indices, shape (n,).
        n_classes: Number of classes; those without examples do not count.
        reference: From `fit_reference`.
    """
    device, dtype = reference["axes"].device, torch.promote_types(reference["axes"].dtype, torch.float32)
    reference = {name: tensor.to(dtype) for name, tensor in reference.items()}
    labels, embeddings = labels.to(device), statistics.embeddings.to(device, dtype)
    inner = statistics.modules.to(device, dtype)
    with torch.autocast(device.type, enabled=False):
        x = (normalize(embeddings, dim=-1) - reference["embedding_mean"]) @ reference["axes"]
        x = x / reference["axes_std"]
        modules = (inner - reference["module_mean"]) / reference["module_std"]
        ratios = log_f_ratio(x, labels, n_classes)
        present = len(labels.unique())
        sizes = torch.tensor([math.log(present), math.log(len(labels) / present)], dtype=x.dtype, device=x.device)
        module_ratios = log_f_ratio(modules.flatten(1), labels, n_classes).view(modules.shape[1:])
        errors, loss, error_rate = support_errors(embeddings, labels, n_classes)
        inputs = pad(modules[..., : statistics.inputs.shape[-1]], (0, 1), value=1.0)
        moments = torch.einsum("np,nmr->mpr", errors @ reference["axes"], inputs)
        size = moments.square().mean().sqrt() + 1e-12
        return TaskFeatures(
            set=torch.cat([x.mean(0), (x.var(0, correction=0) + 1e-3).log()]),
            labels=torch.cat([ratios, torch.stack([ratios.mean(), loss, error_rate, size.log()]), sizes]),
            modules=torch.cat([module_ratios, modules.mean(0)], -1),
            moments=moments / size,
        )

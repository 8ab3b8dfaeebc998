"""Many training tasks in memory, ready for cheap episodes: frozen layers run once, statistics measured once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.features import TaskFeatures, TextStatistics, task_features
from lohp_peft.tasks.heads import calibrated_cross_entropy, solve_head
from lohp_peft.tasks.task import Task, draw
from lohp_peft.tasks.variants import Episode


class TaskBank:
    """Encoded rows of many tasks.

    Args:
        encoder: Encoder whose frozen prefix is kept for every row.
        rows_per_task: Rows kept of each task's split, class-balanced.
        seed: Seed of the draw.
        dtype: Type the hidden states are kept in (bfloat16 halves memory; Ours).
    """

    def __init__(
        self, encoder: TextEncoder, *, rows_per_task: int = 500, seed: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.encoder, self.rows_per_task, self.seed, self.dtype = encoder, rows_per_task, seed, dtype
        self.encoded: dict[str, EncodedTexts] = {}
        self.statistics: dict[str, TextStatistics] = {}
        self.labels: dict[str, Tensor] = {}
        self.tasks: dict[str, Task] = {}

    def add(self, task: Task, split: str = "train") -> None:
        """Encode up to `rows_per_task` rows of one split, at least 12 a class; rows that repeat others count once.

        Args:
            task: A task with a name of its own.
            split: The split.
        """
        examples = task.split(split).distinct()  # a query row must not lie in the support set too
        examples = draw(examples, max(self.rows_per_task // examples.n_classes, 12), self.seed)
        encoded = self.encoder.prepare(examples.texts, examples.texts_b)
        self.statistics[task.name] = self.encoder.statistics(encoded)
        self.encoded[task.name] = encoded.to(self.dtype)
        self.labels[task.name] = examples.targets
        self.tasks[task.name] = task

    def features(
        self, parts: Sequence[tuple[str, Tensor]], labels: Tensor, n_classes: int, reference: Mapping[str, Tensor]
    ) -> TaskFeatures:
        """The open-loop features of the rows `parts`, pairs (task name, row indices).

        Args:
            parts: Task names with row indices.
            labels: Class indices of the rows, shape (n,).
            n_classes: Number of classes.
            reference: See `task_features`.
        """
        statistics = TextStatistics.concatenate([self.statistics[name][rows] for name, rows in parts])
        return task_features(statistics, labels, n_classes, reference)

    def gather(self, parts: Sequence[tuple[str, Tensor]]) -> EncodedTexts:
        """The encoded rows `parts`, padded to one width."""
        return EncodedTexts.concatenate([self.encoded[name][rows] for name, rows in parts if len(rows)])

    def episode_losses(
        self,
        episodes: Sequence[Episode],
        states: Tensor,
        *,
        head: str = "ridge",
        ridge: float = 3.0,
        calibrated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The reward's loss: query cross-entropy of each episode under the closed-form head, and accuracy.

        Forward-only unless `states` require gradients.

        Args:
            episodes: `b` episodes.
            states: Adapters, shape (b, s, modules, width): `s` for each episode.
            head: Kind of head.
            ridge: Its penalty.
            calibrated: Take the loss at the temperature that suits the query's scores best, see `calibrated_cross_entropy`.

        Returns:
            Losses in nats and accuracies, each of shape (b, s).
        """
        b, s = states.shape[:2]
        loss = calibrated_cross_entropy if calibrated else cross_entropy
        encoded = [self.gather([*episode.support, *episode.query]) for episode in episodes for _ in range(s)]
        sizes = [len(part) for part in encoded]
        owner = torch.repeat_interleave(torch.arange(b * s), torch.tensor(sizes))
        x = self.encoder.embed(EncodedTexts.concatenate(encoded), states.flatten(0, 1), owner).split(sizes)
        losses, accuracies = [], []
        # The reward is float32, whatever the networks are.
        with torch.autocast(self.encoder.device.type, enabled=False):
            for i in range(b * s):
                episode = episodes[i // s]
                support, query = x[i].split([len(episode.support_labels), len(episode.query_labels)])
                solved = solve_head(support, episode.support_labels, episode.n_classes, head, ridge=ridge)
                logits = solved.logits(query)
                targets = episode.query_labels.to(logits.device)
                losses.append(loss(logits, targets))
                accuracies.append((logits.argmax(-1) == targets).float().mean())
        return torch.stack(losses).view(b, s), torch.stack(accuracies).view(b, s)

"""The loss of a state on a fixed problem of its task: differentiable for training, forward-only for scores."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.heads import solve_head
from lohp_peft.trajectories import Trajectory
from lohp_peft.weight_preparation.rows import Batch


def query_logits(encoder: TextEncoder, encoded: EncodedTexts, batch: Batch, state: Tensor, head: str) -> Tensor:
    """Class scores of the query rows under a head solved on the support rows.

    Args:
        encoder: Encoder of the base model.
        encoded: Prepared rows of the task.
        batch: Rows and labels.
        state: Adapter, shape (modules, width); the result is differentiable in it.
        head: Kind of head.

    Returns:
        Scores, shape (query rows, classes).
    """
    rows = torch.cat([batch.support, batch.query]).to(encoder.device)
    features = encoder.embed(encoded[rows], states=state[None])
    support, query = features.split([len(batch.support), len(batch.query)])
    labels = batch.support_labels.to(features.device)
    return solve_head(support, labels, batch.n_classes, head).logits(query)


def query_loss(encoder: TextEncoder, encoded: EncodedTexts, batch: Batch, state: Tensor, head: str) -> Tensor:
    """The mean cross-entropy of `query_logits` in nats, a scalar differentiable in `state`.

    Args:
        encoder: Encoder in the weight space of the state.
        encoded: Texts, from `encoder.prepare`.
        batch: Which of them are support and query.
        state: Shape (modules, width).
        head: Kind of head.
    """
    logits = query_logits(encoder, encoded, batch, state, head)
    return cross_entropy(logits, batch.query_labels.to(logits.device))


@torch.no_grad()
def score_trajectory(
    trajectory: Trajectory, encoder: TextEncoder, encoded: EncodedTexts, batch: Batch, head: str
) -> Trajectory:
    """The trajectory with `losses` and `metrics["query_accuracy"]` of every state on `batch`, forward-only.

    Args:
        trajectory: States in the weight space of the encoder.
        encoder: The encoder.
        encoded: Texts, from `encoder.prepare`.
        batch: Which texts are support and query.
        head: Kind of head.
    """
    losses, accuracies = [], []
    for state in trajectory.states.to(encoder.device):
        logits = query_logits(encoder, encoded, batch, state, head).cpu()
        losses.append(cross_entropy(logits, batch.query_labels))
        accuracies.append((logits.argmax(-1) == batch.query_labels).float().mean())
    metrics = {**trajectory.metrics, "query_accuracy": torch.stack(accuracies).float()}
    return replace(trajectory, losses=torch.stack(losses).float(), metrics=metrics)

"""A few gradient steps behind a generated adapter, kept only where they help on examples that they have not seen.

An option: without it generation is forward-only. Where no training task asks for anything like the task at hand the policy
has little to say and the examples' gradient much (Ours: question types, fine topics); where the policy knows the task, steps
on a few examples undo what it knows. Which it is shows on the half of the examples that the steps were not taken on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.heads import calibrated_cross_entropy, leave_one_out_loss, solve_head
from lohp_peft.tasks.task import balanced_rows

LEAST_ROWS = 4
"""Examples that a class needs: two in each half, for leave-one-out losses."""
BETAS = (0.9, 0.95)
MOST_HELD_OUT = 128
CHECK_EVERY = 4
"""Steps between two looks at the unseen examples."""


@dataclass(frozen=True)
class VerifiedSteps:
    """Where the steps led, and what they did for examples that they were not taken on.

    Args:
        state: Mean of the adapters of both halves, shape (modules, width).
        change: Mean change of the calibrated loss, in nats, over the examples of each half under the adapter of the
            other, and its standard error.
        steps: Steps behind `state`.
        confirmed: Whether the loss of unseen examples fell by more than the margin at the first look.
    """

    state: Tensor
    change: tuple[float, float]
    steps: int
    confirmed: bool


def verified_steps(
    encoder: TextEncoder,
    encoded: EncodedTexts,
    labels: Tensor,
    n_classes: int,
    start: Tensor,
    scale: Tensor,
    *,
    steps: int,
    learning_rate: float,
    margin: float,
    texts: int = 96,
    ridge: float = 3.0,
    seed: int = 0,
) -> VerifiedSteps | None:
    """Take steps of Adam on each half of the examples, and go on while they help on the other half.

    The loss is the calibrated leave-one-out loss of a ridge head (see `leave_one_out_loss`). Both halves run in one batch, and
    the mean of both adapters is the result (Known: 2203.05482, averages of fine-tuned weights), so that nothing is run
    a third time. After every `CHECK_EVERY` steps start and end are compared on the unseen half: steps that the first look
    does not confirm end there, confirmed ones where a further look is no better (Ours: on question types and
    relations the first four gain 3 to 14 points; elsewhere the first look ends them).

    Args:
        encoder: Encoder of the base model.
        encoded: The `n` examples, from `encoder.prepare`.
        labels: Class indices, shape (n,).
        n_classes: Number of classes.
        start: The adapter to start from, shape (modules, width).
        scale: Unit of the steps, the policy's, shape (modules, 1).
        steps: Most optimizer steps.
        learning_rate: Adam's, in units of `scale`.
        margin: Standard errors by which the loss of unseen examples must have fallen at the first look.
        texts: Most examples of a half in a step, but four a class.
        ridge: Penalty of the head.
        seed: Seed of the halves and of the steps' examples.

    Returns:
        Where they led, at the best look; `None` when fewer than two classes have four examples.
    """
    halves = _halves(labels, seed)
    if halves is None:
        return None
    path = leave_one_out_steps(
        encoder,
        encoded,
        labels,
        n_classes,
        halves,
        start,
        scale,
        steps=steps,
        learning_rate=learning_rate,
        texts=texts,
        ridge=ridge,
        seed=seed,
    )
    seen = [half[balanced_rows(labels[half], MOST_HELD_OUT, seed)] for half in halves]

    @torch.no_grad()
    def embed(state: Tensor) -> list[Tensor]:
        return _embed(encoder, encoded, seen, state.expand(2, *state.shape))

    def losses(embedded: Sequence[Tensor], known: int) -> Tensor:
        """Those of the other half under the head of the half `known`."""
        head = solve_head(embedded[known].float(), labels[seen[known]], n_classes, "ridge", ridge=ridge)
        x, targets = embedded[1 - known].float(), labels[seen[1 - known]]
        return calibrated_cross_entropy(head.logits(x), targets.to(x.device), "none").cpu()

    before = embed(start)
    best = VerifiedSteps(start, (0.0, 0.0), 0, False)
    for step, ends in enumerate(path, 1):
        if step % CHECK_EVERY and step != steps:
            continue
        change = torch.cat([losses(embed(end), k) - losses(before, k) for k, end in enumerate(ends)])
        mean, error = float(change.mean()), float(change.std() / len(change) ** 0.5)
        if best.steps and not mean < best.change[0]:  # nor where it is NaN
            break
        best = VerifiedSteps(ends.mean(0), (mean, error), step, best.confirmed or mean + margin * error < 0)
        if not best.confirmed:
            break
    return best


def leave_one_out_steps(
    encoder: TextEncoder,
    encoded: EncodedTexts,
    labels: Tensor,
    n_classes: int,
    groups: Sequence[Tensor],
    start: Tensor,
    scale: Tensor,
    *,
    steps: int,
    learning_rate: float,
    texts: int = 96,
    ridge: float = 3.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """The adapters after each step of Adam on each group of the examples, shape (groups, modules, width).

    Args:
        encoder: See `verified_steps`.
        encoded: See `verified_steps`.
        labels: See `verified_steps`.
        n_classes: See `verified_steps`.
        groups: Row indices of each group, with two examples of a class or more.
        start: See `verified_steps`.
        scale: See `verified_steps`.
        steps: See `verified_steps`.
        learning_rate: See `verified_steps`.
        texts: Most examples of a group in a step, but four a class.
        ridge: See `verified_steps`.
        seed: Seed of the steps' examples.
    """
    scaled = (start / scale).detach().expand(len(groups), *start.shape).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([scaled], lr=learning_rate, betas=BETAS)
    most = max(texts, LEAST_ROWS * len(labels.unique()))
    for step in range(steps):
        rows = [group[balanced_rows(labels[group], most, seed + 1000 * step)] for group in groups]
        with torch.enable_grad():
            losses = [
                leave_one_out_loss(x, labels[part], n_classes, ridge=ridge).mean()
                for x, part in zip(_embed(encoder, encoded, rows, scaled * scale), rows, strict=True)
            ]
            # The gradients of the base model's own parameters are not asked for, whoever owns it.
            (scaled.grad,) = torch.autograd.grad(torch.stack(losses).sum(), [scaled])
        optimizer.step()
        yield scaled.detach() * scale


def _halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor] | None:
    """Row indices of two disjoint halves of every class that has enough of them."""
    generator = torch.Generator().manual_seed(seed)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten().cpu()
        if len(rows) >= LEAST_ROWS:
            rows = rows[torch.randperm(len(rows), generator=generator)]
            for side, part in zip(sides, rows.tensor_split(2), strict=True):
                side.append(part)
    return None if len(sides[0]) < 2 else (torch.cat(sides[0]), torch.cat(sides[1]))


def _embed(encoder: TextEncoder, encoded: EncodedTexts, rows: Sequence[Tensor], states: Tensor) -> list[Tensor]:
    """Embeddings of each list of rows under its own state."""
    sizes = [len(part) for part in rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes))
    return list(encoder.embed(encoded[torch.cat(list(rows))], states, owner).split(sizes))

"""The candidates of a generation: rollouts, no adapter, the mean adapter; and the choice on the support set."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.tasks import HEADS, Examples, Head, TaskFeatures, TextEncoder, TextStatistics, solve_head, task_features
from lohp_peft.tasks.encoder import EncodedTexts


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an adapter is generated.

    Raises:
        ValueError: Listing every value out of range.
    """

    policy_steps: int | None = field(default=None, metadata={"help": "policy steps taken; none for the policy's own"})
    num_candidates: int = field(default=0, metadata={"help": "stochastic rollouts scored beside the mean one"})
    noise: float = field(default=1.0, metadata={"help": "their standard deviation, in units of the policy's"})
    amplitudes: tuple[float, ...] = field(
        default=(1.0,), metadata={"help": "factors of the adapter tried on the support set; (1.0,) does not calibrate"}
    )
    choose: bool = field(
        default=True, metadata={"help": "score candidates on the support set, none and mean among them"}
    )
    scored_texts: int = field(default=32, metadata={"help": "most support texts behind a score, but two a class"})
    margin: float = field(
        default=1.0, metadata={"help": "standard errors by which a candidate must beat the generated adapter"}
    )
    optimizer: str | None = field(default=None, metadata={"help": "recorded optimizer to imitate; none in particular"})
    closed_loop: bool = field(default=False, metadata={"help": "measure the features again at every policy step"})
    head: str | None = field(default=None, metadata={"help": "ridge or prototype; none for the policy's own"})
    seed: int = field(default=0, metadata={"help": "seed of folds and stochastic rollouts"})

    def __post_init__(self) -> None:
        problems = []
        if self.num_candidates < 0:
            problems.append(f"`num_candidates` must be at least 0, got {self.num_candidates}")
        if not self.amplitudes or min(self.amplitudes) <= 0:
            problems.append(f"`amplitudes` must be positive, got {self.amplitudes}")
        if self.scored_texts < 4:
            problems.append(f"`scored_texts` must be at least 4, got {self.scored_texts}")
        if self.head is not None and self.head not in HEADS:
            problems.append(f"`head` must be one of {list(HEADS)}, got {self.head!r}")
        if problems:
            raise ValueError("Generation: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Candidate:
    """One adapter that was considered.

    Args:
        name: `none`, `mean`, `generated`, `generated x 0.5`, `rollout 1`, ...
        score: Cross-fitted cross-entropy on the support set in nats, lower is better; `None` when not scored.
        excess: Mean of its loss over the generated adapter's, example by example, and the standard error of that.
    """

    name: str
    score: float | None = None
    excess: tuple[float, float] | None = None


class CandidateSet:
    """The supports of one call, encoded once."""

    def __init__(self, policy: LoHpPolicy, encoder: TextEncoder, examples: list[Examples], config: GenerationConfig):
        self.policy, self.encoder, self.examples, self.config = policy, encoder, examples, config
        self.sizes = [len(task) for task in examples]
        prepared = [encoder.prepare(task.texts, task.texts_b) for task in examples]
        self.truncated = [_count_truncated(encoder, *pair) for pair in zip(examples, prepared, strict=True)]
        if any(self.truncated):
            warnings.warn(
                f"{sum(self.truncated)} of {sum(self.sizes)} support texts are longer than {encoder.max_length} tokens and "
                "were truncated, as in the policy's training.",
                stacklevel=5,
            )
        self.encoded = EncodedTexts.concatenate(prepared)
        self.owner = torch.repeat_interleave(torch.arange(len(examples)), torch.tensor(self.sizes))
        self.statistics = self._split(encoder.statistics(self.encoded))
        self.reference = policy.reference_tensors()
        self.head = config.head or policy.config.head

    def _split(self, statistics: TextStatistics) -> list[TextStatistics]:
        return [statistics[rows] for rows in torch.arange(len(self.owner)).split(self.sizes)]

    def all_rows(self) -> list[Tensor]:
        """Every row of every task."""
        return [torch.arange(size) for size in self.sizes]

    def features(self, task: int, rows: Tensor | slice, statistics: TextStatistics | None = None) -> TaskFeatures:
        """Features of some rows of one task."""
        statistics = statistics or self.statistics[task][rows]
        examples = self.examples[task]
        return task_features(statistics, examples.targets[rows], examples.n_classes, self.reference)

    def solve(self, embeddings: Tensor, labels: Tensor, n_classes: int) -> Head:
        """The closed-form head."""
        return solve_head(embeddings, labels, n_classes, self.head, ridge=self.policy.config.ridge)

    def rollout(self, features: TaskFeatures, rows: list[Tensor], noise: float = 0.0, salt: int = 0) -> Tensor:
        """Paths of all tasks, shape (tasks, steps + 1, modules, width), each given the rows it may see."""
        measure = None
        if self.config.closed_loop:
            offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]

            def measure(states: Tensor, _step: int) -> TaskFeatures:
                found = []
                for i, part in enumerate(rows):
                    statistics = self.encoder.statistics(self.encoded[part + offsets[i]], states[i])
                    found.append(self.features(i, part, statistics))
                return TaskFeatures.stack(found)

        optimizer = None
        if self.config.optimizer is not None:
            index = self.policy.config.optimizers.index(self.config.optimizer) + 1
            optimizer = torch.full((len(rows),), index)
        # One generator a task, so that a task's rollouts do not depend on the others in the batch.
        generators = [torch.Generator().manual_seed(self.config.seed + salt) for _ in rows]
        return rollout(
            self.policy,
            features,
            optimizer=optimizer,
            noise=noise,
            generator=generators,
            measure=measure,
            policy_steps=self.config.policy_steps,
        )

    def _rolled_out(self, features: TaskFeatures, rows: list[Tensor], path: Tensor | None = None) -> dict[str, Tensor]:
        """States of the candidates that depend on the rows the policy may see, each (tasks, modules, width)."""
        path = self.rollout(features, rows) if path is None else path
        final = path[:, -1]
        found = {"generated": final}
        found |= {f"generated x {a:g}": a * final for a in self.config.amplitudes if a != 1.0}
        for n in range(self.config.num_candidates):
            found[f"rollout {n + 1}"] = self.rollout(features, rows, self.config.noise, n + 1)[:, -1]
        return found

    def _fixed(self) -> dict[str, Tensor]:
        """States of the candidates that are the same for all tasks."""
        found = {}
        shape = len(self.examples), *self.policy.space.shape
        if self.policy.reference_set is not None:
            found["mean"] = self.policy.reference_set.mean_state().to(self.policy.scale).expand(shape)
        found["none"] = self.policy.scale.new_zeros(shape)
        return found

    def choose(
        self, features: TaskFeatures, paths: Tensor
    ) -> tuple[Tensor, list[tuple[Candidate, ...]], list[tuple[str, str]]]:
        """The chosen state of each task, its candidates, and (name, reason), from features and paths of all its rows."""
        if not self.config.choose:
            note = ("generated", "Candidates were not compared.")
            return paths[:, -1].contiguous(), [(Candidate("generated"),)] * len(paths), [note] * len(paths)
        losses = self._cross_fitted_losses()
        states = self._rolled_out(features, self.all_rows(), paths) | self._fixed()
        chosen, candidates, reasons = [], [], []
        for i in range(len(paths)):
            found = {}
            for name in states:
                excess = losses[name][i] - losses["generated"][i]
                error = float(excess.std() / max(len(excess), 1) ** 0.5) if len(excess) > 1 else float("inf")
                found[name] = Candidate(name, float(losses[name][i].mean()), (float(excess.mean()), error))
            best, reason = _decide(found, self.config.margin)
            chosen.append(states[best][i])
            candidates.append(tuple(found.values()))
            reasons.append((best, reason))
        return torch.stack(chosen), candidates, reasons

    def _cross_fitted_losses(self) -> dict[str, list[Tensor]]:
        """Loss of every scored support text under every candidate, conditioned and solved on the other half."""
        halves = [_halves(task, self.config.scored_texts, self.config.seed) for task in self.examples]
        compared = [torch.cat(half).unique() for half in halves]
        fixed = self._fixed()
        fixed.pop("none")  # its embeddings are known
        base = self._embed(fixed, compared)
        base["none"] = [s.embeddings[rows] for s, rows in zip(self.statistics, compared, strict=True)]
        collected: dict[str, list[list[Tensor]]] = {}
        for fold in (0, 1):
            seen, scored = [h[fold] for h in halves], [h[1 - fold] for h in halves]
            # The policy may see all that is not scored; the head is solved on the compared rows, for every candidate alike.
            known = [_without(size, rows) for size, rows in zip(self.sizes, scored, strict=True)]
            features = TaskFeatures.stack([self.features(i, rows) for i, rows in enumerate(known)])
            embedded = base | self._embed(self._rolled_out(features, known), compared)
            for name, pieces in embedded.items():
                found = []
                for i, x in enumerate(pieces):
                    targets, at = self.examples[i].targets, lambda rows, i=i: torch.searchsorted(compared[i], rows)
                    head = self.solve(x[at(seen[i])], targets[seen[i]], self.examples[i].n_classes)
                    logits = head.logits(x[at(scored[i])]).cpu()
                    found.append(cross_entropy(logits, targets[scored[i]], reduction="none"))
                collected.setdefault(name, []).append(found)
        return {name: [torch.cat(parts) for parts in zip(*folds, strict=True)] for name, folds in collected.items()}

    def _embed(self, states: Mapping[str, Tensor], rows: list[Tensor]) -> dict[str, list[Tensor]]:
        """By candidate and task, embeddings of the task's `rows` under the candidate's state for that task."""
        if not states:
            return {}
        offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        index = torch.cat([part + offset for part, offset in zip(rows, offsets, strict=True)])
        counts = [len(part) for part in rows] * len(states)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        stacked = torch.cat(list(states.values()))
        x = self.encoder.embed(self.encoded[index.repeat(len(states))], stacked, owner).split(counts)
        return {name: list(x[k * len(rows) : (k + 1) * len(rows)]) for k, name in enumerate(states)}


def _without(size: int, rows: Tensor) -> Tensor:
    """The rows of `size` that are not in `rows`, or all where none would be left (one example a class)."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[rows] = False
    return kept.nonzero().flatten() if kept.any() else torch.arange(size)


def _halves(examples: Examples, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two class-balanced halves of at most `limit` support rows, but two a class; single examples are in both."""
    generator = torch.Generator().manual_seed(seed)
    targets = examples.targets
    per_class = max(2, limit // max(len(set(examples.labels)), 1))
    first, second = [], []
    for label in sorted(set(examples.labels)):
        rows = (targets == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)][:per_class]
        half = (len(rows) + 1) // 2
        first.append(rows[:half])
        second.append(rows[half:] if len(rows) > 1 else rows)
    return torch.cat(first), torch.cat(second)


def _decide(candidates: Mapping[str, Candidate], margin: float) -> tuple[str, str]:
    """The name of the candidate to use and why."""
    best, reason = "generated", "No candidate beat the generated adapter convincingly on the support set."
    lead = 0.0
    for name, candidate in candidates.items():
        mean, error = candidate.excess or (0.0, 0.0)
        if name != "generated" and mean + margin * error < 0 and mean < lead:
            lead, best = mean, name
            reason = (
                f"{name!r} has a lower cross-fitted loss on the support set than the generated adapter: "
                f"{-mean:.3f} +- {error:.3f} nats."
            )
    return best, reason


def _count_truncated(encoder: TextEncoder, task: Examples, encoded: EncodedTexts) -> int:
    """Texts that fill the encoder's length are tokenized again, whole."""
    full = (encoded.attention_mask.sum(-1) >= encoder.max_length).nonzero().flatten().tolist()
    if not full:
        return 0
    texts = [task.texts[i] for i in full]
    pair = None if task.texts_b is None else [task.texts_b[i] for i in full]
    lengths = encoder.tokenizer(texts, pair, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(ids) > encoder.max_length for ids in lengths)

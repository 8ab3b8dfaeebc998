"""The candidates of a generation: rollouts, no adapter, the mean adapter, a mixture; and the choice on the support set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lohp_peft.fields import SEEDS, check_switches, document_fields, is_number, take_whole_numbers
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.tasks import (
    HEADS,
    Examples,
    Head,
    TaskFeatures,
    TextEncoder,
    TextStatistics,
    balanced_rows,
    leave_one_out_loss,
    solve_head,
    task_features,
    verified_steps,
)
from lohp_peft.tasks.encoder import EncodedTexts
from lohp_peft.tasks.requirements import check_gradients
from lohp_peft.warn import warn

TOO_FEW_FOR_STEPS = "Gradient steps need two classes of four examples."
TOO_FEW_TO_COMPARE = "Candidates were not compared, which needs two examples of a class."


@document_fields
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an adapter is generated.

    Defaults are Ours; `DECISIONS.md` says which were compared, and with what.

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
        default=1.5, metadata={"help": "standard errors by which a candidate must beat the generated adapter"}
    )
    optimizer: str | None = field(default=None, metadata={"help": "recorded optimizer to imitate; none in particular"})
    closed_loop: bool = field(default=False, metadata={"help": "measure the features again at every policy step"})
    gradient_steps: int = field(
        default=0,
        metadata={
            "help": "most Adam steps from the chosen adapter, kept where unseen examples confirm them; 0 is forward-only"
        },
    )
    gradient_learning_rate: float = field(
        default=0.3, metadata={"help": "their learning rate, in units of the policy's scale"}
    )
    gradient_margin: float = field(
        default=2.0, metadata={"help": "standard errors by which they must lower the loss of unseen examples"}
    )
    mixed_precision: str = field(
        default="no",
        metadata={"help": "no or bf16, of the base model's forward passes; faster where the processor has it"},
    )
    head: str | None = field(default=None, metadata={"help": "ridge or prototype; none for the policy's own"})
    seed: int = field(default=0, metadata={"help": "seed of the compared texts and of stochastic rollouts"})

    def __post_init__(self) -> None:
        take_whole_numbers(self)
        check_switches(self)
        problems = []
        if self.policy_steps is not None and self.policy_steps < 1:
            problems.append(f"`policy_steps` must be at least 1, got {self.policy_steps}")
        if self.num_candidates < 0:
            problems.append(f"`num_candidates` must be at least 0, got {self.num_candidates}")
        if not isinstance(self.amplitudes, tuple | list) or not self.amplitudes:
            problems.append(f"`amplitudes` must be a sequence of one or more numbers, got {self.amplitudes!r}")
        elif not all(is_number(factor) and factor > 0 for factor in self.amplitudes):
            problems.append(f"`amplitudes` must be positive numbers, got {self.amplitudes}")
        if not (is_number(self.noise) and self.noise >= 0):
            problems.append(f"`noise` must be at least 0, got {self.noise!r}")
        problems += [
            f"`{name}` must be a number, got {value!r}"
            for name in ("margin", "gradient_margin")
            if not is_number(value := getattr(self, name), finite=False)
        ]
        if not 0 <= self.seed < SEEDS:
            problems.append(f"`seed` must be in 0..2**63 - 1, got {self.seed}")
        if not self.choose and (self.num_candidates or tuple(self.amplitudes) != (1.0,)):
            problems.append(
                "`num_candidates` and `amplitudes` are candidates, which `choose=False` does not compare, got "
                f"{self.num_candidates} and {self.amplitudes}"
            )
        if self.gradient_steps < 0:
            problems.append(f"`gradient_steps` must be at least 0, got {self.gradient_steps}")
        if not (is_number(self.gradient_learning_rate) and self.gradient_learning_rate > 0):
            problems.append(f"`gradient_learning_rate` must be a positive number, got {self.gradient_learning_rate!r}")
        if self.scored_texts < 4:
            problems.append(f"`scored_texts` must be at least 4, got {self.scored_texts}")
        if self.mixed_precision not in ("no", "bf16"):
            problems.append(f"`mixed_precision` must be no or bf16, got {self.mixed_precision!r}")
        if self.head is not None and self.head not in HEADS:
            problems.append(f"`head` must be one of {list(HEADS)}, got {self.head!r}")
        if problems:
            raise ValueError("Generation: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class Candidate:
    """One adapter that was considered.

    Args:
        name: `none`, `mean`, `generated`, `generated x 0.5`, `rollout 1`, ...
        score: Calibrated leave-one-out loss of a ridge head on the support set in nats, lower is better; `None` when not scored.
        excess: Mean of its loss over the generated adapter's, example by example, and the standard error of that; after
            gradient steps over that of the candidate they began at.
    """

    name: str
    score: float | None = None
    excess: tuple[float, float] | None = None


@dataclass(frozen=True)
class Choice:
    """What a task gets.

    Args:
        state: The adapter, shape (modules, width).
        embeddings: Those of all its support texts under it, shape (n, d), where they are known already.
        candidates: All that were considered.
        name: The chosen candidate.
        reason: Why.
        gradient_steps: Gradient steps that it took; 0 is forward-only.
    """

    state: Tensor
    embeddings: Tensor | None
    candidates: tuple[Candidate, ...]
    name: str
    reason: str
    gradient_steps: int = 0


class CandidateSet:
    """The supports of one call, encoded once."""

    def __init__(self, policy: LoHpPolicy, encoder: TextEncoder, examples: list[Examples], config: GenerationConfig):
        self.policy, self.encoder, self.examples, self.config = policy, encoder, examples, config
        if config.gradient_steps:
            check_gradients(encoder.base_model)
        self.sizes = [len(task) for task in examples]
        prepared = [encoder.prepare(task.texts, task.texts_b) for task in examples]
        self.truncated = [_count_truncated(encoder, *pair) for pair in zip(examples, prepared, strict=True)]
        if any(self.truncated):
            warn(
                f"{sum(self.truncated)} of {sum(self.sizes)} support texts are longer than {encoder.max_length} tokens and "
                "were truncated, as in the policy's training.",
            )
        self.encoded = EncodedTexts.concatenate(prepared)
        self.owner = torch.repeat_interleave(torch.arange(len(examples)), torch.tensor(self.sizes))
        self.statistics = self._split(encoder.statistics(self.encoded))
        self.reference = policy.reference_tensors()
        self.head = config.head or policy.config.head

    def _split(self, statistics: TextStatistics) -> list[TextStatistics]:
        return [statistics[rows] for rows in torch.arange(len(self.owner)).split(self.sizes)]

    def features(self, task: int, statistics: TextStatistics | None = None) -> TaskFeatures:
        """Features of one task, from what was measured without an adapter or from `statistics`."""
        examples = self.examples[task]
        return task_features(statistics or self.statistics[task], examples.targets, examples.n_classes, self.reference)

    def solve(self, embeddings: Tensor, labels: Tensor, n_classes: int) -> Head:
        """The closed-form head."""
        return solve_head(embeddings, labels, n_classes, self.head, ridge=self.policy.config.ridge)

    def rollout(self, features: TaskFeatures, noise: float = 0.0, salt: int = 0) -> Tensor:
        """Paths of all tasks, shape (tasks, steps + 1, modules, width)."""
        measure = None
        if self.config.closed_loop:

            def measure(states: Tensor, _step: int) -> TaskFeatures:
                rows = torch.arange(len(self.owner)).split(self.sizes)
                measured = [self.encoder.statistics(self.encoded[part], states[i]) for i, part in enumerate(rows)]
                return TaskFeatures.stack([self.features(i, one) for i, one in enumerate(measured)])

        optimizer = self.policy.optimizer_index(self.config.optimizer, len(self.sizes))
        # One generator a task, so that a task's rollouts do not depend on the others in the batch.
        generators = [torch.Generator().manual_seed(self.config.seed + salt) for _ in self.sizes]
        return rollout(
            self.policy,
            features,
            optimizer=optimizer,
            noise=noise,
            generator=generators,
            measure=measure,
            policy_steps=self.config.policy_steps,
        )

    def _variants(self, features: TaskFeatures, generated: Tensor) -> dict[str, Tensor]:
        """Other amplitudes and stochastic rollouts, each (tasks, modules, width)."""
        found = {f"generated x {a:g}": a * generated for a in self.config.amplitudes if a != 1.0}
        for n in range(self.config.num_candidates):
            found[f"rollout {n + 1}"] = self.rollout(features, self.config.noise, n + 1)[:, -1]
        return found

    def _fixed(self, generated: Tensor) -> dict[str, Tensor]:
        """The candidates that fall back on what is known without the task."""
        found = {}
        if self.policy.reference_set is not None:
            mean = self.policy.reference_set.mean_state().to(generated).expand_as(generated)
            found = {"half generated, half mean": (generated + mean) / 2, "mean": mean}
        return found | {"none": torch.zeros_like(generated)}

    def choose(self, features: TaskFeatures, paths: Tensor) -> list[Choice]:
        """The chosen adapter of each task, from features and paths of all its rows."""
        generated = paths[:, -1].contiguous()
        embedded = self._embed({"generated": generated}, [torch.arange(size) for size in self.sizes])["generated"]
        if not self.config.choose:
            note = (Candidate("generated"),), "generated", "Candidates were not compared."
            made = [Choice(state, x, *note) for state, x in zip(generated, embedded, strict=True)]
            return self._with_steps(made)
        states = {"generated": generated} | self._variants(features, generated) | self._fixed(generated)
        compared = [balanced_rows(t.targets, self.config.scored_texts, self.config.seed) for t in self.examples]
        known = {"generated": embedded, "none": [s.embeddings for s in self.statistics]}
        others = self._embed({name: x for name, x in states.items() if name not in known}, compared)
        made = []
        for i, (task, rows) in enumerate(zip(self.examples, compared, strict=True)):
            embeddings = {name: known[name][i][rows] if name in known else others[name][i] for name in states}
            given = task.targets[rows], task.n_classes
            if given[0].bincount().max() < 2:  # every score is that of chance, and rounding would choose
                made.append(
                    Choice(generated[i], embedded[i], (Candidate("generated"),), "generated", TOO_FEW_TO_COMPARE)
                )
                continue
            losses = {
                name: leave_one_out_loss(x, *given, ridge=self.policy.config.ridge).cpu()
                for name, x in embeddings.items()
            }
            found = {}
            for name, loss in losses.items():
                excess = loss - losses["generated"]
                error = float(excess.std() / len(excess) ** 0.5) if len(excess) > 1 else float("inf")
                found[name] = Candidate(name, float(loss.mean()), (float(excess.mean()), error))
            best, reason = _decide(found, self.config.margin)
            whole = known[best][i] if best in known else embeddings[best] if len(rows) == len(task) else None
            made.append(Choice(states[best][i], whole, tuple(found.values()), best, reason))
        return self._with_steps(made)

    def _with_steps(self, choices: list[Choice]) -> list[Choice]:
        """The choices after the gradient steps that the settings ask for."""
        if not self.config.gradient_steps:
            return choices
        return [self._step(i, choice) for i, choice in enumerate(choices)]

    def _step(self, task: int, choice: Choice) -> Choice:
        """The choice after gradient steps from it, where unseen examples confirm them."""
        config, examples = self.config, self.examples[task]
        rows = torch.arange(len(self.owner)).split(self.sizes)[task]
        taken = verified_steps(
            self.encoder,
            self.encoded[rows],
            examples.targets,
            examples.n_classes,
            choice.state,
            self.policy.scale,
            steps=config.gradient_steps,
            learning_rate=config.gradient_learning_rate,
            margin=config.gradient_margin,
            ridge=self.policy.config.ridge,
            seed=config.seed,
        )
        if taken is None:
            return replace(choice, reason=f"{choice.reason} {TOO_FEW_FOR_STEPS}")
        (mean, error), name = taken.change, f"{choice.name} + {taken.steps} gradient steps"
        verdict = f"{taken.steps} gradient steps change the loss of unseen examples by {mean:+.3f} +- {error:.3f} nats"
        candidates = (*choice.candidates, Candidate(name, excess=taken.change))
        if taken.confirmed:
            return Choice(taken.state, None, candidates, name, f"{choice.reason} {verdict}.", taken.steps)
        return replace(choice, candidates=candidates, reason=f"{choice.reason} {verdict}: not kept.")

    def embeddings(self, choices: Sequence[Choice]) -> list[Tensor]:
        """All support texts of each task under its chosen adapter; what is known is not run again."""
        known = [choice.embeddings for choice in choices]
        rows = [torch.arange(size if x is None else 0) for size, x in zip(self.sizes, known, strict=True)]
        states = {"chosen": torch.stack([choice.state for choice in choices])} if any(map(len, rows)) else {}
        run = self._embed(states, rows).get("chosen", known)
        return [new if x is None else x for x, new in zip(known, run, strict=True)]

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


def _decide(candidates: Mapping[str, Candidate], margin: float) -> tuple[str, str]:
    """The name of the candidate to use and why."""
    best, reason = "generated", "No candidate beat the generated adapter convincingly on the support set."
    lead = 0.0
    for name, candidate in candidates.items():
        mean, error = candidate.excess or (0.0, 0.0)
        if name != "generated" and mean + margin * error < 0 and mean < lead:
            lead, best = mean, name
            reason = (
                f"{name!r} has a lower leave-one-out loss on the support set than the generated adapter: "
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

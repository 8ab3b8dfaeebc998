"""Generated adapters beside honest baselines and controls, on held-out examples."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lohp_peft.baselines import AdamWBaseline
from lohp_peft.fields import document_fields, take_whole_numbers
from lohp_peft.generation import GenerationConfig, as_trained, encoder_for, generate_adapters, load_policy
from lohp_peft.policy import LoHpPolicy, rollout
from lohp_peft.progress import Work
from lohp_peft.tasks import Examples, Head, Task, TaskFeatures, TextEncoder, draw, solve_head, task_features
from lohp_peft.tasks.encoder import EncodedTexts
from lohp_peft.warn import warn

METHODS = (
    "none",
    "mean_adapter",
    "nearest_adapter",
    "generated",
    "generated_raw",
    "wrong_task",
    "shuffled_labels",
    "adamw",
)
RAW = ("generated_raw", "wrong_task", "shuffled_labels")
"""Rollouts that are not compared with other candidates."""
FROM_REFERENCE = ("mean_adapter", "nearest_adapter", "wrong_task")
"""What needs the training tasks that a policy keeps."""


@document_fields
@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured.

    Defaults are Ours: those of the benchmarks.

    Raises:
        ValueError: Listing every value out of range.
    """

    shots: int = field(default=16, metadata={"help": "support examples per class, drawn from split train"})
    draws: int = field(default=3, metadata={"help": "support sets per task"})
    seed: int = field(default=0, metadata={"help": "seed of draws, controls and baselines"})
    max_test: int | None = field(
        default=None, metadata={"help": "most rows of split test, drawn class-balanced, but one a class; none for all"}
    )
    methods: tuple[str, ...] = field(default=METHODS, metadata={"help": "methods to run"})
    adamw_steps: int = field(default=80, metadata={"help": "optimizer steps of AdamW; chosen on validation tasks"})
    adamw_learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW; chosen on validation tasks"})
    adamw_mixed_precision: str = field(default="no", metadata={"help": "of AdamW's forward passes, no or bf16"})

    def __post_init__(self) -> None:
        take_whole_numbers(self)
        problems = []
        if self.shots < 2:
            problems.append(f"`shots` must be at least 2, got {self.shots}")
        if self.draws < 1:
            problems.append(f"`draws` must be at least 1, got {self.draws}")
        if self.max_test is not None and self.max_test < 1:
            problems.append(f"`max_test` must be at least 1, got {self.max_test}")
        if unknown := sorted(set(self.methods) - set(METHODS)):
            problems.append(f"`methods` must be among {list(METHODS)}, got {unknown}")
        if self.adamw_steps < 1 or not self.adamw_learning_rate > 0:
            problems.append(
                "`adamw_steps` must be at least 1 and `adamw_learning_rate` above 0, got "
                f"{self.adamw_steps} and {self.adamw_learning_rate}"
            )
        if self.adamw_mixed_precision not in ("no", "bf16"):
            problems.append(f"`adamw_mixed_precision` must be no or bf16, got {self.adamw_mixed_precision!r}")
        if problems:
            raise ValueError("Evaluation: " + "; ".join(problems) + ".")


@torch.inference_mode(False)  # AdamW needs gradients
@torch.enable_grad()
def evaluate_tasks(
    policy: LoHpPolicy | str | os.PathLike,
    base_model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    shots: int = 16,
    draws: int = 3,
    seed: int = 0,
    config: EvaluationConfig | None = None,
    generation: GenerationConfig | None = None,
    console: Console | None = None,
    on_task: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Score every method on every task: support from split train, scores on split test.

    Controls change the conditioning only: head and scores keep the true support, and candidates are not compared, for
    the control and for `generated_raw`, which it is compared with; `generated` is the full product. Methods for which the
    policy's reference set has nothing are left out, with a warning.

    Args:
        policy: The policy or its name.
        base_model: Its base model.
        tokenizer: Its tokenizer.
        tasks: Tasks with splits train and test.
        shots: Support examples per class.
        draws: Support sets per task.
        seed: Seed of everything.
        config: Replaces the three above and more.
        generation: Settings of the full product; its head is that of every method, its precision that of every method but
            AdamW.
        console: Where progress goes; standard error when absent.
        on_task: Called with each task's name and scores as they come, for instance to save them.

    Returns:
        `{"tasks": {name: {method: {"accuracy", "macro_f1", "per_draw", "seconds", ...}}}}`; accuracies in 0..1, means over
        draws; seconds are the median time from examples to adapter, features and head included.

    Raises:
        ValueError: When the policy does not fit the base model, tasks share a name, a task lacks a split or has one class to draw
            from, or the settings of the generation cannot be those of a control.
    """
    names = [task.name for task in tasks]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Tasks need names of their own, by which scores are returned; several are called {shared}.")
    lacking = [
        f"task {task.name!r} has no rows in split {split!r} (its splits: {sorted(set(task.splits))})"
        for task in tasks
        for split in ("train", "test")
        if split not in task.splits
    ]
    lacking += [
        f"task {task.name!r} has one class in split 'train', {task.examples.label_names[next(iter(present))]!r}"
        for task in tasks
        if len(present := {y for y, split in zip(task.examples.labels, task.splits, strict=True) if split == "train"})
        == 1
    ]
    if lacking:
        raise ValueError(f"Evaluation draws from split train and scores on split test, but {'; '.join(lacking)}.")
    config = config or EvaluationConfig(shots=shots, draws=draws, seed=seed)
    generation = generation or GenerationConfig()
    policy = load_policy(policy)
    policy.optimizer_index(generation.optimizer, 1)  # refuses an unknown one before any work
    if generation.closed_loop and (raw := [name for name in config.methods if name in RAW]):
        raise ValueError(
            f"`closed_loop` measures the features again on a task's texts, which {raw} cannot, being conditioned on what is "
            "not the task's. Leave them out of `methods`, or `closed_loop` off."
        )
    methods = {}
    for task in tasks:
        methods[task.name] = _possible(policy, task, config.methods)
        _tell_of_overlap(task)
    results = {}
    with as_trained(policy, base_model):
        encoder = encoder_for(policy, base_model, tokenizer, generation.mixed_precision)
        with Work(console or Console(stderr=True)) as progress:
            bar = progress.add_task("evaluation", total=len(tasks) * config.draws)
            for task in tasks:
                progress.update(bar, note=task.name)
                one = _TaskEvaluation(policy, encoder, task, replace(config, methods=methods[task.name]), generation)
                for number in range(config.draws):
                    one.run_draw(number)
                    progress.advance(bar)
                results[task.name] = one.summary()
                if on_task is not None:
                    on_task(task.name, results[task.name])
    return {"tasks": results}


def _possible(policy: LoHpPolicy, task: Task, methods: Sequence[str]) -> tuple[str, ...]:
    """The methods that a policy's reference set allows for a task; it warns of the others, or says that none is left."""
    reference = policy.reference_set
    lacking = {name: "the policy's reference set, which it has not" for name in FROM_REFERENCE if reference is None}
    if reference is not None and not reference.has_wrong_task(task.family, task.name):
        lacking["wrong_task"] = "a training task of the policy that is not like it, and there is none"
    left_out = {name: lacking[name] for name in methods if name in lacking}
    if left_out:
        reasons = "; ".join(f"{name!r} needs {reason}" for name, reason in left_out.items())
        if len(left_out) == len(methods):
            raise ValueError(f"Nothing can be scored on task {task.name!r}: {reasons}.")
        warn(f"Not scored on task {task.name!r}: {reasons}.")
    return tuple(name for name in methods if name not in left_out)


def _tell_of_overlap(task: Task) -> None:
    """Warn of test rows that support sets may hold as well."""
    train, test = (set(task.split(split).read()) for split in ("train", "test"))
    if shared := len(train & test):
        warn(
            f"Task {task.name!r}: {shared} of {len(test)} different texts of split test are in split train too, which "
            "makes every score too good. Take them out of one of the two.",
        )


class _TaskEvaluation:
    """All methods on one task."""

    def __init__(
        self,
        policy: LoHpPolicy,
        encoder: TextEncoder,
        task: Task,
        config: EvaluationConfig,
        generation: GenerationConfig,
    ) -> None:
        self.policy, self.encoder, self.task, self.config, self.generation = policy, encoder, task, config, generation
        test = task.split("test")
        if config.max_test is not None and len(test) > config.max_test:
            test = draw(test, max(1, config.max_test // test.n_classes), config.seed)
        self.test, self.encoded_test = test, encoder.prepare(test.texts, test.texts_b)
        self.reference: Any = policy.reference_set  # there where one of the methods needs it, see `_possible`
        self.encoded_for_adamw: EncodedTexts | None = None
        self.embedded: dict[bytes, Tensor] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in config.methods}

    def run_draw(self, number: int) -> None:
        """Draw a support set and score every method on it."""
        seed = self.config.seed + number
        support = self.task.draw_support(self.config.shots, seed).distinct()  # as a generation reads it
        for name in self.config.methods:
            start = time.perf_counter()
            if name == "adamw":
                baseline = AdamWBaseline(
                    self.encoder.base_model,
                    self.encoder.tokenizer,
                    self.policy,
                    learning_rate=self.config.adamw_learning_rate,
                    steps=self.config.adamw_steps,
                    dtype=torch.bfloat16 if self.config.adamw_mixed_precision == "bf16" else None,
                    head=self.generation.head,
                )
                ((adapted, head),) = baseline.fit(support, seed)
                seconds, extra = time.perf_counter() - start, {"optimizer_steps": self.config.adamw_steps}
                with torch.no_grad():
                    features = adapted.embed(self._test_of(adapted))
            elif name == "generated":
                result = generate_adapters(
                    self.policy,
                    self.encoder.base_model,
                    self.encoder.tokenizer,
                    [support],
                    self.generation,
                    encoder=self.encoder,
                )[0]
                seconds, head, report = time.perf_counter() - start, result.head, result.report
                extra = {
                    "chosen": report.chosen,
                    "nearest_adapter": report.nearest_adapter,
                    "nearest_adapter_distance": report.nearest_adapter_distance,
                }
                features = self._embed_test(result.state)
            else:
                state, head, extra = self._conditioned(name, support, seed)
                seconds = time.perf_counter() - start
                features = self._embed_test(state)
            self.rows[name].append({**scores(head, features, self.test), "seconds": seconds, **extra})

    def _test_of(self, adapted: TextEncoder) -> EncodedTexts:
        """The test texts as far as the frozen layers below the adapter, in AdamW's precision."""
        if adapted.dtype == self.encoder.dtype:
            return self.encoded_test
        if self.encoded_for_adamw is None:
            self.encoded_for_adamw = adapted.prepare(self.test.texts, self.test.texts_b)
        return self.encoded_for_adamw

    @torch.no_grad()
    def _conditioned(self, name: str, support: Examples, seed: int) -> tuple[Tensor, Head, dict[str, Any]]:
        """State, head and notes of a method that only differs in where its adapter comes from."""
        policy, reference = self.policy, self.reference
        extra: dict[str, Any] = {}
        encoded = self.encoder.prepare(support.texts, support.texts_b)
        zero = policy.scale.new_zeros(tuple(policy.space.shape))
        if name == "none":
            return zero, self._head(encoded, zero, support), extra
        if name == "mean_adapter":
            state = reference.mean_state()
            return state, self._head(encoded, state, support), extra
        statistics = self.encoder.statistics(encoded)
        labels = support.targets
        if name == "shuffled_labels":
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
        features = task_features(statistics, labels, support.n_classes, policy.reference_tensors())
        if name == "nearest_adapter":
            index = reference.nearest(features)
            state, extra = reference.states[index], {"task": reference.names[index]}
        else:
            if name == "wrong_task":
                index = reference.wrong_task(self.task.family, self.task.name, seed, reference.nearest(features))
                features, extra = reference.task_features(index), {"task": reference.names[index]}
            optimizer = policy.optimizer_index(self.generation.optimizer, 1)
            steps = self.generation.policy_steps
            state = rollout(policy, TaskFeatures.stack([features]), optimizer=optimizer, policy_steps=steps)[0, -1]
        return state, self._head(encoded, state, support), extra

    def _head(self, encoded: EncodedTexts, state: Tensor, support: Examples) -> Head:
        embeddings = self.encoder.embed(encoded, state[None] if state.any() else None)
        config, kind = self.policy.config, self.generation.head or self.policy.config.head
        return solve_head(embeddings, support.targets, support.n_classes, kind, ridge=config.ridge)

    @torch.no_grad()
    def _embed_test(self, state: Tensor) -> Tensor:
        """Test embeddings under an adapter; the same adapter is run once."""
        key = state.numpy(force=True).tobytes()
        if key not in self.embedded:
            self.embedded[key] = self.encoder.embed(self.encoded_test, state[None] if state.any() else None)
        return self.embedded[key]

    def summary(self) -> dict[str, Any]:
        """Scores by method."""
        found = {}
        for name, rows in self.rows.items():
            found[name] = {
                "accuracy": fmean(row["accuracy"] for row in rows),
                "macro_f1": fmean(row["macro_f1"] for row in rows),
                "per_draw": [row["accuracy"] for row in rows],
                "seconds": median(row["seconds"] for row in rows),
            }
            others = {key for row in rows for key in row} - {"accuracy", "macro_f1", "seconds"}
            found[name] |= {key: [row.get(key) for row in rows] for key in sorted(others)}
        return found


def scores(head: Head, features: Tensor, examples: Examples) -> dict[str, float]:
    """Accuracy and macro-averaged F1 (over the classes that occur), in 0..1."""
    predicted, targets = head.logits(features).argmax(-1).cpu(), examples.targets
    f1 = []
    for label in targets.unique():
        hit = ((predicted == label) & (targets == label)).sum()
        f1.append(float(2 * hit / ((predicted == label).sum() + (targets == label).sum())))
    return {"accuracy": float((predicted == targets).float().mean()), "macro_f1": fmean(f1)}


def mean_scores(results: Mapping[str, Mapping[str, Mapping[str, Any]]], method: str, entry: str = "accuracy") -> float:
    """Mean of a method's score over tasks."""
    return fmean(float(scores[method][entry]) for scores in results.values() if method in scores)

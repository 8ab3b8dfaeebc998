"""Does the adapter depend on the labels? The same texts, labelled by class and by domain: `python benchmarks/contrast.py`.

Three held-out domains are pooled. `ours` is the policy's raw rollout; `ours_swapped` is conditioned on the same support
texts under the *other* labeling, while head and scores keep the true labels. The floor is one unconditional adapter
trained through the base model on both labelings of the training domains, the ceiling a specialist for each labeling;
`wrong_specialist` is the other labeling's.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from setting import RESULTS, describe_policy, encoder_of, environment, load_base_model, load_subject, write_json
from text_suite import CONTRAST_TEST, CONTRAST_TRAINING, CONTRAST_VALIDATION, load_tasks
from torch import Tensor

from lohp_peft.policy import rollout
from lohp_peft.tasks import (
    EpisodeSampler,
    Examples,
    TaskBank,
    TaskFeatures,
    TextEncoder,
    contrast_groups,
    draw,
    solve_head,
    task_features,
)

LABELINGS = ("class", "domain")
STATES = {"floor": LABELINGS, "specialist_class": ("class",), "specialist_domain": ("domain",)}


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
        return draw(self.train, per_cell, seed)


def pool(names: Sequence[str], max_test: int, seed: int = 0) -> Pool:
    """Pool domains with one label set; as many test rows from every cell."""
    tasks = load_tasks(names)
    groups = contrast_groups(tasks)
    if groups != [list(names)]:
        raise SystemExit(f"The domains {', '.join(names)} must share their label names; groups that do: {groups}.")
    classes = tasks[0].examples.n_classes
    sides = []
    for split in ("train", "test"):
        parts = [task.split(split) for task in tasks]
        cells = [i * classes + y for i, part in enumerate(parts) for y in part.labels]
        texts = tuple(text for part in parts for text in part.texts)
        sides.append(Examples(texts, tuple(cells), tuple(map(str, range(len(tasks) * classes)))))
    smallest = int(torch.bincount(sides[1].targets).min())
    test = draw(sides[1], min(smallest, max_test // (len(tasks) * classes)), seed)
    return Pool(sides[0], test, len(tasks), classes)


class Scorer:
    """Accuracy on a pool's test rows for states, support sets and labelings."""

    def __init__(self, policy, encoder: TextEncoder, pool: Pool) -> None:
        self.policy, self.encoder, self.pool = policy, encoder, pool
        self.test = encoder.prepare(pool.test.texts)

    @torch.no_grad()
    def generated(self, support: Examples, labeling: str) -> Tensor:
        """The raw rollout, conditioned on one labeling of the support texts."""
        statistics = self.encoder.statistics(self.encoder.prepare(support.texts))
        labels = self.pool.labels(support.targets, labeling)
        features = task_features(statistics, labels, self.pool.size(labeling), self.policy.reference_tensors())
        return rollout(self.policy, TaskFeatures.stack([features]))[0, -1]

    @torch.no_grad()
    def accuracy(self, state: Tensor, support: Examples, labeling: str) -> float:
        """Head solved on the support set with the true labels, scored on the test rows."""
        config, states = self.policy.config, state[None] if state.any() else None
        labels = self.pool.labels(support.targets, labeling)
        x = self.encoder.embed(self.encoder.prepare(support.texts), states)
        head = solve_head(x, labels, self.pool.size(labeling), config.head, ridge=config.ridge)
        predicted = head.logits(self.encoder.embed(self.test, states)).argmax(-1)
        return float((predicted == self.pool.labels(self.pool.test.targets, labeling)).float().mean())


def train_states(policy, encoder: TextEncoder, validation: Scorer, options, advance) -> dict[str, dict]:
    """Floor and specialists: states trained by AdamW through the base model, each kept where it validates best."""
    wanted = load_tasks(CONTRAST_TEST[:1])[0].examples.label_names
    tasks = [task for group in CONTRAST_TRAINING for task in load_tasks(group)]
    tasks = [task for task in tasks if task.examples.label_names == wanted]
    names = {task.name for task in tasks}
    groups = [group for group in CONTRAST_TRAINING if names.issuperset(group)]
    bank = TaskBank(encoder, rows_per_task=options.rows_per_task)
    for task in tasks:
        bank.add(task)
    sampler = EpisodeSampler(bank.labels, groups)
    return {name: _train(policy, bank, sampler, groups, STATES[name], validation, options, advance) for name in STATES}


def _train(policy, bank, sampler, groups, labelings, validation: Scorer, options, advance) -> dict:
    state = torch.zeros(tuple(policy.space.shape), requires_grad=True)
    optimizer = torch.optim.AdamW([state], lr=options.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    supports = {
        name: [validation.pool.draw(options.shots, name, seed) for seed in range(options.validation_draws)]
        for name in labelings
    }
    best = {"validation_accuracy": -1.0, "step": 0, "state": state.detach().clone()}
    for step in range(options.steps + 1):
        if step % options.validate_every == 0 or step == options.steps:
            each = [validation.accuracy(state.detach(), s, name) for name in labelings for s in supports[name]]
            if fmean(each) > best["validation_accuracy"]:
                best = {"validation_accuracy": fmean(each), "step": step, "state": state.detach().clone()}
        if step == options.steps:
            break
        episodes = []
        for _ in range(options.episodes):
            group = groups[int(torch.randint(len(groups), (), generator=generator))]
            by_task = labelings[int(torch.randint(len(labelings), (), generator=generator))] == "domain"
            episodes.append(sampler.contrast_episode(group, by_task, generator))
        for parameters in optimizer.param_groups:
            parameters["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        states = state.expand(len(episodes), 1, *state.shape)
        settings = {"head": policy.config.head, "ridge": policy.config.ridge, "calibrated": True}
        losses, _ = bank.episode_losses(episodes, states, **settings)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        advance()
    return best


def evaluate(scorer: Scorer, trained: dict[str, dict], options, advance) -> dict[str, dict[str, dict]]:
    """Accuracies by labeling and method, over draws."""
    zero = torch.zeros(tuple(scorer.policy.space.shape))
    results = {}
    for labeling in LABELINGS:
        (other,) = set(LABELINGS) - {labeling}
        rows: dict[str, list[float]] = {}
        for seed in range(options.draws):
            support = scorer.pool.draw(options.shots, labeling, seed)
            states = {
                "none": zero,
                "floor": trained["floor"]["state"],
                "ours": scorer.generated(support, labeling),
                "ours_swapped": scorer.generated(support, other),
                "specialist": trained[f"specialist_{labeling}"]["state"],
                "wrong_specialist": trained[f"specialist_{other}"]["state"],
            }
            for name, state in states.items():
                rows.setdefault(name, []).append(scorer.accuracy(state, support, labeling))
            advance()
        results[labeling] = {
            name: {
                "accuracy": fmean(values),
                "standard_error": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
                "per_draw": values,
            }
            for name, values in rows.items()
        }
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--shots", type=int, default=12, help="support texts per class, balanced over domain x class")
    parser.add_argument("--draws", type=int, default=10, help="support sets per labeling")
    parser.add_argument("--max-test", type=int, default=500, help="most test texts, balanced over domain x class")
    parser.add_argument("--steps", type=int, default=150, help="AdamW steps of floor and specialists")
    parser.add_argument("--episodes", type=int, default=4, help="episodes in such a step")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of those steps, falling as a cosine")
    parser.add_argument("--rows-per-task", type=int, default=300, help="texts kept of each training domain")
    parser.add_argument("--validate-every", type=int, default=25, help="steps between validations")
    parser.add_argument("--validation-draws", type=int, default=4, help="support sets per labeling in a validation")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="which held-out domains")
    parser.add_argument("--output", type=Path, help="result file; results/contrast[_validation].json by default")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    policy, model, tokenizer = load_subject(options.policy, options.base_model)
    encoder = encoder_of(policy, model, tokenizer)
    training = encoder_of(
        policy,
        load_base_model(options.base_model, "eager")[0],
        tokenizer,
        torch.bfloat16 if options.bf16 else None,
    )
    names = CONTRAST_TEST if options.split == "test" else CONTRAST_VALIDATION
    validation = Scorer(policy, encoder, pool(CONTRAST_VALIDATION, options.max_test))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("floor and specialists", total=len(STATES) * options.steps)
        trained = train_states(policy, training, validation, options, lambda: progress.advance(bar))
        bar = progress.add_task("support draws", total=len(LABELINGS) * options.draws)
        scorer = Scorer(policy, encoder, pool(names, options.max_test))
        results = evaluate(scorer, trained, options, lambda: progress.advance(bar))
    settings = {key: value for key, value in vars(options).items() if key not in ("policy", "base_model", "output")}
    default = RESULTS / ("contrast.json" if options.split == "test" else "contrast_validation.json")
    result = {
        "benchmark": "contrast",
        "settings": {
            **settings,
            "domains": names,
            "policy": describe_policy(policy),
            "test_texts": len(scorer.pool.test),
        },
        "environment": environment(),
        "minutes": (time.perf_counter() - start) / 60,
        "trained": {
            name: {key: value for key, value in entry.items() if key != "state"} for name, entry in trained.items()
        },
        "labelings": results,
    }
    write_json(options.output or default, result)
    for labeling, methods in results.items():
        print(labeling, {name: round(100 * row["accuracy"], 1) for name, row in methods.items()})


if __name__ == "__main__":
    main()

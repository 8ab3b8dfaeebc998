"""Does the adapter depend on the labels? The same texts, labelled by class and by domain: `python benchmarks/contrast.py WORK_FOLDER`.

Domains that share their classes are pooled, in several pairs of labelings (`text_suite.CONTRAST_PAIRS`): `sentiment` of
reviews of three products, `stance` towards two targets, `sarcasm` of two sites. `ours` is the policy's raw rollout;
`ours_swapped` is conditioned on the same support texts under the *other* labeling, while head and scores keep the true
labels. The floor is one unconditional adapter trained through the base model on both labelings of the training domains,
the mark to reach is a specialist for each labeling; `wrong_specialist` is the other labeling's.

No test domain was trained on, but `stance_feminist` and `sarcasm_reddit` are validation tasks: the policy's settings were
chosen with their help. `stance` and `sarcasm` have no further domains for choosing the step of floor and specialists:
it is chosen on split test of their training domains. Every finished pair is a file in the work folder, so a run that was
stopped is continued by the same command; the result holds all pairs that the folder has.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from setting import (
    RESULTS,
    check_settings,
    describe_policy,
    encoder_of,
    environment,
    load_base_model,
    load_subject,
    write_json,
)
from text_suite import CONTRAST_PAIRS, ContrastPair, load_tasks
from torch import Tensor

from lohp_peft.policy import rollout
from lohp_peft.tasks import (
    EpisodeSampler,
    Examples,
    Task,
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
POINT = 0.01
"""Specialists are told apart, and shares of a distance taken, from here."""


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
        fewest = int(self.train.targets.bincount().min())
        if per_cell > fewest:
            raise SystemExit(
                f"--shots {shots} takes {per_cell} texts of each domain and class; one has only {fewest}."
            )
        return draw(self.train, per_cell, seed)

    def accuracy(self, predicted: Tensor, labeling: str) -> float:
        """Accuracy of labels predicted for the test rows; every cell counts alike, however many rows it has."""
        cells = self.test.targets
        right = (predicted == self.labels(cells, labeling)).double()
        return float(torch.stack([right[cells == cell].mean() for cell in cells.unique()]).mean())


def load_domains(names: Sequence[str]) -> list[Task]:
    """Tasks that share their classes, without the texts that more than one of them has: they have no domain."""
    tasks = load_tasks(names)
    groups = contrast_groups(tasks)
    if groups != [list(names)]:
        raise SystemExit(f"The domains {', '.join(names)} must share their label names; groups that do: {groups}.")
    owners = Counter(text for task in tasks for text in set(task.examples.texts))
    kept = [[i for i, text in enumerate(task.examples.texts) if owners[text] == 1] for task in tasks]
    return [
        replace(task, examples=task.examples.select(rows), splits=tuple(task.splits[i] for i in rows))
        for task, rows in zip(tasks, kept, strict=True)
    ]


def pool(names: Sequence[str], max_test: int, trained_on: bool = False, seed: int = 0) -> Pool:
    """Pool domains with one label set; as many test rows from every cell, or all that it has.

    Of domains that were trained on, both sides are of split test, which training does not see: half of every cell each.
    """
    tasks = load_domains(names)
    classes = tasks[0].examples.n_classes
    count = len(tasks) * classes
    if max_test < count:
        raise SystemExit(f"--max-test must be at least {count}, one of each domain and class, got {max_test}.")

    def pooled(split: str) -> Examples:
        parts = [task.split(split) for task in tasks]
        cells = [i * classes + y for i, part in enumerate(parts) for y in part.labels]
        texts = tuple(text for part in parts for text in part.texts)
        return Examples(texts, tuple(cells), tuple(map(str, range(count))))

    test = pooled("test")
    if trained_on:
        rows = [(test.targets == cell).nonzero().flatten() for cell in range(count)]
        train, test = [test.select(torch.cat([each[side::2] for each in rows])) for side in (0, 1)]
    else:
        train = pooled("train")
    return Pool(train, draw(test, max_test // count, seed), len(tasks), classes)


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
        return self.pool.accuracy(predicted, labeling)


def train_states(
    policy, encoder: TextEncoder, pair: ContrastPair, validation: Scorer, options, advance
) -> dict[str, dict]:
    """Floor and specialists: states trained by AdamW through the base model, each kept where it validates best."""
    groups = pair.training
    bank = TaskBank(encoder, rows_per_task=options.rows_per_task)
    for group in groups:
        for task in load_domains(group):
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


def differences(accuracy: Mapping[str, float]) -> dict[str, float]:
    """What the methods' accuracies say of ours and of the specialists."""
    return {
        "ours_minus_floor": accuracy["ours"] - accuracy["floor"],
        "ours_minus_swapped": accuracy["ours"] - accuracy["ours_swapped"],
        "specialist_minus_wrong": accuracy["specialist"] - accuracy["wrong_specialist"],
    }


def summarise(pairs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The pairs with the differences of each labeling, and means over all labelings.

    The share of the way from floor to specialist is given where it is a point or more; of all labelings, it is the sum of
    ours minus floor over the sum of specialist minus floor, over the labelings where that is above 0.
    """
    made, accuracies = {}, []
    for name, pair in pairs.items():
        derived = {}
        for labeling, methods in pair["labelings"].items():
            accuracy = {method: row["accuracy"] for method, row in methods.items()}
            accuracies.append(accuracy)
            found, way = differences(accuracy), accuracy["specialist"] - accuracy["floor"]
            derived[labeling] = {
                **found,
                "share_of_the_way": found["ours_minus_floor"] / way if way >= POINT else None,
            }
        made[name] = {**pair, "derived": derived}
    means = {method: fmean(accuracy[method] for accuracy in accuracies) for method in accuracies[0]}
    ways = [(a["ours"] - a["floor"], a["specialist"] - a["floor"]) for a in accuracies if a["specialist"] > a["floor"]]
    overall = {
        "labelings": len(accuracies),
        "specialists_differ": sum(differences(a)["specialist_minus_wrong"] >= POINT for a in accuracies),
        "accuracy": means,
        **differences(means),
        "share_of_the_way": sum(gone for gone, _ in ways) / sum(way for _, way in ways) if ways else None,
    }
    return {"pairs": made, "overall": overall}


def measure(
    name: str, pools: tuple[Pool, Pool], policy, encoder: TextEncoder, training: TextEncoder, options
) -> dict[str, Any]:
    """Train floor and specialists of one pair, and score it."""
    start = time.perf_counter()
    validation, scorer = (Scorer(policy, encoder, each) for each in pools)
    pair, cells = CONTRAST_PAIRS[name], scorer.pool.test.targets
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{name}: floor and specialists", total=len(STATES) * options.steps)
        trained = train_states(policy, training, pair, validation, options, lambda: progress.advance(bar))
        bar = progress.add_task(f"{name}: support draws", total=len(LABELINGS) * options.draws)
        labelings = evaluate(scorer, trained, options, lambda: progress.advance(bar))
    return {
        "domains": pair.test if options.split == "test" else pair.validation,
        "validation": {"domains": pair.validation, "trained_on": pair.validation in pair.training},
        "test_texts": len(cells),
        "fewest_test_texts_of_domain_and_class": int(cells.bincount().min()),
        "minutes": (time.perf_counter() - start) / 60,
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "trained": {
            state: {key: value for key, value in entry.items() if key != "state"} for state, entry in trained.items()
        },
        "labelings": labelings,
    }


def pools_of(pair: ContrastPair, options) -> tuple[Pool, Pool]:
    """The pool that steps are chosen on and the one that is scored, after trying the support draws of both."""
    validation = pool(pair.validation, options.max_test, pair.validation in pair.training)
    test = pool(pair.test, options.max_test) if options.split == "test" else validation
    for each in (validation, test):
        for labeling in LABELINGS:
            each.draw(options.shots, labeling, 0)
    return validation, test


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished pairs")
    parser.add_argument("--pairs", nargs="+", choices=CONTRAST_PAIRS, default=list(CONTRAST_PAIRS))
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
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="the pools scored, or those steps are chosen on",
    )
    parser.add_argument("--output", type=Path, help="result file; results/contrast[_validation].json by default")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    policy, model, tokenizer = load_subject(options.policy, options.base_model)
    apart = ("work", "pairs", "policy", "base_model", "threads", "output")
    settings = {key: value for key, value in vars(options).items() if key not in apart}
    settings["policy"] = describe_policy(policy)
    check_settings(options.work, settings)
    files = {name: options.work / f"{name}.json" for name in CONTRAST_PAIRS}
    pending = [name for name in options.pairs if not files[name].exists()]
    print(f"{len(options.pairs) - len(pending)} of {len(options.pairs)} pairs are done already", flush=True)
    if pending:
        pools = {name: pools_of(CONTRAST_PAIRS[name], options) for name in pending}  # fails before anything is trained
        encoder, dtype = encoder_of(policy, model, tokenizer), torch.bfloat16 if options.bf16 else None
        training = encoder_of(policy, load_base_model(options.base_model, "eager")[0], tokenizer, dtype)
        for name in pending:
            write_json(files[name], measure(name, pools[name], policy, encoder, training, options))
    pairs = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    result = {"benchmark": "contrast", "settings": settings, "environment": environment(), **summarise(pairs)}
    missing = [name for name in CONTRAST_PAIRS if name not in pairs]
    if missing and options.output is None:
        print(f"No result file: {', '.join(missing)} not measured. Give --output to write one.")
    else:
        default = RESULTS / ("contrast.json" if options.split == "test" else "contrast_validation.json")
        write_json(options.output or default, result)
    for name, pair in pairs.items():
        for labeling, methods in pair["labelings"].items():
            print(f"{name} by {labeling}", {key: round(100 * row["accuracy"], 1) for key, row in methods.items()})


if __name__ == "__main__":
    main()

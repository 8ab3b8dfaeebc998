"""Does the adapter depend on the labels? The same texts, labelled by class and by domain: `python benchmarks/contrast.py WORK_FOLDER`.

Domains that share their classes are pooled, in several pairs of labelings (`text_suite.CONTRAST_PAIRS`): `sentiment` of
reviews of three products, `stance` towards two targets, `sarcasm` of two sites. `ours` is the policy's raw rollout;
`ours_swapped` is conditioned on the same support texts under the *other* labeling, while head and scores keep the true
labels. The floor is one unconditional adapter trained through the base model on both labelings of the training domains,
the mark to reach is a specialist for each labeling; `wrong_specialist` is the other labeling's. `mean` is that of the training
tasks' adapters, `multi_task` the adapter that `compare.py` trained on all of them with that seed (`--fits`, in the policy's
weight space), both the same for all pairs.

No test domain was trained on, but `stance_feminist` and `sarcasm_reddit` are validation tasks: the policy's settings were
chosen with their help. `stance` and `sarcasm` have no further domains for choosing the step of floor and specialists:
it is chosen on split test of their training domains. Every finished pair is a file in the work folder, so a run that was
stopped is continued by the same command, and `multi_task` can be added later. Further training seeds, `--policy OTHER --seed 1`,
are further files; support sets are the same for all. The result holds all pairs and seeds that the folder has.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from contrasted import over_seeds, standard_error, summarise
from pools import Pool, load_domains, pool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from setting import (
    check_settings,
    describe_policy,
    encoder_of,
    environment,
    load_base_model,
    load_subject,
    of_split,
    result_file,
    seeds_of,
    write_json,
)
from text_suite import CONTRAST_PAIRS, ContrastPair
from torch import Tensor

from lohp_peft.policy import rollout
from lohp_peft.tasks import (
    EpisodeSampler,
    Examples,
    TaskBank,
    TaskFeatures,
    TextEncoder,
    solve_head,
    task_features,
)

LABELINGS = ("class", "domain")
StatesOf = Callable[[Examples, str], dict[str, Tensor]]
"""By name the adapters that are scored on a support set under one labeling."""
STATES = {"floor": LABELINGS, "specialist_class": ("class",), "specialist_domain": ("domain",)}


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
    generator = torch.Generator().manual_seed(options.seed)
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


def common_states(policy, fits: Path | None, seed: int) -> dict[str, Tensor]:
    """Adapters that are the same for all pairs."""
    states = {"mean": policy.reference_set.mean_state()}
    if fits is not None:
        states["multi_task"] = policy.scale * load_file(fits / f"multi_task-{seed}.safetensors")["state"]
    return states


def states_of_pair(scorer: Scorer, trained: dict[str, dict]) -> StatesOf:
    """Those of one pair, some of them generated from the support set."""

    def states(support: Examples, labeling: str) -> dict[str, Tensor]:
        (other,) = set(LABELINGS) - {labeling}
        return {
            "none": torch.zeros(tuple(scorer.policy.space.shape)),
            "floor": trained["floor"]["state"],
            "ours": scorer.generated(support, labeling),
            "ours_swapped": scorer.generated(support, other),
            "specialist": trained[f"specialist_{labeling}"]["state"],
            "wrong_specialist": trained[f"specialist_{other}"]["state"],
        }

    return states


def evaluate(scorer: Scorer, states_of: StatesOf, options, advance) -> dict[str, dict[str, dict]]:
    """Accuracies by labeling and method, over draws."""
    results = {}
    for labeling in LABELINGS:
        rows: dict[str, list[float]] = {}
        for seed in range(options.draws):
            support = scorer.pool.draw(options.shots, labeling, seed)
            for name, state in states_of(support, labeling).items():
                rows.setdefault(name, []).append(scorer.accuracy(state, support, labeling))
            advance()
        results[labeling] = {
            name: {"accuracy": fmean(values), "standard_error": standard_error(values), "per_draw": values}
            for name, values in rows.items()
        }
    return results


def lacking_of(file: Path, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapters that a finished pair has not scored yet."""
    scored = json.loads(file.read_text())["labelings"][LABELINGS[0]]
    return {name: state for name, state in states.items() if name not in scored}


def add_states(file: Path, states: dict[str, Tensor], scorer: Scorer, options) -> None:
    """Score further adapters on a finished pair."""
    pair = json.loads(file.read_text())
    for labeling, rows in evaluate(scorer, lambda *_: states, options, lambda: None).items():
        pair["labelings"][labeling] |= rows
    write_json(file, pair)


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
        labelings = evaluate(scorer, states_of_pair(scorer, trained), options, lambda: progress.advance(bar))
    return {
        "domains": pair.test if options.split == "test" else pair.validation,
        "validation": {"domains": pair.validation, "trained_on": pair.validation in pair.training},
        "test_texts": len(cells),
        "fewest_test_texts_of_domain_and_class": int(cells.bincount().min()),
        "seed": options.seed,
        "policy": describe_policy(policy),
        "minutes": (time.perf_counter() - start) / 60,
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "trained": {
            state: {key: value for key, value in entry.items() if key != "state"} for state, entry in trained.items()
        },
        "labelings": labelings,
    }


def check_policy(files: Sequence[Path], seed: int, policy: Mapping[str, Any]) -> None:
    """One policy for all pairs of a seed."""
    if others := sorted(file.name for file in files if json.loads(file.read_text())["policy"] != policy):
        raise SystemExit(f"{', '.join(others)} hold seed {seed} of another policy; give another seed or work folder.")


def pools_of(pair: ContrastPair, options) -> tuple[Pool, Pool]:
    """The pool that steps are chosen on and the one that is scored, after trying the support draws of both."""
    validation = pool(pair.validation, options.max_test, pair.validation in pair.training)
    test = pool(pair.test, options.max_test) if options.split == "test" else validation
    for each in (validation, test):
        for labeling in LABELINGS:
            each.draw(options.shots, labeling, 0)
    return validation, test


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished pairs")
    parser.add_argument("--pairs", nargs="+", choices=CONTRAST_PAIRS, default=list(CONTRAST_PAIRS))
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--seed", type=int, default=0, help="of floor and specialists; a policy of its own for each")
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
    parser.add_argument("--fits", type=Path, help="trainings of compare.py with this policy, for the row multi_task")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="the pools scored, or those steps are chosen on",
    )
    parser.add_argument("--output", type=Path, help="result file; results/contrast[_validation].json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    policy, model, tokenizer = load_subject(options.policy, options.base_model)
    apart = ("work", "pairs", "policy", "seed", "base_model", "fits", "threads", "output")
    settings = {key: value for key, value in vars(options).items() if key not in apart}
    check_settings(options.work, settings)
    files = {name: options.work / f"{name}-{options.seed}.json" for name in CONTRAST_PAIRS}
    pending = [name for name in options.pairs if not files[name].exists()]
    check_policy([file for file in files.values() if file.exists()], options.seed, describe_policy(policy))
    print(f"{len(options.pairs) - len(pending)} of {len(options.pairs)} pairs are done already", flush=True)
    common = common_states(policy, options.fits, options.seed)
    lacking = {name: common if name in pending else lacking_of(files[name], common) for name in options.pairs}
    unfinished = [name for name, states in lacking.items() if states]
    if unfinished:
        # All of them first, which fails before anything is trained.
        pools = {name: pools_of(CONTRAST_PAIRS[name], options) for name in unfinished}
        encoder, dtype = encoder_of(policy, model, tokenizer), torch.bfloat16 if options.bf16 else None
        training = encoder_of(policy, load_base_model(options.base_model, "eager")[0], tokenizer, dtype)
        for name in unfinished:
            if name in pending:
                write_json(files[name], measure(name, pools[name], policy, encoder, training, options))
            add_states(files[name], lacking[name], Scorer(policy, encoder, pools[name][1]), options)
    found = {name: runs for name in CONTRAST_PAIRS if (runs := seeds_of(options.work, name))}
    settings["policy"] = next(iter(found.values()))[0]["policy"]
    summary = summarise({name: over_seeds(runs) for name, runs in found.items()})
    result = {"benchmark": "contrast", "settings": settings, "environment": environment(), **summary}
    whole = len(found) == len(files) and len({tuple(run["seed"] for run in runs) for runs in found.values()}) == 1
    if target := result_file(of_split("contrast", options.split), options.output, whole):
        write_json(target, result)
    for name, pair in summary["pairs"].items():
        for labeling, methods in pair["labelings"].items():
            print(f"{name} by {labeling}", {key: round(100 * row["accuracy"], 1) for key, row in methods.items()})


if __name__ == "__main__":
    main()

"""Tasks of families that no training task belongs to: `python benchmarks/transfer.py WORK_FOLDER`.

The families of the text suite are left out in five folds. For each fold both stages run anew on the other families' tasks
(bases, recordings, policy; less of each than the shipped policy had), then the policy and its baselines are scored on the
families left out, as `compare.py` does. `--seeds` are training seeds of policy and multi-task adapter; bases and recordings
are the same for all of them. A run that was stopped is continued by the same command; folds run on `--processes`. Every
finished fold and seed is a file in the work folder, and the result holds the seeds that all its folds have. The question
is whether it pays where nothing like the task was trained, and whether it ever does harm.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import compare
import torch
from setting import check_settings, environment, mean_of_seeds, result_file, seeds_of, with_interval, write_json
from shipped_policy import prepare, train
from splits import TRANSFER_FOLDS, families

METHODS = ("none", "mean", "multi_task", "multi_task_steps", "ours_raw", "ours", "ours_steps")
OURS = ("ours", "ours_steps")
AGAINST = ("none", "mean", "multi_task", "multi_task_steps")


def file_of(work: Path, fold: int, seed: int) -> Path:
    """What is kept of a fold's seed."""
    return work / f"fold_{fold}-{seed}.json"


def record(fold: int, options: argparse.Namespace) -> int:
    """Stage 1 of one fold, for all seeds; what is there already is not done again."""
    trajectories = options.work / f"fold_{fold}" / "trajectories"
    if not (trajectories / "cost.json").exists():
        torch.set_num_threads(options.threads)
        split, base = ["--split", f"transfer_{fold}"], ["--base-model", options.base_model]
        prepare.main([str(trajectories), *split, *base, "--optimizers", *options.optimizers])
    return fold


def learn_and_score(fold: int, seed: int, options: argparse.Namespace) -> int:
    """Stage 2, the multi-task adapter and the scores of one fold with one training seed."""
    torch.set_num_threads(options.threads)
    work, split = options.work / f"fold_{fold}", ["--split", f"transfer_{fold}"]
    base = ["--base-model", options.base_model]
    trajectories, policy, result = work / "trajectories", work / f"policy-{seed}", work / f"result-{seed}.json"
    if not (policy / "cost.json").exists():
        learning = {
            "batch_size": options.episodes,
            "cloning_steps": options.cloning_steps,
            "training_steps": options.training_steps,
            "validate_every": max(1, options.training_steps // 2),
            "validation_episodes": options.validation_episodes,
            "seed": seed,
        }
        settings = [f"{key}={value}" for key, value in learning.items()]
        train.main([str(trajectories), str(policy), *settings, *split, *base])
    scores = ["--methods", *METHODS, "--controls", "--shots", str(options.shots), "--draws", str(options.draws)]
    scores += ["--max-test", str(options.max_test), "--threads", str(options.threads), "--output", str(result)]
    scores += ["--steps", str(options.training_steps), "--episodes", str(options.episodes), "--seeds", str(seed)]
    scores += ["--validation-episodes", str(options.validation_episodes), "--policy", str(policy)]
    compare.main([str(work / f"compare-{seed}"), *split, *base, *scores])
    found = json.loads(result.read_text())
    minutes = {
        stage.name: json.loads((stage / "cost.json").read_text())["minutes"] for stage in (trajectories, policy)
    }
    kept = {
        "families": TRANSFER_FOLDS[fold],
        "seed": seed,
        "policy": found["settings"]["policy"],
        "minutes": {
            "trajectories": minutes[trajectories.name],
            "policy": minutes[policy.name],
            "multi_task": found["trained"][f"multi_task-{seed}"]["minutes"],
        },
        "environment": found["environment"],
        "tasks": {name: {key.split("/")[0]: x for key, x in cells.items()} for name, cells in found["tasks"].items()},
    }
    write_json(file_of(options.work, fold, seed), kept)
    return fold


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks of one fold, every method's scores the mean over its training seeds, draw by draw."""

    def mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return mean_of_seeds(rows) | {key: fmean(row[key] for row in rows) for key in ("macro_f1", "seconds")}

    return {
        name: {method: mean([run["tasks"][name][method] for run in runs]) for method in METHODS}
        for name in runs[0]["tasks"]
    }


def differences(tasks: Iterable[dict[str, Any]], mine: str, other: str) -> dict[str, float]:
    """Mean over tasks of one method minus another, and its interval over the draws of all these tasks, paired."""
    pairs = [(task[mine], task[other]) for task in tasks]
    each = [fmean(a["per_draw"]) - fmean(b["per_draw"]) for a, b in pairs]
    drawn = [x - y for a, b in pairs for x, y in zip(a["per_draw"], b["per_draw"], strict=True)]
    return with_interval(each if len(each) >= 5 else drawn)


def summarise(tasks: dict[str, dict[str, Any]], of: dict[str, str]) -> dict[str, Any]:
    """Means by method over all tasks and by family, and ours minus the others.

    Intervals are over tasks; those of a family with fewer than five tasks over the draws of its tasks.
    """

    def row(names: Sequence[str]) -> dict[str, Any]:
        members = [tasks[name] for name in names]
        return {
            "tasks": len(names),
            "methods": {
                method: {
                    **{key: fmean(task[method][key] for task in members) for key in ("accuracy", "macro_f1")},
                    "accuracy_of_seeds": [
                        fmean(each)
                        for each in zip(*(task[method]["accuracy_of_seeds"] for task in members), strict=True)
                    ],
                }
                for method in METHODS
            },
            "differences": {
                f"{mine} - {other}": differences(members, mine, other) for mine in OURS for other in AGAINST
            },
        }

    by_family: dict[str, list[str]] = {}
    for name in tasks:
        by_family.setdefault(of[name], []).append(name)
    return {"all": row(list(tasks)), "families": {family: row(names) for family, names in by_family.items()}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished cells")
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(len(TRANSFER_FOLDS))))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds of policy and baseline")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], help="recorded")
    parser.add_argument("--cloning-steps", type=int, default=120)
    parser.add_argument("--training-steps", type=int, default=120, help="of ours after cloning, and of the baseline")
    parser.add_argument("--episodes", type=int, default=4, help="episodes in a training step")
    parser.add_argument("--validation-episodes", type=int, default=48)
    parser.add_argument("--shots", type=int, default=16, help="support examples per class")
    parser.add_argument("--draws", type=int, default=3, help="support sets per task")
    parser.add_argument("--max-test", type=int, default=300, help="most test rows per task")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--processes", type=int, default=1, help="folds at once, each process with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/transfer.json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that are started
    free = ("work", "folds", "seeds", "base_model", "processes", "threads", "output")
    settings = {key: value for key, value in vars(options).items() if key not in free}
    check_settings(options.work, settings)
    wanted = [(fold, seed) for seed in options.seeds for fold in options.folds]
    pending = [each for each in wanted if not file_of(options.work, *each).exists()]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for stage, jobs in (
            (
                "recordings",
                lambda: [pool.submit(record, fold, options) for fold in dict.fromkeys(fold for fold, _ in pending)],
            ),
            ("fold", lambda: [pool.submit(learn_and_score, *each, options) for each in pending]),
        ):
            started = jobs()
            for number, job in enumerate(as_completed(started), 1):
                print(f"[{stage} {number}/{len(started)}] {', '.join(TRANSFER_FOLDS[job.result()])}", flush=True)
    folds = {fold: runs for fold in range(len(TRANSFER_FOLDS)) if (runs := seeds_of(options.work, f"fold_{fold}"))}
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in folds.values()))
    if not seeds:
        raise SystemExit(
            f"No training seed is finished on all folds of {options.work}: {sorted(folds)}; run one on all."
        )
    folds = {fold: [run for run in runs if run["seed"] in seeds] for fold, runs in folds.items()}
    tasks = {name: task for runs in folds.values() for name, task in over_seeds(runs).items()}
    of_run = ("families", "seed", "policy", "minutes", "environment")
    result = {
        "benchmark": "transfer",
        "settings": settings | {"seeds": sorted(seeds)},
        "environment": environment(),
        "folds": [{key: run[key] for key in of_run} for runs in folds.values() for run in runs],
        **summarise(tasks, families()),
        "tasks": tasks,
    }
    whole = len(folds) == len(TRANSFER_FOLDS)
    if target := result_file("transfer", options.output, whole):
        write_json(target, result)
    for method, scores in result["all"]["methods"].items():
        print(f"{method:16} {100 * scores['accuracy']:5.1f} %")


if __name__ == "__main__":
    main()

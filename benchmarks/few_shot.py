"""Few-shot accuracy on the held-out tasks of the text suite: `python benchmarks/few_shot.py WORK_FOLDER`.

Every finished task is a file in the work folder, so a run that was stopped is continued by the same command.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from setting import (
    check_settings,
    describe_policy,
    environment,
    load_subject,
    of_split,
    result_file,
    with_interval,
    write_json,
)
from splits import split_of
from text_suite import load_tasks

from lohp_peft import EvaluationConfig, evaluate_tasks

COMPARED = (
    ("generated", "none"),
    ("generated", "mean_adapter"),
    ("generated", "nearest_adapter"),
    ("generated", "adamw"),
    ("generated_raw", "wrong_task"),
    ("generated_raw", "shuffled_labels"),
)
_subject: list[Any] = []


def start_process(policy: str, base_model: str, threads: int) -> None:
    """Load what every task of this process needs, once."""
    torch.set_num_threads(threads)
    _subject[:] = load_subject(policy, base_model)


def evaluate_one(name: str, config: EvaluationConfig, work: Path) -> str:
    """Score one task and write its file."""
    (task,) = load_tasks([name])
    results = evaluate_tasks(*_subject, [task], config=config, console=Console(quiet=True))
    about = {"family": task.family, "classes": task.examples.n_classes}
    write_json(work / f"{name}.json", {**about, "methods": results["tasks"][name]})
    return name


def summarise(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over tasks, and paired differences with their intervals."""
    names = list(next(iter(tasks.values()))["methods"])
    methods = {}
    for method in names:
        rows = [task["methods"][method] for task in tasks.values()]
        methods[method] = {
            "accuracy": fmean(row["accuracy"] for row in rows),
            "macro_f1": fmean(row["macro_f1"] for row in rows),
            "seconds": median(row["seconds"] for row in rows),
        }
    differences = {}
    for ours, other in COMPARED:
        if ours in names and other in names:
            each = [t["methods"][ours]["accuracy"] - t["methods"][other]["accuracy"] for t in tasks.values()]
            better = sum(difference > 0 for difference in each)
            differences[f"{ours} - {other}"] = {**with_interval(each), "tasks_better": better}
    return {"methods": methods, "differences": differences}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the finished tasks")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="which held-out tasks")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="these tasks instead of the whole split")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--shots", type=int, default=16, help="support examples per class")
    parser.add_argument("--draws", type=int, default=3, help="support sets per task")
    parser.add_argument("--max-test", type=int, help="most test rows per task; all by default")
    parser.add_argument("--adamw-steps", type=int, default=EvaluationConfig().adamw_steps)
    parser.add_argument("--adamw-learning-rate", type=float, default=EvaluationConfig().adamw_learning_rate)
    parser.add_argument("--adamw-bf16", action="store_true", help="AdamW in bfloat16: faster on most machines")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=EvaluationConfig().methods,
        default=EvaluationConfig().methods,
        help="which methods",
    )
    parser.add_argument("--processes", type=int, default=1, help="tasks at once, each process with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/few_shot[_validation].json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that are started
    config = EvaluationConfig(
        shots=options.shots,
        draws=options.draws,
        max_test=options.max_test,
        adamw_steps=options.adamw_steps,
        adamw_learning_rate=options.adamw_learning_rate,
        adamw_mixed_precision="bf16" if options.adamw_bf16 else "no",
        methods=tuple(options.methods),
    )
    loaded = (options.policy, options.base_model, options.threads)
    start_process(*loaded)
    policy = describe_policy(_subject[0])
    settings = {"split": options.split, "policy": policy, **asdict(config)}
    check_settings(options.work, settings)
    names = options.tasks or split_of(options.split).test
    pending = [name for name in names if not (options.work / f"{name}.json").exists()]
    print(f"{len(names) - len(pending)} of {len(names)} tasks are done already", flush=True)
    if options.processes > 1 and len(pending) > 1:
        pool = ProcessPoolExecutor(options.processes, get_context("spawn"), start_process, loaded)
        with pool:
            jobs = [pool.submit(evaluate_one, name, config, options.work) for name in pending]
            for number, job in enumerate(as_completed(jobs), 1):
                print(f"[{number}/{len(pending)}] {job.result()}", flush=True)
    else:
        for number, name in enumerate(pending, 1):
            print(f"[{number}/{len(pending)}] {evaluate_one(name, config, options.work)}", flush=True)

    tasks = {name: json.loads((options.work / f"{name}.json").read_text()) for name in names}
    result = {
        "benchmark": "few_shot",
        "settings": settings,
        "processes": options.processes,
        "threads": options.threads,
        "environment": environment(),
        **summarise(tasks),
        "tasks": tasks,
    }
    if target := result_file(of_split("few_shot", options.split), options.output, whole=not options.tasks):
        write_json(target, result)
    for method, row in result["methods"].items():
        print(f"{method:16} {100 * row['accuracy']:5.1f} %  {row['seconds']:6.2f} s")
    for name, row in result["differences"].items():
        print(f"{name:32} {100 * row['mean']:+5.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]")


if __name__ == "__main__":
    main()

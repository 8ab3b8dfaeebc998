"""Seconds from examples to adapter, generated against AdamW, in one run: `python benchmarks/latency.py`.

Both get the same texts and the same loaded model, and both times hold everything that comes after: tokenizing, features,
the adapter, and the head solved on the adapted embeddings. Generation is the full product, candidates included. The two
take turns, and which goes first alternates.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from setting import RESULTS, describe_policy, environment, load_subject, write_json
from text_suite import load_tasks

from lohp_peft import AdamWBaseline, EvaluationConfig, generate_adapter
from lohp_peft.tasks import Task

TASKS = ("cr", "trec", "stackoverflow20", "banking77")
SIZES = (4, 8, 16, 32, 64, 128, 256)


def measure(subject, task: Task, size: int, options) -> dict:
    """Median seconds of both on a support set of about `size` texts."""
    policy, model, tokenizer = subject
    classes = task.examples.n_classes
    support = task.draw_support(size // classes, seed=0)
    adamw = AdamWBaseline(
        model, tokenizer, policy, steps=options.adamw_steps, learning_rate=options.adamw_learning_rate
    )
    calls = {
        "generated": lambda: generate_adapter(policy, model, tokenizer, support),
        "adamw": lambda: adamw.fit(support, seed=0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        order = list(calls) if repeat % 2 else list(calls)[::-1]
        for name in order:
            if repeat == 0 and name == "adamw":
                continue  # generation alone warms the caches up
            start = time.perf_counter()
            calls[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    times = {name: median(values) for name, values in seconds.items()}
    about = {"task": task.name, "classes": classes, "texts": len(support)}
    return {**about, **times, "ratio": times["adamw"] / times["generated"], "all_seconds": seconds}


def summarise(rows: Sequence[dict]) -> dict:
    """The median ratio of all settings, and by class count and size."""

    def ratios(key: str) -> dict[str, float]:
        values = sorted({row[key] for row in rows})
        return {str(value): median(row["ratio"] for row in rows if row[key] == value) for value in values}

    def slowest(limit: int) -> float | None:
        return max((row["generated"] for row in rows if row["texts"] <= limit), default=None)

    return {
        "ratio_median": median(row["ratio"] for row in rows),
        "ratio_by_classes": ratios("classes"),
        "slowest_generated_up_to_64_texts": slowest(64),
        "slowest_generated_up_to_256_texts": slowest(256),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="NAME", help="tasks of different class counts"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="TEXTS", help="support sizes")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each, after one that warms up")
    parser.add_argument("--adamw-steps", type=int, default=EvaluationConfig().adamw_steps)
    parser.add_argument("--adamw-learning-rate", type=float, default=EvaluationConfig().adamw_learning_rate)
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json", help="result file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    subject = load_subject(options.policy, options.base_model)
    settings = [(task, size) for task in load_tasks(options.tasks) for size in options.sizes]
    settings = [(task, size) for task, size in settings if size >= 2 * task.examples.n_classes]
    rows = [
        measure(subject, task, size, options)
        for task, size in track(settings, "settings", console=Console(stderr=True))
    ]
    result = {
        "benchmark": "latency",
        "settings": {
            "repeats": options.repeats,
            "adamw_steps": options.adamw_steps,
            "threads": torch.get_num_threads(),
            "policy": describe_policy(subject[0]),
        },
        "environment": environment(),
        **summarise(rows),
        "rows": rows,
    }
    write_json(options.output, result)
    for row in rows:
        print(
            f"{row['classes']:3} classes {row['texts']:4} texts: generated {row['generated']:.2f} s, "
            f"AdamW {row['adamw']:.2f} s, ratio {row['ratio']:.1f}"
        )
    print(f"median ratio {result['ratio_median']:.1f}")


if __name__ == "__main__":
    main()

"""Seconds from examples to adapter, generated against AdamW, in one run: `python benchmarks/latency.py`.

First on support sets of about `--sizes` texts of a few tasks, then with `--shots` examples per class on every held-out task.
Both get the same texts and the same loaded model, and both times hold everything that comes after: tokenizing, features,
the adapter, and the head solved on the adapted embeddings. Generation is the full product, candidates included. All take
turns, in an order that alternates, each in float32 and in bfloat16.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from setting import describe_policy, environment, load_subject, result_file, write_json
from text_suite import TEST, load_tasks

from lohp_peft import AdamWBaseline, EvaluationConfig, GenerationConfig, generate_adapter
from lohp_peft.tasks import Task

TASKS = ("cr", "trec", "stackoverflow20", "banking77")
SUFFIXES = ("", "_bf16")
SIZES = (4, 8, 16, 32, 64, 128, 256)


def measure(subject, task: Task, shots: int, by: str, options) -> dict:
    """Median seconds of both on a support set of `shots` texts a class."""
    policy, model, tokenizer = subject
    support = task.draw_support(shots, seed=0)
    calls = {}
    for suffix, precision, dtype in (("", "no", None), ("_bf16", "bf16", torch.bfloat16)):
        settings = {"steps": options.adamw_steps, "learning_rate": options.adamw_learning_rate, "dtype": dtype}
        adamw = AdamWBaseline(model, tokenizer, policy, **settings)
        config = GenerationConfig(mixed_precision=precision)
        calls[f"generated{suffix}"] = partial(generate_adapter, policy, model, tokenizer, support, config)
        calls[f"adamw{suffix}"] = partial(adamw.fit, support, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        order = list(calls) if repeat % 2 else list(calls)[::-1]
        for name in order:
            if repeat == 0 and name.startswith("adamw"):
                continue  # generation alone warms the caches up
            start = time.perf_counter()
            calls[name]()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    times = {name: median(values) for name, values in seconds.items()}
    about = {"task": task.name, "classes": task.examples.n_classes, "texts": len(support), "by": by}
    ratios = {f"ratio{suffix}": times[f"adamw{suffix}"] / times[f"generated{suffix}"] for suffix in SUFFIXES}
    return {**about, **times, **ratios, "all_seconds": seconds}


def summarise(rows: Sequence[dict], suffix: str = "") -> dict:
    """The ratio of the median held-out task, the median of all sizes, by class count, and the slowest generations."""
    sizes, tasks = ([row[f"ratio{suffix}"] for row in rows if row["by"] == by] for by in ("size", "shots"))

    def ratios(key: str) -> dict[str, float]:
        values = sorted({row[key] for row in rows})
        return {str(value): median(row[f"ratio{suffix}"] for row in rows if row[key] == value) for value in values}

    def slowest(limit: int) -> float | None:
        return max((row[f"generated{suffix}"] for row in rows if row["texts"] <= limit), default=None)

    return {
        "ratio_of_the_median_task": median(tasks) if tasks else None,
        "ratio_of_the_median_size": median(sizes) if sizes else None,
        "ratio_by_classes": ratios("classes"),
        "slowest_generated_up_to_64_texts": slowest(64),
        "slowest_generated_up_to_256_texts": slowest(256),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="NAME", help="tasks of different class counts"
    )
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), metavar="TEXTS", help="support sizes")
    parser.add_argument("--shots", type=int, default=16, help="examples per class on the held-out tasks")
    parser.add_argument("--held-out", nargs="*", default=list(TEST), metavar="NAME", help="held-out tasks")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each, after one that warms up")
    parser.add_argument("--adamw-steps", type=int, default=EvaluationConfig().adamw_steps)
    parser.add_argument("--adamw-learning-rate", type=float, default=EvaluationConfig().adamw_learning_rate)
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; where base model and policy are")
    parser.add_argument("--output", type=Path, help="result file; results/latency.json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    policy, model, tokenizer = load_subject(options.policy, options.base_model)
    subject = policy.to(options.device), model.to(options.device), tokenizer
    sizes = [
        (task, size // task.examples.n_classes, "size") for task in load_tasks(options.tasks) for size in options.sizes
    ]
    sizes = [setting for setting in sizes if setting[1] >= 2]
    settings = sizes + [(task, options.shots, "shots") for task in load_tasks(options.held_out)]
    rows = [measure(subject, *one, options) for one in track(settings, "settings", console=Console(stderr=True))]
    summary = {**summarise(rows), "bf16": summarise(rows, "_bf16")}
    result = {
        "benchmark": "latency",
        "settings": {
            "repeats": options.repeats,
            "shots": options.shots,
            "adamw_steps": options.adamw_steps,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "policy": describe_policy(policy),
        },
        "environment": environment(),
        **summary,
        "rows": rows,
    }
    usual = (options.adamw_steps, options.device) == (EvaluationConfig().adamw_steps, "cpu")
    whole = usual and {*options.held_out} == {*TEST} and options.sizes
    if target := result_file("latency", options.output, bool(whole)):
        write_json(target, result)
    for row in rows:
        print(
            f"{row['classes']:3} classes {row['texts']:4} texts: generated {row['generated']:.2f} s, "
            f"AdamW {row['adamw']:.2f} s, ratio {row['ratio']:.1f}; in bfloat16 {row['generated_bf16']:.2f} s, "
            f"{row['adamw_bf16']:.2f} s, {row['ratio_bf16']:.1f}"
        )
    print(summary)


if __name__ == "__main__":
    main()

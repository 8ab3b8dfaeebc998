"""Choose AdamW's learning rate and step count on validation tasks: `python benchmarks/adamw.py WORK_FOLDER`.

Of the policy only the target modules, the rank and the head matter; it trains in bfloat16. One seeded support set per task;
every learning rate is trained once and scored at every step count. Each finished (task, rate) is kept in the work folder,
so that a run that was stopped, or one with further rates, is continued by the same command.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from setting import describe_policy, environment, load_subject, result_file, write_json
from text_suite import load_tasks

from lohp_peft import AdamWBaseline
from lohp_peft.tasks import Task, draw

TASKS = "amazon_music ss_youtube fewrel_nyt biomedical20 hint3_curekart tweet_offensive".split()
RATES, STEPS, SHOTS, MAX_TEST = (5e-4, 1e-3, 2e-3), (10, 20, 40, 80, 120), 16, 200
CLOSE = 0.0025
"""The fewest steps within a quarter of a point of the best are taken: far below the noise, and AdamW's time is quoted."""


def run_rate(task: Task, rate: float, subject, steps: Sequence[int]) -> dict[str, float]:
    """Test accuracy by "rate/steps" on one support set."""
    policy, model, tokenizer = subject
    support, test = task.draw_support(SHOTS, 0), task.split("test")
    test = draw(test, max(1, MAX_TEST // test.n_classes), 0)
    baseline = AdamWBaseline(model, tokenizer, policy, learning_rate=rate, steps=steps[-1], dtype=torch.bfloat16)
    found = {}
    for count, (encoder, head) in zip(steps, baseline.fit(support, 0, tuple(steps[:-1])), strict=True):
        with torch.no_grad():
            features = encoder.embed(encoder.prepare(test.texts, test.texts_b))
        found[f"{rate:g}/{count}"] = float((head.logits(features).argmax(-1) == test.targets).float().mean())
    return found


def best_of(mean: dict[str, float]) -> dict[str, float]:
    """The learning rate and step count that are taken."""
    good = [key for key, value in mean.items() if value >= max(mean.values()) - CLOSE]
    rate, steps = min(good, key=lambda key: (int(key.split("/")[1]), -mean[key])).split("/")
    return {"learning_rate": float(rate), "steps": int(steps)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished tasks")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help="validation tasks")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="step counts, in rising order")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/adamw.json by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    subject, tasks = load_subject(options.policy, options.base_model), {}
    wanted = [f"{rate:g}/{count}" for rate in options.rates for count in options.steps]
    for task in load_tasks(options.tasks):
        file = options.work / f"{task.name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        for rate in options.rates:
            if any(f"{rate:g}/{count}" not in found for count in options.steps):
                found |= run_rate(task, rate, subject, options.steps)
                write_json(file, found)
        tasks[task.name] = {key: found[key] for key in wanted}
        print(task.name, {key: round(100 * value, 1) for key, value in tasks[task.name].items()}, flush=True)
    mean = {key: fmean(found[key] for found in tasks.values()) for key in wanted}
    settings = {"shots": SHOTS, "draws": 1, "max_test": MAX_TEST, "policy": describe_policy(subject[0])}
    result = {"benchmark": "adamw", "settings": settings, "environment": environment(), "best": best_of(mean)}
    whole = (options.tasks, options.rates, options.steps) == (TASKS, list(RATES), list(STEPS))
    if target := result_file("adamw", options.output, whole):
        write_json(target, {**result, "accuracy": mean, "tasks": tasks})
    print(result["best"])


if __name__ == "__main__":
    main()

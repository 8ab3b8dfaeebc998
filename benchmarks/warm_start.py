"""Does AdamW get anywhere sooner from a generated adapter? `python benchmarks/warm_start.py WORK_FOLDER`.

The same AdamW on the same examples from several starts: PEFT's default and EVA's, the generated adapter, the training tasks'
mean and, with `--fits FOLDER` of `compare.py`, the adapters of Reptile and of multi-task training. Scored at `--checkpoints`
is the held-out loss of the head solved anew, at the temperature that suits its scores best, and accuracy. Every finished task is a
file in the work folder, so a run that was stopped is continued by the same command; so are further starts added.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import torch
from fitting import load_setting
from safetensors.torch import load_file
from setting import check_settings, describe_policy, environment, of_split, result_file, write_json
from splits import split_of
from text_suite import load_tasks
from torch import Tensor

from lohp_peft import AdamWBaseline, generate_adapter
from lohp_peft.tasks import calibrated_cross_entropy, draw

STARTS = ("default", "eva", "generated", "mean", "reptile", "multi_task")


def adapters(
    setting, support, starts: Sequence[str], fits: Path | None
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """By start the adapter AdamW begins with; those of PEFT's own are missing."""
    policy, found = setting.policy, {}
    for name in starts:
        if name == "generated":
            encoder = setting.encoder
            found[name] = generate_adapter(policy, encoder.base_model, encoder.tokenizer, support).lora
        elif name == "mean":
            found[name] = policy.space.decode(policy.reference_set.mean_state())
        elif name in ("reptile", "multi_task"):
            found[name] = policy.space.decode(policy.scale * load_file(fits / f"{name}-0.safetensors")["state"])
    return found


def curves_of(file: Path) -> dict[str, dict]:
    """By start the curves that a task's file has already."""
    return json.loads(file.read_text())["curves"] if file.exists() else {}


def score_task(name: str, options) -> str:
    """The curves of one task that are missing, means over draws."""
    file = options.work / f"{name}.json"
    known = curves_of(file)
    starts = [start for start in options.starts if start not in known]
    torch.set_num_threads(options.threads)
    setting = load_setting(options.policy, options.base_model)
    (task,) = load_tasks([name])
    test = task.split("test")
    if len(test) > options.max_test:
        test = draw(test, max(1, options.max_test // test.n_classes), 0)
    encoded = setting.encoder.prepare(test.texts, test.texts_b)  # the frozen layers, the same for every start
    model, tokenizer, policy = setting.encoder.base_model, setting.encoder.tokenizer, setting.policy
    rows: dict[str, list[list[tuple[float, float]]]] = {start: [] for start in starts}
    for number in range(options.draws):
        support = task.draw_support(options.shots, number)
        given = adapters(setting, support, starts, options.fits)
        for start in starts:
            init = start if start == "eva" else "default"
            steps, rate = options.checkpoints[-1], options.learning_rate
            adamw = AdamWBaseline(
                model, tokenizer, policy, steps=steps, learning_rate=rate, init=init, dtype=torch.bfloat16
            )
            curve = []
            for encoder, head in adamw.fit(support, number, tuple(options.checkpoints[:-1]), given.get(start)):
                with torch.no_grad():
                    logits = head.logits(encoder.embed(encoded).float())
                    loss = calibrated_cross_entropy(logits, test.targets)
                curve.append((float(loss), float((logits.argmax(-1) == test.targets).float().mean())))
            rows[start].append(curve)
    curves = {
        start: {
            part: [fmean(curve[i][j] for curve in each) for i in range(len(options.checkpoints))]
            for j, part in enumerate(("loss", "accuracy"))
        }
        for start, each in rows.items()
    }
    write_json(file, {"family": task.family, "curves": {**known, **curves}})
    return name


def steps_to(curve: Sequence[float], steps: Sequence[int], target: float) -> float:
    """The first step at which a curve is at `target` or below, on straight lines between checkpoints; inf for never."""
    for i, loss in enumerate(curve):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (curve[i - 1] - target) / max(curve[i - 1] - loss, 1e-12)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.inf


def summarise(tasks: dict[str, dict], steps: Sequence[int]) -> dict[str, dict]:
    """By start: steps to the default's best loss over the default's own, and mean curves."""
    summary = {}
    for start in next(iter(tasks.values()))["curves"]:
        shares = []
        for task in tasks.values():
            default = task["curves"]["default"]["loss"]
            best = min(default)
            own = max(steps_to(default, steps, best), 1.0)
            shares.append(steps_to(task["curves"][start]["loss"], steps, best) / own)
        summary[start] = {
            "median_share_of_steps": middle if math.isfinite(middle := median(shares)) else None,
            "tasks_that_reach_it": sum(math.isfinite(share) for share in shares),
            "tasks_in_a_fifth": sum(share <= 0.2 for share in shares),
            "loss": [fmean(t["curves"][start]["loss"][i] for t in tasks.values()) for i in range(len(steps))],
            "accuracy": [fmean(t["curves"][start]["accuracy"][i] for t in tasks.values()) for i in range(len(steps))],
        }
    return summary


def plot(result: dict, file: Path) -> None:
    """Mean held-out loss and accuracy by optimizer step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lohp"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, part in zip(axes, ("loss", "accuracy"), strict=True):
        for start, row in result["starts"].items():
            wide = {"linewidth": 2.5} if start == "generated" else {}
            axis.plot(result["settings"]["checkpoints"], row[part], label=start.replace("_", " "), **wide)
        axis.set(xlabel="AdamW steps", ylabel=f"held-out {part}")
        axis.grid(alpha=0.3)
    axes[0].legend(title="start", fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished tasks")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="which held-out tasks")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="these tasks instead of the whole split")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS[:4]))
    parser.add_argument("--fits", type=Path, help="folder of trainings, for the starts reptile and multi_task")
    parser.add_argument("--checkpoints", nargs="+", type=int, default=[0, 2, 4, 8, 16, 24, 40, 60, 80])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--shots", type=int, default=16, help="support examples per class")
    parser.add_argument("--draws", type=int, default=1, help="support sets per task")
    parser.add_argument("--max-test", type=int, default=200, help="most held-out rows per task")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--processes", type=int, default=1, help="tasks at once, each process with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/warm_start[_validation].json by default")
    options = parser.parse_args(arguments)
    if "default" not in options.starts:
        parser.error("--starts must hold default, which the others are compared with.")
    if options.fits is None and {"reptile", "multi_task"} & set(options.starts):
        parser.error("--starts reptile and multi_task need --fits FOLDER.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that are started
    shown = ("split", "checkpoints", "learning_rate", "shots", "draws", "max_test")
    settings = {name: getattr(options, name) for name in shown}
    settings["policy"] = describe_policy(load_setting(options.policy, options.base_model).policy)
    check_settings(options.work, settings)
    names = options.tasks or split_of(options.split).test
    pending = [name for name in names if not set(options.starts) <= set(curves_of(options.work / f"{name}.json"))]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        jobs = [pool.submit(score_task, name, options) for name in pending]
        for number, job in enumerate(as_completed(jobs), 1):
            print(f"[{number}/{len(pending)}] {job.result()}", flush=True)
    tasks = {name: json.loads((options.work / f"{name}.json").read_text()) for name in names}
    everywhere = [start for start in STARTS if all(start in task["curves"] for task in tasks.values())]
    for task in tasks.values():
        task["curves"] = {start: task["curves"][start] for start in everywhere}
    starts = summarise(tasks, options.checkpoints)
    result = {
        "benchmark": "warm_start",
        "settings": settings,
        "environment": environment(),
        "starts": starts,
        "tasks": tasks,
    }
    if target := result_file(of_split("warm_start", options.split), options.output, whole=not options.tasks):
        write_json(target, result)
        plot(result, target.with_suffix(".svg"))
    for start, row in starts.items():
        share = row["median_share_of_steps"]
        print(f"{start:12} {'never' if share is None else f'{share:.2f}':>6} of the default's steps", row["accuracy"])


if __name__ == "__main__":
    main()

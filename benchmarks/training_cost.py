"""How policy learning grows: `python benchmarks/training_cost.py`.

Seconds and memory of a training step of preset `lohp` against the number of recorded tasks, the number of policy steps and the
size of the adapter, one at a time, up to all seven projections of the 32 layers of Llama-3-8B. Everything is random, and features
and rewards are free: what the base model costs depends on the base model, and is that of its forward passes. Each case runs in
a process of its own; memory is its peak above what was held before the recordings were made.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scaling import SHAPES, peak_bytes, random_features, random_policy, reset_peak
from setting import RESULTS, environment, write_json

from lohp_peft import LoHpPolicy, PolicyLearningConfig
from lohp_peft.policy_learning import LoHpTrainer, Recordings
from lohp_peft.tasks import EpisodeSampler, TaskFeatures

OPTIMIZERS = ("adamw", "sam", "sgd", "lion")
BASE = {"shape": "MiniLM, 3 layers", "tasks": 64, "policy_steps": 4}
VARIED = {"tasks": (16, 64, 256, 1024), "policy_steps": (2, 4, 8, 16), "shape": tuple(SHAPES)}
"""What is varied, the other two being those of `BASE`."""


class FreeBank:
    """Features and rewards from nowhere, in the place of a `TaskBank`."""

    def __init__(self, policy: LoHpPolicy) -> None:
        self.policy = policy

    def features(self, *_: Any) -> TaskFeatures:
        return random_features(self.policy, 1)[0]

    def episode_losses(self, _episodes: Any, states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(states.shape[:2]), torch.rand(states.shape[:2])


def measure(case: dict[str, Any], rank: int, steps: int, threads: int) -> dict[str, Any]:
    """One case: seconds of a training step, and memory."""
    torch.set_num_threads(threads)
    names, k = [f"task {i}" for i in range(case["tasks"])], case["policy_steps"]
    policy = random_policy(case["shape"], rank, policy_steps=k, optimizers=list(OPTIMIZERS))
    before = reset_peak()
    runs = len(names) * len(OPTIMIZERS)
    recordings = Recordings(
        states=torch.randn(runs, k + 1, *policy.config.state_shape).cumsum(1),
        losses=torch.linspace(1, 0.5, k + 1).repeat(runs, 1),
        tasks=tuple(name for name in names for _ in OPTIMIZERS),
        optimizers=torch.arange(len(OPTIMIZERS)).repeat(len(names)) + 1,
        optimizer_names=OPTIMIZERS,
    )
    sampler = EpisodeSampler({name: torch.arange(2).repeat(8) for name in names})
    config = PolicyLearningConfig(
        preset="lohp", cloning_steps=1, training_steps=steps, policy_steps=k, on_policy_every=max(steps // 2, 1)
    )
    ends = [time.perf_counter()]
    trainer = LoHpTrainer(
        policy, FreeBank(policy), recordings, sampler, config, log=lambda *_: ends.append(time.perf_counter())
    )
    trainer.train()
    seconds = [
        end - start for start, end in zip(ends[2:], ends[3:], strict=False)
    ]  # without cloning and the first step
    return {
        **case,
        "modules": policy.config.state_shape[0],
        "runs": runs,
        "recordings_mb": recordings.states.nbytes / 1e6,
        "policy_parameters": policy.num_parameters(),
        "step_s": median(seconds),
        "peak_mb": (peak_bytes() - before) / 1e6 if before else None,
    }


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time and memory against each of the three, on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lohp"
    from matplotlib import pyplot

    labels = {"tasks": "recorded tasks", "policy_steps": "policy steps", "shape": "numbers in the adapter's state"}
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    for axis, what in zip(axes, VARIED, strict=True):
        cases = [row for row in rows if row["varied"] == what]
        x = [row["modules"] * row["rank"] ** 2 if what == "shape" else row[what] for row in cases]
        other = axis.twinx()
        axis.loglog(x, [1000 * row["step_s"] for row in cases], "o-")
        if all(row["peak_mb"] for row in cases):
            other.loglog(x, [row["peak_mb"] for row in cases], "s--", color="tab:orange")
        axis.set_xlabel(labels[what])
        axis.set_ylabel("ms a training step", color="tab:blue")
        other.set_ylabel("MB", color="tab:orange")
        axis.set_xticks(x, [f"{round(value / 1000)}k" if value >= 4000 else str(value) for value in x], fontsize=8)
        axis.set_xticks([], minor=True)
        for side in (axis, other):  # the same in all three, so that slopes can be compared
            side.set_ylim(50, 5000)
            side.yaxis.set_major_formatter("{x:g}")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="training steps timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, help="only the first so many values of each")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_cost.json")
    options = parser.parse_args(arguments)
    rows = []
    for what, values in VARIED.items():
        for value in values[: options.most]:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                case = {**BASE, what: value}
                row = pool.submit(measure, case, options.rank, options.steps, options.threads).result()
            rows.append({"varied": what, "rank": options.rank, **row})
            print(
                f"{what:12} {value!s:18} {1000 * row['step_s']:8.1f} ms a step  {row['peak_mb'] or 0:8.0f} MB",
                flush=True,
            )
    settings = {"rank": options.rank, "steps": options.steps, "threads": options.threads, "base": BASE}
    result = {"benchmark": "training_cost", "settings": settings, "environment": environment(), "rows": rows}
    write_json(options.output, result)
    plot(rows, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()

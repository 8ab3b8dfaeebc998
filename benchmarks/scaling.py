"""How generation grows with the adapter: `python benchmarks/scaling.py`.

Policies of random weights for adapters built from shapes alone, without base weights, up to all seven projections of the 32
layers of Llama-3-8B. Timed is everything after the features: the rollout and the LoRA factors. Memory is the process's peak
in the first call above what it held before, over the size of the factors; each policy is loaded in a process of its own.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from setting import RESULTS, environment, write_json

from lohp_peft import LoHpPolicy, LoHpPolicyConfig
from lohp_peft.adapters import AdapterLayout, CoreSpace
from lohp_peft.policy import rollout
from lohp_peft.tasks import TaskFeatures


def encoder(width: int, inner: int) -> dict[str, tuple[int, int]]:
    """Linear layers of a BERT layer, (d_in, d_out)."""
    attention = dict.fromkeys(("query", "key", "value", "attention.output.dense"), (width, width))
    return {**attention, "intermediate.dense": (width, inner), "output.dense": (inner, width)}


def decoder(width: int, kv: int, inner: int) -> dict[str, tuple[int, int]]:
    """Linear layers of a Llama layer."""
    attention = {"q_proj": (width, width), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (width, width)}
    return {**attention, "gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}


SHAPES = {
    "MiniLM, 3 layers": (3, encoder(384, 1536)),
    "BERT-base": (12, encoder(768, 3072)),
    "Llama-3.2-1B": (16, decoder(2048, 512, 8192)),
    "Llama-3.2-3B": (28, decoder(3072, 1024, 8192)),
    "Llama-3-8B": (32, decoder(4096, 1024, 14336)),
}
"""Layers, and the linear layers of each."""


def random_policy(name: str, r: int, **settings) -> LoHpPolicy:
    """A policy of random weights in a space of random bases; `settings` are those of `LoHpPolicyConfig`."""
    layers, linear = SHAPES[name]
    specs = [
        {"name": f"layers.{i}.{kind}", "d_in": d_in, "d_out": d_out, "kind": kind.split(".")[-1], "layer": i}
        for i in range(layers)
        for kind, (d_in, d_out) in linear.items()
    ]
    layout = AdapterLayout.from_dict({"modules": specs})
    torch.manual_seed(0)

    def basis(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, r))[0]

    inputs, outputs = ([basis(getattr(spec, side)) for spec in layout.modules] for side in ("d_in", "d_out"))
    space = CoreSpace(layout, r, inputs, outputs)
    policy = LoHpPolicy(
        LoHpPolicyConfig(
            layout=layout.to_dict(),
            r=r,
            state_shape=list(space.shape),
            embedding_size=next(iter(linear.values()))[0],
            module_features=2 * r,
            **settings,
        )
    )
    policy.set_space(space)
    return policy


def random_features(policy: LoHpPolicy, tasks: int) -> TaskFeatures:
    """Features of as many tasks, of the policy's shapes."""
    (modules, _), r = policy.config.state_shape, policy.config.r
    p, f = policy.config.principal_directions, policy.config.module_features
    shapes = {"set": (2 * p,), "labels": (p + 6,), "modules": (modules, 2 * f), "moments": (modules, p, r + 1)}
    return TaskFeatures(**{part: torch.randn(tasks, *shape) for part, shape in shapes.items()})


def build(name: str, r: int, folder: str) -> None:
    """Save a policy, to be loaded by another process."""
    random_policy(name, r).save_pretrained(folder)


@torch.no_grad()
def measure(name: str, folder: str, tasks: int, repeats: int, threads: int) -> dict:
    """One shape: seconds for one task and for a batch of tasks, sizes and peak memory."""
    torch.set_num_threads(threads)
    policy = LoHpPolicy.from_pretrained(folder)
    features = random_features(policy, tasks)
    times: dict[str, list[float]] = {"rollout": [], "factors": [], "batch": []}
    for repeat in range(repeats + 1):
        if repeat == 0:
            before = reset_peak()
        start = time.perf_counter()
        state = rollout(policy, features[:1])[0, -1]
        middle = time.perf_counter()
        lora = policy.space.decode(state)
        end = time.perf_counter()
        if repeat == 0:  # later calls find the memory that this one gave back
            peak = peak_bytes() - before
            size = sum(x.nbytes for pair in lora.values() for x in pair)
        del lora
        batch = time.perf_counter()
        rollout(policy, features)
        if repeat:
            times["rollout"].append(middle - start)
            times["factors"].append(end - middle)
            times["batch"].append((time.perf_counter() - batch) / tasks)
    seconds = {part: median(values) for part, values in times.items()}
    return {
        "shape": name,
        "modules": policy.config.state_shape[0],
        "adapter_mb": size / 1e6,
        "policy_parameters": policy.num_parameters(),
        "rollout_s": seconds["rollout"],
        "factors_s": seconds["factors"],
        "rollout_in_batch_s": seconds["batch"],
        "peak_over_size": peak / size if before else None,
    }


def reset_peak() -> int:
    """Bytes resident now, from where on the peak counts; 0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


def peak_bytes() -> int:
    """Most bytes resident since `reset_peak`."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=32, help="tasks in the batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.shapes:
        with TemporaryDirectory() as folder:
            for step in (
                partial(build, name, options.rank, folder),
                partial(measure, name, folder, options.tasks, options.repeats, options.threads),
            ):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    row = pool.submit(step).result()
        rows.append(row)
        print(
            f"{name:18} {row['adapter_mb']:7.1f} MB  rollout {row['rollout_s']:.3f} s  factors {row['factors_s']:.3f} s"
            f"  peak {row['peak_over_size'] or 0:.2f} x the adapter",
            flush=True,
        )
    settings = {"rank": options.rank, "tasks": options.tasks, "repeats": options.repeats, "threads": options.threads}
    result = {"benchmark": "scaling", "settings": settings, "environment": environment(), "rows": rows}
    write_json(options.output, result)


if __name__ == "__main__":
    main()

"""Compare `sub_trajectory_balance_loss` with torchgfn: values, gradients and time. See README.md for the environment."""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "subtb.json"
LAMBDAS = (0.3, 0.9, 1.0, 2.0)
TIME, BATCH, SEED = 8, 256, 0

# The environment has torchgfn and not peft: an empty parent package lets the objectives in without the rest.
_package = types.ModuleType("lohp_peft")
_package.__path__ = [str(ROOT / "lohp_peft")]
sys.modules.setdefault("lohp_peft", _package)

from oracle import TorchgfnSubTB, torchgfn_loss  # noqa: E402

from lohp_peft.objectives import sub_trajectory_balance_loss  # noqa: E402


def example(batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random `log_pf`, `log_ref` and `log_flow`, of a few nats."""
    return 3 * torch.randn(batch, time), 3 * torch.randn(batch, time), 5 * torch.randn(batch, time + 1)


def largest_differences(lam: float, lengths: Tensor) -> tuple[float, float]:
    """Largest absolute difference of the loss, and of its gradients in `log_pf` and `log_flow`."""
    log_pf, log_ref, log_flow = example(len(lengths), TIME)
    results = []
    for loss_function in (sub_trajectory_balance_loss, torchgfn_loss):
        leaves = [x.clone().requires_grad_() for x in (log_pf, log_flow)]
        loss = loss_function(leaves[0], log_ref, leaves[1], lam=lam, lengths=lengths)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    value, *gradients = ((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return value, max(gradients)


def alternating_medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 20):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 20:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timings(lam: float, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of both, forward, and forward with backward, each with its own layout."""
    log_pf, log_ref, log_flow = example(BATCH, TIME)
    oracle = TorchgfnSubTB(torch.full((BATCH,), TIME), TIME, lam)
    ours = [x.clone().requires_grad_() for x in (log_pf, log_flow)]
    theirs = [x.clone().contiguous().requires_grad_() for x in (log_pf.T, log_flow[:, :-1].T)]
    their_ref, reward = log_ref.T.contiguous(), log_flow[:, -1].clone()

    def our_loss() -> Tensor:
        return sub_trajectory_balance_loss(ours[0], log_ref, ours[1], lam=lam)

    def their_loss() -> Tensor:
        return oracle(theirs[0] - their_ref, theirs[1], reward)

    def forward(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(loss)

    def forward_backward(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), leaves)

    table = {}
    for name, calls in {
        "forward": {"ours": forward(our_loss), "torchgfn": forward(their_loss)},
        "forward_backward": {
            "ours": forward_backward(our_loss, ours),
            "torchgfn": forward_backward(their_loss, theirs),
        },
    }.items():
        medians = alternating_medians(calls, repeats)
        table[name] = {f"{key}_ms": round(1000 * value, 4) for key, value in medians.items()}
        table[name]["ratio"] = round(medians["torchgfn"] / medians["ours"], 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="timed calls of each side (count)")
    parser.add_argument("--output", type=Path, default=RESULT, help="where to write the result (JSON file)")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    lengths = {"uniform": torch.full((BATCH,), TIME), "ragged": torch.randint(1, TIME + 1, (BATCH,))}
    lengths["ragged"][0] = TIME
    agreement = []
    for lam in LAMBDAS:
        for kind, n in lengths.items():
            value, gradient = largest_differences(lam, n)
            row = {"lam": lam, "lengths": kind, "max_abs_diff_loss": value, "max_abs_diff_gradient": gradient}
            agreement.append(row)
    speed = {str(lam): timings(lam, arguments.repeats) for lam in LAMBDAS}
    result = {
        "date": datetime.date.today().isoformat(),
        "setting": {"time": TIME, "batch": BATCH, "dtype": "float64", "threads": 1, "repeats": arguments.repeats},
        "max_abs_diff": max(max(r["max_abs_diff_loss"], r["max_abs_diff_gradient"]) for r in agreement),
        "min_ratio": min(row["ratio"] for table in speed.values() for row in table.values()),
        "agreement": agreement,
        "timings_by_lam": speed,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchgfn": importlib.metadata.version("torchgfn"),
        },
        "machine_cores": os.cpu_count(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

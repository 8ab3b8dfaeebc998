"""Stage 2 of the shipped policy: `torchrun --nproc_per_node 2 benchmarks/shipped_policy/train.py TRAJECTORIES OUTPUT
[field=value ...]`, one thread a process."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from setting import environment
from splits import SPLITS, split_of
from text_suite import training_encoder

from lohp_peft.policy_learning import PolicyLearningConfig, train_policy
from lohp_peft.trajectories import TrajectoryDataset

DEFAULTS = {
    "batch_size": 6,
    "cloning_steps": 120,
    "training_steps": 500,
    "validate_every": 100,
    "validation_episodes": 96,
    "rows_per_task": 300,
    "subtb_weight": 0.05,
    "cloning_weight": 0.02,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trajectories", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", nargs="*", metavar="field=value", help="of PolicyLearningConfig, values in JSON")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose training and validation tasks")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    options = parser.parse_args(arguments)
    output, start = options.output, time.perf_counter()
    given = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in options.settings)}
    config = PolicyLearningConfig(**{**DEFAULTS, **given})
    dataset, split = TrajectoryDataset.open(options.trajectories), split_of(options.split)
    policy = train_policy(
        split.training_tasks(),
        training_encoder(dataset.space, base_model=options.base_model),
        dataset,
        output,
        config,
        validation_tasks=split.validation_tasks(),
        provenance={"commit": environment()["commit"], "overlap_groups": "kept on one side"},
    )
    record = {
        "stage": "policy learning",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "minutes": (time.perf_counter() - start) / 60,
        "peak_memory_gib_per_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": policy.num_parameters(),
    }
    if os.environ.get("RANK", "0") == "0":
        (output / "cost.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

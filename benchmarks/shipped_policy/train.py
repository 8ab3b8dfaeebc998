"""Stage 2 of the shipped policy: `torchrun --nproc_per_node 2 benchmarks/shipped_policy/train.py TRAJECTORIES OUTPUT
[field=value ...]`, one thread a process."""

import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from setting import environment
from text_suite import CONTRAST_VALIDATION, VALIDATION, contrast_tasks, load_tasks, training_encoder, training_tasks

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

if __name__ == "__main__":
    trajectories, output, start = Path(sys.argv[1]), Path(sys.argv[2]), time.perf_counter()
    given = dict(pair.split("=", 1) for pair in sys.argv[3:])
    config = PolicyLearningConfig(**{**DEFAULTS, **{key: json.loads(value) for key, value in given.items()}})
    dataset = TrajectoryDataset.open(trajectories)
    policy = train_policy(
        training_tasks(),
        training_encoder(dataset.space),
        dataset,
        output,
        config,
        validation_tasks=load_tasks(VALIDATION) + contrast_tasks([CONTRAST_VALIDATION]),
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

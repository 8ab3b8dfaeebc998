"""Stage 1 of the shipped policy: `torchrun --nproc_per_node 2 benchmarks/shipped_policy/prepare.py OUTPUT`."""

import json
import resource
import sys
import time
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from text_suite import RANK, training_encoder, training_tasks

from lohp_peft.weight_preparation import WeightPreparationConfig, gradient_space, prepare_trajectories

CONFIG = WeightPreparationConfig(
    optimizers=("adamw", "sgd", "sam", "lion"),
    optimizer_steps=12,
    record_every=2,
    classes_per_step=4,
    rows_per_class=8,
    rows_per_task=200,
    score_shots=4,
    score_query_rows=40,
)

if __name__ == "__main__":
    output, start = Path(sys.argv[1]), time.perf_counter()
    accelerator = Accelerator(cpu=True)
    tasks = training_tasks()
    space = gradient_space(tasks, training_encoder(), RANK, CONFIG, output_dir=output, accelerator=accelerator)
    bases = (time.perf_counter() - start) / 60
    dataset = prepare_trajectories(tasks, training_encoder(space), output, CONFIG, accelerator)
    if accelerator.is_main_process:
        record = {
            "stage": "weight preparation",
            "processes": accelerator.num_processes,
            "minutes_for_bases": bases,
            "minutes": (time.perf_counter() - start) / 60,
            "peak_memory_gib_per_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "trajectories": len(dataset),
            "settings": CONFIG.to_dict(),
        }
        (output / "cost.json").write_text(json.dumps(record, indent=2))

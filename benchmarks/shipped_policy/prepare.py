"""Stage 1 of the shipped policy: `torchrun --nproc_per_node 2 benchmarks/shipped_policy/prepare.py OUTPUT`."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from splits import SPLITS, split_of
from text_suite import RANK, training_encoder

from lohp_peft.weight_preparation import WeightPreparationConfig, gradient_space, prepare_trajectories


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose training tasks")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd", "sam", "lion"])
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    options = parser.parse_args(arguments)
    output, start = options.output, time.perf_counter()
    accelerator = Accelerator(cpu=True)
    config = WeightPreparationConfig(
        optimizers=tuple(options.optimizers),
        optimizer_steps=12,
        record_every=2,
        classes_per_step=4,
        rows_per_class=8,
        rows_per_task=200,
        score_shots=4,
        score_query_rows=40,
    )
    tasks = split_of(options.split).training_tasks()
    encoder = training_encoder(base_model=options.base_model)
    rank = min(RANK, encoder.base_model.config.hidden_size)
    space = gradient_space(tasks, encoder, rank, config, output_dir=output, accelerator=accelerator)
    bases = (time.perf_counter() - start) / 60
    encoder = training_encoder(space, base_model=options.base_model)
    dataset = prepare_trajectories(tasks, encoder, output, config, accelerator)
    if accelerator.is_main_process:
        record = {
            "stage": "weight preparation",
            "processes": accelerator.num_processes,
            "minutes_for_bases": bases,
            "minutes": (time.perf_counter() - start) / 60,
            "peak_memory_gib_per_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "trajectories": len(dataset),
            "settings": config.to_dict(),
        }
        (output / "cost.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

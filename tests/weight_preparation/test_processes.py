import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.weight_preparation import TrajectoryRecorder, WeightPreparationConfig, prepare_trajectories
from tiny import build_base_model, build_task, build_tokenizer
from weight_preparation.test_recorder import final_update, full_rank_space, train

CONFIG = WeightPreparationConfig(optimizers=("adamw",), optimizer_steps=4, record_every=2, rows_per_task=32)


def prepare(folder):
    model, stream = build_base_model(), io.StringIO()
    space = LoraBSpace.seeded(AdapterLayout.from_model(model, ["query", "value"]), r=2, seed=0)
    encoder = TextEncoder(model, build_tokenizer(), space)
    tasks = [build_task(f"task {i}", seed=i) for i in range(3)]
    dataset = prepare_trajectories(tasks, encoder, folder, CONFIG, console=Console(file=stream, width=120))
    return dataset, stream.getvalue()


def main(folder):
    from accelerate import PartialState

    dataset, shown = prepare(folder / "two")
    sys.stdout.write(f"told {PartialState().num_processes} {len(dataset)} {'3 tasks' in shown}\n")
    record_under_ddp(folder)
    PartialState().destroy_process_group()


def record_under_ddp(folder):
    """A run that stops at a checkpoint and one that continues it, accumulating gradients; the last weights beside."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    for steps, resume in ((4, None), (6, str(folder / "run" / "checkpoint-4"))):
        recorder = TrajectoryRecorder(
            folder / "recorded", "toy", record_every=2, space=full_rank_space(build_base_model())
        )
        model = train(folder / "run", recorder, resume=resume, max_steps=steps, **options)
    if os.environ["RANK"] == "0":
        save_file({name: x.contiguous() for name, x in final_update(model).items()}, folder / "last.safetensors")
        sys.stdout.write(f"told {recorder.report.states}\n")
    else:
        sys.stdout.write(f"told {recorder.report}\n")


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", "weight_preparation.test_processes", str(tmp_path)]
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, **rank}, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    shown = [process.communicate(timeout=300)[0].splitlines() for process in processes]  # the Trainer prints as well
    told = [[line.split()[1:] for line in lines if line.startswith("told ")] for lines in shown]
    # Only the main process shows the table, of all tasks, and only it records a run of the Trainer.
    assert told == [[["2", "3", "True"], ["4"]], [["2", "3", "False"], ["None"]]]
    one, two = prepare(tmp_path / "one")[0], TrajectoryDataset.open(tmp_path / "two")
    assert one.keys() == two.keys()
    for a, b in zip(one, two, strict=True):
        assert a.task == b.task
        torch.testing.assert_close(a.states, b.states)
    first, continued = TrajectoryDataset.open(tmp_path / "recorded")
    assert [run.optimizer_steps.tolist() for run in (first, continued)] == [[0, 2, 4], [0, 2, 4, 6]]
    assert continued.states[:3].equal(first.states)  # the snapshots that were kept beside the checkpoint
    decoded = full_rank_space(build_base_model()).delta_weight(continued.states[-1])
    for name, delta in load_file(tmp_path / "last.safetensors").items():
        torch.testing.assert_close(decoded[name], delta, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

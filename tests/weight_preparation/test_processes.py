import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.trajectories import TrajectoryDataset
from lohp_peft.weight_preparation import WeightPreparationConfig, prepare_trajectories
from tiny import build_base_model, build_task, build_tokenizer

CONFIG = WeightPreparationConfig(optimizers=("adamw",), optimizer_steps=4, record_every=2, rows_per_task=32)


def prepare(folder, accelerator=None):
    model, stream = build_base_model(), io.StringIO()
    space = LoraBSpace.seeded(AdapterLayout.from_model(model, ["query", "value"]), r=2, seed=0)
    encoder = TextEncoder(model, build_tokenizer(), space)
    tasks = [build_task(f"task {i}", seed=i) for i in range(3)]
    dataset = prepare_trajectories(tasks, encoder, folder, CONFIG, accelerator, Console(file=stream, width=120))
    return dataset, stream.getvalue()


def main(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    dataset, shown = prepare(folder, accelerator)
    sys.stdout.write(f"{accelerator.num_processes} {len(dataset)} {'3 tasks' in shown}\n")
    accelerator.end_training()


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
    command = [sys.executable, "-m", "weight_preparation.test_processes", str(tmp_path / "two")]
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, **rank}, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    said = [process.communicate(timeout=300)[0].split() for process in processes]
    assert said == [["2", "3", "True"], ["2", "3", "False"]]  # only the main process shows the table, of all tasks
    one, two = prepare(tmp_path / "one")[0], TrajectoryDataset.open(tmp_path / "two")
    assert one.keys() == two.keys()
    for a, b in zip(one, two, strict=True):
        assert a.task == b.task
        torch.testing.assert_close(a.states, b.states)


if __name__ == "__main__":
    main(sys.argv[1])

"""Two processes that share every batch learn what one does; so do two that were killed and launched again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lohp_peft.policy_learning.processes import Processes
from lohp_peft.policy_learning.recordings import Recordings
from policy_learning.conftest import build_bank, build_trajectories, make_trainer
from tiny import build_encoder

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "examples" / "accelerate_configs" / "cpu_2_processes.yaml"
STEPS, KILLED_AT = 50, 33
# Batches that two processes cannot share evenly, every source of segments, the pathwise term, dropout, fresh clones.
SETTINGS = {
    "cloning_steps": 10,
    "training_steps": STEPS - 10,
    "batch_size": 3,
    "recorded_batch_size": 5,
    "on_policy_every": 5,
    "path_prefix_weight": 0.3,
    "validate_every": 15,
    "refresh_kl": 0.0,
    "save_every": 7,
}


def build(log=None):
    encoder = build_encoder(adapted=(1, 2))
    encoder.base_model.double()
    recordings = Recordings.from_trajectories(build_trajectories(encoder.space), 3)
    bank = build_bank(encoder, torch.float64)
    return make_trainer(encoder, bank, recordings, validate=True, options={"log": log}, **SETTINGS)


def train(folder=None, on_step=None):
    """What a run ends with: parameters, Adam's moments and the last scalars, as float64 tensors."""
    last = {}

    def log(step, scalars):
        last.update(scalars, step=step)
        if on_step is not None:
            on_step(step)

    trainer = build(log)
    trainer.train(folder)
    found = {f"policy.{name}": value.detach().clone() for name, value in trainer.policy.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            moments = trainer.optimizer.state[parameter]  # none after a clone was taken at the last step
            found[f"adam.{group['lr']}.{i}"] = moments.get("exp_avg", torch.zeros_like(parameter.detach()))
    scalars = {f"scalar.{name}": torch.tensor(value, dtype=torch.float64) for name, value in last.items()}
    return trainer, found | scalars


def kill(step):
    if step == KILLED_AT:
        os._exit(9)


def main(folder):
    """First the whole run and another one that is killed, then, launched again, the rest of that one."""
    resumes = (folder / "killed").exists()
    trainer, found = train(folder / ("killed" if resumes else "whole"))
    if trainer.accelerator.num_processes != 2:
        raise SystemExit("This is no group of two processes.")
    if trainer.accelerator.is_main_process:
        save_file(found, folder / ("resumed.safetensors" if resumes else "whole.safetensors"))
    if not resumes:
        train(folder / "killed", kill)
    trainer.accelerator.end_training()


def launch(folder):
    line = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHER), "--main_process_port", "0"]
    line += ["--num_cpu_threads_per_process", "1", "-m", "policy_learning.test_processes", str(folder)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=900)


def differences(one, other):
    assert one.keys() == other.keys()
    return {name: float((one[name] - other[name]).abs().max()) for name in one}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_also_when_killed(tmp_path):
    first = launch(tmp_path)
    assert "exitcode  : 9" in first.stderr, first.stderr
    again = launch(tmp_path)
    assert again.returncode == 0, again.stderr
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    assert not any(differences(whole, resumed).values())  # bit for bit
    trainer, one = train()
    assert all(value.dtype == torch.float64 for value in one.values())
    assert {"scalar.spliced/loss", "scalar.on_policy/loss", "scalar.recorded/loss", "scalar.path"} <= one.keys()
    assert trainer.buffer.rollouts
    apart = differences(one, whole)
    assert max(apart.values()) < 1e-6, apart


class Fake:
    """The index of a process among several, and what all of them would gather."""

    def __init__(self, index, count, everything=()):
        self.process_index, self.num_processes, self.everything = index, count, everything

    def gather(self, _values):
        return torch.cat(list(self.everything))


@pytest.mark.parametrize(("size", "count"), [(5, 2), (2, 4), (1, 3), (6, 3), (3, 1)])
def test_every_process_has_as_many_items_and_gathers_all(size, count):
    items = torch.arange(float(size)) + 10
    shares = [Processes(Fake(index, count)).mine(size) for index in range(count)]
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(range(size))
    parts = [items[share] for share in shares]
    gradients = torch.zeros(size)
    for index, share in enumerate(shares):
        mine = parts[index].clone().requires_grad_()
        every = Processes(Fake(index, count, parts)).gather(mine, size)
        assert every.tolist() == items.tolist()
        (gradient,) = torch.autograd.grad(every.square().sum(), mine)
        gradients.index_add_(0, torch.tensor(share), gradient)
    torch.testing.assert_close(gradients, 2 * items)  # each item's once, also where it was done twice


def test_processes_that_disagree_are_told(tmp_path):
    fake = Fake(0, 2, [torch.tensor([3.0]), torch.tensor([0.0])])
    fake.device = "cpu"
    with pytest.raises(RuntimeError, match=r"The step must be the same in every process, got \[3.0, 0.0\]"):
        Processes(fake).agree(3, "The step")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

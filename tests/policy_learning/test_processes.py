"""Two processes that share every batch learn what one does, also with a policy in two parts; so do two that were stopped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from lohp_peft.policy_learning.processes import Processes
from lohp_peft.policy_learning.recordings import Recordings
from lohp_peft.policy_learning.sharding import local, whole
from policy_learning.conftest import build_bank, build_trajectories, make_trainer
from tiny import build_encoder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
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
# The same, shorter: with parameters in parts every operation takes far longer at this size.
SHARDED = {"cloning_steps": 2, "training_steps": 7, "on_policy_every": 2, "validate_every": 4, "save_every": 3}
STOPPED_AT = 7


def build(log=None, **changes):
    encoder = build_encoder(adapted=(1, 2))
    encoder.base_model.double()
    recordings = Recordings.from_trajectories(build_trajectories(encoder.space), 3)
    bank = build_bank(encoder, torch.float64)
    return make_trainer(encoder, bank, recordings, validate=True, options={"log": log}, **{**SETTINGS, **changes})


def train(folder=None, on_step=None, **changes):
    """What a run ends with: parameters, Adam's moments and the last scalars, as float64 tensors."""
    last = {}

    def log(step, scalars):
        last.update(scalars, step=step)
        if on_step is not None:
            on_step(step)

    trainer = build(log, **changes)
    policy = trainer.train(folder)
    found = {f"policy.{name}": value.detach().clone() for name, value in policy.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            moments = trainer.optimizer.state[parameter]  # none after a clone was taken at the last step
            found[f"adam.{group['lr']}.{i}"] = moments.get("exp_avg", torch.zeros_like(parameter.detach()))
    scalars = {f"scalar.{name}": torch.tensor(value, dtype=torch.float64) for name, value in last.items()}
    return trainer, whole(found) | scalars


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


def shard_policies():
    """What Accelerate does on GPUs with fsdp2.yaml; on a CPU it leaves FSDP out."""
    Accelerator(cpu=True).state.fsdp_plugin = FullyShardedDataParallelPlugin()
    for state in (PartialState(), AcceleratorState()):
        state.distributed_type = DistributedType.FSDP


def stop(step):
    if step == STOPPED_AT:
        raise KeyboardInterrupt


def main_sharded(folder):
    """A run that is stopped, and the rest of it, by two processes that hold half of the policy each."""
    shard_policies()
    with pytest.raises(KeyboardInterrupt):
        train(folder / "stopped", stop, **SHARDED)
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        shutil.copytree(folder / "stopped", folder / "for_one")
    processes.wait_for_everyone()
    trainer, found = train(folder / "stopped", **SHARDED)
    held = sum(local(parameter).numel() for parameter in trainer.policy.parameters())
    found["held"] = trainer.accelerator.gather(torch.tensor([held]))
    if processes.is_main_process:
        save_file(found, folder / "sharded.safetensors")
    trainer.accelerator.end_training()


def launch(folder, config, *arguments):
    line = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--main_process_port", "0"]
    line += ["--num_cpu_threads_per_process", "1", "-m", "policy_learning.test_processes", str(folder), *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=900)


def differences(one, other):
    assert one.keys() == other.keys()
    return {name: float((one[name] - other[name]).abs().max()) for name in one}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_also_when_killed(tmp_path):
    first = launch(tmp_path, "cpu_2_processes.yaml")
    assert "exitcode  : 9" in first.stderr, first.stderr
    again = launch(tmp_path, "cpu_2_processes.yaml")
    assert again.returncode == 0, again.stderr
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    assert not any(differences(whole, resumed).values())  # bit for bit
    trainer, one = train()
    assert all(value.dtype == torch.float64 for value in one.values())
    assert {"scalar.spliced/loss", "scalar.on_policy/loss", "scalar.recorded/loss", "scalar.path"} <= one.keys()
    assert trainer.buffer.rollouts
    apart = differences(one, whole)
    assert max(apart.values()) < 1e-6, apart


@pytest.mark.slow
def test_two_processes_with_half_of_the_policy_learn_what_one_does(tmp_path):
    done = launch(tmp_path, "fsdp2.yaml", "sharded")
    assert done.returncode == 0, done.stderr
    sharded = load_file(tmp_path / "sharded.safetensors")
    held = sharded.pop("held").tolist()
    trainer, one = train(**SHARDED)
    total = sum(parameter.numel() for parameter in trainer.policy.parameters())
    assert sum(held) == total
    assert len(held) == 2
    assert max(held) < 0.55 * total
    assert {"scalar.spliced/loss", "scalar.on_policy/loss", "scalar.path", "scalar.refreshed"} <= one.keys()
    assert max(differences(one, sharded).values()) < 1e-6
    _, continued = train(tmp_path / "for_one", **SHARDED)  # what two wrote is read by one
    assert max(differences(one, continued).values()) < 1e-6


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
    (main_sharded if "sharded" in sys.argv else main)(Path(sys.argv[1]))

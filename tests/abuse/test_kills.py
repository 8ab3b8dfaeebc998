"""Both stages killed with SIGKILL at random moments and started again: the result is that of an undisturbed run.

A moment is the n-th call or return of the process, drawn with a seed, so that a failure can be repeated. Half of them lie
in the modules that write.
"""

import os
import random

import pytest
import torch

from abuse.children import Moments, in_child
from abuse.world import content_of, prepare, train
from lohp_peft.trajectories import TrajectoryDataset

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def recorded(folder):
    """What stage 1 leaves, but for the random name of the dataset."""
    dataset = TrajectoryDataset.open(folder)
    return {key: [(run.task, run.seed, run.states, run.losses) for run in dataset[key]] for key in dataset.keys()}


def learned(folder):
    """The policy that stage 2 leaves; its log may tell of a training step twice."""
    content = content_of(folder)
    return {name: data for name, data in content.items() if name.endswith((".json", ".safetensors"))}


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def stage(world, name):
    """A stage as a function of its folder, and what is read of its result."""
    if name == "stage 1":
        return lambda folder: prepare(world.encoder, folder), recorded
    return lambda folder: train(world.encoder, world.folder / "store", folder), learned


def kill_and_continue(world, tmp_path, name, kills):
    """Kill runs at `kills` moments, some of them twice, and compare each continued run with an undisturbed one."""
    work, read = stage(world, name)

    def counted():
        with Moments() as moments:
            work(tmp_path / "whole")
        return moments.counts

    code, counts = in_child(counted)
    assert code == 0, counts
    assert isinstance(counts, dict), counts
    expected, chance, done = read(tmp_path / "whole"), random.Random(0), 0
    while done < kills:
        folder, killed = tmp_path / f"killed-{done}", []
        for _ in range(1 + chance.randrange(2)):
            kind = chance.choice(["any", "writing"])
            moment = kind, 1 + chance.randrange(counts[kind])

            def until_killed(moment=moment, folder=folder):
                with Moments(moment):
                    work(folder)

            code, answer = in_child(until_killed)
            assert not isinstance(answer, Exception), (killed, moment, answer)
            if code == 0:  # a continued run is shorter, and was over before
                break
            assert code == -9
            killed.append(moment)
        done += len(killed)
        code, answer = in_child(lambda folder=folder: work(folder) and None)
        assert (code, answer) == (0, None), (killed, answer)
        assert equal(read(folder), expected), killed
        left = [path.name for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        assert not left, (killed, left)
    return done


@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_a_killed_stage_is_continued(good_world, tmp_path, name):
    assert kill_and_continue(good_world, tmp_path, name, 3) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_fifty_kills_of_a_stage(good_world, tmp_path, name):
    assert kill_and_continue(good_world, tmp_path, name, 50) >= 50

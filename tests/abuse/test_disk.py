"""Disks that are full or read-only, and two writers at once: a clear error, and nothing that was there is lost."""

import builtins
import errno
import os
import resource
import stat

import pytest
import torch
from typer.testing import CliRunner

from abuse.children import FORK, LIMIT_S, in_child
from abuse.test_kills import equal, learned, recorded
from abuse.world import COMMANDS, RANK, READ, content_of, create_store, prepare, skipping, train
from lohp_peft import files
from lohp_peft.adapters.export import plain_lora_config, save_plain_lora
from lohp_peft.adapters.importing import read_plain_lora
from lohp_peft.cli.main import app
from lohp_peft.policy import LoHpPolicy
from lohp_peft.trajectories import TrajectoryDataset
from policy_learning.conftest import build_trajectory

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and limits of the process")


@pytest.fixture
def full_disk(monkeypatch):
    """Makes the n-th write from now on fail with ENOSPC after half of its bytes; `None` frees the disk."""
    left = {"writes": None}

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            if left["writes"] is not None:
                left["writes"] -= 1
                if left["writes"] <= 0:
                    self.stream.write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

    monkeypatch.setattr(files, "open", lambda *args: Full(builtins.open(*args)), raising=False)
    return lambda n: left.update(writes=n)


def new_run(world, seed=9):
    return [build_trajectory(world.encoder.space, "new", seed=seed, time=4)]


@pytest.mark.parametrize("write", [1, 2], ids=["shard", "manifest"])
def test_an_append_on_a_full_disk(world, full_disk, write):
    folder = world.folder / "store"
    dataset = TrajectoryDataset.open(folder)
    before = recorded(folder)
    full_disk(write)
    with pytest.raises(OSError, match="No space left on device"):
        dataset.append("new", new_run(world))
    assert equal(recorded(folder), before)
    assert not list(folder.rglob("*.tmp"))  # a full disk is not made fuller
    full_disk(None)
    dataset.append("new", new_run(world))
    assert equal(recorded(folder), {**before, "new": recorded(folder)["new"]})


@pytest.mark.parametrize("write", [1, 2], ids=["bases", "manifest"])
def test_a_new_store_on_a_full_disk(world, full_disk, write):
    full_disk(write)
    with pytest.raises(OSError, match="No space left"):
        create_store(world.folder / "new", world.encoder)
    full_disk(None)
    assert create_store(world.folder / "new", world.encoder).keys() == []


@pytest.mark.parametrize("write", [1, 5, 8])
def test_weight_preparation_on_a_full_disk_is_continued(world, full_disk, tmp_path, write):
    prepare(world.encoder, tmp_path / "whole")
    full_disk(write)
    with pytest.raises(OSError, match="No space left"):
        prepare(world.encoder, tmp_path / "full")
    full_disk(None)
    prepare(world.encoder, tmp_path / "full")
    assert equal(recorded(tmp_path / "full"), recorded(tmp_path / "whole"))


@pytest.mark.parametrize("write", [4, 5], ids=["tensors", "record"])
def test_policy_learning_on_a_full_disk_is_continued(world, full_disk, tmp_path, write):
    train(world.encoder, world.folder / "store", tmp_path / "whole")
    full_disk(write)
    with pytest.raises(OSError, match="No space left"):
        train(world.encoder, world.folder / "store", tmp_path / "full")
    full_disk(None)
    train(world.encoder, world.folder / "store", tmp_path / "full")
    assert learned(tmp_path / "full") == learned(tmp_path / "whole")


def limited(work):
    """Run `work` in a child whose files cannot grow beyond 2 kB, whoever writes them."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return work()

    return in_child(run)[1]


@posix
def test_an_adapter_that_cannot_be_written_leaves_the_old_one(world):
    folder, space = world.folder / "adapter", world.encoder.space
    old = content_of(folder)
    names = [spec.name for spec in space.layout.modules]
    adapter = space.decode(torch.ones(space.shape) * space.mask)
    error = limited(lambda: save_plain_lora(folder, adapter, plain_lora_config("someone/tiny", names, RANK)))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG
    assert content_of(folder) == old
    read_plain_lora(folder)


@posix
def test_a_policy_that_cannot_be_written_leaves_the_old_one(world):
    folder = world.folder / "policy"
    policy, old = LoHpPolicy.from_pretrained(folder), content_of(folder)
    error = limited(lambda: policy.save_pretrained(folder))
    assert isinstance(error, OSError)
    assert "Cannot write the policy" in str(error)
    assert content_of(folder) == old


@posix
def test_a_generation_that_cannot_be_written_is_one_line(world):
    def generate():
        result = COMMANDS["lohp-peft generate"](world)
        return type(result.exception), result.exit_code, result.stderr

    kind, code, message = limited(generate)
    assert (kind, code) == (SystemExit, 2)
    assert message.startswith("Error: OSError: ")
    assert message.count("\n") == 1


def as_reader(work, folder):
    """Run `work` in a child that may read `folder` and write nowhere; paths are relative, for what is above is private."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)

    def run():
        os.chdir(folder)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        return work()

    try:
        return in_child(run)[1]
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)


@posix
def test_a_store_that_cannot_be_written_can_be_read(world):
    before = content_of(world.folder)

    def read():
        dataset = TrajectoryDataset.open("store")
        return dataset.keys(), len(list(dataset))

    assert as_reader(read, world.folder) == (["ham", "mood", "spam"], 3)
    error = as_reader(lambda: TrajectoryDataset.open("store").append("new", new_run(world)), world.folder)
    assert isinstance(error, PermissionError), error
    assert "store" in str(error)
    error = as_reader(lambda: create_store("elsewhere", world.encoder), world.folder)
    assert isinstance(error, PermissionError), error
    assert content_of(world.folder) == before


@posix
def test_a_command_that_may_not_write_is_one_line(world):
    line = ["generate", "--base-model", "base", "--policy", "policy", "--task", "spam.jsonl", "--shots", "2"]
    known = str(world.folder)  # has content: what the error imports lies in a folder that the reader may not enter
    assert CliRunner().invoke(app, [*line, "--output", known]).exit_code == 2

    def generate():
        result = CliRunner().invoke(app, [*line, "--output", "new"])
        return result.exit_code, result.stderr or repr(result.exception)

    code, message = as_reader(generate, world.folder)
    assert code == 2, message
    assert message.startswith("Error: `--output` must be a folder that can be written")
    assert message.count("\n") == 1


def start(work):
    child = FORK.Process(target=work)
    child.start()
    return child


@posix
def test_two_writers_lose_nothing(world):
    folder, gate = world.folder / "store", FORK.Barrier(2, timeout=LIMIT_S)

    def write(name):
        dataset = TrajectoryDataset.open(folder)
        gate.wait()
        for i in range(20):
            dataset.append(f"{name}-{i}", new_run(world, seed=i))

    writers = [start(lambda name=name: write(name)) for name in ("one", "other")]
    for writer in writers:
        writer.join(LIMIT_S)
        assert writer.exitcode == 0
    dataset = TrajectoryDataset.open(folder)
    written = {f"{name}-{i}" for name in ("one", "other") for i in range(20)}
    assert set(dataset.keys()) == written | {"ham", "mood", "spam"}
    for key in written:
        assert dataset[key][0].states.equal(new_run(world, seed=int(key.split("-")[1]))[0].states)


@posix
def test_of_two_writers_of_one_key_one_wins_and_the_other_is_told(world):
    folder, gate, results = world.folder / "store", FORK.Barrier(2, timeout=LIMIT_S), FORK.SimpleQueue()

    def write(seed):
        dataset = TrajectoryDataset.open(folder)
        gate.wait()
        try:
            dataset.append("new", new_run(world, seed=seed))
        except ValueError as error:
            results.put(str(error))
        else:
            results.put(seed)

    writers = [start(lambda seed=seed: write(seed)) for seed in (5, 6)]
    for writer in writers:
        writer.join(LIMIT_S)
        assert writer.exitcode == 0
    told = sorted((results.get() for _ in writers), key=lambda answer: isinstance(answer, str))
    winner, message = told
    assert "already has a shard 'new'" in message
    assert [run.seed for run in TrajectoryDataset.open(folder)["new"]] == [winner]


@posix
def test_two_preparations_of_one_folder_lose_nothing(world, tmp_path):
    """Whoever comes second is told so; a third call completes what is missing."""
    gate, results = FORK.Barrier(2, timeout=LIMIT_S), FORK.SimpleQueue()

    def work():
        torch.set_num_threads(1)
        gate.wait()
        try:
            prepare(world.encoder, tmp_path / "both")
        except (FileExistsError, ValueError) as error:
            results.put(str(error))
        else:
            results.put("")

    writers = [start(work) for _ in range(2)]
    for writer in writers:
        writer.join(LIMIT_S)
        assert writer.exitcode == 0
    told = [results.get() for _ in writers]
    assert all(not text or "already" in text for text in told), told
    assert in_child(lambda: prepare(world.encoder, tmp_path / "both") and None) == (0, None)
    assert in_child(lambda: prepare(world.encoder, tmp_path / "whole") and None) == (0, None)
    assert equal(recorded(tmp_path / "both"), recorded(tmp_path / "whole"))


def test_a_file_in_the_place_of_a_store(world):
    (world.folder / "new").write_text("mine")
    with pytest.raises(OSError, match="new"):
        create_store(world.folder / "new", world.encoder)
    assert (world.folder / "new").read_text() == "mine"


def test_a_damaged_store_can_be_read_in_part_and_completed(world):
    folder = world.folder / "store"
    whole = recorded(folder)
    (shard,) = folder.glob("shards/spam-*")
    shard.write_bytes(shard.read_bytes()[:100])
    dataset = skipping(folder)
    assert dataset.keys() == ["ham", "mood"]
    dataset.append("spam", [build_trajectory(world.encoder.space, "spam", seed=0, time=4)])
    assert equal(recorded(folder), whole)
    READ["store"](world)

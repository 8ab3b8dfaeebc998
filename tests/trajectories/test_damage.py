import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from lohp_peft.files import sha256, write_atomically
from lohp_peft.trajectories import Trajectory, TrajectoryDataset


def _path(dataset, key):
    return dataset.folder / dataset.manifest.shards[key].file


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _rewrite(dataset, key, change, metadata=None):
    """Replace a shard by other tensors under a checksum that fits, as a careless tool might."""
    path = _path(dataset, key)
    header = metadata or {"dataset_id": dataset.manifest.dataset_id, "key": key}
    data = save(change(load(path.read_bytes())), metadata=header)
    path.write_bytes(data)
    entry = replace(dataset.manifest.shards[key], sha256=sha256(data))
    manifest = replace(dataset.manifest, shards={**dataset.manifest.shards, key: entry})
    (dataset.folder / "manifest.json").write_bytes(manifest.to_json())


def test_all_damaged_shards_are_listed_and_the_rest_can_be_read(dataset):
    _flip(_path(dataset, "spam"))
    _path(dataset, "topic").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 files.*'spam'.*damaged.*'topic'.*missing.*on_damage"):
        TrajectoryDataset.open(dataset.folder)
    with pytest.warns(UserWarning, match="Skipped") as caught:
        opened = TrajectoryDataset.open(dataset.folder, on_damage="skip")
    assert [("'spam'" in str(w.message), "'topic'" in str(w.message)) for w in caught] == [
        (True, False),
        (False, True),
    ]
    assert opened.keys() == ["mood"]
    assert (len(opened), len(list(opened))) == (2, 2)


def test_every_truncation_is_noticed(dataset):
    data = _path(dataset, "spam").read_bytes()
    for size in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        _path(dataset, "spam").write_bytes(data[:size])
        with pytest.raises(ValueError, match="'spam'.*damaged"):
            TrajectoryDataset.open(dataset.folder)


def test_every_flipped_byte_of_a_shard_is_noticed(dataset):
    path = _path(dataset, "spam")
    data = path.read_bytes()
    for position in range(0, len(data), len(data) // 20):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match="'spam'.*damaged"):
            TrajectoryDataset.open(dataset.folder)


def _to_half(tensors):
    return {name: x.half() if name == "0.states" else x for name, x in tensors.items()}


def _with_nan(tensors):
    return {**tensors, "0.states": tensors["0.states"] * torch.nan}


def _in_padding(tensors):
    return {**tensors, "0.states": torch.ones_like(tensors["0.states"])}


def _shorter(tensors):
    return {name: x[:-1].clone() if name.startswith("0.") else x for name, x in tensors.items()}


def _renamed(tensors):
    return {"extra" if name == "1.losses" else name: x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_to_half, "float16"),
        (_with_nan, "NaN"),
        (_in_padding, "not zero in the padding"),
        (_shorter, "6 states, the manifest says 7"),
        (_renamed, r"missing \['1.losses'\], unexpected \['extra'\]"),
    ],
)
def test_wrong_content_under_a_right_checksum_is_named(dataset, change, message):
    _rewrite(dataset, "spam", change)
    with pytest.raises(ValueError, match=f"(?s)'spam'.*{message}"):
        TrajectoryDataset.open(dataset.folder)


def test_shards_of_other_datasets_are_foreign(dataset):
    _rewrite(dataset, "spam", dict, metadata={"dataset_id": "another", "key": "spam"})
    with pytest.raises(ValueError, match="'spam'.*foreign"):
        TrajectoryDataset.open(dataset.folder)


def test_unlisted_files_are_foreign_unless_a_killed_writer_left_them(dataset, make_trajectory):
    shards = dataset.folder / "shards"
    own = _path(dataset, "spam").read_bytes()
    (shards / "left-behind.safetensors").write_bytes(own)
    TrajectoryDataset.open(dataset.folder)
    (shards / "stranger.safetensors").write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 files.*stranger\.safetensors is foreign"):
        TrajectoryDataset.open(dataset.folder)
    dataset.append("new", [make_trajectory()])
    assert not (shards / "left-behind.safetensors").exists()
    assert (shards / "stranger.safetensors").exists()  # not ours to delete


def test_damage_after_opening_is_noticed(dataset):
    strict, lenient = TrajectoryDataset.open(dataset.folder), TrajectoryDataset.open(dataset.folder, on_damage="skip")
    _flip(_path(dataset, "spam"))
    with pytest.raises(ValueError, match="'spam'.*damaged"):
        list(strict)
    with pytest.warns(UserWarning, match="'spam'"):
        assert len(list(lenient)) == 4


def test_a_damaged_shard_can_be_recorded_again(dataset, make_trajectory):
    _flip(_path(dataset, "spam"))
    with pytest.warns(UserWarning, match="'spam'"):
        opened = TrajectoryDataset.open(dataset.folder, on_damage="skip")
    opened.append("spam", [make_trajectory(9)])
    assert [t.seed for t in TrajectoryDataset.open(dataset.folder)["spam"]] == [9]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def _write_until_killed(folder, name, said):
    """Appends shards of a megabyte, and says after each one that it is on the disk."""
    torch.set_num_threads(1)  # those of the parent, which earlier tests may have started, did not come along
    dataset = TrajectoryDataset.open(folder)
    for i in range(10**6):
        states = torch.full((13000, *dataset.space.shape), float(i)) * dataset.space.mask
        series = torch.zeros(len(states))
        run = Trajectory(states, torch.arange(len(states)), series, {}, f"{name}-{i}", "sgd", {}, i)
        dataset.append(f"{name}-{i}", [run])
        os.write(said, b".")


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01])
def test_kill_9_loses_at_most_the_shard_in_flight_and_two_writers_agree(dataset, make_trajectory, delay):
    fork, writers, heard = multiprocessing.get_context("fork"), {}, {}
    for name in ("a", "b"):
        heard[name], said = os.pipe()
        writers[name] = fork.Process(target=_write_until_killed, args=(dataset.folder, name, said))
        writers[name].start()
        os.close(said)
    counts = {}
    for name, process in writers.items():
        before = len(os.read(heard[name], 1)) + len(os.read(heard[name], 1))
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        counts[name] = before + len(os.read(heard[name], 10**6))
        os.close(heard[name])
    opened = TrajectoryDataset.open(dataset.folder)
    for name, count in counts.items():
        kept = sorted(int(key.split("-")[1]) for key in opened.keys() if key.startswith(f"{name}-"))
        assert kept == list(range(len(kept)))
        assert len(kept) in (count, count + 1)  # whatever was said to be there is; one more may have been committed
    assert all(float(run.states.max()) == run.seed for run in opened if run.optimizer == "sgd")
    opened.append("after", [make_trajectory()])
    assert not list(dataset.folder.rglob("*.tmp"))


@pytest.mark.parametrize("point", ["before shard", "after shard", "inside manifest"])
def test_killed_at_each_point_of_an_append(dataset, make_trajectory, monkeypatch, point):
    """A process that dies runs no clean-up, so an exception that nothing catches stands for the signal."""
    replace_file, calls = os.replace, []

    def die(source, target):
        calls.append(target)
        if len(calls) == {"before shard": 1, "after shard": 2, "inside manifest": 2}[point]:
            if point == "inside manifest":
                os.truncate(source, 5)
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        dataset.append("new", [make_trajectory()])
    monkeypatch.undo()
    opened = TrajectoryDataset.open(dataset.folder)
    assert opened.keys() == ["mood", "spam", "topic"]
    opened.append("new", [make_trajectory()])
    assert len(TrajectoryDataset.open(dataset.folder)["new"]) == 1
    assert not list(dataset.folder.rglob("*.tmp"))


def test_two_processes_that_mend_one_shard_do_not_overwrite_each_other(dataset, make_trajectory):
    _flip(_path(dataset, "spam"))
    with pytest.warns(UserWarning, match="Skipped"):
        one, two = (TrajectoryDataset.open(dataset.folder, on_damage="skip") for _ in range(2))
    one.append("spam", [make_trajectory(7, "spam")])
    with pytest.raises(ValueError, match="already has a shard 'spam'"):
        two.append("spam", [make_trajectory(8, "spam")])
    assert [run.seed for run in TrajectoryDataset.open(dataset.folder)["spam"]] == [7]


def test_a_file_is_no_folder_of_trajectories(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="holds no trajectories"):
        TrajectoryDataset.open(tmp_path / "file")

import json
from dataclasses import replace

import pytest
import torch

from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.trajectories import TrajectoryDataset


def test_round_trip_is_exact(dataset, make_trajectory):
    opened = TrajectoryDataset.open(dataset.folder)
    assert opened.keys() == ["mood", "spam", "topic"]
    assert len(opened) == 6
    assert [t.seed for t in opened] == [2, 3, 0, 1, 4, 5]  # in the order of the keys, not of writing
    for read in opened["spam"]:
        written = make_trajectory(read.seed)
        for name in ("states", "optimizer_steps", "losses"):
            assert torch.equal(getattr(read, name), getattr(written, name))
        assert torch.equal(read.metrics["accuracy"], written.metrics["accuracy"])
        assert (read.task, read.optimizer, read.hyperparameters) == (
            written.task,
            written.optimizer,
            written.hyperparameters,
        )


def test_the_weight_space_comes_back(dataset, space):
    opened = TrajectoryDataset.open(dataset.folder)
    assert (opened.space.kind, opened.space.r, opened.space.layout) == (space.kind, space.r, space.layout)
    for name, values in space.to_tensors().items():
        assert torch.equal(opened.space.to_tensors()[name], values)
    assert opened.manifest.base_model_name == "tiny"
    assert opened.manifest.metadata == {"note": 1}


def test_unscored_losses_survive(dataset, make_trajectory):
    losses = torch.full((7,), float("nan"))
    dataset.append("raw", [make_trajectory(losses=losses)], metadata={"rows": [1, 2]})
    opened = TrajectoryDataset.open(dataset.folder)
    assert opened["raw"][0].losses.isnan().all()
    assert opened.manifest.shards["raw"].metadata == {"rows": [1, 2]}
    assert opened.manifest.shards["raw"].trajectories[0]["last_loss"] is None


def test_keys_may_be_any_text(dataset, make_trajectory):
    keys = ["../../etc/passwd", "A", "a", "é/ü b", "x" * 500]
    for key in keys:
        dataset.append(key, [make_trajectory(task=key)])
    opened = TrajectoryDataset.open(dataset.folder)
    assert set(keys) < set(opened.keys())
    assert [opened[key][0].task for key in keys] == keys
    assert {path.parent for path in dataset.folder.rglob("*.safetensors")} == {
        dataset.folder,
        dataset.folder / "shards",
    }


def test_create_refuses_a_folder_in_use(dataset, space):
    with pytest.raises(FileExistsError, match="already holds trajectories"):
        TrajectoryDataset.create(dataset.folder, space=space, base_fingerprint="", base_model_name="")


def test_append_refuses_what_does_not_fit(dataset, make_trajectory):
    with pytest.raises(ValueError, match="already has a shard 'spam'"):
        dataset.append("spam", [make_trajectory()])
    with pytest.raises(ValueError, match="at least one trajectory"):
        dataset.append("empty", [])
    narrow = make_trajectory(states=torch.zeros(7, 2, 9))
    padded = make_trajectory(states=torch.ones(7, 2, 10))
    with pytest.raises(ValueError, match=r"(?s)trajectory 0 has states of shape \(2, 9\).*trajectory 1 is not zero"):
        dataset.append("bad", [narrow, padded])
    with pytest.raises(ValueError, match="plain finite JSON"):
        dataset.append("bad", [make_trajectory(hyperparameters={"lr": torch.tensor(1.0)})])
    assert TrajectoryDataset.open(dataset.folder).keys() == ["mood", "spam", "topic"]


@pytest.mark.parametrize(
    ("change", "metadata", "problem"),
    [
        ({"seed": None}, {}, "`seed` must be int, got None"),
        ({"seed": True}, {}, "`seed` must be int, got True"),
        ({"task": None}, {}, "`task` must be str, got None"),
        ({"optimizer": 3}, {}, "`optimizer` must be str, got 3"),
        ({"task": "half a character \ud800"}, {}, "half of a character"),
        ({"hyperparameters": {1: 2, "1": 3}}, {}, "keys are repeated"),
        ({}, {1: 2, "1": 3}, "keys are repeated"),
    ],
    ids=str,
)
def test_what_could_not_be_read_again_is_not_appended(dataset, make_trajectory, change, metadata, problem):
    before = {path: path.read_bytes() for path in dataset.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=problem):
        dataset.append("odd", [replace(make_trajectory(), **change)], metadata)
    assert {path: path.read_bytes() for path in dataset.folder.rglob("*") if path.is_file()} == before


def test_a_dataset_that_could_not_be_read_again_is_not_begun(space, tmp_path):
    with pytest.raises(ValueError, match="'base_model_name' of the manifest must be str, got NoneType"):
        TrajectoryDataset.create(tmp_path, space=space, base_fingerprint="", base_model_name=None)
    assert TrajectoryDataset.create(tmp_path, space=space, base_fingerprint="", base_model_name="tiny").keys() == []


def test_opening_changes_nothing(dataset):
    (dataset.folder / "shards" / ".half.safetensors.abcd.tmp").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}
    list(TrajectoryDataset.open(dataset.folder))
    assert {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")} == before


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no trajectories"):
        TrajectoryDataset.open(tmp_path)


def _edit(dataset, change):
    path = dataset.folder / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_newer_schema_is_refused(dataset):
    _edit(dataset, lambda record: record.update(schema_version=2))
    with pytest.raises(ValueError, match=r"schema version 2.*reads up to 1.*Upgrade"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b"\xff\xfe"])
def test_damaged_manifest_is_named(dataset, content):
    (dataset.folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", ""])
def test_paths_out_of_the_folder_are_refused(dataset, name):
    _edit(dataset, lambda record: record["shards"]["spam"].update(file=name))
    with pytest.raises(ValueError, match="relative path inside the folder"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")


def test_bases_file_out_of_the_folder_is_refused(dataset):
    _edit(dataset, lambda record: record.update(space_file="../weight_space.safetensors"))
    with pytest.raises(ValueError, match="relative path inside the folder"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")


def test_links_out_of_the_folder_are_refused(dataset, tmp_path):
    shard = dataset.folder / dataset.manifest.shards["spam"].file
    shard.rename(tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"'spam'.*link that leads out"):
        TrajectoryDataset.open(dataset.folder)


def test_every_wrong_type_in_the_manifest_is_listed(dataset):
    def change(record):
        record["space_r"] = "2"
        record["shards"]["spam"]["trajectories"][0]["seed"] = None
        record["shards"]["mood"] = 3

    _edit(dataset, change)
    with pytest.raises(ValueError, match=r"(?s)'space_r'.*int, got str.*shard 'mood' must be.*'seed' of trajectory 0"):
        TrajectoryDataset.open(dataset.folder)


def test_damaged_bases_are_never_skipped(dataset):
    path = dataset.folder / "weight_space.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"weight_space\.safetensors is damaged"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        TrajectoryDataset.open(dataset.folder, on_damage="skip")


def test_another_reading_of_texts_is_refused_where_the_dataset_names_its_own(dataset, space, tmp_path):
    mine = {"space": space, "base_fingerprint": "f" * 64}
    dataset.check_matches(**mine, reading={"pooling": "last"})  # of an earlier version: it does not say
    about = {"reading": {"pooling": "mean", "max_length": 128, "tokenizer": "t"}}
    named = TrajectoryDataset.create(tmp_path / "named", **mine, base_model_name="tiny", metadata=about)
    named.check_matches(**mine, reading=about["reading"])
    named.check_matches(**mine)
    wrong = "pooling of texts: recorded with 'mean', got 'last'; max_length of texts: recorded with 128, got 4"
    with pytest.raises(ValueError, match=wrong):
        named.check_matches(**mine, reading={"pooling": "last", "max_length": 4, "tokenizer": "t"})


def test_check_matches_lists_every_difference(dataset, space):
    dataset.check_matches(space=space, base_fingerprint="f" * 64)
    other = LoraBSpace.seeded(AdapterLayout((ModuleSpec("x", 6, 5, "x", -1),)), r=3, seed=0)
    with pytest.raises(
        ValueError, match=r"(?s)base model: recorded on 'tiny'.*r=2, got 'lora_b' r=3.*layout: recorded 2"
    ):
        dataset.check_matches(space=other, base_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="use the dataset's own `space`"):
        dataset.check_matches(space=LoraBSpace.seeded(space.layout, r=2, seed=1), base_fingerprint="f" * 64)

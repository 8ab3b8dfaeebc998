"""What may be published, and by which names things are found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lohp_peft.hub import check_folder, find_policy, find_trajectories, pull_folder, push_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": BASE, "r": 8}))
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    return folder


def test_dry_run_sends_and_writes_nothing(adapter, hub):
    report = push_folder(adapter, "me/my-task", dry_run=True)
    assert hub.requests == []
    assert report.commit is None
    assert sorted(path.name for path in adapter.iterdir()) == sorted(report.files)


def test_resume_state_is_left_out(tmp_path, hub):
    folder = tmp_path / "policy"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "lohp_policy", "base_model_name": BASE}))
    (folder / "checkpoint" / "random_states.pkl").write_bytes(b"")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "config.json.metadata").write_text("")
    report = push_folder(folder, "me/policy")
    assert list(report.files) == ["README.md", "config.json"]
    assert set(hub.files("me/policy")) == {".gitattributes", *report.files}


def test_unsafe_files_are_all_named(adapter, tmp_path, hub):
    (adapter / "optimizer.pt").write_bytes(b"")
    (adapter / ".env").write_text("SECRET=1")
    (adapter / "sub").mkdir()
    (adapter / "sub" / "run.py").write_text("")
    (adapter / "link.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="4 others") as error:
        push_folder(adapter, "me/my-task")
    for name in ("optimizer.pt", ".env (hidden)", "sub/run.py", "link.json (a link)"):
        assert name in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "{folder}"}),
        ("manifest.json", {"format": "lohp_peft.trajectories", "base_model_name": "{folder}"}),
        ("config.json", {"model_type": "lohp_policy", "base_model_name": "{folder}"}),
    ],
)
def test_local_base_model_is_refused(tmp_path, file, content):
    content = {key: value.format(folder=tmp_path) for key, value in content.items()}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="local path"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{}"), ("config.json", '{"model_type": "bert"}'), ("manifest.json", "{}")],
)
def test_folder_of_no_known_kind(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match="neither an adapter"):
        check_folder(tmp_path)


def test_a_damaged_description_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_folder(tmp_path)


@pytest.mark.parametrize("repo_id", ["name-only", "a/b/c", "/absolute", "me/ spaced"])
def test_repository_names(adapter, repo_id):
    with pytest.raises(ValueError, match="owner/name"):
        push_folder(adapter, repo_id)


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT.upper(), ""])
def test_moving_revisions_are_refused(revision):
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        pull_folder("me/policy", revision=revision)


def test_find_policy(tmp_path):
    assert find_policy(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="none of"):
        find_policy(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        find_policy("me/policy")


def test_find_trajectories(tmp_path):
    assert find_trajectories(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"neither an existing folder nor owner/name@commit"):
        find_trajectories(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        find_trajectories("me/runs")
    with pytest.raises(ValueError, match="records no `base_fingerprint`"):
        find_trajectories(tmp_path, base_model=torch.nn.Linear(1, 1))


def test_shipped_policy_can_be_published():
    kind, sizes = check_folder(find_policy("shipped"))
    assert kind == "policy"
    assert "README.md" in sizes
    assert sum(sizes.values()) < 10 * 2**20

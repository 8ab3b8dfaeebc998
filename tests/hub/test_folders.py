"""Publishing and fetching, with the Hub replaced by a folder."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lohp_peft import hub
from lohp_peft.hub import check_folder, find_policy, pull_folder, push_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": BASE, "r": 8}))
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def remote(monkeypatch):
    """Records what would reach the Hub."""
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create_repo", repo_id, kwargs))

        def create_branch(self, repo_id, **kwargs):
            calls.append(("create_branch", repo_id, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", kwargs["repo_id"], kwargs))
            return SimpleNamespace(oid=COMMIT, commit_url=f"https://hub/{kwargs['repo_id']}/commit/{COMMIT}")

    monkeypatch.setattr(hub, "HfApi", Api)
    return calls


def test_push_creates_the_repository_and_the_card(adapter, remote):
    report = push_folder(adapter, "me/my-task", private=True, branch="next")
    assert [name for name, *_ in remote] == ["create_repo", "create_branch", "upload_folder"]
    assert remote[0][2] == {"repo_type": "model", "private": True, "exist_ok": True}
    upload = remote[-1][2]
    assert upload["allow_patterns"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert upload["revision"] == "next"
    assert report.commit == COMMIT
    assert report.kind == "adapter"
    assert report.files["README.md"] == (adapter / "README.md").stat().st_size
    assert "# my-task" in (adapter / "README.md").read_text()


def test_push_keeps_an_existing_card(adapter, remote):
    (adapter / "README.md").write_text("mine")
    push_folder(adapter, "me/my-task")
    assert (adapter / "README.md").read_text() == "mine"


def test_dry_run_sends_and_writes_nothing(adapter, remote):
    report = push_folder(adapter, "me/my-task", dry_run=True)
    assert remote == []
    assert report.commit is None
    assert sorted(path.name for path in adapter.iterdir()) == sorted(report.files)


def test_trajectories_are_a_dataset(tmp_path, remote):
    manifest = {"format": "lohp_peft.trajectories", "base_model_name": BASE}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / ".lock").write_text("")
    assert push_folder(tmp_path, "me/runs").repo_type == "dataset"
    assert remote[0][2]["repo_type"] == "dataset"


def test_resume_state_is_left_out(tmp_path, remote):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lohp_policy", "base_model_name": BASE}))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "random_states.pkl").write_bytes(b"")
    report = push_folder(tmp_path, "me/policy")
    assert list(report.files) == ["README.md", "config.json"]
    assert remote[-1][2]["allow_patterns"] == ["README.md", "config.json"]


def test_unsafe_files_are_all_named(adapter, tmp_path, remote):
    (adapter / "optimizer.pt").write_bytes(b"")
    (adapter / ".env").write_text("SECRET=1")
    (adapter / "sub").mkdir()
    (adapter / "sub" / "run.py").write_text("")
    (adapter / "link.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="4 others") as error:
        push_folder(adapter, "me/my-task")
    for name in ("optimizer.pt", ".env (hidden)", "sub/run.py", "link.json (a link)"):
        assert name in str(error.value)
    assert remote == []


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
    [("config.json", "{}"), ("config.json", '{"model_type": "bert"}'), ("manifest.json", "{}"), ("config.json", "{")],
)
def test_folder_of_no_known_kind(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match="neither an adapter"):
        check_folder(tmp_path)


@pytest.mark.parametrize("repo_id", ["name-only", "a/b/c", "/absolute", "me/ spaced"])
def test_repository_names(adapter, repo_id, remote):
    with pytest.raises(ValueError, match="owner/name"):
        push_folder(adapter, repo_id)


def test_pull_is_pinned_and_limited(monkeypatch, tmp_path):
    seen = {}

    def snapshot_download(repo_id, **kwargs):
        seen.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert pull_folder("me/policy", revision=COMMIT) == tmp_path
    assert seen["revision"] == COMMIT
    assert seen["allow_patterns"] == ["*.json", "*.md", "*.safetensors", "LICENSE"]
    assert find_policy(f"me/policy@{COMMIT}") == tmp_path


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


def test_shipped_policy_can_be_published():
    kind, sizes = check_folder(find_policy("shipped"))
    assert kind == "policy"
    assert "README.md" in sizes
    assert sum(sizes.values()) < 10 * 2**20

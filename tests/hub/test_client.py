"""The real client of the Hub against a server on this machine: what is published comes back bit for bit, or not at all."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import DatasetCard, HfApi, ModelCard, constants
from peft import PeftModel, get_peft_model

import tiny_world as tiny
from hub.conftest import BASE
from lohp_peft import GenerationConfig, LoHpConfig, LoHpPolicy, TrajectoryDataset
from lohp_peft.cards import adapter_card_of, is_ours
from lohp_peft.cards.ownership import is_empty
from lohp_peft.cli.main import main
from lohp_peft.hub import check_fingerprint, find_policy, pull_folder, push_folder

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "lohp_provenance.json"}


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, but what the client or a lock keeps there."""
    paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(".")}


def command(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def outputs(model):
    batch = tiny.build_tokenizer()([row["text"] for row in tiny.build_rows()], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).last_hidden_state


# There and back


def test_policy(hub, policy):
    report = policy.push_to_hub("me/policy", private=True, license="apache-2.0")
    assert (report.kind, report.repo_type) == ("policy", "model")
    assert hub.repositories["model", "me/policy"].private
    loaded = LoHpPolicy.from_pretrained(f"me/policy@{report.commit}")
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, tensor in policy.space.to_tensors().items():
        assert torch.equal(loaded.space.to_tensors()[name], tensor), name
    folder = find_policy(f"me/policy@{report.commit}")
    sent = hub.files("me/policy")
    assert contents(folder) == {name: data for name, data in sent.items() if name != ".gitattributes"}
    assert set(contents(folder)) == set(report.files)
    card = ModelCard(sent["README.md"].decode())
    assert (card.data.base_model, card.data.license) == (BASE, "apache-2.0")
    assert 'LoHpConfig(policy="me/policy@<commit hash>")' in card.text


def test_policy_of_the_hub_generates(hub, policy, base_model, made):
    commit = policy.push_to_hub("me/policy").commit
    model = get_peft_model(
        tiny.build_bert(), LoHpConfig(policy="me/policy", policy_revision=commit, task_type="FEATURE_EXTRACTION")
    )
    model.generate_adapter(tiny.build_rows(), tokenizer=tiny.build_tokenizer(), config=GenerationConfig(choose=False))
    name = next(iter(made.lora))
    layer = model.base_model.model.get_submodule(name)
    assert torch.equal(layer.lora_A["default"].weight, made.lora[name][0])
    assert torch.equal(layer.lora_B["default"].weight, made.lora[name][1])


def test_adapter(hub, made, tmp_path, base_model):
    report = made.push_to_hub("me/my-task", license="mit")
    assert set(report.files) == ADAPTER
    made.save_pretrained(tmp_path / "local")
    folder = pull_folder("me/my-task", revision=report.commit, base_model=base_model)
    local = contents(tmp_path / "local")
    assert {name: data for name, data in contents(folder).items() if name != "README.md"} == {
        name: data for name, data in local.items() if name != "README.md"
    }
    card = ModelCard(hub.files("me/my-task")["README.md"].decode())
    assert (card.data.base_model, card.data.library_name, card.data.license) == (BASE, "peft", "mit")
    assert "# my-task" in card.text
    remote = PeftModel.from_pretrained(tiny.build_bert(), "me/my-task", revision=report.commit)
    here = PeftModel.from_pretrained(tiny.build_bert(), str(tmp_path / "local"))
    assert torch.equal(outputs(remote), outputs(here))


def test_trajectories(hub, recordings, tmp_path, base_model):
    report = recordings.push_to_hub("me/runs")
    assert (report.kind, report.repo_type) == ("trajectories", "dataset")
    pulled = TrajectoryDataset.from_pretrained(f"me/runs@{report.commit}", base_model=base_model)
    assert {name: data for name, data in contents(pulled.folder).items() if name != "README.md"} == contents(
        recordings.folder
    )
    assert len(pulled) == len(recordings) == 4
    for mine, theirs in zip(recordings, pulled, strict=True):
        assert torch.equal(mine.states, theirs.states)
        assert torch.equal(mine.losses, theirs.losses)
    card = DatasetCard(hub.files("me/runs", "dataset")["README.md"].decode())
    assert card.data.pretty_name == "runs"
    assert "| mood | 2 | adamw, sam | 0, 1 | 0.700 | 0.305 | not stated |" in card.text

    pulled.append("more", list(pulled)[:1])  # real files, not links into a cache
    second = push_folder(pulled.folder, "me/runs")
    chosen = tmp_path / "chosen"
    again = TrajectoryDataset.from_pretrained(f"me/runs@{second.commit}", local_dir=chosen)
    assert (again.folder, again.keys()) == (chosen, ["mood", "more", "topic"])


def test_what_a_folder_lost_goes_from_the_branch(hub, recordings, tmp_path):
    recordings.push_to_hub("me/runs", branch="next")
    assert list(hub.files("me/runs", "dataset")) == [".gitattributes"], "the default branch was not asked for"
    fresh = TrajectoryDataset.create(
        tmp_path / "fresh", space=recordings.space, base_fingerprint="f" * 64, base_model_name=BASE
    )
    fresh.append("mood", recordings["mood"])
    commit = fresh.push_to_hub("me/runs", branch="next").commit
    shards = [name for name in hub.files("me/runs", "dataset", "next") if name.startswith("shards/")]
    assert len(shards) == 1
    assert TrajectoryDataset.from_pretrained(f"me/runs@{commit}").keys() == ["mood"]


def test_a_damaged_set_is_not_published(hub, recordings):
    next(recordings.folder.glob("shards/*")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be used"):
        recordings.push_to_hub("me/runs")
    assert hub.repositories == {}


@pytest.mark.parametrize("xet", [True, False], ids=["default client", "without xet"])
def test_command_line(hub, made, recordings, tmp_path, capsys, monkeypatch, xet):
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\ntags: [mine]\nbase_model: someone/tiny\n---\n# Mine\n")
    if xet:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.large = ()  # its storage speaks another protocol, so everything is small
    code, printed, _ = command("push", tmp_path / "adapter", "me/my-task", "--json", "--branch", "v2", capsys=capsys)
    report = json.loads(printed)
    assert code == 0
    assert pull_folder("me/my-task", revision=report["commit"]).is_dir()
    assert "# Mine" in hub.files("me/my-task", branch="v2")["README.md"].decode()
    code, printed, _ = command("push", recordings.folder, "me/runs", "--license", "cc0-1.0", capsys=capsys)
    assert code == 0
    assert "trajectories went to me/runs" in " ".join(printed.split())
    assert DatasetCard(hub.files("me/runs", "dataset")["README.md"].decode()).data.license == "cc0-1.0"


def test_the_empty_card_of_peft_is_replaced(hub, policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    base = tiny.build_bert()
    base.name_or_path = base.config.name_or_path = BASE
    model = get_peft_model(base, LoHpConfig(policy=str(tmp_path / "policy"), task_type="FEATURE_EXTRACTION"))
    model.generate_adapter(tiny.build_rows(), tokenizer=tiny.build_tokenizer())
    model.save_pretrained(tmp_path / "saved")
    assert "[More Information Needed]" in (tmp_path / "saved" / "README.md").read_text()
    push_folder(tmp_path / "saved", "me/my-task")
    card = hub.files("me/my-task")["README.md"].decode()
    assert "[More Information Needed]" not in card
    assert 'snapshot_download("me/my-task")' in card

    model.push_to_hub("me/my-task")  # PEFT's own method keeps a card that is there,
    assert hub.files("me/my-task")["README.md"].decode() == card
    with pytest.raises(ValueError, match="base_model must be a repository"):
        model.push_to_hub("me/another")  # and where there is none sends one that knows neither base model nor PEFT


SNIPPET = """
import sys
sys.modules["lohp_peft"] = None
exec(compile(sys.stdin.read(), "card", "exec"))
"""


def test_the_card_works_where_the_package_does_not_exist(hub, made, base_model, tmp_path):
    """Its snippet as it stands, in a process of its own whose client knows the server from its environment."""
    base_model.save_pretrained(tmp_path / "base")
    tiny.build_tokenizer().save_pretrained(tmp_path / "base")
    hub.publish(BASE, contents(tmp_path / "base"))
    made.push_to_hub("me/my-task")
    card = hub.files("me/my-task")["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0].replace("a new text", tiny.build_rows()[0]["text"])
    hidden = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "other"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET],
        input=code,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("['bad']\n", "['good']\n")


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_other_cards_work(hub, policy, recordings, base_model, capsys):
    commit = recordings.push_to_hub("me/runs").commit
    with_package, without = snippets(hub.files("me/runs", "dataset")["README.md"].decode())
    known = {"base_model": base_model}
    exec(with_package.replace("<commit hash>", commit), known)
    assert len(known["dataset"]) == 4
    assert "lohp_peft" not in without
    exec(without, {})
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), lines[0][:25]) == (4, "mood adamw 0 (4, 4, 32) 0."[:25])

    commit = policy.push_to_hub("me/policy").commit
    (code,) = snippets(hub.files("me/policy")["README.md"].decode())
    code = code.replace("<commit hash>", commit).replace("my-adapter", f"{constants.HF_HOME}/my-adapter")
    exec(code, {"base_model": tiny.build_bert(), "support": tiny.build_rows(), "tokenizer": tiny.build_tokenizer()})
    assert Path(constants.HF_HOME, "my-adapter", "adapter_model.safetensors").is_file()


# What is refused


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "deep/er/optimizer.PT",
        "../evil.json",
        "a/../../evil.json",
        "/etc/evil.json",
        "C:\\evil.json",
        "a//b.md",
    ],
)
def test_unsafe_repository(hub, policy, tmp_path, name):
    policy.save_pretrained(tmp_path / "policy")
    commit = hub.publish("you/policy", {**contents(tmp_path / "policy"), name: b"{}"})
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds 1 unsafe files") as error:
        LoHpPolicy.from_pretrained(f"you/policy@{commit}")
    assert repr(name) in str(error.value)
    assert not [request for request in hub.requests if "/resolve/" in request], "a file was fetched"
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before


def test_all_unsafe_files_are_named(hub, made):
    commit = hub.publish("you/task", {"a.pkl": b"", "b.pth": b"", "../c.md": b"", "ok.json": b"{}", "plot.png": b""})
    with pytest.raises(ValueError, match="3 unsafe files: 'a.pkl' .*, 'b.pth' .*, '../c.md'"):
        pull_folder("you/task", revision=commit)


def test_other_files_stay_where_they_are(hub):
    commit = hub.publish("you/task", {"plot.png": b"", "run.py": b"", "ok[1].json": b"{}", "LICENSE": b"x"})
    assert set(contents(pull_folder("you/task", revision=commit))) == {"ok[1].json", "LICENSE"}


def test_a_link_is_no_configuration(hub, policy, tmp_path):
    """A link arrives as a file that holds its target's name."""
    policy.save_pretrained(tmp_path / "policy")
    commit = hub.publish("you/policy", {**contents(tmp_path / "policy"), "config.json": b"../../../secret.json"})
    with pytest.raises(ValueError, match=r"config\.json"):
        LoHpPolicy.from_pretrained(f"you/policy@{commit}")


def test_another_base_model(hub, policy, made, recordings, tmp_path):
    torch.manual_seed(1)
    other = type(tiny.build_bert())(tiny.build_bert().config)
    commits = {
        "model": made.push_to_hub("me/my-task").commit,
        "dataset": recordings.push_to_hub("me/runs").commit,
    }
    with pytest.raises(ValueError, match="was made for a base model with fingerprint .* got 'BertModel' with"):
        pull_folder("me/my-task", revision=commits["model"], base_model=other)
    with pytest.raises(ValueError, match="was made for a base model"):
        TrajectoryDataset.from_pretrained(f"me/runs@{commits['dataset']}", base_model=other)
    commit = policy.push_to_hub("me/policy").commit
    with pytest.raises(ValueError, match="was made for a base model"):
        pull_folder("me/policy", revision=commit, base_model=other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="records no `base_fingerprint`"):
        check_fingerprint(tmp_path / "empty", other)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_arrives_is_what_the_commit_holds(hub, made, name):
    """The same length, other bytes: as a broken storage or a changed download cache would give."""
    commit = made.push_to_hub("me/my-task").commit
    folder = pull_folder("me/my-task", revision=commit)
    path = (folder / name).resolve()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=f"1 files of me/my-task are not what commit .* holds: {name}"):
        pull_folder("me/my-task", revision=commit)


# What the Hub refuses


@pytest.mark.parametrize(
    "fault",
    [("PUT", "/storage/", 413), ("POST", "/commit/", 500), ("POST", "/commit/", 0), ("POST", "/preupload/", 403)],
    ids=["upload", "commit", "connection", "preupload"],
)
def test_an_interrupted_push_can_be_repeated(hub, made, tmp_path, fault, capsys):
    made.save_pretrained(tmp_path / "adapter", base_model_name=str(tmp_path))
    before = contents(tmp_path / "adapter")
    hub.faults.append(fault)
    code, _, told = command("push", tmp_path / "adapter", "me/my-task", capsys=capsys)
    assert code == 2
    assert "Traceback" not in told
    assert "to me/my-task failed; it can be repeated" in told
    assert list(hub.files("me/my-task")) == [".gitattributes"], "half an adapter is visible"
    assert contents(tmp_path / "adapter") == before
    report = push_folder(tmp_path / "adapter", "me/my-task")
    assert set(hub.files("me/my-task")) == ADAPTER | {".gitattributes"}
    assert hub.repositories["model", "me/my-task"].branches["main"] == report.commit


def test_pushing_the_same_again_makes_no_commit(hub, made, tmp_path):
    made.save_pretrained(tmp_path / "adapter")
    first = push_folder(tmp_path / "adapter", "me/my-task")
    assert push_folder(tmp_path / "adapter", "me/my-task").commit == first.commit
    assert sum(request.startswith("PUT") for request in hub.requests) == 2, "weights were sent twice"


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        ("token-of-you", "me/my-task", "403 Forbidden: You have no rights to create a repository in me"),
        ("token-of-nobody", "me/my-task", "401 Client Error|Invalid username or password"),
    ],
)
def test_no_rights_to_write(hub, made, monkeypatch, token, repo_id, expected):
    with pytest.raises(RuntimeError, match=rf"Publishing .* to {repo_id} failed.*({expected})"):
        made.push_to_hub(repo_id, token=token)
    assert hub.repositories == {}


def test_no_rights_to_read(hub, made):
    commit = made.push_to_hub("me/secret", private=True).commit
    for token in ("token-of-you", "token-of-nobody"):
        with pytest.raises(
            RuntimeError, match="Fetching me/secret .* failed: 40[14] Client Error.*Repository Not Found"
        ):
            pull_folder("me/secret", revision=commit, token=token)
    with pytest.raises(RuntimeError, match="Fetching me/missing .* failed: 404.*Repository Not Found"):
        pull_folder("me/missing", revision=commit)
    with pytest.raises(RuntimeError, match="Fetching me/secret .* failed: 404.*Revision Not Found"):
        pull_folder("me/secret", revision="1" * 40)


def test_a_private_policy_is_fetched_with_the_token_that_is_given(hub, policy, monkeypatch):
    commit = policy.push_to_hub("me/secret", private=True).commit
    monkeypatch.setenv("HF_TOKEN", "token-of-nobody")
    for given in ({}, {"token": "token-of-you"}):
        with pytest.raises(RuntimeError, match="Repository Not Found"):
            LoHpPolicy.from_pretrained("me/secret", revision=commit, **given)
    loaded = LoHpPolicy.from_pretrained("me/secret", revision=commit, token="token-of-me")
    assert torch.equal(loaded.scale, policy.scale)


def test_a_card_that_the_hub_finds_invalid(hub, made, tmp_path):
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\ntags: 3\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_folder(tmp_path / "adapter", "me/my-task")


def test_offline_the_cache_answers(hub, made, monkeypatch):
    commit = made.push_to_hub("me/my-task").commit
    online = pull_folder("me/my-task", revision=commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert pull_folder("me/my-task", revision=commit) == online
    assert len(hub.requests) == asked
    with pytest.raises(RuntimeError, match="Fetching me/other"):
        pull_folder("me/other", revision=commit)


def test_offline_only_what_was_fetched_at_the_commit_is_taken(hub, made, recordings, tmp_path, monkeypatch):
    """As the client has noted beside the files, with their digests; appended recordings are no matter."""
    commit, runs = made.push_to_hub("me/my-task").commit, recordings.push_to_hub("me/runs").commit
    later = hub.publish("me/my-task", {"lohp_provenance.json": b"{}"})
    here, mine, empty = (tmp_path / name for name in ("here", "mine", "empty"))
    pull_folder("me/my-task", revision=commit, local_dir=here)
    fetched = TrajectoryDataset.from_pretrained(f"me/runs@{runs}")
    made.save_pretrained(mine)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_folder("me/my-task", revision=commit, local_dir=here) == here
    for folder, revision in ((here, later), (mine, commit)):
        with pytest.raises(RuntimeError, match="cannot be compared offline.* lohp_provenance.json.*fetch it once"):
            pull_folder("me/my-task", revision=revision, local_dir=folder)
    with pytest.raises(RuntimeError, match="Fetching me/my-task"):
        pull_folder("me/my-task", revision=commit, local_dir=empty)
    shutil.rmtree(mine)
    (mine / ".cache").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot be compared offline.* all. Connect"):
        pull_folder("me/my-task", revision=commit, local_dir=mine)
    (here / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not those of me/my-task at .*adapter_config.json"):
        pull_folder("me/my-task", revision=commit, local_dir=here)
    (here / "adapter_config.json").unlink()
    with pytest.raises(RuntimeError, match="cannot be compared offline.* adapter_config.json"):
        pull_folder("me/my-task", revision=commit, local_dir=here)
    fetched.append("mine", list(fetched)[:1])
    assert TrajectoryDataset.from_pretrained(f"me/runs@{runs}").keys() == ["mine", "mood", "topic"]


def test_where_the_hub_cannot_be_reached_the_cache_answers(hub, made, monkeypatch):
    commit = made.push_to_hub("me/my-task").commit
    online = pull_folder("me/my-task", revision=commit)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)  # it waits between its attempts
    assert pull_folder("me/my-task", revision=commit) == online
    with pytest.raises(RuntimeError, match="Publishing .* to me/my-task failed; it can be repeated"):
        made.push_to_hub("me/my-task")


# What lies there already


def test_recordings_appended_to_a_fetched_set_survive_the_next_fetch(hub, recordings):
    name = f"me/runs@{recordings.push_to_hub('me/runs').commit}"
    fetched = TrajectoryDataset.from_pretrained(name)
    fetched.append("mine", list(fetched)[:1])
    os.utime(fetched.folder / "manifest.json", (1, 1))  # the client's own notes tell changes by their time
    again = TrajectoryDataset.from_pretrained(name)
    assert again.keys() == ["mine", "mood", "topic"]
    again.append("more", list(again)[:1])
    assert TrajectoryDataset.from_pretrained(name).keys() == ["mine", "mood", "more", "topic"]
    recordings.append("mine", list(recordings)[:1])
    assert TrajectoryDataset.from_pretrained(name, local_dir=recordings.folder).keys() == ["mine", "mood", "topic"]


def test_what_a_killed_fetch_left_is_completed(hub, recordings, tmp_path):
    name = f"me/runs@{recordings.push_to_hub('me/runs').commit}"
    fetched = TrajectoryDataset.from_pretrained(name, local_dir=tmp_path / "here")
    whole = contents(fetched.folder)
    next((fetched.folder / "shards").glob("*.safetensors")).unlink()
    (fetched.folder / "weight_space.safetensors").unlink()
    again = TrajectoryDataset.from_pretrained(name, local_dir=tmp_path / "here")
    assert contents(again.folder) == whole


def test_a_fetch_writes_over_nothing(hub, recordings, made, tmp_path):
    commit = recordings.push_to_hub("me/runs").commit
    own = TrajectoryDataset.create(
        tmp_path / "own", space=recordings.space, base_fingerprint="f" * 64, base_model_name=BASE
    )
    own.append("mood", recordings["mood"])
    before = contents(own.folder)
    with pytest.raises(ValueError, match="holds 2 files that are not those of me/runs .*manifest.json.*empty folder"):
        TrajectoryDataset.from_pretrained(f"me/runs@{commit}", local_dir=own.folder, on_damage="skip")
    assert contents(own.folder) == before
    commit = made.push_to_hub("me/adapter").commit
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"mine")
    (tmp_path / "adapter" / "head.safetensors").unlink()
    before = contents(tmp_path / "adapter")
    with pytest.raises(ValueError, match="not those of me/adapter at .*adapter_model.safetensors"):
        pull_folder("me/adapter", revision=commit, local_dir=tmp_path / "adapter")
    assert contents(tmp_path / "adapter") == before


def test_publishing_leaves_what_others_put_there(hub, made, tmp_path):
    api = HfApi()
    api.create_repo("me/zoo")
    for name in ("tokenizer.json", "topic/adapter_model.safetensors"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="me/zoo")
    made.save_pretrained(tmp_path / "adapter", base_model_name=BASE)
    push_folder(tmp_path / "adapter", "me/zoo")
    assert set(hub.files("me/zoo")) == ADAPTER | {
        ".gitattributes",
        "tokenizer.json",
        "topic/adapter_model.safetensors",
    }
    for name in ("head.safetensors", "lohp_provenance.json"):
        (tmp_path / "adapter" / name).unlink()
    push_folder(tmp_path / "adapter", "me/zoo")
    assert "head.safetensors" not in hub.files("me/zoo"), "a head of before would be read with the new weights"
    assert "lohp_provenance.json" not in hub.files("me/zoo")
    assert "tokenizer.json" in hub.files("me/zoo")


def test_a_repository_without_anything_to_read_is_told(hub):
    HfApi().create_repo("me/empty")
    commit = HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="me/empty").oid
    with pytest.raises(ValueError, match="me/empty is not fetched, because it holds no"):
        pull_folder("me/empty", revision=commit)


def test_a_card_that_is_no_utf8_is_named(hub, made, tmp_path):
    made.save_pretrained(tmp_path, base_model_name=BASE)
    (tmp_path / "README.md").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="README.md is no text in UTF-8"):
        push_folder(tmp_path, "me/adapter", dry_run=True)


def test_weights_that_are_not_loaded_are_told(made, tmp_path):
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny.build_bert()
    with pytest.raises(ValueError, match="of BertModel .* weights are not loaded.*load them first"):
        check_fingerprint(tmp_path, model)


# Whose a card is


def sent_card(hub, repo_id="me/mood", **kwargs) -> str:
    return hub.files(repo_id, **kwargs)["README.md"].decode()


def test_our_card_is_rendered_anew_at_every_push(hub, made, tmp_path):
    folder = tmp_path / "first"
    made.save_pretrained(folder, base_model_name=BASE)
    assert is_ours((folder / "README.md").read_text())
    hub.faults.append(("POST", "/commit/", 500))
    with pytest.raises(RuntimeError, match="can be repeated"):
        push_folder(folder, "me/typo")
    folder = folder.rename(tmp_path / "second")
    push_folder(folder, "me/mood", license="mit")
    assert is_ours(sent_card(hub))
    assert 'snapshot_download("me/mood")' in sent_card(hub)
    provenance = json.loads((folder / "lohp_provenance.json").read_text())
    (folder / "lohp_provenance.json").write_text(json.dumps(provenance | {"label_names": ["sad", "glad"]}))
    push_folder(folder, "me/mood")
    assert "| labels | sad, glad |" in sent_card(hub)
    assert ModelCard(sent_card(hub)).data.license == "mit", "what an earlier push was given"


def test_a_card_of_ours_does_not_outlive_a_training(hub, made, tmp_path):
    """PEFT keeps a card that is there, changes its metadata and appends its version."""
    made.save_pretrained(tmp_path, base_model_name=BASE)
    model = PeftModel.from_pretrained(tiny.build_bert(), tmp_path, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(1.0)
    model.save_pretrained(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    assert "no gradient step" in (tmp_path / "README.md").read_text()
    push_folder(tmp_path, "me/mood")
    assert "have changed since" in sent_card(hub)
    assert "head.safetensors" not in sent_card(hub)
    assert "Framework versions" not in sent_card(hub)


def test_a_policy_that_was_trained_again_has_its_own_card(hub, policy, base_model):
    policy.push_to_hub("me/policy", license="mit")
    tiny.build_policy(base_model, preset="lohp+path").push_to_hub("me/policy")
    card = sent_card(hub, "me/policy")
    assert "| preset | lohp+path |" in card
    assert ModelCard(card).data.license == "mit"


def test_what_somebody_put_into_the_metadata_stays(hub, made, tmp_path):
    """In the folder and in a repository that was made on the Hub's pages, where the licence is asked for."""
    made.save_pretrained(tmp_path, base_model_name=BASE)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace("---\n", "---\nlanguage: en\ntags: [x]\n", 1))
    hub.publish("me/mood", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    push_folder(tmp_path, "me/mood")
    metadata = ModelCard(sent_card(hub)).data
    assert (metadata.language, metadata.license, metadata.tags) == ("en", "cc-by-4.0", ["lohp", "lora"])
    assert "cc-by-4.0. The terms of the base model" in sent_card(hub)


@pytest.mark.parametrize("own", ["edited", "scores", "filled in", "other"])
def test_somebodys_card_stays(hub, made, tmp_path, own):
    if own == "filled in":
        model = PeftModel.from_pretrained(tiny.build_bert(), saved(made, tmp_path))
        model.get_base_model().config._name_or_path = BASE
        (tmp_path / "README.md").unlink()
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert is_empty(text)
        text = text.replace("**Developed by:** [More Information Needed]", "**Developed by:** me")
    elif own == "scores":
        saved(made, tmp_path)
        text = adapter_card_of(tmp_path, location="me/mood", scores={"none": {"accuracy": 0.5}})
    elif own == "edited":
        text = (saved(made, tmp_path) / "README.md").read_text().replace("## Limits\n", "## Limits\n\n- Mine.")
    else:
        text = "---\ntags: [mine]\nbase_model: someone/tiny\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text)
    made.save_pretrained(tmp_path, base_model_name=BASE)
    push_folder(tmp_path, "me/mood")
    assert sent_card(hub) == (tmp_path / "README.md").read_text() == text


def saved(made, folder):
    made.save_pretrained(folder, base_model_name=BASE)
    return folder


def test_the_card_of_a_generation_learns_its_place_and_licence(hub, made, tmp_path):
    made.save_pretrained(tmp_path, base_model_name=BASE)
    push_folder(tmp_path, "me/mood", license="mit")
    card = ModelCard(hub.files("me/mood")["README.md"].decode())
    assert card.data.license == "mit"
    assert 'snapshot_download("me/mood")' in card.text
    own = "---\ntags: [mine]\nbase_model: someone/tiny\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(own)
    push_folder(tmp_path, "me/mood")
    assert hub.files("me/mood")["README.md"].decode() == own
    with pytest.raises(
        ValueError, match="`license` is for a card that is rendered, and .*README.md is somebody's own"
    ):
        push_folder(tmp_path, "me/mood", license="mit")

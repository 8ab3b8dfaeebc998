"""What may be published, and by which names things are found."""

import json

import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, BertModel

import tiny_world as tiny
from hub.conftest import BASE as TINY
from lohp_peft import GenerationConfig, LoHpConfig, initialize_lohp_weights, to_plain_lora
from lohp_peft.cards import adapter_card_of, public_base_model
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


@pytest.mark.parametrize("card", [None, "# Model Card for Model ID", "---\nbase_model: a/b\ntags: [x]\n---\n# Mine"])
def test_dry_run_sends_and_writes_nothing(adapter, hub, card):
    """It also lists the card that would be sent; a push writes nothing here either."""
    if card is not None:
        (adapter / "README.md").write_text(card)
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    report = push_folder(adapter, "me/my-task", dry_run=True)
    assert hub.requests == []
    assert report.commit is None
    assert list(report.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert report.files == push_folder(adapter, "me/my-task").files
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    assert ("# my-task" in hub.files("me/my-task")["README.md"].decode()) == ("Mine" not in (card or ""))


def test_resume_state_is_left_out(tmp_path, hub):
    folder = tmp_path / "policy"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "lohp_policy", "base_model_name": BASE}))
    (folder / "checkpoint" / "random_states.pkl").write_bytes(b"")
    (folder / "log.jsonl").write_text("{}")
    (folder / "runs" / "today").mkdir(parents=True)
    (folder / "runs" / "today" / "events.out.tfevents").write_bytes(b"")
    (folder / "trajectory_snapshots").mkdir()
    (folder / "trajectory_snapshots" / "0.pt").write_bytes(b"")
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
    ("file", "key", "kind"),
    [
        ("adapter_config.json", "base_model_name_or_path", {}),
        ("manifest.json", "base_model_name", {"format": "lohp_peft.trajectories"}),
        ("config.json", "base_model_name", {"model_type": "lohp_policy"}),
    ],
)
@pytest.mark.parametrize("name", [None, "./tiny"])
def test_local_base_model_is_refused(tmp_path, file, key, kind, name):
    """Also as policy learning names it, which knows the folder's own name only."""
    (tmp_path / file).write_text(json.dumps({**kind, key: name or str(tmp_path)}))
    with pytest.raises(ValueError, match=f"local path.* repository id of the base model into `{key}` of {file}"):
        check_folder(tmp_path)


def test_every_adapter_in_a_folder_is_looked_at(adapter, tmp_path):
    """PEFT saves adapters that are not called `default` in folders inside."""
    for name in ("one", "two"):
        (adapter / name).mkdir()
        (adapter / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="of one/adapter_config.json, two/adapter_config.json instead"):
        check_folder(adapter)


# Adapters of a base model that was loaded from a folder


@pytest.fixture
def base_folder(tmp_path, base_model):
    base_model.save_pretrained(tmp_path / "base")
    tiny.build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def generate(base_folder, policy, cls=BertModel, task_type="FEATURE_EXTRACTION"):
    policy.save_pretrained(base_folder.parent / "policy")
    config = LoHpConfig(policy=str(base_folder.parent / "policy"), task_type=task_type)
    model = get_peft_model(cls.from_pretrained(base_folder), config)
    model.generate_adapter(tiny.build_rows(), config=GenerationConfig(choose=False))
    return model


def initialize(base_folder, policy):
    model = get_peft_model(BertModel.from_pretrained(base_folder), LoraConfig(r=2, target_modules=["query", "value"]))
    initialize_lohp_weights(model, policy, tiny.build_rows())
    return model


def classify(base_folder, policy):
    return generate(base_folder, policy, BertForSequenceClassification, "SEQ_CLS")


@pytest.mark.parametrize("make", [generate, lambda *a: to_plain_lora(generate(*a)), initialize, classify])
def test_a_generated_adapter_is_published_with_the_base_model_of_its_policy(hub, base_folder, policy, tmp_path, make):
    """Here it goes on naming the folder, from which `AutoPeftModel` and its like load it without a network."""
    folder = tmp_path / "adapter"
    make(base_folder, policy).save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert json.loads(before[folder / "adapter_config.json"])["base_model_name_or_path"] == str(base_folder)
    report = push_folder(folder, "me/my-task")
    assert report.files == push_folder(folder, "me/my-task", dry_run=True).files
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    sent = hub.files("me/my-task")
    assert {name: len(data) for name, data in sent.items() if name != ".gitattributes"} == report.files
    written = {**json.loads(before[folder / "adapter_config.json"]), "base_model_name_or_path": TINY}
    assert json.loads(sent["adapter_config.json"]) == written
    card = sent["README.md"].decode()
    assert f"base_model: {TINY}" in card
    assert str(base_folder) not in card


def test_peft_finds_the_base_model_of_a_published_adapter(hub, base_folder, policy, tmp_path):
    model = generate(base_folder, policy)
    model.save_pretrained(tmp_path / "adapter")
    hub.publish(TINY, {path.name: path.read_bytes() for path in base_folder.iterdir()})
    commit = push_folder(tmp_path / "adapter", "me/my-task").commit
    batch = tiny.build_tokenizer()(["good0 word1"], return_tensors="pt")
    wanted = model.eval()(**batch).last_hidden_state
    loaded = AutoPeftModelForFeatureExtraction.from_pretrained("me/my-task", revision=commit)
    assert loaded.peft_config["default"].base_model_name_or_path == TINY
    assert torch.equal(loaded.eval()(**batch).last_hidden_state, wanted)


def test_a_relative_folder_of_the_base_model_is_not_published_as_a_repository(adapter):
    """Spelled like a repository, it is known as a folder only where it lies."""
    (adapter / "lohp_provenance.json").write_text(json.dumps({"base_model": TINY, "base_fingerprint": "5" * 64}))
    for name, expected in (("models/enc", TINY), (TINY, TINY), (None, None)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        assert public_base_model(adapter) == expected
        assert (f"base_model: {TINY}" in adapter_card_of(adapter)) == (expected == TINY)


@pytest.mark.parametrize("changes", [{"base_fingerprint": ""}, {"base_model_name": "tiny"}, {"base_model_name": ""}])
def test_a_name_that_nobody_has_compared_or_that_may_be_a_folder_is_not_taken(
    base_folder, base_model, tmp_path, changes
):
    generate(base_folder, tiny.build_policy(base_model, **changes)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="local path"):
        check_folder(tmp_path / "adapter")


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
    with pytest.raises(ValueError, match="'me/policy' is none of: .* an existing folder, .* 40 hexadecimal digits"):
        find_policy("me/policy")
    with pytest.raises(ValueError, match="`revision` of me/policy must be .* 40 hexadecimal digits, got 'main'"):
        find_policy("me/policy@main")


def test_find_trajectories(tmp_path):
    assert find_trajectories(tmp_path) == tmp_path
    with pytest.raises(ValueError, match=r"neither an existing folder nor owner/name@commit"):
        find_trajectories(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="'me/runs' are neither an existing folder nor owner.* 40 hexadecimal digits"):
        find_trajectories("me/runs")
    with pytest.raises(ValueError, match="`revision` of me/runs must be .* 40 hexadecimal digits, got 'main'"):
        find_trajectories("me/runs@main")
    with pytest.raises(ValueError, match="records no `base_fingerprint`"):
        find_trajectories(tmp_path, base_model=torch.nn.Linear(1, 1))


def test_shipped_policy_can_be_published():
    kind, sizes = check_folder(find_policy("shipped"))
    assert kind == "policy"
    assert "README.md" in sizes
    assert sum(sizes.values()) < 10 * 2**20

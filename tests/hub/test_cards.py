"""The cards: what they say, and that their snippets run with stock PEFT."""

import ast
import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lohp_peft.cards import (
    adapter_card,
    adapter_card_of,
    is_ours,
    policy_card,
    policy_card_of,
    trajectory_card_of,
)
from lohp_peft.hub import push_folder

BASE = "sentence-transformers/all-MiniLM-L6-v2"
CONFIG = {
    "base_model_name_or_path": BASE,
    "task_type": "FEATURE_EXTRACTION",
    "r": 8,
    "lora_alpha": 8,
    "target_modules": [f"encoder.layer.{i}.attention.self.{kind}" for i in (4, 5) for kind in ("query", "value")],
}
PROVENANCE = {"policy": "me/policy", "seed": 3, "label_names": ["bad", "good"], "pooling": "mean", "max_length": 64}


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_adapter_card_says_what_it_is():
    scores = {"none": {"accuracy": 0.6, "seconds": 0.0}, "wrong_task": {"accuracy": 0.61, "seconds": 0.4}}
    card = adapter_card(CONFIG, PROVENANCE, name="my-task", has_head=True, scores=scores, license="mit")
    assert metadata(card) == {
        "base_model": BASE,
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "feature-extraction",
        "tags": ["lohp", "lora"],
    }
    assert "# my-task" in card
    assert "| labels | bad, good |" in card
    assert "| target modules | query (2), value (2) |" in card
    assert "| wrong_task | 61.0 | 0.4 |" in card
    assert "controls change only what the policy is conditioned on" in card
    assert "| seed | 3 |" in card
    assert "$" not in card
    assert "lohp_peft" not in snippet(card)


@pytest.mark.parametrize(("peft_type", "tag"), [("LORA", "lora"), ("LOHP", "lora"), ("IA3", "ia3")])
def test_an_adapter_that_no_generation_recorded_is_described_without_one(peft_type, tag):
    card = adapter_card({**CONFIG, "peft_type": peft_type}, name="me/x", has_head=True)
    assert metadata(card)["tags"] == [tag]
    assert f"A PEFT adapter (`{peft_type}`) for " in card
    assert "How it was made is not recorded." in card
    for claim in ("Lo-Hp", "policy", "forward-only", "few", "head.safetensors"):
        assert claim not in card
    assert ("import lohp_peft" in snippet(card)) == (peft_type == "LOHP")
    ast.parse(snippet(card))


def test_abstention_is_said():
    card = adapter_card(CONFIG, {"reason": "no candidate beat the base model"}, name="my-task")
    assert "**The generated adapter was not taken**, for this reason: no candidate beat the base model." in card


def test_gradient_steps_are_said():
    assert "forward-only: no gradient step is in it." in adapter_card(CONFIG, PROVENANCE, name="my-task")
    card = adapter_card(CONFIG, {**PROVENANCE, "gradient_steps": 4}, name="my-task")
    assert "then 4 gradient steps" in card
    assert "forward-only" not in card


def test_local_paths_stay_at_home(tmp_path):
    card = adapter_card(
        {**CONFIG, "base_model_name_or_path": str(tmp_path / "encoder")}, name="my-task", has_head=True
    )
    assert "base_model" not in metadata(card)
    assert str(tmp_path) not in card
    assert "`encoder`" in card


@pytest.mark.parametrize(
    ("task_type", "auto"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("CAUSAL_LM", "AutoModelForCausalLM"),
        ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
        (None, "AutoModel"),
    ],
)
def test_snippet_without_head(task_type, auto):
    code = snippet(adapter_card({**CONFIG, "task_type": task_type}, PROVENANCE, name="me/my-task"))
    ast.parse(code)
    assert f"{auto}.from_pretrained" in code
    assert ("num_labels=2" in code) == (task_type == "SEQ_CLS")


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_snippet_runs_with_stock_peft(tmp_path, pooling, monkeypatch, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "new", "text"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    base = tmp_path / "base"
    BertModel(config).save_pretrained(base)
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(base)
    folder = tmp_path / "adapter"
    lora = LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    get_peft_model(AutoModel.from_pretrained(base), lora).save_pretrained(folder)
    save_file({"weight": torch.zeros(2, 16), "bias": torch.tensor([0.0, 1.0])}, folder / "head.safetensors")
    (folder / "lohp_provenance.json").write_text(json.dumps({**PROVENANCE, "pooling": pooling}))

    card = adapter_card_of(folder, location=str(folder))
    code = snippet(card).replace("path/to/the/base/model", str(base))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda location: location)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out == "['good']\n"


def test_snippet_of_a_decoder_with_a_classifier_reads_texts_of_several_lengths(tmp_path):
    """Its base model has no padding token, without which transformers refuses more than one text."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    words = {word: i for i, word in enumerate(["[UNK]", "<end>", "a", "new", "text"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(base)
    config = GPT2Config(vocab_size=5, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS")
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), lora).save_pretrained(folder)
    (folder / "lohp_provenance.json").write_text(json.dumps({**PROVENANCE, "pooling": "last"}))

    found: dict = {}
    code = snippet(adapter_card_of(folder, location=str(folder))).replace("path/to/the/base/model", str(base))
    exec(compile(code, "card", "exec"), found)
    logits = [
        found["model"](**found["tokenizer"](texts, padding=True, return_tensors="pt")).logits[0]
        for texts in (["a text"], ["a text", "a new a new text"])
    ]
    assert torch.allclose(*logits, atol=1e-5)


def test_unknown_pooling():
    with pytest.raises(ValueError, match="`pooling`"):
        adapter_card(CONFIG, {"pooling": "max"}, name="x", has_head=True)


def test_card_of_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        adapter_card_of(tmp_path)


def test_policy_card():
    card = policy_card(
        {"preset": "lohp+path", "seeds": [0, 1], "commit": "abc"},
        name="minilm-text",
        base_model=BASE,
        tasks=[{"name": "subj", "family": "subjectivity", "licence": "CC BY"}, {"name": "mr", "family": "sentiment"}],
        results={"none": {"accuracy": 0.6}},
        limits=["English only."],
        license="apache-2.0",
    )
    assert metadata(card)["tags"] == ["lohp", "lora", "peft"]
    for line in ("| preset | lohp+path |", "| seeds | `[0, 1]` |", "| subj | subjectivity | CC BY |"):
        assert line in card
    assert "| mr | sentiment | not stated |" in card
    assert "1 of 2 tasks state none" in card
    assert "- English only." in card
    ast.parse(snippet(card))


def test_card_of_no_trajectories(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json"):
        trajectory_card_of(tmp_path)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_our_mark(tmp_path, line_end):
    """It holds whatever the metadata say, until somebody edits the text; what no folder tells keeps a card from having it."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    card = adapter_card_of(tmp_path, license="mit").replace("\n", line_end)
    assert re.fullmatch(r"<!-- lohp_peft card [0-9a-f]{64} -->", card.splitlines()[-1])
    assert is_ours(card)
    assert is_ours(card.replace("license: mit", "license: cc0-1.0"))
    assert not is_ours(card.replace("## Limits", "## Known limits"))
    assert not is_ours(card + "Mine.")
    assert not is_ours(adapter_card_of(tmp_path, scores={"none": {"accuracy": 0.6}}))


MANIFEST = {
    "format": "lohp_peft.trajectories",
    "base_model_name": BASE,
    "base_fingerprint": "5",
    "space_kind": "core",
    "space_r": 8,
    "layout": {"modules": []},
    "metadata": {},
    "shards": {},
}


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"format": MANIFEST["format"], "base_model_name": BASE}, "lacks .*'base_fingerprint', .*'shards'"),
        ({**MANIFEST, "shards": {"a": {"trajectories": [{"task": "a"}]}}}, r"KeyError\('states'\)"),
        ({**MANIFEST, "layout": []}, "TypeError"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, manifest, told):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged.*{told}"):
        trajectory_card_of(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        push_folder(tmp_path, "me/runs", dry_run=True)


def test_only_the_hub_has_commits(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    card = trajectory_card_of(tmp_path, name="runs")
    assert 'from_pretrained("runs", base_model' in card
    card = trajectory_card_of(tmp_path, name="runs", location="me/runs")
    assert 'from_pretrained("me/runs@<commit hash>", base_model' in card


def test_policy_card_from_its_folder(tmp_path):
    provenance = {
        "training_tasks": {
            "subj": {"family": "subjectivity", "licence": "CC BY"},
            "mr": {"family": "", "licence": ""},
        },
        "validation_tasks": ["sst2"],
        "settings": {"seed": 3},
        "commit": "abc",
    }
    config = {"model_type": "lohp_policy", "preset": "lohp", "r": 8, "base_model_name": BASE, "provenance": provenance}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = policy_card_of(tmp_path, name="mine", location="me/mine")
    assert metadata(card)["base_model"] == BASE
    for line in ("| preset | lohp |", "| commit | abc |", "| training tasks | 2 |", "| subj | subjectivity | CC BY |"):
        assert line in card
    assert "| validation_tasks | sst2 |" in card
    assert 'LoHpConfig(policy="me/mine@<commit hash>")' in card, "without the commit it is refused"
    with pytest.raises(ValueError, match=r"config\.json"):
        policy_card_of(tmp_path / "none")

"""The three cards as they stand in `golden/`; after a change that is meant, write them anew with `WRITE_GOLDEN=1 pytest tests/hub`.

Numbers and names are made up.
"""

import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from lohp_peft.cards import adapter_card, policy_card, trajectory_card

GOLDEN = Path(__file__).parent / "golden"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
SCORES = {
    "none": {"accuracy": 0.668, "macro_f1": 0.647},
    "mean_adapter": {"accuracy": 0.697, "macro_f1": 0.671},
    "generated": {"accuracy": 0.717, "macro_f1": 0.696},
    "wrong_task": {"accuracy": 0.683, "macro_f1": 0.658},
    "shuffled_labels": {"accuracy": 0.711, "macro_f1": 0.689},
}


def adapter():
    names = [f"encoder.layer.{i}.attention.self.{kind}" for i in (4, 5) for kind in ("query", "value")]
    config = {"base_model_name_or_path": BASE, "r": 16, "lora_alpha": 16, "target_modules": names}
    provenance = {
        "policy": "someone/policy",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "preset": "lohp+path",
        "base_fingerprint": "5" * 64,
        "seed": 3,
        "policy_steps": 4,
        "gradient_steps": 0,
        "chosen": "generated",
        "candidates": ["generated", "none"],
        "scores": {"generated": 0.61234567, "none": 0.7},
        "nearest_task": "reviews",
        "label_names": ["bad", "good"],
        "support": {"bad": 16, "good": 16},
        "pooling": "mean",
        "max_length": 64,
    }
    return adapter_card(
        {**config, "task_type": "FEATURE_EXTRACTION"},
        provenance,
        name="my-task",
        location="me/my-task",
        has_head=True,
        scores=SCORES,
        license="mit",
    )


def policy():
    return policy_card(
        {"preset": "lohp+path", "r": 16, "settings": {"seed": 0, "training_steps": 500}, "base_fingerprint": "5" * 64},
        name="my-policy",
        base_model=BASE,
        location="me/my-policy",
        tasks=[
            {"name": "reviews", "family": "sentiment", "licence": "CC BY 4.0"},
            {"name": "intents", "family": "intent"},
        ],
        results=SCORES,
        limits=["English only."],
        license="apache-2.0",
    )


def trajectories():
    def run(task, optimizer, seed, last):
        states = {"states": 11, "metrics": ["train_loss"], "first_loss": 0.7, "last_loss": last}
        return {"task": task, "optimizer": optimizer, "hyperparameters": {"lr": 0.001}, "seed": seed, **states}

    shards = {
        "reviews": {"trajectories": [run("reviews", "adamw", 0, 0.4), run("reviews", "sam", 1, 0.5)]},
        "intents": {"trajectories": [run("intents", "adamw", 0, None)]},
    }
    manifest = {
        "base_model_name": BASE,
        "base_fingerprint": "5" * 64,
        "space_kind": "core",
        "space_r": 8,
        "layout": {"modules": [{}, {}]},
        "metadata": {"weight_preparation": {"optimizer_steps": 60, "seeds": [0, 1]}},
        "shards": shards,
    }
    licences = {"reviews": "CC BY 4.0"}
    return trajectory_card(manifest, name="my-runs", location="me/my-runs", licences=licences, license="cc0-1.0")


CARDS = {"adapter": adapter, "policy": policy, "trajectories": trajectories}


@pytest.mark.parametrize("kind", CARDS)
def test_card(kind):
    path = GOLDEN / f"{kind}.md"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(CARDS[kind](), encoding="utf-8")
    assert CARDS[kind]() == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", CARDS)
def test_the_client_reads_the_metadata(kind):
    """Its own classes read it without a complaint and write the same again."""
    text = CARDS[kind]()
    raw = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    cards, data = (DatasetCard, DatasetCardData) if kind == "trajectories" else (ModelCard, ModelCardData)
    card = cards(text, ignore_metadata_errors=False)
    assert card.data.to_dict() == raw == data(**raw).to_dict()
    assert str(card).strip() == text.strip()
    assert {"lohp", "lora"} <= set(raw["tags"])
    if kind == "adapter":
        assert (raw["library_name"], raw["base_model"], raw["pipeline_tag"]) == ("peft", BASE, "feature-extraction")
    if kind == "policy":
        assert raw["base_model"] == BASE
        assert raw["library_name"] != "peft", "the Hub would tell readers to load it as an adapter"


@pytest.mark.parametrize("kind", CARDS)
def test_what_every_card_says(kind):
    text = CARDS[kind]()
    for said in (f"huggingface.co/{BASE}", "seed", "5" * 64, "## Licence", "## Use"):
        assert said in text, said
    without = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    assert ("lohp_peft" in without) == (kind == "policy"), "how it loads without the package"
    if kind == "trajectories":
        assert "control" in text
    else:
        assert "| wrong_task | 68.3 | 65.8 |" in text

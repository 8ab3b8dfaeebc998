"""A base model, a policy and a text suite small enough for tests that run whole scripts."""

import gzip
import importlib.util
import json
import string
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

ROOT = Path(__file__).parent.parent
GOOD = "good fine great lovely".split()
BAD = "bad poor awful dull".split()
PLAIN = "plain usual common middling".split()
THINGS = "film radio kettle novel lamp chair phone game shoe song".split()


def save_base_model(folder: Path) -> Path:
    """A BERT of two layers that spells what it does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *THINGS, *pieces]
    (folder / "words.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "words.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return folder


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module, by its path; its main is not run."""
    file = ROOT / path
    specification = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def save_policy(folder: Path, base_model: Path) -> Path:
    """A policy of two training steps, made by the quickstart."""
    quickstart = load_script("examples/quickstart.py")
    line = ["--base-model", str(base_model), "--layers", "1", "--training-steps", "2", "--shots", "4"]
    quickstart.main([*line, "--output", str(folder)])
    return folder / "policy"


def save_suite(folder: Path, names: list[str], families: dict[str, str] | None = None) -> Path:
    """A text suite of one sentiment task per name, each about a thing of its own; stance tasks have a third class."""
    (folder / "text").mkdir(parents=True)
    for number, name in enumerate(names):
        thing = THINGS[number % len(THINGS)]
        classes = {"negative": BAD, "positive": GOOD} | ({"none": PLAIN} if name.startswith("stance_") else {})
        rows = [
            {"text": f"{word} {thing} {other} {number}", "label": label, "split": split}
            for split in ("train", "test")
            for label, words in classes.items()
            for word in words
            for other in THINGS[:4]
        ]
        with gzip.open(folder / "text" / f"{name}.jsonl.gz", "wt") as stream:
            stream.write("\n".join(map(json.dumps, rows)))
    about = {name: {"family": (families or {}).get(name, "review"), "licence_class": "open"} for name in names}
    (folder / "text" / "tasks.json").write_text(json.dumps(about))
    (folder / "text" / "suites.json").write_text(json.dumps({"overlap_groups": {}}))
    return folder

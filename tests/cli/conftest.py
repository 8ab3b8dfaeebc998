"""A tiny base model on disk and a task file."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ("the parcel came late and wet or it was lost in the depot near a river with two dogs").split()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A BERT of two layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def task_file(tmp_path):
    """Two classes, 16 rows each in splits train and test."""
    path = tmp_path / "parcels.jsonl"
    rows = [
        {
            "text": " ".join([label, *(WORDS[(i * k) % len(WORDS)] for k in range(1, 5))]),
            "label": label,
            "split": split,
        }
        for split in ("train", "test")
        for label in ("late", "lost")
        for i in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path

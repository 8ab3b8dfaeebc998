import random

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel, BertTokenizer

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.tasks.task import Examples, Task
from lohp_peft.weight_preparation import WeightPreparationConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GROUPS = [[f"{stem}{i}" for i in range(4)] for stem in ("good", "bad", "odd")]
FILLERS = [f"word{i}" for i in range(8)]
WORDS = [*SPECIAL, *FILLERS, *(word for group in GROUPS for word in group)]


def build_tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def build_base_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return BertModel(config).eval()


@pytest.fixture
def base_model():
    return build_base_model()


@pytest.fixture
def space(base_model):
    return LoraBSpace.seeded(AdapterLayout.from_model(base_model, ["query", "value"]), r=2, seed=0)


@pytest.fixture
def encoder(base_model, tokenizer, space):
    return TextEncoder(base_model, tokenizer, space)


def build_task(name, n_classes=2, rows=40, seed=0, pair=False):
    """Texts of a few fillers and one word that tells the class."""
    chance = random.Random(seed)
    labels = [i % n_classes for i in range(rows)]
    texts = []
    for label in labels:
        words = [chance.choice(FILLERS) for _ in range(chance.randint(2, 5))]
        words.insert(chance.randint(0, len(words)), chance.choice(GROUPS[label]))
        texts.append(" ".join(words))
    names = tuple(f"class {i}" for i in range(n_classes))
    texts_b = tuple(reversed(texts)) if pair else None
    return Task(name, Examples(tuple(texts), tuple(labels), names, texts_b), ("train",) * rows)


@pytest.fixture
def tasks():
    return [build_task("spam"), build_task("mood", n_classes=3, seed=1)]


@pytest.fixture
def config():
    return WeightPreparationConfig(
        optimizers=("adamw", "sam"),
        seeds=(0, 1),
        optimizer_steps=8,
        record_every=3,
        rows_per_task=32,
        score_query_rows=8,
    )


@pytest.fixture
def quiet():
    return Console(quiet=True)

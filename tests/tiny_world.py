"""A policy with random weights and everything around it, at the smallest size that still has all the parts."""

import random

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.space import CoreSpace, LoraBSpace
from lohp_peft.adapters.writing import backbone_of
from lohp_peft.policy import LoHpPolicy, LoHpPolicyConfig
from lohp_peft.tasks import tokenizer_fingerprint

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILLERS = [f"word{i}" for i in range(8)]
MARKERS = [[f"{stem}{i}" for i in range(4)] for stem in ("good", "bad", "odd")]
WORDS = [*SPECIAL, *FILLERS, *(word for group in MARKERS for word in group)]
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def build_tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def build_bert(cls=BertModel, **changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=128,
        initializer_range=0.3,
        **changes,
    )
    return cls(config).eval()


def build_bert_classifier(num_labels=2, **changes):
    return build_bert(BertForSequenceClassification, num_labels=num_labels, **changes)


def build_llama(cls=LlamaForCausalLM, **changes):
    """Grouped queries, so that the targets differ in shape; the head's outputs have no bias."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        **changes,
    )
    return cls(config).eval()


def build_llama_classifier(num_labels=2):
    return build_llama(LlamaForSequenceClassification, num_labels=num_labels)


def build_policy(model, tokenizer=None, kind="core", r=2, seed=0, targets=None, **changes):
    """A policy whose networks are random, so that what it generates is far from zero and differs between tasks."""
    targets = targets or TARGETS.get(model.config.model_type)
    prefix = f"{model.base_model_prefix}."
    backbone = getattr(model, prefix[:-1], model)
    layout = AdapterLayout.from_model(backbone, targets)
    assert backbone_of(model, layout)[0] is backbone
    space = CoreSpace.from_base_weights(backbone, layout, r) if kind == "core" else LoraBSpace.seeded(layout, r, seed)
    config = LoHpPolicyConfig(
        **{
            "layout": layout.to_dict(),
            "space_kind": kind,
            "r": r,
            "base_model_name": "someone/tiny",
            "base_fingerprint": base_model_fingerprint(backbone),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer or build_tokenizer()),
            "max_text_length": 16,
            "policy_steps": 2,
            "embedding_size": 16,
            "principal_directions": 4,
            "module_features": 2 * r if kind == "core" else r,
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 2,
            "num_directions": 3,
            "state_shape": list(space.shape),
            "preset": "random",
            **changes,
        }
    )
    torch.manual_seed(seed)
    policy = LoHpPolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        # all ones before training, along which a normalised hidden state has rounding errors only
        axes = policy.feature_reference.axes
        axes.copy_(torch.linalg.qr(torch.randn(axes.shape))[0])
    policy.set_space(space)
    return policy.eval()


def build_rows(n_classes=2, shots=6, seed=0, names=("bad", "good", "odd")):
    """Texts of a few fillers and one word that tells the class."""
    chance = random.Random(seed)
    rows = []
    for i in range(n_classes * shots):
        label = i % n_classes
        words = [chance.choice(FILLERS) for _ in range(chance.randint(2, 5))]
        words.insert(chance.randint(0, len(words)), chance.choice(MARKERS[label]))
        rows.append({"text": " ".join(words), "label": names[label]})
    return rows

"""A base model, tasks and a policy so small that thousands of forward passes fit into a test."""

import random

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from lohp_peft.adapters.layout import AdapterLayout, base_model_fingerprint
from lohp_peft.adapters.space import CoreSpace
from lohp_peft.policy import LoHpPolicy, LoHpPolicyConfig, ReferenceSet
from lohp_peft.tasks import (
    Examples,
    Task,
    TaskFeatures,
    TextEncoder,
    fit_reference,
    task_features,
    tokenizer_fingerprint,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GROUPS = [[f"{stem}{i}" for i in range(4)] for stem in ("good", "bad", "odd")]
FILLERS = [f"word{i}" for i in range(8)]
WORDS = [*SPECIAL, *FILLERS, *(word for group in GROUPS for word in group)]


def build_tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def build_base_model(layers=2):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return BertModel(config).eval()


def build_task(name, n_classes=2, rows=40, seed=0, pair=False, family="", test_rows=0):
    """Texts of a few fillers and one word that tells the class."""
    chance = random.Random(seed)
    labels = [i % n_classes for i in range(rows + test_rows)]
    texts = []
    for label in labels:
        words = [chance.choice(FILLERS) for _ in range(chance.randint(2, 5))]
        words.insert(chance.randint(0, len(words)), chance.choice(GROUPS[label]))
        texts.append(" ".join(words))
    names = tuple(f"class {i}" for i in range(n_classes))
    texts_b = tuple(reversed(texts)) if pair else None
    splits = ("train",) * rows + ("test",) * test_rows
    return Task(name, Examples(tuple(texts), tuple(labels), names, texts_b), splits, family)


def build_encoder(layers=3, adapted=(2,), r=2, **kwargs):
    """Query and value of the layers `adapted`, in the bases of the weights."""
    model = build_base_model(layers)
    model.requires_grad_(False)
    layout = AdapterLayout.from_model(model, ["query", "value"], list(adapted))
    return TextEncoder(model, build_tokenizer(), CoreSpace.from_base_weights(model, layout, r), **kwargs)


def build_policy(encoder, tasks=(), *, optimizers=("adamw", "sam"), size=0.5, **changes):
    """An untrained policy whose every part does something, with a reference set over `tasks`."""
    space, texts = encoder.space, build_task("texts", n_classes=3, rows=30, seed=9).examples
    statistics = encoder.statistics(encoder.prepare(texts.texts))
    settings = {
        "layout": space.layout.to_dict(),
        "space_kind": space.kind,
        "r": space.r,
        "state_shape": list(space.shape),
        "base_model_name": "tiny",
        "base_fingerprint": base_model_fingerprint(encoder.base_model),
        "tokenizer_fingerprint": tokenizer_fingerprint(encoder.tokenizer),
        "policy_steps": 3,
        "max_text_length": encoder.max_length,
        "embedding_size": 16,
        "principal_directions": 8,
        "module_features": statistics.modules.shape[-1],
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_directions": 4,
        "optimizers": list(optimizers),
    }
    torch.manual_seed(1)
    policy = LoHpPolicy(LoHpPolicyConfig(**{**settings, **changes})).eval()
    policy.set_space(space)
    for name, tensor in fit_reference([statistics], policy.config.principal_directions).items():
        getattr(policy.feature_reference, name).copy_(tensor)
    with torch.no_grad():
        for module in (policy.forward_network, policy.log_flow_network):
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * size / max(parameter.shape[-1], 1) ** 0.5)
    policy.scale.copy_(torch.rand_like(policy.scale) + 0.5)
    policy.step_rms.copy_(0.1 * torch.rand_like(policy.step_rms) + 0.05)
    if tasks:
        policy.reference_set = build_reference_set(policy, encoder, tasks)
    return policy


def features_of(policy, encoder, examples):
    """Features of a support set, without a batch axis."""
    statistics = encoder.statistics(encoder.prepare(examples.texts, examples.texts_b))
    return task_features(statistics, examples.targets, examples.n_classes, policy.reference_tensors())


def build_reference_set(policy, encoder, tasks):
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(len(tasks), *policy.config.state_shape, generator=generator) * policy.space.mask
    features = [features_of(policy, encoder, task.draw_support(4, 0)) for task in tasks]
    names, families = tuple(task.name for task in tasks), tuple(task.family for task in tasks)
    return ReferenceSet(names, families, states, TaskFeatures.stack(features))

"""Generating into a model with LoRA layers: everything is checked first, then weights and classifier are written, or neither."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lohp_peft.adapters.classifier import (
    check_untrained,
    classifier_columns,
    classifier_features,
    classifier_linear,
    one_classifier,
    unsaved_parts,
    write_classifier,
)
from lohp_peft.adapters.export import GenerationRecord
from lohp_peft.adapters.writing import (
    backbone_of,
    check_writable,
    only_active,
    undone_on_error,
    write_adapter,
    written_weights,
)
from lohp_peft.config import LoHpConfig, read_support_file
from lohp_peft.warn import warn

FEW = 4
"""Texts on which a classifier's features are compared with the policy's embeddings."""

if TYPE_CHECKING:
    from lohp_peft.generated import GenerationReport
    from lohp_peft.generation import GenerationConfig, LoHpPolicy, Support


def generate_into(
    tuner: BaseTuner,
    adapter_name: str,
    policy: "LoHpPolicy | str | os.PathLike",
    support: "Support",
    tokenizer: Any,
    config: "GenerationConfig | None",
) -> "tuple[GenerationReport, GenerationRecord]":
    """Generate, check everything first, then write the weights and the classifier, or neither."""
    from lohp_peft.generation import encoder_for, generate_adapters, load_policy, policy_name, read_support
    from lohp_peft.tasks import solve_head

    peft_config, model = tuner.peft_config[adapter_name], tuner.model
    examples, name = read_support(support), policy_name(policy)
    policy = load_policy(policy)
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    backbone, prefix = backbone_of(model, policy.layout)
    names = [prefix + spec.name for spec in policy.layout.modules]
    layers = check_writable(model, names, policy.config.r, adapter_name, peft_config)
    linear, columns = None, []
    if _is_classifier(peft_config):
        columns = _columns(model, examples.label_names)
        linear = classifier_linear(model, adapter_name, model.config.num_labels)
        if strangers := unsaved_parts(model, prefix, adapter_name):
            warn(
                f"{', '.join(map(repr, strangers))} of {type(model).__name__} lies between the base model and the classifier and is "
                "not saved with the adapter. Where the checkpoint that the adapter is loaded on does not have it either, its "
                f"weights are drawn anew and the classifier is worth nothing: give the configuration modules_to_save={strangers}.",
                PeftWarning,
            )
    else:
        if type(model).__name__.endswith("ForSequenceClassification"):
            warn(
                f"The classifier of {type(model).__name__} stays as it is, because adapter {adapter_name!r} has "
                f"task_type={peft_config.task_type!r}; with 'SEQ_CLS' it is solved as well.",
                PeftWarning,
            )
        if _has_head(peft_config):
            check_untrained(model, adapter_name)
    with only_active(model, None):
        encoder = encoder_for(policy, backbone, tokenizer, "no" if config is None else config.mixed_precision)
        (made,) = generate_adapters(policy, backbone, tokenizer, [examples], config, encoder=encoder)
    with undone_on_error(layers, adapter_name), torch.autocast(encoder.device.type, enabled=False):
        write_adapter(layers, {prefix + key: pair for key, pair in made.lora.items()}, adapter_name, peft_config)
        if linear is None:
            record = made.record(policy_name=name, head=_has_head(peft_config))
        else:
            with only_active(model, adapter_name):
                features = classifier_features(model, linear, _batches(tokenizer, examples, encoder))
                few = examples.select(range(min(FEW, len(examples))))
                pooled = encoder.embed(encoder.prepare(few.texts, few.texts_b))
            if not _alike(features[:FEW], pooled):
                warn(
                    f"The classifier of {type(model).__name__} reads other features than the policy, which pools by "
                    f"{encoder.pooling!r}, and is likely to be less accurate than the head of an adapter for "
                    "FEATURE_EXTRACTION; compare them on examples, or train the classifier further.",
                    PeftWarning,
                )
            kind = made.report.config["head"] or policy.config.head
            labels = torch.tensor(columns, device=features.device)[examples.targets.to(features.device)]
            head = solve_head(features, labels, model.config.num_labels, kind, ridge=policy.config.ridge)
            write_classifier(linear, features, head.weight, head.bias)
            label_names = [str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)]
            for column, label in zip(columns, examples.label_names, strict=True):
                label_names[column] = label
            record = made.record(policy_name=name, head=False, label_names=label_names)
    return made.report, replace(record, weights=written_weights(model, adapter_name, linear))


def _alike(features: Tensor, pooled: Tensor) -> bool:
    """Whether two sets of embeddings of the same texts, each of shape (n, d), are one up to rounding and length."""
    return features.shape == pooled.shape and bool((cosine_similarity(features, pooled.to(features)) > 0.99).all())


def _tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that lies beside the base model."""
    from transformers import AutoTokenizer

    from lohp_peft.tasks.requirements import give_padding

    name = getattr(model, "name_or_path", "")
    try:
        return give_padding(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"No tokenizer was found with base model {name!r}; pass `tokenizer`. ({error})") from error


def _columns(model: nn.Module, label_names: Sequence[str]) -> list[int]:
    """The class index of each label in a sequence classification model, which must be able to read batches."""
    if getattr(model.config, "pad_token_id", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no padding token, by which it tells where a text ends; set "
            "`model.config.pad_token_id = tokenizer.pad_token_id`."
        )
    return classifier_columns(model.config, label_names)


def _batches(tokenizer: Any, examples: Any, encoder: Any) -> Iterator[Any]:
    """The texts as the policy reads them, in order."""
    from lohp_peft.tasks.reading import tokenize

    for start in range(0, len(examples), encoder.batch_size):
        rows = slice(start, start + encoder.batch_size)
        pairs = None if examples.texts_b is None else examples.texts_b[rows]
        yield tokenize(tokenizer, examples.texts[rows], pairs, encoder.max_length).to(encoder.device)


def generation_inputs(config: LoHpConfig, model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Policy, support set and tokenizer of a generation at injection, checked against the model."""
    from lohp_peft.generation import encoder_for, load_policy, read_support

    with only_active(model, None):  # a merged adapter is named before the base model is compared
        policy, tokenizer = load_policy(config.policy_id or ""), _tokenizer_of(model)
    support = read_support(read_support_file(config.support or ""))
    encoder_for(policy, backbone_of(model, policy.layout)[0], tokenizer)
    if _is_classifier(config):
        _columns(model, support.label_names)
        saved = {n: m for n, m in model.named_modules() if n.endswith(tuple(config.modules_to_save or ()))}
        one_classifier(saved, adapter_name, model.config.num_labels)
    return {"policy": policy, "support": support, "tokenizer": tokenizer}


def _has_head(config: LoraConfig) -> bool:
    """Whether a head is kept beside the adapter."""
    return config.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _is_classifier(config: LoraConfig) -> bool:
    return str(getattr(config.task_type, "value", config.task_type)) == "SEQ_CLS"

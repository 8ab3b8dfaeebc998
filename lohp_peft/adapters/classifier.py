"""The classifier on top of an adapted model, its own copy of which an adapter keeps; solved heads are written into it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from lohp_peft.adapters.export import differs_from_base
from lohp_peft.adapters.injection import evaluating


def saved_modules(model: nn.Module, adapter_name: str) -> dict[str, ModulesToSaveWrapper]:
    """The modules of which an adapter has a copy (`modules_to_save`), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }


def unsaved_parts(model: nn.Module, prefix: str, adapter_name: str) -> list[str]:
    """The parts of a model, outside of its backbone, that have weights and are not saved with an adapter.

    Args:
        model: The model.
        prefix: Of the names of the backbone's modules, with its dot.
        adapter_name: The adapter.
    """
    kept = (prefix, *(f"{name}." for name in saved_modules(model, adapter_name)))
    return sorted({name.partition(".")[0] for name, _ in model.named_parameters() if not name.startswith(kept)})


def classifier_linear(model: nn.Module, adapter_name: str, n_labels: int) -> nn.Linear:
    """The linear layer that gives the logits, in the adapter's own copy of the classifier.

    Raises:
        ValueError: When the model has no such layer or several.
    """
    copies = {
        name: module.modules_to_save[adapter_name] for name, module in saved_modules(model, adapter_name).items()
    }
    return one_classifier(copies, adapter_name, n_labels)


def one_classifier(saved: Mapping[str, nn.Module], adapter_name: str, n_labels: int) -> nn.Linear:
    """The linear layer that gives the logits among the modules that are saved with an adapter, by name.

    Raises:
        ValueError: When there is none or several.
    """
    found = {}
    for name, module in saved.items():
        linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == n_labels]
        if linears:
            found[name] = linears[-1]
    if len(found) != 1:
        raise ValueError(
            f"Adapter {adapter_name!r} needs one classifier with {n_labels} outputs among its `modules_to_save`, found "
            f"{sorted(found) or 'none'} among {sorted(saved) or 'none'}."
        )
    return next(iter(found.values()))


def check_untrained(model: nn.Module, adapter_name: str) -> None:
    """Make sure that what is saved whole with an adapter is as in the base model.

    Raises:
        ValueError: Naming the modules that are not: a head that is solved without them would not fit the model with them.
    """
    changed = [
        name for name, module in saved_modules(model, adapter_name).items() if differs_from_base(module, adapter_name)
    ]
    changed += [
        name
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensLayer)
        and adapter_name in module.trainable_tokens_delta
        and not module.trainable_tokens_delta[adapter_name].equal(module.trainable_tokens_original[adapter_name])
    ]
    if changed:
        raise ValueError(
            f"The head is solved on the base model's own weights, but adapter {adapter_name!r} has trained {changed} "
            "(`modules_to_save`, `trainable_token_indices`). Generate before you train them."
        )


def classifier_columns(config: Any, label_names: Sequence[str]) -> list[int]:
    """A model's class index of each label: by its name, in any case, by its number, or in order where classes have no names.

    Args:
        config: Configuration of the model, with `id2label` and `num_labels`.
        label_names: Different names.

    Raises:
        ValueError: When the labels do not fit the model's classes, naming both.
    """
    known = {int(i): str(name) for i, name in config.id2label.items()}
    by_name = {name: i for i, name in known.items()}
    by_folded = {name.casefold(): i for i, name in known.items()}
    if len(by_folded) < len(known):
        by_folded = {}  # names that differ in case only
    found = [
        [by_name.get(name) for name in label_names],
        [by_folded.get(name.casefold()) for name in label_names],
        [int(name) if name.isdecimal() and int(name) < config.num_labels else None for name in label_names],
    ]
    if len(label_names) == config.num_labels > 1 and all(name == f"LABEL_{i}" for i, name in known.items()):
        found.append(list(range(len(label_names))))
    for columns in found:
        if None not in columns and len(set(columns)) == len(label_names):
            return [column for column in columns if column is not None]
    raise ValueError(
        f"The support set has the labels {list(label_names)}, the model {config.num_labels} classes ({known}). Load the "
        f"model with num_labels={len(label_names)}, or with an id2label that names these labels."
    )


@torch.no_grad()
def classifier_features(model: nn.Module, linear: nn.Linear, batches: Iterable[dict[str, Any]]) -> Tensor:
    """What a model's classifier reads, shape (n, d): its logits with the last linear layer left out."""
    handle = linear.register_forward_hook(lambda _module, args, _output: args[0])
    try:
        with evaluating(model):
            return torch.cat([model(**batch, return_dict=True).logits.float() for batch in batches])
    finally:
        handle.remove()


@torch.inference_mode(False)
@torch.no_grad()
def write_classifier(linear: nn.Linear, features: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Set the classifier to a head that was solved on L2-normalised features.

    A classifier cannot normalise, so the weights are divided by the mean norm of the features; without a bias of its
    own, it carries the head's along the mean feature (Ours: both exact where features have one norm and one mean).

    Args:
        linear: From `classifier_linear`.
        features: From `classifier_features`, shape (n, d).
        weight: Shape (classes, d).
        bias: Shape (classes,).
    """
    weight = weight / features.norm(dim=-1).mean().clamp(min=1e-12)
    bias = bias.clamp(min=-100)  # of classes without examples: low enough, and training can bring it back
    if linear.bias is None:
        mean = features.mean(0)
        weight = weight + bias[:, None] * mean / mean.square().sum().clamp(min=1e-12)
    else:
        linear.bias.copy_(bias)
    linear.weight.copy_(weight)

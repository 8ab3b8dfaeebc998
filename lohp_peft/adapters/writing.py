"""Writing adapters into the LoRA layers of a model, and closed-form heads into its classifier."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from lohp_peft.adapters.export import (
    Fingerprints,
    differs_from_base,
    fingerprints,
    lora_digest,
    unsupported,
    unsupported_options,
)
from lohp_peft.adapters.injection import evaluating
from lohp_peft.adapters.layout import AdapterLayout, linear_shape
from lohp_peft.adapters.space import Adapter


@contextmanager
def only_active(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Run a model under one of its adapters, or under none; what was active and what is trained stays as it was.

    Raises:
        ValueError: When it shall run without adapters, but holds merged ones, which PEFT would unmerge.
    """
    if adapter_name is None and (merged := merged_modules(model)):
        raise ValueError(
            f"The base model is needed without adapters, but one is merged into {merged}; unmerge it first."
        )
    modules = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(m, m._disable_adapters, m._active_adapter) for m in modules]
    for module in modules:
        module._disable_adapters = adapter_name is None
        if adapter_name is not None:
            missing = isinstance(module, ModulesToSaveWrapper) and adapter_name not in module.modules_to_save
            module._active_adapter = [] if missing else [adapter_name]
    try:
        yield
    finally:
        for module, disabled, active in before:
            module._disable_adapters, module._active_adapter = disabled, active


def merged_modules(model: nn.Module) -> list[str]:
    """The names of a model's modules that an adapter is merged into."""
    return [name for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer) and layer.merged]


def check_writable(
    model: nn.Module, names: Iterable[str], r: int, adapter_name: str, config: LoraConfig
) -> dict[str, LoraLayer]:
    """The LoRA layers that an adapter of rank `r` on modules `names` can be written into, by name.

    Raises:
        ValueError: Listing everything about the model's adapter that stands in the way.
    """
    problems = unsupported_options(config)
    present = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling
    }
    if merged := merged_modules(model):
        problems.append(f"an adapter is merged into {merged}; unmerge it first")
    wanted = set(names)
    lacking = sorted(wanted - set(present))
    if lacking:
        problems.append(f"adapter {adapter_name!r} lacks the policy's modules {lacking}, it has {sorted(present)}")
    for name, layer in present.items():
        if name not in wanted:
            if _changes_output(layer, adapter_name):
                problems.append(f"{name} is no module of the policy, but its update is not zero")
            continue
        is_dora = isinstance(layer.lora_variant.get(adapter_name), DoraLinearVariant)
        problem = None if is_dora else unsupported(layer, adapter_name)
        if is_dora and _is_quantised(layer.get_base_layer()):
            problem = "use_dora=True needs the norms of weights that are quantised; use LoRA"
        if problem is None and linear_shape(layer) is None:
            problem = "not a linear layer"
        if problem is None and layer.r[adapter_name] < r:
            problem = f"rank {layer.r[adapter_name]} is below the policy's {r}"
        if problem is None and not layer.lora_alpha[adapter_name]:
            problem = "its scaling is 0"
        if problem is None and not math.isclose(layer.scaling[adapter_name], own := _scaling(layer, adapter_name)):
            problem = (
                f"its scaling is {float(layer.scaling[adapter_name]):g} for a time (`set_scale`, `rescale_adapter_scale`), "
                f"{own:g} by its configuration; restore it first"
            )
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError("Weights cannot be generated into this model: " + "; ".join(problems) + ".")
    return {name: present[name] for name in present if name in wanted}


@torch.inference_mode(False)  # what is written can be trained, wherever it was generated
@torch.no_grad()
def write_adapter(layers: dict[str, LoraLayer], adapter: Adapter, adapter_name: str, config: LoraConfig) -> None:
    """Set the layers' matrices so that `scaling * B @ A` is the adapter's update.

    Half-precision matrices become float32, as PEFT trains them. In layers of larger rank the further rows of A stay and
    their columns of B are zero. A magnitude vector (DoRA) is set to the norms of the adapted weight, so that the
    layer computes `W + scaling * B @ A` exactly.

    Args:
        layers: From `check_writable`.
        adapter: `lora_A` (r, d_in) and `lora_B` (d_out, r) by module name, scaling folded in.
        adapter_name: The model's name for the adapter.
        config: Its configuration.
    """
    for name, layer in layers.items():
        a, b = adapter[name]
        old = layer.lora_A[adapter_name].weight
        device = layer.get_base_layer().weight.device if old.is_meta else old.device
        rows = (
            torch.zeros(old.shape, device=device, dtype=torch.float32) if old.is_meta else old.detach().float().clone()
        )
        rows[: a.shape[0]] = a.to(rows)
        columns = torch.zeros(layer.lora_B[adapter_name].weight.shape, device=device, dtype=torch.float32)
        columns[:, : b.shape[1]] = b.to(columns) / layer.scaling[adapter_name]
        _set(layer.lora_A[adapter_name], rows)
        _set(layer.lora_B[adapter_name], columns)
        if adapter_name in layer.lora_variant:
            trained = [p.requires_grad for p in layer.lora_magnitude_vector.parameters()]
            layer.lora_variant[adapter_name].init(layer, adapter_name=adapter_name, config=config)
            for parameter, before in zip(layer.lora_magnitude_vector.parameters(), trained, strict=True):
                parameter.requires_grad_(before)


@contextmanager
def undone_on_error(layers: dict[str, LoraLayer], adapter_name: str) -> Iterator[None]:
    """A context that gives the layers their matrices of before back when something in it fails.

    Args:
        layers: From `check_writable`.
        adapter_name: The adapter whose matrices are written in the context, see `write_adapter`.
    """
    sides = [side for layer in layers.values() for side in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]
    before = [(side, side[adapter_name], side[adapter_name].weight) for side in sides if adapter_name in side]
    values = [weight.data for _, _, weight in before]
    try:
        yield
    except BaseException:
        for (side, module, weight), value in zip(before, values, strict=True):
            weight.data = value
            module.weight = weight
            side[adapter_name] = module
        raise


def written_weights(model: nn.Module, adapter_name: str, linear: nn.Linear | None = None) -> Fingerprints:
    """Fingerprints of the weights of a model's adapter, for its `GenerationRecord`.

    Args:
        model: The model.
        adapter_name: The adapter, all of whose LoRA weights that are loaded count.
        linear: From `classifier_linear`, where a head was written too.
    """
    head = [] if linear is None else list(linear.parameters())
    return fingerprints([*head, *_lora_weights(model, adapter_name).values()])


def written_digest(model: nn.Module, adapter_name: str) -> str:
    """`lora_digest` of the weights of a model's adapter.

    Args:
        model: The model.
        adapter_name: The adapter.
    """
    return lora_digest(_lora_weights(model, adapter_name))


def _lora_weights(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    return {
        f"{module}.{name}": parameter
        for module, layer in model.named_modules()
        for name, parameter in (layer.named_parameters() if isinstance(layer, LoraLayer) else ())
        if name.startswith("lora_") and adapter_name in name.split(".") and not parameter.is_meta
    }


def classifier_linear(model: nn.Module, adapter_name: str, n_labels: int) -> nn.Linear:
    """The linear layer that gives the logits, in the adapter's own copy of the classifier.

    Raises:
        ValueError: When the model has no such layer or several.
    """
    copies = {
        name: module.modules_to_save[adapter_name] for name, module in _saved_modules(model, adapter_name).items()
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
        name for name, module in _saved_modules(model, adapter_name).items() if differs_from_base(module, adapter_name)
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


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, ModulesToSaveWrapper]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }


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


def backbone_of(model: nn.Module, layout: AdapterLayout) -> tuple[nn.Module, str]:
    """The part of a model that a layout names the modules of, and the prefix of its names in the model.

    Raises:
        ValueError: When the layout fits neither the model nor its backbone, listing every difference.
    """
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [(model, "")]
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        candidates.insert(0, (getattr(model, prefix), f"{prefix}."))
    for candidate, name in candidates:
        try:
            layout.check_fits(candidate)
        except ValueError as error:
            reason = error
        else:
            return candidate, name
    raise reason


def _set(linear: nn.Linear, value: Tensor) -> None:
    weight = linear.weight
    value = value.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.is_meta:
        linear.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
    else:
        weight.data = value


def _scaling(layer: LoraLayer, adapter_name: str) -> float:
    """What PEFT multiplies an adapter's update with, once it is saved and loaded."""
    r = layer.r[adapter_name]
    return layer.lora_alpha[adapter_name] / (math.sqrt(r) if layer.use_rslora.get(adapter_name) else r)


def _is_quantised(module: nn.Module) -> bool:
    return bool(get_bnb_param_type(module.weight)) or not module.weight.is_floating_point()


def _changes_output(layer: LoraLayer, adapter_name: str) -> bool:
    pairs = [(layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)]
    for a, b in pairs:
        if adapter_name in a:
            sides = [getattr(side[adapter_name], "weight", side[adapter_name]) for side in (a, b)]
            return not sides[0].is_meta and all(bool(side.any()) for side in sides)
    return True

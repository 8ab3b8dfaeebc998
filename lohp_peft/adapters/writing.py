"""Writing adapters into the LoRA layers of a model."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from lohp_peft.adapters.classifier import saved_modules
from lohp_peft.adapters.export import (
    DIGEST_KEY,
    Fingerprints,
    GenerationRecord,
    fingerprints,
    holds,
    lora_digest,
    unsupported,
    unsupported_options,
)
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
            module._active_adapter = [] if _lacks(module, adapter_name) else [adapter_name]
    try:
        yield
    finally:
        for module, disabled, active in before:
            module._disable_adapters, module._active_adapter = disabled, active


def _lacks(module: nn.Module, adapter_name: str) -> bool:
    """Whether a wrapper that raises for adapters it has not, of modules that some adapters train, has not this one."""
    if isinstance(module, TrainableTokensLayer):
        return adapter_name not in module.trainable_tokens_delta
    return isinstance(module, ModulesToSaveWrapper) and adapter_name not in module.modules_to_save


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


def has_changed(model: nn.Module, adapter_name: str, record: GenerationRecord) -> bool:
    """Whether a model's adapter has other weights than its generation wrote.

    Args:
        model: The model.
        adapter_name: The adapter.
        record: Of its generation.
    """
    if record.weights is None:
        return record.provenance.get(DIGEST_KEY) not in (None, written_digest(model, adapter_name))
    copies = [module.modules_to_save[adapter_name] for module in saved_modules(model, adapter_name).values()]
    heads = [parameter for copy in copies for parameter in copy.parameters()]
    return not holds([*heads, *_lora_weights(model, adapter_name).values()], record.weights)


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

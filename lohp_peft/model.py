"""`LoHpModel`: LoRA layers whose weights a policy writes once; the policy is no part of the model."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.warning import PeftWarning
from torch import nn

from lohp_peft.adapters.export import DIGEST_KEY, GenerationRecord
from lohp_peft.adapters.writing import (
    backbone_of,
    check_untrained,
    check_writable,
    classifier_columns,
    classifier_features,
    classifier_linear,
    one_classifier,
    only_active,
    undone_on_error,
    write_adapter,
    write_classifier,
    written_digest,
    written_weights,
)
from lohp_peft.config import (
    LoHpConfig,
    RecordedLoraConfig,
    follow_policy,
    generation_record,
    keep_record,
    read_support_file,
)

if TYPE_CHECKING:
    from lohp_peft.generation import GenerationConfig, GenerationReport, LoHpPolicy, Support


class LoHpModel(LoraModel):
    """Creates a LoRA model whose weights a learned policy generates from a few labelled examples.

    Injection starts as the identity. `generate_adapter` runs the policy, forward-only, and writes ordinary `lora_A` and
    `lora_B`; what is saved afterwards is a plain LoRA. Without a policy this is LoRA.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`LoHpConfig`]): The configuration of the model.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `torch.nn.Module`: The model with LoRA layers.

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from lohp_peft import LoHpConfig
        >>> model = get_peft_model(base_model, LoHpConfig(policy="shipped", task_type="FEATURE_EXTRACTION"))
        >>> report = model.generate_adapter(support, tokenizer=tokenizer)
        >>> model.save_pretrained("my-adapter")
        ```

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`LoHpConfig`]) -- The configurations by adapter name.
    """

    _merging = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See `LoraModel`; takes rank and targets from the policy and generates when the configuration has a support."""
        config = self.peft_config[adapter_name]
        if config.bias != "none" and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            warnings.warn(
                f"Adapter {adapter_name!r} has bias={config.bias!r}, but PEFT before 0.21 saves no biases of a method "
                'that it does not know; use bias="none" or a newer PEFT.',
                PeftWarning,
                stacklevel=2,
            )
        follows = isinstance(config, LoHpConfig) and config.follows_policy and not self._merging
        if follows or generation_record(config) is not None:
            # A copy, because one configuration may serve several models, of which another one was generated. For these
            # tasks PEFT adds the head to the caller's `modules_to_save` after injection, so that list is shared.
            if config.modules_to_save is None and config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
                config.modules_to_save = []
            config = self.peft_config[adapter_name] = copy.copy(config)
            keep_record(config, None)
        if not follows:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        follow_policy(config, model)
        inputs = None
        if config.support is not None and config.init_weights:
            if kwargs.get("low_cpu_mem_usage") or nn.LayerNorm(1).weight.is_meta or _has_meta(model):
                warnings.warn(
                    f"Adapter {adapter_name!r} is not generated, because there are no weights yet (meta device); call "
                    "`generate_adapter` once they are loaded.",
                    PeftWarning,
                    stacklevel=2,
                )
            else:
                # All of it before the model is changed, so that a mistake leaves it as it was.
                inputs = _generation_inputs(config, model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if inputs is not None:
            self.generate_adapter(adapter_name=adapter_name, **inputs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype or generation_record(self.peft_config[adapter_name]) is None:
            return
        for layer in self.model.modules():  # generated at injection in float32, but asked for in the base model's type
            if isinstance(layer, LoraLayer):
                layer._move_adapter_to_device_of_base_layer(adapter_name)

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = PeftType.LORA  # the check knows LoRA by its type only
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """See `LoraModel`; the combination is saved as a plain LoRA when one of its parts was generated."""
        existed = adapter_name in self.peft_config
        self._merging = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._merging = False
        if existed:
            return
        config = self.peft_config[adapter_name]
        parts = {name: generation_record(self.peft_config[name]) for name in adapters}
        if isinstance(config, LoHpConfig) and any(parts.values()):
            config.support = None
            generated = {name: dict(record.provenance) for name, record in parts.items() if record is not None}
            provenance = {"combined": dict(zip(adapters, map(float, weights), strict=True)), **generated}
            keep_record(config, GenerationRecord(provenance, weights=written_weights(self.model, adapter_name)))

    def generate_adapter(
        self,
        support: "Support",
        tokenizer: Any = None,
        adapter_name: str | None = None,
        config: "GenerationConfig | None" = None,
        policy: "LoHpPolicy | str | None" = None,
    ) -> "GenerationReport":
        """Generate an adapter's weights from labelled examples, without gradients unless the settings ask for them.

        With `task_type="SEQ_CLS"` the classifier's trainable copy is solved in closed form as well; for feature extraction the
        head is kept with the adapter, see `adapter_head`, and saved as `head.safetensors`.

        Args:
            support: Rows `{text[, text_b], label}`, a `datasets.Dataset` with these columns, or `Examples`.
            tokenizer: Tokenizer of the base model; loaded from where the base model came from by default.
            adapter_name: The adapter to write; the active one by default.
            config: Settings of the generation; policy steps, candidates and seed of the `LoHpConfig` by default.
            policy: The policy or its name; that of the `LoHpConfig` by default.

        Returns:
            What was generated, why, and whether the policy abstained.

        Raises:
            ValueError: When policy, base model, tokenizer, adapter or labels do not fit, naming both sides.
        """
        from lohp_peft.generation import GenerationConfig

        name = self._one_adapter(adapter_name)
        mine = self.peft_config[name]
        if policy is None:
            policy = getattr(mine, "policy_id", None)
        if policy is None:
            raise ValueError(f"Adapter {name!r} has no policy; pass `policy` here or to its LoHpConfig.")
        if config is None:
            config = GenerationConfig(
                policy_steps=mine.policy_steps, num_candidates=mine.num_candidates, seed=mine.seed
            )
        report, record = _generate(self, name, policy, support, tokenizer, config)
        if getattr(self.model, "_hf_peft_config_loaded", False):
            # Transformers' own adapters are saved configuration first, where no weights, or others, can be asked.
            told = {**record.provenance, DIGEST_KEY: written_digest(self.model, name)}
            record = replace(record, provenance=told, weights=None)
        self.peft_config[name] = copy.copy(mine)  # the caller's object may serve other models
        keep_record(self.peft_config[name], record)
        return report

    def adapter_head(self, adapter_name: str | None = None) -> Any:
        """The closed-form head on pooled embeddings solved with `adapter_name` (the active one by default), or `None`.

        It is that of the weights as they were generated; further training leaves it behind.
        """
        from lohp_peft.generation import Head

        record = generation_record(self.peft_config[self._one_adapter(adapter_name)])
        return None if record is None or record.head is None else Head(**record.head)

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            active = self.active_adapters
            if len(active) != 1:
                raise ValueError(f"`adapter_name` is needed unless one adapter is active, got active {active}.")
            return active[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"`adapter_name` must be one of {sorted(self.peft_config)}, got {adapter_name!r}.")
        return adapter_name


def initialize_lohp_weights(
    peft_model: PeftModel,
    policy: "LoHpPolicy | str",
    support: "Support",
    *,
    tokenizer: Any = None,
    adapter_name: str = "default",
    config: "GenerationConfig | None" = None,
) -> "GenerationReport":
    """Write generated weights into a model with a plain `LoraConfig`, as `initialize_lora_eva_weights` does for EVA.

    Args:
        peft_model: From `get_peft_model` with a `LoraConfig` that covers the policy's modules with at least its rank.
        policy: The policy or its name.
        support: See `LoHpModel.generate_adapter`.
        tokenizer: Tokenizer of the base model; loaded from where the base model came from by default.
        adapter_name: The adapter to write.
        config: Settings of the generation.

    Returns:
        What was generated, why, and whether the policy abstained.

    Raises:
        TypeError: When the model has no LoRA tuner.
        ValueError: When policy, base model, tokenizer, adapter or labels do not fit, naming both sides.
    """
    tuner: Any = getattr(peft_model, "base_model", None)
    if not isinstance(peft_model, PeftModel) or type(tuner) not in (LoraModel, LoHpModel):
        raise TypeError(
            f"`peft_model` must be a PeftModel with a LoraConfig, got {type(peft_model).__name__} around "
            f"{type(tuner).__name__}."
        )
    if isinstance(tuner, LoHpModel):
        return tuner.generate_adapter(support, tokenizer, adapter_name, config, policy)
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"`adapter_name` must be one of {sorted(tuner.peft_config)}, got {adapter_name!r}.")
    report, record = _generate(tuner, adapter_name, policy, support, tokenizer, config)
    recorded = copy.copy(tuner.peft_config[adapter_name])
    recorded.__class__ = RecordedLoraConfig
    keep_record(recorded, record)
    tuner.peft_config[adapter_name] = recorded
    return report


def to_plain_lora(peft_model: PeftModel) -> PeftModel:
    """The same `peft_model`, turned from LOHP into LoRA in place: other LoRA adapters can then be loaded beside its own.

    Raises:
        TypeError: When it is no LOHP model.
    """
    if not isinstance(peft_model, PeftModel) or type(peft_model.base_model) is not LoHpModel:
        raise TypeError(f"`peft_model` must be a PeftModel with a LoHpConfig, got {type(peft_model).__name__}.")
    tuner = peft_model.base_model
    for name, config in tuner.peft_config.items():
        if isinstance(config, LoHpConfig):
            tuner.peft_config[name] = config.to_lora_config()
    tuner.__class__ = LoraModel
    peft_model.peft_type = PeftType.LORA
    return peft_model


def _generate(
    tuner: BaseTuner,
    adapter_name: str,
    policy: "LoHpPolicy | str",
    support: "Support",
    tokenizer: Any,
    config: "GenerationConfig | None",
) -> "tuple[GenerationReport, GenerationRecord]":
    """Generate, check everything first, then write the weights and the classifier, or neither."""
    from lohp_peft.generation import encoder_for, generate_adapters, load_policy, read_support
    from lohp_peft.tasks import solve_head

    peft_config, model = tuner.peft_config[adapter_name], tuner.model
    examples, name = read_support(support), policy if isinstance(policy, str) else None
    policy = load_policy(policy)
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    backbone, prefix = backbone_of(model, policy.layout)
    names = [prefix + spec.name for spec in policy.layout.modules]
    layers = check_writable(model, names, policy.config.r, adapter_name, peft_config)
    linear, columns = None, []
    if _is_classifier(peft_config):
        columns = _columns(model, examples.label_names)
        linear = classifier_linear(model, adapter_name, model.config.num_labels)
    else:
        if type(model).__name__.endswith("ForSequenceClassification"):
            warnings.warn(
                f"The classifier of {type(model).__name__} stays as it is, because adapter {adapter_name!r} has "
                f"task_type={peft_config.task_type!r}; with 'SEQ_CLS' it is solved as well.",
                PeftWarning,
                stacklevel=4,
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
            kind = made.report.config["head"] or policy.config.head
            labels = torch.tensor(columns, device=features.device)[examples.targets.to(features.device)]
            head = solve_head(features, labels, model.config.num_labels, kind, ridge=policy.config.ridge)
            write_classifier(linear, features, head.weight, head.bias)
            label_names = [str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)]
            for column, label in zip(columns, examples.label_names, strict=True):
                label_names[column] = label
            record = made.record(policy_name=name, head=False, label_names=label_names)
    return made.report, replace(record, weights=written_weights(model, adapter_name, linear))


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


def _has_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _generation_inputs(config: LoHpConfig, model: nn.Module, adapter_name: str) -> dict[str, Any]:
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

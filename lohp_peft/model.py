"""`LoHpModel`: LoRA layers whose weights a policy writes once; the policy is no part of the model."""

import copy
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.warning import PeftWarning
from torch import nn

from lohp_peft.adapters.export import DIGEST_KEY, GenerationRecord, combined_provenance
from lohp_peft.adapters.writing import has_changed, written_digest, written_weights
from lohp_peft.config import (
    LoHpConfig,
    RecordedLoraConfig,
    follow_policy,
    generation_record,
    is_plain_lora,
    keep_record,
    stand_beside_generated,
)
from lohp_peft.generating import generate_into, generation_inputs
from lohp_peft.warn import warn

if TYPE_CHECKING:
    from lohp_peft.generated import GenerationReport
    from lohp_peft.generation import GenerationConfig, LoHpPolicy, Support


class LoHpModel(LoraModel):
    """Creates a LoRA model whose weights a learned policy generates from a few labelled examples.

    Injection starts as the identity. `generate_adapter` runs the policy, forward-only, and writes ordinary `lora_A` and
    `lora_B`; what is saved afterwards, every adapter of the model, is a plain LoRA. (`to_plain_lora` makes the model one as
    well, into which adapters that were saved so can be loaded or hot-swapped.) Without a policy this is LoRA.

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
            warn(
                f"Adapter {adapter_name!r} has bias={config.bias!r}, but PEFT before 0.21 saves no biases of a method "
                'that it does not know; use bias="none" or a newer PEFT.',
                PeftWarning,
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
            self._save_in_one_type()
            return
        follow_policy(config, model)
        inputs = None
        if config.support is not None and config.init_weights:
            if kwargs.get("low_cpu_mem_usage") or nn.LayerNorm(1).weight.is_meta or _has_meta(model):
                warn(
                    f"Adapter {adapter_name!r} is not generated, because there are no weights yet (meta device); call "
                    "`generate_adapter` once they are loaded.",
                    PeftWarning,
                )
            else:
                # All of it before the model is changed, so that a mistake leaves it as it was.
                inputs = generation_inputs(config, model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._save_in_one_type()
        if inputs is not None:
            self.generate_adapter(adapter_name=adapter_name, **inputs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype or generation_record(self.peft_config[adapter_name]) is None:
            return
        for layer in self.model.modules():  # generated at injection in float32, but asked for in the base model's type
            if isinstance(layer, LoraLayer):
                layer._move_adapter_to_device_of_base_layer(adapter_name)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, *args: Any) -> Any:
        peft_config.init_lora_weights = True  # PEFT does so for what it knows as LoRA
        peft_config.save_pretrained(path)
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, *args)

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = PeftType.LORA  # the check knows LoRA by its type only
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """See `LoraModel`; the combination is saved as a plain LoRA when one of its parts was generated."""
        existed = adapter_name in self.peft_config
        records = {name: generation_record(self.peft_config[name]) for name in adapters if name in self.peft_config}
        parts = {name: record for name, record in records.items() if record is not None}
        changed = any(has_changed(self.model, name, record) for name, record in parts.items())
        self._merging = True
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._merging = False
        if existed:
            return
        config = self.peft_config[adapter_name]
        if isinstance(config, LoHpConfig) and parts:
            config.support = None
            provenance = combined_provenance(dict(zip(adapters, map(float, weights), strict=True)), parts, changed)
            keep_record(config, GenerationRecord(provenance, weights=written_weights(self.model, adapter_name)))
        self._save_in_one_type()

    def generate_adapter(
        self,
        support: "Support",
        tokenizer: Any = None,
        adapter_name: str | None = None,
        config: "GenerationConfig | None" = None,
        policy: "LoHpPolicy | str | os.PathLike | None" = None,
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
        report, record = generate_into(self, name, policy, support, tokenizer, config)
        if getattr(self.model, "_hf_peft_config_loaded", False):
            # Transformers' own adapters are saved configuration first, where no weights, or others, can be asked.
            told = {**record.provenance, DIGEST_KEY: written_digest(self.model, name)}
            record = replace(record, provenance=told, weights=None)
        self.peft_config[name] = copy.copy(mine)  # the caller's object may serve other models
        keep_record(self.peft_config[name], record)
        self._save_in_one_type()
        return report

    def _save_in_one_type(self) -> None:
        """Once one adapter was generated, which makes it a plain LoRA, all are saved as such."""
        others = {n: c for n, c in self.peft_config.items() if isinstance(c, LoHpConfig) and not is_plain_lora(c)}
        if any(generation_record(config) for config in self.peft_config.values()):
            for name, config in others.items():
                self.peft_config[name] = copy.copy(config)
                stand_beside_generated(self.peft_config[name])

    def adapter_head(self, adapter_name: str | None = None) -> Any:
        """The closed-form head on pooled embeddings solved with `adapter_name` (the active one by default), or `None`.

        It is that of the weights as they were generated; further training leaves it behind.
        """
        from lohp_peft.tasks import Head

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
    policy: "LoHpPolicy | str | os.PathLike",
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
    report, record = generate_into(tuner, adapter_name, policy, support, tokenizer, config)
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


def _has_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())

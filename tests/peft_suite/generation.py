"""Generation in every new LOHP adapter of PEFT's tests, which know nothing of policies."""

import copy
import functools
import re
from collections import Counter

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lohp_peft import AdapterLayout, CoreSpace, GenerationConfig, LoHpModel
from lohp_peft.adapters.export import GenerationRecord
from lohp_peft.adapters.layout import linear_shape
from lohp_peft.adapters.writing import check_writable, write_adapter
from lohp_peft.config import keep_record
from tiny_world import build_policy, build_rows, build_tokenizer


def generate_on_injection(counts: Counter) -> None:
    """Make `LoHpModel.inject_adapter` generate with a policy made for the model at hand; `counts` tells what was done."""
    inject = LoHpModel.inject_adapter

    @functools.wraps(inject)
    def inject_and_generate(self, model, adapter_name, *args, **kwargs):
        config = self.peft_config[adapter_name]
        if config.modules_to_save is None and config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            config.modules_to_save = []  # as with a policy: shared with the copy that holds the record
        inject(self, model, adapter_name, *args, **kwargs)
        if self._merging or config.inference_mode or getattr(config, "_saved_with_weights", True):
            return
        if kwargs.get("low_cpu_mem_usage"):
            return
        with torch.random.fork_rng():
            counts[_generate(self, model, adapter_name)] += 1

    LoHpModel.inject_adapter = inject_and_generate


def _generate(tuner: LoHpModel, model: nn.Module, adapter_name: str) -> str:
    """Generate for one adapter and say how; its seed is its place among the adapters, so that two of them differ."""
    config, seed = tuner.peft_config[adapter_name], list(tuner.peft_config).index(adapter_name)
    if isinstance(model, PeftModel):
        return "left as LoRA, around another PEFT model"
    reads_text = isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder
    prefix = f"{model.base_model_prefix}." if reads_text and hasattr(model, model.base_model_prefix) else ""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A and name.startswith(prefix)
    }
    layers = {name: layer for name, layer in layers.items() if linear_shape(layer) is not None}
    if not layers:
        return "left as LoRA, no linear layer"
    if any(parameter.is_meta for name, parameter in model.named_parameters() if "lora_" not in name):
        return "left as LoRA, no base weights yet"
    r = min(min(layer.r[adapter_name], *linear_shape(layer)) for layer in layers.values())
    try:
        writable = check_writable(model, layers, r, adapter_name, config)
    except ValueError as refusal:
        reason = re.search(r"update is not zero|uses \w+|has lora_bias|init_lora_weights='\w+'", str(refusal))
        return f"left as LoRA, refused because {reason.group() if reason else refusal}"
    names = [name.removeprefix(prefix) for name in layers]
    if reads_text:
        classes = model.config.num_labels if config.task_type == "SEQ_CLS" else 2
        if classes < 2:
            return "left as LoRA, one class"
        size = model.get_input_embeddings().weight.shape[1]
        policy = build_policy(model, r=r, seed=seed, targets=names, embedding_size=size)
        rows = build_rows(n_classes=classes, seed=seed)
        settings = GenerationConfig(choose=False, seed=seed)
        tuner.generate_adapter(rows, build_tokenizer(), adapter_name, settings, policy)
        return "generated from texts"
    # Such a model reads no text: a random state stands for the policy's, and is written as the policy's is.
    space = CoreSpace.from_base_weights(model, AdapterLayout.from_model(model, names), r)
    state = 0.3 * torch.randn(space.shape, generator=torch.Generator().manual_seed(seed)) * space.mask
    write_adapter(writable, space.decode(state), adapter_name, config)
    tuner.peft_config[adapter_name] = copy.copy(config)
    keep_record(tuner.peft_config[adapter_name], GenerationRecord({"policy": "random state"}))
    return "written without texts"

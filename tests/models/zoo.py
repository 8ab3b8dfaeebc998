"""Every model family, randomly initialised at the smallest size that has all of its parts."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

import tiny_world as tiny
from lohp_peft import GenerationConfig
from lohp_peft.adapters import AdapterLayout

WORDS = 32
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 130, "initializer_range": 0.3, "pad_token_id": 0}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 4}  # grouped queries: v_proj is narrower than q_proj
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
SHORT_NAMES = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}

RAW = GenerationConfig(choose=False)
ROWS = tiny.build_rows()
TOKENIZER = tiny.build_tokenizer()


@dataclass(frozen=True)
class Family:
    """One row of the table in README.md.

    Args:
        name: As in the table.
        config: Class of its configuration.
        sizes: Fields of its configuration.
        backbone: What is adapted: the class without a head.
        heads: Classes with a head, by PEFT's task type.
        targets: Target modules; PEFT's choice when `None`.
        skips: Whether the layers below the first adapted one can be skipped.
    """

    name: str
    config: str
    sizes: Mapping[str, Any]
    backbone: str
    heads: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    skips: bool = True

    def build(self, task_type: str = "FEATURE_EXTRACTION", **changes: Any) -> torch.nn.Module:
        """The model without or with a head; the same weights every time."""
        config = getattr(transformers, self.config)(**{**self.sizes, **changes})
        torch.manual_seed(0)
        backbone = getattr(transformers, self.backbone)(copy.deepcopy(config)).eval()
        if task_type == "FEATURE_EXTRACTION":
            return backbone
        model = getattr(transformers, self.heads[task_type])(config).eval()
        getattr(model, model.base_model_prefix, model).load_state_dict(backbone.state_dict(), strict=False)
        return model

    def layout(self, layers: list[int] | None = None) -> AdapterLayout:
        """Its target modules."""
        return AdapterLayout.from_model(self.build(), self.targets and list(self.targets), layers)

    def inputs(self, task_type: str = "FEATURE_EXTRACTION") -> dict[str, torch.Tensor]:
        """Two texts of different lengths, or two images."""
        if self.name == "ViT":
            return {"pixel_values": torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
        batch = TOKENIZER(["good1 word2", "bad2 word1 word3 odd1"], padding=True, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return inputs | ({"decoder_input_ids": batch["input_ids"]} if task_type == "SEQ_2_SEQ_LM" else {})


def _decoder(name: str, prefix: str, **fields: Any) -> Family:
    heads = {"CAUSAL_LM": f"{prefix}ForCausalLM", "SEQ_CLS": f"{prefix}ForSequenceClassification"}
    return Family(
        **{"name": name, "config": f"{prefix}Config", "sizes": DECODER, "heads": heads, "backbone": f"{prefix}Model"}
        | fields
    )


def _encoder(name: str, prefix: str, **fields: Any) -> Family:
    heads = {"SEQ_CLS": f"{prefix}ForSequenceClassification"}
    return Family(
        **{"name": name, "config": f"{prefix}Config", "sizes": TEXT, "heads": heads, "backbone": f"{prefix}Model"}
        | fields
    )


GEMMA4 = {**DECODER, **SLIDING, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
MODERN = {**TEXT, "local_attention": 8, "global_attn_every_n_layers": 2}
DEBERTA3 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2_HEADS = {"CAUSAL_LM": "GPT2LMHeadModel", "SEQ_CLS": "GPT2ForSequenceClassification"}
GEMMA3_HEADS = {"CAUSAL_LM": "Gemma3ForCausalLM", "SEQ_CLS": "Gemma3TextForSequenceClassification"}
QUERY_VALUE = ("q_proj", "v_proj")

TEXT_FAMILIES = (
    _decoder("Llama", "Llama"),
    _decoder("Qwen3", "Qwen3"),
    _decoder("Mistral", "Mistral"),
    Family("Gemma 3", "Gemma3TextConfig", {**DECODER, **SLIDING}, "Gemma3TextModel", GEMMA3_HEADS),
    Family("Gemma 4", "Gemma4TextConfig", GEMMA4, "Gemma4TextModel", {"CAUSAL_LM": "Gemma4ForCausalLM"}, QUERY_VALUE),
    Family("GPT-2", "GPT2Config", {**SHORT_NAMES, "initializer_range": 0.3}, "GPT2Model", GPT2_HEADS),
    _decoder("Qwen3-MoE", "Qwen3Moe", sizes=EXPERTS, targets=QUERY_VALUE),
    Family("T5", "T5Config", T5, "T5EncoderModel", {"SEQ_2_SEQ_LM": "T5ForConditionalGeneration"}, skips=False),
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta"),
    _encoder("ModernBERT", "ModernBert", sizes=MODERN, targets=("Wqkv",)),
    _encoder("ALBERT", "Albert", sizes={**TEXT, "embedding_size": 8}, targets=("query", "value"), skips=False),
    _encoder("DeBERTa", "Deberta", sizes=DEBERTA, skips=False),
    _encoder("DeBERTa-v3", "DebertaV2", sizes=DEBERTA3, targets=("value_proj",), skips=False),
)
VIT = Family(
    "ViT",
    "ViTConfig",
    {**SIZES, "image_size": 16, "patch_size": 8, "num_channels": 1},
    "ViTModel",
    {"SEQ_CLS": "ViTForImageClassification"},
    QUERY_VALUE,
)
BY_NAME = {family.name: family for family in (*TEXT_FAMILIES, VIT)}
BART = {**T5, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}


def build_bart() -> torch.nn.Module:
    return transformers.BartModel(
        transformers.BartConfig(
            **{**BART, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
        )
    ).eval()


def build_resnet() -> torch.nn.Module:
    config = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetModel(transformers.ResNetConfig(**config)).eval()


@cache
def policy_of(name: str):
    """A policy for a family with random networks: what it generates is far from zero."""
    family = BY_NAME[name]
    return tiny.build_policy(family.build(), TOKENIZER, targets=family.targets and list(family.targets))


@torch.no_grad()
def run(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or hidden states of a model without a head."""
    output = model.eval()(**inputs)
    return (output.logits if "logits" in output else output.last_hidden_state).float()

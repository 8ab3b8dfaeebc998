"""A Hub cache of tiny models with random weights under the ids that PEFT's tests name, so that nothing is downloaded."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import LoraConfig

from tiny_world import build_tokenizer

VOCABULARY = 128
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
# as many keys as queries: some tests add up ranks to 20, which fewer could not hold
DECODER = {"num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
ENCODER = {**WIDE, **HEADS, "max_position_embeddings": 128}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 2}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
BART |= {
    f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("ffn_dim", 48), ("attention_heads", 4))
}

# By id: the transformers class and the arguments of its configuration.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {**OPT, **HEADS}),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**OPT, **HEADS}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", {**WIDE, **HEADS, **DECODER}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**WIDE, **HEADS, **DECODER}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**WIDE, **HEADS, **DECODER}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**WIDE, **HEADS, **DECODER}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**WIDE, **HEADS, **DECODER, "num_labels": 1},
    ),
    "bert-base-uncased": ("BertModel", ENCODER),
}
ADAPTERS = {"peft-internal-testing/tiny-opt-lora-revision": "test"}  # id and revision


def build_hub(home: Path) -> None:
    """Fill `home` (the folder for `HF_HOME`); what is there already and has not changed stays."""
    for name, (model, arguments) in MODELS.items():
        _add(home, name, "main", _save_model, model, arguments)
    for name, revision in ADAPTERS.items():
        _add(home, name, revision, LoraConfig(task_type="CAUSAL_LM").save_pretrained)


def _add(home: Path, name: str, revision: str, save: Callable, *arguments) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = hashlib.sha1(json.dumps([name, *arguments]).encode()).hexdigest()
    if reference.is_file() and reference.read_text() == commit:
        return
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    save(snapshot, *arguments)
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit)


def _save_model(folder: Path, name: str, arguments: dict) -> None:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**arguments))
    with torch.no_grad():  # far from zero, so that an adapter that does something shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)

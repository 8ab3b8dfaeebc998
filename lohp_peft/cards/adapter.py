"""The card of a generated adapter."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lohp_peft.adapters.export import DIGEST_KEY, HEAD_FILE, PROVENANCE_FILE, tells_of_other_weights
from lohp_peft.cards.markdown import (
    base_link,
    entries_table,
    fill,
    is_hub_id,
    model_metadata,
    read_json,
    render,
    score_table,
)
from lohp_peft.cards.ownership import marked

ADAPTER_FILE = "adapter_config.json"
BASE_KEY = "base_model_name_or_path"
"""Where PEFT keeps an adapter's configuration, and in it the name of the base model."""
_POOLING = {
    "mean": """mask = batch["attention_mask"].unsqueeze(-1)
x = (tokens * mask).sum(1) / mask.sum(1)""",
    "first": "x = tokens[:, 0]",
    "last": """mask = batch["attention_mask"]
last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
x = tokens[torch.arange(len(tokens)), last]""",
}
_PIPELINE_TAGS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
}
"""By PEFT's task types, what the Hub's widget should do with the model."""
_BASE_TERMS = "The terms of the base model apply as well"
_POLICY_TERMS = """, and those of the policy, whose card lists its training tasks with their
licences."""


def adapter_card(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    *,
    name: str,
    location: str | None = None,
    has_head: bool = False,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
) -> str:
    """Render the card of an adapter.

    Args:
        config: The content of `adapter_config.json`.
        provenance: The content of `lohp_provenance.json`. `label_names`, `pooling`, `max_length`, `gradient_steps`,
            `weights_changed` and `reason` are read, every other entry is listed. Without it the card says that nobody
            recorded how the adapter was made.
        name: Title of the card.
        location: Repository id or folder that the loading snippet names; `name` by default.
        has_head: Whether the folder holds the `head.safetensors` that the provenance describes.
        scores: One row a method, one column a metric, such as one task of `evaluate_tasks`; numbers in 0..1.
        license: Licence identifier of the Hub for the adapter.

    Returns:
        The card in Markdown, with its metadata block.

    Raises:
        ValueError: When the provenance has labels that are no list, or a pooling that is unknown.
    """
    recorded, provenance = bool(provenance), dict(provenance or {})
    provenance.pop(DIGEST_KEY, None)
    config = {**config, BASE_KEY: _base_model(config, provenance)}
    base = config[BASE_KEY]
    settings = {
        "task type": config.get("task_type"),
        "rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target modules": _targets(config.get("target_modules")),
        "labels": provenance.pop("label_names", None),
    }
    if not isinstance(settings["labels"], list | tuple | None):
        raise ValueError(f"`label_names` in the provenance must be a list of names, got {settings['labels']!r}.")
    method = str(config.get("peft_type") or "LORA")
    limits = ["Check it on labelled examples of your own."]
    if recorded:
        limits = ["An adapter from a few examples is as good as they are: check it on labelled examples of your own."]
    if provenance.get("reason"):
        limits.insert(0, f"**The generated adapter was not taken**, for this reason: {provenance['reason']}.")
    return render(
        "adapter_card.md",
        model_metadata(
            base,
            "peft",
            ["lohp", "lora"] if recorded else ["lora" if method == "LOHP" else method.lower()],
            license,
            _PIPELINE_TAGS.get(str(config.get("task_type"))),
        ),
        name=name,
        about=_about(base_link(base), provenance) if recorded else _about_unrecorded(base_link(base), method),
        snippet=_adapter_snippet(config, provenance, settings["labels"], location or name, has_head and recorded),
        adapter=entries_table(settings),
        scores=score_table(scores),
        provenance=entries_table(provenance),
        license=license or "Not stated",
        terms=f"{_BASE_TERMS}{_POLICY_TERMS if recorded else '.'}",
        limits="\n".join(f"- {limit}" for limit in limits),
    )


def adapter_card_of(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    location: str | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
) -> str:
    """Render the card of an adapter folder, from the files that are there.

    Args:
        folder: Folder with `adapter_config.json` and, where they exist, `lohp_provenance.json` and `head.safetensors`.
        name: Title; the folder's name by default.
        location: See `adapter_card`.
        scores: See `adapter_card`.
        license: See `adapter_card`.

    Returns:
        The card in Markdown, for `write_card`; marked as ours unless it has scores, which no folder holds.

    Raises:
        ValueError: When the folder holds no readable `adapter_config.json`.
    """
    folder = Path(folder)
    config, provenance = _read(folder)
    if tells_of_other_weights(folder):
        provenance["weights_changed"] = True
    card = adapter_card(
        config,
        provenance,
        name=name or folder.resolve().name,
        location=location,
        has_head=(folder / HEAD_FILE).exists() and not provenance.get("weights_changed"),
        scores=scores,
        license=license,
    )
    return card if scores else marked(card)


def public_base_model(folder: str | os.PathLike) -> str | None:
    """The name of an adapter's base model, on the Hub where it is known.

    Where it came from gives way to the policy's base model, whose fingerprint the generation has compared with it, for a relative
    folder may be spelled like a repository; not to a name without owner, which may be that of a folder too.

    Args:
        folder: Folder with `adapter_config.json` and, where it exists, `lohp_provenance.json`.

    Raises:
        ValueError: When one of them is damaged.
    """
    return _base_model(*_read(Path(folder)))


def public_config(folder: str | os.PathLike) -> bytes:
    """The `adapter_config.json` of a folder as it is published: with `public_base_model`, and as it stands where it names that.

    Args:
        folder: See `public_base_model`.

    Raises:
        ValueError: See `public_base_model`.
    """
    config, provenance = _read(Path(folder))
    name = _base_model(config, provenance)
    if name == config.get(BASE_KEY):
        return (Path(folder) / ADAPTER_FILE).read_bytes()
    return json.dumps({**config, BASE_KEY: name}, indent=2, sort_keys=True).encode()  # as PEFT writes it


def _base_model(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> Any:
    name, recorded = config.get(BASE_KEY), str(provenance.get("base_model"))
    known = provenance.get("base_fingerprint") and "/" in recorded and is_hub_id(recorded)
    return recorded if known and name else name


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and provenance of an adapter; the latter is empty where there is none."""
    config = read_json(folder, ADAPTER_FILE, "an adapter folder")
    recorded = (folder / PROVENANCE_FILE).exists()
    return config, read_json(folder, PROVENANCE_FILE, "an adapter folder") if recorded else {}


def _about_unrecorded(base: str, method: str) -> str:
    return f"A PEFT adapter (`{method}`) for {base}. How it was made is not recorded."


def _about(base: str, provenance: Mapping[str, Any]) -> str:
    """What the adapter is and how it came to be."""
    steps = provenance.get("gradient_steps")
    how = ", forward-only: no gradient step is in it."
    if provenance.get("weights_changed"):
        how = (
            ". **Its weights have changed since**: they were trained further, or others were loaded in their place, so that\n"
            "what is told of them below is how they began."
        )
    elif steps:
        how = f", then {steps} gradient steps on them, which lowered the loss of examples they were not taken on."
    what = "A weighted sum of adapters" if provenance.get("combined") else "A plain LoRA"
    return (
        f"{what} for {base}, written by a [Lo-Hp](https://arxiv.org/abs/2511.00543) policy from a few labelled\n"
        f"examples{how} It is an ordinary PEFT adapter and loads without\n`lohp_peft`."
    )


def _adapter_snippet(
    config: Mapping[str, Any], provenance: Mapping[str, Any], labels: Any, location: str, has_head: bool
) -> str:
    base, method = config.get(BASE_KEY), config.get("peft_type")
    base = base if is_hub_id(base) else "path/to/the/base/model"
    tokenizer = f"""tokenizer = AutoTokenizer.from_pretrained("{base}")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token"""
    if not has_head:
        auto = {
            "SEQ_CLS": "AutoModelForSequenceClassification",
            "CAUSAL_LM": "AutoModelForCausalLM",
            "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
            "TOKEN_CLS": "AutoModelForTokenClassification",
            "QUESTION_ANS": "AutoModelForQuestionAnswering",
        }.get(str(config.get("task_type")), "AutoModel")
        count = f", num_labels={len(labels)}" if labels and auto.endswith("SequenceClassification") else ""
        register = "import lohp_peft  # PEFT knows this type of adapter only then\n" if method == "LOHP" else ""
        also, padding = "", ""
        if auto.endswith("SequenceClassification") and provenance.get("pooling") == "last":
            also = ", AutoTokenizer"
            padding = f"""{tokenizer}
base_model.config.pad_token_id = tokenizer.pad_token_id  # by which it tells where a text ends
"""
        return (
            f"{register}from peft import PeftModel\nfrom transformers import {auto}{also}\n\n"
            f'base_model = {auto}.from_pretrained("{base}"{count})\n{padding}'
            f'model = PeftModel.from_pretrained(base_model, "{location}").eval()'
        )
    pooling = str(provenance.get("pooling", "mean"))
    if pooling not in _POOLING:
        raise ValueError(f"`pooling` in the provenance must be one of {list(_POOLING)}, got {pooling!r}.")
    length = provenance.get("max_length", 128)
    values = {"location": location, "tokenizer": tokenizer, "base": str(base), "labels": json.dumps(labels)}
    return fill("head_snippet.txt", **values, length=str(length), pooled=_POOLING[pooling]).rstrip("\n")


def _targets(targets: Any) -> str | None:
    """Shorten a list of full module names to their distinct last parts with counts."""
    if not targets or isinstance(targets, str):
        return targets
    kinds = [str(target).rsplit(".", 1)[-1] for target in targets]
    return ", ".join(f"{kind} ({kinds.count(kind)})" if kinds.count(kind) > 1 else kind for kind in sorted(set(kinds)))

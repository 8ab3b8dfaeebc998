"""Model cards of adapters and policies, rendered from plain dictionaries."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from lohp_peft.files import read_json

__all__ = ["adapter_card", "is_hub_id", "policy_card", "write_adapter_card", "write_policy_card"]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_POOLING = {
    "mean": """mask = batch["attention_mask"].unsqueeze(-1)
x = (tokens * mask).sum(1) / mask.sum(1)""",
    "first": "x = tokens[:, 0]",
    "last": """mask = batch["attention_mask"]
last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
x = tokens[torch.arange(len(tokens)), last]""",
}
_CONTROLS_NOTE = (
    "The controls change only what the policy is conditioned on: the wrong task's examples, or the right examples with "
    "shuffled labels. An adapter that is specific to its task scores above both."
)


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
    """Render the card of a generated adapter.

    Args:
        config: The content of `adapter_config.json`.
        provenance: The content of `lohp_provenance.json`. `label_names`, `pooling`, `max_length` and `reason` are read,
            every other entry is listed.
        name: Title of the card.
        location: Repository id or folder that the loading snippet names; `name` by default.
        has_head: Whether the folder holds `head.safetensors`.
        scores: One row a method, one column a metric, such as one task of `evaluate_tasks`; numbers in 0..1.
        license: Licence identifier of the Hub for the adapter.

    Returns:
        The card in Markdown, with its metadata block.
    """
    provenance = dict(provenance or {})
    base = config.get("base_model_name_or_path")
    settings = {
        "task type": config.get("task_type"),
        "rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target modules": _targets(config.get("target_modules")),
        "labels": provenance.pop("label_names", None),
    }
    if not isinstance(settings["labels"], list | tuple | None):
        raise ValueError(f"`label_names` in the provenance must be a list of names, got {settings['labels']!r}.")
    limits = ["An adapter from a few examples is as good as they are: check it on labelled examples of your own."]
    if provenance.get("reason"):
        limits.insert(0, f"**The policy did not adapt**, for this reason: {provenance['reason']}.")
    return _render(
        "adapter_card.md",
        front_matter=_front_matter(base, "peft", ["lohp", "lora"], license),
        name=name,
        base_model=_base_link(base),
        snippet=_adapter_snippet(config, provenance, settings["labels"], location or name, has_head),
        adapter=_table(settings),
        scores=_score_table(scores),
        provenance=_table(provenance),
        limits="\n".join(f"- {limit}" for limit in limits),
    )


def policy_card(
    training: Mapping[str, Any],
    *,
    name: str,
    base_model: str | None = None,
    location: str | None = None,
    tasks: Sequence[Mapping[str, Any]] = (),
    results: Mapping[str, Mapping[str, Any]] | None = None,
    usage: str | None = None,
    limits: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """Render the card of a policy.

    Args:
        training: What the reader needs to repeat the training: preset, seeds, commit, versions, seconds.
        name: Title of the card.
        base_model: Hub id of the base model that the policy writes adapters for.
        location: Repository id or folder that the snippet names; `name` by default.
        tasks: The training tasks, each with `name`, `family` and `licence`.
        results: One row a method, one column a metric, on held-out tasks; numbers in 0..1.
        usage: What the licences of the tasks allow; a cautious sentence by default.
        limits: Known limits, one sentence each.
        license: Licence identifier of the Hub for the policy.

    Returns:
        The card in Markdown, with its metadata block.
    """
    unknown = sum(not task.get("licence") for task in tasks)
    default_usage = "Read the licences above before any use beyond research"
    default_usage += f"; {unknown} of {len(tasks)} tasks state none." if unknown else "."
    snippet = (
        "from lohp_peft import LoHpConfig\nfrom peft import get_peft_model\n\n"
        f'model = get_peft_model(base_model, LoHpConfig(policy="{location or name}"))\n'
        'report = model.generate_adapter(support, tokenizer=tokenizer)  # support: rows {"text": ..., "label": ...}\n'
        'model.save_pretrained("my-adapter")  # a plain LoRA'
    )
    return _render(
        "policy_card.md",
        front_matter=_front_matter(base_model, "lohp_peft", ["lohp", "lora", "peft"], license),
        name=name,
        base_model=_base_link(base_model),
        snippet=snippet,
        training=_table(training),
        results=_score_table(results),
        tasks=_rows(("task", "family", "licence"), [_task_row(task) for task in tasks]),
        usage=usage or default_usage,
        limits="\n".join(f"- {limit}" for limit in limits) or "None recorded.",
    )


def write_adapter_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    location: str | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
) -> Path:
    """Write `README.md` into an adapter folder, from the files that are already there.

    Args:
        folder: Folder with `adapter_config.json` and, where they exist, `lohp_provenance.json` and `head.safetensors`.
        name: Title; the folder's name by default.
        location: See `adapter_card`.
        scores: See `adapter_card`.
        license: See `adapter_card`.

    Returns:
        The path of the card.

    Raises:
        ValueError: When the folder holds no readable `adapter_config.json`.
    """
    folder = Path(folder)
    config = _read_json(folder, "adapter_config.json", "an adapter folder")
    recorded = folder / "lohp_provenance.json"
    provenance = _read_json(folder, recorded.name, "an adapter folder") if recorded.exists() else {}
    card = adapter_card(
        config,
        provenance,
        name=name or folder.resolve().name,
        location=location,
        has_head=(folder / "head.safetensors").exists(),
        scores=scores,
        license=license,
    )
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def write_policy_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    location: str | None = None,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    usage: str | None = None,
    limits: Sequence[str] = (),
    license: str | None = None,
) -> Path:
    """Write `README.md` into a policy folder, from its `config.json`.

    Args:
        folder: Folder that `LoHpPolicy.save_pretrained` wrote.
        name: Title; the folder's name by default.
        location: See `policy_card`.
        results: See `policy_card`.
        usage: See `policy_card`.
        limits: See `policy_card`.
        license: See `policy_card`.

    Returns:
        The path of the card.

    Raises:
        ValueError: When the folder holds no readable `config.json`.
    """
    folder = Path(folder)
    config = _read_json(folder, "config.json", "a policy folder")
    provenance = dict(_mapping(config.get("provenance"), f"provenance in {folder / 'config.json'}"))
    named = _mapping(provenance.pop("training_tasks", None), "training_tasks in the provenance")
    tasks = [{"name": task, **_mapping(about, f"training task {task!r}")} for task, about in named.items()]
    shape = {key: config.get(key) for key in ("preset", "space_kind", "r", "policy_steps", "pooling", "max_length")}
    card = policy_card(
        {**shape, "training tasks": len(tasks), **provenance, "base_fingerprint": config.get("base_fingerprint")},
        name=name or folder.resolve().name,
        base_model=config.get("base_model_name"),
        location=location,
        tasks=tasks,
        results=results,
        usage=usage,
        limits=limits,
        license=license,
    )
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is spelled like a Hub repository id and names no local path."""
    return bool(name) and _REPO_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def _adapter_snippet(
    config: Mapping[str, Any], provenance: Mapping[str, Any], labels: Any, location: str, has_head: bool
) -> str:
    base = config.get("base_model_name_or_path")
    base = base if is_hub_id(base) else "path/to/the/base/model"
    if not has_head:
        auto = {
            "SEQ_CLS": "AutoModelForSequenceClassification",
            "CAUSAL_LM": "AutoModelForCausalLM",
            "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
            "TOKEN_CLS": "AutoModelForTokenClassification",
        }.get(str(config.get("task_type")), "AutoModel")
        count = f", num_labels={len(labels)}" if labels and auto.endswith("SequenceClassification") else ""
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f'base_model = {auto}.from_pretrained("{base}"{count})\n'
            f'model = PeftModel.from_pretrained(base_model, "{location}").eval()'
        )
    pooling = str(provenance.get("pooling", "mean"))
    if pooling not in _POOLING:
        raise ValueError(f"`pooling` in the provenance must be one of {list(_POOLING)}, got {pooling!r}.")
    length = provenance.get("max_length", 128)
    return f"""import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = snapshot_download("{location}")  # or the path of a local copy
tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), folder).eval()
head = load_file(f"{{folder}}/head.safetensors")
labels = {json.dumps(labels)}

batch = tokenizer(["a new text"], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    tokens = model(**batch).last_hidden_state
{_POOLING[pooling]}
logits = torch.nn.functional.normalize(x, dim=-1) @ head["weight"].T + head["bias"]
print([labels[i] for i in logits.argmax(-1).tolist()])"""


def _read_json(folder: Path, name: str, kind: str) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not {kind}: cannot read {name} ({error}).") from error


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{what} must be a mapping, got {value!r}.")
    return value or {}


def _front_matter(base_model: str | None, library: str, tags: list[str], license: str | None) -> str:
    base = base_model if is_hub_id(base_model) else None
    data = ModelCardData(base_model=base, library_name=library, license=license, tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _base_link(base_model: str | None) -> str:
    if is_hub_id(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return f"a local base model (`{Path(base_model).name}`)" if base_model else "its base model"


def _targets(targets: Any) -> str | None:
    """Shorten a list of full module names to their distinct last parts with counts."""
    if not targets or isinstance(targets, str):
        return targets
    kinds = [str(target).rsplit(".", 1)[-1] for target in targets]
    return ", ".join(f"{kind} ({kinds.count(kind)})" if kinds.count(kind) > 1 else kind for kind in sorted(set(kinds)))


def _task_row(task: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(task["name"]), str(task.get("family") or ""), str(task.get("licence") or "not stated")


def _table(entries: Mapping[str, Any]) -> str:
    rows = [(key, _cell(value)) for key, value in entries.items() if value is not None]
    return _rows(("", ""), rows) if rows else "Not recorded."


def _score_table(scores: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not scores:
        return "Not measured."
    columns = [key for key in next(iter(scores.values())) if key != "per_draw"]
    rows = [(method, *(_score(key, values.get(key)) for key in columns)) for method, values in scores.items()]
    note = f"\n\n{_CONTROLS_NOTE}" if any("wrong_task" in method or "shuffled" in method for method in scores) else ""
    return _rows(("method", *(column.replace("_", " ") for column in columns)), rows) + note


def _score(column: str, value: Any) -> str:
    if not isinstance(value, float | int):
        return "" if value is None else str(value)
    return f"{value:.3g}" if column == "seconds" else f"{100 * value:.1f}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return f"`{json.dumps(value)}`" if isinstance(value, list | tuple | dict) else str(value)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _render(template: str, **values: str) -> str:
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)

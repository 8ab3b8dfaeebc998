"""The card of a policy."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lohp_peft.cards.markdown import (
    base_link,
    entries_table,
    mapping,
    model_metadata,
    pinned,
    read_json,
    render,
    score_table,
    table,
)
from lohp_peft.cards.ownership import marked


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
    place = pinned(location or name)
    snippet = (
        "from lohp_peft import LoHpConfig\nfrom peft import get_peft_model\n\n"
        f'model = get_peft_model(base_model, LoHpConfig(policy="{place}"))\n'
        'report = model.generate_adapter(support, tokenizer=tokenizer)  # support: rows {"text": ..., "label": ...}\n'
        'model.save_pretrained("my-adapter")  # a plain LoRA'
    )
    return render(
        "policy_card.md",
        model_metadata(base_model, "lohp_peft", ["lohp", "lora", "peft"], license),
        name=name,
        base_model=base_link(base_model),
        snippet=snippet,
        training=entries_table(training),
        results=score_table(results),
        tasks=table(("task", "family", "licence"), [_task_row(task) for task in tasks]),
        usage=usage or default_usage,
        limits="\n".join(f"- {limit}" for limit in limits) or "None recorded.",
        license=license or "Not stated",
    )


def policy_card_of(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    location: str | None = None,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    usage: str | None = None,
    limits: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """Render the card of a policy folder, from its `config.json`.

    Args:
        folder: Folder that `LoHpPolicy.save_pretrained` wrote.
        name: Title; the folder's name by default.
        location: See `policy_card`.
        results: See `policy_card`.
        usage: See `policy_card`.
        limits: See `policy_card`.
        license: See `policy_card`.

    Returns:
        The card in Markdown, for `write_card`; marked as ours unless it has results, usage or limits, which no folder holds.

    Raises:
        ValueError: When the folder holds no readable `config.json`.
    """
    folder = Path(folder)
    config = read_json(folder, "config.json", "a policy folder")
    provenance = dict(mapping(config.get("provenance"), f"provenance in {folder / 'config.json'}"))
    named = mapping(provenance.pop("training_tasks", None), "training_tasks in the provenance")
    tasks = [{"name": task, **mapping(about, f"training task {task!r}")} for task, about in named.items()]
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
    return card if results or usage or limits else marked(card)


def _task_row(task: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(task["name"]), str(task.get("family") or ""), str(task.get("licence") or "not stated")

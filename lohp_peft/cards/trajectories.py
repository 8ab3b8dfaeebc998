"""The card of recorded trajectories, a data set on the Hub."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from lohp_peft.cards.markdown import base_link, entries_table, pinned, read_json, render, table
from lohp_peft.cards.ownership import marked

_ENTRIES = ("base_model_name", "base_fingerprint", "space_kind", "space_r", "layout", "metadata", "shards")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"))
_RESTORE = "Restore it; `TrajectoryDataset.open` lists all that is wrong with it."


def trajectory_card(
    manifest: Mapping[str, Any],
    *,
    name: str,
    location: str | None = None,
    licences: Mapping[str, str] | None = None,
    license: str | None = None,
) -> str:
    """Render the card of recorded trajectories.

    Args:
        manifest: The content of `manifest.json`.
        name: Title of the card.
        location: Repository id or folder that the loading snippets name; `name` by default.
        licences: Licences of the tasks' texts, by task name.
        license: Licence identifier of the Hub for the trajectories.

    Returns:
        The card in Markdown, with its metadata block.
    """
    shards = manifest["shards"]
    runs = [run for shard in shards.values() for run in shard["trajectories"]]
    recorded = {
        "base_fingerprint": manifest["base_fingerprint"],
        "weight space": f"{manifest['space_kind']}, r = {manifest['space_r']}",
        "target modules": len(manifest["layout"]["modules"]),
        "tasks": len({run["task"] for run in runs}),
        "trajectories": len(runs),
        "states": sum(run["states"] for run in runs),
        "optimizers": _distinct(run["optimizer"] for run in runs),
        "seeds": _distinct(run["seed"] for run in runs),
        **manifest["metadata"],
    }
    metadata = DatasetCardData(
        license=license,
        pretty_name=name,
        size_categories=next((size for limit, size in _SIZES if len(runs) < limit), "100K<n<1M"),
        tags=["lohp", "lora", "peft", "trajectories"],
        viewer=False,  # safetensors are no rows to look at
    )
    return render(
        "trajectory_card.md",
        metadata,
        name=name,
        base_model=base_link(manifest["base_model_name"]),
        location=location or name,
        pinned=pinned(location or name),
        recorded=entries_table(recorded),
        tasks=_task_table(runs, licences or {}),
        license=license or "Not stated",
    )


def trajectory_card_of(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    location: str | None = None,
    licences: Mapping[str, str] | None = None,
    license: str | None = None,
) -> str:
    """Render the card of a folder of trajectories, from its manifest.

    Args:
        folder: Folder of a `TrajectoryDataset`.
        name: Title; the folder's name by default.
        location: See `trajectory_card`.
        licences: See `trajectory_card`.
        license: See `trajectory_card`.

    Returns:
        The card in Markdown, for `write_card`; marked as ours unless it has licences of texts, which no folder holds.

    Raises:
        ValueError: When the folder holds no readable manifest, or entries of it are missing or of another kind.
    """
    folder = Path(folder)
    manifest = read_json(folder, "manifest.json", "a folder of trajectories")
    if lacking := [key for key in _ENTRIES if key not in manifest]:
        raise ValueError(f"{folder / 'manifest.json'} is damaged, it lacks {lacking}. {_RESTORE}")
    title = name or folder.resolve().name
    try:
        card = trajectory_card(manifest, name=title, location=location, licences=licences, license=license)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'manifest.json'} is damaged, an entry is missing or of another kind: {error!r}. {_RESTORE}"
        ) from error
    return card if licences else marked(card)


def _task_table(runs: list[Mapping[str, Any]], licences: Mapping[str, str]) -> str:
    header = ("task", "trajectories", "optimizers", "seeds", "loss, first", "loss, last", "licence of the texts")
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = [run for run in runs if run["task"] == task]
        losses = [_mean([run[key] for run in mine]) for key in ("first_loss", "last_loss")]
        optimizers, seeds = (_distinct(run[key] for run in mine) for key in ("optimizer", "seed"))
        rows.append((task, str(len(mine)), optimizers, seeds, *losses, licences.get(task) or "not stated"))
    return table(header, rows)


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def _mean(values: list[float | None]) -> str:
    scored = [value for value in values if value is not None]
    return f"{sum(scored) / len(scored):.3f}" if scored else "not scored"

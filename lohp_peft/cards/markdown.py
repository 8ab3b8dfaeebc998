"""What all cards are made of: metadata, tables and templates."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import CardData, ModelCardData

from lohp_peft import files
from lohp_peft.cards.ownership import CARD_FILE

CONTROLS_NOTE = (
    "The controls change only what the policy is conditioned on: the wrong task's examples, or the right examples with "
    "shuffled labels. An adapter that is specific to its task scores above both."
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is spelled like a Hub repository id and names no local path."""
    return bool(name) and _REPO_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def pinned(place: str) -> str:
    """The name by which a snippet finds a repository: with a commit, which nobody knows before it is published."""
    return f"{place}@<commit hash>" if "/" in place and is_hub_id(place) else place


def model_metadata(
    base_model: str | None, library: str, tags: list[str], license: str | None, pipeline_tag: str | None = None
) -> CardData:
    """Metadata of a model card; a base model that is a local path is left out."""
    base = base_model if is_hub_id(base_model) else None
    return ModelCardData(base_model=base, library_name=library, license=license, tags=tags, pipeline_tag=pipeline_tag)


def base_link(base_model: str | None) -> str:
    """The base model in a sentence: a link to the Hub where there is one."""
    if is_hub_id(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return f"a local base model (`{Path(str(base_model)).name}`)" if base_model else "its base model"


def read_json(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Read a JSON file of a folder.

    Raises:
        ValueError: When it cannot be read, saying that the folder is not `kind`.
    """
    try:
        return files.read_json(folder / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not {kind}: cannot read {name} ({error}).") from error


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A mapping, empty for `None`.

    Raises:
        ValueError: When it is something else, saying that it is `what`.
    """
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{what} must be a mapping, got {value!r}.")
    return value or {}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def entries_table(entries: Mapping[str, Any]) -> str:
    """A table of two columns, without the entries that are `None`."""
    rows = [(key, _cell(value)) for key, value in entries.items() if value is not None]
    return table(("", ""), rows) if rows else "Not recorded."


def score_table(scores: Mapping[str, Mapping[str, Any]] | None) -> str:
    """One row a method, one column a metric, and what the controls mean where there are any."""
    if not scores:
        return "Not measured."
    columns = [key for key in next(iter(scores.values())) if key != "per_draw"]
    rows = [(method, *(_score(key, values.get(key)) for key in columns)) for method, values in scores.items()]
    note = f"\n\n{CONTROLS_NOTE}" if any("wrong_task" in method or "shuffled" in method for method in scores) else ""
    return table(("method", *(column.replace("_", " ") for column in columns)), rows) + note


def fill(template: str, **values: str) -> str:
    """Fill a template of this package."""
    text = (Path(__file__).parents[1] / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def render(template: str, metadata: CardData, **values: str) -> str:
    """Fill the template of a card."""
    return fill(template, **values, front_matter=f"---\n{metadata.to_yaml()}\n---")


def write_card(folder: str | os.PathLike, card: str) -> Path:
    """Write a card into `README.md` of the folder that it is of, whatever lies there.

    Args:
        folder: The folder.
        card: From `adapter_card_of`, `policy_card_of` or `trajectory_card_of`.

    Returns:
        The path of the card.
    """
    path = Path(folder) / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return path


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

"""Whose a card is: ours is rendered anew whenever its folder is saved or published, somebody's stays as it is."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lohp_peft.files import sha256

CARD_FILE = "README.md"
_PARTS = re.compile(r"(?:\s*---\n(?:(.*?)\n)?---[ \t]*(?:\n|\Z))?(.*)", re.DOTALL)
"""Of a card, its metadata and its text."""
_MARKED = re.compile(r"(.*)\n<!-- lohp_peft card ([0-9a-f]{64}) -->", re.DOTALL)
_VERSIONS_OF_PEFT = re.compile(r"\n### Framework versions\n\n(?:- PEFT \S+\n?)+\Z")
"""What PEFT appends to the card of a folder that it saves into."""


def marked(card: str) -> str:
    """A card with our mark on its last line: the digest of its text, without metadata, by which `is_ours` knows it."""
    return f"{card.rstrip()}\n\n<!-- lohp_peft card {sha256(_body(card).encode())} -->\n"


def is_ours(card: str) -> bool:
    """Whether a card is one of ours: it ends with our mark, and its text is as we left it.

    Neither its metadata nor what PEFT appends, its version, count.

    Args:
        card: The content of `README.md`.
    """
    found = _MARKED.fullmatch(_body(card))
    return found is not None and sha256(found[1].strip().encode()) == found[2]


def is_empty(card: str) -> bool:
    """Whether nobody has written a word of a card: it has no text, or that of PEFT's template."""
    template = ModelCard.from_template(ModelCardData()).text
    return set(_body(card).splitlines()) <= {*template.splitlines(), ""}


def is_replaced(card: str) -> bool:
    """Whether a card, or the empty text where there is none, gives way to one of ours."""
    return is_ours(card) or is_empty(card)


def metadata_of(card: str) -> dict[str, Any]:
    """The entries of a card's metadata; none where they are damaged."""
    try:
        entries = yaml.safe_load(_parts(card)[0])
    except (yaml.YAMLError, ValueError):  # the latter of a date that does not exist
        return {}
    return entries if isinstance(entries, dict) else {}


def read_card(folder: str | os.PathLike) -> str:
    """The text of the card in a folder, empty where there is none.

    Raises:
        ValueError: When it is no text in UTF-8.
    """
    path = Path(folder) / CARD_FILE
    try:
        return path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it as such.") from error


def _body(card: str) -> str:
    """The text of a card without its metadata and what PEFT appends."""
    return _VERSIONS_OF_PEFT.sub("", _parts(card)[1]).strip()


def _parts(card: str) -> tuple[str, str]:
    """Metadata and text of a card, whatever ends its lines."""
    metadata, text = _PARTS.findall("\n".join(card.splitlines()))[0]
    return metadata, text

"""Rendering the card of a folder in the place of an earlier one."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import RepoCard

from lohp_peft.cards.adapter import adapter_card_of
from lohp_peft.cards.policy import policy_card_of
from lohp_peft.cards.trajectories import trajectory_card_of

CARD_OF: dict[str, Callable[..., str]] = {
    "adapter": adapter_card_of,
    "policy": policy_card_of,
    "trajectories": trajectory_card_of,
}
"""By the kind of a folder, what renders its card from the files in it."""
_RENDERED = {"base_model", "library_name", "pipeline_tag", "pretty_name", "size_categories", "tags", "viewer"}
"""Entries of the metadata that are told by the folder alone; PEFT writes into some of them too, local paths among it."""


def renewed_card(
    kind: str,
    folder: str | os.PathLike,
    known: Mapping[str, Any],
    *,
    name: str | None = None,
    location: str | None = None,
    license: str | None = None,
) -> str:
    """Render the card of a folder with what somebody put into the metadata of an earlier one, such as the licence.

    Args:
        kind: Kind of the folder, one of `CARD_OF`.
        folder: The folder.
        known: Metadata of the earlier card.
        name: Title; the folder's name by default.
        location: Repository id or folder that the snippets name; `name` by default.
        license: Licence identifier of the Hub; that of the earlier card by default.

    Returns:
        The card in Markdown.

    Raises:
        ValueError: See `adapter_card_of`, `policy_card_of` and `trajectory_card_of`.
    """
    license = license or known.get("license")
    card = RepoCard(CARD_OF[kind](folder, name=name, location=location, license=license))
    for entry, value in known.items():
        if entry not in _RENDERED | {"license"}:
            card.data[entry] = value
    return str(card)

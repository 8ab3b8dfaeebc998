"""Cards of adapters, policies and trajectories, rendered from plain dictionaries."""

from collections.abc import Callable

from lohp_peft.cards.adapter import adapter_card, adapter_card_of, public_base_model
from lohp_peft.cards.markdown import is_hub_id, write_card
from lohp_peft.cards.policy import policy_card, policy_card_of
from lohp_peft.cards.trajectories import trajectory_card, trajectory_card_of

CARD_OF: dict[str, Callable[..., str]] = {
    "adapter": adapter_card_of,
    "policy": policy_card_of,
    "trajectories": trajectory_card_of,
}
"""By the kind of a folder, what renders its card from the files in it."""

__all__ = [
    "CARD_OF",
    "adapter_card",
    "adapter_card_of",
    "is_hub_id",
    "policy_card",
    "policy_card_of",
    "public_base_model",
    "trajectory_card",
    "trajectory_card_of",
    "write_card",
]

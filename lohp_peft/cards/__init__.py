"""Cards of adapters, policies and trajectories, rendered from plain dictionaries."""

from lohp_peft.cards.adapter import adapter_card, public_base_model, write_adapter_card
from lohp_peft.cards.markdown import is_hub_id
from lohp_peft.cards.policy import policy_card, write_policy_card
from lohp_peft.cards.trajectories import trajectory_card, write_trajectory_card

__all__ = [
    "adapter_card",
    "is_hub_id",
    "policy_card",
    "public_base_model",
    "trajectory_card",
    "write_adapter_card",
    "write_policy_card",
    "write_trajectory_card",
]

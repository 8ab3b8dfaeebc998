"""Cards of adapters, policies and trajectories, rendered from plain dictionaries."""

from lohp_peft.cards.adapter import adapter_card, adapter_card_of, public_base_model, public_config
from lohp_peft.cards.markdown import is_hub_id, write_card
from lohp_peft.cards.ownership import is_ours
from lohp_peft.cards.policy import policy_card, policy_card_of
from lohp_peft.cards.renewal import CARD_OF
from lohp_peft.cards.trajectories import trajectory_card, trajectory_card_of

__all__ = [
    "CARD_OF",
    "adapter_card",
    "adapter_card_of",
    "is_hub_id",
    "is_ours",
    "policy_card",
    "policy_card_of",
    "public_base_model",
    "public_config",
    "trajectory_card",
    "trajectory_card_of",
    "write_card",
]

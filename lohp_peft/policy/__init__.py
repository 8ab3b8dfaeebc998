"""The learned policy: configuration, networks, rollouts and the reference set it ships with."""

from lohp_peft.policy.config import LoHpPolicyConfig
from lohp_peft.policy.modeling import LoHpPolicy
from lohp_peft.policy.reference_set import ReferenceSet
from lohp_peft.policy.rollout import rollout

__all__ = ["LoHpPolicy", "LoHpPolicyConfig", "ReferenceSet", "rollout"]

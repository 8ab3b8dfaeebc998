"""Stage 2: learn the policy from recorded trajectories."""

from lohp_peft.policy_learning.config import PolicyLearningConfig
from lohp_peft.policy_learning.recordings import Recordings
from lohp_peft.policy_learning.replay_buffer import ReplayBuffer
from lohp_peft.policy_learning.train import TrainingPlan, build_policy, plan_training, train_policy
from lohp_peft.policy_learning.trainer import LoHpTrainer

__all__ = [
    "LoHpTrainer",
    "PolicyLearningConfig",
    "Recordings",
    "ReplayBuffer",
    "TrainingPlan",
    "build_policy",
    "plan_training",
    "train_policy",
]

"""Lo-Hp: a learned optimization policy that generates LoRA adapters. Importing registers the method with PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lohp_peft.config import LoHpConfig
from lohp_peft.model import LoHpModel, initialize_lohp_weights, to_plain_lora
from lohp_peft.registration import register

if TYPE_CHECKING:
    from lohp_peft.adapters import AdapterLayout, CoreSpace, LoraBSpace
    from lohp_peft.adapters.uniform import save_uniform_lora
    from lohp_peft.baselines import AdamWBaseline
    from lohp_peft.evaluation import EvaluationConfig, evaluate_tasks
    from lohp_peft.generated import GeneratedAdapter, GenerationReport
    from lohp_peft.generation import GenerationConfig, generate_adapter, generate_adapters
    from lohp_peft.objectives import sub_trajectory_balance_loss
    from lohp_peft.policy import LoHpPolicy, LoHpPolicyConfig
    from lohp_peft.policy_learning import PolicyLearningConfig, train_policy
    from lohp_peft.tasks import Examples, Task
    from lohp_peft.trajectories import Trajectory, TrajectoryDataset
    from lohp_peft.trajectories.importing import import_checkpoints
    from lohp_peft.weight_preparation import (
        TrajectoryRecorder,
        WeightPreparationConfig,
        gradient_space,
        prepare_trajectories,
    )

__version__ = "0.1.0"

# Where the rest of the public interface lies; read when it is first used, so that registering stays quick.
_LAZY = {
    "AdamWBaseline": "baselines",
    "AdapterLayout": "adapters",
    "CoreSpace": "adapters",
    "EvaluationConfig": "evaluation",
    "Examples": "tasks",
    "GeneratedAdapter": "generated",
    "GenerationConfig": "generation",
    "GenerationReport": "generated",
    "LoHpPolicy": "policy",
    "LoHpPolicyConfig": "policy",
    "LoraBSpace": "adapters",
    "PolicyLearningConfig": "policy_learning",
    "Task": "tasks",
    "Trajectory": "trajectories",
    "TrajectoryDataset": "trajectories",
    "TrajectoryRecorder": "weight_preparation",
    "WeightPreparationConfig": "weight_preparation",
    "evaluate_tasks": "evaluation",
    "generate_adapter": "generation",
    "generate_adapters": "generation",
    "gradient_space": "weight_preparation",
    "import_checkpoints": "trajectories.importing",
    "prepare_trajectories": "weight_preparation",
    "save_uniform_lora": "adapters.uniform",
    "sub_trajectory_balance_loss": "objectives",
    "train_policy": "policy_learning",
}

__all__ = [
    "AdamWBaseline",
    "AdapterLayout",
    "CoreSpace",
    "EvaluationConfig",
    "Examples",
    "GeneratedAdapter",
    "GenerationConfig",
    "GenerationReport",
    "LoHpConfig",
    "LoHpModel",
    "LoHpPolicy",
    "LoHpPolicyConfig",
    "LoraBSpace",
    "PolicyLearningConfig",
    "Task",
    "Trajectory",
    "TrajectoryDataset",
    "TrajectoryRecorder",
    "WeightPreparationConfig",
    "evaluate_tasks",
    "generate_adapter",
    "generate_adapters",
    "gradient_space",
    "import_checkpoints",
    "initialize_lohp_weights",
    "prepare_trajectories",
    "save_uniform_lora",
    "sub_trajectory_balance_loss",
    "to_plain_lora",
    "train_policy",
]

register(LoHpConfig, LoHpModel)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

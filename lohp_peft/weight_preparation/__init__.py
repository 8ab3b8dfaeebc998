"""Stage 1: record how offline optimizers solve tasks. Stage 2 never needs anything from here but the recordings."""

from lohp_peft.weight_preparation.bases import first_gradients, gradient_space
from lohp_peft.weight_preparation.checkpoints import CheckpointRun, checkpoint_space, find_runs
from lohp_peft.weight_preparation.config import WeightPreparationConfig
from lohp_peft.weight_preparation.importing import MIN_ENERGY, MIN_GAIN, ImportReport, import_runs, report_table
from lohp_peft.weight_preparation.optimizers import OFFLINE_OPTIMIZERS, OfflineOptimizer, build_optimizer
from lohp_peft.weight_preparation.plan import PreparationPlan, plan_preparation
from lohp_peft.weight_preparation.preparation import prepare_trajectories, record_run
from lohp_peft.weight_preparation.recorder import RecordingReport, TrajectoryRecorder
from lohp_peft.weight_preparation.scoring import query_loss, score_trajectory

__all__ = [
    "MIN_ENERGY",
    "MIN_GAIN",
    "OFFLINE_OPTIMIZERS",
    "CheckpointRun",
    "ImportReport",
    "OfflineOptimizer",
    "PreparationPlan",
    "RecordingReport",
    "TrajectoryRecorder",
    "WeightPreparationConfig",
    "build_optimizer",
    "checkpoint_space",
    "find_runs",
    "first_gradients",
    "gradient_space",
    "import_runs",
    "plan_preparation",
    "prepare_trajectories",
    "query_loss",
    "record_run",
    "report_table",
    "score_trajectory",
]

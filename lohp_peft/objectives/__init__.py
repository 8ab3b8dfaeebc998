"""Objectives: equations on tensors. They know no model, no task and no file."""

from lohp_peft.objectives.diagnostics import effective_sample_size, end_to_end_residuals
from lohp_peft.objectives.gaussian import behaviour_cloning_loss, gaussian_log_prob, gaussian_log_ratio
from lohp_peft.objectives.hybrid import SOURCES, Segments, hybrid_loss, schedule_fractions
from lohp_peft.objectives.references import BackwardReference
from lohp_peft.objectives.subtb import (
    forward_looking_log_flow,
    sub_trajectory_balance_loss,
    sub_trajectory_potentials,
)
from lohp_peft.objectives.temperature import calibrate_path_temperature, calibrate_temperature

__all__ = [
    "SOURCES",
    "BackwardReference",
    "Segments",
    "behaviour_cloning_loss",
    "calibrate_path_temperature",
    "calibrate_temperature",
    "effective_sample_size",
    "end_to_end_residuals",
    "forward_looking_log_flow",
    "gaussian_log_prob",
    "gaussian_log_ratio",
    "hybrid_loss",
    "schedule_fractions",
    "sub_trajectory_balance_loss",
    "sub_trajectory_potentials",
]

"""What is being adapted to: tasks, support sets, forward features and closed-form heads."""

from lohp_peft.tasks.bank import TaskBank
from lohp_peft.tasks.encoder import EncodedTexts, TextEncoder
from lohp_peft.tasks.features import TaskFeatures, TextStatistics, fit_reference, task_features
from lohp_peft.tasks.fingerprint import (
    reading_fingerprint,
    rows_at_hand,
    rows_fingerprint,
    task_fingerprint,
    tokenizer_fingerprint,
    tokenizer_problems,
)
from lohp_peft.tasks.gradient_steps import VerifiedSteps, leave_one_out_steps, verified_steps
from lohp_peft.tasks.heads import HEADS, Head, calibrated_cross_entropy, leave_one_out_loss, solve_head
from lohp_peft.tasks.task import Examples, Task, balanced_rows, draw
from lohp_peft.tasks.variants import Episode, EpisodeSampler, contrast_groups, contrast_task

__all__ = [
    "HEADS",
    "EncodedTexts",
    "Episode",
    "EpisodeSampler",
    "Examples",
    "Head",
    "Task",
    "TaskBank",
    "TaskFeatures",
    "TextEncoder",
    "TextStatistics",
    "VerifiedSteps",
    "balanced_rows",
    "calibrated_cross_entropy",
    "contrast_groups",
    "contrast_task",
    "draw",
    "fit_reference",
    "leave_one_out_loss",
    "leave_one_out_steps",
    "reading_fingerprint",
    "rows_at_hand",
    "rows_fingerprint",
    "solve_head",
    "task_features",
    "task_fingerprint",
    "tokenizer_fingerprint",
    "tokenizer_problems",
    "verified_steps",
]

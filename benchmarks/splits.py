"""Which tasks of the text suite train, validate and test, by question; see `SPLITS`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from text_suite import (
    CONTRAST_TRAINING,
    CONTRAST_VALIDATION,
    TEST,
    VALIDATION,
    contrast_tasks,
    data_folder,
    load_tasks,
)

from lohp_peft.tasks import Task

Groups = tuple[tuple[str, ...], ...]

NEW_DOMAINS = (
    "cr amazon_electronics amazon_kitchen_housewares amazon_dvd stance_climate sarcasm_twitter banking77 snips "
    "hint3_sofmattress"
).split()
"""Test tasks of kinds that are trained, on domains that are not: sentiment, stance, sarcasm with one set of labels, intents.

Named after these tasks had been scored, for a table; nothing was chosen on it.
"""

TRANSFER_FOLDS = (
    ("sentiment", "sentiment3", "sentiment5", "subjectivity", "aspect sentiment"),
    ("intent", "question type", "inference", "paraphrase", "answer selection"),
    ("topic", "relation", "style", "spam"),
    ("toxicity", "irony", "sarcasm", "emotion", "emoji"),
    ("stance", "veracity", "acceptability"),
)
"""Families that have no training task in a fold; kinds that resemble each other are left out together."""
TESTS_PER_FAMILY = 3


@dataclass(frozen=True)
class Split:
    """Names of tasks; the groups are pooled into conflicting labelings of the same texts."""

    training: tuple[str, ...]
    training_groups: Groups
    validation: tuple[str, ...]
    validation_groups: Groups
    test: tuple[str, ...]

    def training_tasks(self) -> list[Task]:
        """All training tasks, conflicting labelings included."""
        return load_tasks(self.training) + contrast_tasks(self.training_groups)

    def validation_tasks(self) -> list[Task]:
        """All validation tasks, conflicting labelings included."""
        return load_tasks(self.validation) + contrast_tasks(self.validation_groups)


def families() -> dict[str, str]:
    """The family of every task of the suite."""
    return {name: entry["family"] for name, entry in json.loads((data_folder() / "tasks.json").read_text()).items()}


def overlap_groups() -> tuple[frozenset[str], ...]:
    """Tasks that share texts."""
    groups = json.loads((data_folder() / "suites.json").read_text())["overlap_groups"]
    return tuple(map(frozenset, groups.values()))


def split_of(name: str) -> Split:
    """The split of that name in `SPLITS`."""
    if name.startswith("transfer_"):
        return transfer(TRANSFER_FOLDS[int(name.removeprefix("transfer_"))])
    training = tuple(task for task in families() if task not in {*TEST, *VALIDATION})
    split = Split(
        training,
        CONTRAST_TRAINING,
        tuple(VALIDATION),
        (CONTRAST_VALIDATION,),
        tuple(VALIDATION if name == "validation" else TEST),
    )
    divided = [sorted(group) for group in overlap_groups() if group & set(training) and group - set(training)]
    if divided:
        raise SystemExit(f"These tasks share texts and are split between training and held-out tasks: {divided}.")
    return split


def transfer(left_out: Sequence[str]) -> Split:
    """Training and validation tasks of the other families, and test tasks of the families left out.

    The few-shot suite's test tasks are never trained on here either. Of every family up to `TESTS_PER_FAMILY` tasks test:
    its test tasks in that suite, then its training tasks, then those that validate there.
    """
    whole, of = split_of("test"), families()
    test: list[str] = []
    for family in left_out:
        members = [task for task in (*TEST, *whole.training, *VALIDATION) if of.get(task) == family]
        test += members[:TESTS_PER_FAMILY]
    shared = {task for group in overlap_groups() if group & set(test) for task in group}

    def kept(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if of[name] not in left_out and name not in shared)

    training, validation = kept(whole.training), kept(whole.validation)
    return Split(
        training,
        tuple(group for group in whole.training_groups if set(group) <= set(training)),
        validation,
        tuple(group for group in whole.validation_groups if set(group) <= set(validation)),
        tuple(test),
    )


SPLITS = ("test", "validation", *(f"transfer_{fold}" for fold in range(len(TRANSFER_FOLDS))))
"""`test` are the held-out tasks of the few-shot suite, `validation` those that settings are chosen on, `transfer_K` test
tasks of families that have no training task, with a policy of their own."""

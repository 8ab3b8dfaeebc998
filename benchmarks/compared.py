"""Tables of the comparison with the field: held-out tasks, new domains of known families, new families."""

from collections.abc import Mapping
from typing import Any

from rendering import interval, percent, table, where

OURS = ("ours", "ours_steps")


def _title(name: str) -> str:
    return name.replace("_", " ").replace(" | ", ", control: ")


def compare(result: Mapping[str, Any]) -> str:
    """The field beside ours, one table for each number of examples; new domains of known families apart."""
    settings, parts = result["settings"], []
    for question, found in (("", result["shots"]), ("new domains, ", result["new_domains"])):
        for shots, methods in found.items():
            rows = [
                (
                    _title(name),
                    percent(row["accuracy"]),
                    percent(row["macro_f1"]),
                    *(interval(row.get(f"{ours}_minus_it")) for ours in OURS),
                    f"{row['seconds']:.2f}",
                )
                for name, row in methods.items()
                if not (question and "|" in name)
            ]
            header = (f"{question}{shots} examples per class", "accuracy, %", "macro F1, %")
            header += ("ours minus it [95 %]", "ours steps minus it [95 %]", "seconds")
            parts.append(table(header, rows))
    trained = ", ".join(f"{_title(name)} {cost['minutes']:.0f} min" for name, cost in result["trained"].items())
    budget = settings["budget"]
    texts = "all" if settings["max_test"] is None else f"at most {settings['max_test']}"
    note = (
        f"{len(result['tasks'])} {'held-out' if settings['split'] == 'test' else settings['split']} tasks, {settings['draws']} draws, "
        f"{texts} test texts. "
        f"Trained methods: {budget['steps']} steps of {budget['batch_size']} episodes through the base model ({trained}). Seconds are "
        f"for choosing adapter and head once the examples' features are there, and rough: other jobs ran beside. {where(result)}"
    )
    return "\n\n".join([*parts, note])


def transfer(result: Mapping[str, Any]) -> str:
    """Families that no training task belongs to: accuracies, and ours minus the three baselines."""
    methods = list(result["all"]["methods"])
    rows = []
    for title, row in (("all", result["all"]), *result["families"].items()):
        accuracies = [percent(row["methods"][method]["accuracy"]) for method in methods]
        differences = [interval(row["differences"][f"ours - {other}"]) for other in ("none", "mean", "multi_task")]
        rows.append((title, str(row["tasks"]), *accuracies, *differences))
    header = ("family left out", "tasks", *map(_title, methods), "ours - none", "ours - mean", "ours - multi task")
    settings = result["settings"]
    minutes = [sum(fold["minutes"].values()) for fold in result["folds"]]
    note = (
        f"Accuracy in percent, {settings['shots']} examples per class, {settings['draws']} draws, at most {settings['max_test']} test texts; "
        "intervals over tasks, of a family with fewer than five tasks over its draws. Each of the "
        f"{len(minutes)} folds of families has bases, recordings ({', '.join(settings['optimizers'])}), a policy ({settings['cloning_steps']} cloning and "
        f"{settings['training_steps']} hybrid steps of {settings['episodes']} episodes) and a multi-task adapter of its own, trained on one core in "
        f"{min(minutes):.0f} to {max(minutes):.0f} minutes. {where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"

"""Numbers and tables as the READMEs show them."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

Result = Mapping[str, Any]

NAMES = {
    "none": "no adapter",
    "mean_adapter": "mean of the training adapters",
    "nearest_adapter": "nearest training task's adapter",
    "generated": "**generated**",
    "generated_raw": "generated, raw rollout",
    "wrong_task": "control: raw, conditioned on the wrong task",
    "shuffled_labels": "control: raw, labels shuffled",
    "adamw": "AdamW on the same examples",
    "ours": "**generated, raw rollout**",
    "ours_swapped": "control: conditioned on the other labeling",
    "mean": "mean of the training adapters",
    "multi_task": "multi-task adapter, of all training tasks",
    "floor": "one adapter trained on both labelings of this kind",
    "specialist": "specialist for this labeling",
    "wrong_specialist": "specialist for the other labeling",
}
CONTRASTS = {
    "ours_minus_floor": "generated minus one adapter for both, points",
    "ours_minus_multi_task": "generated minus the multi-task adapter, points",
    "share_of_the_way": "generated: share of the way from that adapter to the specialist, %",
    "ours_minus_swapped": "generated minus the other labeling's, points",
    "specialist_minus_wrong": "specialist minus the other labeling's, points",
}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def with_error(row: Mapping[str, Any]) -> str:
    error = row.get("standard_error")
    return percent(row["accuracy"]) + ("" if error is None else f" +- {100 * error:.1f}")


def where(result: Mapping[str, Any]) -> str:
    """Date, machine and commit in a few words."""
    found = result["environment"]
    name, *changes = (found["commit"] or "").split("+")
    commit = f", commit {'+'.join((name[:10], *changes))}" if name else ""
    return f"{found['date']}, {found['cores']} {found['device'].upper()} cores, torch {found['versions']['torch']}{commit}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *rows))


def interval(difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in points; empty where there is none."""
    if difference is None:
        return ""
    return f"{signed(difference['mean'])} [{signed(difference['low'])}, {signed(difference['high'])}]"


def over_families(difference: Mapping[str, Any] | None) -> str:
    """The interval when families of tasks are resampled; empty where there is none."""
    if not difference or "families" not in difference:
        return ""
    return f"[{', '.join(map(signed, difference['families']))}]"


def by_task(compared: Result, method: str) -> dict[str, float]:
    """Accuracy by task at 16 examples a class, mean over training seeds."""
    found = {key: key.split("/") for key in next(iter(compared["tasks"].values()))}
    keys = [k for k, (name, _, shots, control) in found.items() if (name, shots, control) == (method, "16", "")]
    return {name: fmean(cells[key]["accuracy"] for key in keys) for name, cells in compared["tasks"].items()}


def with_specialists(compared: Result) -> dict[str, float]:
    """Accuracy by task of the family specialists, and of the multi-task adapter where a family has none."""
    none, multi_task, specialists = (by_task(compared, name) for name in ("none", "multi_task", "family_specialists"))
    return {name: multi_task[name] if found == none[name] else found for name, found in specialists.items()}


def ratio_as_scored(latency: Result) -> float:
    """AdamW's time over generation's, median task, with AdamW in bfloat16 as its accuracies are."""
    return median(row["adamw_bf16"] / row["generated"] for row in latency["rows"] if row["by"] == "shots")

"""What the labelings of `contrast.py` say: means over training seeds, differences with their errors, shares of the way."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from setting import mean_of_seeds

POINT = 0.01
"""Specialists are told apart, and shares of a distance taken, from here."""
DIFFERENCES = {
    "ours_minus_floor": ("ours", "floor"),
    "ours_minus_multi_task": ("ours", "multi_task"),
    "ours_minus_swapped": ("ours", "ours_swapped"),
    "specialist_minus_wrong": ("specialist", "wrong_specialist"),
}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over draws."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def differences(accuracy: Mapping[str, float]) -> dict[str, float]:
    """What the methods' accuracies say of ours and of the specialists; those of methods that were scored."""
    return {key: accuracy[a] - accuracy[b] for key, (a, b) in DIFFERENCES.items() if {a, b} <= set(accuracy)}


def paired_errors(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Standard errors of the differences, over draws."""
    draws = [
        dict(zip(methods, row, strict=True)) for row in zip(*(m["per_draw"] for m in methods.values()), strict=True)
    ]
    each = [differences(accuracy) for accuracy in draws]
    return {key: standard_error([one[key] for one in each]) for key in each[0]}


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One pair of several training seeds: every method's mean over those it has, and over draws of these means its error."""

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = mean_of_seeds(rows)
        return {**found, "standard_error": standard_error(found["per_draw"])}

    labelings = {}
    for labeling in runs[0]["labelings"]:
        scored = [run["labelings"][labeling] for run in runs]
        methods = dict.fromkeys(method for rows in scored for method in rows)
        labelings[labeling] = {name: mean([rows[name] for rows in scored if name in rows]) for name in methods}
    of_seed = ("seed", "policy", "minutes", "threads", "environment", "trained")
    shared = {key: value for key, value in runs[0].items() if key not in of_seed}
    return {**shared, "runs": [{key: run[key] for key in of_seed} for run in runs], "labelings": labelings}


def summarise(pairs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The pairs with the differences of each labeling, and means over all labelings of methods that all pairs have.

    The share of the way from floor to specialist is given where it is a point or more; of all labelings, it is the sum of
    ours minus floor over the sum of specialist minus floor, over the labelings where that is above 0.
    """
    made, accuracies = {}, []
    for name, pair in pairs.items():
        derived = {}
        for labeling, methods in pair["labelings"].items():
            accuracy = {method: row["accuracy"] for method, row in methods.items()}
            accuracies.append(accuracy)
            found, way = differences(accuracy), accuracy["specialist"] - accuracy["floor"]
            derived[labeling] = {
                **found,
                "share_of_the_way": found["ours_minus_floor"] / way if way >= POINT else None,
                "standard_errors": paired_errors(methods),
            }
        made[name] = {**pair, "derived": derived}
    overall = {
        "labelings": len(accuracies),
        "specialists_differ": sum(differences(a)["specialist_minus_wrong"] >= POINT for a in accuracies),
        **over_labelings(accuracies),
        "of_seeds": [over_labelings(of_seed) for of_seed in accuracies_of_seeds(pairs)],
    }
    return {"pairs": made, "overall": overall}


def over_labelings(accuracies: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means of methods that all labelings have, their differences, and the share of the way of all labelings."""
    everywhere = [method for method in accuracies[0] if all(method in accuracy for accuracy in accuracies)]
    means = {method: fmean(accuracy[method] for accuracy in accuracies) for method in everywhere}
    ways = [(a["ours"] - a["floor"], a["specialist"] - a["floor"]) for a in accuracies if a["specialist"] > a["floor"]]
    way = sum(way for _, way in ways)
    return {
        "accuracy": means,
        **differences(means),
        "share_of_the_way": sum(gone for gone, _ in ways) / way if ways else None,
    }


def accuracies_of_seeds(pairs: Mapping[str, Mapping[str, Any]]) -> list[list[dict[str, float]]]:
    """By training seed the accuracies of all labelings; a method that was trained once is the same for all seeds."""
    labelings = [methods for pair in pairs.values() for methods in pair["labelings"].values()]
    number = min(len(methods["ours"]["accuracy_of_seeds"]) for methods in labelings)

    def of_seed(row: Mapping[str, Any], seed: int) -> float:
        each = row["accuracy_of_seeds"]
        return each[seed] if len(each) >= number else each[0]

    return [
        [{method: of_seed(row, seed) for method, row in methods.items()} for methods in labelings]
        for seed in range(number)
    ]

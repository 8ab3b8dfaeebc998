"""Tables of the comparison with the field: held-out tasks, new domains of known families, new families."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rendering import (
    CONTRASTS,
    NAMES,
    by_task,
    interval,
    over_families,
    percent,
    share,
    signed,
    table,
    where,
    with_error,
)
from setting import with_interval
from splits import NEW_DOMAINS, TRANSFER_FOLDS


def _title(name: str) -> str:
    return name.replace("_", " ").replace(" | ", ", control: ")


def _seeds(row: Mapping[str, Any]) -> str:
    """Lowest and highest mean of several training seeds, where there are several; fewer draws, where there are fewer."""
    if row["seeds"] == 1:
        return f" ({row['draws']} draw{'s' * (row['draws'] > 1)})" if "draws" in row else ""
    found = row["accuracy_of_seeds"]
    return f" ({row['seeds']} seeds: {percent(min(found))} to {percent(max(found))})"


HEADLINE = {
    "no adapter": ("none", "none", "none", "none"),
    "AdamW on the same examples": ("adamw_80", "adamw_80", None, None),
    "mean of the training adapters": ("mean", "mean", "mean", "mean"),
    "one multi-task adapter": ("multi_task", "multi_task", "multi_task", "multi_task"),
    "one multi-task adapter, and the same gradient steps as below": ("multi_task_steps",) * 3 + (None,),
    "**generated**": ("ours", "ours", "ours", "ours"),
    "**generated**, and four gradient steps where they help on unseen examples": (
        "ours_steps",
        "ours_steps",
        "ours_steps",
        None,
    ),
}
"""By title: its name in each column; none where it was not measured."""


def headline(compared: Mapping[str, Any], transferred: Mapping[str, Any], contrasted: Mapping[str, Any]) -> str:
    """The first thing a reader sees: what anybody could use, on all four questions."""
    overall = contrasted["overall"]
    parts = (compared["shots"]["16"], compared["new_domains"]["16"], transferred["all"]["methods"])
    columns = [{name: row["accuracy"] for name, row in part.items()} for part in parts] + [overall["accuracy"]]
    rows = [
        (title, *(percent(column[key]) if key else "" for column, key in zip(columns, keys, strict=True)))
        for title, keys in HEADLINE.items()
    ]
    header = (
        "accuracy, %",
        f"{len(compared['tasks'])} unseen tasks",
        f"{sum(name in NEW_DOMAINS for name in compared['tasks'])} of them: known kinds, new domains",
        f"{len(transferred['tasks'])} tasks of families left out",
        f"{overall['labelings'] // 2} sets of texts, each labelled in two ways",
    )
    return table(header, rows)


def _methods(title: str, methods: Mapping[str, Any]) -> str:
    """One row a method."""
    of_families = any("families" in row.get("ours_minus_it", {}) for row in methods.values())
    rows = [
        (
            _title(name) + _seeds(row),
            percent(row["accuracy"]),
            percent(row["macro_f1"]),
            interval(row.get("ours_minus_it")),
            *([over_families(row.get("ours_minus_it"))] if of_families else []),
            interval(row.get("ours_steps_minus_it")),
            "" if row["seconds"] is None else f"{row['seconds']:.2f}",
        )
        for name, row in methods.items()
    ]
    header = [title, "accuracy, %", "macro F1, %", "ours minus it [95 %]", "ours steps minus it [95 %]", "seconds"]
    if of_families:
        header.insert(4, "[95 %, families resampled]")
    return table(header, rows)


def _by_shots(result: Mapping[str, Any]) -> str:
    """What more examples give, and how far that is on the way from no adapter to training on all rows of the task."""
    shots = result["shots"]
    ceiling = shots["16"].get("adamw_full_data", {}).get("accuracy")
    header = ["accuracy, %", *(f"{number} examples per class" for number in shots)]
    if ceiling is not None:
        header += [f"at {number}: of the way to AdamW on all rows, %" for number in shots]
    rows = []
    for name in (name for name in shots["16"] if all(name in found for found in shots.values())):
        found, start = ([methods[key]["accuracy"] for methods in shots.values()] for key in (name, "none"))
        rows.append([_title(name), *map(percent, found)])
        if ceiling is not None:
            rows[-1] += [percent((a - none) / (ceiling - none)) for a, none in zip(found, start, strict=True)]
    return table(header, rows)


def _costs(trained: Mapping[str, Any]) -> list[str]:
    """By method the minutes of its training, the mean over its training seeds."""
    minutes: dict[str, list[float]] = {}
    for name, cost in trained.items():
        minutes.setdefault(name.rsplit("-", 1)[0], []).append(cost["minutes"])
    return [f"{_title(name)} {fmean(each):.0f} min" for name, each in minutes.items()]


def compare_more(result: Mapping[str, Any]) -> str:
    """Other numbers of examples, and new domains of known families."""
    parts = [_by_shots(result)] if "16" in result["shots"] and len(result["shots"]) > 1 else []
    parts += [
        _methods(f"{shots} examples per class", found) for shots, found in result["shots"].items() if shots != "16"
    ]
    for shots, methods in result["new_domains"].items():
        found = {name: row for name, row in methods.items() if "|" not in name}  # without controls
        parts.append(_methods(f"new domains, {shots} examples per class", found))
    return "\n\n".join(parts)


KINDS = ("none", "mean", "multi_task", "adamw_80", "adamw_full_data", "ours", "ours_steps")


def compare_kinds(result: Mapping[str, Any], few_shot: Mapping[str, Any]) -> str:
    """Means by family of tasks, most tasks first, and over all but the first family; the families are those of few_shot."""
    families: dict[str, list[str]] = {}
    for name in result["tasks"]:
        families.setdefault(few_shot["tasks"][name]["family"], []).append(name)
    ordered = dict(sorted(families.items(), key=lambda item: -len(item[1])))
    first = next(iter(ordered))
    ordered[f"all but {first}"] = [name for name in result["tasks"] if name not in ordered[first]]

    found = {method: by_task(result, method) for method in KINDS}
    rows = []
    for family, names in ordered.items():
        each = {method: [found[method][name] for name in names] for method in KINDS}
        less = [a - b for a, b in zip(each["ours"], each["adamw_80"], strict=True)]
        shown = interval(with_interval(less)) if len(names) > 3 else signed(fmean(less))
        rows.append((family, str(len(names)), *(percent(fmean(x)) for x in each.values()), shown))
    return table(("family", "tasks", *map(_title, KINDS), "ours minus adamw 80 [95 %]"), rows)


def compare_brief(result: Mapping[str, Any]) -> str:
    """The field beside ours, without the controls of other methods than ours."""
    found = result["shots"]["16"]
    shown = {name: row for name, row in found.items() if "|" not in name or name.startswith("ours")}
    return compare({**result, "shots": {"16": shown}})


def compare(result: Mapping[str, Any]) -> str:
    """The field beside ours."""
    settings = result["settings"]
    costs = ", ".join(_costs(result["trained"]))
    budget = settings["budget"]
    trained = f"Trained methods: {budget['steps']} steps of {budget['batch_size']} episodes through the base model, those that learn from recordings none of these, but 3,000 steps of 16 runs ({costs}). "
    texts = "all" if settings["max_test"] is None else f"at most {settings['max_test']}"
    note = (
        f"{len(result['tasks'])} {'held-out' if settings['split'] == 'test' else settings['split']} tasks, {settings['draws']} draws, "
        f"{texts} test texts. {trained if costs else ''}Seconds are for adapter and head; ours, AdamW and SetFit also read the "
        f"examples in them, which the others had done before. They are rough: other jobs ran beside. {where(result)}"
    )
    return "\n\n".join((_methods("16 examples per class", result["shots"]["16"]), note))


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
    seeds = {
        _title(name): row["accuracy_of_seeds"] for name, row in result["all"]["methods"].items() if name in OF_STAGE_2
    }
    of_seeds = f"By training seed, with the same recordings: {_by_seed(seeds)}. " if len(settings["seeds"]) > 1 else ""
    note = (
        f"Accuracy in percent, {settings['shots']} examples per class, {settings['draws']} draws, at most {settings['max_test']} test texts; "
        "intervals over tasks, of a family with fewer than five tasks over its draws. Each of the "
        f"{len(TRANSFER_FOLDS)} folds of families has bases, recordings ({', '.join(settings['optimizers'])}), a policy ({settings['cloning_steps']} cloning and "
        f"{settings['training_steps']} hybrid steps of {settings['episodes']} episodes) and a multi-task adapter of its own, trained on one core in "
        f"{min(minutes):.0f} to {max(minutes):.0f} minutes. {of_seeds}{where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


OF_STAGE_2 = ("multi_task", "multi_task_steps", "ours_raw", "ours", "ours_steps")
"""What differs between training seeds of `transfer`."""
OF_SEEDS = {
    "ours": "generated",
    "ours_swapped": "conditioned on the other labeling",
    "floor": "one adapter for both",
    "specialist": "specialists",
    "multi_task": "multi-task adapter",
}


def _by_seed(methods: Mapping[str, Sequence[float]]) -> str:
    """Methods with their accuracies of each training seed."""
    return "; ".join(f"{title} {', '.join(map(percent, each))}" for title, each in methods.items())


def _derived(column: Mapping[str, Any], key: str) -> str:
    """A share, or a difference with its standard error over draws."""
    if key == "share_of_the_way":
        return share(column[key])
    error = column.get("standard_errors", {}).get(key)
    return signed(column[key]) + ("" if error is None else f" +- {100 * error:.1f}")


def contrast(result: Mapping[str, Any]) -> str:
    """Every pair under both labelings, with what follows from it, and all of them together."""
    settings, overall = result["settings"], result["overall"]
    columns = [(name, labeling) for name, pair in result["pairs"].items() for labeling in pair["labelings"]]
    scored = [result["pairs"][name]["labelings"][labeling] for name, labeling in columns]
    derived = [*(result["pairs"][name]["derived"][labeling] for name, labeling in columns), overall]
    rows = [
        (NAMES[method], *(with_error(column[method]) for column in scored), percent(overall["accuracy"][method]))
        for method in NAMES
        if method in overall["accuracy"]
    ]
    rows += [
        (title, *(_derived(column, key) for column in derived)) for key, title in CONTRASTS.items() if key in overall
    ]
    of_seeds = [seed["accuracy"] for seed in overall["of_seeds"]]
    seeds = {
        title: [seed[name] for seed in of_seeds] for name, title in OF_SEEDS.items() if name in overall["accuracy"]
    }
    notes = [
        f"{settings['shots']} examples per class, {settings['draws']} draws (+- standard error of their mean); domains and classes count "
        f"alike. Specialists differ by a point or more on {overall['specialists_differ']} of {overall['labelings']} labelings.",
        f"By training seed of what is trained, over all labelings: {_by_seed(seeds)}; share of the way "
        f"{', '.join(share(seed['share_of_the_way']) for seed in overall['of_seeds'])} %.",
    ]
    notes += [
        f"{name}: {', '.join(pair['domains'])}, {pair['test_texts']} test texts, at least "
        f"{pair['fewest_test_texts_of_domain_and_class']} of each domain and class. "
        + " ".join(f"Seed {run['seed']}: {where(run)}" for run in pair["runs"])
        for name, pair in result["pairs"].items()
    ]
    header = ("accuracy, %", *(f"{name}, by {labeling}" for name, labeling in columns), "all")
    return "\n\n".join((table(header, rows), "\n".join(f"* {note}" for note in notes)))

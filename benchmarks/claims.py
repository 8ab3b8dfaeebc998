"""What the README says in prose with numbers from results, beside its tables: `tables.py --check` looks for every phrase.

Where a new result makes one untrue the sentence is rewritten by hand, as a number may have changed sides.
"""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from rendering import percent, share, signed

Result = Mapping[str, Any]
WORDS = "no one two three four five six seven eight nine ten".split()


def by_task(compared: Result, method: str, seed: str | None = None) -> dict[str, float]:
    """Accuracy by task at 16 examples a class, mean over training seeds or of one."""
    found = {key: key.split("/") for key in next(iter(compared["tasks"].values()))}
    keys = [
        key
        for key, (name, of, shots, control) in found.items()
        if (name, shots, control) == (method, "16", "") and seed in (None, of)
    ]
    return {name: fmean(cells[key]["accuracy"] for key in keys) for name, cells in compared["tasks"].items()}


def _mean(accuracies: Mapping[str, float], names: Iterable[str]) -> str:
    return percent(fmean(accuracies[name] for name in names))


def _ends(difference: Result) -> str:
    return f"{percent(difference['low'])} to {percent(difference['high'])}"


def _range(values: Iterable[float], digits: int = 0) -> str:
    values = list(values)
    return f"{100 * min(values):.{digits}f} to {100 * max(values):.{digits}f}"


def comparison(compare: Result, few_shot: Result) -> list[str]:
    """The field on the same tasks."""
    shots = compare["shots"]["16"]
    accuracy = {name: percent(row["accuracy"]) for name, row in shots.items()}
    minus = {name: row.get("ours_minus_it") for name, row in shots.items()}
    methods = ("none", "multi_task", "multi_task_steps", "adamw_80", "family_specialists", "adamw_full_data")
    of = {name: by_task(compare, name) for name in ("ours", "ours_steps", *methods)}
    reviews = [name for name, task in few_shot["tasks"].items() if task["family"] == "sentiment"]
    new_kinds = ("trec", "trec_fine", "stackoverflow20")
    recorded = [shots[name]["accuracy"] for name in ("local_denoising", "drag_and_drop", "text_to_lora_recon")]
    oracle = {
        name: of["multi_task"][name] if of["family_specialists"][name] == none else of["family_specialists"][name]
        for name, none in of["none"].items()
    }
    above = sum(of["ours"][name] > accuracy for name, accuracy in of["adamw_full_data"].items())
    start = by_task(compare, "ours", "0")  # what the steps were taken from
    gains = {name: of["ours_steps"][name] - start[name] for name in new_kinds}
    questions = ("trec", "trec_fine")
    behind = fmean(of["adamw_80"][name] - of["ours"][name] for name in questions)
    lost = shots["ours_raw"]["accuracy"] - shots["ours_raw | wrong_task"]["accuracy"]
    shuffled = shots["ours_raw"]["accuracy"] - shots["ours_raw | shuffled_labels"]["accuracy"]
    return [
        f"level with it ({signed(minus['multi_task']['mean'])}, 95 % interval {_ends(minus['multi_task'])}, better on "
        f"{minus['multi_task']['tasks_better']} of {len(of['ours'])} tasks)",
        f"(generated {signed(minus['mean']['mean'])}, {_ends(minus['mean'])} over tasks, "
        f"{' to '.join(map(percent, minus['mean']['families']))} when families of tasks are resampled)",
        f"hardly are ({_range(recorded, 1)}, ",
        f"sampled adapters {accuracy['weight_diffusion']} and {accuracy['weight_diffusion_conditional']})",
        f"{_mean(of['ours'], reviews)} % on four unseen domains of reviews, where AdamW reaches "
        f"{_mean(of['adamw_80'], reviews)}.",
        f"give {_range(gains.values())} points on question types and the fine topics of stackoverflow20; the multi-task adapter "
        f"gains by the same steps, to {accuracy['multi_task_steps']}.",
        f"Told the wrong task, generated adapters lose {percent(lost)} points",
        f"(with the multi-task adapter there, the mean would be {_mean(oracle, oracle)})",
        f"on {WORDS[above]} tasks generated adapters are above it",
        f"shuffling the labels between the examples costs it {percent(shuffled)} points there",
        f"AdamW on the same examples is about {100 * behind:.0f} points better; four confirmed gradient steps get back "
        f"{_range(gains[name] for name in questions)} points there and {100 * gains['stackoverflow20']:.0f} on stackoverflow20",
        f"level with generated ones on the wide suite ({accuracy['multi_task']} against {accuracy['ours']})",
    ]


def transfer(transfer: Result) -> list[str]:
    """Families left out of training."""
    minus, methods = transfer["all"]["differences"], transfer["all"]["methods"]
    none, mean, multi_task = (minus[f"ours - {other}"] for other in ("none", "mean", "multi_task"))
    levels = {percent(methods[name]["accuracy"]) for name in ("multi_task", "ours_raw")}
    return [
        f"for families left out of training the {percent(multi_task['mean'])} above it ({_ends(multi_task)})",
        f"generated adapters are {percent(none['mean'])} points above no adapter ({_ends(none)}) and "
        f"{percent(mean['mean'])} above the mean adapter ({_ends(mean)})",
        f"but for the choice to abstain, on families left out ({' and '.join(sorted(levels))} both)",
    ]


def contrast(contrast: Result) -> list[str]:
    """The same texts under two labelings."""
    derived = {name: list(pair["derived"].values()) for name, pair in contrast["pairs"].items()}
    swapped = " and ".join(share(row["ours_minus_swapped"]) for row in derived["sentiment"])
    accuracy = contrast["overall"]["accuracy"]
    others = [row["specialist_minus_wrong"] for name in ("stance", "sarcasm") for row in derived[name]]
    return [
        f"told the other labeling of the same reviews, {swapped}.",
        f"the other labeling costs {swapped} points",
        f"they differ by {_range(others, 1)} points only",
        f"on the contrast suite ({percent(accuracy['multi_task'])} against {percent(accuracy['ours'])})",
    ]


def latency(latency: Result, latency_10: Result, latency_30: Result, compare: Result) -> list[str]:
    """Time to an adapter."""
    of_80, of_10, of_30 = (f"{x['ratio_of_the_median_task']:.0f}" for x in (latency, latency_10, latency_30))
    accuracy = {steps: percent(compare["shots"]["16"][f"adamw_{steps}"]["accuracy"]) for steps in (10, 30)}
    tasks = {row["task"]: row for row in latency["rows"] if row["by"] == "shots"}
    long, many = tasks["ag_news"], tasks["banking77"]
    return [
        f"generation took {of_30} times less time than AdamW's first 30 steps, which are as accurate ({accuracy[30]}), {of_80} "
        f"times less than the 80 that validation tasks chose, and {of_10} times less than 10 ({accuracy[10]})",
        f"with {long['texts']} long texts generation took {long['generated']:.1f} s ({long['generated_bf16']:.1f} s with "
        f'`mixed_precision="bf16"`), with {many["texts"]:,} texts of {many["classes"]} classes {many["generated"]:.1f} s, and '
        f"there only {many['ratio']:.0f} times less than 80 steps of AdamW",
    ]


def ablations(ablations: Result) -> list[str]:
    """Parts of policy learning."""
    loss = {name: row["loss"] for name, row in ablations["variants"].items()}
    return [
        f"behaviour cloning alone validates better ({loss['behaviour_cloning']:.3f} nats) than cloning and hybrid-policy "
        f"sub-trajectory balance ({loss['lohp']:.3f})"
    ]


CLAIMS = (
    (comparison, ("compare", "few_shot")),
    (transfer, ("transfer",)),
    (contrast, ("contrast",)),
    (latency, ("latency", "latency_10", "latency_30", "compare")),
    (ablations, ("ablations",)),
)
"""What tells the phrases, and the results it needs."""


def missing(text: str, results: Mapping[str, Result]) -> list[str]:
    """Phrases that a text should have and has not, of the results that there are."""
    told = [phrases(*(results[name] for name in names)) for phrases, names in CLAIMS if results.keys() >= set(names)]
    flowing = " ".join(text.split())
    return [phrase for phrases in told for phrase in phrases if phrase not in flowing]

"""What the benchmark was made to show, and whether it did: one table from all results."""

from collections.abc import Mapping
from typing import Any

from rendering import Result, by_task, interval, percent, ratio_as_scored, share, signed, table, with_specialists
from setting import with_interval

Row = tuple[str, str, bool]
"""A goal, what was measured, and whether it was met."""
WITH_GRADIENTS = ("adamw", "eva", "setfit", "none_steps", "multi_task_steps", "reptile_5")
"""How the names of rivals begin that take gradients for the task."""


def _ahead(where: str, methods: Mapping[str, Any]) -> Row:
    """Against the best rival that takes no gradient and is not told by an oracle which family the task is of."""
    rivals = {
        name: row
        for name, row in methods.items()
        if "|" not in name and not name.startswith((*WITH_GRADIENTS, "ours", "lohp", "family_specialists"))
    }
    best = max(rivals, key=lambda name: rivals[name]["accuracy"])
    difference = rivals[best]["ours_minus_it"]
    measured = f"{interval(difference)} over {best.replace('_', ' ')}, {percent(rivals[best]['accuracy'])}"
    return f"{where}: 2.0 above the best that takes no gradient for the task", measured, difference["mean"] >= 0.02


def _few_shot(compare: Result) -> list[Row]:
    methods = compare["shots"]["16"]
    adamw, ours = methods["adamw_80"]["ours_minus_it"], by_task(compare, "ours")
    less = with_interval([ours[name] - accuracy for name, accuracy in with_specialists(compare).items()])
    return [
        _ahead(f"{len(compare['tasks'])} unseen tasks", methods),
        _ahead("new domains of known families", compare["new_domains"]["16"]),
        ("level with AdamW on the same examples, interval above 0", interval(adamw), adamw["low"] > 0),
        (
            "level with an adapter for each family, named by an oracle, the multi-task one where there is none: interval reaches 0",
            interval(less),
            less["high"] >= 0,
        ),
    ]


def _transfer(result: Result) -> list[Row]:
    against = ("ours - none", "ours - mean")
    below = {
        f"{family} {name.removeprefix('ours ')}": difference
        for family, row in result["families"].items()
        for name, difference in row["differences"].items()
        if name in against and difference["high"] < 0
    }
    listed = ", ".join(f"{name} {signed(difference['mean'])}" for name, difference in below.items())
    average = [result["all"]["differences"][name] for name in against]
    return [
        ("families left out: none of them below no adapter or the mean", listed or "none below", not below),
        (
            "families left out: above no adapter and the mean on average",
            " and ".join(map(interval, average)),
            all(difference["low"] > 0 for difference in average),
        ),
    ]


def _uses_its_task(compare: Result, contrast: Result) -> list[Row]:
    overall = contrast["overall"]
    differ = [
        (f"{name} by {labeling}", row["ours_minus_swapped"])
        for name, pair in contrast["pairs"].items()
        for labeling, row in pair["derived"].items()
        if row["specialist_minus_wrong"] >= 0.01
    ]
    methods = compare["shots"]["16"]
    right, wrong = methods["ours_raw"], methods["ours_raw | wrong_task"]
    lost = right["accuracy"] - wrong["accuracy"]
    of_seeds = [a - b for a, b in zip(right["accuracy_of_seeds"], wrong["accuracy_of_seeds"], strict=True)]
    way = overall["share_of_the_way"]
    above = [seed["ours_minus_multi_task"] for seed in overall["of_seeds"]]
    ways = ", ".join(share(seed["share_of_the_way"]) for seed in overall["of_seeds"])
    return [
        (
            "two labelings: 80 % of the way from one adapter for both, of that kind's episodes, to a specialist",
            f"{share(way)} % (by seed {ways})",
            way >= 0.8,
        ),
        (
            "two labelings: above the multi-task adapter, which serves both, with every training seed",
            f"{signed(overall['ours_minus_multi_task'])} (by seed {', '.join(map(signed, above))})",
            all(difference > 0 for difference in above),
        ),
        (
            "two labelings: the other one costs 5.0 where specialists differ",
            ", ".join(f"{name} {percent(cost)}" for name, cost in differ),
            all(cost >= 0.05 for _, cost in differ),
        ),
        ("the wrong task costs 3.0", f"{percent(lost)} (by seed {', '.join(map(percent, of_seeds))})", lost >= 0.03),
    ]


def _more_examples(compare: Result) -> list[Row]:
    ours = [compare["shots"][shots]["ours"]["accuracy"] for shots in ("4", "16", "64")]
    none = compare["shots"]["64"]["none"]["accuracy"]
    whole = compare["shots"]["16"]["adamw_full_data"]["accuracy"] - none
    way, steps = (ours[-1] - none) / whole, compare["shots"]["64"].get("ours_steps")
    with_steps = f", {share((steps['accuracy'] - none) / whole)} % with gradient steps" if steps else ""
    return [
        ("4, 16, 64 examples a class: rises", ", ".join(map(percent, ours)), ours == sorted(set(ours))),
        (
            "64 examples: 60 % of the way from no adapter to AdamW on all rows",
            f"{share(way)} %{with_steps}",
            way >= 0.6,
        ),
    ]


def _costs(latency_30: Result, scaling: Result, compare: Result) -> list[Row]:
    ratio, both, methods = ratio_as_scored(latency_30), latency_30["ratio_of_the_median_task"], compare["shots"]["16"]
    small, *_, large = scaling["rows"]
    seconds, large_seconds = (row["rollout_s"] + row["factors_s"] for row in (small, large))
    batch, memory = small["rollout_s"] / small["rollout_in_batch_s"], large["peak_over_size"]
    accuracies = f"{percent(methods['adamw_30']['accuracy'])}, generated {percent(methods['ours']['accuracy'])}"
    return [
        (
            "50 times less time than AdamW at equal accuracy, median task",
            f"{ratio:.1f} times, {both:.1f} with both in float32, against 30 steps ({accuracies})",
            ratio >= 50,
        ),
        ("below 0.1 s once the features are there", f"{seconds:.3f} s", seconds < 0.1),
        ("rollout of 32 tasks at once: 5 times cheaper a task", f"{batch:.1f} times", batch >= 5),
        (
            "Llama-3-8B's shape, after the features: at most 1 s and 2 times the adapter's memory",
            f"{large_seconds:.2f} s, {memory:.1f} times",
            large_seconds <= 1 and memory <= 2,
        ),
    ]


def _warm_start(result: Result) -> Row:
    found = result["starts"]["generated"]["median_share_of_steps"]
    met = found is not None and found <= 0.2
    return (
        "AdamW from it: the default start's best loss in a fifth of the steps, median task",
        "never" if found is None else f"{found:.2f}",
        met,
    )


def goals(
    compare: Result, transfer: Result, contrast: Result, latency_30: Result, scaling: Result, warm_start: Result
) -> str:
    """All of them, with what was measured."""
    rows = [
        *_few_shot(compare),
        *_transfer(transfer),
        *_uses_its_task(compare, contrast),
        *_more_examples(compare),
        *_costs(latency_30, scaling, compare),
        _warm_start(warm_start),
    ]
    return table(
        ("goal", "measured", "met"), [(what, measured, "yes" if met else "no") for what, measured, met in rows]
    )

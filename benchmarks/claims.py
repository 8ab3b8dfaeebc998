"""What the README says in prose with numbers from results, beside its tables: `tables.py --check` looks for every phrase.

Where a new result makes one untrue the sentence is rewritten by hand, as a number may have changed sides.
"""

from collections.abc import Iterable, Mapping
from statistics import fmean

from rendering import Result, by_task, percent, ratio_as_scored, share, signed, with_specialists

WORDS = "no one two three four five six seven eight nine ten".split()


def _mean(values: Mapping[str, float], names: Iterable[str], digits: int = 1) -> str:
    return f"{100 * fmean(values[name] for name in names):.{digits}f}"


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
    of = {name: by_task(compare, name) for name in ("ours", "ours_steps", "adamw_80", "adamw_full_data")}
    reviews = [name for name, task in few_shot["tasks"].items() if task["family"] == "sentiment"]
    recorded = [shots[name]["accuracy"] for name in ("local_denoising", "drag_and_drop", "text_to_lora_recon")]
    oracle = with_specialists(compare)
    above = sum(of["ours"][name] > accuracy for name, accuracy in of["adamw_full_data"].items())
    questions, fine = ("trec", "trec_fine"), ("stackoverflow20", "fewrel_pubmed")
    gains = {name: of["ours_steps"][name] - of["ours"][name] for name in (*questions, "stackoverflow20")}
    behind = {name: accuracy - of["ours"][name] for name, accuracy in of["adamw_80"].items()}
    none = by_task(compare, "none")
    found = {name: accuracy - none[name] for name, accuracy in of["adamw_80"].items()}
    others = behind.keys() - {*questions, *fine, *reviews}
    lost = [
        right - wrong
        for right, wrong in zip(
            *(shots[name]["accuracy_of_seeds"] for name in ("ours_raw", "ours_raw | wrong_task")), strict=True
        )
    ]
    few, many = ({name: percent(row["accuracy"]) for name, row in compare["shots"][n].items()} for n in ("4", "64"))
    few_steps = compare["shots"]["4"]
    behind_few = few_steps["multi_task_steps"]["ours_steps_minus_it"]
    shuffled = shots["ours_raw"]["accuracy"] - shots["ours_raw | shuffled_labels"]["accuracy"]
    return [
        f"level with it ({signed(minus['multi_task']['mean'])}, 95 % interval {_ends(minus['multi_task'])}, better on "
        f"{minus['multi_task']['tasks_better']} of {len(of['ours'])} tasks)",
        f"(generated {signed(minus['mean']['mean'])}, {_ends(minus['mean'])} over tasks, "
        f"{' to '.join(map(percent, minus['mean']['families']))} when tasks of a kind are resampled together)",
        f"hardly are ({_range(recorded, 1)}; diffusion models {accuracy['weight_diffusion']} and "
        f"{accuracy['weight_diffusion_conditional']}, below no adapter)",
        f"{_mean(of['ours'], reviews)} % on four unseen domains of reviews, where AdamW reaches "
        f"{_mean(of['adamw_80'], reviews)}.",
        f"give {_range(gains.values())} points on question types and the fine topics of stackoverflow20; the multi-task adapter "
        f"gains by the same steps, to {accuracy['multi_task_steps']}, but with 4 examples a class stays {percent(behind_few['mean'])} "
        f"behind ({_ends(behind_few)}; {WORDS[few_steps['multi_task_steps']['seeds']]} training seeds, ours "
        f"{WORDS[few_steps['ours_steps']['seeds']]}).",
        f"With 4 examples a class they have {few['ours']} ({few['adamw_80']} for AdamW's 80 steps, {few['multi_task']} for the "
        f"multi-task adapter, {few['none']} for none), with 64 {many['ours']} ({many['adamw_80']}, {many['multi_task']} and "
        f"{many['none']}; AdamW from EVA's start {many['eva_80']}, on one draw).",
        f"by {_mean(behind, questions, 0)} points on question types, by "
        f"{' and '.join(sorted({_mean(behind, [name], 0) for name in fine}))} on stackoverflow20 and on fewrel_pubmed, and "
        f"{'level' if abs(fmean(behind[name] for name in others)) < 0.005 else 'not level'} on the other {len(others)}.",
        f"lose {_range(lost, 1)} points by training seed ({percent(lost[0])} the shipped one)",
        f"(with the multi-task adapter there, the mean would be {_mean(oracle, oracle)})",
        f"on {WORDS[above]} tasks generated adapters are above it",
        f"shuffling the labels between the examples costs it {percent(shuffled)} points there",
        f"AdamW on the same examples is about {_mean(behind, questions, 0)} points better; four confirmed gradient steps get back "
        f"{_range(gains[name] for name in questions)} points there and {100 * gains['stackoverflow20']:.0f} on stackoverflow20",
        f"even on stackoverflow20, where AdamW finds {_mean(found, ['stackoverflow20'], 0)} points.",
        f"level with generated ones on the wide suite ({accuracy['multi_task']} against {accuracy['ours']})",
    ]


def transfer(transfer: Result) -> list[str]:
    """Families left out of training."""
    minus, methods = transfer["all"]["differences"], transfer["all"]["methods"]
    none, mean, multi_task = (minus[f"ours - {other}"] for other in ("none", "mean", "multi_task"))
    levels = {percent(methods[name]["accuracy"]) for name in ("multi_task", "ours_raw")}
    return [
        f"on families left out of training generated adapters are {percent(multi_task['mean'])} above it ({_ends(multi_task)})",
        f"generated adapters are {percent(none['mean'])} points above no adapter ({_ends(none)}) and "
        f"{percent(mean['mean'])} above the mean adapter ({_ends(mean)})",
        f"but for the choice to fall back on another adapter, on families left out ({' and '.join(sorted(levels))} both)",
    ]


def contrast(contrast: Result) -> list[str]:
    """The same texts under two labelings."""
    derived = {name: list(pair["derived"].values()) for name, pair in contrast["pairs"].items()}
    swapped = " and ".join(share(row["ours_minus_swapped"]) for row in derived["sentiment"])
    accuracy = contrast["overall"]["accuracy"]
    others = [row["specialist_minus_wrong"] for name in ("stance", "sarcasm") for row in derived[name]]
    return [
        f"or the reverse, {swapped}.",
        f"the other labeling costs {swapped} points",
        f"they differ by {_range(others, 1)} points only",
        f"on the contrast suite ({percent(accuracy['multi_task'])} against {percent(accuracy['ours'])})",
    ]


def latency(latency: Result, latency_10: Result, latency_30: Result, compare: Result) -> list[str]:
    """Time to an adapter."""
    runs = {10: latency_10, 30: latency_30, 80: latency}
    both = {steps: f"{run['ratio_of_the_median_task']:.0f}" for steps, run in runs.items()}
    scored = {steps: f"{ratio_as_scored(run):.0f}" for steps, run in runs.items()}
    accuracy = {steps: percent(compare["shots"]["16"][f"adamw_{steps}"]["accuracy"]) for steps in runs}
    seconds = {name: f"{compare['shots']['16'][name]['seconds']:.1f}" for name in ("ours", "ours_steps")}
    tasks = {row["task"]: row for row in latency["rows"] if row["by"] == "shots"}
    long, many = tasks["ag_news"], tasks["banking77"]
    return [
        f"generation took {scored[30]} times less time than AdamW's first 30 steps, which are as accurate ({accuracy[30]}), "
        f"{scored[80]} times less than the 80 that validation tasks chose, and {scored[10]} times less than 10 ({accuracy[10]}), with "
        f"AdamW in bfloat16, as it was scored ({both[30]}, {both[80]} and {both[10]} times with both in float32)",
        f"the median task took {seconds['ours_steps']} s with them and {seconds['ours']} s without",
        f"with {long['texts']} long texts generation took {long['generated']:.1f} s ({long['generated_bf16']:.1f} s with "
        f'`mixed_precision="bf16"`), with {many["texts"]:,} texts of {many["classes"]} classes {many["generated"]:.1f} s, and '
        f"there only {many['ratio']:.0f} times less than 80 steps of AdamW",
    ]


def ablations(ablations: Result, compare: Result) -> list[str]:
    """Parts of policy learning."""
    variants = ablations["variants"]
    loss = {name: f"{variants[name]['loss']:.3f}" for name in ("lohp", "behaviour_cloning", "backward_reference")}
    cloning = variants["behaviour_cloning"]
    verdict = "as well as" if cloning["loss_minus_first"]["high"] > 0 else "better than"
    first = min(variants, key=lambda name: variants[name]["loss"])
    best = "best" if first == "backward_reference" else f"worse than {first}"
    accuracy = {name: percent(compare["shots"]["16"][name]["accuracy"]) for name in ("behaviour_cloning", "lohp")}
    return [
        f"behaviour cloning alone validates {verdict} cloning and hybrid-policy sub-trajectory balance "
        f"({loss['behaviour_cloning']} and {loss['lohp']} nats, {WORDS[cloning['seeds']]} training seeds), "
        "on the 22 test tasks both are level "
        f"({' and '.join(accuracy.values())} %)",
        f"a fitted backward policy in the place of the clone validates {best} ({loss['backward_reference']})",
    ]


CLAIMS = (
    (comparison, ("compare", "few_shot")),
    (transfer, ("transfer",)),
    (contrast, ("contrast",)),
    (latency, ("latency", "latency_10", "latency_30", "compare")),
    (ablations, ("ablations", "compare")),
)
"""What tells the phrases, and the results it needs."""


def missing(text: str, results: Mapping[str, Result]) -> list[str]:
    """Phrases that a text should have and has not, of the results that there are."""
    told = [phrases(*(results[name] for name in names)) for phrases, names in CLAIMS if results.keys() >= set(names)]
    flowing = " ".join(text.split())
    return [phrase for phrases in told for phrase in phrases if phrase not in flowing]

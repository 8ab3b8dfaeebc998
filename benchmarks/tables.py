"""The tables in the READMEs, generated from `benchmarks/results/*.json`.

`python benchmarks/tables.py` prints them, `--write` puts each between its marks, `<!-- results:begin NAME -->` and
`<!-- results:end -->`, and `--check` fails where a README differs from its results, in tables or in prose (`claims.py`).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import claims
from compared import compare, compare_brief, compare_kinds, compare_more, contrast, headline, transfer
from goals import goals
from rendering import NAMES, interval, percent, ratio_as_scored, signed, table, where

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "examples" / "large_models" / "README.md")
BLOCK = re.compile(r"(<!-- results:begin (\w+) -->\n).*?(<!-- results:end -->)", re.DOTALL)


def few_shot(result: Mapping[str, Any]) -> str:
    """Methods, then paired differences."""
    settings, tasks = result["settings"], result["tasks"]
    rows = [
        (NAMES.get(name, name), percent(row["accuracy"]), percent(row["macro_f1"]))
        for name, row in result["methods"].items()
    ]
    differences = [
        (
            name,
            signed(row["mean"]),
            f"{signed(row['low'])} to {signed(row['high'])}",
            f"{row['tasks_better']} of {len(tasks)}",
        )
        for name, row in result["differences"].items()
    ]
    texts = "all" if settings["max_test"] is None else f"at most {settings['max_test']}"
    note = (
        f"{len(tasks)} {'held-out' if settings['split'] == 'test' else settings['split']} tasks, {settings['shots']} "
        f"examples per class, {settings['draws']} draws, {texts} test texts; AdamW takes "
        f"{settings['adamw_steps']} steps at {settings['adamw_learning_rate']:g}. {where(result)}"
    )
    return "\n\n".join(
        (
            table(("", "accuracy, %", "macro F1, %"), rows),
            table(("difference in accuracy", "points", "95 % interval over tasks", "tasks where better"), differences),
            note,
        )
    )


def few_shot_tasks(result: Mapping[str, Any]) -> str:
    """One row a task."""
    methods = list(result["methods"])
    rows = [
        (name, task["family"], str(task["classes"]), *(percent(task["methods"][m]["accuracy"]) for m in methods))
        for name, task in sorted(result["tasks"].items(), key=lambda item: (item[1]["family"], item[0]))
    ]
    return table(("task", "family", "classes", *(method.replace("_", " ") for method in methods)), rows)


def latency(result: Mapping[str, Any]) -> str:
    """A few tasks, one row a size of the support set."""
    settings = result["settings"]
    names = {"task": f"median held-out task at {settings['shots']} a class", "size": "median of these sizes"}
    medians = [
        f"{name} {result[key]:.1f} ({result['bf16'][key]:.1f} in bfloat16)"
        for what, name in names.items()
        if result[key := f"ratio_of_the_median_{what}"]
    ]
    note = (
        f"Median of {settings['repeats']} alternating calls, {settings['threads']} threads; AdamW takes "
        f"{settings['adamw_steps']} steps. Ratio: {', '.join(medians)}. {where(result)}"
    )
    return f"{latency_tasks(result, 'size')}\n\n{note}"


def latency_tasks(result: Mapping[str, Any], by: str = "shots") -> str:
    """Every held-out task at the same number of examples per class."""
    columns = {"generated": ".2f", "adamw": ".2f", "ratio": ".1f"}
    columns |= {f"{name}_bf16": form for name, form in columns.items()}
    rows = [
        (
            row["task"],
            str(row["classes"]),
            str(row["texts"]),
            *(format(row[name], form) for name, form in columns.items()),
        )
        for row in result["rows"]
        if row["by"] == by
    ]
    times = ("generated, s", "AdamW, s", "ratio")
    return table(("task", "classes", "texts", *times, *(f"{name} (bf16)" for name in times)), rows)


def latency_by_steps(*results: Mapping[str, Any]) -> str:
    """How long AdamW takes and what it reaches, by its number of steps; the comparison comes last."""
    *measured, compared = results
    rows = []
    for result in sorted(measured, key=lambda result: result["settings"]["adamw_steps"]):
        steps = result["settings"]["adamw_steps"]
        tasks = [row for row in result["rows"] if row["by"] == "shots"]
        two_classes = median(row["ratio"] for row in tasks if row["classes"] == 2)
        method = compared["shots"]["16"][f"adamw_{steps}"]
        ratios = (
            result["ratio_of_the_median_task"],
            two_classes,
            result["bf16"]["ratio_of_the_median_task"],
            ratio_as_scored(result),
        )
        rows.append(
            (
                str(steps),
                percent(method["accuracy"]),
                interval(method["ours_minus_it"]),
                *(f"{ratio:.1f}" for ratio in ratios),
                where(result),
            )
        )
    header = (
        "AdamW steps",
        "accuracy, %",
        "generated minus it [95 %]",
        "its time over generation's, median task",
        "with two classes",
        "median task, both in bfloat16",
        "median task, only AdamW in bfloat16, as the accuracies",
        "measured",
    )
    return table(header, rows)


def warm_start(result: Mapping[str, Any]) -> str:
    """How much sooner AdamW gets to the default start's best loss."""
    settings, count = result["settings"], len(result["tasks"])
    steps = settings["checkpoints"]
    shown = [i for i, step in enumerate(steps) if step in (0, 8, 24, steps[-1])]
    rows = []
    for name, row in result["starts"].items():
        share = row["median_share_of_steps"]
        rows.append(
            (
                name.replace("_", " "),
                "more than all" if share is None else f"{share:.2f}",
                f"{row['tasks_in_a_fifth']} of {count}",
                f"{row['tasks_that_reach_it']} of {count}",
                *(f"{row['loss'][i]:.3f}" for i in shown),
                *(percent(row["accuracy"][i]) for i in shown),
            )
        )
    header = (
        "start",
        "share of the default's steps, median task",
        "tasks in a fifth",
        "tasks that reach it",
        *(f"loss at {steps[i]}" for i in shown),
        *(f"accuracy at {steps[i]}, %" for i in shown),
    )
    note = (
        f"{count} held-out tasks, {settings['shots']} examples per class, {settings['draws']} support sets each, at most "
        f"{settings['max_test']} test texts; AdamW at {settings['learning_rate']:g}. Steps until the default start's lowest "
        f"loss in {steps[-1]} steps. {where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


def scaling(result: Mapping[str, Any]) -> str:
    """One row a shape."""
    settings = result["settings"]
    rows = [
        (
            row["shape"],
            str(row["modules"]),
            f"{row['adapter_mb']:.1f}",
            f"{row['rollout_s']:.2f}",
            f"{row['factors_s']:.2f}",
            f"{row['rollout_in_batch_s']:.3f}",
            "" if row["peak_over_size"] is None else f"{row['peak_over_size']:.1f}",
        )
        for row in result["rows"]
    ]
    header = ("shape", "modules", "adapter, MB", "rollout, s", "factors, s")
    header += (f"rollout in a batch of {settings['tasks']}, s a task", "peak memory over the adapter's size")
    note = f"Rank {settings['rank']}, {settings['threads']} threads, median of {settings['repeats']} calls. {where(result)}"
    return f"{table(header, rows)}\n\n{note}"


def training_cost(result: Mapping[str, Any]) -> str:
    """One row a case: what is varied, and what a training step costs then."""
    settings, base = result["settings"], result["settings"]["base"]
    names = {"tasks": "recorded tasks", "policy_steps": "policy steps", "shape": "adapter"}
    rows = [
        (
            f"{names[row['varied']]}: {row[row['varied']]}",
            str(row["modules"] * row["rank"] ** 2),
            f"{row['recordings_mb']:.0f}",
            f"{1000 * row['step_s']:.0f}",
            "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        )
        for row in result["rows"]
    ]
    header = ("varied", "numbers in a state", "recordings, MB", "a training step, ms", "memory, MB")
    note = (
        f"The others are {base['tasks']} tasks with 4 runs each, {base['policy_steps']} policy steps, {base['shape']}. Preset `lohp`, "
        f"median of {settings['steps'] - 1} training steps, {settings['threads']} threads, rank {settings['rank']}; features and rewards are free. "
        f"{where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


def ablations(result: Mapping[str, Any]) -> str:
    """One row a variant; the first is what the others are compared with."""
    settings, rows = result["settings"], []
    for name, row in result["variants"].items():
        less = row.get("loss_minus_first")
        difference = f"{less['mean']:+.4f} [{less['low']:+.4f}, {less['high']:+.4f}]" if less else ""
        cells = (f"{row['loss']:.4f}", difference, percent(row["accuracy"]), f"{row['sharpness']:.4f}")
        title = f"{name.replace('_', ' ')}: {row['about']}" if row["about"] else name.replace("_", " ")
        rows.append((title + (f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""), *cells))
    header = ("variant", "loss", "minus the first [95 %]", "accuracy, %", "sharpness")
    seeds = sorted({row["seeds"] for row in result["variants"].values()})
    note = (
        f"{settings['cloning_steps']} training steps of cloning and {settings['training_steps']} of the objective, "
        f"{' or '.join(map(str, seeds))} training seed{'' if seeds == [1] else 's'}, differences at the same ones; {settings['episodes']} validation episodes, interval over "
        f"them. Sharpness: what random perturbations of {settings['sharpness_radius']:g} times the adapter's length add to "
        f"the loss. {where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


def importing(result: Mapping[str, Any]) -> str:
    """One row a weight space, both kinds of runs side by side."""
    settings, kinds = result["settings"], result["kinds"]
    names = {"policy": f"shipped policy's, {settings['policy_rank']}", "lora_b": f"`lora_b`, {settings['r']}"}
    rows = []
    for space in next(iter(kinds.values())):
        row = [names.get(space, f"`core`, {space}")]
        for kind in kinds.values():
            found = kind[space]
            gain = "" if found["gain_kept"] is None else percent(found["gain_kept"])
            row += [percent(found["energy_kept"]), gain, f"{found['accepted']} of {len(settings['tasks'])}"]
        rows.append(row)
    header = ["weight space, rank"]
    for name in kinds:
        header += [f"{name}: energy kept, %", "loss improvement kept, %", "accepted"]
    losses = ", ".join(
        f"{name} {found['loss_without']:.3f} to {found['loss_exact']:.3f} nats"
        for name, kind in kinds.items()
        for found in [next(iter(kind.values()))]
    )
    note = (
        f"{len(settings['tasks'])} training tasks, a run each: rank {settings['r']}, {settings['steps']} AdamW steps of "
        f"{settings['batch_size']} texts at {settings['learning_rate']:g}. Mean losses on split test without and with the exact "
        f"adapters: {losses}. Accepted: {percent(settings['min_gain'])} % of the improvement are kept, and "
        f"{percent(settings['min_energy'])} % of the energy. {where(result)}"
    )
    return f"{table(header, rows)}\n\n{note}"


def adamw(result: Mapping[str, Any]) -> str:
    """The grid on validation tasks."""
    rates, steps = ([*dict.fromkeys(key.split("/")[i] for key in result["accuracy"])] for i in (0, 1))
    rows = [(rate, *(percent(result["accuracy"][f"{rate}/{step}"]) for step in steps)) for rate in rates]
    best = result["best"]
    note = f"{len(result['tasks'])} validation tasks; taken: {best['steps']} steps at {best['learning_rate']:g}."
    return f"{table(('learning rate', *(f'{step} steps' for step in steps)), rows)}\n\n{note}"


def recorder(result: Mapping[str, Any]) -> str:
    """The recorder's overhead in a sentence."""
    return (
        f"Share of a training step spent inside the recorder: {100 * result['share_of_step_inside_recorder']:.2f} %; "
        f"time with / without it: {result['ratio_median']:.3f} (median of {result['settings']['pairs']} pairs). "
        f"{result['date']}, {result['cores']} {result['device'].upper()} cores."
    )


def subtb(result: Mapping[str, Any]) -> str:
    """The objective against torchgfn in a sentence."""
    setting = result["setting"]
    return (
        f"Largest difference of loss and gradients from torchgfn: {result['max_abs_diff']:.0e} in {setting['dtype']}; at "
        f"least {result['min_ratio']:.1f} times as fast at {setting['time']} transitions, batch {setting['batch']}. "
        f"{result['date']}."
    )


BLOCKS: dict[str, tuple[str | tuple[str, ...], Callable[..., str]]] = {
    "headline": (("compare", "transfer", "contrast"), headline),
    "goals": (("compare", "transfer", "contrast", "latency_30", "scaling", "warm_start"), goals),
    "few_shot": ("few_shot", few_shot),
    "few_shot_tasks": ("few_shot", few_shot_tasks),
    "compare": ("compare", compare),
    "compare_brief": ("compare", compare_brief),
    "compare_kinds": (("compare", "few_shot"), compare_kinds),
    "compare_more": ("compare", compare_more),
    "compare_validation": ("compare_validation", compare),
    "contrast": ("contrast", contrast),
    "transfer": ("transfer", transfer),
    "latency": ("latency", latency),
    "latency_tasks": ("latency", latency_tasks),
    "latency_by_steps": (("latency_10", "latency_30", "latency", "compare"), latency_by_steps),
    "warm_start": ("warm_start", warm_start),
    "scaling": ("scaling", scaling),
    "training_cost": ("training_cost", training_cost),
    "ablations": ("ablations", ablations),
    "importing": ("importing", importing),
    "adamw": ("adamw", adamw),
    "recorder": ("recorder", recorder),
    "subtb": ("subtb", subtb),
}
"""By the name of the block: its result file or files, and what is made of them."""


def block(name: str, results: Path = RESULTS) -> str:
    """The content of a block."""
    if name not in BLOCKS:
        raise SystemExit(f"No block is called {name!r}; there are {', '.join(BLOCKS)}.")
    sources, render = BLOCKS[name]
    files = [results / f"{source}.json" for source in ((sources,) if isinstance(sources, str) else sources)]
    missing = [f"`benchmarks/results/{file.name}`" for file in files if not file.exists()]
    if missing:
        return f"Not measured yet: {', '.join(missing)} missing.\n"
    return render(*(json.loads(file.read_text(encoding="utf-8")) for file in files)) + "\n"


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with every block filled."""
    return BLOCK.sub(lambda match: match[1] + block(match[2], results) + match[3], text)


def untrue(results: Path = RESULTS) -> list[str]:
    """What the README's prose should say by the results, and does not."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in results.glob("*.json")}
    return claims.missing((ROOT / "README.md").read_text(encoding="utf-8"), found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="fill the blocks of the READMEs")
    action.add_argument("--check", action="store_true", help="fail where a README differs from its results")
    options = parser.parse_args(arguments)
    stale = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(document.name if document.parent == ROOT else f"{document.parent.name}/{document.name}")
            if options.write:
                document.write_text(filled(text), encoding="utf-8")
    if options.check and stale:
        sys.exit(f"{', '.join(stale)} differ from the results; run `python benchmarks/tables.py --write`.")
    if not options.write and not options.check:
        print("\n".join(f"## {name}\n\n{block(name)}" for name in BLOCKS))
        return
    phrases = "".join(f"\n* {phrase}" for phrase in untrue())
    if phrases:
        sys.exit(f"README.md lacks these phrases, with numbers of the results; look whether they still hold:{phrases}")
    if options.write:
        print("Changed: " + (", ".join(stale) or "nothing"))


if __name__ == "__main__":
    main()

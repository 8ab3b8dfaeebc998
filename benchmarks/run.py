"""Run the benchmark suites one after the other, each in a process of its own: `make bench` or `python -m benchmarks.run`.

Only suites without a result run, unless `--again`. The tables of the READMEs are written at the end.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FITS = ("--fits", "{work}/compare/fits")
"""The adapters that the comparison trained, which come before the suites that use them."""
SUITES = {
    "adamw": ("adamw.py", "{work}/adamw"),
    "few_shot": ("few_shot.py", "{work}/few_shot", "--processes", "2", "--adamw-bf16"),
    "compare": (
        *("compare.py", "{work}/compare", "--processes", "2", "--max-test", "300"),
        *("--controls", "wrong_task", "shuffled_labels", "--methods", "none", "none_prototype", "none_linear_probe"),
        *("adamw_10", "adamw_30", "adamw_80", "eva_80", "setfit", "mean", "nearest", "nearest_5"),
        *("best_by_support_loss", "lorahub", "multi_task", "reptile", "reptile_5", "text_to_lora_sft", "ours_raw"),
        *("ours", "none_steps", "multi_task_steps", "ours_steps", "family_specialists", "adamw_full_data"),
    ),
    "compare_validation": (
        *("compare.py", "{work}/compare_validation", "--split", "validation", "--processes", "2", "--draws", "2"),
        *("--methods", "none", "ours", "ours_steps", "ours_steps_16", "--controls", "--max-test", "200"),
    ),
    "contrast": (
        *("contrast.py", "{work}/contrast", *FITS, "--draws", "5", "--max-test", "240"),
        *("--steps", "60", "--validate-every", "30", "--validation-draws", "2"),
    ),
    "transfer": ("transfer.py", "{work}/transfer", "--seeds", "0", "1", "2", "--processes", "2"),
    "latency": ("latency.py", "--tasks", "cr", "stackoverflow20", "--sizes", "8", "64", "256", "--repeats", "1"),
    **{
        f"latency_{steps}": (
            *("latency.py", "--adamw-steps", str(steps), "--sizes", "--repeats", "1"),
            *("--output", str(HERE / "results" / f"latency_{steps}.json")),
        )
        for steps in (10, 30)
    },
    "warm_start": (
        *("warm_start.py", "{work}/warm_start", "--processes", "2", *FITS),
        *("--starts", "default", "eva", "generated", "reptile", "multi_task"),
    ),
    "scaling": ("scaling.py",),
    "training_cost": ("training_cost.py",),
    "importing": ("importing.py",),
    "recorder": ("recorder/run.py",),
}
"""By the name of the result file: the script and its arguments, as the committed results were measured.

What needs recordings (`shipped_policy/`, `ablations.py`, and the methods of `compare.py` that learn from them) and further
training seeds are run by hand: see README.md.
"""
SMALL = {
    "compare_small": (
        *("compare.py", "{work}/compare_small", "--output", "{work}/compare_small.json", "--processes", "2"),
        *("--tasks", "cr", "stance_climate", "hint3_sofmattress", "davidson_hate", "trec"),
        *("--methods", "none", "mean", "nearest", "adamw_30", "multi_task", "text_to_lora_sft", "ours_raw", "ours"),
        *("--controls", "wrong_task", "shuffled_labels", "--draws", "2", "--max-test", "200"),
        *("--steps", "100", "--validation-episodes", "48"),
    )
}
"""A cut of the comparison, for a first look: less than a quarter of an hour on two cores; run only when it is named."""


def command(suite: str, work: Path) -> list[str]:
    """The command of one suite."""
    script, *arguments = {**SUITES, **SMALL}[suite]
    return [sys.executable, str(HERE / script), *(a.format(work=work) for a in arguments)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"which of {', '.join(SUITES)}; all by default")
    parser.add_argument("--again", action="store_true", help="also where there is a result")
    parser.add_argument("--work", type=Path, default=Path("temporary_results"), help="folder of unfinished suites")
    parser.add_argument("--results", type=Path, default=HERE / "results", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.suites) - set(SUITES) - set(SMALL))
    if unknown:
        parser.error(f"no suite is called {', '.join(unknown)}; there are {', '.join([*SUITES, *SMALL])}")
    for suite in options.suites or SUITES:
        if (options.results / f"{suite}.json").exists() and not options.again:
            print(f"{suite}: has a result", flush=True)
            continue
        line = command(suite, options.work)
        print(f"{suite}: {' '.join(Path(word).name if word == sys.executable else word for word in line)}", flush=True)
        if not options.dry_run:
            subprocess.run(line, check=True)
    if not options.dry_run:
        subprocess.run([sys.executable, str(HERE / "tables.py"), "--write"], check=True)


if __name__ == "__main__":
    main()

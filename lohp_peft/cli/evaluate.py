"""`lohp-peft evaluate`: generated adapters beside their baselines and controls."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lohp_peft.cli.overrides import read_config
from lohp_peft.cli.resources import (
    check_target,
    fewer_than,
    load_base_model,
    load_policy,
    load_tasks,
    on_accelerator,
    write_json,
)


def evaluate(
    ctx: typer.Context,
    base_model: Annotated[str, typer.Option(help="`minilm`, a folder, or a Hub id, owner/name@commit to pin it.")],
    task: Annotated[
        list[Path], typer.Option(help="JSON lines {text[, text_b], label, split}, plain or gzipped; repeatable.")
    ],
    policy: Annotated[str, typer.Option(help="`shipped`, a folder, or owner/name@commit.")] = "shipped",
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of EvaluationConfig; repeatable.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="JSON file to write; `-` prints it.")] = None,
) -> None:
    """Score generated adapters on split test, beside no adapter, controls and AdamW.

    Every field of EvaluationConfig may be set as `--field value`, lists with commas.
    """
    from lohp_peft.evaluation import EvaluationConfig, evaluate_tasks

    config = read_config(EvaluationConfig, None, ctx.args, sets or ())
    check_target(json)
    tasks = load_tasks(task)
    for each in tasks:
        if "train" in each.splits and (fewer := fewer_than(config.shots, each.split("train"))):
            typer.echo(
                f"Asked for {config.shots} examples a class, but in {each.name!r} {fewer}: draws share them.", err=True
            )
    model, tokenizer = load_base_model(base_model)
    model = on_accelerator(model)
    done: dict[str, Any] = {}

    def keep(name: str, scores: dict[str, Any]) -> None:
        done[name] = scores
        if json is not None and str(json) != "-":
            with suppress(OSError):  # told at the end, below the table
                write_json({"tasks": done}, json)  # of a run that is stopped, too

    results = evaluate_tasks(load_policy(policy), model, tokenizer, tasks, config=config, on_task=keep)
    if str(json) != "-":
        show(results["tasks"])  # whatever becomes of the file
    if json is not None:
        write_json(results, json)


def show(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print a row a method and a column a task, accuracy in percent, then means and seconds; as many tables as the width asks for."""
    methods = list(dict.fromkeys(method for scores in tasks.values() for method in scores))
    columns = {
        name: [_text(scores.get(method, {}).get("accuracy"), 100, 1) for method in methods]
        for name, scores in tasks.items()
    }
    if len(tasks) > 1:
        columns["mean"] = [_text(_known(tasks, method, "accuracy", fmean), 100, 1) for method in methods]
    columns["seconds"] = [_text(_known(tasks, method, "seconds", median), 1, 2) for method in methods]
    console, rest = Console(), list(columns)
    first = max(map(len, (*methods, "accuracy, %"))) + 4
    while rest:
        shown: list[str] = []
        width = first
        while rest and (not shown or width + len(rest[0]) + 3 <= console.width):
            width += len(rest[0]) + 3
            shown.append(rest.pop(0))
        table = Table("accuracy, %")
        for name in shown:
            table.add_column(name, justify="right")
        for i, method in enumerate(methods):
            table.add_row(method.replace("_", " "), *(columns[name][i] for name in shown))
        console.print(table)


def _known(tasks: Mapping[str, Any], method: str, entry: str, summary: Callable) -> float | None:
    values = [scores[method][entry] for scores in tasks.values() if scores.get(method, {}).get(entry) is not None]
    return summary(values) if values else None


def _text(value: float | None, scale: int, digits: int) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"

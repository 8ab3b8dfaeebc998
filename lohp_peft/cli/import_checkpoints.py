"""`lohp-peft import-checkpoints`: trajectories out of training runs that were not recorded."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lohp_peft.cli.overrides import read_config
from lohp_peft.cli.resources import load_base_model, load_policy, load_tasks, on_accelerator, write_json


def import_checkpoints(
    ctx: typer.Context,
    base_model: Annotated[str, typer.Option(help="`minilm`, a folder, or a Hub id, owner/name@commit to pin it.")],
    run: Annotated[
        list[str],
        typer.Option(
            help="TASK=FOLDER, a task file and the folder with a run's checkpoint-N folders of an ordinary LoRA; repeatable."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the trajectories; one that exists is added to, in its weight space.")
    ],
    space: Annotated[
        str | None,
        typer.Option(
            help="Weight space: `core` or `lora_b` (where the runs share lora_A) along the runs' own updates, or that of a "
            "`policy:NAME` or of `trajectories:FOLDER`. `core` for a new folder."
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of `core` or `lora_b`; the runs' highest.")] = None,
    optimizer: Annotated[str, typer.Option(help="Name of the runs' optimizer.")] = "unknown",
    min_energy: Annotated[
        float | None, typer.Option(help="Share of an update that every imported state must keep.")
    ] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="Share of the loss improvement that the last state must keep.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="How embeddings are pooled: `mean`, `first` or `last`.")] = "mean",
    max_length: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    config: Annotated[Path | None, typer.Option(help="YAML of WeightPreparationConfig, for the scores.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="field=value; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Project only; score and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Import PEFT's checkpoints of several runs as trajectories, scored on rows of their tasks.

    Fields of WeightPreparationConfig that choose these rows may be set as `--field value`; name a `--split` that the runs
    were not trained on.
    """
    from lohp_peft.tasks import TextEncoder
    from lohp_peft.weight_preparation import (
        MIN_ENERGY,
        MIN_GAIN,
        WeightPreparationConfig,
        find_runs,
        import_runs,
    )

    given = config is not None or ctx.args or sets
    settings = read_config(WeightPreparationConfig, config, ctx.args, sets or ()) if given else None
    if settings is not None:
        _refuse_unused(settings)
    tasks, folders = _tasks_and_folders(run)
    model, tokenizer = load_base_model(base_model)
    runs = find_runs(folders, model)
    weight_space = _space(runs, model, output, space, r)
    encoder = TextEncoder(on_accelerator(model), tokenizer, weight_space, pooling=pooling, max_length=max_length)
    reports = import_runs(
        runs,
        tasks,
        encoder,
        output,
        settings,
        optimizer=optimizer,
        min_energy=MIN_ENERGY if min_energy is None else min_energy,
        min_gain=MIN_GAIN if min_gain is None else min_gain,
        dry_run=dry_run,
        console=Console(stderr=json),
    )
    if json:
        write_json({"output": output, "runs": [report.to_dict() for report in reports]})
    if all(report.refused for report in reports):
        reasons = "; ".join(f"{report.run} ({report.task}): {report.refused}" for report in reports)
        raise ValueError(
            f"No run was imported: {reasons}. Use a higher `--r`, or lower the shares that are asked for."
        )


def _refuse_unused(settings) -> None:
    """Raise where settings are given that say how to train: these runs are over."""
    from lohp_peft.weight_preparation.importing import SCORING

    default = type(settings)()
    unused = [
        f.name
        for f in fields(settings)
        if f.name not in SCORING and getattr(settings, f.name) != getattr(default, f.name)
    ]
    if unused:
        raise ValueError(
            f"An import trains nothing: of WeightPreparationConfig it uses {', '.join(SCORING)}; leave out "
            f"{', '.join(unused)}."
        )


def _tasks_and_folders(entries: list[str]):
    """The tasks, each read once, and a task's name and a folder for every entry."""
    wrong = [entry for entry in entries if not all(entry.partition("="))]
    if wrong:
        raise ValueError(
            f"`--run` takes TASK=FOLDER, a task file and a folder of checkpoints; got {', '.join(wrong)}."
        )
    pairs = [(Path(file), folder) for file, _, folder in (entry.partition("=") for entry in entries)]
    files = list(dict.fromkeys(file for file, _ in pairs))
    tasks = load_tasks(files)
    names = {file: task.name for file, task in zip(files, tasks, strict=True)}
    return tasks, [(names[file], folder) for file, folder in pairs]


def _space(runs, model, output: Path, space: str | None, r: int | None):
    """The weight space that the command line asks for."""
    from lohp_peft.trajectories import TrajectoryDataset
    from lohp_peft.trajectories.manifest import MANIFEST_NAME
    from lohp_peft.weight_preparation import checkpoint_space

    kind, colon, name = (space or "core").partition(":")
    if colon and kind not in ("policy", "trajectories"):
        raise ValueError(f"`--space` takes a name after policy: and trajectories: only, got {space!r}; see `--r`.")
    if (output / MANIFEST_NAME).exists() and not name:
        found = TrajectoryDataset.open(output, on_damage="skip").space
        asked = {"kind": kind if space else found.kind, "r": found.r if r is None else r}
        if asked != {"kind": found.kind, "r": found.r}:
            raise ValueError(f"{output} holds trajectories of kind {found.kind!r}, r={found.r}; asked for {asked}.")
        return found
    if kind not in ("policy", "trajectories"):
        return checkpoint_space(runs, model, kind, r)
    if not name or r is not None:
        raise ValueError(f"`--space {kind}:NAME` names a weight space with its rank; got {space!r} and r={r}.")
    return load_policy(name).space if kind == "policy" else TrajectoryDataset.from_pretrained(name).space

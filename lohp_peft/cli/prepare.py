"""`lohp-peft prepare`: stage 1, record fine-tuning runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lohp_peft.cli.overrides import read_config
from lohp_peft.cli.resources import (
    check_folder_to_continue,
    load_base_model,
    load_space,
    load_tasks,
    on_accelerator,
    write_json,
)


def prepare(
    ctx: typer.Context,
    base_model: Annotated[str, typer.Option(help="`minilm`, a folder, or a Hub id, owner/name@commit to pin it.")],
    task: Annotated[
        list[Path], typer.Option(help="JSON lines {text[, text_b], label, split}, plain or gzipped; repeatable.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the trajectories; a run that stopped is continued.")],
    space: Annotated[str, typer.Option(help="Weight space: `core` or `lora_b`.")] = "core",
    bases: Annotated[
        str, typer.Option(help="Of a core: the tasks' first `gradients`, or the `base-weights`.")
    ] = "gradients",
    r: Annotated[int, typer.Option("--r", help="Rank of the recorded adapters.")] = 8,
    target_modules: Annotated[
        str | None, typer.Option(help="Module names, comma-separated; PEFT's choice for the model by default.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layer numbers, comma-separated; all by default.")] = None,
    pooling: Annotated[str, typer.Option(help="How embeddings are pooled: `mean`, `first` or `last`.")] = "mean",
    max_length: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    config: Annotated[Path | None, typer.Option(help="YAML of WeightPreparationConfig.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="field=value; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Record the weight trajectories of fine-tuning runs: tasks x optimizers x seeds.

    Every field of WeightPreparationConfig may be set as `--field value`.
    """
    from lohp_peft.tasks import TextEncoder
    from lohp_peft.weight_preparation import (
        WeightPreparationConfig,
        gradient_space,
        plan_preparation,
        prepare_trajectories,
    )

    if bases not in ("gradients", "base-weights"):
        raise ValueError(f"`--bases` must be gradients or base-weights, got {bases!r}.")
    settings = read_config(WeightPreparationConfig, config, ctx.args, sets or ())
    check_folder_to_continue(output)
    tasks = load_tasks(task)
    model, tokenizer = load_base_model(base_model)
    from_gradients = space == "core" and bases == "gradients"
    # Gradients are taken in any space over the modules: one that needs no decomposition of the base weights.
    first_space = "lora_b" if from_gradients and not dry_run else space
    weight_space = load_space(model, first_space, r, target_modules, layers)
    model = model if dry_run else on_accelerator(model)
    encoder = TextEncoder(model, tokenizer, weight_space, pooling=pooling, max_length=max_length)
    if dry_run:
        plan = plan_preparation(tasks, weight_space, settings, output)
        if json:
            write_json({"config": settings.to_dict(), "plan": plan.to_dict()})
        else:
            Console().print(plan.table())
        return
    if from_gradients:
        weight_space = gradient_space(tasks, encoder, r, settings, output_dir=output)
        encoder = TextEncoder(model, tokenizer, weight_space, pooling=pooling, max_length=max_length)
    dataset = prepare_trajectories(tasks, encoder, output, settings)
    if json:
        write_json({"output": output, "tasks": list(dataset.keys()), "trajectories": len(dataset)})

"""`lohp-peft generate`: the adapter of one task, as a plain LoRA folder."""

from pathlib import Path
from typing import Annotated

import typer

from lohp_peft.cli.overrides import read_config
from lohp_peft.cli.resources import (
    check_new_folder,
    fewer_than,
    load_base_model,
    load_policy,
    load_tasks,
    on_accelerator,
    write_json,
)

ABSTAINED = {
    "none": "It changes nothing of the base model; only the head is the task's.",
    "mean": "It is the average adapter of the training tasks, the same for every task; only the head is this task's.",
}
"""What is said of an adapter that does not depend on the examples."""


def generate(
    ctx: typer.Context,
    base_model: Annotated[str, typer.Option(help="`minilm`, a folder, or a Hub id, owner/name@commit to pin it.")],
    task: Annotated[Path, typer.Option(help="JSON lines {text[, text_b], label, split}, plain or gzipped.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be empty or not exist.")],
    policy: Annotated[str, typer.Option(help="`shipped`, a folder, or owner/name@commit.")] = "shipped",
    shots: Annotated[int, typer.Option(help="Examples per class, drawn from split train.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw and of the generation.", show_default="0")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of GenerationConfig; repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Generate a LoRA for one task, forward-only, and save it with its model card.

    Every field of GenerationConfig may be set as `--field value`.
    """
    from lohp_peft.generation import GenerationConfig, generate_adapter

    given = [] if seed is None else [f"seed={seed}"]
    config = read_config(GenerationConfig, None, ctx.args, [*(sets or ()), *given])
    check_new_folder(output)
    (loaded,) = load_tasks([task])
    support = loaded.draw_support(shots, config.seed)
    model, tokenizer = load_base_model(base_model)
    generated = generate_adapter(load_policy(policy), on_accelerator(model), tokenizer, support, config)
    folder = str(Path(base_model).resolve()) if Path(base_model).is_dir() else None
    generated.save_pretrained(output, base_model_name=folder)
    if json:
        write_json(generated.report.to_dict())
    else:
        report = generated.report
        typer.echo(f"Wrote a LoRA from {len(support)} examples of {support.n_classes} classes to {output}.")
        if fewer := fewer_than(shots, support):
            typer.echo(f"Asked for {shots} examples a class; {fewer}.")
        typer.echo(f"Chosen: {report.chosen}. {report.reason}")
        if said := ABSTAINED.get(report.chosen):
            typer.echo(said)

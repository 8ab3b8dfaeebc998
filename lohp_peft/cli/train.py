"""`lohp-peft train`: stage 2, learn a policy from recorded trajectories."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lohp_peft.cli.overrides import read_config
from lohp_peft.cli.resources import load_base_model, load_tasks, on_accelerator, write_json


def train(
    ctx: typer.Context,
    base_model: Annotated[str, typer.Option(help="`minilm`, a folder, or a Hub id, owner/name@commit to pin it.")],
    trajectories: Annotated[str, typer.Option(help="Folder that `lohp-peft prepare` wrote, or owner/name@commit.")],
    task: Annotated[
        list[Path], typer.Option(help="The recorded tasks: JSON lines {text[, text_b], label, split}; repeatable.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the policy; a run that stopped is continued.")],
    validation_task: Annotated[
        list[Path] | None, typer.Option(help="Tasks that choose among the validated policies; repeatable.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="How embeddings are pooled: `mean`, `first` or `last`.")] = "mean",
    max_length: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    config: Annotated[Path | None, typer.Option(help="YAML of PolicyLearningConfig.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="field=value; repeatable.")] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Where to log as the Trainer does: `tensorboard`, `trackio`, `wandb`, ...; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Learn a policy from recorded trajectories with hybrid-policy sub-trajectory balance.

    Every field of PolicyLearningConfig may be set as `--field value`.
    """
    from lohp_peft.adapters import base_model_fingerprint
    from lohp_peft.policy_learning import PolicyLearningConfig, plan_training, train_policy
    from lohp_peft.tasks import TextEncoder
    from lohp_peft.trajectories import TrajectoryDataset

    settings = read_config(PolicyLearningConfig, config, ctx.args, sets or ())
    tasks = load_tasks([*task, *(validation_task or ())])
    tasks, validation_tasks = tasks[: len(task)], tasks[len(task) :]
    dataset = TrajectoryDataset.from_pretrained(trajectories)
    model, tokenizer = load_base_model(base_model)
    model = model if dry_run else on_accelerator(model)
    encoder = TextEncoder(model, tokenizer, dataset.space, pooling=pooling, max_length=max_length)
    if dry_run:
        fingerprint = base_model_fingerprint(encoder.base_model)
        dataset.check_matches(space=dataset.space, base_fingerprint=fingerprint, reading=encoder.reading)
        plan = asdict(plan_training(tasks, dataset, settings, validation_tasks))
        if json:
            write_json({"config": asdict(settings), "plan": plan})
        else:
            table = Table("what", "how much", title="Policy learning: plan")
            for name, value in plan.items():
                table.add_row(name.replace("_", " "), str(value))
            Console().print(table)
        return
    policy = train_policy(
        tasks,
        encoder,
        dataset,
        output,
        settings,
        validation_tasks=validation_tasks,
        report_to=report_to or "none",
    )
    if json:
        write_json({"output": output, "parameters": policy.num_parameters(), "provenance": policy.config.provenance})

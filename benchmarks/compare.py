"""The field's baselines beside ours on held-out tasks: `python benchmarks/compare.py WORK_FOLDER`.

Two kinds of cells, each run once and kept in the work folder: `fits/METHOD-SEED.safetensors`, one training of a method,
and the scores of (method, seed, shots, control) in `tasks/TASK.json`, which are written together for each number of shots.
A run that was stopped is continued by the same command, a training where it last validated; trainings and tasks run on
`--processes`. The result holds all cells that the folder has for these tasks, so that methods can be added by further commands.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from fitting import Budget, fit, load_setting
from methods import CONTROLS, FROM_POLICY, METHODS, Method
from safetensors.torch import load_file
from setting import (
    bootstrap_interval,
    check_settings,
    describe_policy,
    environment,
    of_split,
    result_file,
    with_interval,
    write_json,
)
from sklearn.metrics import accuracy_score, f1_score
from splits import NEW_DOMAINS, SPLITS, families, split_of
from text_suite import load_tasks

from lohp_peft.tasks import draw


@dataclass(frozen=True)
class Cell:
    """One entry of a task's file; for another policy than the compared one its checksum is in the place of the seed."""

    method: str
    seed: int | str
    shots: int
    control: str
    policy: str | None = None

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.method, self.seed, self.shots, self.control)))

    @property
    def how(self) -> Method:
        """The method; a policy that is called like none is rolled out raw."""
        return METHODS.get(self.method, METHODS["ours_raw"])

    @property
    def fit(self) -> tuple[str, int] | None:
        """The training it needs: a method's name and a seed."""
        return (self.how.fitted_as or self.method, int(self.seed)) if self.how.trained else None


def same_space(policy: str, options) -> bool:
    """Whether another policy's adapters mean the same as the compared one's."""
    mine, other = (load_setting(p, options.base_model).policy.space for p in (options.policy, policy))
    mine, other = mine.to_tensors(), other.to_tensors()
    return mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)


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
        for name, folder in options.policies:
            checksum = describe_policy(load_setting(folder, options.base_model).policy)["sha256"][:8]
            cell = Cell(name, checksum, shots, "", folder)
            for control in ("", *(options.controls if cell.how.conditional else ())):
                yield replace(cell, control=control)


def score_task(name: str, wanted: Sequence[Cell], options) -> str:
    """Add the missing cells of one task to its file."""
    file = options.work / "tasks" / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    missing = [cell for cell in wanted if cell.key not in found]
    if not missing:
        return name
    torch.set_num_threads(options.threads)
    where = options.base_model, options.device
    setting = load_setting(options.policy, *where)
    others = {cell.policy: load_setting(cell.policy, *where) for cell in missing if cell.policy}
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
            anew = adapted.tuned_below
            return adapted.encoder.embed(adapted.encoder.prepare(test.texts, test.texts_b) if anew else encoded)
        state = adapted.state
        key = b"" if state is None or not state.any() else state.numpy(force=True).tobytes()
        if key not in embedded:
            embedded[key] = setting.encoder.embed(encoded, state[None] if key else None)
        return embedded[key]

    for shots in sorted({cell.shots for cell in missing}):
        of_shots = [cell for cell in missing if cell.shots == shots]
        rows: dict[str, list[dict[str, float]]] = {cell.key: [] for cell in of_shots}
        for number in range(options.draws):
            examples = task.draw_support(shots, number)
            supports = {
                policy: one.support(examples, number, task.family) for policy, one in {None: setting, **others}.items()
            }
            for cell in of_shots:
                of_cell, support = others.get(cell.policy, setting), supports[cell.policy]
                if cell.how.most_draws is not None and number >= cell.how.most_draws:
                    continue
                if cell.how.full_data:
                    if number:  # nothing to draw
                        continue
                    everything = draw(task.split("train"), options.full_data_rows // test.n_classes, 0)
                    support = setting.support(everything, number, task.family)
                start = time.perf_counter()
                features = CONTROLS[cell.control](of_cell, support, task) if cell.control else None
                adapted = cell.how.adapt(of_cell, fits[cell.fit], support, features)
                seconds = time.perf_counter() - start
                head = adapted.head
                predicted = head.logits(predict(adapted).to(head.weight.device)).argmax(-1).cpu()
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
                **({} if options.device == "cpu" else {"device": options.device}),
            }
        write_json(file, found)
    return name


def shots_of(key: str) -> int:
    return int(key.split("/")[2])


def order_of(key: str) -> tuple[int, bool, str]:
    """As the methods are listed; other policies before the compared one."""
    method, known = key.split("/")[0], list(METHODS)
    return known.index(method if method in known else "ours_raw"), method in known, key


def summarise(
    tasks: dict[str, dict[str, Any]],
    found: Sequence[str],
    shots: int,
    ours: Sequence[str] = ("ours", "ours_steps"),
    of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """By method (and control): means over tasks and seeds, and each of ours minus it, paired by task, with its intervals.

    `of` tells the family of a task, for the interval over families. A method with fewer draws than the others is paired
    with ours on these. Seconds are those on a CPU, where there are any.
    """
    grouped: dict[str, list[str]] = {}
    for key in found:
        method, _, _, control = key.split("/")
        if shots_of(key) == shots:
            grouped.setdefault(method + (f" | {control}" if control else ""), []).append(key)

    def of_task(entry: str, keys: Sequence[str]) -> list[float]:
        return [fmean(task[key][entry] for key in keys) for task in tasks.values()]

    def accuracy_of(keys: Sequence[str], draws: int | None) -> list[float]:
        """By task, on the first draws or on all."""
        return [fmean(fmean(task[key]["per_draw"][:draws]) for key in keys) for task in tasks.values()]

    made = {}
    for name, keys in grouped.items():
        method = name.split(" | ")[0]
        draws = METHODS[method].most_draws if method in METHODS else None
        accuracy = accuracy_of(keys, draws)
        timed = [key for key in keys if not any("device" in task[key] for task in tasks.values())]
        low, high = bootstrap_interval(accuracy)
        made[name] = {
            "accuracy": fmean(accuracy),
            "interval": [low, high],
            "macro_f1": fmean(of_task("macro_f1", keys)),
            "seconds": median(of_task("seconds", timed)) if timed else None,
            "seeds": len(keys),
            **({"draws": draws} if draws else {}),
            "accuracy_of_seeds": [fmean(task[key]["accuracy"] for task in tasks.values()) for key in keys],
        }
        for mine in (mine for mine in ours if mine in grouped and mine != name):
            each = [a - b for a, b in zip(accuracy_of(grouped[mine], draws), accuracy, strict=True)]
            better = sum(difference > 0 for difference in each)
            kinds = [of[task] for task in tasks] if of else None
            made[name][f"{mine}_minus_it"] = {**with_interval(each, kinds), "tasks_better": better}
    return made


def check_available(pending: Sequence[tuple[str, int]], options) -> None:
    """Refuse before any work what would fail after hours."""
    packages = {name: METHODS[name].requires for name in options.methods}
    missing = {name: [p for p in needed if find_spec(p) is None] for name, needed in packages.items()}
    problems = [f"{name} needs the packages {', '.join(found)}" for name, found in missing.items() if found]
    if options.trajectories is None:
        learning = sorted({name for name, _ in pending if METHODS[name].from_recordings})
        problems += [f"{name} learns from recorded adapters: give --trajectories FOLDER" for name in learning]
    if problems:
        raise SystemExit("; ".join(problems) + ".")


def named_policy(text: str) -> tuple[str, str]:
    """A name and a folder; the name is that of a method of a policy, or of none."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"NAME=FOLDER is expected, got {text!r}.")
    if name in METHODS and name not in FROM_POLICY:
        raise argparse.ArgumentTypeError(f"{name} does not come from a policy; {', '.join(FROM_POLICY)} do.")
    return name, folder


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
    parser.add_argument(
        "--policies",
        nargs="*",
        type=named_policy,
        default=[],
        metavar="NAME=FOLDER",
        help="other policies in the same weight space: seeds of `ours` or `ours_raw`, or raw under another name",
    )
    parser.add_argument("--trajectories", type=Path, help="recordings, for the methods that learn from them")
    parser.add_argument("--full-data-rows", type=int, default=2000, help="most training rows of adamw_full_data")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; where the base model is, in all processes")
    parser.add_argument("--processes", type=int, default=1, help="cells at once, each process with --threads threads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file; results/compare[_SPLIT].json by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that are started
    torch.set_num_threads(options.threads)
    subject = (options.policy, options.base_model, options.device)
    budget = Budget(options.steps, options.episodes, min(100, options.steps), options.validation_episodes)
    settings = {
        "split": options.split,
        "policy": describe_policy(load_setting(options.policy, options.base_model).policy),
        "draws": options.draws,
        "max_test": options.max_test,
        "full_data_rows": options.full_data_rows,
        "budget": vars(budget),
    }
    check_settings(options.work, settings)
    wanted = list(cells(options))
    foreign = [cell.policy for cell in wanted if cell.policy and not same_space(cell.policy, options)]
    if foreign:
        raise SystemExit(f"These policies are not in the compared policy's weight space: {sorted(set(foreign))}.")
    names = options.tasks or split_of(options.split).test
    trainings = {cell.fit: file_of(cell.fit, options.work) for cell in wanted if cell.fit}
    trainings = {one: target for one, target in trainings.items() if not target.exists()}
    check_available(list(trainings), options)
    common = options.split, budget, subject, options.trajectories
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for title, jobs in (
            ("training", lambda: [pool.submit(fit, *one, *common, target) for one, target in trainings.items()]),
            ("task", lambda: [pool.submit(score_task, name, wanted, options) for name in names]),
        ):
            started = jobs()
            for number, job in enumerate(as_completed(started), 1):
                print(f"[{title} {number}/{len(started)}] {job.result()}", flush=True)
    tasks = {name: json.loads((options.work / "tasks" / f"{name}.json").read_text()) for name in names}
    found = sorted(set.intersection(*(set(task) for task in tasks.values())), key=order_of)
    numbers = sorted({shots_of(key) for key in found})
    domains = {name: task for name, task in tasks.items() if name in NEW_DOMAINS}
    result = {
        "benchmark": "compare",
        "settings": settings,
        "environment": environment(),
        "trained": {
            target.stem: {key: float(tensors[key]) for key in ("minutes", "validation_loss") if key in tensors}
            for target in sorted((options.work / "fits").glob("*.safetensors"))
            if (tensors := load_file(target))
        },
        "shots": {str(shots): summarise(tasks, found, shots, of=families()) for shots in numbers},
        "new_domains": {str(shots): summarise(domains, found, shots) for shots in numbers} if domains else {},
        "tasks": {name: {key: task[key] for key in found} for name, task in tasks.items()},
    }
    if target := result_file(of_split("compare", options.split), options.output, whole=not options.tasks):
        write_json(target, result)
    for shots, methods in result["shots"].items():
        print(f"{shots} examples per class")
        for name, row in methods.items():
            seconds = "" if row["seconds"] is None else f"  {row['seconds']:6.2f} s"
            print(f"  {name:36} {100 * row['accuracy']:5.1f} %{seconds}")


if __name__ == "__main__":
    main()

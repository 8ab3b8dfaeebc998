"""What a benchmark measures and where it ran: the policy with its base model, and the record in every result file."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from text_suite import load_base_model

from lohp_peft import LoHpPolicy
from lohp_peft.tasks import TextEncoder

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "lohp-peft")


def load_subject(policy: str, base_model: str):
    """Policy, base model and tokenizer."""
    return LoHpPolicy.from_pretrained(policy), *load_base_model(base_model)


def encoder_of(policy: LoHpPolicy, model, tokenizer, dtype: torch.dtype | None = None) -> TextEncoder:
    """Base model in the policy's weight space, as the policy was trained; many texts a pass on an accelerator."""
    config = policy.config
    return TextEncoder(
        model,
        tokenizer,
        policy.space,
        pooling=config.pooling,
        max_length=config.max_text_length,
        batch_size=64 if model.device.type == "cpu" else 512,
        dtype=dtype,
    )


def describe_policy(policy: LoHpPolicy) -> dict[str, Any]:
    """Which policy it was, by the content of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    about = {name: getattr(policy.config, name) for name in ("preset", "policy_steps")}
    return {**about, "sha256": digest.hexdigest()}


def environment() -> dict[str, Any]:
    """Date, commit, machine and versions; no paths."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def bootstrap_interval(
    differences: Sequence[float], groups: Sequence[str] | None = None, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean, tasks drawn with replacement; with `groups` these are, each with all of its tasks."""
    found: dict[int | str, list[float]] = {}
    for key, value in zip(groups or range(len(differences)), differences, strict=True):
        found.setdefault(key, []).append(value)
    total = torch.tensor([sum(values) for values in found.values()], dtype=torch.float64)
    count = torch.tensor([len(values) for values in found.values()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(total), (resamples, len(total)), generator=generator)
    drawn = total[rows].sum(1) / count[rows].sum(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def with_interval(values: Sequence[float], families: Sequence[str] | None = None) -> dict[str, Any]:
    """Their mean, and its bootstrap intervals over tasks and over their families."""
    low, high = bootstrap_interval(values)
    over = {"families": list(bootstrap_interval(values, families))} if families else {}
    return {"mean": fmean(values), "low": low, "high": high, **over}


def check_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue a work folder that was begun with other settings."""
    file, settings = work / "settings.json", json.loads(json.dumps(settings))
    if file.exists() and (found := json.loads(file.read_text())) != settings:
        different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        raise SystemExit(f"{work} was begun with other settings ({', '.join(different)}); give another work folder.")
    write_json(file, settings)


def write_json(target: Path, content: Any) -> None:
    """Write a JSON file at once or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(target)


def seeds_of(work: Path, name: str) -> list[dict[str, Any]]:
    """The finished training seeds of one part of a suite, files `NAME-SEED.json`, in their order."""
    return sorted((json.loads(file.read_text()) for file in work.glob(f"{name}-*.json")), key=lambda run: run["seed"])


def mean_of_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's scores of several training seeds: their mean draw by draw, and each seed's accuracy."""
    per_draw = [fmean(values) for values in zip(*(row["per_draw"] for row in rows), strict=True)]
    return {
        "accuracy": fmean(per_draw),
        "per_draw": per_draw,
        "accuracy_of_seeds": [row["accuracy"] for row in rows],
    }


def result_file(name: str, output: Path | None, whole: bool) -> Path | None:
    """Where a result goes: what was asked for, else the published one; a part of a suite never takes its place."""
    if output is None and not whole:
        print(f"No result file: this was not all of {name}. Give --output to write one.")
        return None
    return output or RESULTS / f"{name}.json"


def of_split(name: str, split: str) -> str:
    """The name of a suite's result on a split."""
    return name if split == "test" else f"{name}_{split}"


def _commit() -> str | None:
    """The commit of the working tree, marked when the tree differs from it; `None` outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    generated = (f":(top,exclude){path}" for path in ("benchmarks/results", "benchmarks/README.md", "README.md"))
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *generated)
    return f"{commit}+changes" if commit and changed else commit


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

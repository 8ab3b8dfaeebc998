"""Which of PEFT's tests concern a method: those with it among their parameters, or in their code."""

from types import CodeType, FunctionType
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType


def concerns(item: Any, config_cls: type) -> bool:
    """Whether a collected test uses `config_cls`, by a parameter or by a name in its code."""
    parameters = list(_flat(item.callspec.params.values())) if hasattr(item, "callspec") else []
    if any(_is(value, config_cls) for value in parameters):
        return True
    if any(_is(value, PeftConfig) for value in parameters):
        return False
    definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    fixtures = [definition.func for definitions_ in definitions for definition in definitions_]
    functions = [getattr(item.function, "__func__", item.function), *fixtures]
    return any(_uses(function, config_cls, item.cls, set()) for function in functions)


def _is(value: Any, config_cls: type) -> bool:
    return issubclass(value, config_cls) if isinstance(value, type) else isinstance(value, config_cls)


def _flat(values: Any):
    for value in values:
        if isinstance(value, list | tuple | set | frozenset):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value


def _uses(function: Any, config_cls: type, owner: type | None, seen: set) -> bool:
    """Whether a function, or one of its own module or class that it calls, names the class or PEFT's list of methods."""
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    if any(_is(value, config_cls) for value in _flat(values)):
        return True
    found = [function.__globals__.get(name, getattr(owner, name, None)) for name in _names(function.__code__)]
    if config_cls in [value for value in found if isinstance(value, type)] or PeftType in found:
        return True
    near = [
        value
        for value in [*found, *_flat(values)]
        if getattr(value, "__module__", None) in (function.__module__, getattr(owner, "__module__", None))
    ]
    return any(_uses(value, config_cls, owner, seen) for value in near)


def _names(code: CodeType):
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

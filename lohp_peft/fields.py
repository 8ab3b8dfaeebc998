"""What the fields of a configuration say of themselves, and what all whole numbers among them have to be."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, TypeVar

Config = TypeVar("Config")
SEEDS = 2**63
"""How many there are; a generation's further draws add to one."""


def is_number(value: Any, finite: bool = True) -> bool:
    """Whether a value is an int or a float of Python, which JSON can hold, and not NaN.

    Args:
        value: The value.
        finite: Whether what is infinite as a float is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max if finite else value == value


def take_whole_numbers(config: Any, names: Sequence[str] = ()) -> None:
    """Make Python's own ints of a dataclass's whole numbers, such as numpy's, which JSON cannot hold.

    Args:
        config: The dataclass.
        names: Its fields; all annotated `int` or `int | None` by default.

    Raises:
        ValueError: Listing every value that is no whole number.
    """
    wrong = {}
    for item in fields(config):
        kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        value = getattr(config, item.name)
        wanted = item.name in names if names else kind in ("int", "int | None")
        if not wanted or (value is None and "None" in kind):
            continue
        if isinstance(value, Integral) and not isinstance(value, bool):
            object.__setattr__(config, item.name, int(value))  # frozen or not
        else:
            wrong[item.name] = value
    if wrong:
        raise ValueError(f"{type(config).__name__}: whole numbers are needed, got {wrong}.")


def check_switches(config: Any) -> None:
    """Refuse what is no bool in a dataclass's fields annotated so: a text such as "false" would count as true.

    Args:
        config: The dataclass.

    Raises:
        ValueError: Listing every such value.
    """
    kinds = {item.name: item.type for item in fields(config)}
    wrong = {
        n: x for n, kind in kinds.items() if kind in (bool, "bool") and not isinstance(x := getattr(config, n), bool)
    }
    if wrong:
        raise ValueError(f"{type(config).__name__}: true or false is needed, got {wrong}.")


def document_fields(cls: type[Config]) -> type[Config]:
    """The dataclass `cls` with the `help` of its fields as the `Args` of its docstring."""
    if cls.__doc__ is not None:  # as it is under `python -OO`
        text, raises, errors = inspect.cleandoc(cls.__doc__).partition("\n\nRaises:")
        entries = (f"    {field.name}: {field.metadata['help']}" for field in fields(cls))  # type: ignore[arg-type]
        cls.__doc__ = "\n".join([f"{text}\n\nArgs:", *entries]) + raises + errors
    return cls

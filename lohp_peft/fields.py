"""What the fields of a configuration say of themselves, in one place for the command line and for `help()`."""

import inspect
from dataclasses import fields
from typing import TypeVar

Config = TypeVar("Config")


def document_fields(cls: type[Config]) -> type[Config]:
    """The dataclass `cls` with the `help` of its fields as the `Args` of its docstring."""
    if cls.__doc__ is not None:  # as it is under `python -OO`
        text, raises, errors = inspect.cleandoc(cls.__doc__).partition("\n\nRaises:")
        entries = (f"    {field.name}: {field.metadata['help']}" for field in fields(cls))  # type: ignore[arg-type]
        cls.__doc__ = "\n".join([f"{text}\n\nArgs:", *entries]) + raises + errors
    return cls

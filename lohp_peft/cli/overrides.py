"""A configuration dataclass from a YAML file and command-line overrides."""

import difflib
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from rich.console import Console
from rich.table import Table

Config = TypeVar("Config")


class _Text(str):
    """A value from the command line, not yet read as YAML."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error, and so is an alias, by which few lines can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"alias *{self.peek_event().anchor}; write its value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ValueError(
                    f"the key in line {key_node.start_mark.line + 1} must be text, got {type(key).__name__}"
                )
            if key in seen:
                raise ValueError(f"key {key!r} is repeated in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-3 for text because it has no point, 010 for eight and 1:30 for ninety.
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)$",
    "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
}
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _UniqueKeyLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789"))


def read_config(
    cls: type[Config], file: str | Path | None = None, arguments: Sequence[str] = (), sets: Sequence[str] = ()
) -> Config:
    """Build `cls` from a YAML file, overridden by command-line arguments.

    Args:
        cls: A dataclass; its fields may be dataclasses themselves, addressed with dots.
        file: YAML mapping of field names to values, or `None`.
        arguments: What the verb did not know: `--field value`, `--field=value`, or `--field` alone for a switch.
        sets: Entries of `--set field=value`.

    Returns:
        The configuration; every field not named keeps its default.

    Raises:
        ValueError: Naming every unknown, repeated, missing or ill-typed key at once; unknown ones with the nearest
            valid key.
    """
    values = _read_yaml(Path(file)) if file is not None else {}
    problems: list[str] = []
    seen: set[str] = set()
    for key, text in [*_pairs(arguments, problems), *_assignments(sets, problems)]:
        if key in seen:
            problems.append(f"`{key}` is given more than once")
            continue
        seen.add(key)
        _insert(values, key.split("."), text)
    both = sorted(key for key in seen if any(other.startswith(f"{key}.") for other in seen))
    problems += [f"`{key}` is given as a whole and in parts" for key in both]
    config = _construct(cls, values, "", problems)
    if problems:
        raise ValueError(f"{cls.__name__}: " + "; ".join(problems) + ".")
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"Configuration {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"Configuration {path} must be a mapping of field names to values, got {type(values).__name__}."
        )
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        twice = sorted(key for key in named if sum(str(k).replace("-", "_") == key for k in values) > 1)
        raise ValueError(f"Configuration {path} gives {', '.join(f'`{key}`' for key in twice)} more than once.")
    return named


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text; a `ValueError` says what is wrong with it."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _pairs(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, _Text]]:
    """Split `--field value`, `--field=value` and `--switch`; a negative number is a value."""
    pairs, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            problems.append(f"unexpected argument {option!r} (overrides are spelled --field value)")
            continue
        key, equals, text = option[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs.append((key.replace("-", "_"), _Text(text)))
    return pairs


def _assignments(sets: Sequence[str], problems: list[str]) -> list[tuple[str, _Text]]:
    pairs = []
    for entry in sets:
        key, equals, text = entry.partition("=")
        if equals:
            pairs.append((key.strip().replace("-", "_"), _Text(text)))
        else:
            problems.append(f"`--set` takes field=value, got {entry!r}")
    return pairs


def _insert(values: dict[str, Any], path: list[str], text: _Text) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[path[-1]] = text


def _construct(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}
    before = len(problems)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            problems.append(f"unknown key `{prefix}{key}`{_suggestion(str(key), list(known))}")
            continue
        try:
            arguments[key] = _coerce(value, hints[key], f"{prefix}{key}", problems)
        except _Mismatch as error:
            problems.append(f"`{prefix}{key}` {error}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"`{prefix}{name}` is required")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        problems.append(str(error).rstrip("."))
        return None


def show_fields(cls: type) -> None:
    """Print the fields of a configuration as options, with their defaults."""
    table = Table("option", "meaning", "default", title=f"Fields of {cls.__name__}", title_justify="left")
    for field in fields(cls):
        if field.init:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            default = "" if default is None or default is MISSING else default
            shown = ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
            table.add_row(f"--{field.name.replace('_', '-')}", str(field.metadata.get("help", "")), shown)
    Console().print(table)


def _suggestion(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean `{nearest[0]}`?" if nearest else f" (valid keys: {', '.join(known)})"


class _Mismatch(Exception):
    """A value that does not fit its field; the text says what is expected."""


def _coerce(value: Any, hint: Any, key: str, problems: list[str]) -> Any:
    """Fit a YAML value, or a text of the command line, to the annotation of its field."""
    if isinstance(value, _Text):
        return _coerce_text(value, hint, key, problems)
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first(value, options, key, problems)
    if origin is Literal:
        if value in options:
            return value
        raise _Mismatch(f"must be one of {list(options)}, got {value!r}")
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _Mismatch(f"must be a mapping, got {value!r}")
        return _construct(hint, value, f"{key}.", problems)
    kind = origin or hint
    if kind in (int, float):
        return _number(value, kind)
    if kind in (bool, str):
        if isinstance(value, kind):
            return value
        raise _Mismatch(f"must be {'true or false' if kind is bool else 'text'}, got {value!r}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch(f"must be a mapping, got {value!r}")
        inner = options[1] if len(options) == 2 else Any
        return {name: _coerce(item, inner, f"{key}.{name}", problems) for name, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Sequence | set | frozenset):
        if not isinstance(value, list | tuple):
            raise _Mismatch(f"must be a list, got {value!r}")
        inner = options[0] if options else Any
        items = [_coerce(item, inner, key, problems) for item in value]
        return kind(items) if kind in (tuple, set, frozenset) else items
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _Mismatch(f"must be {getattr(kind, '__name__', kind)}, got {value!r}")


def _coerce_text(text: _Text, hint: Any, key: str, problems: list[str]) -> Any:
    if hint is str:
        return str(text)
    value = _yaml_or_text(str(text))
    try:
        return _coerce(value, hint, key, problems)
    except _Mismatch:
        # a number where text is wanted, or a list written without brackets
        items = str(text).split(",")
        for other in (str(text), [_yaml_or_text(item) for item in items], items):
            try:
                return _coerce(other, hint, key, problems)
            except _Mismatch:
                continue
        raise


def _yaml_or_text(text: str) -> Any:
    try:
        return _parse_yaml(text)
    except ValueError:
        return text


def _first(value: Any, options: Sequence[Any], key: str, problems: list[str]) -> Any:
    """The first alternative of a union that fits without conversion, else the first that fits at all."""
    if value is None and type(None) in options:
        return None
    some = [option for option in options if option is not type(None)]
    wanted = []
    for option in sorted(some, key=lambda option: type(value) is not option):
        try:
            return _coerce(value, option, key, problems)
        except _Mismatch as error:
            wanted.append(str(error).partition(", got")[0].removeprefix("must be "))
    wanted += ["null"] * (len(some) < len(options))
    raise _Mismatch(f"must be {' or '.join(dict.fromkeys(wanted))}, got {value!r}")


def _number(value: Any, kind: type) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Mismatch(f"must be {wanted}, got {value!r}")
    try:
        number = float(value)  # of a quoted number, too
    except (ValueError, OverflowError):
        raise _Mismatch(f"must be {wanted}, got {value!r}") from None
    if kind is float:
        return number
    if not number.is_integer():
        raise _Mismatch(f"must be {wanted}, got {value!r}")
    return value if isinstance(value, int) else int(number)

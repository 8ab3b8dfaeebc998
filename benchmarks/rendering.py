"""Numbers and tables as the READMEs show them."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def with_error(row: Mapping[str, Any]) -> str:
    error = row.get("standard_error")
    return percent(row["accuracy"]) + ("" if error is None else f" +- {100 * error:.1f}")


def where(result: Mapping[str, Any]) -> str:
    """Date, machine and commit in a few words."""
    found = result["environment"]
    commit = f", commit {found['commit'][:10]}" if found["commit"] else ""
    return f"{found['date']}, {found['cores']} {found['device'].upper()} cores, torch {found['versions']['torch']}{commit}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *rows))


def interval(difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in points; empty where there is none."""
    if difference is None:
        return ""
    return f"{signed(difference['mean'])} [{signed(difference['low'])}, {signed(difference['high'])}]"

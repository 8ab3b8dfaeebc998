"""A labelled text task: its rows, its splits, and seeded draws of a support set."""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from lohp_peft.files import parse_json
from lohp_peft.warn import warn


@dataclass(frozen=True)
class Examples:
    """Labelled texts of one task, for instance a support set.

    Args:
        texts: `n` texts.
        labels: `n` class indices in `range(len(label_names))`.
        label_names: One name a class. Names are never read by the policy.
        texts_b: `n` second texts for pair tasks, or `None`.

    Raises:
        ValueError: When the lengths differ, a text or name is no string, names repeat, or a label is no int or out of range.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, ...]
    texts_b: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("texts", "labels", "label_names", "texts_b"):
            if (values := getattr(self, name)) is not None and not isinstance(values, tuple):
                object.__setattr__(self, name, tuple(values))
        sides = {"labels": len(self.labels)}
        if self.texts_b is not None:
            sides["texts_b"] = len(self.texts_b)
        wrong = {name: size for name, size in sides.items() if size != len(self.texts)}
        if wrong:
            raise ValueError(f"Examples need one entry per text: {len(self.texts)} texts, but got {wrong}.")
        texts = {"texts": self.texts, "label_names": self.label_names, "texts_b": self.texts_b or ()}
        unread = {name: sorted({type(x).__name__ for x in xs if not isinstance(x, str)}) for name, xs in texts.items()}
        if unread := {name: found for name, found in unread.items() if found}:
            raise ValueError(f"Examples hold strings, got {unread}.")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError(f"Label names must differ, got {list(self.label_names)}.")
        kinds = sorted({type(y).__name__ for y in self.labels if not isinstance(y, Integral)})
        if kinds:
            raise ValueError(f"Labels must be class indices, ints, got {', '.join(kinds)}.")
        object.__setattr__(self, "labels", tuple(map(int, self.labels)))  # numpy's integers have no JSON
        bad = sorted({y for y in self.labels if not 0 <= y < len(self.label_names)})
        if bad:
            raise ValueError(
                f"Labels must be in 0..{len(self.label_names) - 1} ({len(self.label_names)} names), got {bad}."
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def n_classes(self) -> int:
        """Number of classes, with or without examples."""
        return len(self.label_names)

    @property
    def targets(self) -> torch.Tensor:
        """Class indices, int64, shape (n,)."""
        return torch.tensor(self.labels, dtype=torch.long)

    def select(self, index: Iterable[int]) -> "Examples":
        """The rows at `index`, in that order; the classes stay as they are."""
        rows = [int(i) for i in index]
        texts_b = None if self.texts_b is None else tuple(self.texts_b[i] for i in rows)
        return Examples(
            tuple(self.texts[i] for i in rows), tuple(self.labels[i] for i in rows), self.label_names, texts_b
        )

    def read(self) -> list[tuple[str, str | None]]:
        """What is read of every row: its text and, of a pair, the second one."""
        return list(zip(self.texts, self.texts_b or [None] * len(self), strict=True))

    def distinct_rows(self) -> list[int]:
        """The sorted positions of every row once: of rows with the same texts and the same label the first."""
        first = {row: i for i, row in reversed(list(enumerate(zip(self.read(), self.labels, strict=True))))}
        return sorted(first.values())

    def distinct(self) -> "Examples":
        """The rows at `distinct_rows`."""
        rows = self.distinct_rows()
        return self if len(rows) == len(self) else self.select(rows)

    def with_labels(self, labels: Sequence[int], label_names: Sequence[str] | None = None) -> "Examples":
        """The same texts under other labels.

        Args:
            labels: `n` class indices.
            label_names: One name a class; the same ones by default.
        """
        names = self.label_names if label_names is None else tuple(label_names)
        return Examples(self.texts, tuple(int(y) for y in labels), names, self.texts_b)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> "Examples":
        """Build from rows `{text[, text_b], label}`: a list of dicts or a `datasets.Dataset`.

        Labels may be strings or ints; the classes are the sorted distinct values. Where a dataset names the classes of its
        ints (`datasets.ClassLabel`) they are all of these, in that order, with examples or without.

        Args:
            rows: The rows.

        Returns:
            The examples.

        Raises:
            TypeError: When `rows` are no rows, such as a path or a mapping of columns.
            ValueError: Naming what no row has, or every malformed row: no text, an empty text, no label or none of the dataset's
                classes, or pairs mixed with single texts.
        """
        if isinstance(rows, str | bytes | Path | Mapping) or hasattr(rows, "to_dict") and hasattr(rows, "columns"):
            raise TypeError(
                f"Examples are rows {{'text', 'label'}}, got {type(rows).__name__}. Read a file with `Task.from_jsonl`, make rows of "
                "a table with `table.to_dict('records')`."
            )
        named = getattr((getattr(rows, "features", None) or {}).get("label"), "names", None)
        rows = list(rows)
        columns = {str(name) for row in rows if isinstance(row, Mapping) for name in row}
        if columns and (missing := [name for name in ("text", "label") if name not in columns]):
            raise ValueError(f"Rows need 'text' and 'label', but none has {missing}; rename {sorted(columns)[:20]}.")
        problems = []
        pair = bool(rows) and isinstance(rows[0], Mapping) and rows[0].get("text_b") is not None
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                problems.append(f"row {i}: expected a mapping with 'text' and 'label', got {type(row).__name__}")
            elif not _is_text(row.get("text")) or not row["text"].strip():
                problems.append(f"row {i}: 'text' must be a non-empty string, got {row.get('text')!r}")
            elif not _is_index(row.get("label")) and not _is_text(row.get("label")):
                problems.append(f"row {i}: 'label' must be a string or an int, got {row.get('label')!r}")
            elif named and not (_is_index(row["label"]) and 0 <= row["label"] < len(named)):
                problems.append(
                    f"row {i}: 'label' must be in 0..{len(named) - 1}, the classes of its column, got {row['label']}"
                )
            elif (row.get("text_b") is not None) != pair or (pair and not _is_text(row["text_b"])):
                problems.append(
                    f"row {i}: 'text_b' must be a string in all rows or in none, got {row.get('text_b')!r}"
                )
        if not problems and len({_is_text(row["label"]) for row in rows}) > 1:
            problems.append(
                f"labels must be all strings or all ints, got {sorted({type(row['label']).__name__ for row in rows})}"
            )
        if problems:
            raise ValueError(f"{len(problems)} malformed support rows: " + "; ".join(problems[:20]))
        values = range(len(named)) if named else sorted({row["label"] for row in rows})
        index = {value: i for i, value in enumerate(values)}
        return cls(
            tuple(row["text"] for row in rows),
            tuple(index[row["label"]] for row in rows),
            tuple(named or map(str, values)),
            tuple(row["text_b"] for row in rows) if pair else None,
        )


@dataclass(frozen=True)
class Task:
    """A named task with splits.

    Args:
        name: Unique name.
        examples: All rows.
        splits: One split name per row, such as `"train"` or `"test"`.
        family: Kind of task, used to choose the wrong-task control from another family.
        licence: Licence of the data, printed in the policy's card.

    Raises:
        ValueError: When there is not one split entry a row.
    """

    name: str
    examples: Examples
    splits: tuple[str, ...]
    family: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if len(self.splits) != len(self.examples):
            raise ValueError(f"Task {self.name!r} has {len(self.examples)} rows but {len(self.splits)} split entries.")

    @classmethod
    def from_jsonl(cls, path: str | Path, *, name: str | None = None, family: str = "", licence: str = "") -> "Task":
        """Read a file of rows `{text[, text_b], label, split}`, plain or gzipped.

        Args:
            path: The file.
            name: The file's name up to its first dot by default.
            family: See `Task`.
            licence: See `Task`.

        Returns:
            The task.

        Raises:
            ValueError: Naming the file and every malformed line.
        """
        path = Path(path)
        rows = read_json_lines(path)
        if not rows:
            raise ValueError(f"Task file {path} is not JSON lines: it has no rows.")
        try:
            examples = Examples.from_rows(rows)
        except ValueError as error:
            raise ValueError(f"Task file {path}: {error}") from error
        splits = tuple(row.get("split", "train") for row in rows)
        problems = [f"row {i}: 'split' must be a string, got {x!r}" for i, x in enumerate(splits) if not _is_text(x)]
        if problems:
            raise ValueError(f"Task file {path}: {'; '.join(problems[:20])}")
        return cls(name or path.name.split(".")[0], examples, splits, family, licence)

    def split(self, name: str) -> Examples:
        """The rows of one split; every class keeps its index.

        Args:
            name: Name of the split.

        Raises:
            ValueError: When the split has no rows.
        """
        rows = [i for i, split in enumerate(self.splits) if split == name]
        if not rows:
            raise ValueError(
                f"Task {self.name!r} has no rows in split {name!r}; its splits are {sorted(set(self.splits))}."
            )
        return self.examples.select(rows)

    def draw_support(self, shots: int, seed: int, split: str = "train") -> Examples:
        """A seeded draw of up to `shots` examples a class; classes with fewer give what they have.

        Args:
            shots: Examples per class.
            seed: Seed of the draw.
            split: Where to draw from.

        Raises:
            ValueError: When the split has no rows, or `shots` is below 1.
        """
        return draw(self.split(split), shots, seed)


def _is_text(value: Any) -> bool:
    """Whether a value is a string that has a UTF-8 form; JSON can spell halves of characters, which have none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_index(value: Any) -> bool:
    """Whether a value is an int, numpy's among them, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines, plain or gzipped; empty lines are left out.

    Raises:
        ValueError: Naming the file, when it cannot be read, and every malformed line.
    """
    rows, problems = [], []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(parse_json(line.rstrip("\n")))
                except json.JSONDecodeError as error:  # whose own line is that in a text of one line
                    problems.append(f"line {number}: {error.msg} at column {error.colno}")
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    if problems:
        raise ValueError(f"{path} is not JSON lines: " + "; ".join(problems[:20]) + ".")
    return rows


def draw(examples: Examples, shots: int, seed: int) -> Examples:
    """A seeded class-balanced draw of up to `shots` rows a class, in random order.

    Args:
        examples: Where to draw from.
        shots: Examples per class.
        seed: Seed of the draw.

    Raises:
        ValueError: When `shots` is below 1.
    """
    if shots < 1:
        raise ValueError(f"`shots` must be at least 1 example per class, got {shots}.")
    generator = torch.Generator().manual_seed(seed)
    targets = examples.targets
    chosen = []
    for label in range(examples.n_classes):
        rows = (targets == label).nonzero().flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
    index = torch.cat(chosen)
    return examples.select(index[torch.randperm(len(index), generator=generator)].tolist())


Support = Examples | Iterable[Mapping[str, Any]]


def read_support(support: Support) -> Examples:
    """Check a support set, in which examples of the same texts and label count once; a warning names classes without any.

    Args:
        support: `Examples`, a `datasets.Dataset`, or rows `{text[, text_b], label}`.

    Returns:
        The examples.

    Raises:
        ValueError: When it is empty, malformed, or has fewer than two classes with examples.
    """
    examples = support if isinstance(support, Examples) else Examples.from_rows(support)
    present = sorted(set(examples.labels))
    if len(present) < 2:
        names = [examples.label_names[i] for i in present]
        raise ValueError(
            f"A support set needs examples of at least two classes, got {len(examples)} examples of {len(present)} "
            f"({', '.join(names) or 'none'})."
        )
    if empty := [name for i, name in enumerate(examples.label_names) if i not in present]:
        warn(f"There are no examples of {', '.join(empty)}, which will not be predicted.")
    distinct = examples.distinct()  # one that is left out, or lies in the other half, must not be there a second time
    if repeated := len(examples) - len(distinct):
        warn(f"{repeated} of {len(examples)} examples repeat others and count once.")
    return distinct


def balanced_rows(targets: torch.Tensor, most: int, seed: int) -> torch.Tensor:
    """The sorted indices of a seeded draw of at most `most` rows, equally many of every class, but two a class.

    Args:
        targets: Class indices, shape (n,).
        most: Rows.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    present = targets.unique()
    per_class = max(2, most // len(present))
    drawn = []
    for label in present:
        rows = (targets == label).nonzero().flatten()
        drawn.append(rows[torch.randperm(len(rows), generator=generator)][:per_class])
    return torch.cat(drawn).sort().values

"""Progress of long work: a bar on a terminal, and in a file, where a bar would show nothing before its end, lines."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

EVERY = 30.0
"""Seconds between lines (Ours: a line a step would bury the rest of a log)."""


class _Note(ProgressColumn):
    """What there is to say of a task, last, so that a narrow terminal cuts it and not the count."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("note", "")), no_wrap=True, overflow="ellipsis", style="dim")


class Work(Progress):
    """A rich progress bar with a `note` for each task.

    Args:
        console: Where it goes.
        disable: Show nothing, as in all but the main process.
    """

    def __init__(self, console: Console, disable: bool = False) -> None:
        whole = Column(no_wrap=True)
        super().__init__(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            _Note(),
            console=console,
            disable=disable,
        )
        self._last = time.monotonic()

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        """See `rich.progress.Progress`."""
        super().update(task_id, **kwargs)
        self._line(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress`."""
        super().advance(task_id, advance)
        self._line(task_id)

    def _line(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.disable or self.console.is_terminal or now - self._last < EVERY:
            return
        self._last = now
        task = next(task for task in self.tasks if task.id == task_id)
        total = "?" if task.total is None else f"{task.total:.0f}"
        left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
        note = f" | {task.fields['note']}" if task.fields.get("note") else ""
        line = f"{task.description} {task.completed:.0f}/{total} after {task.elapsed or 0:.0f} s{left}{note}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

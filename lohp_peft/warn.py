"""Warnings that name the line of the user's program that led to them, however deep they are said."""

import sys
import warnings
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).parent)
BETWEEN = ("contextlib", "torch", "peft")
"""Packages that a call of the user's goes through, by a decorator or a function that calls ours."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the innermost line that is in none of this package, PEFT and torch.

    Args:
        message: What is told.
        category: Its kind.
    """
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and _passed(frame):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _passed(frame: FrameType) -> bool:
    inside = Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    return inside or str(frame.f_globals.get("__name__", "")).partition(".")[0] in BETWEEN

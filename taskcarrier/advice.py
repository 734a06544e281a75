"""Warnings to the program, at its own line that called the library."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_PACKAGE = __name__.partition(".")[0]


def advise(message: str) -> None:
    """Give a `UserWarning`."""
    level = 1
    frame: FrameType | None = sys._getframe()  # before Python 3.12 nothing else finds the line
    while frame is not None and _package_of(frame) == _PACKAGE:
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]

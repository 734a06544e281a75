"""Notes on the user's exceptions, which may refuse them; and words for messages and warnings.

A frozen dataclass can be an exception, and so can a class whose ``__setattr__`` raises. Python
itself reads and sets the cause, context and traceback of an exception without asking its class;
`get_base_attribute` and `set_base_attribute` do the same.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from taskcarrier.system.exceptions import set_base_attribute
from taskcarrier.system.interrupts import is_raised_by_handler


def add_note(error: BaseException, note: str) -> None:
    """Add a note to a user's exception, even if its class refuses attributes.

    An exception that takes no notes (its `add_note` raises, or it has ``__notes__`` of its own)
    stays as it is.
    """
    try:
        try:
            error.add_note(note)
        except Exception as trouble:
            if is_raised_by_handler(trouble):
                raise
            if type(error).add_note is BaseException.add_note:
                set_base_attribute(error, "__notes__", [*getattr(error, "__notes__", []), note])
    except Exception as trouble:
        if is_raised_by_handler(trouble):
            raise


def get_text(error: BaseException) -> str:
    """Return the text of an exception, even if its ``__str__`` raises."""
    try:
        return str(error)
    except Exception as trouble:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<str() raised {type(trouble).__name__}>"


# Words in errors about read-only arrays: numba's, which are TypeErrors, then NumPy's ValueErrors.
_READ_ONLY_WORDS = (("Cannot modify readonly", "No matching definition"), ("read-only",))


READ_ONLY_ADVICE = (
    "what every call is to write to must be made by taskcarrier.empty or share (or be a memmap) "
    "and be carried by func: enclosed by it, or functools.partial(func, array)"
)
"""Advice for users whose function writes to a read-only array."""


def is_read_only_error(error: BaseException) -> bool:
    """Return whether an error says that an array is read-only."""
    if not isinstance(error, (ValueError, TypeError)):
        return False
    text = get_text(error)
    return any(words in text for words in _READ_ONLY_WORDS[isinstance(error, ValueError)])


def describe_items(start: int, stop: int, noun: str = "item") -> str:
    """Return a range of a list's items in words.

    >>> describe_items(5, 6), describe_items(5, 9), describe_items(5, 9, "fit")
    ('item 5', 'items 5:9', 'fits 5:9')
    """
    return f"{noun} {start}" if stop == start + 1 else f"{noun}s {start}:{stop}"


def count_noun(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is needed.

    >>> count_noun(1, "range"), count_noun(1200, "range")
    ('1 range', '1,200 ranges')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


_PACKAGE = __name__.partition(".")[0]


def warn_user(message: str) -> None:
    """Give a `UserWarning` that points to the line outside this package that made the call."""
    level = 1
    # Before Python 3.12 there is no other way to find that line.
    frame: FrameType | None = sys._getframe()
    while frame is not None and _get_package(frame) == _PACKAGE:
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _get_package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]

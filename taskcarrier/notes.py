"""What is added to the user's exceptions, which may refuse it.

A frozen dataclass can be an exception, and so can a class whose ``__setattr__`` raises. Python
itself reads and sets their cause, context and traceback without asking the class; so do `get_plainly`
and `set_plainly`.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from taskcarrier.system.exceptions import set_plainly
from taskcarrier.system.interrupts import is_of_the_program


def add_note(error: BaseException, note: str) -> None:
    """Add a note to a user's exception, whatever its class does about attributes.

    One that wants no notes (it has an `add_note` that raises, or ``__notes__`` of its own) stays
    what it is.
    """
    try:
        try:
            error.add_note(note)
        except Exception as trouble:
            if is_of_the_program(trouble):
                raise
            if type(error).add_note is BaseException.add_note:
                set_plainly(error, "__notes__", [*getattr(error, "__notes__", []), note])
    except Exception as trouble:
        if is_of_the_program(trouble):
            raise


def text_of(error: BaseException) -> str:
    """The exception's text, whatever its ``__str__`` does."""
    try:
        return str(error)
    except Exception as trouble:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<str() raised {type(trouble).__name__}>"


# What errors say of read-only arrays: numba's, which are TypeErrors, then NumPy's ValueErrors.
_OF_READ_ONLY = (("Cannot modify readonly", "No matching definition"), ("read-only",))


CARRIED = (
    "what every call is to write to must be made by taskcarrier.empty or share (or be a memmap) "
    "and be carried by func: enclosed by it, or functools.partial(func, array)"
)
"""What to do instead of writing to read-only arrays."""


def is_of_read_only(error: BaseException) -> bool:
    """Whether an error says that an array is read-only."""
    if not isinstance(error, (ValueError, TypeError)):
        return False
    text = text_of(error)
    return any(words in text for words in _OF_READ_ONLY[isinstance(error, ValueError)])


def describe_items(start: int, stop: int) -> str:
    """A range of a list's items in words.

    >>> in_words(5, 6), in_words(5, 9)
    ('item 5', 'items 5:9')
    """
    return f"item {start}" if stop == start + 1 else f"items {start}:{stop}"


def count_noun(n: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "range"), counted(1200, "range")
    ('1 range', '1,200 ranges')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


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

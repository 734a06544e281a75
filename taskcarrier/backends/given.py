"""What the user gave, and what comes of it: functions and exceptions, handled with care."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from taskcarrier.notes import add_note, text_of

__all__ = ["Call", "add_note", "text_of"]


@dataclass(frozen=True)
class Call:
    """What the user gave: the function and what every call of it gets."""

    func: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


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

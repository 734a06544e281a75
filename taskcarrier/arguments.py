"""Checks of arguments that several calls have."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from taskcarrier.memory.memmaps import check_whole, find_shared
from taskcarrier.memory.strides import is_mostly_gaps, without_gaps


def check_chunksize(chunksize: object) -> int | None:
    """`chunksize` as a positive int or None; anything else is an error naming it."""
    if chunksize is None:
        return None
    value = check_integer(chunksize, "chunksize", "a positive integer or None")
    if value < 1:
        raise ValueError(f"chunksize must be at least 1, got {value}")
    return value


def check_integer(value: object, name: str, expected: str) -> int:
    """`value` as an int; a `TypeError` says what the argument `name` is expected to be."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # whatever the user passed
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {value!r} ({kind})") from None


def check_extras(
    args: object, kwargs: object, name: str = "kwargs"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` of a call; the latter may have another name."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of further arguments, got {args!r}")
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TypeError(f"{name} must be a dict of keyword arguments or None, got {kwargs!r}")
    for value in (*args, *kwargs.values()):
        if isinstance(value, np.ndarray):
            check_whole(value)
    # As for the mapped arrays: processes would get copies of other strides than threads see.
    gathered = {key: without_wide_gaps(value) for key, value in kwargs.items()}
    return tuple(map(without_wide_gaps, args)), gathered


def check_callable(func: object, name: str = "func") -> None:
    """An error if `func` cannot be called."""
    if not callable(func):
        remedy = "; the function comes first, then the data" if name == "func" else ""
        raise TypeError(
            f"{name} must be callable, got an object of type {type(func).__name__}{remedy}"
        )


def arrays_within(value: object) -> Iterator[np.ndarray]:
    """A value if it is an array, or the arrays in a container, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from arrays_within(one)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from arrays_within(one)


def read_only(value: Any) -> Any:
    """The value, through which nothing of the caller can be written to.

    A read-only view of an array, also within tuples; a copy of a record.
    """
    if isinstance(value, np.ndarray) and value.flags.writeable:
        value = value.view()
        value.flags.writeable = False
    elif isinstance(value, np.void):
        value = value.copy()
    elif type(value) is tuple:
        value = tuple(map(read_only, value))
    return value


def own_or_read_only(value: Any, *, own: bool) -> Any:
    """The same, or a copy of the array where it is to be one's own."""
    if own and isinstance(value, np.ndarray):
        return np.array(value)
    return read_only(value)


def without_wide_gaps(array: Any) -> Any:
    """The array itself, or if it is mostly gaps, a copy without them.

    Workers of every backend see the copy, so that what a function adds up over such a view does
    not depend on the backend. Views of what is shared already stay as they are, in every
    backend too.
    """
    if type(array) not in {np.ndarray, np.memmap} or array.dtype.hasobject:
        return array  # a copy would lose what a subclass has beside its values
    if not is_mostly_gaps(array):
        return array
    return array if find_shared(array) else without_gaps(array)


ON_ERROR = ("raise", "collect", "fill")


def check_on_error(on_error: object, allowed: tuple[str, ...] = ON_ERROR) -> str:
    """`on_error` as the user may pass it."""
    if not isinstance(on_error, str) or on_error not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"on_error must be one of {words}, got {on_error!r}")
    return on_error

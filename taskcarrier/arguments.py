"""Checks of arguments that several calls share."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from taskcarrier.memory.memmaps import check_not_cut_off, find_shared
from taskcarrier.memory.strides import copy_without_gaps, is_mostly_gaps


def check_chunksize(chunksize: object) -> int | None:
    """Return `chunksize` as a positive int or None; raise an error that names it otherwise."""
    if chunksize is None:
        return None
    value = check_integer(chunksize, "chunksize", "a positive integer or None")
    if value < 1:
        raise ValueError(f"chunksize must be at least 1, got {value}")
    return value


def check_integer(value: object, name: str, expected: str) -> int:
    """Return `value` as an int.

    If it is none, a `TypeError` says what the argument `name` is expected to be.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]  # may be anything
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {value!r} ({kind})") from None


def check_extras(
    args: object, kwargs: object, name: str = "kwargs"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `args` and `kwargs` of a call, checked; errors call the latter by `name`."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of further arguments, got {args!r}")
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TypeError(f"{name} must be a dict of keyword arguments or None, got {kwargs!r}")
    for value in (*args, *kwargs.values()):
        if isinstance(value, np.ndarray):
            check_not_cut_off(value)
    # As with the mapped arrays: processes would get copies whose strides differ from those that
    # threads see.
    keywords = {key: drop_wide_gaps(value) for key, value in kwargs.items()}
    return tuple(map(drop_wide_gaps, args)), keywords


def check_callable(func: object, name: str = "func") -> None:
    """Raise a `TypeError` if `func` cannot be called."""
    if not callable(func):
        remedy = "; the function comes first, then the data" if name == "func" else ""
        raise TypeError(
            f"{name} must be callable, got an object of type {type(func).__name__}{remedy}"
        )


def iterate_arrays(value: object) -> Iterator[np.ndarray]:
    """Yield `value` if it is an array, or all arrays in a container, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from iterate_arrays(member)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for member in value:
            yield from iterate_arrays(member)


def make_read_only(value: Any) -> Any:
    """Return `value` in a form through which the caller's memory cannot be written to.

    Arrays, also those in tuples, become read-only views; a record becomes a copy.
    """
    if isinstance(value, np.ndarray) and value.flags.writeable:
        value = value.view()
        value.flags.writeable = False
    elif isinstance(value, np.void):
        value = value.copy()
    elif type(value) is tuple:
        value = tuple(map(make_read_only, value))
    return value


def copy_or_make_read_only(value: Any, *, own: bool) -> Any:
    """Return a copy of an array if `own` is set, else what `make_read_only` returns."""
    if own and isinstance(value, np.ndarray):
        return np.array(value)
    return make_read_only(value)


def drop_wide_gaps(array: Any) -> Any:
    """Return the array itself, or a copy without gaps if it is mostly gaps.

    Workers of every backend see the copy, so a sum over such a view does not depend on the
    backend. Views of memory that is shared already stay as they are, also in every backend.
    """
    if type(array) not in {np.ndarray, np.memmap} or array.dtype.hasobject:
        return array  # a copy would lose what a subclass holds besides its values
    if not is_mostly_gaps(array):
        return array
    return array if find_shared(array) else copy_without_gaps(array)


ON_ERROR = ("raise", "collect", "fill")


def check_on_error(on_error: object, allowed: tuple[str, ...] = ON_ERROR) -> str:
    """Return `on_error`; raise a `ValueError` unless it is one of the allowed words."""
    if not isinstance(on_error, str) or on_error not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"on_error must be one of {words}, got {on_error!r}")
    return on_error

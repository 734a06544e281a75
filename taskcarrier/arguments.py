"""Checks of arguments that several calls share."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from typing import Any


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


def check_iterable(value: Any, name: str, expected: str) -> Iterator[Any]:
    """Return an iterator over `value`.

    If there is none, a `TypeError` says what the argument `name` is expected to be.
    """
    try:
        return iter(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {value!r} ({kind})") from None


def check_folder(folder: Any, name: str) -> None:
    """Raise a `TypeError` that names the argument unless `folder` is a path or None."""
    if folder is not None and not isinstance(folder, (str, bytes, os.PathLike)):
        kind = type(folder).__name__
        raise TypeError(f"{name} must be the path of a folder or None, got {folder!r} ({kind})")


def check_callable(func: object, name: str = "func") -> None:
    """Raise a `TypeError` if `func` cannot be called."""
    if not callable(func):
        remedy = "; the function comes first, then the data" if name == "func" else ""
        raise TypeError(
            f"{name} must be callable, got an object of type {type(func).__name__}{remedy}"
        )


ON_ERROR = ("raise", "collect", "fill")


def check_on_error(on_error: object, allowed: tuple[str, ...] = ON_ERROR) -> str:
    """Return `on_error`; raise a `ValueError` unless it is one of the allowed words."""
    if not isinstance(on_error, str) or on_error not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"on_error must be one of {words}, got {on_error!r}")
    return on_error

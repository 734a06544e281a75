"""How long calls of a function took in the caller, so that the next one can be known to be short.

The key is the function's code: a lambda that is made again for each call is known. What is kept are
a few numbers for each of the last functions, and nothing is decided by it but the way that a short
call takes.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

# The functions that are remembered; when there are more, all are forgotten.
_MOST = 1000
# A call of more times the items or bytes is not predicted from the last one.
_FURTHEST = 8


class _Last(NamedTuple):
    seconds: float
    n_items: int
    nbytes: int


_last: dict[Any, _Last] = {}


def find_key(func: Any) -> Any:
    """Return what stands for a function: its code, if it is written in Python."""
    while isinstance(func, (partial, MethodType)):
        func = func.func if isinstance(func, partial) else func.__func__
    return func.__code__ if isinstance(func, FunctionType) else (type(func), id(func))


def remember(func: Any, seconds: float, n_items: int, nbytes: int) -> None:
    """Remember how long a call took in the caller."""
    if len(_last) >= _MOST:
        _last.clear()
    _last[find_key(func)] = _Last(seconds, max(1, n_items), max(1, nbytes))


def forget(func: Any) -> None:
    """Forget what a function took: its last call was handed over, or failed."""
    _last.pop(find_key(func), None)


def predict(func: Any, n_items: int, nbytes: int) -> float | None:
    """Return the seconds that a call will take in the caller; None if that is not known.

    >>> remember(len, 0.001, 100, 800)
    >>> predict(len, 200, 800), predict(len, 100, 80), predict(len, 10_000, 800)
    (0.002, 0.001, None)
    """
    last = _last.get(find_key(func))
    if last is None:
        return None
    times = max(n_items / last.n_items, nbytes / last.nbytes)
    return last.seconds * max(1.0, times) if times <= _FURTHEST else None

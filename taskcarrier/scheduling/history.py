"""How long the last calls of a function took: in the caller alone, and shared with workers.

By that the next call can be known to be short, and a hand-over that did not pay is not repeated.
What stands for it is the function's code and the objects that it refers to: a lambda that is made
again for each call is known, and one that calls another model is another function. What is kept are
a few numbers for each of the last functions. They decide on where a call runs, never on results.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from taskcarrier.scheduling.gil import GilWaits

# The functions that are remembered; when there are more, all are forgotten.
_MOST = 1000
# A call of more times the items or bytes is not predicted from the last one.
_FURTHEST = 8


# Calls that are compared have at most this many times the items and bytes of each other.
_SIMILAR = 2
_NUMBERS = {bool, int, float, complex}
# After so many calls in the caller alone, workers are tried again.
_CALLS_ALONE = 20


class _Last(NamedTuple):
    seconds: float
    n_items: int
    nbytes: int

    def count_times(self, n_items: int, nbytes: int) -> float:
        """Return how many times larger another call is."""
        return max(n_items / self.n_items, nbytes / self.nbytes)

    def predict(self, n_items: int, nbytes: int) -> float | None:
        """Return the seconds that another call will take; None if it is much larger."""
        times = self.count_times(n_items, max(1, nbytes))
        return self.seconds * max(1.0, times) if times <= _FURTHEST else None

    def is_similar(self, n_items: int, nbytes: int) -> bool:
        """Return whether another call is of a similar size."""
        least = min(n_items / self.n_items, nbytes / self.nbytes)
        return self.count_times(n_items, nbytes) <= _SIMILAR and least * _SIMILAR >= 1


class _Shared:
    """The last call that was shared with workers."""

    def __init__(self, last: _Last, *, has_paid: bool) -> None:
        self.last = last
        self.has_paid = has_paid
        self.n_calls_alone = 0


class _LeftAlone:
    """A call that began in the caller, and for which workers would have saved nothing."""

    def __init__(self, last: _Last) -> None:
        self.last = last
        self.n_calls = 0  # since then


class Known(NamedTuple):
    """What stands for a function; all that takes a function here takes this, too.

    Attributes
    ----------
    facts : tuple
        All that decides on how long it takes; hashable.
    """

    facts: tuple[Any, ...]


_last_alone: dict[Any, _Last] = {}
_last_shared: dict[Any, _Shared] = {}
_left_alone: dict[Any, _LeftAlone] = {}
_gil_waits: dict[Any, tuple[_Last, GilWaits]] = {}
_unaided: set[Any] = set()
_last_busy: dict[Any, _Last] = {}


def find_known(func: Any) -> Known:
    """Return what stands for a function: its code and what it refers to, if it is Python's."""
    if isinstance(func, Known):
        return func
    if isinstance(func, partial):
        values = (*func.args, *func.keywords.values())
        return Known((find_known(func.func), *func.keywords, *map(id, values)))
    if isinstance(func, MethodType):
        return Known((find_known(func.__func__), id(func.__self__)))
    if not isinstance(func, FunctionType):
        return Known((type(func), id(func)))
    code, names = func.__code__, func.__globals__
    referents = [names[name] for name in code.co_names if name in names]
    for cell in func.__closure__ or ():
        try:
            referents.append(cell.cell_contents)
        except ValueError:  # it is not bound yet
            referents.append(cell)
    referents += func.__defaults__ or ()
    return Known((code, *map(id, referents)))


def find_known_in_threads(func: Any) -> Known:
    """Return what stands for a function in threads that were asked for.

    Several threads keep each other from cores and memory: what they took says little of the caller
    alone.
    """
    return Known(("threads", find_known(func)))


def find_known_kernel(kernel: Any, args: tuple[Any, ...]) -> Known | None:
    """Return what stands for a kernel with further arguments; None if these are not numbers.

    A number often says how much is to be done for an item.
    """
    if not {*map(type, args)} <= _NUMBERS:
        return None
    return Known((find_known(kernel), *args))


def remember(func: Any, seconds: float, n_items: int, nbytes: int) -> None:
    """Remember how long a call took in the caller alone."""
    if len(_last_alone) >= _MOST:
        _last_alone.clear()
    _last_alone[find_known(func)] = _Last(seconds, max(1, n_items), max(1, nbytes))


def remember_left_alone(func: Any, seconds: float, n_items: int, nbytes: int) -> None:
    """Remember that workers would have saved nothing of a call."""
    if len(_left_alone) >= _MOST:
        _left_alone.clear()
    last = _Last(seconds, max(1, n_items), max(1, nbytes))
    _left_alone[find_known(func)] = _LeftAlone(last)


def is_left_alone(func: Any, n_items: int, nbytes: int) -> bool:
    """Return whether workers would have saved nothing of a similar call.

    After some calls, that is to be found out again.
    """
    known, size = find_known(func), (max(1, n_items), max(1, nbytes))
    found = _left_alone.get(known)
    if found is None or not found.last.is_similar(*size):
        return False
    found.n_calls += 1
    if found.n_calls > _CALLS_ALONE:
        del _left_alone[known]
        return False
    return True


def remember_help(func: Any, *, was_unaided: bool) -> None:
    """Remember whether the caller did a call before threads came that it had woken."""
    if not was_unaided:
        _unaided.discard(find_known(func))
        return
    if len(_unaided) >= _MOST:
        _unaided.clear()
    _unaided.add(find_known(func))


def was_unaided(func: Any) -> bool:
    """Return whether the caller did the last call in threads before these came."""
    return find_known(func) in _unaided


def remember_shared(
    func: Any, seconds: float, n_items: int, nbytes: int, *, has_paid: bool
) -> None:
    """Remember how long a call took that was shared, and whether it seemed to save time."""
    if len(_last_shared) >= _MOST:
        _last_shared.clear()
    last = _Last(seconds, max(1, n_items), max(1, nbytes))
    _last_shared[find_known(func)] = _Shared(last, has_paid=has_paid)


def forget(func: Any) -> None:
    """Forget what a function took: its last call failed."""
    known = find_known(func)
    _last_alone.pop(known, None)
    _unaided.discard(known)


def predict(func: Any, n_items: int, nbytes: int) -> float | None:
    """Return the seconds that a call will take in the caller; None if that is not known.

    >>> remember(len, 0.001, 100, 800)
    >>> predict(len, 200, 800), predict(len, 100, 80), predict(len, 10_000, 800)
    (0.002, 0.001, None)
    """
    last = _last_alone.get(find_known(func))
    return None if last is None else last.predict(n_items, nbytes)


def remember_busy(func: Any, seconds: float, n_items: int, nbytes: int) -> None:
    """Remember for how long a function kept worker processes busy that were asked for."""
    if len(_last_busy) >= _MOST:
        _last_busy.clear()
    _last_busy[find_known(func)] = _Last(seconds, max(1, n_items), max(1, nbytes))


def forget_busy(func: Any) -> None:
    """Forget it: the last call failed, or workers died."""
    _last_busy.pop(find_known(func), None)


def predict_busy(func: Any, n_items: int, nbytes: int) -> float | None:
    """Return for how many seconds a call will keep workers busy; None if that is not known."""
    last = _last_busy.get(find_known(func))
    return None if last is None else last.predict(n_items, nbytes)


def find_alone_seconds(func: Any, n_items: int, nbytes: int) -> float:
    """Return how long a call may take for the caller to do it alone; 0 if workers may help.

    They did not help if a call that was shared took longer than one of a similar size that was not.
    If there was none, it is tried. After some calls, workers are tried again.
    """
    known, size = find_known(func), (max(1, n_items), max(1, nbytes))
    shared, alone = _last_shared.get(known), _last_alone.get(known)
    if shared is None or not shared.last.is_similar(*size):
        return 0.0
    shared.n_calls_alone += 1
    if shared.n_calls_alone > _CALLS_ALONE:
        del _last_shared[known]
        return 0.0
    if alone is None or not alone.is_similar(*size):
        is_better_alone = not shared.has_paid
    else:
        is_better_alone = alone.seconds < shared.last.seconds
    return _SIMILAR * shared.last.seconds if is_better_alone else 0.0


def find_gil_waits(func: Any, n_items: int, nbytes: int) -> GilWaits:
    """Return what is known of a function and the interpreter's lock, to which the call adds.

    With chunks of another size, the same function may hold the lock more or less.
    """
    if len(_gil_waits) >= _MOST:
        _gil_waits.clear()
    known, size = find_known(func), (max(1, n_items), max(1, nbytes))
    found = _gil_waits.get(known)
    if found is None or not found[0].is_similar(*size):
        found = _gil_waits[known] = _Last(0.0, *size), GilWaits()
    return found[1]

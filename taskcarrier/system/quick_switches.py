"""A moment in which threads get the interpreter's lock soon, though another computes in Python.

A thread that wants the lock while another runs Python code gets it after the switch interval, 5 ms.
One that imports modules or starts processes wants it again after each read of a file: then 0.1 s of
such work takes a second. With a shorter interval, it takes little longer than alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.locks import ModuleLock

# Some ten times what a change of threads takes.
_QUICK_SECONDS = 0.0002
# The interpreter keeps whole microseconds, and rounds down.
_HALF_A_STEP = 5e-7

_lock = ModuleLock()
_intervals: list[float] = []  # for each moment that goes on: the one before the first of them


@contextmanager
def quick_switches() -> Iterator[None]:
    """Return a context; while it is open, threads get the lock soon. Contexts may overlap."""
    with _lock:
        # Noted before it is set, and until it is set back: a child may be forked in between.
        usual = _intervals[0] if _intervals else sys.getswitchinterval()
        _intervals.append(usual)
        if len(_intervals) == 1:
            sys.setswitchinterval(min(_QUICK_SECONDS, usual) + _HALF_A_STEP)
    try:
        yield
    finally:
        with _lock:
            # Unless the program has set another one meanwhile.
            is_ours = abs(sys.getswitchinterval() - min(_QUICK_SECONDS, usual)) < 2 * _HALF_A_STEP
            if len(_intervals) == 1 and is_ours:
                sys.setswitchinterval(usual + _HALF_A_STEP)
            _intervals.pop()


def are_switches_quick() -> bool:
    """Return whether such a moment goes on."""
    return bool(_intervals)


def _return_to_usual() -> None:
    """End all moments in a forked child, which has none of the threads that began them."""
    if _intervals:
        sys.setswitchinterval(_intervals[0] + _HALF_A_STEP)
        _intervals.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_return_to_usual)

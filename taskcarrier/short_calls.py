"""Calls that are known to be short: they are run in the caller, and nothing else happens.

A call is known to be short if the last one with its function was, in the caller, and if this one is
of a similar size. What is common to such calls stands here; what they do stands in
`taskcarrier.arrays.short_maps` and `taskcarrier.lists.short_maps`. Whatever is unusual goes the
general way (`taskcarrier.run`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from taskcarrier.report import Report, ReportMaker, WorkerReport
from taskcarrier.scheduling import history
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import is_joblib_configured
from taskcarrier.workers.introspect import releases_gil
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.snapshots import find_state
from taskcarrier.workers.thread_limits import thread_limit

# Calls that are predicted to take more seconds go the general way: it may pay to hand them over,
# and what that way costs is a small part of them. For two workers it pays above 1.3 ms in threads
# and 8 ms in processes (`taskcarrier.workers.hand_overs`).
_MAX_SECONDS_FOR_THREADS = 0.0013
_MAX_SECONDS_FOR_PROCESSES = 0.006
MOST_SECONDS = 0.02
"""A call that takes more seconds than this is no short one after all; arbitrary."""

R = TypeVar("R")


def is_short(func: Any, n_items: int, nbytes: int) -> bool:
    """Return whether a call is known to be short, and may be run in this thread as it is."""
    seconds = history.predict(func, n_items, nbytes)
    return (
        seconds is not None
        and seconds <= _MAX_SECONDS_FOR_PROCESSES
        and (seconds <= _MAX_SECONDS_FOR_THREADS or not releases_gil(func))
        and not this_thread.is_worker
        and not is_joblib_configured()
    )


def is_count(value: Any, least: int = -sys.maxsize) -> bool:
    """Return whether an option is None or a plain number that is not 0, from `least` on."""
    return value is None or (type(value) is int and value >= least and value != 0)


class Patience:
    """The time that a call may take which was taken for short.

    After that it goes the general way, where workers may help, unless its function may have changed
    what it carries: workers would not get it as it was.
    """

    def __init__(self, func: Any) -> None:
        self._func = func
        self._deadline = perf_counter() + MOST_SECONDS

    @property
    def has_ended(self) -> bool:
        """Whether the call shall go the general way now."""
        if perf_counter() < self._deadline:
            return False
        self._deadline = math.inf
        return find_state(Call(self._func)) == []


def run_short(
    func: Any,
    run: Callable[[], R],
    grid: ChunkGrid,
    nbytes: int,
    keep_report: Callable[[ReportMaker], None],
) -> R:
    """Run a short call in the calling thread: ``run()``, which calls `func`; return its result.

    `run` returns None for a call that is to be run the general way after all.
    """
    result: Any = None
    begin = perf_counter()
    try:
        with thread_limit.open():
            this_thread.is_worker = True
            result = run()
    finally:
        this_thread.is_worker = False
        seconds = perf_counter() - begin
        if result is None:
            history.forget(func)
        make = partial(make_short_report, grid, seconds, seconds, has_ended=result is not None)
        keep_report(make)
    if result is not None:
        history.remember(func, seconds, grid.n_items, nbytes)
    return result  # type: ignore[no-any-return]  # what `run` returns


def make_short_report(
    grid: ChunkGrid, seconds: float, busy_seconds: float, *, has_ended: bool = True
) -> Report:
    """Return the report of a short call."""
    n_ranges = len(grid) if grid.n_items else 0
    idle_seconds = max(0.0, seconds - busy_seconds)
    caller = WorkerReport("caller", n_ranges, grid.n_items, busy_seconds, idle_seconds)
    cost = f"an item took {busy_seconds / max(1, grid.n_items):.2g} s in the caller"
    return Report(
        backend="sequential",
        reason=f"{cost}: workers would have saved nothing",
        balance="serial",
        n_jobs=1,
        chunksize=grid.chunksize,
        ranges=n_ranges,
        items=grid.n_items,
        bytes_copied=0,
        seconds=seconds,
        workers=(caller,) if has_ended else (),
        notes=() if has_ended else ("ended by an error; what was done is not counted",),
    )

"""Crews: the caller and threads of a pool, which run the units of one short call together.

Who owns what. The crew owns the units that are left, and every worker takes the lowest of them. The
threads are woken at once, by an invitation (`taskcarrier.workers.threads`), but a call may be over
before one of them runs: another thread of the program may hold the interpreter's lock. So the
caller takes all invitations back when no unit is left, and waits for those threads only that were
faster. What a unit gives is for the work itself to keep: nothing of the crew outlives the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic_ns
from typing import Any, Protocol

from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import load_joblib
from taskcarrier.workers.parent_state import ParentState
from taskcarrier.workers.pools import thread_pool
from taskcarrier.workers.records import Raised, WorkerStats
from taskcarrier.workers.threads import LONGEST_WAIT, Invitation, ThreadPool

Unit = tuple[int, int]
"""The items ``(start, stop)`` of one or more chunks."""


RunUnit = Callable[[int, int], bool]
"""A function that runs a unit, in any thread, and returns whether the call is still usual."""


class Work(Protocol):
    """The work of a call, in units.

    Attributes
    ----------
    outcomes : dict
        If the call is unusual, what the function has given so far, by the start of a chunk or the
        number of an item: results, and `Raised`. The general way goes on with it.
    """

    outcomes: dict[int, Any]

    def run_unit(self, start: int, stop: int) -> bool:
        """Run a unit, in any thread; return whether the call is still usual."""


def list_units(grid: ChunkGrid, n_chunks: int) -> list[Unit]:
    """Return all units, the last one first; each has `n_chunks` chunks.

    Popping one is a call into C: none is lost, nor taken by two threads.
    """
    size, n_items = n_chunks * grid.chunksize, grid.n_items
    return [(start, min(start + size, n_items)) for start in range(0, n_items, size)][::-1]


def run_units(units: list[Unit], chunksize: int, run_unit: RunUnit, stats: WorkerStats) -> None:
    """Run units in this worker, until none is left or one is unusual."""
    pid = os.getpid()
    begin = monotonic_ns()
    try:
        while units:
            try:
                start, stop = units.pop()
            except IndexError:  # another worker has taken the last one
                break
            is_usual = run_unit(start, stop)
            if os.getpid() != pid:
                # The function has forked, and both processes came back. One is the worker.
                os._exit(1)
            if not is_usual:
                units.clear()
            stats.n_ranges += -((start - stop) // chunksize)
            stats.n_items += stop - start
    finally:
        stats.busy_ns = monotonic_ns() - begin


def run_crew(
    units: list[Unit], chunksize: int, work: Work, n_workers: int, n_jobs: int
) -> list[WorkerStats]:
    """Run units by the caller and threads of a pool of `n_jobs`, `n_workers` in all.

    Return what each worker did, the caller first.
    """
    load_joblib()  # or the function could load it, where it would not be serial
    with thread_pool(n_jobs) as pool:
        pool.ensure_free(range(1, n_workers))
        return _Crew(units, chunksize, work).run(pool, n_workers)


class _Crew:
    """The workers of one call."""

    def __init__(self, units: list[Unit], chunksize: int, work: Work) -> None:
        self._units = units
        self._chunksize = chunksize
        self._work = work
        self._state = ParentState.capture()
        self._ended: SimpleQueue[WorkerStats] = SimpleQueue()

    def run(self, pool: ThreadPool, n_workers: int) -> list[WorkerStats]:
        """Run all units.

        When interrupted, threads stop at their next unit. Those that are still in one do not come
        back to the pool, and what they add to the call is seen by nobody.
        """
        caller, *others = [WorkerStats(n, f"thread {n}") for n in range(n_workers)]
        caller.name = "caller"
        invitations: list[Invitation] = []
        is_over = False
        try:
            for stats in others:
                join = partial(self._join, stats)
                invitations.append(pool.invite(stats.worker, join, self._ended.put))
            copy_context().run(self._run_units, caller)
            if (error := self._find_interrupt()) is not None:
                raise_again(error)
            self._wait(invitations)
            is_over = True
        finally:
            error = None  # its traceback refers to this frame
            if not is_over:
                self._units.clear()
                for invitation in invitations:
                    invitation.take_back()
                pool.drop_stuck_workers()
        return [caller, *others]

    def _run_units(self, stats: WorkerStats) -> None:
        self._state.apply(in_process=False)
        run_units(self._units, self._chunksize, self._work.run_unit, stats)

    def _find_interrupt(self) -> BaseException | None:
        """Return the exception that came from outside while the caller was in a unit, if any."""
        for outcome in list(self._work.outcomes.values()):
            if isinstance(outcome, Raised) and (
                isinstance(outcome.error, KeyboardInterrupt) or is_raised_by_handler(outcome.error)
            ):
                return outcome.error
        return None

    def _join(self, stats: WorkerStats) -> WorkerStats:
        """Run units in a thread of the pool."""
        try:
            self._run_units(stats)
        except BaseException:  # noqa: BLE001  # a unit is missing, and the general way runs it
            self._units.clear()
        return stats

    def _wait(self, invitations: list[Invitation]) -> None:
        """Wait for the threads that have begun; the others do not begin any more."""
        n_busy = sum(not invitation.take_back() for invitation in invitations)
        while n_busy:
            with suppress(Empty):
                self._ended.get(timeout=LONGEST_WAIT)
                n_busy -= 1

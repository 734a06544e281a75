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
from time import perf_counter
from typing import Any, Protocol

from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import load_joblib
from taskcarrier.workers.parent_state import ParentState, own_decimal_context
from taskcarrier.workers.pools import thread_pool
from taskcarrier.workers.records import Raised, WorkerStats
from taskcarrier.workers.threads import LONGEST_WAIT, Invitation, ThreadPool

ALONE_SECONDS = 0.0002
"""A call that takes less is over about when a thread would be at work that was woken at its
beginning (`python -m bench empty`)."""

Unit = tuple[int, int]
"""The items ``(start, stop)`` of one or more chunks."""


RunUnit = Callable[[int, int], bool]
"""A function that runs a unit, in any thread, and returns whether the call is still usual."""


class CrewWork(Protocol):
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
    units = [(start, start + size) for start in range(0, n_items, size)]
    units[-1] = units[-1][0], n_items
    units.reverse()
    return units


def run_units(
    units: list[Unit],
    chunksize: int,
    run_unit: RunUnit,
    stats: WorkerStats,
    seconds: float | None = None,
) -> None:
    """Run units in this worker, until none is left or one is unusual; or for so many seconds."""
    getpid, n_items = os.getpid, 0
    pid = getpid()
    begin = perf_counter()
    try:
        while units:
            try:
                start, stop = units.pop()
            except IndexError:  # another worker has taken the last one
                break
            is_usual = run_unit(start, stop)
            if getpid() != pid:
                # The function has forked, and both processes came back. One is the worker.
                os._exit(1)
            if not is_usual:
                units.clear()
            n_items += stop - start
            if seconds is not None and perf_counter() > begin + seconds:
                break
    finally:
        stats.n_items += n_items
        stats.n_ranges = -(-stats.n_items // chunksize)  # all chunks are whole, but for the last
        stats.busy_ns += int(1e9 * (perf_counter() - begin))


def run_crew(
    units: list[Unit],
    chunksize: int,
    work: CrewWork,
    sizes: tuple[int, int],
    *,
    begins_alone: bool,
) -> list[WorkerStats]:
    """Run units by the caller and threads; return what each worker did, the caller first.

    `sizes` are the number of workers and that of the threads of their pool. With `begins_alone`
    threads are woken only if the caller is not ready after `ALONE_SECONDS`.
    """
    n_workers, n_threads = sizes
    crew = _Crew(units, chunksize, work, n_workers)
    if begins_alone:
        crew.run_in_caller(ALONE_SECONDS)
    if units:
        load_joblib()  # or the function could load it, where it would not be serial
        with thread_pool(n_threads) as pool:
            pool.ensure_free(range(1, n_workers))
            crew.run(pool)
    return crew.worker_stats


class _Crew:
    """The workers of one call."""

    def __init__(self, units: list[Unit], chunksize: int, work: CrewWork, n_workers: int) -> None:
        self._units = units
        self._chunksize = chunksize
        self._work = work
        self._caller_context = copy_context()  # what the function changes is lost, as in threads
        self._caller_context.run(own_decimal_context)
        self._ended: SimpleQueue[WorkerStats] = SimpleQueue()
        self.worker_stats = [WorkerStats(n, f"thread {n}") for n in range(n_workers)]
        self.worker_stats[0].name = "caller"

    def run(self, pool: ThreadPool) -> None:
        """Run the units that are left.

        When interrupted, threads stop at their next unit. Those that are still in one do not come
        back to the pool, and what they add to the call is not used.
        """
        invitations: list[Invitation] = []
        is_over = False
        try:
            state = ParentState.capture()
            for stats in self.worker_stats[1:]:
                join = partial(self._join, stats, state)
                invitations.append(pool.invite(stats.worker, join, self._ended.put))
            self.run_in_caller()
            self._wait(invitations)
            is_over = True
        finally:
            if not is_over:
                self._units.clear()
                for invitation in invitations:
                    invitation.take_back()
                pool.drop_stuck_workers()

    def run_in_caller(self, seconds: float | None = None) -> None:
        """Run units in the caller, until none is left; or for so many seconds."""
        self._caller_context.run(self._run_units, self.worker_stats[0], seconds)
        error = self._find_interrupt()
        try:
            if error is not None:
                self._work.outcomes.clear()
                raise_again(error)
        finally:
            del error  # its traceback refers to this frame

    def _run_units(self, stats: WorkerStats, seconds: float | None = None) -> None:
        run_units(self._units, self._chunksize, self._work.run_unit, stats, seconds)

    def _find_interrupt(self) -> BaseException | None:
        """Return the exception that came from outside while the caller was in a unit, if any."""
        for outcome in list(self._work.outcomes.values()):
            if isinstance(outcome, Raised) and (
                isinstance(outcome.error, KeyboardInterrupt) or is_raised_by_handler(outcome.error)
            ):
                return outcome.error
        return None

    def _join(self, stats: WorkerStats, state: ParentState) -> WorkerStats:
        """Run units in a thread of the pool."""
        try:
            state.apply(in_process=False)
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

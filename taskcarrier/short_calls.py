"""Calls that are short: their units are run one after the other, and little else happens.

What is common to such calls stands here; what they do stands in `taskcarrier.arrays.short_maps` and
`taskcarrier.lists.short_maps`. Where the caller is the only worker, every usual call is run so. In
threads, and by default, a call is known to be short if the last one with its function was, and if
this one is of a similar size. Whatever is unusual goes the general way (`taskcarrier.run`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol, Self

from taskcarrier.report import Report, ReportMaker, WorkerReport, keep_report
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import Serial
from taskcarrier.scheduling.gil import GilWaits
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.history import Known
from taskcarrier.system.late_imports import is_ending
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import (
    ALIASES,
    OWN,
    Choice,
    Facts,
    count_cores,
    count_workers,
    is_joblib_configured,
)
from taskcarrier.workers.crew import (
    ALONE_SECONDS,
    CrewWork,
    RunUnit,
    list_units,
    run_crew,
    run_units,
)
from taskcarrier.workers.introspect import is_jitted, is_numba_ufunc, releases_gil
from taskcarrier.workers.loop import is_in_worker, this_thread
from taskcarrier.workers.records import WorkerStats
from taskcarrier.workers.snapshots import find_state
from taskcarrier.workers.thread_limits import thread_limit

# Calls that are predicted to take more seconds go the general way: it may pay to hand them over,
# and what that way costs is a small part of them. For two workers it pays above 1.3 ms in threads
# and 8 ms in processes (`taskcarrier.workers.hand_overs`).
_MAX_SECONDS_FOR_THREADS = 0.0013
_MAX_SECONDS_FOR_PROCESSES = 0.006
MOST_SECONDS = 0.02
"""A call that takes more seconds than this is no short one after all; arbitrary."""
# A call has at least so many units, if it has as many chunks; more for more workers. Arbitrary.
_LEAST_UNITS = 16
_UNITS_FOR_WORKER = 4

_WORDS = {**{name: name for name in (*OWN, "auto")}, **ALIASES}
_ASKED_FOR = Choice("sequential", 1, "asked for")
_ONE_WORKER = Choice("sequential", 1, "n_jobs is 1")
_CALLER_FIRST = Choice("sequential", 1, "", begins_in_caller=True)


class ShortSettings(NamedTuple):
    """How to run a call that may be short.

    Attributes
    ----------
    backend : str or None
        Where, in our words.
    n_jobs : int or None
        By how many workers; not 0.
    balance : str
        The name of the balance. Workers of a short call take the next unit under each.
    keep_report : callable
        What keeps the report.
    """

    backend: str | None
    n_jobs: int | None
    balance: str
    keep_report: Callable[[ReportMaker], None]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        """Return the settings in the options of a function; None if they are unusual or wrong."""
        backend, n_jobs = options.get("backend"), options.get("n_jobs")
        balance = options.get("balance", "static")
        if backend is not None:
            backend = _WORDS.get(backend) if type(backend) is str else None
            if backend is None:
                return None
        if type(balance) is not str or balance not in {"static", "dynamic"}:
            return None
        if not is_count(n_jobs):
            return None
        return cls(backend, n_jobs, balance, keep_report)

    def choose(
        self, func: Any, n_items: int, nbytes: int, *, kernel_args: tuple[Any, ...] | None = None
    ) -> tuple[Choice | None, Known | None]:
        """Return where a call is run as a short one; None if it goes the general way.

        This is where that way runs it, with the same reason. By default it is the caller
        (`Choice.begins_in_caller`), if the call is known to be short. The second value is what
        stands for the function in its history; None if that does not count. With `kernel_args`,
        further arguments, the short way can run functions that numba compiles.
        """
        if is_in_worker() or is_joblib_configured():
            return None, None
        is_kernel = is_jitted(func)
        is_refused = is_numba_ufunc(func) or (is_kernel and kernel_args is None)
        choice = self._find_only_choice()
        if choice is not None:
            return None if is_refused else choice, None
        is_in_threads = self.backend == "threading"
        subject = func
        if is_kernel and kernel_args is not None:
            subject = history.find_known_kernel(func, kernel_args)
            if subject is None:
                return None, None
        known = (history.find_known_in_threads if is_in_threads else history.find_known)(subject)
        if is_in_threads and (is_refused or is_ending()):
            return None, known
        return self._choose(func, known, n_items, nbytes), known

    def _find_only_choice(self) -> Choice | None:
        """Return the choice where all is done by the caller; None if workers are possible."""
        if self.backend == "sequential":
            return _ASKED_FOR
        if self.backend is not None and self.backend not in _WORDS:
            return None  # joblib's, which alone knows its workers, and cannot map over arrays
        return _ONE_WORKER if self._count_workers() == 1 else None

    def _count_workers(self) -> int:
        n_jobs = self.n_jobs
        if n_jobs is None or n_jobs < 0:
            n_jobs = count_workers(n_jobs, Facts(cores=count_cores()))
        return n_jobs

    def _choose(self, func: Any, known: Known, n_items: int, nbytes: int) -> Choice | None:
        """Return the choice by what is known of the function; none is in processes."""
        seconds = history.predict(known, n_items, nbytes)
        if self.backend == "threading":
            is_short = seconds is not None and seconds <= MOST_SECONDS
            return Choice("threading", self._count_workers(), "asked for") if is_short else None
        if self.backend not in {None, "auto"}:
            return None
        waits = history.find_gil_waits(known, n_items, nbytes) if self.backend else None
        if seconds is None or seconds > _MAX_SECONDS_FOR_PROCESSES:
            return None
        is_short = (
            seconds <= _MAX_SECONDS_FOR_THREADS
            or not may_use_threads(func, waits)
            or history.is_left_alone(known, n_items, nbytes)
        )
        return _CALLER_FIRST if is_short else None


def may_use_threads(func: Any, waits: GilWaits | None) -> bool:
    """Return whether threads may run a function where they are not asked for.

    With `waits` that is any function that is not known to hold the GIL.
    """
    return releases_gil(func) or (waits is not None and waits.is_fit_for_threads is not False)


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


class ShortWork(CrewWork, Protocol):
    """The work of a short call."""

    def join_results(self) -> Any:
        """Return the result; None if something is unusual or missing: see `outcomes`."""


class ShortCall(NamedTuple):
    """A call that is taken for short.

    Attributes
    ----------
    func : callable
        The user's function.
    known : Known or None
        What stands for it in its history; None if that does not count.
    grid : ChunkGrid
        The chunks; at least one item.
    nbytes : int
        The bytes of the items, if these are arrays.
    choice : Choice
        Where the call is run.
    settings : ShortSettings
        How.
    """

    func: Callable[..., Any]
    known: Known | None
    grid: ChunkGrid
    nbytes: int
    choice: Choice
    settings: ShortSettings

    def run(
        self, work: ShortWork, *, can_join: bool = False, least_units: int = _LEAST_UNITS
    ) -> Any:
        """Run the work, and return its result; None if the call is to go the general way.

        With `can_join` a unit may have several chunks, so that there are no more than `least_units`
        for the caller alone.
        """
        grid, choice = self.grid, self.choice
        n_workers = min(choice.n_jobs, len(grid))
        if n_workers > 1:
            least_units = max(least_units, _UNITS_FOR_WORKER * n_workers)
        units = list_units(grid, max(1, len(grid) // least_units) if can_join else 1)
        result: Any = None
        worker_stats = [WorkerStats(0, "caller")]
        begin = perf_counter()
        try:
            with thread_limit.open():
                this_thread.is_worker = True
                if choice.backend == "threading":
                    worker_stats = run_crew(
                        units,
                        grid.chunksize,
                        work,
                        (n_workers, choice.n_jobs),
                        begins_alone=self._is_done_unaided(),
                    )
                else:
                    run_unit = work.run_unit
                    if choice.begins_in_caller:
                        run_unit = partial(_run_impatiently, run_unit, Patience(self.func))
                    run_units(units, grid.chunksize, run_unit, worker_stats[0])
            result = work.join_results()
        finally:
            this_thread.is_worker = False
            seconds = perf_counter() - begin
            if result is None:
                worker_stats = []
            self.keep_report(seconds, worker_stats)
            busy_ns = sum(stats.busy_ns for stats in worker_stats)
            self.remember(busy_ns / 1e9 if worker_stats else None)
            if choice.backend == "threading" and worker_stats:
                is_unaided = not any(stats.n_items for stats in worker_stats[1:])
                history.remember_help(self.known, was_unaided=is_unaided)
        return result

    def keep_report(self, seconds: float, worker_stats: Sequence[WorkerStats]) -> None:
        """Keep what makes the report, and nothing that the function refers to."""
        balance = self.settings.balance
        make = partial(_make_report, self.grid, self.choice, balance, seconds, worker_stats)
        self.settings.keep_report(make)

    def _is_done_unaided(self) -> bool:
        """Return whether the caller is ready before threads would come that it has woken.

        The last call must have shown that: a function that waits for other threads lets them come.
        """
        if not history.was_unaided(self.known):
            return False
        seconds = history.predict(self.known, self.grid.n_items, self.nbytes)
        return seconds is not None and seconds < ALONE_SECONDS

    def remember(self, seconds: float | None) -> None:
        """Remember what the call took if that decides on the next one; None if it has failed."""
        if self.known is None:
            return
        if seconds is None:
            history.forget(self.known)
        else:
            history.remember(self.known, seconds, self.grid.n_items, self.nbytes)


def _run_impatiently(run_unit: RunUnit, patience: Patience, start: int, stop: int) -> bool:
    return run_unit(start, stop) and not patience.has_ended


def _make_report(
    grid: ChunkGrid,
    choice: Choice,
    balance: str,
    seconds: float,
    worker_stats: Sequence[WorkerStats],
) -> Report:
    """Return the report of a short call; it has ended by an error if there are no stats."""
    n_ranges = len(grid) if grid.n_items else 0
    busy_seconds = [stats.busy_ns / 1e9 for stats in worker_stats]
    reason = choice.reason
    if choice.begins_in_caller:
        item_seconds = sum(busy_seconds) / max(1, grid.n_items)
        reason = (
            f"an item took {item_seconds:.2g} s in the caller: workers would have saved nothing"
        )
    return Report(
        backend=choice.backend,
        reason=reason,
        balance=Serial.name if choice.backend == "sequential" else balance,
        n_jobs=min(choice.n_jobs, len(grid)),
        chunksize=grid.chunksize,
        ranges=n_ranges,
        items=grid.n_items,
        bytes_copied=0,
        seconds=seconds,
        workers=tuple(
            WorkerReport(stats.name, stats.n_ranges, stats.n_items, busy, max(0.0, seconds - busy))
            for stats, busy in zip(worker_stats, busy_seconds, strict=True)
        ),
        notes=() if worker_stats else ("ended by an error; what was done is not counted",),
    )

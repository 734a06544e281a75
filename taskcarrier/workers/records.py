"""What is known of a run: what its workers did, which of them died, what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import PENDING, Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.exceptions import collect_related, set_plainly


@dataclass(eq=False)
class RangeFailure:
    """An exception in one range.

    Attributes
    ----------
    range : tuple of int or None
        ``(start, stop)``; None if it concerns no range, but all of a worker.
    error : BaseException
        What was raised.
    worker : str
        By whom.
    attempt : int
        The attempt number, from 1.
    """

    range: tuple[int, int] | None
    error: BaseException
    worker: str = ""
    attempt: int = 1

    @property
    def place(self) -> int:
        """Where it stands among others: the first item, -1 for all of a worker."""
        return -1 if self.range is None else self.range[0]


class WorkerWarning(NamedTuple):
    """A warning of a worker process."""

    message: Warning | str
    category: type[Warning]
    filename: str
    lineno: int
    module: str | None

    @property
    def key(self) -> tuple[object, ...]:
        """The same for the same warning."""
        return (str(self.message), *self[1:])


@dataclass(eq=False)
class WorkerStats:
    """What one worker did in a run, and how far it came: the last range, in which attempt.

    With it come warnings that a process has not shown itself. Times are nanoseconds of
    ``CLOCK_MONOTONIC``, comparable between processes.
    """

    worker: int
    name: str = ""
    ranges: int = 0
    items: int = 0
    busy_ns: int = 0
    facts: Any = None
    failure: RangeFailure | None = None
    at: tuple[int, int] | None = None
    attempt: int = 1
    warnings: list[WorkerWarning] = field(default_factory=list)


@dataclass(eq=False)
class WorkerDeath:
    """A worker process that ended by itself.

    Attributes
    ----------
    worker, name : int, str
        Which one.
    exitcode : int or None
        As in `multiprocessing.Process.exitcode`: negative for a signal.
    range : tuple of int or None
        ``(start, stop)`` of what it had in hand.
    attempt : int
        The attempt number, from 1.
    was_late : bool
        Whether it was killed because of that.
    """

    worker: int
    name: str
    exitcode: int | None
    range: tuple[int, int] | None
    attempt: int = 1
    was_late: bool = False

    @classmethod
    def of(
        cls,
        worker: int,
        name: str,
        exitcode: int | None,
        held: Attempt | None,
        overdue: tuple[int, int] | None,
    ) -> WorkerDeath:
        """Of a worker with this range in hand, which was killed because of `overdue`, if it was."""
        if held is None:
            return cls(worker, name, exitcode, None)
        return cls(worker, name, exitcode, held[:2], held.attempt, overdue == held[:2])


@dataclass
class RunResult:
    """How a run ended, read while its ledger was its own.

    Attributes
    ----------
    worker_stats : list of WorkerStats
        Of every worker, in order; those of workers that died say what the ledger tells.
    failures : list of RangeFailure
        What the caller has found itself; those of workers are in their accounts.
    deaths : list of WorkerDeath
        All of them.
    fatal : list of WorkerDeath
        Those that were not made good.
    missing : list of (int, int)
        Ranges without a result, ascending, as far as marks tell.
    n_claimed : int
        Chunks below this number were claimed.
    first_proposal : object
        What the workers have settled on; None if nothing.
    is_halted : bool
        Whether workers were asked to stop.
    nbytes_sent : int
        Bytes that were copied for workers on their way, and not into a segment.
    """

    worker_stats: list[WorkerStats]
    n_claimed: int
    first_proposal: Any
    is_halted: bool
    failures: list[RangeFailure] = field(default_factory=list)
    deaths: list[WorkerDeath] = field(default_factory=list)
    fatal: list[WorkerDeath] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    nbytes_sent: int = 0

    @classmethod
    def read(
        cls, worker_stats: list[WorkerStats], ledger: Ledger, grid: ChunkGrid | None = None
    ) -> RunResult:
        """From the ledger of a run that is over, before the pool is lent to another.

        With the grid of a run whose results are in place once they are marked, unmarked ranges
        are missing.
        """
        ran = cls(worker_stats, ledger.n_claimed(), ledger.first_proposal(), ledger.is_halted)
        if grid is not None:
            ran.missing = [grid.range_of(index) for index in ledger.chunks_marked(PENDING)]
        return ran


Where = slice | np.ndarray
"""Items along the mapped axis."""


Fault = tuple[int, int, BaseException]
"""``(start, stop, error)`` of a range that failed."""


@dataclass(eq=False)
class PartialResult:
    """What of a range is for the caller.

    Attributes
    ----------
    results : list of (slice or ndarray of int, object)
        Items whose results were not put in place, and the results.
    faults : list of (int, int, Exception)
        ``(start, stop, error)`` of ranges that failed.
    """

    results: list[tuple[Where, Any]]
    faults: list[Fault]
    _packed: list[tuple[int, int, bytes]] | None = None

    def __reduce__(self) -> Any:
        # Exceptions need care on their way to the caller.
        from taskcarrier.workers.pickled_errors import pickle_error  # noqa: PLC0415  # loads joblib

        if self._packed is None:  # pickling may be tried twice
            self._packed = [
                (start, stop, pickle_error(error)) for start, stop, error in self.faults
            ]
            # Tracebacks refer to frames, frames to their callers, and these to the errors and to
            # chunks: the worker would hold on to shared memory until the next garbage collection.
            for _, _, error in self.faults:
                _forget_tracebacks(error)
        return _unpickle_parts, (self.results, self._packed)


def _forget_tracebacks(error: BaseException) -> None:
    for one in collect_related(error):
        set_plainly(one, "__traceback__", None)


def _unpickle_parts(
    results: list[tuple[Where, Any]], packed: list[tuple[int, int, bytes]]
) -> PartialResult:
    from taskcarrier.workers.pickled_errors import unpickle_error  # noqa: PLC0415  # loads joblib

    return PartialResult(
        results, [(start, stop, unpickle_error(error)) for start, stop, error in packed]
    )


def list_failed_ranges(faults: list[Fault]) -> list[Any]:
    """What is returned of collected errors."""
    from taskcarrier.errors import FailedRange  # noqa: PLC0415  # slow, and rarely needed

    found = [FailedRange(*fault) for fault in faults]
    faults.clear()  # errors refer to frames, and these to the faults
    return found

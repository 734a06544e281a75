"""Records of a run: what its workers did, which of them died, and what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import PENDING, Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.exceptions import collect_related, raise_again, set_base_attribute


@dataclass(eq=False)
class RangeFailure:
    """An exception in one range.

    Attributes
    ----------
    range : tuple of int or None
        ``(start, stop)``; None if it concerns a worker as a whole.
    error : BaseException
        The exception that was raised.
    worker : str
        The name of the worker that raised it.
    attempt : int
        The attempt number, from 1.
    """

    range: tuple[int, int] | None
    error: BaseException
    worker: str = ""
    attempt: int = 1

    @property
    def start(self) -> int:
        """The first item of the range, or -1 for a worker as a whole."""
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
        """A key that is equal for equal warnings."""
        return (str(self.message), *self[1:])


@dataclass(eq=False)
class WorkerStats:
    """What one worker did in a run, with its last range and the attempt number of that.

    `warnings` are those that a process has not shown itself. Times are nanoseconds of
    ``CLOCK_MONOTONIC``, which are comparable between processes.
    """

    worker: int
    name: str = ""
    n_ranges: int = 0
    n_items: int = 0
    busy_ns: int = 0
    facts: Any = None
    failure: RangeFailure | None = None
    last_range: tuple[int, int] | None = None
    attempt: int = 1
    warnings: list[WorkerWarning] = field(default_factory=list)

    def add(self, earlier: WorkerStats) -> None:
        """Count what the same worker did before."""
        self.n_ranges += earlier.n_ranges
        self.n_items += earlier.n_items
        self.busy_ns += earlier.busy_ns
        self.facts = earlier.facts or self.facts


@dataclass(eq=False)
class WorkerDeath:
    """A worker process that ended by itself or was killed.

    Attributes
    ----------
    worker, name : int, str
        The number and name of the worker.
    exitcode : int or None
        As in `multiprocessing.Process.exitcode`: negative for a signal.
    range : tuple of int or None
        ``(start, stop)`` of the range that it had in hand.
    attempt : int
        The attempt number, from 1.
    was_late : bool
        Whether it was killed because that range took too long.
    """

    worker: int
    name: str
    exitcode: int | None
    range: tuple[int, int] | None
    attempt: int = 1
    was_late: bool = False

    @classmethod
    def from_attempt(
        cls,
        worker: int,
        name: str,
        exitcode: int | None,
        held: Attempt | None,
        overdue: tuple[int, int] | None,
    ) -> WorkerDeath:
        """Return the death of a worker with `held` in hand; it was late if that is `overdue`."""
        if held is None:
            return cls(worker, name, exitcode, None)
        return cls(worker, name, exitcode, held[:2], held.number, overdue == held[:2])


@dataclass
class RunResult:
    """How a run ended, read while the ledger still belonged to it.

    Attributes
    ----------
    worker_stats : list of WorkerStats
        The stats of every worker, in order; for workers that died, what the ledger says.
    failures : list of RangeFailure
        The failures that the caller found itself; those of workers are in their stats.
    deaths : list of WorkerDeath
        All deaths of workers.
    unrecovered_deaths : list of WorkerDeath
        The deaths that no further attempt made good.
    missing : list of (int, int)
        Ranges without a result, ascending, as far as marks show.
    first_proposal : object
        The value on which the workers agreed; None if nothing was proposed.
    is_halted : bool
        Whether workers were asked to stop.
    nbytes_sent : int
        The number of bytes that were copied on their way to workers, and not into a segment.
    item_seconds : float
        What an item took in the caller before the rest was handed over; 0 if it was not.
    is_refused : bool
        Whether the rest could not be handed over.
    """

    worker_stats: list[WorkerStats]
    first_proposal: Any
    is_halted: bool
    failures: list[RangeFailure] = field(default_factory=list)
    deaths: list[WorkerDeath] = field(default_factory=list)
    unrecovered_deaths: list[WorkerDeath] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    nbytes_sent: int = 0
    item_seconds: float = 0.0
    is_refused: bool = False

    @classmethod
    def read(
        cls, worker_stats: list[WorkerStats], ledger: Ledger, grid: ChunkGrid | None = None
    ) -> RunResult:
        """Read the ledger of a run that is over, before the pool is lent to another run.

        With `grid`, unmarked chunks are missing; pass it for a run whose results are in place once
        they are marked.
        """
        run_result = cls(worker_stats, ledger.first_proposal(), ledger.is_halted)
        if grid is not None:
            run_result.missing = [grid.range_of(index) for index in ledger.find_marked(PENDING)]
        return run_result


class Raised:
    """What a function has raised, among what others have returned."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def recall(outcomes: dict[int, Any], number: int) -> Any:
    """Return or raise what a function has given already, and forget it."""
    outcome = outcomes.pop(number)
    try:
        if isinstance(outcome, Raised):
            raise_again(outcome.error)
        return outcome
    finally:
        del outcome  # the traceback of an error refers to this frame


Where = slice | np.ndarray
"""Items along the mapped axis."""


class DeliveredFailure(NamedTuple):
    """A failure that goes to the caller among the results, while the run goes on."""

    start: int
    stop: int
    error: BaseException


@dataclass(eq=False)
class PartialResult:
    """The results of a range that go to the caller, with the failures in it.

    Attributes
    ----------
    results : list of (slice or ndarray of int, object)
        Items whose results were not put in place, and the results.
    failures : list of DeliveredFailure
        The ranges that failed, with their errors.
    """

    results: list[tuple[Where, Any]]
    failures: list[DeliveredFailure]
    _pickled_failures: list[tuple[int, int, bytes]] | None = None

    def __reduce__(self) -> Any:
        # Exceptions need special care on their way to the caller.
        from taskcarrier.workers.pickled_errors import pickle_error  # noqa: PLC0415  # loads joblib

        if self._pickled_failures is None:  # pickling may be tried twice
            self._pickled_failures = [
                (start, stop, pickle_error(error)) for start, stop, error in self.failures
            ]
            # Tracebacks refer to frames, frames to their callers, and these to the errors and to
            # chunks: the worker would keep shared memory until the next garbage collection.
            for _, _, error in self.failures:
                _forget_tracebacks(error)
        return _unpickle_parts, (self.results, self._pickled_failures)


def _forget_tracebacks(error: BaseException) -> None:
    for related in collect_related(error):
        set_base_attribute(related, "__traceback__", None)


def _unpickle_parts(
    results: list[tuple[Where, Any]], pickled_failures: list[tuple[int, int, bytes]]
) -> PartialResult:
    from taskcarrier.workers.pickled_errors import unpickle_error  # noqa: PLC0415  # loads joblib

    failures = [
        DeliveredFailure(start, stop, unpickle_error(error))
        for start, stop, error in pickled_failures
    ]
    return PartialResult(results, failures)


def list_failed_ranges(failures: list[DeliveredFailure]) -> list[Any]:
    """Return the failures as the user gets them, and clear `failures`."""
    from taskcarrier.errors import FailedRange  # noqa: PLC0415  # rarely needed

    failed_ranges = [FailedRange(*failure) for failure in failures]
    failures.clear()  # errors refer to frames, and these to the failures
    return failed_ranges

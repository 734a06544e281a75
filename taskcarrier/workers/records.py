"""What is known of a run: what its workers did, which of them died, what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.scheduling.grid import Grid
from taskcarrier.scheduling.ledger import FREE, Ledger
from taskcarrier.scheduling.retries import Again
from taskcarrier.system.exceptions import related, set_plainly


@dataclass(eq=False)
class Failure:
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
        The how-manieth time the range was run.
    """

    range: tuple[int, int] | None
    error: BaseException
    worker: str = ""
    attempt: int = 1

    @property
    def place(self) -> int:
        """Where it stands among others: the first item, -1 for all of a worker."""
        return -1 if self.range is None else self.range[0]


class Heard(NamedTuple):
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
class Account:
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
    failure: Failure | None = None
    at: tuple[int, int] | None = None
    attempt: int = 1
    warnings: list[Heard] = field(default_factory=list)


@dataclass(eq=False)
class Death:
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
        The how-manieth time that was run.
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
        held: Again | None,
        overdue: tuple[int, int] | None,
    ) -> Death:
        """Of a worker with this range in hand, which was killed because of `overdue`, if it was."""
        if held is None:
            return cls(worker, name, exitcode, None)
        return cls(worker, name, exitcode, held[:2], held.attempt, overdue == held[:2])


@dataclass
class Ran:
    """How a run ended, read while its ledger was its own.

    Attributes
    ----------
    accounts : list of Account
        Of every worker, in order; those of workers that died say what the ledger tells.
    failures : list of Failure
        What the caller has found itself; those of workers are in their accounts.
    deaths : list of Death
        All of them.
    fatal : list of Death
        Those that were not made good.
    missing : list of (int, int)
        Ranges without a result, ascending, as far as marks tell.
    given_out : int
        Cells below this number were claimed.
    agreed : object
        What the workers have settled on; None if nothing.
    halted : bool
        Whether workers were asked to stop.
    nbytes_sent : int
        Bytes that were copied for workers on their way, and not into a segment.
    """

    accounts: list[Account]
    given_out: int
    agreed: Any
    halted: bool
    failures: list[Failure] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    fatal: list[Death] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    nbytes_sent: int = 0

    @classmethod
    def read(cls, accounts: list[Account], ledger: Ledger, grid: Grid | None = None) -> Ran:
        """From the ledger of a run that is over, before the crew is lent to another.

        With the grid of a run whose results are in place once they are marked, unmarked ranges
        are missing.
        """
        ran = cls(accounts, ledger.given_out(), ledger.agreed(), ledger.halted)
        if grid is not None:
            ran.missing = [grid.bounds(cell) for cell in ledger.marked(FREE)]
        return ran


Where = slice | np.ndarray
"""Items along the mapped axis."""


Fault = tuple[int, int, BaseException]
"""``(start, stop, error)`` of a range that failed."""


@dataclass(eq=False)
class Parts:
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
        from taskcarrier.workers.pickled_errors import pack_error  # noqa: PLC0415  # loads joblib

        if self._packed is None:  # pickling may be tried twice
            self._packed = [(start, stop, pack_error(error)) for start, stop, error in self.faults]
            # Tracebacks refer to frames, frames to their callers, and these to the errors and to
            # chunks: the worker would hold on to shared memory until the next garbage collection.
            for _, _, error in self.faults:
                _forget_tracebacks(error)
        return _unpacked_parts, (self.results, self._packed)


def _forget_tracebacks(error: BaseException) -> None:
    for one in related(error):
        set_plainly(one, "__traceback__", None)


def _unpacked_parts(
    results: list[tuple[Where, Any]], packed: list[tuple[int, int, bytes]]
) -> Parts:
    from taskcarrier.workers.pickled_errors import unpack_error  # noqa: PLC0415  # loads joblib

    return Parts(results, [(start, stop, unpack_error(error)) for start, stop, error in packed])


def failed_ranges(faults: list[Fault]) -> list[Any]:
    """What is returned of collected errors."""
    from taskcarrier.errors import FailedRange  # noqa: PLC0415  # slow, and rarely needed

    found = [FailedRange(*fault) for fault in faults]
    faults.clear()  # errors refer to frames, and these to the faults
    return found

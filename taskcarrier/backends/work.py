"""The worker's loop: the only thing that is ever dispatched.

The narrow waist of the library. On one side a `Task` opens, in each worker, into a callable
of ``(start, stop)``; on the other side balance, ledger and backends know nothing but cells.
Arrays and lists are tasks; threads, processes and the caller itself run this loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol, cast

from taskcarrier.backends.parts import Parts
from taskcarrier.backends.surroundings import Surroundings
from taskcarrier.balance import Balance
from taskcarrier.ledger import DONE, FREE, SENT, Ledger
from taskcarrier.notes import add_note
from taskcarrier.partition import Grid
from taskcarrier.recovery import USUAL, Again, Recovery
from taskcarrier.segments import SharedView

NOTHING = object()
"""What a cell returns whose result is already where it belongs."""


class Cells(Protocol):
    """A task opened in one worker."""

    def __call__(self, start: int, stop: int) -> Any:
        """Run one cell; its result, or `NOTHING` if it was put in place."""

    def facts(self) -> Any:
        """Small, picklable things the caller must know when the worker is done."""


Agree = Callable[[Any], Any]


class Task(Protocol):
    """Work on ``range(n)``, in a form that can travel."""

    def open(self, agree: Agree) -> Cells:
        """Called once in each worker, before its first cell.

        With `agree` workers settle on a value: it takes a proposal and returns the first of all.
        """


class FedCells(Cells, Protocol):
    """Cells whose items are handed to them, block by block."""

    def hold(self, start: int, read: Callable[[], Sequence[Any]]) -> None:
        """Items from `start` on are what `read` returns; ranges of these are run next."""


class Sweep(Protocol):
    """Cells that need no loop around them, in a thread of the caller."""

    def sweep(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run cells until there are none or the run is halted; the ledger knows how far it came."""


@dataclass(frozen=True, eq=False)
class Job:
    """What every worker of a run is given.

    Attributes
    ----------
    task : Task
        The work.
    balance : Balance
        How its cells are shared out.
    grid : Grid
        These cells.
    n_workers : int
        How many there are.
    surroundings : Surroundings
        What the function sees of the caller.
    sweeps : bool
        Whether what the task opens into is a `Sweep`.
    fed : bool
        Whether it opens into `FedCells`; then grid and balance tell nothing.
    recovery : Recovery
        How long a range may take, and what is tried again.
    collects : bool
        Whether errors of ranges are delivered; else the first ends the run.
    narrows : bool
        Whether parts of a cell can be run.
    marks : SharedView or None
        Where the cells are marked, if the ledger's own place will not do.
    folder : str or None
        Where processes put large results that are not put in place; memory if None.
    """

    task: Task
    balance: Balance
    grid: Grid
    n_workers: int
    surroundings: Surroundings = field(default_factory=Surroundings.here)
    sweeps: bool = False
    fed: bool = False
    recovery: Recovery = USUAL
    collects: bool = False
    narrows: bool = False
    marks: SharedView | None = None
    folder: str | None = None

    def marks_here(self) -> memoryview | None:
        """Its own place for marks, in this process."""
        return None if self.marks is None else self.marks.open("write").data


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


Deliver = Callable[[int, Any], None]
"""Takes the start of a range and its result."""


class _ThisThread(threading.local):
    """What is known of the thread that asks."""

    is_worker = False


this_thread = _ThisThread()
"""It is changed by assignment, and changed back by one that begins a ``finally``:
then no exception from outside can come before (`taskcarrier.interrupts`)."""
_in_worker_process = False


def in_worker() -> bool:
    """Whether this code runs inside a worker, where further maps are serial."""
    return _in_worker_process or this_thread.is_worker


def in_worker_process() -> bool:
    """Whether this whole process is a worker."""
    return _in_worker_process


def mark_worker_process() -> None:
    """Say that this whole process is a worker."""
    global _in_worker_process  # noqa: PLW0603  # a fact about the process, set once
    _in_worker_process = True


Outlet = tuple[Deliver, Callable[[], None]]
"""How results leave a worker: a function that takes them, and one that has them arrive."""


# A range that is given out again, or was fed, and its number among these; or a cell.
_Held = tuple[Again, int] | int

Feeder = Callable[[FedCells], Iterable[_Held]]
"""Hands blocks of items to a worker's cells, and yields what it is to run of them."""


def outlet_here(deliver: Deliver) -> Outlet:
    """That of a worker in the caller's process."""
    return deliver, lambda: None


def work(
    job: Job,
    ledger: Ledger,
    worker: int,
    outlet: Outlet,
    again: Sequence[Again] = (),
    *,
    feed: Feeder | None = None,
) -> Account:
    """Run ranges until there are none, one fails, or the run is halted.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        Where cells are claimed and laid down.
    worker : int
        This worker's number, from 0.
    outlet : Outlet
        Where results go that are not in place yet.
    again : sequence of Again
        Ranges that this worker is to run before its cells, because another has died on them.
    feed : Feeder, optional
        Where its other ranges come from, instead of the grid.
    """
    account = Account(worker)
    was_worker = this_thread.is_worker
    cells: Cells | None = None
    try:
        this_thread.is_worker = True
        cells = job.task.open(ledger.agree)
        if job.sweeps:
            _sweep(job, ledger, account, cast("Sweep", cells), outlet[0])
        else:
            held: Iterable[_Held]
            if feed is not None:
                held = feed(cast("FedCells", cells))
            else:
                held = job.balance.cells(ledger, worker, job.n_workers, len(job.grid))
            if again:
                held = chain(_again(ledger, worker, again), held)
            _go_through(job, ledger, account, cells, outlet=outlet, held=held)
    except BaseException as error:  # noqa: BLE001  # also exits and interrupts: the caller raises
        ledger.halt()
        account.failure = Failure(account.at, error, attempt=account.attempt)
    finally:
        this_thread.is_worker = was_worker
        if cells is not None:
            account.facts = cells.facts()  # must not raise
    return account


def _sweep(job: Job, ledger: Ledger, account: Account, cells: Sweep, deliver: Deliver) -> None:
    """Have compiled code run cells until there are none."""
    worker = account.worker
    begin = monotonic_ns()
    try:
        cells.sweep(job, ledger, worker, deliver)
    finally:
        account.busy_ns = monotonic_ns() - begin
        account.ranges, account.items = ledger.ranges_of(worker), ledger.items_of(worker)
        cell, _ = ledger.held(worker)
        account.at = None if cell < 0 else job.grid.bounds(cell)


def _go_through(
    job: Job,
    ledger: Ledger,
    account: Account,
    cells: Cells,
    *,
    outlet: Outlet,
    held: Iterable[_Held],
) -> None:
    """Run ranges one after the other; all that is done for each is in this loop."""
    worker, marks = account.worker, ledger.marks
    deliver, flush = outlet
    timeout_ns = job.recovery.timeout_ns
    n_items, chunksize = job.grid.n_items, job.grid.chunksize
    ranges = items = busy_ns = 0
    pid = os.getpid()
    start, stop, attempt, number = -1, -1, 1, -1
    try:
        for one in held:
            if isinstance(one, int):
                cell, attempt, number = one, 1, -1
                start = cell * chunksize
                stop = min(start + chunksize, n_items)
            else:
                (start, stop, attempt), number = one
                cell = start // chunksize
            begin = monotonic_ns()
            try:
                if timeout_ns:
                    result = in_time(job, ledger, worker, cells, Again(start, stop, attempt))
                else:
                    result = cells(start, stop)
                if result is not NOTHING:
                    deliver(start, result)
            finally:
                busy_ns += monotonic_ns() - begin
                if os.getpid() != pid:
                    # The function has forked and both came back. Only one is the worker.
                    os._exit(1)
            if marks is not None and (number < 0 or job.grid.bounds(cell) == (start, stop)):
                marks[cell] = DONE if result is NOTHING else SENT
            if number < 0:
                ledger.lay_down(worker, stop - start)
            else:
                flush()
                ledger.lay_down_again(worker, number, stop - start)
            ranges += 1
            items += stop - start
    finally:
        account.ranges, account.items, account.busy_ns = ranges, items, busy_ns
        account.at, account.attempt = None if start < 0 else (start, stop), attempt


def _again(ledger: Ledger, worker: int, again: Sequence[Again]) -> Iterator[_Held]:
    """Ranges that are given out again, each in the worker's hand when it is yielded."""
    for number, one in enumerate(again):
        if ledger.halted:
            return
        ledger.hold_again(worker, number)
        yield one, number


def in_time(job: Job, ledger: Ledger, worker: int, cells: Cells, again: Again) -> Any:
    """The result of a range; the worker itself sees when it is over that it has taken too long."""
    while True:
        begin = monotonic_ns()
        ledger.note_time(worker, begin)
        result = cells(again.start, again.stop)
        taken_ns = monotonic_ns() - begin
        ledger.note_time(worker, 0)  # sending the result, which may have to wait, does not count
        if taken_ns <= job.recovery.timeout_ns:
            return result
        if not (nexts := job.recovery.after_timeout(again)):
            break
        (again,) = nexts
    error = timeout_error(job.recovery, taken_ns / 1e9)
    if not _in_worker_process:
        add_note(error, "only processes can be stopped within a range: it was run to its end")
    if not job.collects:
        raise error
    return Parts([], [(again.start, again.stop, error)])


def timeout_error(recovery: Recovery, seconds: float | None = None) -> TimeoutError:
    """The error for a range that has taken too long: so many seconds, if that is known."""
    taken = "" if seconds is None else f"{seconds:.3g} s, "
    return TimeoutError(f"a range took {taken}longer than timeout={recovery.timeout:g} seconds")

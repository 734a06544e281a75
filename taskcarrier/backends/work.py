"""The worker's loop: the only thing that is ever dispatched.

The narrow waist of the library. On one side a `Task` opens, in each worker, into a callable
of ``(start, stop)``; on the other side balance, ledger and backends know nothing but cells.
Arrays and lists are tasks; threads, processes and the caller itself run this loop.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, Protocol, cast

import numpy as np

from taskcarrier.balance import Balance
from taskcarrier.ledger import Ledger
from taskcarrier.partition import Grid

NOTHING = object()
"""What a cell returns whose result is already where it belongs."""


@dataclass(frozen=True)
class Call:
    """What the user gave: the function and what every call of it gets."""

    func: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


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


class Sweep(Protocol):
    """Cells that need no loop around them, in a thread of the caller."""

    def sweep(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run cells until there are none or the run is halted; the ledger knows how far it came."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What of the caller's own state the function sees in every worker."""

    folder: str | None
    errstate: dict[str, Any]

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this thread."""
        try:
            folder = os.getcwd()
        except FileNotFoundError:  # it was removed
            folder = None
        return cls(folder, dict(np.geterr()))

    def take_on(self) -> None:
        """Make them those of this thread."""
        if self.folder is not None and _in_worker_process and os.getcwd() != self.folder:
            os.chdir(self.folder)
        np.seterr(**self.errstate)


@dataclass(frozen=True, eq=False)
class Job:
    """What every worker of a run is given.

    Where it `sweeps`, what the task opens into is a `Sweep`.
    """

    task: Task
    balance: Balance
    grid: Grid
    n_workers: int
    surroundings: Surroundings = field(default_factory=Surroundings.here)
    sweeps: bool = False


@dataclass(eq=False)
class Failure:
    """An exception in one cell."""

    cell: int
    error: BaseException
    worker: str = ""


@dataclass(eq=False)
class Account:
    """What one worker did in a run.

    Times are nanoseconds of ``CLOCK_MONOTONIC``, comparable between processes.
    """

    worker: int
    name: str = ""
    ranges: int = 0
    items: int = 0
    busy_ns: int = 0
    facts: Any = None
    failure: Failure | None = None


@dataclass(eq=False)
class Death:
    """A worker process that ended by itself."""

    worker: int
    name: str
    exitcode: int | None
    cell: int | None
    unstarted: range = field(default_factory=lambda: range(0))


@dataclass
class Ran:
    """How a run ended, read while its ledger was its own.

    Attributes
    ----------
    accounts : list of Account
        Of every worker that reported back, in order.
    deaths : list of Death
        Workers that ended by themselves.
    given_out : int
        Cells below this number were claimed.
    agreed : object
        What the workers have settled on; None if nothing.
    halted : bool
        Whether workers were asked to stop.
    """

    accounts: list[Account]
    deaths: list[Death]
    given_out: int
    agreed: Any
    halted: bool

    @classmethod
    def read(cls, accounts: list[Account], deaths: list[Death], ledger: Ledger) -> Ran:
        """From the ledger of a run that is over, before the crew is lent to another."""
        return cls(accounts, deaths, ledger.given_out(), ledger.agreed(), ledger.halted)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to a user's exception; one that refuses notes stays what it is."""
    with contextlib.suppress(Exception):
        error.add_note(note)


def text_of(error: BaseException) -> str:
    """The exception's text, whatever its ``__str__`` does."""
    try:
        return str(error)
    except Exception as trouble:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<str() raised {type(trouble).__name__}>"


Deliver = Callable[[int, Any], None]

_state = threading.local()
_in_worker_process = False


def in_worker() -> bool:
    """Whether this code runs inside a worker, where further maps are serial."""
    return _in_worker_process or getattr(_state, "busy", False)


def mark_worker_process() -> None:
    """Say that this whole process is a worker."""
    global _in_worker_process  # noqa: PLW0603  # a fact about the process, set once
    _in_worker_process = True


def work(job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> Account:
    """Run cells until there are none, one fails, or the run is halted.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        Where cells are claimed and laid down.
    worker : int
        This worker's number, from 0.
    deliver : callable
        Takes ``(cell, result)`` of a cell whose result is not in place yet. A cell counts as
        done for the ledger when it returns.
    """
    account = Account(worker)
    busy_before = getattr(_state, "busy", False)
    _state.busy = True
    cell = -1
    cells: Cells | None = None
    n_items, chunksize = job.grid.n_items, job.grid.chunksize
    ranges = items = busy_ns = 0
    pid = os.getpid()
    try:
        cells = job.task.open(ledger.agree)
        if job.sweeps:
            begin = monotonic_ns()
            try:
                cast("Sweep", cells).sweep(job, ledger, worker, deliver)
            finally:
                busy_ns = monotonic_ns() - begin
                ranges, items = ledger.ranges_of(worker), ledger.items_of(worker)
                cell, _ = ledger.held(worker)
            return account
        for cell in job.balance.cells(ledger, worker, job.n_workers, len(job.grid)):
            start = cell * chunksize
            stop = start + chunksize
            stop = min(stop, n_items)
            begin = monotonic_ns()
            try:
                result = cells(start, stop)
                if result is not NOTHING:
                    deliver(cell, result)
            finally:
                busy_ns += monotonic_ns() - begin
                if os.getpid() != pid:
                    # The function has forked and both came back. Only one is the worker.
                    os._exit(1)
            ledger.lay_down(worker, stop - start)
            ranges += 1
            items += stop - start
    except BaseException as error:  # noqa: BLE001  # also exits and interrupts: the caller raises
        ledger.halt()
        account.failure = Failure(cell, error)
    finally:
        _state.busy = busy_before
        account.ranges, account.items, account.busy_ns = ranges, items, busy_ns
        if cells is not None:
            account.facts = cells.facts()  # must not raise
    return account

"""The worker's loop: the only thing that is ever dispatched.

The narrow waist of the library. On one side a `Task` opens, in each worker, into a callable
of ``(start, stop)``; on the other side balance, ledger and backends know nothing but cells.
Arrays and lists are tasks; threads, processes and the caller itself run this loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from time import monotonic_ns
from typing import Any, cast

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import DONE, SENT, Ledger
from taskcarrier.scheduling.retries import Again, Recovery
from taskcarrier.workers.records import Account, Failure, Parts
from taskcarrier.workers.task import NOTHING, Cells, Deliver, FedCells, Job, Sweep


class _ThisThread(threading.local):
    """What is known of the thread that asks."""

    is_worker = False


this_thread = _ThisThread()
"""It is changed by assignment, and changed back by one that begins a ``finally``:
then no exception from outside can come before (`taskcarrier.system.interrupts`)."""
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

"""Workers that are handed blocks of items as these come: a `Feed`, in the caller and in threads.

Who owns what. A feed is open from its making to its `close`; meanwhile its workers are its own.
Everything the caller does happens in the thread that asks for results: it gives blocks while a
worker has room, and takes what has come. Between two questions workers finish what they were given,
which is at most `AHEAD` blocks each, and nothing goes on behind the caller's back.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, cast

from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Again
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.loop import Feeder, in_time, in_worker, this_thread
from taskcarrier.workers.records import Account, Parts, Ran
from taskcarrier.workers.task import Deliver, FedCells, Job

AHEAD = 2
"""Blocks that are handed to a worker at most: one in hand, one to go on with."""


class UnsendableError(Exception):
    """Items of a block cannot be sent to workers; only streams catch this."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Came(NamedTuple):
    """What fed cells return for a range.

    Attributes
    ----------
    start, stop : int
        Its items.
    result : list or Parts
        Their results, with what failed.
    busy_ns : int
        Nanoseconds inside the function.
    nbytes : int
        Bytes that were sent for it, there and back.
    """

    start: int
    stop: int
    result: Any
    busy_ns: int = 0
    nbytes: int = 0


def came_of(result: Came | Parts) -> Came:
    """What has come; a range that took too long comes as a fault alone."""
    if isinstance(result, Came):
        return result
    start, stop, _ = result.faults[0]
    return Came(start, stop, result)


class Feed(Protocol):
    """Workers that take blocks of items and give back results, in any order."""

    ledger: Ledger
    runs_here: bool
    """Whether giving is running: nothing happens while the caller is busy with something else."""

    @property
    def has_room(self) -> bool:
        """Whether a worker would take a further block."""

    def give(self, start: int, items: Sequence[Any]) -> None:
        """Have the items from `start` on run; only while there is room.

        `UnsendableError` if they cannot be sent.
        """

    def take(self, seconds: float) -> list[Came]:
        """What has come; if nothing has, wait until something does, or so many seconds.

        Raises what is no `Exception` and so ends a worker: an exit, an interrupt.
        """

    def close(self) -> Ran:
        """Stop; workers that do not come to the end of their range soon are not waited for."""


class SerialFeed:
    """A feed whose only worker is the caller: a block is run when it is given."""

    runs_here = True

    def __init__(self, job: Job) -> None:
        self.ledger = Ledger.local(1)
        self._job = job
        self._account = Account(0, "caller")
        self._cells = cast("FedCells", job.task.open(self.ledger.agree))
        self._came: list[Came] = []

    @property
    def has_room(self) -> bool:
        """Whether what was given was taken."""
        return not self._came

    def give(self, start: int, items: Sequence[Any]) -> None:
        """Run the items."""
        again = Again(start, start + len(items))
        self._cells.hold(start, partial(_itself, items))
        was_worker = this_thread.is_worker
        # The function may set others, whose exceptions are reasons to try again.
        handlers = Handlers() if self._job.recovery.retry_on else None
        try:
            this_thread.is_worker = True
            if self._job.recovery.timeout is None:
                came = self._cells(again.start, again.stop)
            else:
                came = came_of(in_time(self._job, self.ledger, 0, self._cells, again))
        finally:
            this_thread.is_worker = was_worker
            del handlers
        self._came.append(came)
        self.ledger.lay_down(0, len(items))
        self._account.ranges += 1
        self._account.items += len(items)
        self._account.busy_ns += came.busy_ns

    def take(self, seconds: float) -> list[Came]:  # noqa: ARG002  # there is nothing to wait for
        """What was given last."""
        came, self._came = self._came, []
        return came

    def close(self) -> Ran:
        """Nothing is running."""
        return Ran.read([self._account], self.ledger)


Begin = Callable[[int, Feeder, Deliver, Callable[[Account], None]], None]
"""Has a worker begin: takes its number, where its ranges come from, where its results go, and what
takes its account at the end."""


_Given = SimpleQueue[Any]
"""Blocks, and behind the last one something else, which is left there for the other threads."""


class ThreadFeed:
    """A feed of threads, which share one queue of blocks. Another begins when all have a block.

    Threads refer to its queues and not to it. If it is dropped, by an exception from outside, they
    come to the end of the blocks as after `close`.

    Parameters
    ----------
    n_workers : int
        How many threads at most.
    begin : Begin
        Has one of them begin.
    drop_the_stuck : callable
        Lets go of those that are not waited for.
    grace : float
        Seconds that they have to come to the end of their range when the feed is closed.
    """

    runs_here = False

    def __init__(
        self,
        n_workers: int,
        ledger: Ledger,
        begin: Begin,
        drop_the_stuck: Callable[[], None],
        grace: float,
    ) -> None:
        self.ledger = ledger
        self._n_workers = n_workers
        self._begin = begin
        self._drop_the_stuck = drop_the_stuck
        self._grace = grace
        self._n_begun = 0
        self._n_out = 0  # blocks that were given and have not come
        self._given: _Given = SimpleQueue()
        self._arrivals: SimpleQueue[Came | Account] = SimpleQueue()
        # Threads write it themselves: what they put into the queue besides may get lost on the way.
        self._accounts: dict[int, Account] = {}
        self._ranges = partial(_ranges, ledger, self._given, weakref.ref(self, self._given.put))
        self._deliver = partial(_deliver, self._arrivals)
        self._ended = partial(_ended, self._accounts, self._arrivals)

    @property
    def has_room(self) -> bool:
        """Whether fewer blocks are on their way than the threads may hold."""
        return self._n_out < AHEAD * self._n_workers

    def give(self, start: int, items: Sequence[Any]) -> None:
        """Put the items into the queue."""
        if self._n_begun <= self._n_out and self._n_begun < self._n_workers:
            self._begin(self._n_begun, self._ranges, self._deliver, self._ended)
            self._n_begun += 1
        self._n_out += 1
        self._given.put((start, items))

    def take(self, seconds: float) -> list[Came]:
        """What has come."""
        came: list[Came] = []
        try:
            came += self._arrived(self._arrivals.get(timeout=seconds))
            while True:
                came += self._arrived(self._arrivals.get_nowait())
        except Empty:
            return came

    def _arrived(self, one: Came | Account) -> list[Came]:
        if isinstance(one, Came):
            self._n_out -= 1
            return [one]
        if one.failure is not None:
            raise_and_forget(one)
        return []

    def close(self) -> Ran:
        """Stop the threads; one still in a range is left to finish it on its own."""
        is_done = not self._n_out
        if not is_done:
            self.ledger.halt()
        self._given.put(None)
        deadline = time.monotonic() + self._grace
        # In a worker a forgotten stream may be closed by the garbage collector: maybe in one of
        # its own, which would wait for itself.
        waits = is_done and not in_worker()
        with suppress(Empty):  # they have had their time
            while len(self._accounts) < self._n_begun:
                left = None if waits else max(0.0, deadline - time.monotonic())
                self._arrivals.get(timeout=left)
        accounts = self._accounts.copy()
        if len(accounts) < self._n_begun:
            self._drop_the_stuck()
        for number in set(range(self._n_begun)) - set(accounts):  # what they have finished counts
            ranges, items = self.ledger.again_done(number), self.ledger.items_of(number)
            accounts[number] = Account(number, ranges=ranges, items=items)
        for number, account in accounts.items():
            account.name = f"thread {number}"
        return Ran.read([accounts[number] for number in sorted(accounts)], self.ledger)


def _ranges(
    ledger: Ledger,
    given: _Given,
    _: object,  # is kept for as long as this goes on
    cells: FedCells,
) -> Iterator[tuple[Again, int]]:
    """In a worker: blocks from the queue."""
    number = 0
    while not ledger.halted:
        block = given.get()
        if not isinstance(block, tuple):
            given.put(block)
            return
        start, items = block
        cells.hold(start, partial(_itself, items))
        yield Again(start, start + len(items)), number
        number += 1


def _deliver(arrivals: SimpleQueue[Any], start: int, result: Any) -> None:  # noqa: ARG001  # the result knows it
    arrivals.put(came_of(result))


def _ended(accounts: dict[int, Account], arrivals: SimpleQueue[Any], account: Account) -> None:
    accounts[account.worker] = account
    arrivals.put(account)


def _itself(items: Sequence[Any]) -> Sequence[Any]:
    return items


def raise_and_forget(account: Account) -> None:
    """Raise what has ended a worker, and keep no reference to it: its traceback refers to all."""
    failure, account.failure = account.failure, None
    assert failure is not None  # for the type checker: who calls has looked
    try:
        raise_again(vars(failure).pop("error"))
    finally:
        del failure, account

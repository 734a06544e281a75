"""Workers that are handed batches of items as these come: a `WorkQueue`, in the caller and in threads.

Who owns what. A queue is open from its making to its `close`; meanwhile its workers are its own.
Everything the caller does happens in the thread that asks for results: it gives batches while a
worker has room, and takes what has come. Between two questions workers finish what they were given,
which is at most `AHEAD` batches each, and nothing goes on behind the caller's back.
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
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.loop import AttemptSource, is_in_worker, run_with_timeout, this_thread
from taskcarrier.workers.records import PartialResult, RunResult, WorkerStats
from taskcarrier.workers.task import BatchRunner, Deliver, Job

AHEAD = 2
"""Batches that are handed to a worker at most: one in hand, one to go on with."""


class UnsendableError(Exception):
    """Items of a batch cannot be sent to workers; only streams catch this."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class BatchResult(NamedTuple):
    """What fed chunks return for a range.

    Attributes
    ----------
    start, stop : int
        Its items.
    result : list or PartialResult
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


def to_batch_result(result: BatchResult | PartialResult) -> BatchResult:
    """What has come; a range that took too long comes as a fault alone."""
    if isinstance(result, BatchResult):
        return result
    start, stop, _ = result.faults[0]
    return BatchResult(start, stop, result)


class WorkQueue(Protocol):
    """Workers that take batches of items and give back results, in any order."""

    ledger: Ledger
    runs_here: bool
    """Whether giving is running: nothing happens while the caller is busy with something else."""

    @property
    def has_room(self) -> bool:
        """Whether a worker would take a further batch."""

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Have the items from `start` on run; only while there is room.

        `UnsendableError` if they cannot be sent.
        """

    def take(self, seconds: float) -> list[BatchResult]:
        """What has come; if nothing has, wait until something does, or so many seconds.

        Raises what is no `Exception` and so ends a worker: an exit, an interrupt.
        """

    def close(self) -> RunResult:
        """Stop; workers that do not come to the end of their range soon are not waited for."""


class SerialQueue:
    """A queue whose only worker is the caller: a batch is run when it is given."""

    runs_here = True

    def __init__(self, job: Job) -> None:
        self.ledger = Ledger.local(1)
        self._job = job
        self._stats = WorkerStats(0, "caller")
        self._runner = cast("BatchRunner", job.task.open(self.ledger.propose))
        self._came: list[BatchResult] = []

    @property
    def has_room(self) -> bool:
        """Whether what was given was taken."""
        return not self._came

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Run the items."""
        again = Attempt(start, start + len(items))
        self._runner.hold(start, partial(_itself, items))
        was_worker = this_thread.is_worker
        # The function may set others, whose exceptions are reasons to try again.
        handlers = Handlers() if self._job.retry_policy.retry_on else None
        try:
            this_thread.is_worker = True
            if self._job.retry_policy.timeout is None:
                came = self._runner(again.start, again.stop)
            else:
                came = to_batch_result(
                    run_with_timeout(self._job, self.ledger, 0, self._runner, again)
                )
        finally:
            this_thread.is_worker = was_worker
            del handlers
        self._came.append(came)
        self.ledger.finish(0, len(items))
        self._stats.ranges += 1
        self._stats.items += len(items)
        self._stats.busy_ns += came.busy_ns

    def take(self, seconds: float) -> list[BatchResult]:  # noqa: ARG002  # there is nothing to wait for
        """What was given last."""
        came, self._came = self._came, []
        return came

    def close(self) -> RunResult:
        """Nothing is running."""
        return RunResult.read([self._stats], self.ledger)


Begin = Callable[[int, AttemptSource, Deliver, Callable[[WorkerStats], None]], None]
"""Has a worker begin: takes its number, where its ranges come from, where its results go, and what
takes its account at the end."""


_Given = SimpleQueue[Any]
"""Batches, and behind the last one something else, which is left there for the other threads."""


class ThreadQueue:
    """A queue of threads, which share one queue of batches. Another begins when all have a batch.

    Threads refer to its queues and not to it. If it is dropped, by an exception from outside, they
    come to the end of the batches as after `close`.

    Parameters
    ----------
    n_workers : int
        How many threads at most.
    begin : Begin
        Has one of them begin.
    drop_stuck_workers : callable
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
        drop_stuck_workers: Callable[[], None],
        grace: float,
    ) -> None:
        self.ledger = ledger
        self._n_workers = n_workers
        self._begin = begin
        self._drop_stuck_workers = drop_stuck_workers
        self._grace = grace
        self._n_begun = 0
        self._n_out = 0  # batches that were given and have not come
        self._given: _Given = SimpleQueue()
        self._arrivals: SimpleQueue[BatchResult | WorkerStats] = SimpleQueue()
        # Threads write it themselves: what they put into the queue besides may get lost on the way.
        self._worker_stats: dict[int, WorkerStats] = {}
        self._ranges = partial(_ranges, ledger, self._given, weakref.ref(self, self._given.put))
        self._deliver = partial(_deliver, self._arrivals)
        self._record_end = partial(_record_end, self._worker_stats, self._arrivals)

    @property
    def has_room(self) -> bool:
        """Whether fewer batches are on their way than the threads may hold."""
        return self._n_out < AHEAD * self._n_workers

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Put the items into the queue."""
        if self._n_begun <= self._n_out and self._n_begun < self._n_workers:
            self._begin(self._n_begun, self._ranges, self._deliver, self._record_end)
            self._n_begun += 1
        self._n_out += 1
        self._given.put((start, items))

    def take(self, seconds: float) -> list[BatchResult]:
        """What has come."""
        came: list[BatchResult] = []
        try:
            came += self._take_arrival(self._arrivals.get(timeout=seconds))
            while True:
                came += self._take_arrival(self._arrivals.get_nowait())
        except Empty:
            return came

    def _take_arrival(self, one: BatchResult | WorkerStats) -> list[BatchResult]:
        if isinstance(one, BatchResult):
            self._n_out -= 1
            return [one]
        if one.failure is not None:
            raise_and_forget(one)
        return []

    def close(self) -> RunResult:
        """Stop the threads; one still in a range is left to finish it on its own."""
        is_done = not self._n_out
        if not is_done:
            self.ledger.halt()
        self._given.put(None)
        deadline = time.monotonic() + self._grace
        # In a worker a forgotten stream may be closed by the garbage collector: maybe in one of
        # its own, which would wait for itself.
        waits = is_done and not is_in_worker()
        with suppress(Empty):  # they have had their time
            while len(self._worker_stats) < self._n_begun:
                left = None if waits else max(0.0, deadline - time.monotonic())
                self._arrivals.get(timeout=left)
        worker_stats = self._worker_stats.copy()
        if len(worker_stats) < self._n_begun:
            self._drop_stuck_workers()
        for number in set(range(self._n_begun)) - set(
            worker_stats
        ):  # what they have finished counts
            ranges, items = self.ledger.n_attempts_done(number), self.ledger.n_items_of(number)
            worker_stats[number] = WorkerStats(number, ranges=ranges, items=items)
        for number, stats in worker_stats.items():
            stats.name = f"thread {number}"
        return RunResult.read(
            [worker_stats[number] for number in sorted(worker_stats)], self.ledger
        )


def _ranges(
    ledger: Ledger,
    given: _Given,
    _: object,  # is kept for as long as this goes on
    runner: BatchRunner,
) -> Iterator[tuple[Attempt, int]]:
    """In a worker: batches from the queue."""
    number = 0
    while not ledger.is_halted:
        batch = given.get()
        if not isinstance(batch, tuple):
            given.put(batch)
            return
        start, items = batch
        runner.hold(start, partial(_itself, items))
        yield Attempt(start, start + len(items)), number
        number += 1


def _deliver(arrivals: SimpleQueue[Any], start: int, result: Any) -> None:  # noqa: ARG001  # the result knows it
    arrivals.put(to_batch_result(result))


def _record_end(
    worker_stats: dict[int, WorkerStats], arrivals: SimpleQueue[Any], stats: WorkerStats
) -> None:
    worker_stats[stats.worker] = stats
    arrivals.put(stats)


def _itself(items: Sequence[Any]) -> Sequence[Any]:
    return items


def raise_and_forget(stats: WorkerStats) -> None:
    """Raise what has ended a worker, and keep no reference to it: its traceback refers to all."""
    failure, stats.failure = stats.failure, None
    assert failure is not None  # for the type checker: who calls has looked
    try:
        raise_again(vars(failure).pop("error"))
    finally:
        del failure, stats

"""Work queues, which hand workers batches of items as these come; that of threads among them.

Who owns what. A queue is open from its creation to its `close`, and owns its workers for that time.
Everything the caller does happens in the thread that asks for results: it puts batches while a
worker has room, and takes the results that have come. Between two requests, workers only finish the
batches that they have, at most `MAX_BATCHES_PER_WORKER` each; nothing else goes on in the
background.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.exceptions import raise_again
from taskcarrier.workers.loop import BatchSource, is_in_worker
from taskcarrier.workers.records import PartialResult, RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, WorkerContext

MAX_BATCHES_PER_WORKER = 2
"""The most batches that a worker has at a time: one in hand, and one to go on with."""


class UnsendableError(Exception):
    """The error for items of a batch that cannot be sent to workers; only streams catch it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class BatchResult(NamedTuple):
    """What batch runners return for a range.

    Attributes
    ----------
    start, stop : int
        The bounds of the range.
    result : list or PartialResult
        The results of its items, with failures.
    busy_ns : int
        Nanoseconds inside the function.
    nbytes : int
        The number of bytes that were sent for the range, to the worker and back.
    """

    start: int
    stop: int
    result: Any
    busy_ns: int = 0
    nbytes: int = 0


def to_batch_result(result: BatchResult | PartialResult) -> BatchResult:
    """Return a result as a `BatchResult`; a range that took too long gives only a failure."""
    if isinstance(result, BatchResult):
        return result
    start, stop, _ = result.failures[0]
    return BatchResult(start, stop, result)


class WorkQueue(Protocol):
    """Workers that take batches of items and give back results in any order."""

    @property
    def ledger(self) -> Ledger:
        """The record of what was done."""

    @property
    def runs_in_caller(self) -> bool:
        """Whether `put` runs the batch: nothing happens while the caller does other things."""

    @property
    def has_room(self) -> bool:
        """Whether a worker would take a further batch."""

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Have a batch run, the items from `start` on; call this only while there is room.

        Raises `UnsendableError` if the items cannot be sent.
        """

    def get(self, seconds: float) -> list[BatchResult]:  # there is nothing to wait for
        """Return the results that have come; if there are none, wait up to `seconds` for one.

        Raises exceptions that are no `Exception` and so end a worker: an exit, an interrupt.
        """

    def close(self) -> RunResult:
        """Stop the workers, without waiting for those that do not finish their range soon."""


BeginWorker = Callable[[int, BatchSource, Deliver, Callable[[WorkerStats], None]], None]
"""A function that starts a worker. It takes the worker's number, the source of its ranges, the
function that gets its results, and the one that gets its stats at the end."""


_BatchQueue = SimpleQueue[Any]
"""A queue of batches. Its last entry is no batch, and each thread leaves it for the others."""


class ThreadQueue:
    """A work queue whose workers are threads, which share one queue of batches.

    A further thread starts when all others have a batch. Threads refer to the queues and not to
    this object. If it is dropped, by an exception from outside, they come to the end of the batches
    as after `close`.

    Parameters
    ----------
    n_workers : int
        The largest number of threads.
    begin : BeginWorker
        A function that starts a thread.
    drop_stuck_workers : callable
        A function that drops the threads that are not waited for.
    grace : float
        Seconds that threads have to finish their range when the queue is closed.
    """

    runs_in_caller = False

    def __init__(
        self,
        n_workers: int,
        ledger: Ledger,
        begin: BeginWorker,
        drop_stuck_workers: Callable[[], None],
        grace: float,
    ) -> None:
        self.ledger = ledger
        self._n_workers = n_workers
        self._begin = begin
        self._drop_stuck_workers = drop_stuck_workers
        self._grace = grace
        self._n_started = 0
        self._n_under_way = 0  # batches without a result yet
        self._batches: _BatchQueue = SimpleQueue()
        self._arrivals: SimpleQueue[BatchResult | WorkerStats] = SimpleQueue()
        # Threads write this themselves: what they put into the queue as well may get lost there.
        self._worker_stats: dict[int, WorkerStats] = {}
        self._claim_batches = partial(
            _claim_batches, ledger, self._batches, weakref.ref(self, self._batches.put)
        )
        self._put_result = partial(_put_result, self._arrivals)
        self._record_end = partial(_record_end, self._worker_stats, self._arrivals)

    @property
    def has_room(self) -> bool:
        """Whether fewer batches are under way than the threads may have."""
        return self._n_under_way < MAX_BATCHES_PER_WORKER * self._n_workers

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Put the items into the queue, and start a further thread if all have a batch."""
        if self._n_started <= self._n_under_way and self._n_started < self._n_workers:
            self._begin(self._n_started, self._claim_batches, self._put_result, self._record_end)
            self._n_started += 1
        self._n_under_way += 1
        self._batches.put((start, items))

    def get(self, seconds: float) -> list[BatchResult]:  # there is nothing to wait for
        """Return the results that have come; wait up to `seconds` for the first."""
        results: list[BatchResult] = []
        try:
            results += self._handle_arrival(self._arrivals.get(timeout=seconds))
            while True:
                results += self._handle_arrival(self._arrivals.get_nowait())
        except Empty:
            return results

    def _handle_arrival(self, arrival: BatchResult | WorkerStats) -> list[BatchResult]:
        if isinstance(arrival, BatchResult):
            self._n_under_way -= 1
            return [arrival]
        if arrival.failure is not None:
            raise_and_forget(arrival)
        return []

    def close(self) -> RunResult:
        """Stop the threads; one that is still in a range is left to finish it on its own."""
        is_idle = not self._n_under_way
        if not is_idle:
            self.ledger.halt()
        self._batches.put(None)
        deadline = time.monotonic() + self._grace
        # Inside a worker, the garbage collector may be closing a forgotten stream; if the worker is
        # one of the stream's own, it would wait for itself.
        must_wait = is_idle and not is_in_worker()
        with suppress(Empty):  # the threads have had their time
            while len(self._worker_stats) < self._n_started:
                seconds = None if must_wait else max(0.0, deadline - time.monotonic())
                self._arrivals.get(timeout=seconds)
        worker_stats = self._worker_stats.copy()
        if len(worker_stats) < self._n_started:
            self._drop_stuck_workers()
        # What the missing threads have finished counts.
        for number in set(range(self._n_started)) - set(worker_stats):
            n_ranges, n_items = self.ledger.n_attempts_done(number), self.ledger.n_items_of(number)
            worker_stats[number] = WorkerStats(number, n_ranges=n_ranges, n_items=n_items)
        for number, stats in worker_stats.items():
            stats.name = f"thread {number}"
        return RunResult.read(
            [worker_stats[number] for number in sorted(worker_stats)], self.ledger
        )


def _claim_batches(
    ledger: Ledger,
    batches: _BatchQueue,
    _: object,  # a weak reference, kept while this runs so that its callback works
    worker: WorkerContext,
) -> Iterator[tuple[Attempt, int]]:
    """Yield batches from the queue, in a worker."""
    number = 0
    while not ledger.is_halted:
        batch = batches.get()
        if not isinstance(batch, tuple):
            batches.put(batch)
            return
        start, items = batch
        worker.batch = (start, partial(return_items, items))
        yield Attempt(start, start + len(items)), number
        number += 1


def _put_result(arrivals: SimpleQueue[Any], start: int, result: Any) -> None:  # noqa: ARG001  # the result has it
    arrivals.put(to_batch_result(result))


def _record_end(
    worker_stats: dict[int, WorkerStats], arrivals: SimpleQueue[Any], stats: WorkerStats
) -> None:
    worker_stats[stats.worker] = stats
    arrivals.put(stats)


def return_items(items: Sequence[Any]) -> Sequence[Any]:
    """Return the items: they need not be unpickled."""
    return items


def raise_and_forget(stats: WorkerStats) -> None:
    """Raise the error that ended a worker, and drop it here: its traceback refers to everything."""
    failure, stats.failure = stats.failure, None
    assert failure is not None  # for the type checker: the caller has checked
    try:
        raise_again(vars(failure).pop("error"))
    finally:
        del failure, stats

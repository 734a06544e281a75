"""Maps over inputs that need not end: results as they come, in bounded memory.

Everything happens in the thread that asks for the next result. It reads the input, gives batches of
items to workers while they have room, takes in results and keeps them until it is their turn.
Batches grow until one takes some milliseconds, so light items cost little and heavy ones go alone.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from time import monotonic_ns
from typing import Any

from taskcarrier import progress
from taskcarrier.arguments import check_callable, check_integer
from taskcarrier.lists.short_maps import find_short_call, raise_in_stream, stream_short_list
from taskcarrier.lists.task import Calls, StreamTask
from taskcarrier.notes import describe_items
from taskcarrier.report import Report
from taskcarrier.run import Settings, decide, describe_deaths, make_report, show_worker_warnings
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.short_calls import ShortCall
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import Executor, Tick
from taskcarrier.workers.queues import BatchResult, UnsendableError, WorkQueue
from taskcarrier.workers.records import PartialResult, RunResult
from taskcarrier.workers.snapshots import Snapshot
from taskcarrier.workers.task import Job

# A batch should take this long: about fifty times what it costs to hand it out.
_BATCH_NS = 5_000_000
# A batch holds at most this many bytes, results included, and this many items. Arbitrary.
_BATCH_NBYTES = 1 << 20
_MAX_BATCH = 1024
# The largest block of a short stream, and the least number of blocks; arbitrary.
_MAX_BLOCK, _LEAST_BLOCKS = 64, 16
# Batches for each worker between the input and the caller, if the caller sets no `buffersize`.
_BATCHES_AHEAD = 4
# While results are handed out, workers are fed and results taken in this often.
_LOOK_NS = 2_000_000
# A signal that comes just before the caller begins to wait is not seen until something else
# happens, so the caller looks this often (in seconds). Progress is shown as often.
_LONGEST_WAIT = 0.1


_streams: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Close all streams when the program ends; later, threads do not go on and cannot be joined."""
    for stream in list(_streams):
        with suppress(ValueError):  # another thread is running it
            stream.close()


def imap_lists(
    settings: Settings,
    func: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    chunksize: int | None,
    *,
    ordered: bool,
    buffersize: int | None,
    rng: object,
    shared: object,
) -> Generator[Any, None, None]:
    """Return ``map(func, *iterables)``, run on the workers that `settings` ask for.

    The workers begin when the first result is asked for.
    """
    check_callable(func)
    if buffersize is not None:
        buffersize = check_integer(buffersize, "buffersize", "a positive integer or None")
        if buffersize < 1:
            raise ValueError(f"buffersize must be at least 1, got {buffersize}")
    is_tuple = len(iterables) > 1
    calls = Calls.from_arguments(
        func, settings.retry_policy, is_tuple=is_tuple, collect_errors=True, rng=rng, shared=shared
    )
    items = zip(*iterables, strict=False) if is_tuple else iter(iterables[0])
    n_items = _count_items(iterables) if settings.verbosity >= 1 else None
    start = partial(
        _start_stream,
        settings,
        func,
        calls,
        n_items=n_items,
        ordered=ordered,
        buffersize=buffersize,
        chunksize=chunksize,
    )
    n_plain = _count_plain(iterables)
    call: ShortCall | None = None
    if rng is None and not shared and chunksize is None:
        n_plain = _count_plain(iterables)
        if n_plain is not None:
            call = find_short_call(settings, func, n_plain, partial(_make_short_grid, n_plain))
    # Threads of a stream may be needed after the first results: that is no short call.
    if call is None or call.choice.backend != "sequential":
        stream = start(items, 0)
    else:
        stream = stream_short_list(calls, items, call, start)
    _streams.add(stream)
    return stream


def _make_short_grid(n_items: int, choice: Choice) -> ChunkGrid:
    """Return the blocks of a short stream; a caller that is the only worker runs item by item."""
    if not choice.begins_in_caller:
        return ChunkGrid(n_items, 1)
    return ChunkGrid(n_items, max(1, min(_MAX_BLOCK, n_items // _LEAST_BLOCKS)))


def _start_stream(
    settings: Settings,
    func: Callable[..., Any],
    calls: Calls,
    items: Iterator[Any],
    first: int,
    *,
    n_items: int | None,
    ordered: bool,
    buffersize: int | None,
    chunksize: int | None,
) -> Generator[Any, None, None]:
    """Return the stream of the results of `items`; the first of them has number `first`."""
    executor = decide(settings, func, over_lists=True)
    job = Job(
        StreamTask(calls),
        executor.balance or Dynamic(),
        ChunkGrid(0, 1),
        executor.choice.n_jobs,
        retry_policy=settings.retry_policy,
        collect_errors=True,
        can_split=True,
        folder=settings.folder,
        snapshot=Snapshot(calls.call, lambda: calls.call, settings.new_staging())
        if executor.may_move
        else None,
    )
    # A batch that may be given up as a whole is one item, unless the user says otherwise.
    can_lose_batch = settings.retry_policy.timeout is not None or settings.retry_policy.retries == 0
    if executor.runs_in_caller or (can_lose_batch and chunksize is None):
        chunksize = 1
    pace = Pace(executor.choice.n_jobs, buffersize, chunksize)
    workers = executor.stream(job)  # an error, if it cannot; else they begin when this is entered
    return _stream_results(
        settings,
        job,
        executor,
        workers,
        source=StreamInput(items, n_items, first),
        pace=pace,
        ordered=ordered,
    )


def _count_plain(iterables: Iterable[Iterable[Any]]) -> int | None:
    """Return how many items there will be, if the inputs are plain sequences; else None."""
    if not all(type(each) in {list, tuple, range} for each in iterables):
        return None
    return _count_items(iterables)


def _count_items(iterables: Iterable[Iterable[Any]]) -> int | None:
    """Return how many items there will be, or None if unknown; only the progress bar needs it."""
    lengths = []
    for iterable in iterables:
        if isinstance(iterable, Sized):
            try:
                lengths.append(len(iterable))
            except (TypeError, OverflowError):  # it has no length after all, or one too large
                return None
    return min(lengths, default=None)


def _stream_results(
    settings: Settings,
    job: Job,
    executor: Executor,
    workers: AbstractContextManager[WorkQueue],
    *,
    source: StreamInput,
    pace: Pace,
    ordered: bool,
) -> Generator[Any, None, None]:
    started_ns = monotonic_ns()
    owner = os.getpid()
    with (
        progress.progress_bar(settings.verbosity, source.n_items, job.n_workers) as tick,
        workers as queue,
    ):
        ended_well = False
        try:
            yield from _Stream(queue, source, pace, tick).results(ordered)
            ended_well = True
        finally:
            if os.getpid() == owner:  # a forked child leaves its parent's workers alone
                run_result = queue.close()
                if tick is not None:  # the last results arrived before they were counted
                    tick(queue.ledger)
                report = _make_report(job, executor, run_result, pace.largest, started_ns)
                if executor.begins_in_caller and ended_well:
                    _remember(job, report)
                settings.keep_report(report)
                progress.log_report(settings.verbosity, report)
                # As in `execute`: if a filter makes an exception of a warning, it must not replace
                # a real exception, nor the one that closes the stream.
                with nullcontext() if ended_well else suppress(Warning):
                    show_worker_warnings(run_result.worker_stats)


def _remember(job: Job, report: Report) -> None:
    """Remember how long a stream took that was begun in the caller, if it ended there."""
    assert isinstance(job.task, StreamTask)  # for the type checker
    func = job.task.calls.call.func
    if report.backend == "sequential":
        busy_seconds = sum(worker.busy for worker in report.workers)
        history.remember(func, busy_seconds, report.items, 0)
    else:
        history.forget(func)


def _make_report(
    job: Job, executor: Executor, result: RunResult, chunksize: int, started_ns: int
) -> Report:
    n_begun = len({stats.worker for stats in result.worker_stats})
    return make_report(
        replace(job, n_workers=max(1, n_begun)),
        executor,
        result,
        chunksize=chunksize,
        ranges=sum(stats.n_ranges for stats in result.worker_stats),
        items=sum(stats.n_items for stats in result.worker_stats),
        notes=[*executor.notes, *describe_deaths(result)],
        started_ns=started_ns,
    )


class StreamInput:
    """The input of a stream, read in batches, with its number of items if that is known.

    Its first item has number `first`.
    """

    def __init__(self, items: Iterator[Any], n_items: int | None = None, first: int = 0) -> None:
        self.first = first
        self._items = items
        self.n_items = n_items
        self.has_ended = False
        self._error: Exception | None = None

    def batch(self, size: int) -> list[Any]:
        """Read up to `size` items: fewer if they are slow to come, none at the end."""
        items: list[Any] = []
        deadline = monotonic_ns() + _BATCH_NS
        while not items or (len(items) < size and monotonic_ns() <= deadline):
            try:
                item = next(self._items)
            except StopIteration:
                self.has_ended = True
                break
            except Exception as error:
                if is_raised_by_handler(error):
                    raise
                self.end(error)  # raised when its turn comes
                break
            items.append(item)
        return items

    @property
    def has_ended_by_error(self) -> bool:
        """Whether an error has ended the input and is not yet raised."""
        return self._error is not None

    def end(self, error: Exception) -> None:
        """End the input with an error: nothing more is read."""
        self.has_ended, self._error = True, error

    def raise_error(self) -> None:
        """Raise the error that has ended the input, if there is one."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise_again(error)
        finally:
            del error


class Pace:
    """The size of the next batch, and how far the input is read ahead.

    Parameters
    ----------
    n_workers : int
        The number of workers.
    buffersize : int or None
        The most items to read ahead; by default a few batches for each worker.
    chunksize : int or None
        The size of every batch; by default batches grow.

    Attributes
    ----------
    size : int
        The items in the next batch.
    largest : int
        The items in the largest batch so far.
    """

    def __init__(
        self, n_workers: int, buffersize: int | None = None, chunksize: int | None = None
    ) -> None:
        self._n_workers = n_workers
        self._buffersize = buffersize
        self._is_fixed = chunksize is not None
        self.size = chunksize or 1
        self.largest = 1

    @property
    def ahead(self) -> int:
        """The most items that may be on their way from the input to the caller."""
        return self._buffersize or _BATCHES_AHEAD * self._n_workers * self.size

    def learn(self, n_items: int, busy_ns: int, nbytes: int) -> None:
        """Adapt the size to a batch that has come: its time, and the bytes sent for it."""
        self.largest = max(self.largest, n_items)
        if self._is_fixed:
            return
        limit = (
            _MAX_BATCH if self._buffersize is None else self._buffersize // (2 * self._n_workers)
        )
        by_time = n_items * _BATCH_NS // max(1, busy_ns)
        by_nbytes = n_items * _BATCH_NBYTES // max(1, nbytes)
        self.size = max(1, min(2 * self.size, by_time, by_nbytes, limit))


class _Stream:
    """Items on their way to workers, and results on their way to the caller."""

    def __init__(
        self, queue: WorkQueue, source: StreamInput, pace: Pace, tick: Tick | None
    ) -> None:
        self._queue = queue
        self._source = source
        self._pace = pace
        self._tick = tick
        self._n_put = self._n_arrived = self._n_out = source.first  # items
        self._arrived: dict[int, BatchResult] = {}
        self._next_look_ns = 0
        self._is_input_slow = False  # when it was last read
        self._owner = os.getpid()

    def results(self, ordered: bool) -> Iterator[Any]:
        """Yield all results; what an item or the input raises is raised when its turn comes."""
        due = self._source.first
        while (batch := self._next_batch(due if ordered else None)) is not None:
            due = batch.stop
            for result in _yield_results(batch):
                self._n_out += 1
                yield result
                if not self._queue.runs_in_caller and monotonic_ns() > self._next_look_ns:
                    if not self._is_input_slow:  # results that are there must not wait for it
                        self._feed_workers()
                    self._take_results(0)
        self._source.raise_error()

    def _next_batch(self, due: int | None) -> BatchResult | None:
        """Return the batch that begins with item `due`, or any; None when all have come."""
        while True:
            start = next(iter(self._arrived), -1) if due is None else due
            if start in self._arrived:
                return self._arrived.pop(start)
            reading_ns = self._feed_workers()
            if self._n_arrived == self._n_put and self._source.has_ended:
                return None
            # A slow input is read further, but first results get some time to come.
            self._take_results(reading_ns / 10e9 if reading_ns else _LONGEST_WAIT)

    def _feed_workers(self) -> int:
        """Hand out items while there is room, until a slow read; return its time (ns), else 0."""
        if not self._queue.runs_in_caller and os.getpid() != self._owner:
            raise RuntimeError(
                "this stream belongs to the process that began it, and this one was forked "
                "from that since; begin a new one here"
            )
        while self._queue.has_room and not self._source.has_ended:
            room = self._pace.ahead - (self._n_put - self._n_out)
            if room < 1:
                return 0
            begin = monotonic_ns()
            items = self._source.batch(min(self._pace.size, room))
            reading_ns = monotonic_ns() - begin
            if items:
                self._put_batch(items)
            self._is_input_slow = reading_ns > _LOOK_NS and not self._queue.runs_in_caller
            if self._is_input_slow:
                return reading_ns
        return 0

    def _put_batch(self, items: list[Any]) -> None:
        """Give a batch to a worker, up to the first item that cannot be sent."""
        try:
            self._queue.put(self._n_put, items)
        except UnsendableError as unsendable:
            if len(items) == 1:
                self._source.end(unsendable.error)
                return
            middle = len(items) // 2
            self._put_batch(items[:middle])
            if not self._source.has_ended_by_error:
                self._put_batch(items[middle:])
        else:
            self._n_put += len(items)

    def _take_results(self, seconds: float) -> None:
        for batch in self._queue.get(seconds):
            self._arrived[batch.start] = batch
            n_items = batch.stop - batch.start
            self._n_arrived += n_items
            self._pace.learn(n_items, batch.busy_ns, batch.nbytes)
        if self._tick is not None:
            self._tick(self._queue.ledger)
        self._next_look_ns = monotonic_ns() + _LOOK_NS


def _yield_results(batch: BatchResult) -> Iterator[Any]:
    """Yield the results of a batch up to the first failure, and raise that."""
    if isinstance(batch.result, list):
        yield from batch.result
        return
    parts: PartialResult = batch.result
    start, stop, error = parts.failures[0]
    parts.failures.clear()
    for _, results in parts.results:
        yield from results[: start - batch.start]
    try:
        raise_in_stream(error, describe_items(start, stop))
    finally:
        # The traceback refers to this frame, which must not refer to the error.
        del error

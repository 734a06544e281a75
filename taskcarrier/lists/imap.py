"""Maps over inputs that need not end: results as they come, in bounded memory.

Everything happens in the thread that asks for the next result: the input is read there, workers are
given blocks of items while they have room, results are taken in and kept until it is their turn.
Blocks grow until one takes some milliseconds, so light items cost little and heavy ones go alone.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any

from taskcarrier import progress
from taskcarrier.arguments import as_integer, check_callable
from taskcarrier.lists.map import Calls
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, in_words
from taskcarrier.run import Settings, decide, recovered, report_of, warn_again
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import Grid
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers import choose as choices
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.pools import process_crew, thread_crew
from taskcarrier.workers.queues import Came, Feed, SerialFeed, UnsendableError
from taskcarrier.workers.records import Parts
from taskcarrier.workers.task import Agree, Job
from taskcarrier.workers.thread_limits import limited

# A block is to take so long: some fifty times what it costs to hand it out.
_BLOCK_NS = 5_000_000
# ... to hold at most so many bytes, results included, and so many items. Arbitrary.
_BLOCK_NBYTES = 1 << 20
_MAX_BLOCK = 1024
# Blocks for each worker, from the input to the caller, if the caller does not say how many items.
_BLOCKS_AHEAD = 4
# While results are being handed out, workers are looked after this often.
_LOOK_NS = 2_000_000
# A signal that comes just before the caller begins to wait is not seen until something else
# happens; so it looks now and then. Progress is shown as often.
_LONGEST_WAIT = 0.1


Tick = Callable[[Ledger], None]
"""Shows how far a run has come."""

_streams: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """When the program ends: later, threads do not go on, and none can be waited for."""
    for stream in list(_streams):
        with suppress(ValueError):  # another thread is in it
            stream.close()


def imapped(
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
    """``map(func, *iterables)`` on the workers that `settings` ask for.

    They begin when the first result is asked for.
    """
    check_callable(func)
    if buffersize is not None:
        buffersize = as_integer(buffersize, "buffersize", "a positive integer or None")
        if buffersize < 1:
            raise ValueError(f"buffersize must be at least 1, got {buffersize}")
    several = len(iterables) > 1
    calls = Calls.checked(
        func, settings.recovery, several=several, collects=True, rng=rng, shared=shared
    )
    items = zip(*iterables, strict=False) if several else iter(iterables[0])
    choice = decide(settings, func, lists=True)
    if choice.backend not in choices.OWN:
        raise ValueError(
            f"imap cannot use backend {choice.backend!r} ({choice.reason}): only our own workers "
            "take items as they come; use map, or pass backend='loky' or 'threading'"
        )
    job = Job(
        _FedTask(calls),
        Dynamic(),
        Grid(0, 1),
        choice.n_jobs,
        fed=True,
        recovery=settings.recovery,
        collects=True,
        narrows=True,
        folder=settings.folder,
    )
    # Where a block may be given up as a whole, it is one item, unless the user says otherwise.
    goes_alone = settings.recovery.timeout is not None or settings.recovery.retries == 0
    if choice.backend == "sequential" or (goes_alone and chunksize is None):
        chunksize = 1
    pace = Pace(choice.n_jobs, buffersize, chunksize)
    source = Source(items, _length(iterables) if settings.verbosity >= 1 else None)
    stream = _streamed(settings, job, choice, source, pace, ordered=ordered)
    _streams.add(stream)
    return stream


def _length(iterables: Iterable[Iterable[Any]]) -> int | None:
    """How many items there will be, if that is known; for the bar alone."""
    lengths = []
    for one in iterables:
        if isinstance(one, Sized):
            try:
                lengths.append(len(one))
            except (TypeError, OverflowError):  # it has none after all, or too great a one
                return None
    return min(lengths, default=None)


def _streamed(
    settings: Settings,
    job: Job,
    choice: Choice,
    source: Source,
    pace: Pace,
    *,
    ordered: bool,
) -> Generator[Any, None, None]:
    with (
        progress.shown(settings.verbosity, source.n_items, job.n_workers) as tick,
        _feed(settings, job, choice, pace, tick) as feed,
    ):
        yield from _Stream(feed, source, pace, tick).results(ordered)


@contextmanager
def _feed(
    settings: Settings, job: Job, choice: Choice, pace: Pace, tick: Tick | None
) -> Iterator[Feed]:
    """Workers for as long as the stream is open; then the report is kept."""
    started_ns = monotonic_ns()
    owner = os.getpid()
    notes: Sequence[str] = ()
    staging: Staging | None = None
    feed: Feed
    with ExitStack() as stack:
        if choice.backend == "sequential":
            stack.enter_context(limited.open())
            feed = SerialFeed(job)
        elif choice.backend == "threading":
            threads = stack.enter_context(thread_crew(choice.n_jobs))
            stack.enter_context(limited.open())
            feed = threads.feed(job)
        else:
            choices.load_processes()
            from taskcarrier.workers.pickling import pack  # noqa: PLC0415  # loads joblib

            staging = settings.staging()
            parcel = pack(job, staging)
            notes = parcel.notes
            processes = stack.enter_context(process_crew(choice.n_jobs))
            feed = processes.feed(job, parcel)
        ended_well = False
        try:
            yield feed
            ended_well = True
        finally:
            if os.getpid() == owner:  # a forked child leaves its parent's workers alone
                ran = feed.close()
                if tick is not None:  # the last results came before they were counted
                    tick(feed.ledger)
                n_begun = len({account.worker for account in ran.accounts})
                report = report_of(
                    replace(job, n_workers=max(1, n_begun)),
                    choice,
                    ran,
                    staging,
                    chunksize=pace.largest,
                    ranges=sum(account.ranges for account in ran.accounts),
                    items=sum(account.items for account in ran.accounts),
                    notes=[*notes, *recovered(ran)],
                    started_ns=started_ns,
                )
                settings.keep_report(report)
                progress.log_report(settings.verbosity, report)
                # As in `execute`; nor may one take the place of what closes the stream.
                with nullcontext() if ended_well else suppress(Warning):
                    warn_again(ran.accounts)


class Source:
    """The input, read by blocks; how many items it has, if that is known."""

    def __init__(self, items: Iterator[Any], n_items: int | None = None) -> None:
        self._items = items
        self.n_items = n_items
        self.has_ended = False
        self._error: Exception | None = None

    def block(self, size: int) -> list[Any]:
        """Up to so many items; fewer if they are slow to come, none at the end."""
        items: list[Any] = []
        until = monotonic_ns() + _BLOCK_NS
        while not items or (len(items) < size and monotonic_ns() <= until):
            try:
                item = next(self._items)
            except StopIteration:
                self.has_ended = True
                break
            except Exception as error:
                if is_of_the_program(error):
                    raise
                self.end(error)  # it is raised in its turn
                break
            items.append(item)
        return items

    @property
    def has_ended_by_error(self) -> bool:
        """Whether there is something to raise."""
        return self._error is not None

    def end(self, error: Exception) -> None:
        """Nothing more is to be read, because of this."""
        self.has_ended, self._error = True, error

    def raise_error(self) -> None:
        """Raise what has ended the input, if something has."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise_again(error)
        finally:
            del error


class Pace:
    """How many items the next block has, and how far the input is read ahead.

    Parameters
    ----------
    n_workers : int
        For so many workers.
    buffersize : int or None
        So many items are read ahead at most.
    chunksize : int or None
        So many items has every block.

    Attributes
    ----------
    size : int
        Items of the next block.
    largest : int
        Items of the largest block so far.
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
        """Items that may be on their way, from the input to the caller."""
        return self._buffersize or _BLOCKS_AHEAD * self._n_workers * self.size

    def learn(self, n_items: int, busy_ns: int, nbytes: int) -> None:
        """From a block that has come: how long it took, and how many bytes were sent."""
        self.largest = max(self.largest, n_items)
        if self._is_fixed:
            return
        most = _MAX_BLOCK if self._buffersize is None else self._buffersize // (2 * self._n_workers)
        by_time = n_items * _BLOCK_NS // max(1, busy_ns)
        by_nbytes = n_items * _BLOCK_NBYTES // max(1, nbytes)
        self.size = max(1, min(2 * self.size, by_time, by_nbytes, most))


class _Stream:
    """Items on their way to workers, and results on their way to the caller."""

    def __init__(self, feed: Feed, source: Source, pace: Pace, tick: Tick | None) -> None:
        self._feed = feed
        self._source = source
        self._pace = pace
        self._tick = tick
        self._n_given = self._n_come = self._n_out = 0  # items
        self._arrived: dict[int, Came] = {}
        self._look_at_ns = 0
        self._is_slow = False  # the input, when it was last read
        self._owner = os.getpid()

    def results(self, ordered: bool) -> Iterator[Any]:
        """All of them; what an item or the input raises comes in its turn."""
        due = 0
        while (came := self._next(due if ordered else None)) is not None:
            due = came.stop
            for result in _each(came):
                self._n_out += 1
                yield result
                if not self._feed.runs_here and monotonic_ns() > self._look_at_ns:
                    if not self._is_slow:  # results that are there do not wait for the input
                        self._give()
                    self._take(0)
        self._source.raise_error()

    def _next(self, due: int | None) -> Came | None:
        """What begins with this item, or whatever is there; None when all have come."""
        while True:
            start = next(iter(self._arrived), -1) if due is None else due
            if start in self._arrived:
                return self._arrived.pop(start)
            reading_ns = self._give()
            if self._n_come == self._n_given and self._source.has_ended:
                return None
            # A slow input is read on, but not before a result has had some time to come.
            self._take(reading_ns / 10e9 if reading_ns else _LONGEST_WAIT)

    def _give(self) -> int:
        """Hand out what there is room for, up to a slow read: its time (ns), else 0."""
        if not self._feed.runs_here and os.getpid() != self._owner:
            raise RuntimeError(
                "this stream belongs to the process that began it, and this one was forked "
                "from that since; begin a new one here"
            )
        while self._feed.has_room and not self._source.has_ended:
            room = self._pace.ahead - (self._n_given - self._n_out)
            if room < 1:
                return 0
            began = monotonic_ns()
            items = self._source.block(min(self._pace.size, room))
            reading_ns = monotonic_ns() - began
            if items:
                self._hand_out(items)
            self._is_slow = reading_ns > _LOOK_NS and not self._feed.runs_here
            if self._is_slow:
                return reading_ns
        return 0

    def _hand_out(self, items: list[Any]) -> None:
        """Give a block to a worker, up to the first item that cannot be sent."""
        try:
            self._feed.give(self._n_given, items)
        except UnsendableError as found:
            if len(items) == 1:
                self._source.end(found.error)
                return
            middle = len(items) // 2
            self._hand_out(items[:middle])
            if not self._source.has_ended_by_error:
                self._hand_out(items[middle:])
        else:
            self._n_given += len(items)

    def _take(self, seconds: float) -> None:
        for came in self._feed.take(seconds):
            self._arrived[came.start] = came
            n_items = came.stop - came.start
            self._n_come += n_items
            self._pace.learn(n_items, came.busy_ns, came.nbytes)
        if self._tick is not None:
            self._tick(self._feed.ledger)
        self._look_at_ns = monotonic_ns() + _LOOK_NS


def _each(came: Came) -> Iterator[Any]:
    """The results of a range up to the first fault, which is raised."""
    if isinstance(came.result, list):
        yield from came.result
        return
    parts: Parts = came.result
    start, stop, error = parts.faults[0]
    parts.faults.clear()
    for _, results in parts.results:
        yield from results[: start - came.start]
    if isinstance(error, StopIteration):  # which would end the iterator without a word
        error = _not_the_end(error)
    add_note(error, f"while mapping {in_words(start, stop)}")
    try:
        raise_again(error)
    finally:
        # The traceback refers to this frame, which must not refer to the error.
        del error


def _not_the_end(cause: StopIteration) -> RuntimeError:
    error = RuntimeError("func raised StopIteration")
    error.__cause__ = cause
    return error


@dataclass(frozen=True, eq=False)
class _FedTask:
    """`func` on items that are handed to the worker."""

    calls: Calls

    def open(self, agree: Agree) -> _FedItems:  # noqa: ARG002  # nothing to agree on
        return _FedItems(self.calls.opened())


class _FedItems:
    """A `_FedTask` opened in one worker."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._first = 0
        self._read: Callable[[], Sequence[Any]] = list

    def hold(self, start: int, read: Callable[[], Sequence[Any]]) -> None:
        self._first, self._read = start, read

    def __call__(self, start: int, stop: int) -> Came:
        try:
            items = self._read()[start - self._first : stop - self._first]
        except Exception as error:  # noqa: BLE001  # whatever unpickling a user's object raises
            add_note(error, "taskcarrier could not unpickle these items in a worker process")
            return Came(start, stop, Parts([], [(start, stop, error)]))
        begin = monotonic_ns()
        result = self._calls.of(items, start)
        return Came(start, stop, result, monotonic_ns() - begin)

    def facts(self) -> None:
        """Nothing."""

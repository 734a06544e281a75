"""A worker process, from its start to the end of its socket: the worker's side of a pool."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pickle
import signal
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

from taskcarrier.memory import mapping_cache, parent_memory
from taskcarrier.memory.segments import Segment, descriptors_are_scarce
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Begun, Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.descriptors import Descriptor, keep_standard_free
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.loop import mark_worker_process, run_worker
from taskcarrier.workers.pickled_errors import pickle_error, pickle_warning, unpickle_error
from taskcarrier.workers.pickling import pickle_items, unpickle_items, unpickle_task
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.messages import Message, MessageSocket
from taskcarrier.workers.processes.share_jobs import unpack_share_job
from taskcarrier.workers.processes.shared_ledger import open_ledger
from taskcarrier.workers.queues import BatchResult
from taskcarrier.workers.records import (
    DeliveredFailure,
    PartialResult,
    RangeFailure,
    WorkerStats,
    WorkerWarning,
)
from taskcarrier.workers.task import Deliver, Job, WorkerContext
from taskcarrier.workers.thread_limits import make_joblib_serial

# Results that are not put in place are sent in batches: when they have this many bytes, or the
# first is this many seconds old. Both are arbitrary within an order of magnitude. The first batches
# of a run wait for fewer seconds, which double, so that the caller gets early results meanwhile.
_BATCH_NBYTES = 1 << 20
_BATCH_SECONDS = 0.02
_FIRST_BATCH_SECONDS = 0.0005
# An array that is less than this part of a batch's shared memory is copied out of it.
_KEPT_PARTS = 4

# A batch's pickle lies in a segment too, from this size on. Far below what a socket holds.
_SENT_NBYTES = 1 << 14

# The number of different warnings that are sent; arbitrary.
_MAX_WARNINGS = 100

RESULTS, STATS, READY = b"R", b"A", b"Y"
"""The first byte of a message to the parent: results of ranges, a worker's stats at the end, or
that it has unpickled an order and waits for the chunk to begin with."""
KEPT, FREE = b"K", b"F"
"""The byte after `STATS`: whether the function still holds on to shared memory."""

PackedResult = tuple[int, bytes, list[tuple[int, int]]]
"""The start of a range, its pickled result, and offsets and lengths of its large arrays."""

# The header of an order: whether batches will follow, the first chunk, and the lengths of the
# pickled attempts and of the share, which stand between header and payload.
_ORDER = struct.Struct("<?qII")
_FIRST_CHUNK = struct.Struct("<q")

LATER = -1
"""The first chunk of an order that is to be unpickled now: a later message names the chunk."""


class Order(NamedTuple):
    """What a worker is told at the beginning of a run.

    Attributes
    ----------
    payload : bytes
        The pickled job.
    attempts : list of Attempt
        What to run first.
    first : int
        The first chunk that was not run before; `LATER` if that is still to be said.
    is_streamed : bool
        Whether batches follow.
    share : bytes
        What only this worker gets of the payload (`taskcarrier.workers.processes.share_jobs`).
    """

    payload: bytes
    attempts: list[Attempt]
    first: int = 0
    is_streamed: bool = False
    share: bytes = b""

    def pack(self) -> bytes:
        """Return the message."""
        attempts = self.attempts
        pickled = pickle.dumps([tuple(attempt) for attempt in attempts]) if attempts else b""
        header = _ORDER.pack(self.is_streamed, self.first, len(pickled), len(self.share))
        return b"".join((header, pickled, self.share, self.payload))

    @classmethod
    def unpack(cls, message: bytes) -> Order:
        """Return the order in a message."""
        is_streamed, first, length, share_length = _ORDER.unpack_from(message)
        begin = _ORDER.size + length
        end = begin + share_length
        attempts = (
            [Attempt(*fields) for fields in pickle.loads(message[_ORDER.size : begin])]
            if length
            else []
        )
        return cls(message[end:], attempts, first, is_streamed, message[begin:end])


def pack_first_chunk(first: int) -> bytes:
    """Return the message to a worker that waits for it: the chunk to begin with."""
    return _FIRST_CHUNK.pack(first)


PackedBatch = bytes | tuple[int, int]
"""A pickle of a batch's pickle and the places of its large arrays; or the place of the former.

Places are offsets and lengths in the segment that comes with the message."""


def pack_batch(
    pickled: bytes, large: list[memoryview], staging: Staging
) -> tuple[PackedBatch, Segment | None]:
    """Return a batch for `pack_batch_order`, and the segment that goes with the message."""
    segment: Segment | None = None
    places = []
    for raw in large:
        segment, offset = staging.add(raw)
        places.append((offset, len(raw)))
    content = pickle.dumps((pickled, places))
    if len(content) <= _SENT_NBYTES:
        return content, segment
    segment, offset = staging.add(memoryview(content))
    return (offset, len(content)), segment


def pack_batch_order(attempt: Attempt, first: int, packed: PackedBatch) -> bytes:
    """Return a message to a worker of a stream: a range, and its batch, which begins at `first`."""
    return pickle.dumps((tuple(attempt), first, packed))


def worker_main(number: int, channel: MessageSocket, lifeline: Descriptor) -> None:
    """Run a worker process, from its start to the end of its socket."""
    mark_worker_process()
    _die_with(lifeline.fileno())
    # Ctrl-C reaches all processes of the terminal; the parent decides what becomes of the run. A
    # handler, not SIG_IGN, so that programs started by the user's function do not ignore Ctrl-C.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # All later handlers are set by functions, and stay until the process ends.
    handlers = Handlers()
    make_joblib_serial()
    mapping_cache.keep()
    with contextlib.suppress(EOFError, ConnectionResetError):
        _, files = channel.receive()
        words_fd, counter_fd, set_once_fd, *memory_fd = (file.fileno() for file in files)
        for fd in memory_fd:
            parent_memory.attach(fd)
        with keep_standard_free():
            ledger = open_ledger(words_fd, counter_fd, set_once_fd)
        files[0].close()
        while True:
            data, descriptors = channel.receive()
            if not data:  # that there is no first chunk; the job could not be unpickled
                continue
            make_joblib_serial()  # a thread of the function may have imported it
            _run_payload(number, channel, ledger, data, descriptors)
            del descriptors
            del data
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # a closed or full terminal is no error here
                    stream.flush()
    del handlers


def _die_with(lifeline: int) -> None:
    """Have the kernel kill this process when the other end of the pipe is closed."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if is_readable(lifeline):  # it was closed before the kernel was asked
        os._exit(1)


def _run_payload(
    number: int, channel: MessageSocket, ledger: Ledger, data: bytes, descriptors: list[Descriptor]
) -> None:
    order = Order.unpack(data)
    batches = _Batches(channel, ledger) if order.is_streamed else None
    doing = "unpickled the function or its arguments"
    try:
        job = (
            unpack_share_job(order.payload, order.share)
            if order.share
            else unpickle_task(order.payload, descriptors)
        )
        descriptors.clear()
        doing = "took on the caller's folder and settings"
        job.parent_state.apply(in_process=True)
    except BaseException as error:  # noqa: BLE001  # the parent raises it
        ledger.halt()
        add_note(error, f"while a worker process {doing}")
        stats = WorkerStats(number, failure=RangeFailure(None, error))
    else:
        first = _wait_for_first_chunk(channel) if order.first == LATER else order.first
        if first is None:
            stats = WorkerStats(number)
        else:
            job = replace(job, begun=Begun(first)) if first else job
            stats = _run_job(job, (number, channel, ledger), order.attempts, batches)
        del job
    packed = _pickle_stats(stats)
    # The traceback of an exception refers to chunks, and, by the loop's frame, to the stats.
    stats.failure = None
    del stats
    # Memory that the function still holds on to must not be overwritten with data of a later call.
    channel.send(STATS + (KEPT if mapping_cache.is_anything_in_use() else FREE) + packed)
    if batches is not None:
        batches.drain()


def _run_job(
    job: Job,
    place: tuple[int, MessageSocket, Ledger],
    attempts: list[Attempt],
    batches: _Batches | None,
) -> WorkerStats:
    number, channel, ledger = place
    # Results that are lost with a worker can be had again only if ranges may be run again.
    may_wait = job.retry_policy.retries > 0
    outbox = _Outbox(channel, job.folder, _BATCH_SECONDS if may_wait else 0.0)
    deliver: Deliver = outbox.deliver
    if batches is not None:
        deliver = outbox.deliver_or_cut
    else:
        ledger.set_marks(job.open_marks(), len(job.grid))
    with _record_warnings() as recorded:
        stats = run_worker(
            job, ledger, number, (deliver, outbox.flush), attempts, batch_source=batches
        )
    outbox.flush()
    stats.warnings = list(recorded.values())
    ledger.marks = None
    return stats


def _wait_for_first_chunk(channel: MessageSocket) -> int | None:
    """Tell the parent that the job is unpickled; return the chunk to begin with.

    It is None if the run is called off.
    """
    channel.send(READY)
    message, _ = channel.receive()
    if not message:
        return None
    (first,) = _FIRST_CHUNK.unpack(message)
    return int(first)


class _Batches:
    """A source of ranges whose items come by the socket, batch by batch, until an empty message."""

    def __init__(self, channel: MessageSocket, ledger: Ledger) -> None:
        self._channel = channel
        self._ledger = ledger
        self._is_over = False

    def __call__(self, worker: WorkerContext) -> Iterator[tuple[Attempt, int]]:
        number = 0
        while (message := self._receive_batch()) is not None:
            data, descriptors = message
            fields, first, packed = pickle.loads(data)
            segment = Segment(descriptors[0], on_disk=False) if descriptors else None
            del message, descriptors
            if self._ledger.is_halted:
                return
            worker.batch = (first, functools.partial(_unpickle_batch, segment, packed))
            self._ledger.hold_attempt(worker.number, number)
            yield Attempt(*fields), number
            number += 1

    def _receive_batch(self) -> Message | None:
        if self._is_over:
            return None
        message = self._channel.receive()
        self._is_over = not message[0]
        return None if self._is_over else message

    def drain(self) -> None:
        """Read and drop what the parent sent before it knew that this worker is done."""
        while self._receive_batch() is not None:
            pass


def _unpickle_batch(segment: Segment | None, packed: PackedBatch) -> Sequence[Any]:
    """Return the items of a batch; arrays among them are this worker's own."""
    memory = memoryview(b"")
    if segment is not None:
        segment.nbytes = os.fstat(segment.fd).st_size
        memory = memoryview(segment.map("private"))

    def get_bytes(place: tuple[int, int]) -> memoryview:
        return memory[place[0] : sum(place)]

    pickled, places = pickle.loads(packed if isinstance(packed, bytes) else get_bytes(packed))
    items: Sequence[Any] = pickle.loads(pickled, buffers=map(get_bytes, places))
    return items


@contextmanager
def _record_warnings() -> Iterator[dict[Any, WorkerWarning]]:
    """Record warnings of the function, each once; filters are applied in the parent."""
    recorded: dict[Any, WorkerWarning] = {}

    def record(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        if len(recorded) < _MAX_WARNINGS:
            warning = WorkerWarning(message, category, filename, lineno, _find_module(filename))
            recorded.setdefault(warning.key, warning)

    # On entry, Python forgets which warnings it has shown, so those of every run are recorded.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = record  # as documented
        yield recorded


def _find_module(filename: str) -> str | None:
    """Return the name, as warning filters know it, of the module that is just warning."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != filename:
        frame = frame.f_back
    return None if frame is None else frame.f_globals.get("__name__")


class _Outbox:
    """Results to be sent to the parent in batches; large arrays of a batch lie in one segment.

    A batch is sent with the first result that comes `max_seconds` after its first one.
    """

    def __init__(self, channel: MessageSocket, folder: str | None, max_seconds: float) -> None:
        self._channel = channel
        self._folder = folder
        self._max_seconds = max_seconds
        self._seconds = min(_FIRST_BATCH_SECONDS, max_seconds)
        self._begin_batch()

    def _begin_batch(self) -> None:
        self._batch: list[PackedResult] = []
        self._nbytes = 0
        self._start_time = 0.0
        self._staging = Staging(self._folder)
        self._segment: Segment | None = None

    def deliver(self, start: int, result: Any) -> None:
        large: list[memoryview] = []
        try:
            packed = pickle_items(result, large)
        except Exception as error:  # a user's object may raise anything when it is pickled
            add_note(error, "taskcarrier could not pickle the result for the caller")
            raise
        # Copied at once: the function may change its array when it is called again.
        places = [self._put(raw) for raw in large]
        now = time.monotonic()
        if not self._batch:
            self._start_time = now
        self._batch.append((start, packed, places))
        self._nbytes += len(packed) + sum(len(raw) for raw in large)
        if self._nbytes >= _BATCH_NBYTES or now - self._start_time >= self._seconds:
            self._seconds = min(2 * self._seconds, self._max_seconds)
            self.flush()

    def deliver_or_cut(self, start: int, result: BatchResult | PartialResult) -> None:
        """Deliver a result; cut one that cannot be sent at the item to blame, and add its error."""
        try:
            self.deliver(start, result)
        except Exception:
            if not isinstance(result, BatchResult):
                raise
            self.deliver(start, result._replace(result=_cut_at_failure(start, result.result)))

    def _put(self, raw: memoryview) -> tuple[int, int]:
        self._segment, offset = self._staging.add(raw)
        return offset, len(raw)

    def flush(self) -> None:
        if self._batch:
            packed = pickle.dumps(self._batch, protocol=5)
            fds = [] if self._segment is None else [self._segment.fd]
            self._channel.send(RESULTS + packed, fds)
            self._begin_batch()


def _cut_at_failure(start: int, result: list[Any] | PartialResult) -> list[Any] | PartialResult:
    """Return results up to the first item that failed or whose result cannot be pickled."""
    values = result if isinstance(result, list) else result.results[0][1]
    failures = [] if isinstance(result, list) else result.failures
    end = start + len(values) if not failures else failures[0].start
    for n, value in enumerate(values[: end - start]):
        try:
            pickle_items(value)
        except Exception as error:  # noqa: BLE001  # a user's object may raise anything when it is pickled
            add_note(error, "taskcarrier could not pickle the result for the caller")
            failures = [DeliveredFailure(start + n, start + n + 1, error)]
            values = values[:n]
            break
    if not failures:
        return values
    return PartialResult([(slice(start, start + len(values)), values)], failures[:1])


def unpickle_results(message: Message, on_disk: bool) -> Iterator[tuple[int, bytes, list[Any]]]:
    """Yield, in the parent, starts of ranges, pickled results, and the bytes of large arrays.

    The bytes lie in shared memory that no other process uses any more. Those that are a small part
    of it are copied, or they would keep the rest alive. All are copied when so much is mapped that
    descriptors get scarce.
    """
    data, descriptors = message
    batch: list[PackedResult] = pickle.loads(data[1:])
    memory = memoryview(b"")
    min_nbytes = 0
    if descriptors:
        memory = memoryview(Segment.take_over(descriptors[0], on_disk).map("write"))
        min_nbytes = len(memory) + 1 if descriptors_are_scarce() else len(memory) // _KEPT_PARTS

    def get_bytes(offset: int, nbytes: int) -> Any:
        raw = memory[offset : offset + nbytes]
        return raw if nbytes >= min_nbytes else bytearray(raw)

    for start, packed, places in batch:
        yield start, packed, [get_bytes(*place) for place in places]


def _pickle_stats(stats: WorkerStats) -> bytes:
    failure = stats.failure
    packed_failure = (
        None if failure is None else (failure.range, pickle_error(failure.error), failure.attempt)
    )
    numbers = (stats.worker, stats.n_ranges, stats.n_items, stats.busy_ns)
    packed_warnings = list(map(_pickle_warning, stats.warnings))
    return pickle.dumps((numbers, stats.facts, packed_failure, packed_warnings), protocol=5)


def _pickle_warning(warning: WorkerWarning) -> bytes:
    try:
        packed = pickle_warning(warning)
    except Exception:  # noqa: BLE001  # a user's object may raise anything when it is pickled
        text = f"{warning.category.__qualname__}: {warning.message}"
        packed = pickle.dumps(warning._replace(message=text, category=UserWarning))
    return packed


def unpickle_stats(packed: bytes) -> WorkerStats:
    """Return, in the parent, the stats that a worker has sent; the name is left to the caller."""
    numbers, facts, packed_failure, packed_warnings = pickle.loads(packed)
    failure = None
    if packed_failure is not None:
        failed_range, packed_error, attempt = packed_failure
        failure = RangeFailure(failed_range, unpickle_error(packed_error), attempt=attempt)
    worker, n_ranges, n_items, busy_ns = numbers
    stats = WorkerStats(worker, "", n_ranges, n_items, busy_ns, facts, failure)
    stats.warnings = list(map(unpickle_items, packed_warnings))
    return stats

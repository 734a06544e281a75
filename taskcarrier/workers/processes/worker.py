"""A worker process from its start to the end of its socket: the other side of a pool."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from taskcarrier.memory import mapping_cache, parent_memory
from taskcarrier.memory.segments import Segment, descriptors_are_scarce
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note
from taskcarrier.scheduling.counters import FileCounter, FileSetOnce
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.descriptors import Descriptor, keep_standard_free
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.loop import mark_worker_process, run_worker
from taskcarrier.workers.pickled_errors import pickle_error, pickle_warning, unpickle_error
from taskcarrier.workers.pickling import pickle_items, unpickle_items, unpickle_task
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.messages import Message, MessageSocket
from taskcarrier.workers.queues import BatchResult
from taskcarrier.workers.records import PartialResult, RangeFailure, WorkerStats, WorkerWarning
from taskcarrier.workers.task import BatchRunner, Deliver
from taskcarrier.workers.thread_limits import serial_joblib

# Results that are not put in place travel in batches: when this many bytes or seconds have
# come together. Both are arbitrary within an order of magnitude. The first batches of a run are
# smaller, by seconds that double, so that the caller takes in results of short runs meanwhile.
_BATCH_NBYTES = 1 << 20
_BATCH_SECONDS = 0.02
_FIRST_BATCH_SECONDS = 0.0005
# An array that is less than this part of a batch's shared memory is copied out of it.
_KEPT_PARTS = 4

# More different warnings than this are not sent; arbitrary.
_MAX_WARNINGS = 100

RESULTS, STATS = b"R", b"A"
"""What a message to the caller is: results of ranges, or the end of a run."""
KEPT, FREE = b"K", b"F"
"""Whether the function still holds on to shared memory then."""

PackedResult = tuple[int, bytes, list[tuple[int, int]]]
"""Start of a range, its pickled result, and where its large arrays lie: offsets and lengths."""

# Before a payload stands whether batches of items will follow, the length of what this worker alone
# is to begin with, and that.
_ORDER = struct.Struct("<?I")


def order(attempts: list[Attempt], payload: bytes, *, is_streamed: bool = False) -> bytes:
    """A message to a worker: what it is to run first, the run, and whether batches follow."""
    first = pickle.dumps([tuple(one) for one in attempts]) if attempts else b""
    return _ORDER.pack(is_streamed, len(first)) + first + payload


PackedBatch = bytes | tuple[int, int]
"""A batch's pickle and where its large arrays lie, pickled, or where that lies itself: offsets and
lengths in the segment that comes with it."""


def batch_order(attempts: Attempt, first: int, packed: PackedBatch) -> bytes:
    """A message to a worker that is fed: a range, and the batch that it is of, from `first` on."""
    return pickle.dumps((tuple(attempts), first, packed))


def _parse_order(message: bytes) -> tuple[list[Attempt], bytes, bool]:
    is_streamed, length = _ORDER.unpack_from(message)
    begin = _ORDER.size + length
    attempts = (
        [Attempt(*one) for one in pickle.loads(message[_ORDER.size : begin])] if length else []
    )
    return attempts, message[begin:], is_streamed


def ledger_over(words_fd: int, counter_fd: int, set_once_fd: int) -> Ledger:
    """The ledger of a pool, over its files."""
    memory = memoryview(mmap.mmap(words_fd, 0))
    words, marks = memory[:-OWN_MARKS].cast("q"), memory[-OWN_MARKS:]
    return Ledger(words, FileCounter(counter_fd), FileSetOnce(set_once_fd), marks)


def worker_main(
    number: int, down: Connection, life: Connection, environment: dict[str, str | None]
) -> None:
    """A worker process, from its start to the end of its socket.

    `environment` is what programs that the function starts are to find of the variables that were
    set for this process alone; None for what they are not to find.
    """
    mark_worker_process()
    for name, value in environment.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    _die_with(life.fileno())
    # Ctrl-C reaches the whole terminal; what becomes of a run is the caller's decision. A
    # handler, not SIG_IGN, so that programs started by the user's function are not deaf to it.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    handlers = Handlers()  # all others are set by functions, for as long as this process lives
    serial_joblib()
    mapping_cache.keep()
    with keep_standard_free():
        channel = MessageSocket(socket.socket(fileno=os.dup(down.fileno())))
    down.close()
    with contextlib.suppress(EOFError, ConnectionResetError):
        _, files = channel.receive()
        words_fd, counter_fd, set_once_fd, *memory_fd = (file.fileno() for file in files)
        for fd in memory_fd:
            parent_memory.attach(fd)
        with keep_standard_free():
            ledger = ledger_over(words_fd, counter_fd, set_once_fd)
        files[0].close()
        while True:
            data, descriptors = channel.receive()
            _run_payload(number, channel, ledger, data, descriptors)
            del descriptors
            del data
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # a closed or full terminal is not ours
                    stream.flush()
    del handlers


def _die_with(life: int) -> None:
    """Have the kernel kill this process when the other end of the pipe is closed."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if is_readable(life):  # it was closed before we asked
        os._exit(1)


def _run_payload(
    number: int, channel: MessageSocket, ledger: Ledger, data: bytes, descriptors: list[Descriptor]
) -> None:
    attempts, payload, is_streamed = _parse_order(data)
    batches = _Batches(channel, ledger, number) if is_streamed else None
    doing = "unpickled the function or its arguments"
    try:
        job = unpickle_task(payload, descriptors)
        descriptors.clear()
        doing = "took on the caller's folder and settings"
        job.parent_state.apply(in_process=True)
    except BaseException as error:  # noqa: BLE001  # the caller raises it
        ledger.halt()
        add_note(error, f"while a worker process {doing}")
        stats = WorkerStats(number, failure=RangeFailure(None, error))
    else:
        outbox = _Outbox(channel, job.folder)
        deliver: Deliver = outbox.deliver
        if is_streamed:
            deliver = outbox.deliver_or_fault
        else:
            ledger.set_marks(job.open_marks(), len(job.grid))
        with _warnings_heard() as heard:
            stats = run_worker(
                job, ledger, number, (deliver, outbox.flush), attempts, attempt_source=batches
            )
        outbox.flush()
        stats.warnings = list(heard.values())
        ledger.marks = None
        del job
    packed = _pickle_stats(stats)
    # An exception's traceback refers to chunks, and to the account through the loop's frame.
    stats.failure = None
    del stats
    # What the function still holds on to must not be overwritten by a later call's data.
    channel.send(STATS + (KEPT if mapping_cache.is_anything_in_use() else FREE) + packed)
    if batches is not None:
        batches.drain()


class _Batches:
    """Ranges whose items come through the socket, batch by batch, until an empty message."""

    def __init__(self, channel: MessageSocket, ledger: Ledger, worker: int) -> None:
        self._channel = channel
        self._ledger = ledger
        self._worker = worker
        self._is_over = False

    def __call__(self, runner: BatchRunner) -> Iterator[tuple[Attempt, int]]:
        number = 0
        while (message := self._next()) is not None:
            data, descriptors = message
            attempts, first, packed = pickle.loads(data)
            segment = Segment(descriptors[0], on_disk=False) if descriptors else None
            del message, descriptors
            if self._ledger.is_halted:
                return
            runner.hold(first, functools.partial(_batch_items, segment, packed))
            self._ledger.hold_attempt(self._worker, number)
            yield Attempt(*attempts), number
            number += 1

    def _next(self) -> Message | None:
        if self._is_over:
            return None
        message = self._channel.receive()
        self._is_over = not message[0]
        return None if self._is_over else message

    def drain(self) -> None:
        """Take in what the caller has sent before it knew that this worker is done."""
        while self._next() is not None:
            pass


def _batch_items(segment: Segment | None, packed: PackedBatch) -> Sequence[Any]:
    """The items of a batch; arrays among them are this worker's own."""
    memory = memoryview(b"")
    if segment is not None:
        segment.nbytes = os.fstat(segment.fd).st_size
        memory = memoryview(segment.map("private"))

    def at(place: tuple[int, int]) -> memoryview:
        return memory[place[0] : sum(place)]

    pickled, places = pickle.loads(packed if isinstance(packed, bytes) else at(packed))
    items: Sequence[Any] = pickle.loads(pickled, buffers=map(at, places))
    return items


@contextmanager
def _warnings_heard() -> Iterator[dict[Any, WorkerWarning]]:
    """Warnings of the function, each once: the caller's filters decide what becomes of them."""
    heard: dict[Any, WorkerWarning] = {}

    def hear(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        if len(heard) < _MAX_WARNINGS:
            one = WorkerWarning(message, category, filename, lineno, _module_of(filename))
            heard.setdefault(one.key, one)

    # Where it is entered, Python forgets which warnings it has shown, so that every run is heard.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = hear  # as documented
        yield heard


def _module_of(filename: str) -> str | None:
    """The module that has just warned, by which filters know it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != filename:
        frame = frame.f_back
    return None if frame is None else frame.f_globals.get("__name__")


class _Outbox:
    """Results on their way up, in batches; the large arrays of a batch lie in one segment."""

    def __init__(self, channel: MessageSocket, folder: str | None) -> None:
        self._channel = channel
        self._folder = folder
        self._seconds = _FIRST_BATCH_SECONDS
        self._begin()

    def _begin(self) -> None:
        self._batch: list[PackedResult] = []
        self._nbytes = 0
        self._since = 0.0
        self._staging = Staging(self._folder)
        self._segment: Segment | None = None

    def deliver(self, start: int, result: Any) -> None:
        large: list[memoryview] = []
        try:
            packed = pickle_items(result, large)
        except Exception as error:
            add_note(error, "taskcarrier could not pickle the result for the caller")
            raise
        # At once: the function may change its array when it is called again.
        places = [self._put(batch) for batch in large]
        now = time.monotonic()
        if not self._batch:
            self._since = now
        self._batch.append((start, packed, places))
        self._nbytes += len(packed) + sum(len(batch) for batch in large)
        if self._nbytes >= _BATCH_NBYTES or now - self._since >= self._seconds:
            self._seconds = min(2 * self._seconds, _BATCH_SECONDS)
            self.flush()

    def deliver_or_fault(self, start: int, result: BatchResult | PartialResult) -> None:
        """What cannot be sent comes as a fault of its item, after what could be sent before it."""
        try:
            self.deliver(start, result)
        except Exception:
            if not isinstance(result, BatchResult):
                raise
            self.deliver(start, result._replace(result=_up_to_a_fault(start, result.result)))

    def _put(self, batch: memoryview) -> tuple[int, int]:
        self._segment, offset = self._staging.add(batch)
        return offset, len(batch)

    def flush(self) -> None:
        if self._batch:
            packed = pickle.dumps(self._batch, protocol=5)
            fds = [] if self._segment is None else [self._segment.fd]
            self._channel.send(RESULTS + packed, fds)
            self._begin()


def _up_to_a_fault(start: int, result: list[Any] | PartialResult) -> list[Any] | PartialResult:
    """Results up to the first that cannot be pickled, or fails anyway, if there is one."""
    values = result if isinstance(result, list) else result.results[0][1]
    faults = [] if isinstance(result, list) else result.faults
    end = start + len(values) if not faults else faults[0][0]
    for n, value in enumerate(values[: end - start]):
        try:
            pickle_items(value)
        except Exception as error:  # noqa: BLE001  # whatever pickling a user's object raises
            add_note(error, "taskcarrier could not pickle the result for the caller")
            faults = [(start + n, start + n + 1, error)]
            values = values[:n]
            break
    if not faults:
        return values
    return PartialResult([(slice(start, start + len(values)), values)], faults[:1])


def unpickle_results(message: Message, on_disk: bool) -> Iterator[tuple[int, bytes, list[Any]]]:
    """Starts of ranges, their pickled results, and the large arrays' bytes, in the caller.

    The bytes are shared memory that nobody else knows of any more. What is a small part of it is
    copied, or it would keep the rest alive; so is everything once so much is mapped that
    descriptors get scarce.
    """
    data, descriptors = message
    batch: list[PackedResult] = pickle.loads(data[1:])
    memory = memoryview(b"")
    least = 0
    if descriptors:
        memory = memoryview(Segment.take_over(descriptors[0], on_disk).map("write"))
        least = len(memory) + 1 if descriptors_are_scarce() else len(memory) // _KEPT_PARTS

    def block(offset: int, nbytes: int) -> Any:
        found = memory[offset : offset + nbytes]
        return found if nbytes >= least else bytearray(found)

    for start, packed, places in batch:
        yield start, packed, [block(*place) for place in places]


def _pickle_stats(stats: WorkerStats) -> bytes:
    failure = stats.failure
    packed_failure = (
        None if failure is None else (failure.range, pickle_error(failure.error), failure.attempt)
    )
    numbers = (stats.worker, stats.ranges, stats.items, stats.busy_ns)
    heard = list(map(_pickle_warning, stats.warnings))
    return pickle.dumps((numbers, stats.facts, packed_failure, heard), protocol=5)


def _pickle_warning(heard: WorkerWarning) -> bytes:
    try:
        packed = pickle_warning(heard)
    except Exception:  # noqa: BLE001  # whatever pickling a user's object raises
        text = f"{heard.category.__qualname__}: {heard.message}"
        packed = pickle.dumps(heard._replace(message=text, category=UserWarning))
    return packed


def unpickle_stats(packed: bytes) -> WorkerStats:
    """What a worker did, in the caller."""
    (worker, ranges, items, busy_ns), facts, packed_failure, heard = pickle.loads(packed)
    failure = None
    if packed_failure is not None:
        where, packed_error, attempt = packed_failure
        failure = RangeFailure(where, unpickle_error(packed_error), attempt=attempt)
    stats = WorkerStats(worker, "", ranges, items, busy_ns, facts, failure)
    stats.warnings = list(map(unpickle_items, heard))
    return stats

"""The parent's side of the workers of one run: deadlines, deaths, replacements, statistics.

How a run survives the death of a worker. The ledger tells what the worker had in hand, and the
retry policy what to run instead: how often, and in which pieces (`taskcarrier.scheduling.retries`).
A new process takes the dead worker's place and number, and gets that first. A range that takes too
long is treated alike: its worker is killed. This is so for every run; where ranges come from, and
what becomes of one that is given up, is known to its `RangeSource`.
"""

from __future__ import annotations

import contextlib
import select
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.loop import make_timeout_error
from taskcarrier.workers.pickling import Payload, unpickle_items
from taskcarrier.workers.processes.messages import MAX_READS, MessageSocket
from taskcarrier.workers.processes.worker import (
    KEPT,
    LATER,
    READY,
    RESULTS,
    Order,
    pack_first_chunk,
    unpickle_results,
    unpickle_stats,
)
from taskcarrier.workers.records import RunResult, WorkerDeath, WorkerStats
from taskcarrier.workers.task import Job

GRACE_SECONDS = 0.5
"""The seconds that workers of an interrupted run get for their ranges before they are killed."""
STARTING_SECONDS = 60.0
"""The seconds in which a worker starts and imports what the function needs, or else it hangs."""
LONGEST_WAIT = 1.0
"""The largest number of seconds in one wait: a signal that comes just before the caller begins to
wait is not seen until the wait ends."""


class Worker(Protocol):
    """A worker process, as a run needs it (`taskcarrier.workers.processes.pool.WorkerProcess`)."""

    name: str
    channel: MessageSocket
    is_free: bool

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable once the process has ended; -1 if it was reaped."""

    def kill(self) -> None:
        """Kill the process."""

    def reap(self) -> int | None:
        """Close the descriptors of a process that has ended, and return its exit code."""


GetWorker = Callable[[int], Worker]
"""A function that returns the worker with a number, a new one if the last has died."""


class RangeSource(Protocol):
    """A run, as the supervisor of its workers needs it: where ranges come from and results go."""

    def range_in_hand(self, number: int) -> Attempt | None:
        """Return the range that a worker has in hand; None if it has none, or has finished it."""

    def count_done(self, number: int, name: str) -> WorkerStats:
        """Return the stats of a worker that cannot send them, as far as the parent knows them."""

    def take_result(self, number: int, start: int, packed: bytes, large: list[Any]) -> None:
        """Take the result of a range from a worker; `unpickle_result` reads it."""

    def check_halt(self, death: WorkerDeath) -> None:
        """Handle a halt of the run, if there is one, by a worker that died before it said why."""

    def give_up(self, death: WorkerDeath, error: TimeoutError | None) -> None:
        """Give up what a dead worker had in hand, if anything; for `error` if it took too long."""

    def replace_worker(self, number: int, in_hand: Attempt | None, nexts: list[Attempt]) -> None:
        """Start another worker in place of a dead one, if the run goes on.

        It runs `nexts` instead of `in_hand`, and what the dead one had not begun.
        """


class Watch:
    """A way to wait until any of several workers sends a message or ends."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._by_fd: dict[int, tuple[int, Worker]] = {}

    def add(self, number: int, worker: Worker) -> None:
        """Watch a worker; `wait` yields `number` with it."""
        for fd in (worker.channel.fileno(), worker.pidfd):
            self._by_fd[fd] = (number, worker)
            self._poll.register(fd, select.POLLIN)

    def wake_by(self, fd: int) -> None:
        """End a wait when this descriptor is readable, too."""
        self._poll.register(fd, select.POLLIN)

    def stop_listening(self, worker: Worker) -> None:
        """Watch only the end of a worker whose stream of messages has ended."""
        self._poll.unregister(worker.channel.fileno())

    def drop(self, worker: Worker) -> None:
        """Stop watching a worker."""
        for fd in (worker.channel.fileno(), worker.pidfd):
            self._by_fd.pop(fd, None)  # both may be missing, if `add` was cut short
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)

    def wait(self, seconds: float) -> Iterator[tuple[int, Worker, bool]]:
        """Yield ``(number, worker, has_ended)``: workers with messages first, then ended ones.

        Wait at most `seconds`. Workers that are dropped meanwhile are left out.
        """
        fds = [fd for fd, _ in self._poll.poll(seconds * 1e3) if fd in self._by_fd]
        ended = {fd for fd in fds if fd == self._by_fd[fd][1].pidfd}
        for fd in sorted(fds, key=ended.__contains__):
            if fd in self._by_fd:
                yield *self._by_fd[fd], fd in ended


class Supervisor:
    """The keeper of the workers of one run, which is the `source` of their ranges and owns this.

    With `is_streamed`, batches follow a worker's order until an empty message tells it that no more
    will come. While `first` is `LATER`, workers that are started only unpickle the job; they run it
    when `begin` has told them the first chunk.
    """

    def __init__(
        self,
        source: RangeSource,
        job: Job,
        ledger: Ledger,
        payload: Payload,
        *,
        is_streamed: bool = False,
        first: int = 0,
    ) -> None:
        # Weak: in a circle, results would be kept until the next garbage collection.
        self._source: RangeSource = weakref.proxy(source)
        self._job = job
        self._ledger = ledger
        self._payload = payload
        self._is_streamed = is_streamed
        self._first = first
        self._held: dict[int, Worker] = {}  # those that wait to be told the first chunk
        self.ready: set[int] = set()  # those among them that have unpickled the job
        self._watch = Watch()
        self.at_work: dict[int, Worker] = {}  # those that have not reported
        self._started: dict[int, Worker] = {}  # those that got a whole order, without dead ones
        self._told: set[int] = set()  # those that know that no more batches will come
        self._overdue: dict[int, tuple[int, int]] = {}  # the range for which a worker was killed
        self._idle_deaths: dict[int, int] = {}
        self._worker_stats: list[WorkerStats] = []
        self.deaths: list[WorkerDeath] = []
        self.unrecovered_deaths: list[WorkerDeath] = []  # the source adds those that end the run
        self.failed: WorkerStats | None = None  # of the last worker that has reported an error
        self.is_over = False  # an error has come, or the caller stops the run
        self._is_memory_kept = False
        self._is_hurried = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing new may be started.

        The ledger's halt does not decide: a worker halts the run before it sends its error, which
        may not arrive.
        """
        return self.is_over or bool(self.unrecovered_deaths)

    def halt(self) -> None:
        """Make the workers stop at their next range, and start nothing new."""
        self.is_over = True
        self._ledger.halt()

    def start(self, number: int, worker: Worker, attempts: Sequence[Attempt] = ()) -> None:
        """Start a worker on these attempts, and then on what the source has for it."""
        self._ledger.clear_row(number)
        self._started.pop(number, None)
        self.at_work[number] = worker
        self._watch.add(number, worker)
        if self._first == LATER:
            self._held[number] = worker
        share = self._payload.get_share(number)
        order = Order(self._payload.data, list(attempts), self._first, self._is_streamed, share)
        worker.is_free = False
        self.send(worker, order.pack(), self._payload.fds)
        self._started[number] = worker  # at last: if this is cut short, the worker never reports

    def adopt(self, at_work: dict[int, Worker], told: set[int], stats: list[WorkerStats]) -> None:
        """Look after workers that were started before; those `told` have got their whole order.

        `stats` are of those that have reported already.
        """
        for each in stats:
            self._add_stats(each)
        for number, worker in at_work.items():
            self.at_work[number] = worker
            self._watch.add(number, worker)
            if number in told:
                self._started[number] = worker
        for number, worker in at_work.items():
            self._read_messages(number, worker)  # some that came may not have been taken

    def wake_by(self, fd: int) -> None:
        """End a step when this descriptor is readable, too."""
        self._watch.wake_by(fd)

    def begin(self, first: int, numbers: Iterable[int]) -> None:
        """Tell these workers to run the job from chunk `first` on, if they wait for that."""
        self._first = first
        for number in numbers:
            if (worker := self._held.pop(number, None)) is not None:
                self.send(worker, pack_first_chunk(first), [])

    def send(self, worker: Worker, message: bytes, fds: list[int]) -> None:
        """Send a message to a worker. If it is just dying, its descriptor will show that."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, fds)

    def step(self, seconds: float) -> None:
        """Wait for messages and ends of workers, at most for `seconds`, and handle them."""
        seconds = min(seconds, LONGEST_WAIT, self._kill_overdue())
        for number, worker, has_ended in self._watch.wait(seconds):
            # Of a worker that has ended all: they are from before its death.
            is_open = self._read_messages(number, worker, None if has_ended else MAX_READS)
            if number not in self.at_work:
                continue
            if has_ended:
                self._handle_death(number, worker)
            elif not is_open:
                self._watch.stop_listening(worker)

    def end(self, seconds: float) -> None:
        """Wait for the workers to report, and kill those that do not within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            for number, worker in list(self._held.items()):
                self.send(worker, b"", [])
                self._held.pop(number, None)
            if self._first == LATER:  # they may be importing the function's modules
                deadline += STARTING_SECONDS
            if self._is_streamed:
                for number, worker in list(self._started.items()):
                    self.send(worker, b"", [])
                    self._told.add(number)
                    worker.is_free = number not in self.at_work
            self._wait_for_stats(deadline)
        finally:
            # Also those that were not told: they would take the next run for a batch of this one.
            for number, worker in {**self._started, **self.at_work}.items():
                if not worker.is_free:
                    self._kill(number, worker)
            if self._is_memory_kept:
                for segment in self._payload.segments:
                    segment.retire()

    def hurry(self) -> None:
        """Make `end` kill workers that are not ready yet; call this from another thread."""
        self._is_hurried = True

    def _wait_for_stats(self, deadline: float) -> None:
        for number, worker in list(self.at_work.items()):
            self._read_messages(number, worker)  # some that came may not have been read
        while (
            self.at_work.keys() & self._started.keys()
            and not self._is_hurried
            and (left := deadline - time.monotonic()) > 0
        ):
            for number, worker, has_ended in self._watch.wait(min(left, LONGEST_WAIT)):
                is_open = self._read_messages(number, worker)
                if number in self.at_work and (has_ended or not is_open):
                    self._kill(number, worker)

    def make_result(self) -> RunResult:
        """Return how the run ended, as far as its workers show."""
        self._worker_stats.sort(key=lambda stats: stats.worker)
        result = RunResult.read(self._worker_stats, self._ledger)
        result.deaths, result.unrecovered_deaths = self.deaths, self.unrecovered_deaths
        return result

    def _read_messages(
        self, number: int, worker: Worker, max_reads: int | None = MAX_READS
    ) -> bool:
        """Handle what a worker has sent; return whether more messages may come."""
        is_open = worker.channel.read(max_reads)
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == READY:
                self.ready.add(number)
            elif data[:1] == RESULTS:
                for result in unpickle_results(message, on_disk=self._job.folder is not None):
                    self._source.take_result(number, *result)
            else:
                # First of all, with no call between: even if the rest is interrupted, the worker is
                # free, and is not waited for.
                self._is_memory_kept |= data[1:2] == KEPT
                worker.is_free = number in self._told or not self._is_streamed
                del self.at_work[number]
                self._stop_watching(number, worker)
                stats = unpickle_stats(data[2:])
                stats.name = worker.name
                self._add_stats(stats)
        return is_open

    def _add_stats(self, stats: WorkerStats) -> None:
        self._worker_stats.append(stats)
        if stats.failure is not None:
            self.failed = stats
            self.halt()

    def _stop_watching(self, number: int, worker: Worker) -> None:
        self._overdue.pop(number, None)
        self._held.pop(number, None)
        self.ready.discard(number)
        self._watch.drop(worker)

    def _kill(self, number: int, worker: Worker) -> None:
        """Kill a worker that has not reported, or was not told to; what it did still counts."""
        worker.kill()
        self._started.pop(number, None)
        if number in self.at_work:
            del self.at_work[number]
            self._stop_watching(number, worker)
            self._worker_stats.append(self._source.count_done(number, worker.name))
        worker.reap()

    # Deadlines and deaths

    def _kill_overdue(self) -> float:
        """Kill workers whose range has taken too long; return the seconds until the next one."""
        timeout = self._job.retry_policy.timeout
        if timeout is None:
            return LONGEST_WAIT
        now = time.monotonic_ns()
        next_seconds = timeout
        for number, worker in self.at_work.items():
            attempt = self._source.range_in_hand(number)
            start_time_ns = self._ledger.start_time_ns(number)
            if attempt is None or not start_time_ns:
                continue
            seconds = timeout - (now - start_time_ns) / 1e9
            if seconds > 0:
                next_seconds = min(next_seconds, seconds)
            elif number not in self._overdue:
                self._overdue[number] = attempt[:2]
                worker.kill()
        return next_seconds

    def _handle_death(self, number: int, worker: Worker) -> None:
        """Record a death, decide on what the worker had in hand, and replace the worker."""
        overdue = self._overdue.get(number)
        del self.at_work[number]
        self._started.pop(number, None)  # first: nothing may be sent to a worker that was reaped
        self._stop_watching(number, worker)
        exitcode = worker.reap()
        in_hand = self._source.range_in_hand(number)
        death = WorkerDeath.from_attempt(number, worker.name, exitcode, in_hand, overdue)
        self.deaths.append(death)
        stats = self._source.count_done(number, worker.name)
        self._worker_stats.append(stats)
        self._source.check_halt(death)
        if in_hand is None:
            self._count_idle_death(death, stats)
            nexts = []
        elif overdue is None or death.was_late:
            nexts = self._decide_next(death, in_hand)
        else:  # the worker had gone on to this range, which is not to blame
            nexts = [in_hand]
        self._source.replace_worker(number, in_hand, nexts)

    def _count_idle_death(self, death: WorkerDeath, stats: WorkerStats) -> None:
        """Count a worker that was dying when it was started, or died between two ranges."""
        number, retries = death.worker, self._job.retry_policy.retries
        self._idle_deaths[number] = 0 if stats.n_ranges else self._idle_deaths.get(number, 0) + 1
        if self._idle_deaths[number] > max(1, retries):
            self._source.give_up(death, None)

    def _decide_next(self, death: WorkerDeath, in_hand: Attempt) -> list[Attempt]:
        """Return what to run instead of a range that is to blame; if nothing, give it up."""
        retry_policy, error = self._job.retry_policy, None
        nexts: list[Attempt] = []
        if death.was_late:
            nexts = retry_policy.next_after_timeout(in_hand)
            error = make_timeout_error(retry_policy)
            add_note(error, f"{death.name} was killed")
        elif not self.unrecovered_deaths:
            nexts = retry_policy.next_after_death(in_hand, can_split=self._job.can_split)
        if not nexts:
            self._source.give_up(death, error)
        return nexts


def unpickle_result(packed: bytes, large: list[Any]) -> tuple[Any, Exception | None]:
    """Return a result and None, or None and the error for which it cannot be unpickled."""
    try:
        return unpickle_items(packed, large), None
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        add_note(error, "taskcarrier could not unpickle this result of a worker process")
        return None, error

"""One run on a pool of worker processes, seen from the parent.

How a run survives the death of a worker. A new process takes the dead worker's place and number. It
first gets the range that the dead worker had in hand (`taskcarrier.scheduling.retries` decides how
often, and in which pieces), then the chunks that belong to the number. Other losses (a claim that
was not recorded, results on their way) are found by the marks of the ledger when all workers are
done, and are shared out again. A range that takes too long is treated alike: its worker is killed.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import DONE, PENDING, RECLAIMED, SENT, Ledger
from taskcarrier.scheduling.partition import Partition
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.loop import make_timeout_error
from taskcarrier.workers.pickling import Payload, unpickle_items
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.worker import (
    KEPT,
    RESULTS,
    pack_order,
    unpickle_results,
    unpickle_stats,
)
from taskcarrier.workers.records import (
    PartialResult,
    RangeFailure,
    RunResult,
    WorkerDeath,
    WorkerStats,
)
from taskcarrier.workers.task import Deliver, Job

GRACE_SECONDS = 0.5
"""The seconds that workers of an interrupted run get for their chunks before they are killed."""
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
        fds = [fd for fd, _ in self._poll.poll(seconds * 1e3)]
        ended = {fd for fd in fds if fd == self._by_fd[fd][1].pidfd}
        for fd in sorted(fds, key=ended.__contains__):
            if fd in self._by_fd:
                yield *self._by_fd[fd], fd in ended


def kill_overdue(
    timeout: float,
    workers: dict[int, Worker],
    in_hand: Callable[[int], Attempt | None],
    ledger: Ledger,
    overdue: dict[int, tuple[int, int]],
) -> float:
    """Kill workers whose range has taken too long, and add these ranges to `overdue`.

    Return the seconds until the next range will have taken too long.
    """
    now = time.monotonic_ns()
    next_seconds = timeout
    for number, worker in workers.items():
        attempt, start_time_ns = in_hand(number), ledger.start_time_ns(number)
        if attempt is None or not start_time_ns:
            continue
        seconds = timeout - (now - start_time_ns) / 1e9
        if seconds > 0:
            next_seconds = min(next_seconds, seconds)
        elif number not in overdue:
            overdue[number] = attempt[:2]
            worker.kill()
    return next_seconds


class ProcessRun:
    """The parent's side of one run: workers at work, results that came, ranges to run again."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        deliver: Deliver,
        payload: Payload,
        get_worker: Callable[[int], Worker],
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._deliver = deliver
        self._payload = payload
        self._get_worker = get_worker
        self._start_times_ns: dict[int, int] = {}
        self._watch = Watch()
        self._attempts: dict[int, Sequence[Attempt]] = {}  # what each worker was told to run first
        self._overdue: dict[int, tuple[int, int]] = {}  # the range for which a worker was killed
        self._received: set[int] = set()  # the starts of ranges whose results have come
        self._idle_deaths: dict[int, int] = {}
        self.at_work: dict[int, Worker] = {}
        self._worker_stats: list[WorkerStats] = []
        self._deaths: list[WorkerDeath] = []
        self._fatal: list[WorkerDeath] = []
        self._lost: list[tuple[int, int]] = []  # ranges given out again that were not run
        self._failures: list[RangeFailure] = []  # those that no worker reports
        self._is_over = False  # an error has come, or the caller stops the run
        self.is_memory_kept = False

    def start(self, number: int, worker: Worker, attempts: Sequence[Attempt] = ()) -> None:
        """Start a worker on these attempts, and then on chunks."""
        self._ledger.clear_row(number)
        self._start_times_ns[number] = time.monotonic_ns()
        self._attempts[number] = attempts
        self.at_work[number] = worker
        self._watch.add(number, worker)
        message = pack_order(list(attempts), self._payload.data)
        worker.is_free = False
        # If the worker is just dying, its descriptor will show that.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, self._payload.fds)

    def is_running(self) -> bool:
        """Return whether a worker is at work; if none is, first share out again what got lost."""
        if not self.at_work and self._deaths and not self._has_ended:
            lost = self._find_lost()
            marks = self._ledger.marks
            if self._job.retry_policy.retries == 0 and marks is not None:
                # What was sent has been run, and may not be run again.
                sent = [index for index in lost if marks[index] == SENT]
                lost = [index for index in lost if marks[index] != SENT]
                if sent:
                    self._fatal.append(self._deaths[-1])
            self._share_out(lost)
        return bool(self.at_work)

    @property
    def _has_ended(self) -> bool:
        """Whether nothing new may be started.

        The ledger's halt does not decide: a worker halts the run before it sends its error, which
        may not arrive.
        """
        return self._is_over or bool(self._fatal)

    def step(self, seconds: float | None) -> None:
        """Wait for messages and ends of workers, at most for `seconds`, and handle them."""
        timeout = self._job.retry_policy.timeout
        waits = [LONGEST_WAIT, *([] if seconds is None else [seconds])]
        if timeout is not None:
            waits.append(self._kill_overdue(timeout))
        for number, worker, has_ended in self._watch.wait(min(waits)):
            is_open = self._read_messages(number, worker)  # also the last, from before its death
            if number not in self.at_work:
                continue
            if has_ended:
                overdue = self._overdue.get(number)
                self._drop_worker(number, worker)
                self._handle_death(number, worker, overdue)
            elif not is_open:
                self._watch.stop_listening(worker)

    def abort(self) -> None:
        """Stop the run: workers stop at their next chunk, or are killed after `GRACE_SECONDS`."""
        self._halt()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for number, worker in list(self.at_work.items()):
                self._read_messages(number, worker)  # some that came may not have been read
            while self._busy and (left := deadline - time.monotonic()) > 0:
                self.step(left)
        finally:
            for worker in self._busy:
                worker.kill()
                worker.reap()
            self.at_work.clear()

    @property
    def _busy(self) -> list[Worker]:
        """The workers at work, without those to which no order was sent."""
        return [worker for worker in self.at_work.values() if not worker.is_free]

    def ran(self) -> RunResult:
        """Return how the run ended."""
        self._worker_stats.sort(key=lambda stats: stats.worker)
        result = RunResult.read(self._worker_stats, self._ledger)
        result.deaths, result.unrecovered_deaths = self._deaths, self._fatal
        result.failures = self._failures
        result.missing = sorted({*self._lost, *map(self._job.grid.range_of, self._find_lost())})
        if result.missing and not self._is_over:
            result.unrecovered_deaths = (
                self._fatal or self._deaths
            )  # any of them may have lost the results
        return result

    def _halt(self) -> None:
        """Make the workers stop at their next chunk, and start nothing new."""
        self._is_over = True
        self._ledger.halt()

    # Time

    def _kill_overdue(self, timeout: float) -> float:
        """Kill workers whose range has taken too long; return the seconds until the next one."""
        return kill_overdue(timeout, self.at_work, self._range_in_hand, self._ledger, self._overdue)

    # Deaths

    def _range_in_hand(self, number: int) -> Attempt | None:
        """Return the range that a worker has in hand; None if it has none, or has finished it."""
        ledger, grid = self._ledger, self._job.grid
        position = ledger.attempt_in_hand(number)
        if position is not None:
            attempt = self._attempts[number][position]
            is_done = position < ledger.n_attempts_done(number) or self._has_result(attempt)
            return None if is_done else attempt
        index = ledger.chunk_in_hand(number, len(grid))
        if index is None or (ledger.marks is not None and ledger.marks[index] != PENDING):
            return None
        return Attempt(*grid.range_of(index))

    def _has_result(self, attempt: Attempt) -> bool:
        """Return whether an attempt is a whole chunk that is finished and whose result is here."""
        index = attempt.start // self._job.grid.chunksize
        marks = self._ledger.marks
        if marks is None or self._job.grid.range_of(index) != attempt[:2]:
            return False
        return marks[index] == DONE or (marks[index] == SENT and attempt.start in self._received)

    def _handle_death(self, number: int, worker: Worker, overdue: tuple[int, int] | None) -> None:
        """Record a death, decide on what the worker had in hand, and start another in its place.

        `overdue` is the range for which the worker was killed, or None.
        """
        exitcode = worker.reap()
        if not self._has_ended:
            # If it halted the run for an error, that did not arrive: this is a death like others.
            self._ledger.resume()
        in_hand = self._range_in_hand(number)
        rest = list(self._attempts[number][self._ledger.n_attempts_done(number) :])
        if in_hand is not None and rest and rest[0] == in_hand:
            del rest[0]
        self._worker_stats.append(self._stats_of_dead(number, worker))
        death = WorkerDeath.from_attempt(number, worker.name, exitcode, in_hand, overdue)
        next_attempts = self._decide_next(death, in_hand, overdue, worker)
        if self._has_ended:
            self._lost += [attempt[:2] for attempt in (*next_attempts, *rest)]
        self._deaths.append(death)
        if in_hand is not None:
            self._reclaim(in_hand)
        if not self._has_ended:
            self.start(number, self._get_worker(number), [*next_attempts, *rest])

    def _decide_next(
        self,
        death: WorkerDeath,
        in_hand: Attempt | None,
        overdue: tuple[int, int] | None,
        worker: Worker,
    ) -> list[Attempt]:
        """Return what to run instead of what a dead worker had in hand."""
        number, retry_policy = death.worker, self._job.retry_policy
        if in_hand is None:
            # The worker was dying when it was started, or died between two ranges.
            n = 0 if self._ledger.n_items_of(number) else self._idle_deaths.get(number, 0) + 1
            self._idle_deaths[number] = n
            if n > max(1, retry_policy.retries):
                self._fatal.append(death)
            return []
        if overdue is not None:
            if (
                overdue != in_hand[:2]
            ):  # the worker had gone on to this range, which is not to blame
                return [in_hand]
            if not (attempts := retry_policy.next_after_timeout(in_hand)):
                self._give_up(in_hand, self._make_timeout_error(worker), worker)
            return attempts
        attempts = (
            []
            if self._fatal
            else retry_policy.next_after_death(in_hand, can_split=self._job.can_split)
        )
        if not attempts and self._job.collect_errors:
            from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

            self._give_up(
                in_hand, make_died_error(death, f"items {in_hand.start}:{in_hand.stop}"), worker
            )
        elif not attempts:
            self._fatal.append(death)
            self._lost.append(in_hand[:2])
        return attempts

    def _stats_of_dead(self, number: int, worker: Worker) -> WorkerStats:
        """Return the stats of a dead worker, as far as the ledger has them."""
        n_items = self._ledger.n_items_of(number)
        return WorkerStats(
            number,
            worker.name,
            -(-n_items // self._job.grid.chunksize),
            n_items,
            time.monotonic_ns() - self._start_times_ns[number],
        )

    def _make_timeout_error(self, worker: Worker) -> TimeoutError:
        error = make_timeout_error(self._job.retry_policy)
        add_note(error, f"{worker.name} was killed")
        return error

    def _give_up(self, attempt: Attempt, error: BaseException, worker: Worker) -> None:
        """Give up a range: collect its error, or end the run by it."""
        start, stop, number = attempt
        if self._job.collect_errors:
            self._deliver(start, PartialResult([], [(start, stop, error)]))
        else:
            self._failures.append(RangeFailure((start, stop), error, worker.name, number))
            self._lost.append((start, stop))
            self._halt()

    def _reclaim(self, attempt: Attempt) -> None:
        """Mark the chunk of a range as taken back by the parent."""
        marks, index = self._ledger.marks, attempt.start // self._job.grid.chunksize
        assert marks is not None  # for the type checker: workers can die here
        if marks[index] == PENDING:
            marks[index] = RECLAIMED

    def _find_lost(self) -> list[int]:
        """Return the chunks whose results are missing, once no worker will run or send them."""
        size = self._job.grid.chunksize
        unreceived = {index * size for index in self._ledger.find_marked(SENT)} - self._received
        return sorted(
            [*self._ledger.find_marked(PENDING), *(start // size for start in unreceived)]
        )

    def _share_out(self, indices: list[int]) -> None:
        """Share out chunks that got lost among the workers."""
        ranges = [Attempt(*self._job.grid.range_of(index)) for index in indices]
        marks = self._ledger.marks
        assert marks is not None  # for the type checker: as above
        for index in indices:
            marks[index] = RECLAIMED
        if ranges:
            for number, part in enumerate(Partition(self._job.n_workers, len(ranges))):
                self.start(number, self._get_worker(number), ranges[part])

    # Messages

    def _read_messages(self, number: int, worker: Worker) -> bool:
        """Handle what a worker has sent; return whether more messages may come."""
        is_open = worker.channel.read()
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == RESULTS:
                for result in unpickle_results(message, on_disk=self._job.folder is not None):
                    self._unpack_result(worker, *result)
            else:
                # First of all: even if the rest is interrupted, the worker is free.
                self.is_memory_kept |= data[1:2] == KEPT
                worker.is_free = True
                self._drop_worker(number, worker)
                stats = unpickle_stats(data[2:])
                stats.name = worker.name
                self._worker_stats.append(stats)
                if stats.failure is not None:
                    self._halt()
                undone = self._attempts[number][self._ledger.n_attempts_done(number) :]
                self._lost += [attempt[:2] for attempt in undone]
        return is_open

    def _unpack_result(self, worker: Worker, start: int, packed: bytes, large: list[Any]) -> None:
        try:
            result = unpickle_items(packed, large)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            add_note(error, "taskcarrier could not unpickle this result of a worker process")
            chunk_range = self._job.grid.range_of(start // self._job.grid.chunksize)
            self._failures.append(RangeFailure(chunk_range, error, worker.name))
            self._halt()
        else:
            self._received.add(start)
            self._deliver(start, result)

    def _drop_worker(self, number: int, worker: Worker) -> None:
        del self.at_work[number]
        self._overdue.pop(number, None)
        self._watch.drop(worker)

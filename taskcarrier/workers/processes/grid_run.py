"""One run on a pool of processes, as the caller sees it.

What becomes of a run when a worker dies. A new process takes the dead worker's place and number.
What that had in hand is given out to it again (`taskcarrier.scheduling.retries` says how often, and in which
pieces), before the chunks that are the number's own. What else got lost with it, a claim that was
not written down or results on their way, is found by the marks of the ledger when all others are
done, and shared out again. A range that took too long ends in the same way: its worker is killed.
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
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.loop import timeout_error
from taskcarrier.workers.pickling import Payload, unpickle_items
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.worker import (
    KEPT,
    RESULTS,
    order,
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
"""How long an interrupted run waits for a worker to finish its chunk before it is killed."""
LONGEST_WAIT = 1.0
"""A signal that comes just before the caller begins to wait is not seen until something else
happens; so it looks now and then."""


class Worker(Protocol):
    """A worker process, as a run needs it (`taskcarrier.workers.processes.pool.WorkerProcess`)."""

    name: str
    channel: MessageSocket
    is_free: bool

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable once it has ended; -1 if it was reaped."""

    def kill(self) -> None:
        """End it now."""

    def reap(self) -> int | None:
        """Exit code of a process that has ended; its descriptors are closed."""


class Watch:
    """Waits until a worker says something or ends."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._by_fd: dict[int, tuple[int, Worker]] = {}

    def add(self, number: int, worker: Worker) -> None:
        """Watch a worker; the number is the caller's."""
        for fd in (worker.channel.fileno(), worker.pidfd):
            self._by_fd[fd] = (number, worker)
            self._poll.register(fd, select.POLLIN)

    def stop_listening(self, worker: Worker) -> None:
        """Its stream has ended; the process's own descriptor tells the rest."""
        self._poll.unregister(worker.channel.fileno())

    def drop(self, worker: Worker) -> None:
        """Watch it no more."""
        for fd in (worker.channel.fileno(), worker.pidfd):
            self._by_fd.pop(fd, None)  # both may be missing, if `add` was cut short
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)

    def wait(self, seconds: float) -> Iterator[tuple[int, Worker, bool]]:
        """Number and worker of those that have said something, then of those that have ended.

        The last of the three is whether it has ended. Who is dropped meanwhile is left out.
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
    """Seconds until the next range has taken too long.

    Workers with one that has are killed, and it is written down in `overdue`.
    """
    now = time.monotonic_ns()
    left = timeout
    for number, worker in workers.items():
        held, start_time_ns = in_hand(number), ledger.start_time_ns(number)
        if held is None or not start_time_ns:
            continue
        due = timeout - (now - start_time_ns) / 1e9
        if due > 0:
            left = min(left, due)
        elif number not in overdue:
            overdue[number] = held[:2]
            worker.kill()
    return left


class ProcessRun:
    """The caller's side of one run: who is at work, what has come, what has to be run again."""

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
        self._parcel = payload
        self._get_worker = get_worker
        self._began_ns: dict[int, int] = {}
        self._watch = Watch()
        self._attempts: dict[
            int, Sequence[Attempt]
        ] = {}  # what each worker at work was given to begin
        self._overdue: dict[int, tuple[int, int]] = {}  # who is killed for which range
        self._received: set[int] = set()  # the starts of ranges whose results have come
        self._idle_deaths: dict[int, int] = {}
        self.at_work: dict[int, Worker] = {}
        self._worker_stats: list[WorkerStats] = []
        self._deaths: list[WorkerDeath] = []
        self._fatal: list[WorkerDeath] = []
        self._lost: list[tuple[int, int]] = []  # ranges given out again that were not run
        self._failures: list[RangeFailure] = []  # seen from here
        self._is_over = False  # an error has come, or the caller stops
        self.memory_kept = False

    def start(self, number: int, worker: Worker, again: Sequence[Attempt] = ()) -> None:
        """Have a worker begin, with these ranges and then with chunks."""
        self._ledger.begin(number)
        self._began_ns[number] = time.monotonic_ns()
        self._attempts[number] = again
        self.at_work[number] = worker
        self._watch.add(number, worker)
        message = order(list(again), self._parcel.data)
        worker.is_free = False
        # A worker that is just dying is seen by its descriptor.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, self._parcel.fds)

    def is_running(self) -> bool:
        """Whether anybody is at work; if all are done, what got lost is shared out again."""
        if not self.at_work and self._deaths and not self._has_ended:
            lost = self._find_lost()
            marks = self._ledger.marks
            if self._job.retry_policy.retries == 0 and marks is not None:
                # What was sent has been run, and is not to be run again.
                sent = [index for index in lost if marks[index] == SENT]
                lost = [index for index in lost if marks[index] != SENT]
                if sent:
                    self._fatal.append(self._deaths[-1])
            self._share_out(lost)
        return bool(self.at_work)

    @property
    def _has_ended(self) -> bool:
        """Whether nothing more is to be begun.

        The halt word does not tell: a worker sets it before it sends its error, which may not
        arrive.
        """
        return self._is_over or bool(self._fatal)

    def step(self, seconds: float | None) -> None:
        """Wait for something to happen, and take it in."""
        timeout = self._job.retry_policy.timeout
        waits = [LONGEST_WAIT, *([] if seconds is None else [seconds])]
        if timeout is not None:
            waits.append(self._seconds_left(timeout))
        for number, worker, has_ended in self._watch.wait(min(waits)):
            says_more = self._take_in(number, worker)  # at last, what it said before it died
            if number not in self.at_work:
                continue
            if has_ended:
                overdue = self._overdue.get(number)
                self._leave(number, worker)
                self._handle_death(number, worker, overdue)
            elif not says_more:
                self._watch.stop_listening(worker)

    def abort(self) -> None:
        """Stop: workers at their next chunk, or soon by force."""
        self._halt()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for number, worker in list(self.at_work.items()):
                self._take_in(number, worker)  # what has come may not have been looked at
            while self._busy and (left := deadline - time.monotonic()) > 0:
                self.step(left)
        finally:
            for worker in self._busy:
                worker.kill()
                worker.reap()
            self.at_work.clear()

    @property
    def _busy(self) -> list[Worker]:
        """Workers at work, but those that were not sent their order any more."""
        return [worker for worker in self.at_work.values() if not worker.is_free]

    def ran(self) -> RunResult:
        """How the run ended."""
        self._worker_stats.sort(key=lambda stats: stats.worker)
        ran = RunResult.read(self._worker_stats, self._ledger)
        ran.deaths, ran.fatal = self._deaths, self._fatal
        ran.failures = self._failures
        ran.missing = sorted({*self._lost, *map(self._job.grid.range_of, self._find_lost())})
        if ran.missing and not self._is_over:
            ran.fatal = self._fatal or self._deaths  # whichever it was, not all were made good
        return ran

    def _halt(self) -> None:
        """Have the workers stop at their next chunk; nothing more is begun."""
        self._is_over = True
        self._ledger.halt()

    # Time

    def _seconds_left(self, timeout: float) -> float:
        """Seconds until the next range has taken too long; those that have are ended."""
        return kill_overdue(timeout, self.at_work, self._range_in_hand, self._ledger, self._overdue)

    # Deaths

    def _range_in_hand(self, number: int) -> Attempt | None:
        """The range that a worker has in hand, if it is not finished."""
        ledger, grid = self._ledger, self._job.grid
        position = ledger.attempt_in_hand(number)
        if position is not None:
            again = self._attempts[number][position]
            is_done = position < ledger.n_attempts_done(number) or self._is_there(again)
            return None if is_done else again
        index = ledger.chunk_in_hand(number, len(grid))
        if index is None or (ledger.marks is not None and ledger.marks[index] != PENDING):
            return None
        return Attempt(*grid.range_of(index))

    def _is_there(self, again: Attempt) -> bool:
        """Whether a whole chunk that was given out again is finished, and its result here."""
        index = again.start // self._job.grid.chunksize
        marks = self._ledger.marks
        if marks is None or self._job.grid.range_of(index) != again[:2]:
            return False
        return marks[index] == DONE or (marks[index] == SENT and again.start in self._received)

    def _handle_death(self, number: int, worker: Worker, overdue: tuple[int, int] | None) -> None:
        """A worker has died: see to what it had in hand, and put another in its place.

        `overdue` is the range for which it was killed, if it was.
        """
        exitcode = worker.reap()
        if not self._has_ended:
            # If it had halted the run for an error, that did not arrive: it is a death like others.
            self._ledger.resume()
        held = self._range_in_hand(number)
        rest = list(self._attempts[number][self._ledger.n_attempts_done(number) :])
        if held is not None and rest and rest[0] == held:
            del rest[0]
        self._worker_stats.append(self._stats_of_dead(number, worker))
        death = WorkerDeath.of(number, worker.name, exitcode, held, overdue)
        nexts = self._nexts(death, held, overdue, worker)
        if self._has_ended:
            self._lost += [part[:2] for part in (*nexts, *rest)]
        self._deaths.append(death)
        if held is not None:
            self._take_back(held)
        if not self._has_ended:
            self.start(number, self._get_worker(number), [*nexts, *rest])

    def _nexts(
        self,
        death: WorkerDeath,
        held: Attempt | None,
        overdue: tuple[int, int] | None,
        worker: Worker,
    ) -> list[Attempt]:
        """What is to be run instead of what a dead worker had in hand."""
        number, retry_policy = death.worker, self._job.retry_policy
        if held is None:
            # It was dying when it began, or died between two ranges.
            idle = 0 if self._ledger.n_items_of(number) else self._idle_deaths.get(number, 0) + 1
            self._idle_deaths[number] = idle
            if idle > max(1, retry_policy.retries):
                self._fatal.append(death)
            return []
        if overdue is not None:
            if overdue != held[:2]:  # it had come to this one meanwhile, which is not to blame
                return [held]
            if not (nexts := retry_policy.next_after_timeout(held)):
                self._blame(held, self._make_timeout_error(worker), worker)
            return nexts
        nexts = (
            []
            if self._fatal
            else retry_policy.next_after_death(held, can_split=self._job.can_split)
        )
        if not nexts and self._job.collect_errors:
            from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

            self._blame(held, make_died_error(death, f"items {held.start}:{held.stop}"), worker)
        elif not nexts:
            self._fatal.append(death)
            self._lost.append(held[:2])
        return nexts

    def _stats_of_dead(self, number: int, worker: Worker) -> WorkerStats:
        """What the ledger tells of a worker that cannot tell it any more."""
        items = self._ledger.n_items_of(number)
        return WorkerStats(
            number,
            worker.name,
            -(-items // self._job.grid.chunksize),
            items,
            time.monotonic_ns() - self._began_ns[number],
        )

    def _make_timeout_error(self, worker: Worker) -> TimeoutError:
        error = timeout_error(self._job.retry_policy)
        add_note(error, f"{worker.name} was killed")
        return error

    def _blame(self, held: Attempt, error: BaseException, worker: Worker) -> None:
        """A range is given up: its error is collected, or ends the run."""
        start, stop, attempt = held
        if self._job.collect_errors:
            self._deliver(start, PartialResult([], [(start, stop, error)]))
        else:
            self._failures.append(RangeFailure((start, stop), error, worker.name, attempt))
            self._lost.append((start, stop))
            self._halt()

    def _take_back(self, held: Attempt) -> None:
        """Mark the chunk of a range that is seen to from here."""
        marks, index = self._ledger.marks, held.start // self._job.grid.chunksize
        assert marks is not None  # for the type checker: workers can die here
        if marks[index] == PENDING:
            marks[index] = RECLAIMED

    def _find_lost(self) -> list[int]:
        """Chunks that nobody will run any more, and whose results are not there."""
        size = self._job.grid.chunksize
        on_their_way = {index * size for index in self._ledger.chunks_marked(SENT)} - self._received
        return sorted(
            [*self._ledger.chunks_marked(PENDING), *(start // size for start in on_their_way)]
        )

    def _share_out(self, indices: list[int]) -> None:
        """Have workers run chunks that got lost."""
        ranges = [Attempt(*self._job.grid.range_of(index)) for index in indices]
        marks = self._ledger.marks
        assert marks is not None  # for the type checker: as above
        for index in indices:
            marks[index] = RECLAIMED
        if ranges:
            for number, part in enumerate(Partition(self._job.n_workers, len(ranges))):
                self.start(number, self._get_worker(number), ranges[part])

    # What comes up

    def _take_in(self, number: int, worker: Worker) -> bool:
        open_ = worker.channel.read()
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == RESULTS:
                for one in unpickle_results(message, on_disk=self._job.folder is not None):
                    self._unpack_result(worker, *one)
            else:
                # At first: if this is cut short, the worker is free all the same.
                self.memory_kept |= data[1:2] == KEPT
                worker.is_free = True
                self._leave(number, worker)
                stats = unpickle_stats(data[2:])
                stats.name = worker.name
                self._worker_stats.append(stats)
                if stats.failure is not None:
                    self._halt()
                undone = self._attempts[number][self._ledger.n_attempts_done(number) :]
                self._lost += [again[:2] for again in undone]
        return open_

    def _unpack_result(self, worker: Worker, start: int, packed: bytes, large: list[Any]) -> None:
        try:
            result = unpickle_items(packed, large)
        except Exception as error:
            if is_of_the_program(error):
                raise
            add_note(error, "taskcarrier could not unpickle this result of a worker process")
            where = self._job.grid.range_of(start // self._job.grid.chunksize)
            self._failures.append(RangeFailure(where, error, worker.name))
            self._halt()
        else:
            self._received.add(start)
            self._deliver(start, result)

    def _leave(self, number: int, worker: Worker) -> None:
        del self.at_work[number]
        self._overdue.pop(number, None)
        self._watch.drop(worker)

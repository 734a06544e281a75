"""A queue of worker processes (`taskcarrier.workers.queues`).

Which way the data goes. A batch's items are pickled once; what is large of it lies in a segment, so
that a message to a worker always fits into its socket and sending never waits. Results come as in
any run. Each worker runs its batches in the order in which they were sent, so what it died on, and
what it has not begun, is known here, from the ledger's word and from what has come.

A worker that dies is replaced. What it had in hand is given out again as `taskcarrier.scheduling.retries`
says, before new batches; if that is given up, the error comes in place of the result.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from taskcarrier.memory.segments import Segment
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, describe_items
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.loop import timeout_error
from taskcarrier.workers.pickling import Payload, pickle_items, unpickle_items
from taskcarrier.workers.processes.grid_run import (
    GRACE_SECONDS,
    LONGEST_WAIT,
    Watch,
    Worker,
    kill_overdue,
)
from taskcarrier.workers.processes.worker import (
    KEPT,
    RESULTS,
    PackedBatch,
    batch_order,
    order,
    unpickle_results,
    unpickle_stats,
)
from taskcarrier.workers.queues import (
    AHEAD,
    BatchResult,
    UnsendableError,
    raise_and_forget,
    to_batch_result,
)
from taskcarrier.workers.records import PartialResult, RunResult, WorkerDeath, WorkerStats
from taskcarrier.workers.task import Job

# A worker starts, and imports what the function needs, in less; after that it has hung.
_STARTING_SECONDS = 60.0
# A pickle from this size on lies in a segment too. Far below what a socket holds.
_SENT_NBYTES = 1 << 14


@dataclass(frozen=True, eq=False)
class _Batch:
    """A range that a worker was given or is to be given, and the batch that its items are of."""

    again: Attempt
    first: int
    packed: PackedBatch
    segment: Segment | None
    nbytes: int


class ProcessQueue:
    """The caller's side.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        Of the pool, fresh.
    payload : Payload
        The packed job.
    get_worker : callable
        Takes a number; the worker of that number, a new one if the last has died.
    """

    runs_here = False

    def __init__(
        self, job: Job, ledger: Ledger, payload: Payload, get_worker: Callable[[int], Worker]
    ) -> None:
        self.ledger = ledger
        self._job = job
        self._parcel = payload
        self._get_worker = get_worker
        self._watch = Watch()
        self._workers: dict[int, Worker] = {}  # at work
        self._to_end: dict[int, Worker] = {}  # those that wait to be told that nothing more comes
        self._told: dict[int, Worker] = {}  # and those that know
        self._handed: dict[int, deque[_Batch]] = {}
        self._n_come: dict[int, int] = {}  # results since the worker began
        self._items_come: dict[int, int] = {}  # ... and items in them
        self._waiting: deque[_Batch] = deque()  # to be handed out before new batches
        self._overdue: dict[int, tuple[int, int]] = {}
        self._idle_deaths: dict[int, int] = {}
        self._worker_stats: list[WorkerStats] = []
        self._deaths: list[WorkerDeath] = []
        self._failed: WorkerStats | None = None
        self._nbytes_sent = 0
        self._memory_kept = False

    @property
    def has_room(self) -> bool:
        """Whether a worker would take a further batch, maybe one that has not begun."""
        return not self._waiting and (
            self._may_begin or any(len(self._handed[one]) < AHEAD for one in self._workers)
        )

    @property
    def _may_begin(self) -> bool:
        """Whether a further worker may; not once some have left because another has failed."""
        return len(self._workers) == len(self._handed) < self._job.n_workers

    def put(self, start: int, items: Sequence[object]) -> None:
        """Hand items to the worker that has least to do."""
        stop = start + len(items)
        large: list[memoryview] = []
        try:
            packed = pickle_items(items, large)
        except Exception as error:
            if is_of_the_program(error):
                raise
            add_note(
                error,
                f"taskcarrier could not pickle {describe_items(start, stop)} for worker processes; use "
                "backend='threading' if they cannot be pickled",
            )
            raise UnsendableError(error) from None
        nbytes = len(packed) + sum(map(len, large))
        self._nbytes_sent += nbytes
        staging, segment, places = Staging(self._job.folder), None, []
        for batch in large:
            segment, offset = staging.add(batch)
            places.append((offset, len(batch)))
        content = pickle.dumps((packed, places))
        where: PackedBatch = content
        if len(content) > _SENT_NBYTES:
            segment, offset = staging.add(memoryview(content))
            where = (offset, len(content))
        self._waiting.append(_Batch(Attempt(start, stop), start, where, segment, nbytes))
        self._hand_out()

    def take(self, seconds: float) -> list[BatchResult]:
        """What has come; if nothing has, wait until something does, or so many seconds."""
        came: list[BatchResult] = []
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if (timeout := self._job.retry_policy.timeout) is not None:
                next_due = kill_overdue(
                    timeout, self._workers, self._range_in_hand, self.ledger, self._overdue
                )
                left = min(left, next_due)
            for number, worker, has_ended in self._watch.wait(left):
                says_more = self._take_in(number, worker, came)
                if number not in self._workers:
                    continue
                if has_ended:
                    self._handle_death(number, worker, came)
                elif not says_more:
                    self._watch.stop_listening(worker)
            if self._failed is not None:
                raise_and_forget(self._failed)
            self._hand_out()
            if came or time.monotonic() >= deadline:
                return came

    def close(self) -> RunResult:
        """Stop: workers at the end of their range, or soon by force.

        When all is done, a worker that is there still is one that has just been started: it gets
        the time to.
        """
        is_done = not self._waiting and not any(self._handed.values())
        if not is_done:
            self.ledger.halt()
        try:
            self._end(_STARTING_SECONDS if is_done else GRACE_SECONDS)
        finally:
            if self._memory_kept:
                for segment in self._parcel.segments:
                    segment.retire()
        self._worker_stats.sort(key=lambda stats: stats.worker)
        ran = RunResult.read(self._worker_stats, self.ledger)
        ran.deaths = self._deaths
        ran.nbytes_sent = self._nbytes_sent
        return ran

    # Workers

    def _begin(self, number: int) -> None:
        worker = self._get_worker(number)
        self.ledger.begin(number)
        self._n_come[number] = self._items_come[number] = 0
        self._handed[number] = deque()
        worker.is_free = False
        self._send(worker, order([], self._parcel.data, is_streamed=True), self._parcel.fds)
        self._workers[number] = self._to_end[number] = worker
        self._watch.add(number, worker)

    def _send(self, worker: Worker, message: bytes, fds: list[int]) -> None:
        # A worker that is just dying is seen by its descriptor.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, fds)

    def _leave(self, number: int) -> None:
        self._watch.drop(self._workers.pop(number))
        self._overdue.pop(number, None)

    def _end(self, seconds: float) -> None:
        """Tell workers that nothing more comes; those that do not report soon are killed."""
        deadline = time.monotonic() + seconds
        try:
            for number in list(self._to_end):
                self._send(self._to_end[number], b"", [])
                self._told[number] = self._to_end.pop(number)
            for number, worker in list(self._workers.items()):
                self._take_in(number, worker, None)  # what has come may not have been looked at
            while self._workers and (left := deadline - time.monotonic()) > 0:
                for number, worker, has_ended in self._watch.wait(min(left, LONGEST_WAIT)):
                    says_more = self._take_in(number, worker, None)
                    if number in self._workers and (has_ended or not says_more):
                        self._give_up(number, worker)
        finally:
            # Also whoever was not told: it would take the next run for a batch of this one.
            for number, worker in {**self._to_end, **self._workers}.items():
                self._give_up(number, worker)
            self._to_end = {}
        for worker in self._told.values():
            worker.is_free = True  # it has reported, or it is dead

    def _give_up(self, number: int, worker: Worker) -> None:
        """End a worker that has not reported, or was not told to; what came of it counts."""
        if number in self._workers:
            self._leave(number)
            self._worker_stats.append(self._stats_of_dead(number, worker))
        worker.kill()
        worker.reap()

    def _stats_of_dead(self, number: int, worker: Worker) -> WorkerStats:
        return WorkerStats(number, worker.name, self._n_come[number], self._items_come[number])

    # Batches and results

    def _hand_out(self) -> None:
        while self._waiting:
            number = min(self._workers, key=lambda one: len(self._handed[one]), default=None)
            if self._may_begin and (number is None or self._handed[number]):
                number = len(self._handed)  # all have something in hand: another begins
                self._begin(number)
            if number is None:  # all have left, because of one whose error has not come yet
                return
            if len(self._handed[number]) >= AHEAD:
                return
            batch = self._waiting.popleft()
            self._handed[number].append(batch)
            fds = [] if batch.segment is None else [batch.segment.fd]
            message = batch_order(batch.again, batch.first, batch.packed)
            self._send(self._workers[number], message, fds)

    def _take_in(self, number: int, worker: Worker, came: list[BatchResult] | None) -> bool:
        """Read what a worker says; without `came` results are counted and not unpickled."""
        says_more = worker.channel.read()
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == RESULTS:
                on_disk = self._job.folder is not None
                for _, packed, large in unpickle_results(message, on_disk=on_disk):
                    batch = self._handed[number].popleft()
                    self._n_come[number] += 1
                    self._items_come[number] += batch.again.stop - batch.again.start
                    if came is not None:
                        came.append(_unpickle_result(batch, packed, large))
            else:
                # At first: if this is cut short, the worker has reported all the same.
                self._memory_kept |= data[1:2] == KEPT
                self._leave(number)
                stats = unpickle_stats(data[2:])
                stats.name = worker.name
                self._worker_stats.append(stats)
                if stats.failure is not None:
                    self._failed = stats
        return says_more

    # Deaths

    def _range_in_hand(self, number: int) -> Attempt | None:
        """The range that a worker has in hand, if its result has not come."""
        position = self.ledger.attempt_in_hand(number)
        if position is None or position < self._n_come[number]:
            return None
        # Results of ranges before it may have come and not been read yet.
        return self._handed[number][position - self._n_come[number]].again

    def _handle_death(self, number: int, worker: Worker, came: list[BatchResult]) -> None:
        """A worker has died: see to what it had in hand, and put another in its place."""
        held, overdue = self._range_in_hand(number), self._overdue.get(number)
        self._leave(number)
        del self._to_end[number]
        exitcode = worker.reap()
        death = WorkerDeath.of(number, worker.name, exitcode, held, overdue)
        self._deaths.append(death)
        self._worker_stats.append(self._stats_of_dead(number, worker))
        if self.ledger.is_halted:  # by a worker that did not live to tell why
            raise self._error_of(death)
        rest = self._handed.pop(number)
        nexts: list[_Batch] = []
        retry_policy = self._job.retry_policy
        if held is None:
            # It was dying when it began, or died between two batches.
            idle = 0 if self._n_come[number] else self._idle_deaths.get(number, 0) + 1
            self._idle_deaths[number] = idle
            if idle > max(1, retry_policy.retries):
                raise self._error_of(death)
        else:
            batch = rest.popleft()
            if death.was_late:
                parts = retry_policy.next_after_timeout(held)
            elif overdue is not None:  # it had come to this one meanwhile, which is not to blame
                parts = [held]
            else:
                parts = retry_policy.next_after_death(held, can_split=True)
            nexts = [replace(batch, again=part) for part in parts]
            if not parts:
                error: Exception
                if death.was_late:
                    error = timeout_error(retry_policy)
                    add_note(error, f"{worker.name} was killed")
                else:
                    error = self._error_of(death)
                fault = PartialResult([], [(held.start, held.stop, error)])
                came.append(BatchResult(held.start, held.stop, fault))
        self._waiting.extendleft(reversed([*nexts, *rest]))
        self._begin(number)

    def _error_of(self, death: WorkerDeath) -> Exception:
        from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

        if death.range is None:
            return make_died_error(death, None)
        return make_died_error(death, describe_items(*death.range))


def _unpickle_result(batch: _Batch, packed: bytes, large: list[memoryview]) -> BatchResult:
    start, stop, _ = batch.again
    nbytes = batch.nbytes + len(packed) + sum(map(len, large))
    try:
        result = unpickle_items(packed, large)
    except Exception as error:
        if is_of_the_program(error):
            raise
        add_note(error, "taskcarrier could not unpickle this result of a worker process")
        result = PartialResult([], [(start, stop, error)])
    return to_batch_result(result)._replace(nbytes=nbytes)

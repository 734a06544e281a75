"""A work queue of worker processes (`taskcarrier.workers.queues`).

How data travels. The items of a batch are pickled once. Large parts lie in a segment, so that a
message to a worker always fits into its socket and sending never waits. Results come as in any run.
Each worker runs its batches in the order in which they were sent. So the ledger and the results
that have come tell which batch a worker died on, and which it has not begun.

A worker that dies is replaced. What it had in hand is given out again, before new batches, as
`taskcarrier.scheduling.retries` decides; if it is given up, its result is the error.
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
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.loop import make_timeout_error
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
    pack_batch_order,
    pack_order,
    unpickle_results,
    unpickle_stats,
)
from taskcarrier.workers.queues import (
    MAX_BATCHES_PER_WORKER,
    BatchResult,
    UnsendableError,
    raise_and_forget,
    to_batch_result,
)
from taskcarrier.workers.records import PartialResult, RunResult, WorkerDeath, WorkerStats
from taskcarrier.workers.task import Job

# A worker starts and imports what the function needs in less time; one that takes longer hangs.
_STARTING_SECONDS = 60.0
# A pickle lies in a segment too, from this size on. Far below what a socket holds.
_SENT_NBYTES = 1 << 14


@dataclass(frozen=True, eq=False)
class _Batch:
    """A range for a worker, sent or still to be sent, and the packed batch that has its items."""

    attempt: Attempt
    first: int
    packed: PackedBatch
    segment: Segment | None
    nbytes: int


class ProcessQueue:
    """The parent's side of a work queue of processes.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        The ledger of the pool, reset.
    payload : Payload
        The packed job.
    get_worker : callable
        Takes a number and returns the worker with that number, a new one if the last has died.
    """

    runs_in_caller = False

    def __init__(
        self, job: Job, ledger: Ledger, payload: Payload, get_worker: Callable[[int], Worker]
    ) -> None:
        self.ledger = ledger
        self._job = job
        self._payload = payload
        self._get_worker = get_worker
        self._watch = Watch()
        self._workers: dict[int, Worker] = {}  # at work
        self._unended: dict[int, Worker] = {}  # not told yet that no more batches come
        self._told: dict[int, Worker] = {}  # told so
        self._sent: dict[int, deque[_Batch]] = {}  # batches whose results have not come
        self._n_results: dict[int, int] = {}  # results that came since the worker began
        self._n_items: dict[int, int] = {}  # ... and items in them
        self._waiting: deque[_Batch] = deque()  # to be sent before new batches
        self._overdue: dict[int, tuple[int, int]] = {}
        self._idle_deaths: dict[int, int] = {}
        self._worker_stats: list[WorkerStats] = []
        self._deaths: list[WorkerDeath] = []
        self._failed: WorkerStats | None = None
        self._nbytes_sent = 0
        self._is_memory_kept = False

    @property
    def has_room(self) -> bool:
        """Whether a worker, maybe one that is not started yet, would take a further batch."""
        return not self._waiting and (
            self._can_begin
            or any(len(self._sent[number]) < MAX_BATCHES_PER_WORKER for number in self._workers)
        )

    @property
    def _can_begin(self) -> bool:
        """Whether another worker can begin; not once workers left because one has failed."""
        return len(self._workers) == len(self._sent) < self._job.n_workers

    def put(self, start: int, items: Sequence[object]) -> None:
        """Send items to the worker that has the fewest batches."""
        stop = start + len(items)
        large: list[memoryview] = []
        try:
            packed = pickle_items(items, large)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            add_note(
                error,
                f"taskcarrier could not pickle {describe_items(start, stop)} for worker processes; "
                "use backend='threading' if they cannot be pickled",
            )
            raise UnsendableError(error) from None
        nbytes = len(packed) + sum(map(len, large))
        self._nbytes_sent += nbytes
        staging, segment, places = Staging(self._job.folder), None, []
        for raw in large:
            segment, offset = staging.add(raw)
            places.append((offset, len(raw)))
        content = pickle.dumps((packed, places))
        packed_batch: PackedBatch = content
        if len(content) > _SENT_NBYTES:
            segment, offset = staging.add(memoryview(content))
            packed_batch = (offset, len(content))
        self._waiting.append(_Batch(Attempt(start, stop), start, packed_batch, segment, nbytes))
        self._send_waiting()

    def get(self, seconds: float) -> list[BatchResult]:
        """Return the results that have come; if there are none, wait for one up to `seconds`."""
        results: list[BatchResult] = []
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if (timeout := self._job.retry_policy.timeout) is not None:
                next_due = kill_overdue(
                    timeout, self._workers, self._range_in_hand, self.ledger, self._overdue
                )
                left = min(left, next_due)
            for number, worker, has_ended in self._watch.wait(left):
                is_open = self._read_messages(number, worker, results)
                if number not in self._workers:
                    continue
                if has_ended:
                    self._handle_death(number, worker, results)
                elif not is_open:
                    self._watch.stop_listening(worker)
            if self._failed is not None:
                raise_and_forget(self._failed)
            self._send_waiting()
            if results or time.monotonic() >= deadline:
                return results

    def close(self) -> RunResult:
        """End the run and return its result: workers stop after their range, or are killed soon.

        If all is done, a worker that does not report has just been started: it gets time to start.
        """
        is_done = not self._waiting and not any(self._sent.values())
        if not is_done:
            self.ledger.halt()
        try:
            self._end(_STARTING_SECONDS if is_done else GRACE_SECONDS)
        finally:
            if self._is_memory_kept:
                for segment in self._payload.segments:
                    segment.retire()
        self._worker_stats.sort(key=lambda stats: stats.worker)
        result = RunResult.read(self._worker_stats, self.ledger)
        result.deaths = self._deaths
        result.nbytes_sent = self._nbytes_sent
        return result

    # Workers

    def _begin(self, number: int) -> None:
        worker = self._get_worker(number)
        self.ledger.clear_row(number)
        self._n_results[number] = self._n_items[number] = 0
        self._sent[number] = deque()
        worker.is_free = False
        self._send(worker, pack_order([], self._payload.data, is_streamed=True), self._payload.fds)
        self._workers[number] = self._unended[number] = worker
        self._watch.add(number, worker)

    def _send(self, worker: Worker, message: bytes, fds: list[int]) -> None:
        # If the worker is just dying, its descriptor will show that.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, fds)

    def _drop_worker(self, number: int) -> None:
        self._watch.drop(self._workers.pop(number))
        self._overdue.pop(number, None)

    def _end(self, seconds: float) -> None:
        """Tell workers that no more batches come; kill those that do not report in `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            for number in list(self._unended):
                self._send(self._unended[number], b"", [])
                self._told[number] = self._unended.pop(number)
            for number, worker in list(self._workers.items()):
                self._read_messages(number, worker, None)  # some that came may not have been read
            while self._workers and (left := deadline - time.monotonic()) > 0:
                for number, worker, has_ended in self._watch.wait(min(left, LONGEST_WAIT)):
                    is_open = self._read_messages(number, worker, None)
                    if number in self._workers and (has_ended or not is_open):
                        self._kill(number, worker)
        finally:
            # Also those that were not told: they would take the next run for a batch of this one.
            for number, worker in {**self._unended, **self._workers}.items():
                self._kill(number, worker)
            self._unended = {}
        for worker in self._told.values():
            worker.is_free = True  # it has reported, or it is dead

    def _kill(self, number: int, worker: Worker) -> None:
        """Kill a worker that has not reported, or was not told to; its results still count."""
        if number in self._workers:
            self._drop_worker(number)
            self._worker_stats.append(self._stats_of_dead(number, worker))
        worker.kill()
        worker.reap()

    def _stats_of_dead(self, number: int, worker: Worker) -> WorkerStats:
        return WorkerStats(number, worker.name, self._n_results[number], self._n_items[number])

    # Batches and results

    def _send_waiting(self) -> None:
        while self._waiting:
            number = min(self._workers, key=lambda each: len(self._sent[each]), default=None)
            if self._can_begin and (number is None or self._sent[number]):
                number = len(self._sent)  # all have something in hand: another begins
                self._begin(number)
            if number is None:  # all have left, because of one whose error has not come yet
                return
            if len(self._sent[number]) >= MAX_BATCHES_PER_WORKER:
                return
            batch = self._waiting.popleft()
            self._sent[number].append(batch)
            fds = [] if batch.segment is None else [batch.segment.fd]
            message = pack_batch_order(batch.attempt, batch.first, batch.packed)
            self._send(self._workers[number], message, fds)

    def _read_messages(
        self, number: int, worker: Worker, results: list[BatchResult] | None
    ) -> bool:
        """Handle what a worker has sent; return whether more messages may come.

        Results are added to `results`; if that is None, they are counted and not unpickled.
        """
        is_open = worker.channel.read()
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == RESULTS:
                on_disk = self._job.folder is not None
                for _, packed, large in unpickle_results(message, on_disk=on_disk):
                    batch = self._sent[number].popleft()
                    self._n_results[number] += 1
                    self._n_items[number] += batch.attempt.stop - batch.attempt.start
                    if results is not None:
                        results.append(_unpickle_result(batch, packed, large))
            else:
                # First of all: even if the rest is interrupted, the worker has reported.
                self._is_memory_kept |= data[1:2] == KEPT
                self._drop_worker(number)
                stats = unpickle_stats(data[2:])
                stats.name = worker.name
                self._worker_stats.append(stats)
                if stats.failure is not None:
                    self._failed = stats
        return is_open

    # Deaths

    def _range_in_hand(self, number: int) -> Attempt | None:
        """Return the range that a worker has in hand; None if none, or if its result has come."""
        position = self.ledger.attempt_in_hand(number)
        if position is None or position < self._n_results[number]:
            return None
        # Results of earlier ranges may have come without being read yet.
        return self._sent[number][position - self._n_results[number]].attempt

    def _handle_death(self, number: int, worker: Worker, results: list[BatchResult]) -> None:
        """Record a death, decide on what the worker had in hand, and start another in its place."""
        in_hand, overdue = self._range_in_hand(number), self._overdue.get(number)
        self._drop_worker(number)
        del self._unended[number]
        exitcode = worker.reap()
        death = WorkerDeath.from_attempt(number, worker.name, exitcode, in_hand, overdue)
        self._deaths.append(death)
        self._worker_stats.append(self._stats_of_dead(number, worker))
        if self.ledger.is_halted:  # by a worker that died before it could send the error
            raise self._make_died_error(death)
        rest = self._sent.pop(number)
        next_batches: list[_Batch] = []
        retry_policy = self._job.retry_policy
        if in_hand is None:
            # The worker was dying when it was started, or died between two batches.
            n = 0 if self._n_results[number] else self._idle_deaths.get(number, 0) + 1
            self._idle_deaths[number] = n
            if n > max(1, retry_policy.retries):
                raise self._make_died_error(death)
        else:
            batch = rest.popleft()
            if death.was_late:
                attempts = retry_policy.next_after_timeout(in_hand)
            elif overdue is not None:  # the worker had gone on to this range, which is not to blame
                attempts = [in_hand]
            else:
                attempts = retry_policy.next_after_death(in_hand, can_split=True)
            next_batches = [replace(batch, attempt=attempt) for attempt in attempts]
            if not attempts:
                error: Exception
                if death.was_late:
                    error = make_timeout_error(retry_policy)
                    add_note(error, f"{worker.name} was killed")
                else:
                    error = self._make_died_error(death)
                fault = PartialResult([], [(in_hand.start, in_hand.stop, error)])
                results.append(BatchResult(in_hand.start, in_hand.stop, fault))
        self._waiting.extendleft(reversed([*next_batches, *rest]))
        self._begin(number)

    def _make_died_error(self, death: WorkerDeath) -> Exception:
        from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

        if death.range is None:
            return make_died_error(death, None)
        return make_died_error(death, describe_items(*death.range))


def _unpickle_result(batch: _Batch, packed: bytes, large: list[memoryview]) -> BatchResult:
    start, stop, _ = batch.attempt
    nbytes = batch.nbytes + len(packed) + sum(map(len, large))
    try:
        result = unpickle_items(packed, large)
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        add_note(error, "taskcarrier could not unpickle this result of a worker process")
        result = PartialResult([], [(start, stop, error)])
    return to_batch_result(result)._replace(nbytes=nbytes)

"""A work queue of worker processes (`taskcarrier.workers.queues`).

How data travels. The items of a batch are pickled once. Large parts lie in a segment, so that a
message to a worker always fits into its socket and sending never waits. Results come as in any run.
Each worker runs its batches in the order in which they were sent. So the ledger and the results
that have come tell which batch a worker died on, and which it has not begun.

Batches of a dead worker are sent again before new ones. If a range is given up, its result is the
error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from taskcarrier.memory.segments import Segment
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, describe_items
from taskcarrier.record import record
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.pickling import Payload, pickle_items
from taskcarrier.workers.processes.supervisor import (
    GRACE_SECONDS,
    STARTING_SECONDS,
    GetWorker,
    Supervisor,
    unpickle_result,
)
from taskcarrier.workers.processes.worker import PackedBatch, pack_batch, pack_batch_order
from taskcarrier.workers.queues import (
    MAX_BATCHES_PER_WORKER,
    BatchResult,
    UnsendableError,
    raise_and_forget,
    to_batch_result,
)
from taskcarrier.workers.records import (
    DeliveredFailure,
    PartialResult,
    RunResult,
    WorkerDeath,
    WorkerStats,
)
from taskcarrier.workers.task import Job


@record
class _Batch:
    """A range for a worker, sent or still to be sent, and the packed batch that has its items."""

    attempt: Attempt
    first: int
    packed: PackedBatch
    segment: Segment | None
    nbytes: int


class StreamRun:
    """A work queue of processes (`taskcarrier.workers.queues.WorkQueue`), seen from the parent."""

    runs_in_caller = False

    def __init__(self, job: Job, ledger: Ledger, payload: Payload, get_worker: GetWorker) -> None:
        self.ledger = ledger
        self._job = job
        self._get_worker = get_worker
        self._supervisor = Supervisor(self, job, ledger, payload, is_streamed=True)
        self._sent: dict[int, deque[_Batch]] = {}  # batches whose results have not come
        self._n_results: dict[int, int] = {}  # results that came since the worker began
        self._n_items: dict[int, int] = {}  # ... and items in them
        self._waiting: deque[_Batch] = deque()  # to be sent before new batches
        self._results: list[BatchResult] = []
        self._nbytes_sent = 0
        self._is_closed = False

    @property
    def has_room(self) -> bool:
        """Whether a worker, maybe one that is not started yet, would take a further batch."""
        return not self._waiting and (
            self._can_begin
            or any(len(self._sent[n]) < MAX_BATCHES_PER_WORKER for n in self._supervisor.at_work)
        )

    @property
    def _can_begin(self) -> bool:
        """Whether another worker can begin; not once workers left because one has failed."""
        return len(self._supervisor.at_work) == len(self._sent) < self._job.n_workers

    def put(self, start: int, items: Sequence[object]) -> None:
        """Send items to the worker that has the fewest batches."""
        stop = start + len(items)
        large: list[memoryview] = []
        try:
            pickled = pickle_items(items, large)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            add_note(
                error,
                f"taskcarrier could not pickle {describe_items(start, stop)} for worker processes; "
                "use backend='threading' if they cannot be pickled",
            )
            raise UnsendableError(error) from None
        nbytes = len(pickled) + sum(map(len, large))
        self._nbytes_sent += nbytes
        packed, segment = pack_batch(pickled, large, Staging(self._job.folder))
        self._waiting.append(_Batch(Attempt(start, stop), start, packed, segment, nbytes))
        self._send_waiting()

    def get(self, seconds: float) -> list[BatchResult]:
        """Return the results that have come; if there are none, wait for one up to `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            self._supervisor.step(max(0.0, deadline - time.monotonic()))
            if self._supervisor.failed is not None:
                raise_and_forget(self._supervisor.failed)
            self._send_waiting()
            if self._results or time.monotonic() >= deadline:
                results, self._results = self._results, []
                return results

    def close(self) -> RunResult:
        """End the run and return its result: workers stop after their range, or are killed soon.

        If all is done, a worker that does not report has just been started: it gets time to start.
        """
        self._is_closed = True
        is_done = not self._waiting and not any(self._sent.values())
        if not is_done:
            self._supervisor.halt()
        self._supervisor.end(STARTING_SECONDS if is_done else GRACE_SECONDS)
        result = self._supervisor.make_result()
        result.nbytes_sent = self._nbytes_sent
        return result

    def _begin(self, number: int) -> None:
        """Start a worker, which then waits for batches."""
        worker = self._get_worker(number)
        self._n_results[number] = self._n_items[number] = 0
        self._sent[number] = deque()
        self._supervisor.start(number, worker)

    def _send_waiting(self) -> None:
        at_work = self._supervisor.at_work
        while self._waiting:
            number = min(at_work, key=lambda each: len(self._sent[each]), default=None)
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
            self._supervisor.send(at_work[number], message, fds)

    # What the supervisor asks

    def range_in_hand(self, number: int) -> Attempt | None:
        """Return the range that a worker has in hand; None if none, or if its result has come."""
        position = self.ledger.attempt_in_hand(number)
        if position is None or position < self._n_results[number]:
            return None
        # Results of earlier ranges may have come without being read yet.
        return self._sent[number][position - self._n_results[number]].attempt

    def count_done(self, number: int, name: str) -> WorkerStats:
        """Return the stats of a dead worker by the results that have come from it."""
        return WorkerStats(number, name, self._n_results[number], self._n_items[number])

    def take_result(self, number: int, start: int, packed: bytes, large: list[Any]) -> None:  # noqa: ARG002  # results come in order
        """Take the result of a worker's first batch; once the run is closed, only count it."""
        batch = self._sent[number].popleft()
        self._n_results[number] += 1
        self._n_items[number] += batch.attempt.stop - batch.attempt.start
        if not self._is_closed:
            self._results.append(_unpickle_result(batch, packed, large))

    def check_halt(self, death: WorkerDeath) -> None:
        """Raise an error if the run is halted: the worker died before it could send its own."""
        if self.ledger.is_halted:
            raise _make_died_error(death)

    def give_up(self, death: WorkerDeath, error: TimeoutError | None) -> None:
        """Make the error the result of the range; raise it if there was none in hand."""
        if death.range is None:
            raise _make_died_error(death)
        start, stop = death.range
        failure = DeliveredFailure(start, stop, error or _make_died_error(death))
        self._results.append(BatchResult(start, stop, PartialResult([], [failure])))

    def replace_worker(self, number: int, in_hand: Attempt | None, nexts: list[Attempt]) -> None:
        """Start another worker; the dead one's batches are sent before all others that wait."""
        batches = self._sent.pop(number)
        if in_hand is not None:
            batch = batches.popleft()
            batches.extendleft(replace(batch, attempt=attempt) for attempt in reversed(nexts))
        self._waiting.extendleft(reversed(batches))
        self._begin(number)


def _make_died_error(death: WorkerDeath) -> Exception:
    from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

    return make_died_error(death, None if death.range is None else describe_items(*death.range))


def _unpickle_result(batch: _Batch, packed: bytes, large: list[memoryview]) -> BatchResult:
    start, stop, _ = batch.attempt
    nbytes = batch.nbytes + len(packed) + sum(map(len, large))
    result, error = unpickle_result(packed, large)
    if error is not None:
        result = PartialResult([], [DeliveredFailure(start, stop, error)])
    return to_batch_result(result)._replace(nbytes=nbytes)

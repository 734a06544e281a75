"""One run over a grid on a pool of worker processes, seen from the parent.

Workers take chunks from the ledger by themselves. A worker that takes a dead one's place gets the
range that this had in hand, then the chunks that belong to the number. Other losses (a claim that
was not recorded, results on their way) are found by the marks of the ledger when all workers are
done, and are shared out again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from taskcarrier.scheduling.ledger import (
    DONE,
    NOT_BEGUN,
    PENDING,
    RECLAIMED,
    SENT,
    Begun,
    Ledger,
)
from taskcarrier.scheduling.partition import Partition
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.descriptors import open_owned
from taskcarrier.workers.pickling import Payload
from taskcarrier.workers.processes.supervisor import (
    GRACE_SECONDS,
    LONGEST_WAIT,
    GetWorker,
    Supervisor,
    Worker,
    unpickle_result,
)
from taskcarrier.workers.processes.worker import LATER
from taskcarrier.workers.records import (
    DeliveredFailure,
    PartialResult,
    RangeFailure,
    RunResult,
    WorkerDeath,
    WorkerStats,
)
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.threads import TICK


class GridRun:
    """One run over a grid, whose results that are not in place go to `deliver`.

    If it `begins_later`, the caller still runs the first chunks itself. The workers unpickle the
    job meanwhile, and run what is left when `begin` is called. If it `has_begun`, its workers were
    started by a `taskcarrier.workers.processes.share_run.ShareRun`, and are adopted.
    """

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        deliver: Deliver,
        payload: Payload,
        get_worker: GetWorker,
        *,
        begins_later: bool = False,
        has_begun: bool = False,
    ) -> None:
        self.ledger = ledger
        self._job = job
        self._deliver = deliver
        self._payload = payload
        self._get_worker = get_worker
        first = LATER if begins_later else 0
        self._supervisor = Supervisor(self, job, ledger, payload, first=first)
        self._first = 0  # the first chunk that workers run
        self._kept: list[tuple[str, int, bytes, list[Any]]] | None = None  # packed results
        self._is_recalled = False
        if begins_later:
            self._wake = open_owned(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._supervisor.wake_by(self._wake.fileno())
        if not has_begun:
            self._reset_ledger(NOT_BEGUN)
        self._start_times_ns: dict[int, int] = {}
        self._attempts: dict[int, list[Attempt]] = {}  # what each worker was told to run first
        self._received: set[int] = set()  # the starts of ranges whose results have come
        self._lost: list[Attempt] = []  # ranges given out again that were not run
        self._failures: list[RangeFailure] = []  # those that no worker reports
        self._is_closed = False

    def _reset_ledger(self, begun: Begun) -> None:
        ledger, job = self.ledger, self._job
        ledger.reset(job.n_workers, begun)
        ledger.set_marks(job.open_marks(), len(job.grid))
        if ledger.marks is not None and job.marks is None:
            ledger.marks[:] = bytes(len(job.grid))

    def start_all(self) -> None:
        """Start all workers."""
        # If the run is interrupted, a worker may write to the segments for a moment longer.
        for segment in self._payload.segments:
            segment.is_lent = True
        for number in range(self._job.n_workers):
            self.start(number, self._get_worker(number))

    def is_ready(self, seconds: float) -> bool:
        """Return whether all workers have unpickled the job; wait for that at most `seconds`.

        Raises what went wrong with a worker; then the run cannot begin.
        """
        supervisor, deadline = self._supervisor, time.monotonic() + seconds
        while len(supervisor.ready) < self._job.n_workers:
            left = deadline - time.monotonic()
            supervisor.step(max(0.0, left))
            if supervisor.failed is not None and supervisor.failed.failure is not None:
                raise supervisor.failed.failure.error
            if supervisor.unrecovered_deaths:
                name = supervisor.unrecovered_deaths[0].name
                raise RuntimeError(f"{name} died, like others, before it could begin")
            if left <= 0:
                return len(supervisor.ready) == self._job.n_workers
        return True

    def begin(self, begun: Begun, n_workers: int) -> None:
        """Let the first `n_workers` workers run chunks from ``begun.first`` on.

        The caller has finished the chunks before, or still runs the last of them.
        """
        self._reset_ledger(begun)
        self._first = begun.first
        self._supervisor.begin(begun.first, range(n_workers))

    def attend(self) -> None:
        """Watch over the workers until `recall` is called, in a thread that runs no user code.

        So results are kept as they come, and unpickled later.
        """
        self._kept = []
        while not self._is_recalled:
            self.step(None)

    def recall(self) -> None:
        """Make `attend` end soon; call this from another thread."""
        self._is_recalled = True
        os.eventfd_write(self._wake.fileno(), 1)

    def hurry(self) -> None:
        """Make `close` kill workers that are not ready yet; call this from another thread."""
        self._supervisor.hurry()
        os.eventfd_write(self._wake.fileno(), 1)

    def run_to_end(
        self, tick: Callable[[Ledger], None] | None, n_chunks_of_caller: int = 0
    ) -> RunResult:
        """Run what is left to its end; return its result, with stats in the order of the workers.

        From now on the caller does nothing else. It has finished the first `n_chunks_of_caller`.
        """
        if self._is_recalled:
            os.eventfd_read(self._wake.fileno())  # or every further wait would end at once
        kept, self._kept = self._kept or [], None
        for name, start, packed, large in kept:
            self._unpickle(name, start, packed, large)
        if self._first:
            self._marks[:n_chunks_of_caller] = bytes([DONE]) * n_chunks_of_caller
            self._supervisor.begin(self._first, range(self._job.n_workers))
        while self.is_running():
            self.step(None if tick is None else TICK)
            if tick is not None:
                tick(self.ledger)
        for segment in self._payload.segments:
            segment.is_lent = False
        return self.make_result()

    def start(self, number: int, worker: Worker, attempts: Sequence[Attempt] = ()) -> None:
        """Start a worker on these attempts, and then on chunks."""
        self._lost += self._take_undone(number)
        self._start_times_ns[number] = time.monotonic_ns()
        self._attempts[number] = list(attempts)
        self._supervisor.start(number, worker, attempts)

    def adopt(
        self, at_work: dict[int, Worker], told: set[int], stats: list[WorkerStats], began_ns: int
    ) -> None:
        """Look after workers that were started before (`Supervisor.adopt`)."""
        for number in at_work:
            self._start_times_ns[number] = began_ns
            self._attempts[number] = []
        self._supervisor.adopt(at_work, told, stats)

    def halt(self) -> None:
        """Make the workers stop at their next chunk, and start nothing new."""
        self._supervisor.halt()

    def is_running(self) -> bool:
        """Return whether a worker is at work; if none is, first share out again what got lost."""
        at_work, deaths = self._supervisor.at_work, self._supervisor.deaths
        if not at_work and deaths and not self._supervisor.has_ended:
            lost = self._find_lost()
            if self._job.retry_policy.retries == 0:
                # What was sent has been run, and may not be run again.
                sent = [index for index in lost if self._marks[index] == SENT]
                lost = [index for index in lost if self._marks[index] != SENT]
                if sent and self._job.collect_errors:
                    for index in sent:
                        self._collect_lost_result(*self._job.grid.range_of(index), deaths[-1])
                elif sent:
                    self._supervisor.unrecovered_deaths.append(deaths[-1])
            self._share_out(lost)
        return bool(at_work)

    def step(self, seconds: float | None) -> None:
        """Wait for messages and ends of workers, at most for `seconds`, and handle them."""
        self._supervisor.step(LONGEST_WAIT if seconds is None else seconds)

    def make_result(self) -> RunResult:
        """Return how the run ended."""
        result = self._supervisor.make_result()
        result.failures = self._failures
        for number in list(self._attempts):
            self._lost += self._take_undone(number)
        lost_chunks = map(self._job.grid.range_of, self._find_lost())
        result.missing = sorted({*(attempt[:2] for attempt in self._lost), *lost_chunks})
        if result.missing and not self._supervisor.is_over and not result.unrecovered_deaths:
            result.unrecovered_deaths = result.deaths  # any of them may have lost the results
        return result

    def close(self) -> None:
        """End the run: workers stop at their next chunk, or are killed after `GRACE_SECONDS`."""
        self._is_closed = True
        if self._supervisor.at_work:
            self._supervisor.halt()
        self._supervisor.end(GRACE_SECONDS)
        self.ledger.marks = None

    @property
    def _marks(self) -> memoryview:
        """A byte for each chunk: there are marks wherever workers can die."""
        return cast("memoryview", self.ledger.marks)

    # What the supervisor asks

    def range_in_hand(self, number: int) -> Attempt | None:
        """Return the range that a worker has in hand; None if it has none, or has finished it."""
        ledger, grid = self.ledger, self._job.grid
        position = ledger.attempt_in_hand(number)
        if position is not None:
            attempt = self._attempts[number][position]
            is_done = position < ledger.n_attempts_done(number) or self._has_result(attempt)
            return None if is_done else attempt
        index = ledger.chunk_in_hand(number, len(grid))
        if index is None or self._marks[index] != PENDING:
            return None
        return Attempt(*grid.range_of(index))

    def _has_result(self, attempt: Attempt) -> bool:
        """Return whether an attempt is a whole chunk that is finished and whose result is here."""
        index = attempt.start // self._job.grid.chunksize
        if self._job.grid.range_of(index) != attempt[:2]:
            return False
        mark = self._marks[index]
        return mark == DONE or (mark == SENT and attempt.start in self._received)

    def count_done(self, number: int, name: str) -> WorkerStats:
        """Return the stats of a dead worker, as far as the ledger has them."""
        n_items = self.ledger.n_items_of(number)
        n_ranges = -(-n_items // self._job.grid.chunksize)
        busy_ns = time.monotonic_ns() - self._start_times_ns[number]
        return WorkerStats(number, name, n_ranges, n_items, busy_ns)

    def take_result(self, number: int, start: int, packed: bytes, large: list[Any]) -> None:
        """Deliver a result; one that cannot be unpickled ends the run.

        Once the run is closed, no result is wanted, and unpickling may be slow.
        """
        if self._is_closed:
            return
        self._received.add(start)
        name = self._supervisor.at_work[number].name
        if self._kept is None:
            self._unpickle(name, start, packed, large)
        else:
            self._kept.append((name, start, packed, large))

    def _unpickle(self, name: str, start: int, packed: bytes, large: list[Any]) -> None:
        """Deliver a result; one that cannot be unpickled ends the run."""
        result, error = unpickle_result(packed, large)
        if error is None:
            self._deliver(start, result)
        else:
            self._received.discard(start)
            chunk_range = self._job.grid.range_of(start // self._job.grid.chunksize)
            self._failures.append(RangeFailure(chunk_range, error, name))
            self._supervisor.halt()

    def check_halt(self, death: WorkerDeath) -> None:  # noqa: ARG002  # every death is alike
        """Take back a halt whose error did not arrive: this is a death like others."""
        if not self._supervisor.has_ended:
            self.ledger.resume()

    def give_up(self, death: WorkerDeath, error: TimeoutError | None) -> None:
        """Collect the error of a range, or end the run: at once if the range took too long."""
        if death.range is not None and self._job.collect_errors:
            from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

            start, stop = death.range
            self._collect(start, stop, error or make_died_error(death, f"items {start}:{stop}"))
            return
        if death.range is not None:
            self._lost.append(Attempt(*death.range))
        if error is None:
            self._supervisor.unrecovered_deaths.append(death)
        else:
            self._failures.append(RangeFailure(death.range, error, death.name, death.attempt))
            self._supervisor.halt()

    def _collect_lost_result(self, start: int, stop: int, death: WorkerDeath) -> None:
        """Deliver the error of a range that was run, but whose result a worker did not send."""
        from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

        where = None if death.range is None else "items {}:{}".format(*death.range)
        more = f"; the result of items {start}:{stop} was lost with it"
        self._collect(start, stop, make_died_error(death, where, more))

    def _collect(self, start: int, stop: int, error: Exception) -> None:
        """Deliver the error of a range that has no result."""
        self._received.add(start)
        self._deliver(start, PartialResult([], [DeliveredFailure(start, stop, error)]))

    def replace_worker(self, number: int, in_hand: Attempt | None, nexts: list[Attempt]) -> None:
        """Start another worker, which goes on with the chunks of this number after `nexts`."""
        nexts = [*self._reclaim_kept(number), *nexts]
        undone = self._take_undone(number)
        if undone and undone[0] == in_hand:
            del undone[0]
        if in_hand is not None:
            index = in_hand.start // self._job.grid.chunksize
            if self._marks[index] == PENDING:
                self._marks[index] = RECLAIMED
        if self._supervisor.has_ended:
            self._lost += [*nexts, *undone]
        else:
            self.start(number, self._get_worker(number), [*nexts, *undone])

    def _reclaim_kept(self, number: int) -> list[Attempt]:
        """Return the chunks of a share whose results a dead worker had yet to send with its stats.

        They are run again before the chunk that it had in hand, whatever becomes of that.
        """
        if not self._payload.shares:
            return []
        share = self._job.balance.plan(number, self._job.n_workers, len(self._job.grid))
        kept = [index for index in share if self._marks[index] == DONE]
        for index in kept:
            self._marks[index] = RECLAIMED
        return [Attempt(*self._job.grid.range_of(index)) for index in kept]

    # What got lost

    def _take_undone(self, number: int) -> list[Attempt]:
        """Return the attempts that a worker was given and has not run, and forget them."""
        return self._attempts.pop(number, [])[self.ledger.n_attempts_done(number) :]

    def _find_lost(self) -> list[int]:
        """Return the chunks whose results are missing, once no worker will run or send them."""
        size = self._job.grid.chunksize
        unreceived = {index * size for index in self.ledger.find_marked(SENT)} - self._received
        return sorted([*self.ledger.find_marked(PENDING), *(start // size for start in unreceived)])

    def _share_out(self, indices: list[int]) -> None:
        """Share out chunks that got lost among the workers."""
        for index in indices:
            self._marks[index] = RECLAIMED
        ranges = [Attempt(*self._job.grid.range_of(index)) for index in indices]
        if ranges:
            for number, part in self._divide(ranges):
                self.start(number, self._get_worker(number), part)

    def _divide(self, ranges: list[Attempt]) -> Iterator[tuple[int, list[Attempt]]]:
        """Divide ranges among the workers; those that have shares can only run what is in these."""
        job = self._job
        if not self._payload.shares:
            parts = Partition(job.n_workers, len(ranges))
            yield from ((number, ranges[part]) for number, part in enumerate(parts))
            return
        for number in range(job.n_workers):
            share = job.balance.plan(number, job.n_workers, len(job.grid))
            if part := [each for each in ranges if each.start // job.grid.chunksize in share]:
                yield number, part

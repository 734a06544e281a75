"""The executor whose only worker is the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from taskcarrier.scheduling.balance import Serial
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.loop import make_local_sink, run_with_timeout, run_worker, this_thread
from taskcarrier.workers.queues import BatchResult, return_items, to_batch_result
from taskcarrier.workers.records import RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, Job, WorkerContext
from taskcarrier.workers.thread_limits import thread_limit


class SerialExecutor:
    """Runs everything in the calling thread (`taskcarrier.workers.executor.Executor`)."""

    balance = Serial()
    staging = None
    notes: Sequence[str] = ()
    can_run_compiled = False
    may_move = False
    begins_in_caller = False
    runs_in_caller = True

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:
        """Run a job to its end."""
        ledger = make_caller_ledger(job, tick)
        # Noted before the run: exceptions of handlers that the function sets are its own errors.
        handlers = Handlers() if job.collect_errors or job.retry_policy.retry_on else None
        with thread_limit.open():
            stats = run_worker(job, ledger, 0, make_local_sink(deliver))
        del handlers
        stats.name = "caller"
        return RunResult.read([stats], ledger, job.grid)

    @contextmanager
    def stream(self, job: Job) -> Iterator[SerialQueue]:
        """Open a queue whose batches are run when they are put."""
        with thread_limit.open():
            yield SerialQueue(job)


def make_caller_ledger(job: Job, tick: Callable[[Ledger], None] | None) -> Ledger:
    """Return the ledger of a run in the calling thread, which calls `tick` after each chunk."""
    ledger: Ledger
    if tick is None:
        ledger = Ledger.local(job.n_workers, job.begun)
    else:
        ledger = watched = _WatchedLedger.local(job.n_workers, job.begun)
        watched.tick = tick
    ledger.marks = job.open_marks()
    return ledger


class _WatchedLedger(Ledger):
    """A ledger that calls `tick` after every chunk of the calling thread, which is worker 0."""

    tick: Callable[[Ledger], None]

    def finish(self, worker: int, n_items: int) -> None:
        super().finish(worker, n_items)
        if worker == 0:
            self.tick(self)


class SerialQueue:
    """A queue whose only worker is the caller: a batch is run when it is put."""

    runs_in_caller = True

    def __init__(self, job: Job) -> None:
        self.ledger = Ledger.local(1)
        self._job = job
        self._stats = WorkerStats(0, "caller")
        self._worker = WorkerContext(0, self.ledger.propose)
        self._run_range = job.task.start(self._worker)
        self._results: list[BatchResult] = []

    @property
    def has_room(self) -> bool:
        """Whether the result of the last batch was taken."""
        return not self._results

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Run the items now."""
        attempt = Attempt(start, start + len(items))
        self._worker.batch = (start, partial(return_items, items))
        was_worker = this_thread.is_worker
        # Handlers that the function itself sets do not count: their exceptions can be retried.
        handlers = Handlers() if self._job.retry_policy.retry_on else None
        try:
            this_thread.is_worker = True
            if self._job.retry_policy.timeout is None:
                result = self._run_range(attempt.start, attempt.stop)
            else:
                result = to_batch_result(
                    run_with_timeout(self._job, self.ledger, 0, self._run_range, attempt)
                )
        finally:
            this_thread.is_worker = was_worker
            del handlers
        self._results.append(result)
        self.ledger.finish(0, len(items))
        self._stats.n_ranges += 1
        self._stats.n_items += len(items)
        self._stats.busy_ns += result.busy_ns

    def get(self, seconds: float) -> list[BatchResult]:  # noqa: ARG002  # there is nothing to wait for
        """Return the result of the last batch."""
        results, self._results = self._results, []
        return results

    def close(self) -> RunResult:
        """Return what the worker did: nothing is running that must be stopped."""
        return RunResult.read([self._stats], self.ledger)

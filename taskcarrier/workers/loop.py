"""The loop that every worker runs.

All parts of the library meet here. On one side a `Task` becomes, in each worker, a callable of
``(start, stop)``; on the other side balance, ledger and executors know only chunks. Arrays and
lists are tasks; threads, processes and the caller itself run this loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from time import monotonic_ns
from typing import Any

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import DONE, SENT, Ledger
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.workers.records import DeliveredFailure, PartialResult, RangeFailure, WorkerStats
from taskcarrier.workers.task import (
    IN_PLACE,
    CompiledTask,
    Deliver,
    Job,
    RunRange,
    ShareTask,
    WorkerContext,
)


class _ThisThread(threading.local):
    """What is known of the current thread."""

    is_worker = False


this_thread = _ThisThread()
"""What is known of the current thread. Set it by assignment, and set it back first in a
``finally``: no exception from outside can come before that (`taskcarrier.system.interrupts`)."""
_in_worker_process = False


def is_in_worker() -> bool:
    """Return whether this code runs inside a worker, where further maps are serial."""
    return _in_worker_process or this_thread.is_worker


def is_worker_process() -> bool:
    """Return whether this whole process is a worker."""
    return _in_worker_process


def mark_worker_process() -> None:
    """Record that this whole process is a worker."""
    global _in_worker_process  # noqa: PLW0603  # a fact about the process, set once
    _in_worker_process = True


ResultSink = tuple[Deliver, Callable[[], None]]
"""How results leave a worker: a function that takes one, and one that sends those still waiting."""


# The index of a chunk; or an attempt or a batch, with its number among those of this worker.
_Claim = tuple[Attempt, int] | int

BatchSource = Callable[[WorkerContext], Iterable[_Claim]]
"""Gives batches of items to a worker's context, and yields the ranges of them to run."""


def make_local_sink(deliver: Deliver) -> ResultSink:
    """Return the sink of a worker in the caller's process, which holds nothing back."""
    return deliver, lambda: None


def run_worker(  # noqa: C901, PLR0912, PLR0915  # what is done for each range, without further calls
    job: Job,
    ledger: Ledger,
    number: int,
    sink: ResultSink,
    attempts: Sequence[Attempt] = (),
    *,
    batch_source: BatchSource | None = None,
) -> WorkerStats:
    """Run ranges until none is left, one fails, or the run is halted; return the worker's stats.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        The record in which chunks are claimed and finished.
    number : int
        This worker's number, from 0.
    sink : ResultSink
        Where results go that are not in place yet.
    attempts : sequence of Attempt
        Ranges to run before any chunk, because another worker has died on them.
    batch_source : BatchSource, optional
        Where all other ranges come from, instead of the grid.
    """
    stats = WorkerStats(number)
    was_worker = this_thread.is_worker
    try:
        this_thread.is_worker = True
        if isinstance(job.task, CompiledTask):
            _run_compiled(job.task, job, ledger, stats, sink[0])
            return stats
        if isinstance(job.task, ShareTask) and not attempts:
            job.task.run_share(job, ledger, stats, sink[0])
            return stats
        worker = WorkerContext(number, ledger.propose)
        run_range = job.task.start(worker)
        claims = (
            job.balance.chunks(ledger, number, job.n_workers, len(job.grid), job.begun.first)
            if batch_source is None
            else batch_source(worker)
        )
        if attempts:
            claims = chain(_claim_attempts(ledger, number, attempts), claims)
        marks = ledger.marks
        deliver, flush = sink
        timeout_ns = job.retry_policy.timeout_ns
        n_items, chunksize = job.grid.n_items, job.grid.chunksize
        n_ranges = n_done = busy_ns = 0
        pid = os.getpid()
        start, stop, attempt, position = -1, -1, 1, -1
        try:
            for claim in claims:
                if isinstance(claim, int):
                    index, attempt, position = claim, 1, -1
                    start = index * chunksize
                    stop = min(start + chunksize, n_items)
                else:
                    (start, stop, attempt), position = claim
                    index = start // chunksize
                begin = monotonic_ns()
                try:
                    if timeout_ns:
                        result = run_with_timeout(
                            job, ledger, number, run_range, Attempt(start, stop, attempt)
                        )
                    else:
                        result = run_range(start, stop)
                    if result is not IN_PLACE:
                        deliver(start, result)
                finally:
                    busy_ns += monotonic_ns() - begin
                    if os.getpid() != pid:
                        # The function has forked, and both processes came back. One is the worker.
                        os._exit(1)
                if marks is not None and (
                    position < 0 or job.grid.range_of(index) == (start, stop)
                ):
                    marks[index] = DONE if result is IN_PLACE else SENT
                if position < 0:
                    ledger.finish(number, stop - start)
                else:
                    flush()
                    ledger.finish_attempt(number, position, stop - start)
                n_ranges += 1
                n_done += stop - start
        finally:
            stats.n_ranges, stats.n_items, stats.busy_ns = n_ranges, n_done, busy_ns
            stats.last_range, stats.attempt = None if start < 0 else (start, stop), attempt
            stats.facts = worker.facts
    except BaseException as error:  # noqa: BLE001  # also exits and interrupts: the caller raises
        ledger.halt()
        stats.failure = RangeFailure(stats.last_range, error, attempt=stats.attempt)
    finally:
        this_thread.is_worker = was_worker
    return stats


def _run_compiled(
    task: CompiledTask, job: Job, ledger: Ledger, stats: WorkerStats, deliver: Deliver
) -> None:
    """Let compiled code run chunks until none is left."""
    begin = monotonic_ns()
    try:
        task.run_all(job, ledger, stats.worker, deliver)
    finally:
        stats.busy_ns = monotonic_ns() - begin
        stats.n_ranges = ledger.n_ranges_of(stats.worker)
        stats.n_items = ledger.n_items_of(stats.worker)
        index, _ = ledger.loop_position(stats.worker)
        stats.last_range = None if index < 0 else job.grid.range_of(index)


def _claim_attempts(ledger: Ledger, worker: int, attempts: Sequence[Attempt]) -> Iterator[_Claim]:
    """Yield attempts with their numbers; each is in the worker's hand when it is yielded."""
    for number, attempt in enumerate(attempts):
        if ledger.is_halted:
            return
        ledger.hold_attempt(worker, number)
        yield attempt, number


def run_with_timeout(
    job: Job, ledger: Ledger, worker: int, run_range: RunRange, attempt: Attempt
) -> Any:
    """Return the result of a range; whether it took too long is checked when it is over."""
    while True:
        begin = monotonic_ns()
        ledger.set_start_time(worker, begin)
        result = run_range(attempt.start, attempt.stop)
        taken_ns = monotonic_ns() - begin
        # Sending the result does not count, as it may have to wait.
        ledger.set_start_time(worker, 0)
        if taken_ns <= job.retry_policy.timeout_ns:
            return result
        if not (next_attempts := job.retry_policy.next_after_timeout(attempt)):
            break
        (attempt,) = next_attempts
    error = make_timeout_error(job.retry_policy, taken_ns / 1e9)
    if not _in_worker_process:
        add_note(error, "only processes can be stopped within a range: it was run to its end")
    if not job.collect_errors:
        raise error
    return PartialResult([], [DeliveredFailure(attempt.start, attempt.stop, error)])


def make_timeout_error(retry_policy: RetryPolicy, seconds: float | None = None) -> TimeoutError:
    """Return the error for a range that took too long, with the `seconds` if they are known."""
    taken = "" if seconds is None else f"{seconds:.3g} s, "
    return TimeoutError(f"a range took {taken}longer than timeout={retry_policy.timeout:g} seconds")

"""The worker's loop: the only code that is ever sent to workers.

All parts of the library meet here. On one side a `Task` opens, in each worker, into a callable
of ``(start, stop)``; on the other side balance, ledger and backends know only chunks. Arrays and
lists are tasks; threads, processes and the caller itself run this loop.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from time import monotonic_ns
from typing import Any, cast

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import DONE, SENT, Ledger
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.workers.records import PartialResult, RangeFailure, WorkerStats
from taskcarrier.workers.task import (
    IN_PLACE,
    BatchRunner,
    CompiledRunner,
    Deliver,
    Job,
    RangeRunner,
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

BatchSource = Callable[[BatchRunner], Iterable[_Claim]]
"""Hands batches of items to a worker's runner, and yields the ranges of them that it is to run."""


def make_local_sink(deliver: Deliver) -> ResultSink:
    """Return the sink of a worker in the caller's process, which holds nothing back."""
    return deliver, lambda: None


def run_worker(
    job: Job,
    ledger: Ledger,
    worker: int,
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
    worker : int
        This worker's number, from 0.
    sink : ResultSink
        Where results go that are not in place yet.
    attempts : sequence of Attempt
        Ranges to run before any chunk, because another worker has died on them.
    batch_source : BatchSource, optional
        Where all other ranges come from, instead of the grid.
    """
    stats = WorkerStats(worker)
    was_worker = this_thread.is_worker
    runner: RangeRunner | None = None
    try:
        this_thread.is_worker = True
        runner = job.task.open(ledger.propose)
        if job.runs_all:
            _run_all(job, ledger, stats, cast("CompiledRunner", runner), sink[0])
        else:
            claims: Iterable[_Claim]
            if batch_source is not None:
                claims = batch_source(cast("BatchRunner", runner))
            else:
                claims = job.balance.chunks(ledger, worker, job.n_workers, len(job.grid))
            if attempts:
                claims = chain(_claim_attempts(ledger, worker, attempts), claims)
            _run_ranges(job, ledger, stats, runner, sink=sink, claims=claims)
    except BaseException as error:  # noqa: BLE001  # also exits and interrupts: the caller raises
        ledger.halt()
        stats.failure = RangeFailure(stats.at, error, attempt=stats.attempt)
    finally:
        this_thread.is_worker = was_worker
        if runner is not None:
            stats.facts = runner.facts()  # must not raise
    return stats


def _run_all(
    job: Job, ledger: Ledger, stats: WorkerStats, runner: CompiledRunner, deliver: Deliver
) -> None:
    """Let compiled code run chunks until none is left."""
    worker = stats.worker
    begin = monotonic_ns()
    try:
        runner.run_all(job, ledger, worker, deliver)
    finally:
        stats.busy_ns = monotonic_ns() - begin
        stats.ranges, stats.items = ledger.n_ranges_of(worker), ledger.n_items_of(worker)
        index, _ = ledger.loop_position(worker)
        stats.at = None if index < 0 else job.grid.range_of(index)


def _run_ranges(
    job: Job,
    ledger: Ledger,
    stats: WorkerStats,
    runner: RangeRunner,
    *,
    sink: ResultSink,
    claims: Iterable[_Claim],
) -> None:
    """Run ranges one after the other; this loop has everything that is done for each."""
    worker, marks = stats.worker, ledger.marks
    deliver, flush = sink
    timeout_ns = job.retry_policy.timeout_ns
    n_items, chunksize = job.grid.n_items, job.grid.chunksize
    ranges = items = busy_ns = 0
    pid = os.getpid()
    start, stop, attempt, number = -1, -1, 1, -1
    try:
        for claim in claims:
            if isinstance(claim, int):
                index, attempt, number = claim, 1, -1
                start = index * chunksize
                stop = min(start + chunksize, n_items)
            else:
                (start, stop, attempt), number = claim
                index = start // chunksize
            begin = monotonic_ns()
            try:
                if timeout_ns:
                    result = run_with_timeout(
                        job, ledger, worker, runner, Attempt(start, stop, attempt)
                    )
                else:
                    result = runner(start, stop)
                if result is not IN_PLACE:
                    deliver(start, result)
            finally:
                busy_ns += monotonic_ns() - begin
                if os.getpid() != pid:
                    # The function has forked, and both processes came back. One is the worker.
                    os._exit(1)
            if marks is not None and (number < 0 or job.grid.range_of(index) == (start, stop)):
                marks[index] = DONE if result is IN_PLACE else SENT
            if number < 0:
                ledger.finish(worker, stop - start)
            else:
                flush()
                ledger.finish_attempt(worker, number, stop - start)
            ranges += 1
            items += stop - start
    finally:
        stats.ranges, stats.items, stats.busy_ns = ranges, items, busy_ns
        stats.at, stats.attempt = None if start < 0 else (start, stop), attempt


def _claim_attempts(ledger: Ledger, worker: int, attempts: Sequence[Attempt]) -> Iterator[_Claim]:
    """Yield attempts with their numbers; each is in the worker's hand when it is yielded."""
    for number, attempt in enumerate(attempts):
        if ledger.is_halted:
            return
        ledger.hold_attempt(worker, number)
        yield attempt, number


def run_with_timeout(
    job: Job, ledger: Ledger, worker: int, runner: RangeRunner, attempt: Attempt
) -> Any:
    """Return the result of a range; whether it took too long is checked when it is over."""
    while True:
        begin = monotonic_ns()
        ledger.set_start_time(worker, begin)
        result = runner(attempt.start, attempt.stop)
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
    return PartialResult([], [(attempt.start, attempt.stop, error)])


def make_timeout_error(retry_policy: RetryPolicy, seconds: float | None = None) -> TimeoutError:
    """Return the error for a range that took too long, with the `seconds` if they are known."""
    taken = "" if seconds is None else f"{seconds:.3g} s, "
    return TimeoutError(f"a range took {taken}longer than timeout={retry_policy.timeout:g} seconds")

"""The worker's loop: the only thing that is ever dispatched.

The narrow waist of the library. On one side a `Task` opens, in each worker, into a callable
of ``(start, stop)``; on the other side balance, ledger and backends know nothing but chunks.
Arrays and lists are tasks; threads, processes and the caller itself run this loop.
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
    """What is known of the thread that asks."""

    is_worker = False


this_thread = _ThisThread()
"""It is changed by assignment, and changed back by one that begins a ``finally``:
then no exception from outside can come before (`taskcarrier.system.interrupts`)."""
_in_worker_process = False


def is_in_worker() -> bool:
    """Whether this code runs inside a worker, where further maps are serial."""
    return _in_worker_process or this_thread.is_worker


def is_worker_process() -> bool:
    """Whether this whole process is a worker."""
    return _in_worker_process


def mark_worker_process() -> None:
    """Say that this whole process is a worker."""
    global _in_worker_process  # noqa: PLW0603  # a fact about the process, set once
    _in_worker_process = True


ResultSink = tuple[Deliver, Callable[[], None]]
"""How results leave a worker: a function that takes them, and one that has them arrive."""


# A range that is given out attempts, or was fed, and its number among these; or a chunk.
_Held = tuple[Attempt, int] | int

AttemptSource = Callable[[BatchRunner], Iterable[_Held]]
"""Hands blocks of items to a worker's chunks, and yields what it is to run of them."""


def local_sink(deliver: Deliver) -> ResultSink:
    """That of a worker in the caller's process."""
    return deliver, lambda: None


def run_worker(
    job: Job,
    ledger: Ledger,
    worker: int,
    sink: ResultSink,
    attempts: Sequence[Attempt] = (),
    *,
    attempt_source: AttemptSource | None = None,
) -> WorkerStats:
    """Run ranges until there are none, one fails, or the run is halted.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        Where chunks are claimed and laid down.
    worker : int
        This worker's number, from 0.
    sink : ResultSink
        Where results go that are not in place yet.
    attempts : sequence of Attempt
        Ranges that this worker is to run before its chunks, because another has died on them.
    attempt_source : AttemptSource, optional
        Where its other ranges come from, instead of the grid.
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
            held: Iterable[_Held]
            if attempt_source is not None:
                held = attempt_source(cast("BatchRunner", runner))
            else:
                held = job.balance.chunks(ledger, worker, job.n_workers, len(job.grid))
            if attempts:
                held = chain(_claim_attempts(ledger, worker, attempts), held)
            _run_ranges(job, ledger, stats, runner, sink=sink, held=held)
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
    """Have compiled code run chunks until there are none."""
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
    held: Iterable[_Held],
) -> None:
    """Run ranges one after the other; all that is done for each is in this loop."""
    worker, marks = stats.worker, ledger.marks
    deliver, flush = sink
    timeout_ns = job.retry_policy.timeout_ns
    n_items, chunksize = job.grid.n_items, job.grid.chunksize
    ranges = items = busy_ns = 0
    pid = os.getpid()
    start, stop, attempt, number = -1, -1, 1, -1
    try:
        for one in held:
            if isinstance(one, int):
                index, attempt, number = one, 1, -1
                start = index * chunksize
                stop = min(start + chunksize, n_items)
            else:
                (start, stop, attempt), number = one
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
                    # The function has forked and both came back. Only one is the worker.
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


def _claim_attempts(ledger: Ledger, worker: int, attempts: Sequence[Attempt]) -> Iterator[_Held]:
    """Ranges that are given out attempts, each in the worker's hand when it is yielded."""
    for number, one in enumerate(attempts):
        if ledger.is_halted:
            return
        ledger.hold_attempt(worker, number)
        yield one, number


def run_with_timeout(
    job: Job, ledger: Ledger, worker: int, runner: RangeRunner, attempts: Attempt
) -> Any:
    """The result of a range; the worker itself sees when it is over that it has taken too long."""
    while True:
        begin = monotonic_ns()
        ledger.set_start_time(worker, begin)
        result = runner(attempts.start, attempts.stop)
        taken_ns = monotonic_ns() - begin
        ledger.set_start_time(
            worker, 0
        )  # sending the result, which may have to wait, does not count
        if taken_ns <= job.retry_policy.timeout_ns:
            return result
        if not (nexts := job.retry_policy.next_after_timeout(attempts)):
            break
        (attempts,) = nexts
    error = timeout_error(job.retry_policy, taken_ns / 1e9)
    if not _in_worker_process:
        add_note(error, "only processes can be stopped within a range: it was run to its end")
    if not job.collect_errors:
        raise error
    return PartialResult([], [(attempts.start, attempts.stop, error)])


def timeout_error(retry_policy: RetryPolicy, seconds: float | None = None) -> TimeoutError:
    """The error for a range that has taken too long: so many seconds, if that is known."""
    taken = "" if seconds is None else f"{seconds:.3g} s, "
    return TimeoutError(f"a range took {taken}longer than timeout={retry_policy.timeout:g} seconds")

"""Pools of threads.

Who owns what. A `ThreadPool` owns its threads, which are started when they are first needed. Each
waits at its own inbox for a run, and the last thread to end a run wakes the caller. A thread itself
records that it is free again, and ends when nothing refers to its `_Worker` any more. So the pool
does not depend on how the caller left a run: a thread that is not free when the next run begins is
dropped then, and another takes its place.

The threads are our own daemons and not those of a `ThreadPoolExecutor`, which joins its threads
when the interpreter exits: a thread stuck in a kernel would hold up the exit after Ctrl-C. They are
named like an executor's threads because libraries look for that name to find out whether they run
inside a thread pool.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.system.locks import Lock
from taskcarrier.workers.loop import BatchSource, make_local_sink, run_worker, this_thread
from taskcarrier.workers.queues import ThreadQueue
from taskcarrier.workers.records import RunResult, WorkerStats
from taskcarrier.workers.task import CompiledTask, Deliver, Job
from taskcarrier.workers.thread_limits import limit_this_thread, make_joblib_serial, thread_limit

# Seconds between two looks at a run whose progress is shown.
TICK = 0.1
# A signal that comes just before the caller begins to wait is not seen until something else
# happens, so the caller wakes from time to time.
LONGEST_WAIT = 1.0
# How long an interrupted call waits for compiled loops, which check the halt word before every item
# and write their results themselves.
_GRACE_SECONDS = 1.0


RecordEnd = Callable[[WorkerStats], None]
"""A function that takes a worker's stats when it is done."""


class _Worker:
    """A thread that waits at its inbox, and ends when this object does."""

    is_free = True
    """Whether the thread has nothing to do; the caller clears this before it hands it a run."""

    def __init__(self, number: int) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.thread = threading.Thread(
            target=_worker_main,
            args=(self.inbox, weakref.ref(self, self.inbox.put)),
            name=f"ThreadPoolExecutor-taskcarrier-{number}",
            daemon=True,
        )
        self.thread.start()

    def end(self) -> None:
        """Let the thread end when it has done what it was given."""
        self.inbox.put(None)


def _worker_main(inbox: SimpleQueue[Any], worker: weakref.ref[_Worker]) -> None:
    make_joblib_serial()
    # Set between runs, too: the garbage collector may close a stream at any moment.
    this_thread.is_worker = True
    # When the worker is gone, the dead reference to it comes: none of our code runs for that.
    while (run := inbox.get()) is not None and run is not worker:
        run()
        del run  # keep nothing of a run while waiting for the next


class Invitation:
    """Work for a free thread, unless the caller takes it back before the thread has begun.

    The work is in a list. The thread that pops it owns it, so that a thread that comes late finds
    nothing, and holds nothing of a call that is over.
    """

    def __init__(self, worker: _Worker, work: Callable[[], None]) -> None:
        self._worker = worker
        self._work = [work]

    def accept(self) -> None:
        """Do the work, in the thread."""
        try:
            work = self._work.pop()
        except IndexError:
            return
        work()

    def take_back(self) -> bool:
        """Take the work back, in the caller; return whether it is there still."""
        try:
            self._work.pop()
        except IndexError:
            return False
        self._worker.is_free = True
        return True


def make_ledger(job: Job) -> Ledger:
    """Return the ledger of a run whose workers are threads of this process."""
    is_compiled = isinstance(job.task, CompiledTask)
    ledger = (Ledger.with_address if is_compiled else Ledger.local)(job.n_workers)
    ledger.marks = job.open_marks()
    return ledger


class ThreadRun:
    """One run on the threads of a pool: ``with run:``.

    Parameters
    ----------
    pool : ThreadPool
        The pool, which nothing else uses meanwhile.
    job : Job
        What to run.
    ledger : Ledger
        The record of the run.
    deliver : callable
        Takes results that are not in place.
    n_threads : int
        The number of threads that will be started.
    """

    def __init__(
        self, pool: ThreadPool, job: Job, ledger: Ledger, deliver: Deliver, n_threads: int
    ) -> None:
        self._pool = pool
        self._job = job
        self._ledger = ledger
        self._deliver = deliver
        self._n_threads = n_threads
        self._stats: dict[int, WorkerStats] = {}
        self._stats_lock = Lock()
        # The last worker releases this, so that the caller is woken once.
        self._finished = threading.Lock()
        self._finished.acquire()

    def start(self, numbers: range) -> None:
        """Start the threads with these numbers."""
        job, sink = self._job, make_local_sink(self._deliver)
        for number in numbers:
            work = partial(run_worker, job, self._ledger, number, sink)
            self._pool.begin(number, job, work, self._record_end)

    def _record_end(self, stats: WorkerStats) -> None:
        stats.name = f"thread {stats.worker}"
        with self._stats_lock:
            self._stats[stats.worker] = stats
            if len(self._stats) == self._n_threads:
                self._finished.release()

    def wait(self, tick: Callable[[Ledger], None] | None) -> list[WorkerStats]:
        """Wait until all threads have ended; return their stats, in order.

        When interrupted, threads stop at their next chunk. Those still in a chunk are left to
        finish it on their own; they find the output closed and do not come back to the pool.
        """
        _wait_for_last(self._finished, self._ledger, tick)
        return [self._stats[number] for number in sorted(self._stats)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._stats) < self._n_threads:
            self._ledger.halt()
            if isinstance(self._job.task, CompiledTask):
                self._finished.acquire(timeout=_GRACE_SECONDS)
            self._pool.drop_stuck_workers()


class ThreadPool:
    """Up to `n` threads that run jobs together.

    Parameters
    ----------
    n : int
        The number of threads.

    Attributes
    ----------
    lacks_workers : bool
        Whether a thread that was needed could not be started.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._workers: dict[int, _Worker] = {}
        self._start_lock = threading.Lock()  # only in threads that are not interrupted
        self.lacks_workers = False

    @property
    def is_warm(self) -> bool:
        """Whether all threads have been started."""
        return len(self._workers) == self._n

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:
        """Run a job to its end; the result has stats in the order of the workers."""
        ledger = make_ledger(job)
        run = self.prepare(job, ledger, deliver, range(job.n_workers))
        with run, thread_limit.open():
            run.start(range(job.n_workers))
            return RunResult.read(run.wait(tick), ledger, job.grid)

    def prepare(self, job: Job, ledger: Ledger, deliver: Deliver, numbers: range) -> ThreadRun:
        """Return a run of a job by the threads with these numbers; none has begun yet."""
        self.ensure_free(numbers)
        return ThreadRun(self, job, ledger, deliver, len(numbers))

    def stream(self, job: Job) -> ThreadQueue:
        """Return a queue of batches for threads; it has the pool to itself until it is closed."""
        self.drop_stuck_workers()
        ledger = Ledger.local(job.n_workers)

        def begin(
            number: int, batch_source: BatchSource, deliver: Deliver, record_end: RecordEnd
        ) -> None:
            self._ensure_threads(range(number + 1))
            work = partial(
                run_worker, job, ledger, number, make_local_sink(deliver), batch_source=batch_source
            )
            self.begin(number, job, work, record_end)

        return ThreadQueue(job.n_workers, ledger, begin, self.drop_stuck_workers, _GRACE_SECONDS)

    def begin(
        self, number: int, job: Job, work: Callable[[], WorkerStats], record_end: RecordEnd
    ) -> None:
        """Hand a thread its work in a run."""

        def run() -> WorkerStats:
            job.parent_state.apply(in_process=False)
            return work()

        self.invite(number, run, record_end)

    def ensure_free(self, numbers: range) -> None:
        """Ensure that the threads with these numbers are there and free."""
        self.drop_stuck_workers()  # in case that was cut short last time
        self._ensure_threads(numbers)

    def invite(
        self, number: int, work: Callable[[], WorkerStats], record_end: RecordEnd
    ) -> Invitation:
        """Invite a free thread to work in a copy of this context; nothing may be raised there."""
        worker = self._workers[number]

        def run() -> None:
            limit_this_thread()
            stats = work()
            worker.is_free = True
            record_end(stats)

        invitation = Invitation(worker, partial(copy_context().run, run))
        worker.is_free = False
        worker.inbox.put(invitation.accept)
        return invitation

    def list_threads(self, numbers: range) -> list[threading.Thread]:
        """Return the threads with these numbers, which have been started."""
        return [self._workers[number].thread for number in numbers]

    def drop_stuck_workers(self) -> None:
        """Drop threads that still have something of an earlier run in hand."""
        for number, worker in self._workers.copy().items():
            if not worker.is_free:  # if this is cut short, the next call repeats it
                worker.end()
                self._workers.pop(number, None)

    def _ensure_threads(self, numbers: range) -> None:
        """Start the threads with these numbers that are missing: not needed so far, or dropped."""
        if not all(map(self._workers.__contains__, numbers)):
            run_sheltered(partial(self._start_threads, numbers))

    def _start_threads(self, numbers: range) -> None:
        with self._start_lock:  # an earlier, interrupted call may still be doing this
            self.lacks_workers = False
            for number in set(numbers) - set(self._workers):
                try:
                    self._workers[number] = _Worker(number)
                except (RuntimeError, MemoryError) as error:
                    self.lacks_workers = True
                    add_note(
                        error,
                        f"only {len(self._workers):,} of {self._n:,} threads could be started; "
                        "pass a smaller n_jobs, or raise the limit (`ulimit -u`, `ulimit -v`, or "
                        "the control group's)",
                    )
                    raise

    def close(self, *, wait: bool = True) -> None:
        """End the threads, without waiting for those that have something in hand."""
        workers = list(self._workers.copy().values())
        for worker in workers:
            worker.end()
        if wait:
            for worker in workers:
                if worker.is_free:
                    worker.thread.join()

    def drop_after_fork(self) -> None:
        """Drop the threads in a forked child, where they do not exist."""
        self._workers = {}


def _wait_for_last(
    finished: threading.Lock, ledger: Ledger, tick: Callable[[Ledger], None] | None
) -> None:
    """Wait until the last worker releases the lock; meanwhile keep calling `tick`."""
    while not finished.acquire(timeout=LONGEST_WAIT if tick is None else TICK):
        if tick is not None:
            tick(ledger)
    if tick is not None:
        tick(ledger)

"""Pools of threads.

Who owns what. A `ThreadPool` owns its threads, which are started when they are needed first; each
waits at its own inbox for a run, and the last of a run to end wakes the caller. A thread says
itself that it is free again, and ends when nothing refers to its `_Worker` any more. So the pool
does not depend on how the caller has left a run: one that is not free when the next one begins is
dropped then, and another takes its place.

The threads are daemons of ours and not those of a `ThreadPoolExecutor`, which joins its threads
when the interpreter exits: a thread stuck in a kernel would hold up the exit after Ctrl-C. They are
named like an executor's threads because libraries that ask whether they run inside a thread pool
look for that name.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.workers.loop import AttemptSource, local_sink, run_worker, this_thread
from taskcarrier.workers.queues import ThreadQueue
from taskcarrier.workers.records import RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import limit_this_thread, limited, serial_joblib

# Seconds between two looks at a run whose progress is shown.
TICK = 0.1
# A signal that comes just before the caller begins to wait is not seen until something else
# happens; so it looks now and then.
_LONGEST_WAIT = 1.0
# How long an interrupted call waits for compiled loops, which look at the halt word before every
# item and write their results themselves.
_GRACE_SECONDS = 1.0


Ended = Callable[[WorkerStats], None]
"""Takes a worker's account when it is done."""


class _Worker:
    """A thread that waits at its inbox, and ends with this."""

    is_free = True
    """Whether it has nothing to do; the caller says otherwise before it gives it something."""

    def __init__(self, number: int) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.thread = threading.Thread(
            target=_live,
            args=(self.inbox, weakref.ref(self, self.inbox.put)),
            name=f"ThreadPoolExecutor-taskcarrier-{number}",
            daemon=True,
        )
        self.thread.start()

    def end(self) -> None:
        """Have the thread end when it has done what it was given."""
        self.inbox.put(None)


def _live(inbox: SimpleQueue[Any], worker: weakref.ref[_Worker]) -> None:
    serial_joblib()
    # Between two runs, too: the garbage collector may close a stream at any moment.
    this_thread.is_worker = True
    # What comes when the worker is gone is the reference to it: no code of ours runs for that.
    while (run := inbox.get()) is not None and run is not worker:
        run()
        del run  # nothing of a run is kept while waiting for the next


class ThreadPool:
    """Up to `n` threads that run jobs together.

    Parameters
    ----------
    n : int
        The number of threads.

    Attributes
    ----------
    is_short : bool
        Whether one that was needed could not be started.
    """

    shares_memory = True

    def __init__(self, n: int) -> None:
        self._n = n
        self._workers: dict[int, _Worker] = {}
        self._filling = threading.Lock()  # only in threads that are not interrupted
        self.is_short = False

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:
        """Run a job to its end; accounts in the order of the workers.

        When interrupted, workers stop at their next chunk; those still in one are left to
        finish it on their own, find the way to the output closed, and do not come back to the pool.
        """
        n = job.n_workers
        self._drop_stuck_workers()  # should that have been cut short
        self._have(n)
        ledger = (Ledger.with_address if job.runs_all else Ledger.local)(n)
        ledger.marks = job.open_marks()
        worker_stats: dict[int, WorkerStats] = {}
        # The last worker opens this, so that the caller is woken once.
        finished = threading.Lock()
        finished.acquire()
        last = threading.Lock()

        def ended(stats: WorkerStats) -> None:
            with last:
                worker_stats[stats.worker] = stats
                if len(worker_stats) == n:
                    finished.release()

        try:
            with limited.open():
                for number in range(n):
                    part = partial(run_worker, job, ledger, number, local_sink(deliver))
                    self._begin(number, job, part, ended)
                _wait(finished, ledger, tick)
        finally:
            if len(worker_stats) < n:
                ledger.halt()
                if job.runs_all:
                    finished.acquire(timeout=_GRACE_SECONDS)
                self._drop_stuck_workers()
        for number, stats in worker_stats.items():
            stats.name = f"thread {number}"
        return RunResult.read([worker_stats[number] for number in range(n)], ledger, job.grid)

    def stream(self, job: Job) -> ThreadQueue:
        """Have threads wait for blocks of items; the pool is its own until it is closed."""
        self._drop_stuck_workers()
        ledger = Ledger.local(job.n_workers)

        def begin(
            number: int, attempt_source: AttemptSource, deliver: Deliver, ended: Ended
        ) -> None:
            self._have(number + 1)
            part = partial(
                run_worker, job, ledger, number, local_sink(deliver), attempt_source=attempt_source
            )
            self._begin(number, job, part, ended)

        return ThreadQueue(job.n_workers, ledger, begin, self._drop_stuck_workers, _GRACE_SECONDS)

    def _begin(self, number: int, job: Job, part: Callable[[], WorkerStats], ended: Ended) -> None:
        """Have a thread begin its part of a run."""
        worker = self._workers[number]

        def run() -> None:
            job.parent_state.apply(in_process=False)
            limit_this_thread()
            stats = part()
            worker.is_free = True
            ended(stats)

        context = copy_context()
        worker.is_free = False
        worker.inbox.put(lambda: context.run(run))

    def _drop_stuck_workers(self) -> None:
        """Let go of threads that still have something of an earlier run in hand."""
        for number, worker in self._workers.copy().items():
            if not worker.is_free:  # should this be cut short, it is so the next time too
                worker.end()
                self._workers.pop(number, None)

    def _have(self, n: int) -> None:
        """Start those of the first `n` threads that were not needed yet, or were left behind."""
        if not all(map(self._workers.__contains__, range(n))):
            run_sheltered(partial(self._fill, n))

    def _fill(self, n: int) -> None:
        with self._filling:  # an earlier call that was interrupted may still be at it
            self.is_short = False
            for number in set(range(n)) - set(self._workers):
                try:
                    self._workers[number] = _Worker(number)
                except (RuntimeError, MemoryError) as error:
                    self.is_short = True
                    add_note(
                        error,
                        f"only {len(self._workers):,} of {self._n:,} threads could be started; "
                        "pass a smaller n_jobs, or raise the limit (`ulimit -u`, `ulimit -v`, or "
                        "the control group's)",
                    )
                    raise

    def close(self, *, wait: bool = True) -> None:
        """End the threads; who has something in hand is not waited for."""
        workers = list(self._workers.copy().values())
        for worker in workers:
            worker.end()
        if wait:
            for worker in workers:
                if worker.is_free:
                    worker.thread.join()

    def forget(self) -> None:
        """Drop the threads in a forked child, where they do not exist."""
        self._workers = {}


def _wait(finished: threading.Lock, ledger: Ledger, tick: Callable[[Ledger], None] | None) -> None:
    """Wait until the last worker opens the lock; meanwhile what is shown is kept up to date."""
    while not finished.acquire(timeout=_LONGEST_WAIT if tick is None else TICK):
        if tick is not None:
            tick(ledger)
    if tick is not None:
        tick(ledger)

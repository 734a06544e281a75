"""Crews of threads.

Who owns what. A `ThreadCrew` owns its threads, which are started when they are needed first; each
waits at its own inbox for a run, and the last of a run to end wakes the caller. The threads are
daemons of ours and not those of a `ThreadPoolExecutor`, which joins its threads when the
interpreter exits: a thread stuck in a kernel would hold up the exit after Ctrl-C. They are named
like an executor's threads because libraries that ask whether they run inside a thread pool look for
that name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue

from taskcarrier.backends.feeds import ThreadFeed
from taskcarrier.backends.inner import limit_this_thread, limited, serial_joblib
from taskcarrier.backends.work import (
    Account,
    Deliver,
    Feeder,
    Job,
    Ran,
    be_at_work,
    outlet_here,
    work,
)
from taskcarrier.ledger import Ledger
from taskcarrier.notes import add_note

# Seconds between two looks at a run whose progress is shown.
TICK = 0.1
# A signal that comes just before the caller begins to wait is not seen until something else
# happens; so it looks now and then.
_LONGEST_WAIT = 1.0
# How long an interrupted call waits for compiled loops, which look at the halt word before every
# item and write their results themselves.
_GRACE_SECONDS = 1.0


Ended = Callable[[Account], None]
"""Takes a worker's account when it is done."""


class _Worker:
    def __init__(self, number: int) -> None:
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(
            target=self._live, name=f"ThreadPoolExecutor-taskcarrier-{number}", daemon=True
        )
        try:
            self.thread.start()
        except BaseException:  # also Ctrl-C, when it runs already
            self.inbox.put(None)
            raise

    def _live(self) -> None:
        serial_joblib()
        # Between two runs, too: the garbage collector may close a stream at any moment.
        be_at_work(True)
        while (run := self.inbox.get()) is not None:
            run()
            del run  # nothing of a run is kept while waiting for the next


class ThreadCrew:
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
        self.is_short = False

    def _living(self, number: int) -> _Worker:
        """A worker: the one there is, or a new one if none was needed yet or it was left behind."""
        worker = self._workers.get(number)
        if worker is None:
            try:
                worker = self._workers[number] = _Worker(number)
            except (RuntimeError, MemoryError) as error:
                self.is_short = True
                add_note(
                    error,
                    f"only {len(self._workers):,} of {self._n:,} threads could be started; pass a "
                    "smaller n_jobs, or raise the limit (`ulimit -u`, `ulimit -v`, or the control "
                    "group's)",
                )
                raise
        return worker

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> Ran:
        """Run a job to its end; accounts in the order of the workers.

        When interrupted, workers stop at their next cell; those still in one are left to
        finish it on their own, find the way to the output closed, and do not come back to the crew.
        """
        n = job.n_workers
        for number in range(n):
            self._living(number)
        ledger = (Ledger.addressed if job.sweeps else Ledger.local)(n)
        ledger.marks = job.marks_here()
        accounts: dict[int, Account] = {}
        # The last worker opens this, so that the caller is woken once.
        finished = threading.Lock()
        finished.acquire()
        last = threading.Lock()

        def ended(account: Account) -> None:
            with last:
                accounts[account.worker] = account
                if len(accounts) == n:
                    finished.release()

        try:
            with limited.open():
                for number in range(n):
                    part = partial(work, job, ledger, number, outlet_here(deliver))
                    self._begin(number, job, part, ended)
                _wait(finished, ledger, tick)
        finally:
            if len(accounts) < n:
                ledger.halt()
                try:
                    if job.sweeps:
                        finished.acquire(timeout=_GRACE_SECONDS)
                finally:
                    self._leave(set(range(n)) - set(accounts))
        for number, account in accounts.items():
            account.name = f"thread {number}"
        return Ran.read([accounts[number] for number in range(n)], ledger, job.grid)

    def feed(self, job: Job) -> ThreadFeed:
        """Have threads wait for blocks of items; the crew is its own until it is closed."""
        ledger = Ledger.local(job.n_workers)

        def begin(number: int, feed: Feeder, deliver: Deliver, ended: Ended) -> None:
            part = partial(work, job, ledger, number, outlet_here(deliver), feed=feed)
            self._begin(number, job, part, ended)

        return ThreadFeed(job.n_workers, ledger, begin, self._leave, _GRACE_SECONDS)

    def _begin(self, number: int, job: Job, part: Callable[[], Account], ended: Ended) -> None:
        """Have a thread begin its part of a run."""

        def run() -> None:
            job.surroundings.take_on(in_process=False)
            limit_this_thread()
            ended(part())

        context = copy_context()
        self._living(number).inbox.put(lambda: context.run(run))

    def _leave(self, stuck: set[int]) -> None:
        """Leave threads to end when they come to it; others take their place when needed."""
        for number in stuck:
            self._workers.pop(number).inbox.put(None)

    def close(self, *, wait: bool = True) -> None:
        """End the threads; they are idle."""
        workers = list(self._workers.values())
        for worker in workers:
            worker.inbox.put(None)
        if wait:
            for worker in workers:
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

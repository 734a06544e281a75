"""Executors: where a job runs, behind one interface.

An executor belongs to one run. It is made from a `Choice`, and says what its users must know before
they can make a job for it: whether copies for its workers have to be staged, and whether compiled
tasks can claim chunks by themselves. Nothing outside of this room asks for the name of a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.workers.choose import Choice, load_joblib, load_pickling, load_processes
from taskcarrier.workers.pools import prepare_processes, process_pool, thread_pool
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import thread_limit

if TYPE_CHECKING:
    from taskcarrier.workers.pickling import Payload, TaskPickler  # slow to import

Tick = Callable[[Ledger], None]
"""A function that is called now and then with the ledger of a run that goes on."""


class Executor(Protocol):
    """Runs one job."""

    @property
    def choice(self) -> Choice:
        """The backend, the number of workers, and the reason for them."""

    @property
    def balance(self) -> Balance | None:
        """The only rule by which it can share out chunks; None if it takes any."""

    @property
    def staging(self) -> Staging | None:
        """Where copies for its workers go; None if they share the caller's memory."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the report, known when the run has begun."""

    @property
    def can_run_compiled(self) -> bool:
        """Whether it runs a `CompiledTask`: in threads, which the caller can stop."""

    @property
    def may_move(self) -> bool:
        """Whether it may begin in the caller and go on in processes: it needs a `Move`."""

    @property
    def begins_in_caller(self) -> bool:
        """Whether the calling thread begins, and hands over the rest if that pays."""

    @property
    def runs_in_caller(self) -> bool:
        """Whether the calling thread does all the work."""

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Run a job to its end.

        `deliver` is called with results that are not in place, from any thread; `tick` about ten
        times a second from this one. When interrupted, workers stop at their next chunk.
        """

    def stream(self, job: Job) -> AbstractContextManager[WorkQueue]:
        """Open a work queue whose workers run the job on batches; its user closes it."""


class ThreadExecutor:
    """Runs a job on a warm pool of threads."""

    balance = None
    staging = None
    notes: Sequence[str] = ()
    can_run_compiled = True
    may_move = False
    begins_in_caller = False
    runs_in_caller = False

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Run a job in threads."""
        load_joblib()  # or the function could load it, where it would not be serial
        with thread_pool(self.choice.n_jobs) as threads:
            return threads.run(job, deliver, tick)

    @contextmanager
    def stream(self, job: Job) -> Iterator[WorkQueue]:
        """Open a queue of batches for threads."""
        load_joblib()  # as above
        with thread_pool(self.choice.n_jobs) as threads, thread_limit.open():
            yield threads.stream(job)


class ProcessExecutor:
    """Runs a job on a warm pool of worker processes."""

    balance = None
    notes: Sequence[str] = ()
    can_run_compiled = False
    may_move = False
    begins_in_caller = False
    runs_in_caller = False

    def __init__(self, choice: Choice, staging: Staging) -> None:
        self.choice = choice
        self.staging = staging

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Pickle a job once for all workers, and run it in processes."""
        return self.run_packed(*self.pack(job), deliver, tick)

    def pack(self, job: Job, pickler: TaskPickler | None = None) -> tuple[Job, Payload]:
        """Return a job that processes can mark, and the same pickled for them."""
        load_pickling()
        from taskcarrier.workers.pickling import pickle_task  # noqa: PLC0415  # slow to import

        if job.marks is None and len(job.grid) > OWN_MARKS:
            job = replace(job, marks=_make_marks(job.grid))
        payload = pickle_task(job, self.staging, pickler)
        self.notes = payload.notes
        prepare_processes(self.choice.n_jobs)  # not before: the job might be impossible to pickle
        return job, payload

    def run_packed(
        self, job: Job, payload: Payload, deliver: Deliver, tick: Tick | None
    ) -> RunResult:
        """Run a packed job in processes."""
        with process_pool(self.choice.n_jobs) as processes:
            return processes.run(job, payload, deliver, tick)

    @contextmanager
    def stream(self, job: Job, pickler: TaskPickler | None = None) -> Iterator[WorkQueue]:
        """Open a queue of batches for processes."""
        load_processes()
        from taskcarrier.workers.pickling import pickle_task  # noqa: PLC0415  # loads joblib

        payload = pickle_task(job, self.staging, pickler)
        self.notes = payload.notes
        with process_pool(self.choice.n_jobs) as processes:
            yield processes.stream(job, payload)


def _make_marks(grid: ChunkGrid) -> SharedView:
    """Return memory for the marks of more chunks than fit into the ledger of a pool."""
    segment = Segment.create()
    segment.reserve(len(grid))
    return SharedView(segment, 0, (len(grid),), (1,), np.dtype(np.uint8))

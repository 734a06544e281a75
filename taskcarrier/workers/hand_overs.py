"""How workers come to the rest of a run that the caller has begun itself.

The caller runs chunks, and its watcher waits (`taskcarrier.workers.caller_first`). One of the two
prepares the workers, and lets them begin as soon as they are ready. A worker that the caller counts
for begins only when the caller has left its chunk.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import replace
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from taskcarrier.scheduling.hand_over import MeasuredSeconds, MissedSeconds, Offer, estimate_saving
from taskcarrier.scheduling.ledger import NOT_BEGUN, Begun, Ledger
from taskcarrier.system.interrupts import Holder, Holders
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import ProcessExecutor, Tick
from taskcarrier.workers.pools import (
    has_processes,
    has_warm_processes,
    process_pool,
    thread_pool,
)
from taskcarrier.workers.records import RunResult, WorkerStats
from taskcarrier.workers.task import CompiledTask, Deliver, Job, Move
from taskcarrier.workers.threads import ThreadPool, ThreadRun

if TYPE_CHECKING:
    from taskcarrier.workers.pickling import Payload  # slow to import
    from taskcarrier.workers.processes.grid_run import GridRun  # slow to import
    from taskcarrier.workers.processes.pool import ProcessPool  # likewise

# What hand-overs cost: the seconds from their first step to the end of the run in which the busiest
# worker was not in the function. For new processes, the seconds until they are ready, and those of
# them that the caller spends on imports. First guesses, of the machine where this was written (two
# cores). Threads are woken. Processes unpickle the job, open its memory, and report at the end. New
# processes come from an interpreter that has to start first.
_thread_seconds = MeasuredSeconds(0.0005)
_warm_seconds = MeasuredSeconds(0.003)
_cold_seconds = MeasuredSeconds(0.25)
_COLD_BUSY_SECONDS = 0.06
# What is left to do when the workers are ready.
_BEGIN_SECONDS = 0.0003
missed_seconds: dict[int, MissedSeconds] = {}
"""What processes would have saved in earlier calls, by the number of workers."""
# The hand-overs whose processes are getting ready, by the number of workers: while there is one, no
# other starts more processes.
_getting_ready: dict[int, Holders] = {}
# Seconds that a byte takes on its way to a worker process, and from there back to the caller.
_SENT_SECONDS = 0.25e-9
_RETURNED_SECONDS = 0.5e-9


def make_thread_offer(n_workers: int) -> Offer:
    """Return what it takes to wake threads."""
    return Offer(n_workers=n_workers, busy_seconds=_thread_seconds.seconds)


def make_process_offer(
    n_workers: int, *, is_slow: bool, item_nbytes: tuple[float, float] = (0.0, 0.0)
) -> Offer:
    """Return what it takes to engage processes; new ones, with `is_slow`.

    `item_nbytes` are the bytes of an item and of its result.
    """
    sent, returned = item_nbytes
    return Offer(
        n_workers=n_workers,
        busy_seconds=_COLD_BUSY_SECONDS if is_slow else _warm_seconds.seconds,
        wait_seconds=_cold_seconds.seconds if is_slow else 0.0,
        item_seconds=sent * _SENT_SECONDS + returned * _RETURNED_SECONDS,
    )


class HandOver(Protocol):
    """The hand-over of one run to workers.

    Attributes
    ----------
    choice : Choice
        Where the rest runs.
    joins_caller : bool
        Whether the caller goes on as worker 0 beside the others; else it stops.
    is_prepared : bool
        Whether the workers know the job.
    """

    choice: Choice
    joins_caller: bool
    is_prepared: bool

    def make_offer(self) -> Offer:
        """Return what it takes, as things are now."""

    @property
    def least_seconds(self) -> float:
        """Seconds below which nothing that is left is worth a hand-over."""

    def note_missed(self, n_items: int, n_chunks: int, item_seconds: float) -> bool:
        """Note that the caller has done so much that workers could have done; all of a call.

        Return whether workers would have saved time if they had been there.
        """

    @property
    def is_getting_ready(self) -> bool:
        """Whether workers know the job and are not ready yet."""

    def hurry(self) -> None:
        """Make `close`, in another thread, return soon."""

    @property
    def is_slow(self) -> bool:
        """Whether preparing the workers takes so long that the caller should not wait for it."""

    @property
    def runs_user_code(self) -> bool:
        """Whether preparing them may run code of the user's, because objects must be pickled."""

    def pack(self, first: int) -> None:
        """Pickle the job, if that is needed; raise an error if it cannot be sent to the workers.

        They will run chunks from `first` on at the earliest.
        """

    def prepare(self, first: int) -> None:
        """Make the job known to the workers, and pickle it first if that is still to be done."""

    def is_ready(self, seconds: float) -> bool:
        """Return whether the workers can begin at once; wait for that at most `seconds`."""

    def begin(self, begun: Begun, *, is_caller_busy: bool) -> None:
        """Let workers go on from ``begun.first``; the caller may still be in the chunk before."""

    def attend(self) -> None:
        """Watch over the workers while the caller is in its chunk, until `recall` is called."""

    def recall(self) -> None:
        """End `attend`, if it goes on in another thread, and raise what it has raised."""

    def halt(self) -> None:
        """Make the workers stop at their next chunk."""

    def finish(self, caller: WorkerStats, own: Ledger, tick: Tick | None) -> RunResult:
        """Run what is left to its end, when the caller has ended its part."""

    def close(self) -> None:
        """End the run if it goes on, and give the workers back."""


class ThreadHandOver:
    """The hand-over of a run to threads; the caller is one of them, unless loops are compiled.

    Parameters
    ----------
    choice : Choice
        The number of workers.
    job : Job
        The run.
    deliver : callable
        Takes results that are not in place.
    ledger : Ledger
        The record of what the caller does.
    """

    is_prepared = True
    is_slow = False
    is_getting_ready = False
    runs_user_code = False
    _threads: ThreadPool
    _run: ThreadRun

    def __init__(self, choice: Choice, job: Job, deliver: Deliver, ledger: Ledger) -> None:
        self.choice = choice
        # Nothing could stop a compiled loop in the caller, which handles signals.
        self.joins_caller = not isinstance(job.task, CompiledTask)
        self._job = job
        self._deliver = deliver
        self._own_ledger = ledger
        self._ledger = ledger
        self._lease: AbstractContextManager[ThreadPool]
        self._context = copy_context()  # the watcher, which may start threads, has another
        self._numbers = range(0)
        self._is_begun = False
        self._begin_time = 0.0
        self._n_late = 0

    @property
    def least_seconds(self) -> float:
        """The seconds that it takes to wake threads."""
        return _thread_seconds.seconds

    def make_offer(self) -> Offer:
        """Return what it takes to wake the threads."""
        return make_thread_offer(self._job.n_workers)

    def pack(self, first: int) -> None:
        """Do nothing: threads know the job."""

    prepare = pack

    def is_ready(self, seconds: float) -> bool:  # noqa: ARG002  # there is nothing to wait for
        """Return that they are."""
        return True

    def begin(self, begun: Begun, *, is_caller_busy: bool) -> None:
        """Start the threads, but for one if the caller counts for it."""
        self._begin_time = perf_counter()
        job = replace(self._job, begun=begun)
        self._numbers = numbers = range(int(self.joins_caller), job.n_workers)
        if self.joins_caller:
            self._ledger.go_on(begun.first)
        else:
            self._ledger = Ledger.with_address(job.n_workers, begun)
            self._n_late = int(is_caller_busy)
        self._lease = thread_pool(self.choice.n_jobs)
        self._threads = self._lease.__enter__()
        self._run = self._threads.prepare(job, self._ledger, self._deliver, numbers)
        self._is_begun = True
        self._start(range(numbers.start, numbers.stop - self._n_late))

    def _start(self, numbers: range) -> None:
        """Start these threads, each in a copy of the caller's context."""
        self._context.run(self._run.start, numbers)

    def attend(self) -> None:
        """Do nothing: threads look after themselves."""

    recall = attend

    def halt(self) -> None:
        """Make the threads stop at their next chunk."""
        self._ledger.halt()

    def note_missed(self, n_items: int, n_chunks: int, item_seconds: float) -> bool:  # noqa: ARG002  # as in processes
        """Do nothing: threads are there at once."""
        return False

    def hurry(self) -> None:
        """Do nothing: `close` does not wait for long."""

    def list_threads(self) -> list[threading.Thread]:
        """Return the threads of the run, but for the caller's."""
        return self._threads.list_threads(self._numbers)

    def take_back(self) -> list[WorkerStats]:
        """Wait until the threads have ended, which find no more chunks; return their stats."""
        stats = self._run.wait(None)
        self.close()
        return stats

    def finish(self, caller: WorkerStats, own: Ledger, tick: Tick | None) -> RunResult:
        """Start the thread that the caller counted for, and wait until all have ended."""
        n_workers = self._job.n_workers
        self._start(range(n_workers - self._n_late, n_workers))
        stats = self._run.wait(tick)
        _learn(_thread_seconds, self._begin_time, stats)
        result = RunResult.read([caller, *stats], self._ledger, self._job.grid)
        result.first_proposal = result.first_proposal or own.first_proposal()
        return result

    def close(self) -> None:
        """Halt the threads that have not ended, and give the others back."""
        if self._is_begun:
            self._run.__exit__()
            self._lease.__exit__(None, None, None)
            self._is_begun = False


def _learn(cost: MeasuredSeconds, begin_time: float, stats: Sequence[WorkerStats]) -> None:
    """Take into account what a hand-over has cost that began then, and has just ended."""
    busy_ns = max((each.busy_ns for each in stats), default=0)
    cost.add(perf_counter() - begin_time - busy_ns / 1e9)


class ProcessHandOver:
    """The hand-over of a run to worker processes.

    Parameters
    ----------
    choice : Choice
        The number of workers.
    job : Job
        The run.
    deliver : callable
        Takes results that are not in place.
    move : Move
        How the work gets to processes.

    Attributes
    ----------
    staging : Staging
        The copies that were made.
    notes : sequence of str
        Notes for the report.
    """

    joins_caller = False
    _run: GridRun

    def __init__(
        self,
        choice: Choice,
        job: Job,
        deliver: Deliver,
        move: Move,
    ) -> None:
        self.choice = choice
        self.staging = move.snapshot.staging
        self.notes: Sequence[str] = ()
        self.is_prepared = False
        self._job = job
        self._deliver = deliver
        self._move = move
        self._lease: AbstractContextManager[ProcessPool]
        self._begin_time = 0.0  # of the first step
        self._is_ready = False
        self._holder = Holder()  # among those that are getting ready
        self._is_attended = False
        self._ends: SimpleQueue[BaseException | None] = SimpleQueue()  # of `attend`
        self._errors: list[BaseException | None] = []  # likewise, taken by `recall`
        self._were_new = False  # whether processes had to be started
        self._packed: tuple[Job, Payload] | None = None
        self._begun = NOT_BEGUN
        self._chunk_of_caller: tuple[int, int] | None = None  # that it was in at the hand-over

    @property
    def least_seconds(self) -> float:
        """The seconds that it takes to engage processes that are there."""
        return _BEGIN_SECONDS if self.is_prepared else _warm_seconds.seconds

    def make_offer(self) -> Offer:
        """Return what it takes: less for processes that know the job, more for new ones.

        If earlier calls have missed them enough, new ones are started for these.
        """
        is_slow = not self.is_prepared and self.is_slow
        item_nbytes = self._move.count_item_bytes()
        offer = make_process_offer(
            self._job.n_workers, is_slow=is_slow and not self._are_missed, item_nbytes=item_nbytes
        )
        if is_slow and self._must_wait:
            return replace(offer, wait_seconds=math.inf)
        return replace(offer, busy_seconds=_BEGIN_SECONDS) if self.is_prepared else offer

    @property
    def is_slow(self) -> bool:
        """Whether processes must be started first."""
        return not has_warm_processes(self.choice.n_jobs)

    @property
    def _are_missed(self) -> bool:
        missed = missed_seconds.get(self.choice.n_jobs)
        return missed is not None and missed.are_enough(_cold_seconds.seconds)

    def note_missed(self, n_items: int, n_chunks: int, item_seconds: float) -> bool:
        """Note what processes would have saved; they are started when it is enough."""
        n_jobs = self.choice.n_jobs
        if self.is_prepared or has_warm_processes(n_jobs):
            return False
        item_nbytes = self._move.count_item_bytes()
        offer = make_process_offer(self._job.n_workers, is_slow=False, item_nbytes=item_nbytes)
        saving = estimate_saving(n_items, n_chunks, item_seconds, offer)
        if saving > 0 and not (self._must_wait or has_processes(n_jobs)):
            missed_seconds.setdefault(n_jobs, MissedSeconds()).add(saving)
        return saving > 0

    @property
    def is_getting_ready(self) -> bool:
        """Whether workers are still unpickling the job, and may start for it."""
        return self.is_prepared and not self._is_ready

    def hurry(self) -> None:
        """Have workers killed that are not ready yet."""
        self._run.hurry()

    @property
    def runs_user_code(self) -> bool:
        """Whether there are objects that are still to be pickled."""
        return self._packed is None and self._move.runs_user_code

    def pack(self, first: int) -> None:
        """Pickle the job."""
        missed_seconds.pop(self.choice.n_jobs, None)  # now is the time; again if this fails
        executor = ProcessExecutor(self.choice, self.staging)
        job = replace(self._job, task=self._move.make_task(first), move=None)
        self._packed = executor.pack(job, self._move.snapshot.get_pickler())
        self.notes = [*self._move.notes, *executor.notes]

    def prepare(self, first: int) -> None:
        """Have processes unpickle the job; new ones, if there are none."""
        self._begin_time = perf_counter()
        self._were_new = self.is_slow
        n_jobs = self.choice.n_jobs
        _getting_ready.setdefault(n_jobs, Holders()).add(self._holder)
        try:
            if self._packed is None:
                self.pack(first)
            assert self._packed is not None  # for the type checker
            self._lease = process_pool(n_jobs)
            self._run = self._lease.__enter__().prepare(*self._packed, self._deliver)
            self.is_prepared = True
        finally:
            if not self.is_prepared:
                self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Let other hand-overs start processes."""
        if holders := _getting_ready.get(self.choice.n_jobs):
            holders.discard(self._holder)

    @property
    def _must_wait(self) -> bool:
        """Whether processes are getting ready for another call, which may be over."""
        return not self.is_prepared and bool(_getting_ready.get(self.choice.n_jobs))

    def is_ready(self, seconds: float) -> bool:
        """Return whether all workers have unpickled the job."""
        was_ready, self._is_ready = self._is_ready, self._run.is_ready(seconds)
        if self._is_ready:
            self._stop_waiting()
        if self._were_new and self._is_ready and not was_ready:
            _cold_seconds.add(perf_counter() - self._begin_time)
        return self._is_ready

    def begin(self, begun: Begun, *, is_caller_busy: bool) -> None:
        """Move the results to shared memory, and let processes begin.

        One waits if the caller counts for it.
        """
        self._begun = begun
        first = begun.first - int(is_caller_busy)
        grid = self._job.grid
        if begun.proposal is not None:
            items = 0, grid.range_of(first - 1)[1]
            self._move.carry(items, begun.proposal, begun.proposal)
        if is_caller_busy:
            self._chunk_of_caller = grid.range_of(first)
        self._run.begin(begun, self._job.n_workers - int(is_caller_busy))
        self._is_attended = is_caller_busy
        self._move.begin()  # at last: if the results have no room, the caller goes on alone

    def attend(self) -> None:
        """Watch over the processes while the caller is in its chunk, until `recall` is called."""
        error: BaseException | None = None
        try:
            self._run.attend()
        except BaseException as raised:  # noqa: BLE001  # the caller raises it
            error = raised
        self._ends.put(error)

    def recall(self) -> None:
        """End `attend`, if it goes on in another thread, and raise what it has raised."""
        if self._is_attended:
            self._run.recall()
            # As in `CallerChunks._leave_chunk`: what is taken is not lost by an interrupt.
            if not self._errors:
                self._errors.extend(map(self._ends.get, (True,)))
            self._is_attended = False
            error = self._errors.pop()
            try:
                if error is not None:
                    raise error
            finally:
                del error

    def halt(self) -> None:
        """Make the processes stop at their next chunk."""
        self._run.halt()

    def finish(self, caller: WorkerStats, own: Ledger, tick: Tick | None) -> RunResult:
        """Move what the caller has done since, and run the rest to its end."""
        n_chunks = self._begun.first
        if caller.failure is not None and self._chunk_of_caller is not None:
            n_chunks -= 1  # it failed in its last chunk
        elif self._chunk_of_caller is not None:
            proposal = own.first_proposal()
            if proposal is not None:
                agreed = self._run.ledger.propose(proposal)
                self._move.carry(self._chunk_of_caller, proposal, agreed)
        n_items = own.n_items_done(self._job.n_workers)
        self._run.ledger.count_before(n_items - self._begun.n_items)
        result = self._run.run_to_end(tick, n_chunks)
        if not self._were_new:
            _learn(_warm_seconds, self._begin_time, result.worker_stats)
        result.worker_stats.insert(0, caller)
        return result

    def close(self) -> None:
        """End the run if it goes on; give the processes back."""
        if self.is_prepared:
            self.is_prepared = False
            try:
                self.recall()
                self._run.close()
                self._lease.__exit__(None, None, None)
            finally:
                self._stop_waiting()


def _forget() -> None:
    missed_seconds.clear()
    _getting_ready.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

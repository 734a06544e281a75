"""The executor that begins in the caller, and hands over the rest if that pays.

What the caller runs, and when it hands over, is decided in `taskcarrier.workers.caller_chunks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter

from taskcarrier.memory.staging import Staging
from taskcarrier.notes import get_text, warn_user
from taskcarrier.record import record
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers.caller_chunks import CallerChunks
from taskcarrier.workers.caller_first_stream import CallerFirstQueue
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import Tick
from taskcarrier.workers.hand_overs import (
    ProcessHandOver,
    ThreadHandOver,
)
from taskcarrier.workers.loop import make_local_sink, run_worker
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.serial import SerialQueue, make_caller_ledger
from taskcarrier.workers.stream_hand_over import StreamHandOver
from taskcarrier.workers.task import Deliver, Job, RunRange, Task, WorkerContext
from taskcarrier.workers.thread_limits import thread_limit
from taskcarrier.workers.thread_trial import ThreadTrial, TrialBalance
from taskcarrier.workers.watcher import Watcher


class CallerFirstExecutor:
    """Runs the first chunks in the caller, and the rest where it is done soonest.

    Parameters
    ----------
    choice : Choice
        Where the rest would run, and by how many workers.
    """

    balance = None
    runs_in_caller = False
    begins_in_caller = True

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._queue: CallerFirstQueue | None = None
        self.can_run_compiled = choice.backend == "threading"
        self.may_move = choice.backend == "loky"
        self.staging: Staging | None = None
        self._notes: Sequence[str] = ()
        self._others = choice

    @property
    def choice(self) -> Choice:
        """Where the rest ran or runs; before that is known, where it would."""
        if self._queue is None:
            return self._choice
        reason = self._queue.explain()
        if self._queue.runs_in_caller:
            return Choice("sequential", 1, reason)
        return replace(self._queue.choice, reason=reason)

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the report."""
        return self._notes if self._queue is None else self._queue.notes

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Run a job to its end."""
        ledger = make_caller_ledger(job, tick)
        chunks = self._make_chunks(job, deliver, ledger)
        here = replace(job, task=_Started(job.task), balance=chunks, move=None)
        # Noted before the run: exceptions of handlers that the function sets are its own errors.
        handlers = Handlers() if job.collect_errors or job.retry_policy.retry_on else None
        begin = perf_counter()
        try:
            with thread_limit.open(), Watcher.take() as chunks.watcher:
                caller = run_worker(here, ledger, 0, make_local_sink(deliver))
                caller.name = "caller"
                failure = None if caller.failure is None else caller.failure.error
                is_handed_over = chunks.end(failure)
                del failure, handlers
                hand_over = chunks.hand_over
                if is_handed_over:
                    result = hand_over.finish(caller, ledger, tick)
                    choice = hand_over.choice
                else:
                    result = RunResult.read([caller], ledger, job.grid)
                    choice = Choice("sequential", 1, "")
                    chunks.note_missed()
                result.worker_stats[1:1] = chunks.stats_of_trial
                result.item_seconds = chunks.item_seconds
                result.is_refused = chunks.error is not None
        finally:
            chunks.close()
        self._choice = replace(choice, reason=chunks.explain())
        if isinstance(hand_over, ProcessHandOver):
            self.staging, self._notes = hand_over.staging, hand_over.notes
        self._notes = [*self._notes, *chunks.advise(perf_counter() - begin)]
        if chunks.error is not None:
            self._warn(chunks.error)
        return result

    def _warn(self, error: BaseException) -> None:
        text = (
            "the rest could not be handed over to worker processes "
            f"({type(error).__name__}: {get_text(error)}), so the caller has finished it alone"
        )
        self._notes = [*self._notes, text]
        if any("could not pickle" in note for note in getattr(error, "__notes__", ())):
            text += (
                "; make the function, its arguments and the items picklable, or pass "
                "backend='threading'"
            )
        warn_user(text)

    def _make_chunks(self, job: Job, deliver: Deliver, ledger: Ledger) -> CallerChunks:
        choice = self._others
        if choice.backend == "threading":
            hand_over = ThreadHandOver(choice, job, deliver, ledger)
            return CallerChunks(job, ledger, hand_over, choice)
        assert job.move is not None  # for the type checker
        processes = ProcessHandOver(choice, job, deliver, job.move)
        trial = None
        if choice.may_use_threads and choice.gil_waits.is_fit_for_threads is not False:
            balance = TrialBalance(job.balance)
            threads = replace(choice, backend="threading")
            on_trial = ThreadHandOver(threads, replace(job, balance=balance), deliver, ledger)
            trial = ThreadTrial(on_trial, balance, choice.gil_waits, len(job.grid))
        return CallerChunks(job, ledger, processes, choice, trial)

    @contextmanager
    def stream(self, job: Job) -> Iterator[WorkQueue]:
        """Open a work queue whose batches the caller runs, until it pays to hand them over."""
        hand_over = StreamHandOver(self._others, job)
        with thread_limit.open(), CallerFirstQueue(SerialQueue(job), hand_over) as queue:
            self._queue = queue
            yield queue


@record
class _Started:
    """A task whose chunks are given to it one by one, even if it could claim them by itself."""

    task: Task

    def start(self, worker: WorkerContext) -> RunRange:
        return self.task.start(worker)

"""The executor that begins in the caller, and hands over the rest if that pays.

The caller runs the first chunks, in order, and measures what an item costs. After each chunk it
compares what is left with what workers would cost (`taskcarrier.scheduling.hand_over`). A watcher
does the same while the caller is in a chunk that takes long. So a short run never pays for workers,
and help never waits for the end of a long chunk.
The chunks are those of the grid in either case, and so is every bit of the result.

Who may do what. The caller and its watcher share two tokens, each in a list of its own. The thread
that pops a token has it; an exception from outside can lose one but never give it to both. With the
turn, one prepares the hand-over and asks whether workers are ready. With the chunk that the caller
is in, the watcher lets workers begin behind that chunk; if the caller takes it back first, workers
begin only after the caller's next decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from time import perf_counter

from taskcarrier.memory.staging import Staging
from taskcarrier.notes import get_text, warn_user
from taskcarrier.record import record
from taskcarrier.scheduling.hand_over import MARGIN, ItemCost, Offer, estimate_saving
from taskcarrier.scheduling.ledger import PENDING, Begun, Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Handlers, is_raised_by_handler
from taskcarrier.workers.caller_first_stream import CallerFirstQueue
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import Tick
from taskcarrier.workers.hand_overs import (
    HandOver,
    ProcessHandOver,
    StreamHandOver,
    ThreadHandOver,
)
from taskcarrier.workers.loop import make_local_sink, run_worker
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.serial import SerialQueue, make_caller_ledger
from taskcarrier.workers.task import Deliver, Job, RunRange, Task, WorkerContext
from taskcarrier.workers.thread_limits import thread_limit
from taskcarrier.workers.watcher import Watcher

# The caller waits this long for workers that were told the job; for longer, it goes on with chunks.
# Ten times what they take for a function that they know.
_READY_SECONDS = 0.002
# The watcher looks whether workers are ready in pieces of so many seconds.
_LOOK_SECONDS = 0.01
# ... and again after so many seconds if only the caller can prepare them.
_PATIENCE_SECONDS = 0.1


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
        return replace(self._others, reason=reason)

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the report."""
        return self._notes if self._queue is None else self._queue.notes

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Run a job to its end."""
        ledger = make_caller_ledger(job, tick)
        hand_over = self._make_hand_over(job, deliver, ledger)
        chunks = _CallerChunks(job, ledger, hand_over, self._others.alone_seconds)
        here = replace(job, task=_Started(job.task), balance=chunks, move=None)
        # Noted before the run: exceptions of handlers that the function sets are its own errors.
        handlers = Handlers() if job.collect_errors or job.retry_policy.retry_on else None
        try:
            with thread_limit.open(), Watcher.take() as chunks.watcher:
                caller = run_worker(here, ledger, 0, make_local_sink(deliver))
                caller.name = "caller"
                failure = None if caller.failure is None else caller.failure.error
                is_handed_over = chunks.end(failure)
                del failure, handlers
                if is_handed_over:
                    result = hand_over.finish(caller, ledger, tick)
                    choice = hand_over.choice
                else:
                    result = RunResult.read([caller], ledger, job.grid)
                    choice = Choice("sequential", 1, "")
        finally:
            chunks.close()
        self._choice = replace(choice, reason=chunks.explain())
        if isinstance(hand_over, ProcessHandOver):
            self.staging, self._notes = hand_over.staging, hand_over.notes
        if chunks.error is not None:
            self._warn(chunks.error)
        return result

    def _warn(self, error: BaseException) -> None:
        text = (
            "the rest could not be handed over to worker processes "
            f"({type(error).__name__}: {get_text(error)}), so the caller has run all of it alone"
        )
        self._notes = [*self._notes, text]
        if any("could not pickle" in note for note in getattr(error, "__notes__", ())):
            text += (
                "; make the function, its arguments and the items picklable, or pass "
                "backend='threading'"
            )
        warn_user(text)

    def _make_hand_over(self, job: Job, deliver: Deliver, ledger: Ledger) -> HandOver:
        if self._others.backend == "threading":
            return ThreadHandOver(self._others, job, deliver, ledger)
        assert job.move is not None  # for the type checker
        return ProcessHandOver(self._others, job, deliver, job.move)

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


class _CallerChunks:
    """The chunks that the caller runs: all from the first on, until the rest is handed over.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        The record of what the caller does.
    hand_over : HandOver
        How workers come to the rest.
    alone_seconds : float
        The seconds up to which the caller does the run alone.

    Attributes
    ----------
    watcher : Watcher
        The thread that looks after the chunk that the caller is in.
    error : BaseException or None
        Why the rest could not be handed over.
    """

    name = "caller first"
    watcher: Watcher

    def __init__(self, job: Job, ledger: Ledger, hand_over: HandOver, alone_seconds: float) -> None:
        self.error: BaseException | None = None
        self._job = job
        self._ledger = ledger
        self._hand_over = hand_over
        self._alone_seconds = alone_seconds
        self._cost = ItemCost()
        self._begin_time = 0.0  # of the chunk that the caller is in
        self._next_chunk = 0  # the first that the caller has not begun
        self._promise = 0, 0.0  # the items that were left at the last decision, and what it saves
        self._turn: list[None] = [None]
        self._chunk: list[int] = []
        self._is_in_chunk = False
        self._is_watched = False
        # What the watcher did with the chunk: True if workers go on behind it.
        self._outcomes: SimpleQueue[bool] = SimpleQueue()
        self._taken_back: list[int] = []
        self._answers: list[bool] = []
        self._is_begun = False
        self._is_wanted = False  # whether the watcher shall prepare the workers in any case
        self._is_over = False

    # In the calling thread

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:  # noqa: ARG002  # as the rules of `taskcarrier.scheduling.balance`
        """Return no chunks: they are claimed one by one."""
        return range(0)

    def chunks(
        self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int, first: int = 0
    ) -> Iterator[int]:
        """Yield chunks in ascending order; then the caller's part of the rest, if it has one."""
        marks, grid = ledger.marks, self._job.grid
        self._next_chunk = first
        for index in range(first, n_chunks):
            if ledger.is_halted:
                return
            self._next_chunk = next_chunk = index + 1
            if marks is not None and marks[index] != PENDING:
                continue
            ledger.hold(worker, index)
            self._begin_time = begin = perf_counter()
            self._is_in_chunk = True
            self._chunk.append(index)
            if not self._is_watched and next_chunk < n_chunks:
                self._is_watched = True
                self.watcher.watch(self._look, 2 * self._hand_over.least_seconds)
            yield index
            start, stop = grid.range_of(index)
            self._cost.add(stop - start, perf_counter() - begin)
            if self._leave_chunk() or self._hand_over_rest(next_chunk, n_chunks):
                break
        if self._is_begun and self._hand_over.joins_caller:
            balance = self._job.balance
            yield from balance.chunks(ledger, worker, n_workers, n_chunks, self._next_chunk)

    def _leave_chunk(self) -> bool:
        """Take the chunk back from the watcher; return whether workers go on behind it."""
        # What is taken is put into a list by the same call into C: an exception from outside that
        # comes just then does not make the next call of this wait for it.
        if not (self._taken_back or self._answers):
            try:
                self._taken_back.extend(map(self._chunk.pop, (-1,)))
            except IndexError:
                self._answers.extend(map(self._outcomes.get, (True,)))
        is_begun = any(self._answers)
        self._is_in_chunk = False
        self._taken_back.clear()
        self._answers.clear()
        return is_begun

    def _hand_over_rest(self, next_chunk: int, n_chunks: int) -> bool:
        """Hand over the rest if that pays and workers are ready; return whether it was."""
        if self.error is not None or next_chunk == n_chunks or not self._pays(next_chunk):
            return False
        try:
            self._turn.pop()
        except IndexError:  # the watcher is preparing the workers
            return False
        hand_over = self._hand_over
        try:
            if not hand_over.is_prepared:
                if hand_over.is_slow:
                    if hand_over.runs_user_code:
                        hand_over.pack(next_chunk)
                    self._is_wanted = True
                    self.watcher.watch(self._look, 0.0)
                    return False
                hand_over.prepare(next_chunk)
            if hand_over.is_ready(_READY_SECONDS):
                self._begin(next_chunk, is_caller_busy=False)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self.error = error
        finally:
            self._turn.append(None)
        return self._is_begun

    def _pays(self, next_chunk: int) -> bool:
        grid = self._job.grid
        n_items = grid.n_items - next_chunk * grid.chunksize
        left = n_items * self._cost.item_seconds
        if left * (1 - 1 / self._job.n_workers) < MARGIN * self._hand_over.least_seconds:
            return False  # so most short calls end before anybody looks for workers
        offer = self._hand_over.make_offer()
        return self._cost.is_believed(offer) and self._saves(
            next_chunk, self._cost.item_seconds, offer
        )

    def _saves(self, next_chunk: int, item_seconds: float, offer: Offer) -> bool:
        grid = self._job.grid
        n_items, n_chunks = grid.n_items - next_chunk * grid.chunksize, len(grid) - next_chunk
        saving = estimate_saving(n_items, n_chunks, item_seconds, offer)
        alone = self._cost.total_seconds + n_items * item_seconds
        if saving <= 0 or alone < self._alone_seconds:
            return False
        self._promise = n_items, saving
        return True

    def _begin(self, next_chunk: int, *, is_caller_busy: bool) -> None:
        """Let workers go on from `next_chunk`."""
        begun = Begun(next_chunk, self._ledger.n_items_of(0), self._ledger.first_proposal())
        self._hand_over.begin(begun, is_caller_busy=is_caller_busy)
        self._is_begun = True

    def end(self, failure: BaseException | None) -> bool:
        """End the caller's part; return whether to wait for workers.

        If the caller failed, for `failure`, they stop at their next chunk. If it was interrupted,
        they are not waited for.
        """
        if self._is_in_chunk:
            self._leave_chunk()  # so that none begins after the call has raised
        if self._is_begun:
            self._hand_over.recall()
        if failure is not None and is_interrupt(failure):
            return False
        if self._is_begun and failure is not None:
            self._hand_over.halt()
        return self._is_begun

    def close(self) -> None:
        """Give the workers back; if the watcher is just preparing them, it does so itself."""
        self._is_over = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        try:
            self._turn.pop()
        except IndexError:
            return
        self._hand_over.close()

    def explain(self) -> str:
        """Return the reason for where the rest ran, in words."""
        took = f"an item took {self._cost.item_seconds:.2g} s in the caller"
        if self._is_begun:
            (n_items, saving), choice = self._promise, self._hand_over.choice
            where = "processes" if choice.backend == "loky" else f"threads ({choice.reason})"
            return f"{took}: to hand over {n_items:,} items to {where} saves {saving:.2g} s"
        if self.error is not None:
            return f"{took}, but the rest could not be handed over"
        if self._alone_seconds:
            return f"{took}: workers saved nothing when they were tried"
        return f"{took}: workers would have saved nothing"

    # In the watcher's thread

    def _look(self) -> float | None:
        """Hand over what comes after the caller's chunk if that pays; return when to look again."""
        if self._is_settled():
            return None
        if not self._is_wanted and (seconds := self._find_seconds_to_wait()) > 0:
            return seconds
        try:
            self._turn.pop()
        except IndexError:
            return _LOOK_SECONDS
        try:
            return self._hand_over_behind_chunk()
        except BaseException as error:  # noqa: BLE001  # the caller tells the user
            self.error = error
            return None
        finally:
            self._turn.append(None)
            if self._is_over:
                self._close_if_idle()

    def _is_settled(self) -> bool:
        return self._is_over or self._is_begun or self.error is not None

    def _find_seconds_to_wait(self) -> float:
        """Return the seconds after which it may pay to hand over the rest; 0 if it does now."""
        try:
            index = self._chunk[-1]
        except IndexError:  # the caller is between two chunks
            return _LOOK_SECONDS
        offer = self._hand_over.make_offer()
        spent = perf_counter() - self._begin_time
        if spent < 2 * offer.busy_seconds:
            return 2 * offer.busy_seconds - spent
        start, stop = self._job.grid.range_of(index)
        item_seconds = max(spent / (stop - start), self._cost.item_seconds)
        if index + 1 < len(self._job.grid) and self._saves(index + 1, item_seconds, offer):
            return 0.0
        return max(spent / 2, offer.busy_seconds)

    def _hand_over_behind_chunk(self) -> float | None:
        if not self._hand_over.is_prepared:
            if self._hand_over.runs_user_code:
                return _PATIENCE_SECONDS  # until the caller does it
            self._hand_over.prepare(self._next_chunk)
        if not self._hand_over.is_ready(_LOOK_SECONDS):
            return 0.0
        if self._job.marks is not None and self._ledger.first_proposal() is None:
            # If the caller's first result were not like those of workers, the file in which both
            # write, and the marks that outlive the run, would be wrong.
            return _PATIENCE_SECONDS
        try:
            index = self._chunk.pop()
        except IndexError:  # the caller is between two chunks, and hands over the rest itself
            return _LOOK_SECONDS
        try:
            if index + 1 < len(self._job.grid):
                self._begin(index + 1, is_caller_busy=True)
        finally:
            self._outcomes.put(self._is_begun)
        if self._is_begun:
            self._hand_over.attend()
        return None


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception comes from outside, or is meant to end the program."""
    return not isinstance(error, Exception) or is_raised_by_handler(error)

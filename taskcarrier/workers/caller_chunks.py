"""The chunks that the caller runs itself, before it hands over the rest.

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

import math
from collections.abc import Iterator
from queue import SimpleQueue
from time import perf_counter

from taskcarrier.scheduling.gil import SAMPLE_SECONDS
from taskcarrier.scheduling.hand_over import MARGIN, ItemCost, Offer, estimate_saving
from taskcarrier.scheduling.ledger import PENDING, Begun, Ledger
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.system.quick_switches import quick_switches
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.hand_overs import (
    HandOver,
    make_thread_offer,
)
from taskcarrier.workers.late_closes import LateClose
from taskcarrier.workers.records import WorkerStats
from taskcarrier.workers.task import Job
from taskcarrier.workers.thread_trial import WINDOW_SECONDS, ThreadTrial
from taskcarrier.workers.watcher import Watcher

# The caller waits this long for workers that were told the job; for longer, it goes on with chunks.
# Ten times what they take for a function that they know.
_READY_SECONDS = 0.002
# The watcher looks whether workers are ready in pieces of so many seconds.
_LOOK_SECONDS = 0.01
# ... and again after so many seconds if only the caller can prepare them.
_PATIENCE_SECONDS = 0.1
# What threads must save before the report mentions them: this part of the call, and as much as a
# millisecond.
_SAVING_TO_TELL = 0.1
_SECONDS_TO_TELL = 0.001


class CallerChunks:
    """The chunks that the caller runs: all from the first on, until the rest is handed over.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        The record of what the caller does.
    hand_over : HandOver
        How workers come to the rest.
    choice : Choice
        What was decided before the run.
    trial : ThreadTrial, optional
        Threads that are tried before `hand_over`, if the function lets go of the interpreter's
        lock.

    Attributes
    ----------
    hand_over : HandOver
        How workers come to the rest, as far as that is decided.
    stats_of_trial : list of WorkerStats
        The stats of threads that were of no use.
    watcher : Watcher
        The thread that looks after the chunk that the caller is in.
    error : BaseException or None
        Why the rest could not be handed over.
    """

    name = "caller first"
    watcher: Watcher

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        hand_over: HandOver,
        choice: Choice,
        trial: ThreadTrial | None = None,
    ) -> None:
        self.error: BaseException | None = None
        self.hand_over = hand_over if trial is None else trial.hand_over
        self.stats_of_trial: list[WorkerStats] = []
        self._after_trial = hand_over
        self._trial = trial
        self._waits = choice.gil_waits
        self._may_use_threads = choice.may_use_threads
        self._is_decided = trial is None or self._waits.is_fit_for_threads is not None
        self._job = job
        self._ledger = ledger
        self._alone_seconds = choice.alone_seconds
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
        self._is_late = False  # whether the workers were not ready when the caller had done all
        self._are_missed = False  # whether workers would have saved time if they had been there

    # In the calling thread

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:  # noqa: ARG002  # as the rules of `taskcarrier.scheduling.balance`
        """Return no chunks: they are claimed one by one."""
        return range(0)

    def chunks(
        self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int, first: int = 0
    ) -> Iterator[int]:
        """Yield chunks in ascending order; then the caller's part of the rest, if it has one."""
        while True:
            yield from self._own_chunks(ledger, worker, first, n_chunks)
            if not (self._is_begun and self.hand_over.joins_caller):
                return
            balance = self._job.balance if self._trial is None else self._trial.balance
            yield from balance.chunks(ledger, worker, n_workers, n_chunks, self._next_chunk)
            left = None if self._trial is None else self._trial.take_back(ledger)
            if left is None:
                return
            first, stats = left
            self.stats_of_trial += stats
            self._is_begun = self._is_watched = False
            self._drop_trial()

    def _own_chunks(self, ledger: Ledger, worker: int, first: int, n_chunks: int) -> Iterator[int]:
        """Yield chunks in ascending order, until the rest is handed over."""
        marks, grid = ledger.marks, self._job.grid
        self._next_chunk = first
        if self._trial is not None:
            self._trial.note_begin()
        for index in range(first, n_chunks):
            if ledger.is_halted:
                return
            self._next_chunk = next_chunk = index + 1
            if marks is not None and marks[index] != PENDING:
                continue
            ledger.hold(worker, index)
            self._begin_time = perf_counter()
            self._is_in_chunk = True
            self._chunk.append(index)
            if not self._is_watched and next_chunk < n_chunks:
                self._is_watched = True
                self.watcher.watch(self._look, 2 * self.hand_over.least_seconds)
            begin = perf_counter()  # to wake the watcher is no part of the chunk
            yield index
            start, stop = grid.range_of(index)
            self._cost.add(stop - start, perf_counter() - begin)
            if self._leave_chunk() or self._hand_over_rest(next_chunk, n_chunks):
                break

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
        hand_over = self.hand_over
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
                if self._trial is not None:
                    self.watcher.watch(self._look, WINDOW_SECONDS)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self.error = error
        finally:
            self._turn.append(None)
        return self._is_begun

    def _pays(self, next_chunk: int) -> bool:
        if not self._is_decided:
            return False
        grid = self._job.grid
        n_items = grid.n_items - next_chunk * grid.chunksize
        left = n_items * self._cost.item_seconds
        if left * (1 - 1 / self._job.n_workers) < MARGIN * self.hand_over.least_seconds:
            return False  # so most short calls end before anybody looks for workers
        offer = self.hand_over.make_offer()
        return self._cost.is_believed(offer) and self._saves(
            next_chunk, self._cost.item_seconds, offer
        )

    def _count_left(self, next_chunk: int) -> tuple[int, int]:
        """Return how many items and chunks are left from this chunk on."""
        grid, marks = self._job.grid, self._ledger.marks
        n_items, n_chunks = grid.n_items - next_chunk * grid.chunksize, len(grid) - next_chunk
        if marks is not None:  # some were done by an earlier run
            n_chunks = bytes(marks[next_chunk:]).count(PENDING)
            n_items = min(n_items, n_chunks * grid.chunksize)
        return n_items, n_chunks

    def _saves(self, next_chunk: int, item_seconds: float, offer: Offer) -> bool:
        n_items, n_chunks = self._count_left(next_chunk)
        saving = estimate_saving(n_items, n_chunks, item_seconds, offer)
        alone = self._cost.total_seconds + n_items * item_seconds
        if saving <= 0 or alone < self._alone_seconds:
            return False
        self._promise = n_items, saving
        return True

    def _begin(self, next_chunk: int, *, is_caller_busy: bool) -> None:
        """Let workers go on from `next_chunk`."""
        n_items = self._ledger.n_items_done(self._job.n_workers)
        begun = Begun(next_chunk, n_items, self._ledger.first_proposal())
        self.hand_over.begin(begun, is_caller_busy=is_caller_busy)
        if self._trial is not None:
            self._trial.begin()
        self._is_begun = True

    def end(self, failure: BaseException | None) -> bool:
        """End the caller's part; return whether to wait for workers.

        If the caller failed, for `failure`, they stop at their next chunk. If it was interrupted,
        they are not waited for.
        """
        if self._is_in_chunk:
            self._leave_chunk()  # so that none begins after the call has raised
        if self._is_begun:
            self.hand_over.recall()
        if failure is not None and is_interrupt(failure):
            return False
        if self._is_begun and failure is not None:
            self.hand_over.halt()
        return self._is_begun

    def note_missed(self) -> None:
        """Note what workers would have saved if they had been there; the caller has done all."""
        grid, item_seconds = self._job.grid, self._cost.item_seconds
        if self.error is None and not self._alone_seconds and self._job.marks is None:
            n_items, n_chunks = grid.n_items - grid.chunksize, len(grid) - 1
            self._are_missed = self.hand_over.note_missed(n_items, n_chunks, item_seconds)

    def close(self) -> None:
        """Give the workers back: later, if they are still getting ready.

        If the watcher is just preparing them, it does so itself.
        """
        self._is_over = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        try:
            self._turn.pop()
        except IndexError:
            return
        if self.hand_over.is_getting_ready and not self._is_begun:
            self._is_late = True
            LateClose(self._close, self.hand_over.hurry).start()
        else:
            self._close()

    def _close(self) -> None:
        self.hand_over.close()
        self._after_trial.close()

    @property
    def item_seconds(self) -> float:
        """What an item took in the caller alone."""
        return self._cost.item_seconds

    def explain(self) -> str:
        """Return the reason for where the rest ran, in words."""
        took = f"an item took {self._cost.item_seconds:.2g} s in the caller"
        if self._may_use_threads and not self._waits.is_fit_for_threads:
            took += f"; {self._waits.describe()}"
        if self._is_begun:
            (n_items, saving), choice = self._promise, self.hand_over.choice
            where = "processes" if choice.backend == "loky" else f"threads, as {choice.reason}"
            # The forecast may be from a first chunk, which is often dear.
            most = n_items * self._cost.item_seconds * (1 - 1 / self._job.n_workers)
            return (
                f"{took}: {n_items:,} items were handed over to {where}; that was expected to save "
                f"{min(saving, most):.2g} s"
            )
        return took + self._explain_caller()

    def _explain_caller(self) -> str:
        """Return why the caller has done all."""
        if self.error is not None:
            return ", but the rest could not be handed over"
        if math.isinf(self._alone_seconds):
            return ": the rest of an earlier call could not be handed over"
        if self._alone_seconds:
            return ": workers saved nothing when they were tried"
        if self._is_late or self._is_wanted:
            return ": the caller had done all before the workers were ready"
        if self._are_missed:
            return ": workers would have saved time if they had been ready"
        return ": workers would have saved nothing"

    def advise(self, seconds: float) -> list[str]:
        """Return a note if threads would have saved much of the seconds that the call took."""
        n_workers, grid = self._job.n_workers, self._job.grid
        if self._may_use_threads or n_workers == 1 or not self._waits.is_worth_telling:
            return []
        alone = self._cost.item_seconds * grid.n_items
        # What was spent outside of the function, threads would not save.
        saving = min(seconds, alone) - alone / n_workers
        saving -= make_thread_offer(n_workers).busy_seconds
        if saving < max(_SECONDS_TO_TELL, _SAVING_TO_TELL * seconds):
            return []
        note = (
            f"{self._waits.describe()}: backend='threading' or 'auto' would save about "
            f"{saving:.1g} s, if several threads may call the function at once"
        )
        return [note]

    def _drop_trial(self) -> None:
        """Do without threads."""
        self.hand_over, self._trial = self._after_trial, None

    # In the watcher's thread

    def _look(self) -> float | None:
        """Do what is due while the caller is in a chunk; return when to look again."""
        if self._is_over or self.error is not None:
            return None
        if self._is_begun:
            return None if self._trial is None else self._trial.look(self._ledger)
        if self._chunk and self.watcher.gil_seconds is not None:
            self._waits.add(self.watcher.gil_seconds)
        return self._look_for_help() if self._decide() else SAMPLE_SECONDS

    def _look_for_help(self) -> float | None:
        """Hand over what comes after the caller's chunk if that pays; return when to look again."""
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

    def _decide(self) -> bool:
        """Decide between threads and processes, if that is still open; return whether it is not."""
        if not self._is_decided:
            is_fit = self._waits.is_fit_for_threads
            if is_fit is None:
                return False
            if not is_fit:
                self._drop_trial()
            self._is_decided = True
        return True

    def _find_seconds_to_wait(self) -> float:
        """Return the seconds after which it may pay to hand over the rest; 0 if it does now."""
        try:
            index = self._chunk[-1]
        except IndexError:  # the caller is between two chunks
            return _LOOK_SECONDS
        offer = self.hand_over.make_offer()
        spent = perf_counter() - self._begin_time
        if spent < 2 * offer.busy_seconds:
            return 2 * offer.busy_seconds - spent
        start, stop = self._job.grid.range_of(index)
        item_seconds = max(spent / (stop - start), self._cost.item_seconds)
        if index + 1 < len(self._job.grid) and self._saves(index + 1, item_seconds, offer):
            return 0.0
        return max(spent / 2, offer.busy_seconds)

    def _hand_over_behind_chunk(self) -> float | None:
        if not self.hand_over.is_prepared:
            if self.hand_over.runs_user_code:
                return _PATIENCE_SECONDS  # until the caller does it
            with quick_switches():
                self.hand_over.prepare(self._next_chunk)
        if not self.hand_over.is_ready(_LOOK_SECONDS):
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
            self.hand_over.attend()
        return None if self._trial is None else WINDOW_SECONDS


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception comes from outside, or is meant to end the program."""
    return not isinstance(error, Exception) or is_raised_by_handler(error)

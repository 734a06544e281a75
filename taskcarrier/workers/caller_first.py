"""The executor that begins in the caller, and hands over the rest if that pays.

The caller runs the first chunks, in order, and measures what an item costs. After each chunk it
compares what is left with what workers would cost (`taskcarrier.scheduling.hand_over`). So a short
run never pays for workers, and nobody has to know beforehand which run is short. The chunks are
those of the grid in either case, and so is every bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from taskcarrier.memory.staging import Staging
from taskcarrier.notes import get_text, warn_user
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.hand_over import ItemCost, Offer, estimate_saving
from taskcarrier.scheduling.ledger import PENDING, Begun, Ledger
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import Choice, load_processes
from taskcarrier.workers.executor import Executor, ProcessExecutor, ThreadExecutor, Tick
from taskcarrier.workers.pools import has_warm_processes
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.serial import SerialExecutor
from taskcarrier.workers.task import Deliver, Job, Move, RunRange, Task, WorkerContext

# Seconds until workers begin, on the machine where this was written: two cores. Threads are woken
# and take the lock of the interpreter in turns; processes unpickle the job and open its memory;
# new processes come from an interpreter that has to start first.
_THREADS_SECONDS = 0.0005
_WARM_SECONDS = 0.003
_COLD_SECONDS = 0.35
# Seconds that a byte takes on its way to a worker process, and from there back to the caller.
_SENT_SECONDS = 0.25e-9
_RETURNED_SECONDS = 0.5e-9


class CallerFirstExecutor:
    """Runs the first chunks in the caller, and the rest where it is done soonest.

    Parameters
    ----------
    choice : Choice
        Where the rest would run, and by how many workers.
    make_staging : callable
        Makes a place for copies, if worker processes need one.
    """

    balance = None
    runs_in_caller = False

    def __init__(self, choice: Choice, make_staging: Callable[[], Staging]) -> None:
        self.choice = choice
        self.can_run_compiled = choice.backend == "threading"
        self.staging: Staging | None = None
        self.notes: Sequence[str] = ()
        self._make_staging = make_staging
        self.may_move = choice.backend == "loky"
        self._others = choice

    def run(self, job: Job, deliver: Deliver, tick: Tick | None) -> RunResult:
        """Run a job to its end."""
        claims = _Claims(job.grid, partial(self._make_offer, job.move))
        self.choice = Choice("sequential", 1, "")
        here = replace(job, task=_Started(job.task), balance=claims)
        result = SerialExecutor(self.choice).run(here, deliver, tick)
        (caller,) = result.worker_stats
        if caller.failure is not None or claims.next_chunk == len(job.grid):
            self.choice = replace(self.choice, reason=claims.explain())
            return result
        begun = Begun(claims.next_chunk, caller.n_items, result.first_proposal)
        rest = replace(job, begun=begun, move=None)
        rest_result = self._run_rest(rest, job.move, deliver, tick)
        self.choice = replace(self.choice, reason=claims.explain())
        if rest_result.worker_stats and rest_result.worker_stats[0].name == caller.name:
            rest_result.worker_stats[0].add(caller)
        else:
            rest_result.worker_stats.insert(0, caller)
        return rest_result

    def _make_offer(self, move: Move | None) -> Offer:
        """Return what the workers would cost."""
        n_workers = self._others.n_jobs
        if self._others.backend == "threading":
            return Offer(n_workers=n_workers, engage_seconds=_THREADS_SECONDS)
        sent, returned = (0.0, 0.0) if move is None else move.count_item_bytes()
        return Offer(
            n_workers=n_workers,
            engage_seconds=_WARM_SECONDS if has_warm_processes(n_workers) else _COLD_SECONDS,
            item_seconds=sent * _SENT_SECONDS + returned * _RETURNED_SECONDS,
        )

    def _run_rest(
        self, job: Job, move: Move | None, deliver: Deliver, tick: Tick | None
    ) -> RunResult:
        """Run what is left; in the caller, if it cannot be sent to worker processes."""
        if self._others.backend == "threading":
            self.choice = self._others
            return ThreadExecutor(self.choice).run(job, deliver, tick)
        assert move is not None  # for the type checker
        self.staging = self._make_staging()
        executor = ProcessExecutor(self._others, self.staging)
        load_processes()
        try:
            moved = replace(job, task=move.move(self.staging, job.begun, deliver))
            moved, payload = executor.pack(moved)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self._warn_unpicklable(error)
            here = replace(job, balance=SerialExecutor.balance, n_workers=1)
            return SerialExecutor(self.choice).run(here, deliver, tick)
        self.choice, self.notes = self._others, executor.notes
        return executor.run_packed(moved, payload, deliver, tick)

    def _warn_unpicklable(self, error: Exception) -> None:
        text = (
            "the function or its arguments cannot be pickled for worker processes "
            f"({type(error).__name__}: {get_text(error)}), so the caller has run all of it alone"
        )
        self.notes = [text]
        warn_user(f"{text}; make them picklable, or pass backend='threading'")

    def stream(self, job: Job) -> AbstractContextManager[WorkQueue]:
        """Open a work queue on the workers: a stream is not begun in the caller."""
        others: Executor
        if self._others.backend == "threading":
            others = ThreadExecutor(self._others)
        else:
            others = ProcessExecutor(self._others, self._make_staging())
        return others.stream(job)


@dataclass(frozen=True, eq=False)
class _Started:
    """A task whose chunks are given to it one by one, even if it could claim them by itself."""

    task: Task

    def start(self, worker: WorkerContext) -> RunRange:
        return self.task.start(worker)


class _Claims:
    """The chunks that the caller runs: all from the first on, until it pays to hand over the rest.

    Parameters
    ----------
    grid : ChunkGrid
        The division of all items into chunks.
    make_offer : callable
        Returns what workers would cost now.

    Attributes
    ----------
    next_chunk : int
        The first chunk that the caller has not begun.
    """

    name = "caller first"

    def __init__(self, grid: ChunkGrid, make_offer: Callable[[], Offer]) -> None:
        self.next_chunk = 0
        self._grid = grid
        self._make_offer = make_offer
        self._cost = ItemCost()
        self._saving = 0.0
        self._items_left = 0

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:  # noqa: ARG002  # as the rules of `taskcarrier.scheduling.balance`
        """Return no chunks: they are claimed one by one."""
        return range(0)

    def chunks(
        self,
        ledger: Ledger,
        worker: int,
        n_workers: int,  # noqa: ARG002  # as above
        n_chunks: int,
        first: int = 0,
    ) -> Iterator[int]:
        """Yield chunks in ascending order until the rest is to be handed over."""
        marks, grid = ledger.marks, self._grid
        for index in range(first, n_chunks):
            if ledger.is_halted:
                return
            self.next_chunk = index + 1
            if marks is not None and marks[index] != PENDING:
                continue
            ledger.hold(worker, index)
            begin = perf_counter()
            yield index
            start, stop = grid.range_of(index)
            self._cost.add(stop - start, perf_counter() - begin)
            if self._pays_to_hand_over(grid.n_items - stop, n_chunks - index - 1):
                return

    def _pays_to_hand_over(self, n_items: int, n_chunks: int) -> bool:
        self._items_left = n_items
        if n_chunks == 0:
            return False
        offer = self._make_offer()
        if not self._cost.is_believed(offer):
            return False
        self._saving = estimate_saving(n_items, n_chunks, self._cost.item_seconds, offer)
        return self._saving > 0

    def explain(self) -> str:
        """Return the reason for where the rest ran, in words."""
        took = f"an item took {self._cost.item_seconds:.2g} s in the caller"
        if self._saving > 0:
            return f"{took}: to hand over {self._items_left:,} items saves {self._saving:.2g} s"
        return f"{took}: workers would have saved nothing"

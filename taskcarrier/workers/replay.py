"""The executor of a run that is over: the caller puts in place what worker processes returned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.partition import Partition
from taskcarrier.scheduling.retries import Attempt
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.loop import make_local_sink, run_worker
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.serial import SerialExecutor
from taskcarrier.workers.task import Deliver, Job


class ReplayExecutor(SerialExecutor):
    """Gives a task what its workers have returned already, and ends as their run did.

    Parameters
    ----------
    choice : Choice
        Where the ranges were run, under static balance.
    n_workers : int
        The number of workers that had a share.
    run_result : RunResult
        How that run ended.
    returned : dict of (int, object)
        What the function has returned, by the start of its range; likewise an attribute, in which
        the task looks for it (`taskcarrier.arrays.task.ArrayTask.returned`).
    """

    balance = None  # type: ignore[assignment]  # the user's, which only the report names
    runs_in_caller = False

    def __init__(
        self, choice: Choice, n_workers: int, run_result: RunResult, returned: dict[int, Any]
    ) -> None:
        super().__init__(choice)
        self._n_workers = n_workers
        self.returned = returned
        self._run_result = run_result

    def clear(self) -> None:
        """Forget what was returned."""
        self.returned.clear()

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:  # noqa: ARG002  # all is done
        """Put the results of each worker in place, as that worker would have done it."""
        result, grid = self._run_result, job.grid
        ledger = Ledger.local(job.n_workers)
        ends = sorted(
            {grid.n_items, *self.returned, *(start for start, _ in result.missing)}
            | {failure.start for failure in result.failures}
            | {stats.failure.start for stats in result.worker_stats if stats.failure is not None}
            | set(range(0, grid.n_items, grid.chunksize))
        )
        shares = Partition(self._n_workers, len(grid))
        last_stats = {stats.worker: stats for stats in result.worker_stats}
        for stats, share in zip(map(last_stats.get, range(len(shares))), shares, strict=True):
            if stats is None:
                continue
            first, last = share.start * grid.chunksize, share.stop * grid.chunksize
            attempts = [
                Attempt(start, stop)
                for start, stop in pairwise(ends)
                if start in self.returned and first <= start < last
            ]
            replayed = run_worker(
                job,
                ledger,
                stats.worker,
                make_local_sink(deliver),
                attempts,
                batch_source=lambda _: (),
            )
            stats.facts = replayed.facts
            if replayed.failure is not None:  # the worker would have gone no further
                stats.failure = replayed.failure
                ledger.resume()
        result.first_proposal = ledger.first_proposal()
        return result

"""Calls that are known to be short, and are asked to run in worker processes.

A call is known to be short if the last one with its function was, in worker processes too. Each
worker gets its share of the data with its order, and sends its results with its stats. All else is
a run as any other (`taskcarrier.workers.processes.grid_run`): deaths, interrupts, warnings. What is
unusual about its results goes the general way (`taskcarrier.workers.replay`); the function is not
called again for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from taskcarrier.report import Report, WorkerReport
from taskcarrier.run import find_folder, show_worker_warnings
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import get_balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import OWN_MARKS
from taskcarrier.short_calls import ShortSettings
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import (
    Choice,
    Facts,
    count_cores,
    count_workers,
    is_joblib_configured,
)
from taskcarrier.workers.introspect import is_jitted, is_numba_ufunc
from taskcarrier.workers.loop import is_in_worker
from taskcarrier.workers.pools import warm_process_pool
from taskcarrier.workers.records import RangeFailure, RunResult
from taskcarrier.workers.replay import ReplayExecutor
from taskcarrier.workers.task import Job, ShareTask

if TYPE_CHECKING:
    from taskcarrier.workers.pickling import Payload  # slow to import

MOST_NBYTES = 64 << 10
"""Larger data is not sent with orders; arbitrary."""
# A function that is known to keep workers busy for more seconds goes the general way, where dynamic
# balance shares out what is left; arbitrary.
_MOST_SECONDS = 0.02
# A worker gets a share if it has so many seconds of work: waking it takes about as long. Arbitrary,
# but for that (`python -m bench empty`).
_WAKE_SECONDS = 0.0001
_STATIC = get_balance("static")


def plan_workers(
    func: Any, grid: ChunkGrid, nbytes: int, n_jobs: int | None
) -> tuple[int, int] | None:
    """Return the number of workers of a call that is known to be short, and of those with a share.

    Return None if the call goes the general way.
    """
    is_small = nbytes <= MOST_NBYTES and len(grid) <= OWN_MARKS
    if not is_small or is_in_worker() or is_joblib_configured() or find_folder(None):
        return None  # the user's folder may be full or missing: the general way says so
    seconds = history.predict_busy(func, grid.n_items, nbytes)
    if seconds is None or seconds > _MOST_SECONDS or is_jitted(func) or is_numba_ufunc(func):
        return None
    if n_jobs is None or n_jobs < 0:
        n_jobs = count_workers(n_jobs, Facts(cores=count_cores()))
    if n_jobs == 1:
        return None
    most = min(n_jobs, len(grid))
    return n_jobs, max(1, most if not _WAKE_SECONDS else min(most, int(seconds / _WAKE_SECONDS)))


class ShortRun(NamedTuple):
    """A call that may be run as a short one.

    Attributes
    ----------
    func : callable
        The function, for its history.
    grid : ChunkGrid
        The chunks.
    nbytes : int
        The bytes of the data.
    n_jobs : int
        The number of workers asked for.
    n_workers : int
        The number of those that get a share of the chunks.
    settings : ShortSettings
        How to run. Of the balance nothing but its name is used: which worker takes which chunk
        decides nothing for a short call.
    started_ns : int
        When the call began.
    """

    func: Any
    grid: ChunkGrid
    nbytes: int
    n_jobs: int
    n_workers: int
    settings: ShortSettings
    started_ns: int

    def list_starts(self) -> list[int]:
        """Return the first item of each worker's share, and the number of items."""
        size = self.grid.chunksize
        length, longer = divmod(len(self.grid), self.n_workers)  # as a `Partition` cuts them
        starts = [(n * length + min(n, longer)) * size for n in range(self.n_workers)]
        return [*starts, self.grid.n_items]

    def run(
        self, task: ShareTask, shares: Sequence[bytes]
    ) -> tuple[RunResult, dict[int, Any]] | None:
        """Return how the run ended, and what was delivered; None if it goes the general way."""
        n_listed = min(self.n_jobs, len(self.grid))
        lease = warm_process_pool(self.n_jobs, n_listed)
        if lease is None:
            return None
        job = Job(task, _STATIC, self.grid, self.n_workers)
        delivered: dict[int, Any] = {}
        with lease as processes:
            payload = _pack(job, task, shares)
            if payload is None:
                return None
            try:
                result = processes.run_shares(job, payload, delivered.__setitem__, n_listed)
            except BaseException as error:
                history.forget_busy(self.func)
                self._report(RunResult([], None, is_halted=True), error)
                raise
        return result, delivered

    def is_complete(self, result: RunResult) -> bool:
        """Return whether nothing has failed, none has died, and all have run their shares."""
        stats = result.worker_stats
        return (
            not (result.failures or result.missing or result.deaths)
            and all(each.failure is None for each in stats)
            and sum([each.n_items for each in stats]) == self.grid.n_items
        )

    def unpickle(
        self, pickled: dict[int, bytes], name: str, result: RunResult, returned: dict[int, Any]
    ) -> None:
        """Add results of a worker, by the starts of their ranges, to those returned.

        For one that cannot be unpickled add a failure to `result`.
        """
        from taskcarrier.workers.processes.supervisor import unpickle_result  # noqa: PLC0415  # as above

        for start, packed in pickled.items():
            value, error = unpickle_result(packed, [])
            if error is None:
                returned[start] = value
            else:
                bounds = self.grid.range_of(start // self.grid.chunksize)
                result.failures.append(RangeFailure(bounds, error, name))

    def end(self, result: RunResult) -> None:
        """Report and remember a run that is complete, and show the warnings of its workers."""
        self._report(result)
        stats = result.worker_stats
        busy_seconds = sum(each.busy_ns for each in stats) / 1e9
        history.remember_busy(self.func, busy_seconds, self.grid.n_items, self.nbytes)
        if any(each.warnings for each in stats):
            show_worker_warnings(stats)

    def make_replay(self, result: RunResult, returned: dict[int, Any]) -> ReplayExecutor:
        """Return the executor by which the general way goes on."""
        result.nbytes_sent = self.nbytes
        choice = Choice("loky", self.n_jobs, "asked for")
        return ReplayExecutor(choice, self.n_workers, result, returned)

    def _report(self, result: RunResult, error: BaseException | None = None) -> None:
        notes = []
        if error is not None:
            notes = [f"ended by {type(error).__name__}; what its workers did is not counted"]
        rows = [
            (stats.name, stats.n_ranges, stats.n_items, stats.busy_ns / 1e9)
            for stats in result.worker_stats
        ]
        seconds = (monotonic_ns() - self.started_ns) / 1e9
        n_jobs = min(self.n_jobs, len(self.grid))
        how = self.grid, self.nbytes, n_jobs, self.settings.balance
        self.settings.keep_report(partial(_make_report, how, seconds, rows, notes))


def _pack(job: Job, task: ShareTask, shares: Sequence[bytes]) -> Payload | None:
    """Return what is sent to workers; None if the call goes the general way."""
    from taskcarrier.workers.processes.share_jobs import pack_share_job  # noqa: PLC0415  # loaded with the pool

    try:
        return pack_share_job(job, task, shares)
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        return None  # the general way raises it


def _make_report(
    how: tuple[ChunkGrid, int, int, str],
    seconds: float,
    rows: list[tuple[str, int, int, float]],
    notes: list[str],
) -> Report:
    grid, nbytes, n_jobs, balance = how
    return Report(
        backend="loky",
        reason="asked for",
        balance=balance,
        n_jobs=n_jobs,
        chunksize=grid.chunksize,
        ranges=len(grid),
        items=grid.n_items,
        bytes_copied=nbytes,
        seconds=seconds,
        workers=tuple(WorkerReport(*row, max(0.0, seconds - row[-1])) for row in rows),
        notes=tuple(notes),
    )

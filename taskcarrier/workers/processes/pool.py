"""Pools of worker processes.

Who owns what. A `ProcessPool` owns its workers, the fork server that starts them, the memory of
their ledger, the file whose position is the ledger's counter, and a descriptor of the parent's
memory. A worker has one socket of its own. The parent sends runs and descriptors; the worker sends
batches of results, and its stats. Workers share only the ledger, which has no lock; so the death of
a worker harms no other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
import time
from collections.abc import Callable
from multiprocessing import process as multiprocessing_process
from typing import TYPE_CHECKING

from taskcarrier.memory import parent_memory
from taskcarrier.notes import add_note
from taskcarrier.scheduling.counters import FileCounter, FileSetOnce
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger, ledger_nbytes
from taskcarrier.system.descriptors import Descriptor, keep_standard_free
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.shared_ledger import open_ledger
from taskcarrier.workers.processes.worker_process import WorkerProcess
from taskcarrier.workers.processes.worker_starter import ServerDiedError, WorkerStarter
from taskcarrier.workers.records import RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import make_worker_environment

if TYPE_CHECKING:
    from taskcarrier.workers.pickling import Payload
    from taskcarrier.workers.processes.grid_run import GridRun
    from taskcarrier.workers.processes.stream_run import StreamRun
    from taskcarrier.workers.processes.supervisor import Worker

# The seconds that an idle worker has for its exit hooks before it is killed.
_EXIT_SECONDS = 5.0


class ProcessPool:
    """Up to `n` worker processes that run jobs together.

    Parameters
    ----------
    n : int
        The number of workers.

    Attributes
    ----------
    lacks_workers : bool
        Whether a worker that was needed could not be started.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._starter = WorkerStarter(make_worker_environment())
        self._workers: dict[int, WorkerProcess] = {}
        self.lacks_workers = False
        self._is_closed = False
        self._workers_lock = threading.Lock()  # taken only in threads that are not interrupted
        self._fds: list[int] = []  # of the ledger's three files, and of the parent's memory
        self._memory: Descriptor | None = None
        try:
            with keep_standard_free():
                self._fds.append(os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC))
                os.ftruncate(self._fds[0], ledger_nbytes(n) + OWN_MARKS)
                self._fds.append(FileCounter.create())
                self._fds.append(FileSetOnce.create())
                self._ledger = open_ledger(*self._fds)
                memory = parent_memory.open_own_memory()
        except BaseException:
            self._close_files()
            raise
        self._memory = memory
        if memory is not None:
            self._fds.append(memory.fileno())

    @property
    def is_warm(self) -> bool:
        """Whether all workers have been started."""
        return len(self._workers) == self._n

    def are_ready(self, n: int) -> bool:
        """Return whether the first `n` workers wait for a run, and no other is in an earlier one.

        Such a one would go on with that, and write to the ledger.
        """
        workers = self._workers
        if not all(worker.is_free for worker in workers.values()):
            return False
        poll = select.poll()
        for number in range(n):
            if number not in workers or workers[number].pidfd < 0:
                return False
            poll.register(workers[number].pidfd, select.POLLIN)
        return not poll.poll(0)

    def start_workers(self, n: int | None = None) -> None:
        """Start the first `n` workers, or all, if they do not run already."""
        for number in range(self._n if n is None else n):
            self._get_worker(number)

    def start_server(self) -> None:
        """Start the fork server, for a run that will need workers soon."""
        with self._workers_lock:
            if not self._is_closed:
                self._starter.prepare()

    def _get_worker(self, number: int) -> WorkerProcess:
        """Return a free worker: the one with this number, or a new one if that will not do."""
        worker = self._workers.get(number)
        if worker is None or not (worker.is_free and worker.is_alive):
            worker = run_sheltered(functools.partial(self._replace_worker, number, worker))
        return worker

    def _replace_worker(self, number: int, worker: WorkerProcess | None) -> WorkerProcess:
        """Start a worker in place of one that is dead or busy with an earlier run; return it.

        No asynchronous exception can come here, so a worker is never half started.
        """
        with self._workers_lock:
            # An interrupted call may have left its thread running here, so look at the pool again.
            if self._is_closed:
                raise RuntimeError("the pool has ended")
            if self._workers.get(number) is worker:
                if worker is not None:
                    self._end(number, worker)
                self._workers[number] = self._start_worker(number)
            return self._workers[number]

    def _start_worker(self, number: int) -> WorkerProcess:
        self.lacks_workers = False
        try:
            with contextlib.suppress(ServerDiedError):
                return WorkerProcess(number, self._starter, self._fds)
            return WorkerProcess(number, self._starter, self._fds)
        except (OSError, RuntimeError, MemoryError) as error:
            self.lacks_workers = True
            # A child of multiprocessing that is still importing the main module may start no
            # process; Python's error says so.
            if getattr(multiprocessing_process.current_process(), "_inheriting", False):
                raise
            n_living = sum(worker.pidfd >= 0 for worker in self._workers.values())
            add_note(
                error,
                f"only {n_living:,} of {self._n:,} worker processes could be started; pass a "
                "smaller n_jobs, or raise the limits (`ulimit -u`, `ulimit -n`, or the control "
                "group's)",
            )
            raise

    def _end(self, number: int, worker: WorkerProcess) -> None:
        worker.kill()
        worker.wait_and_reap()
        del self._workers[number]

    def _end_stuck_workers(self) -> None:
        """End workers that are still busy with an earlier run: they would write to the ledger."""
        stuck = [item for item in self._workers.copy().items() if not item[1].is_free]
        if stuck:
            run_sheltered(functools.partial(self._end_all, stuck))

    def _end_all(self, workers: list[tuple[int, WorkerProcess]]) -> None:
        with self._workers_lock:
            for number, worker in workers:
                # If this thread outlived an interrupted call, a new worker may have the number.
                if self._workers.get(number) is worker:
                    self._end(number, worker)

    def run(
        self,
        job: Job,
        payload: Payload,
        deliver: Deliver,
        tick: Callable[[Ledger], None] | None,
    ) -> RunResult:
        """Run a packed job to its end; return its result, with stats in the order of the workers.

        When interrupted, workers stop at their next chunk; those that do not reach it soon are
        killed.
        """
        run = self._make_run(job, payload, deliver)
        try:
            run.start_all()
            return run.run_to_end(tick)
        finally:
            run.close()

    def run_shares(self, job: Job, payload: Payload, deliver: Deliver, n_listed: int) -> RunResult:
        """Run a job with shares on workers that are ready (`are_ready`); else as `run`.

        Of the first `n_listed` workers, those without a share have stats too.
        """
        result = self._run_shares(job, payload, deliver)
        for number in range(job.n_workers, n_listed):
            result.worker_stats.append(WorkerStats(number, self._workers[number].name))
        return result

    def _run_shares(self, job: Job, payload: Payload, deliver: Deliver) -> RunResult:
        from taskcarrier.workers.processes.share_run import ShareRun  # noqa: PLC0415  # as below

        workers: dict[int, Worker] = {
            number: self._workers[number] for number in range(job.n_workers)
        }
        run = ShareRun(job, self._ledger, payload, workers)
        try:
            is_usual = run.run_usual()
        except BaseException:
            run.become_general(deliver, self._get_worker).close()
            raise
        if is_usual:
            stats = sorted(run.stats, key=lambda each: each.worker)
            return RunResult(stats, None, is_halted=False)
        general = run.become_general(deliver, self._get_worker)
        try:
            return general.run_to_end(None)
        finally:
            general.close()

    def prepare(self, job: Job, payload: Payload, deliver: Deliver) -> GridRun:
        """Let workers unpickle a job that the caller has begun itself; return the run.

        Its user begins it, and closes it in either case.
        """
        run = self._make_run(job, payload, deliver, begins_later=True)
        try:
            run.start_all()
        except BaseException:
            run.close()
            raise
        return run

    def _make_run(
        self, job: Job, payload: Payload, deliver: Deliver, *, begins_later: bool = False
    ) -> GridRun:
        from taskcarrier.workers.processes.grid_run import GridRun  # noqa: PLC0415  # after the server

        self._end_stuck_workers()
        # Before anything of the run: a worker may be missing and not start.
        self.start_workers(job.n_workers)
        return GridRun(
            job, self._ledger, deliver, payload, self._get_worker, begins_later=begins_later
        )

    def stream(self, job: Job, payload: Payload) -> StreamRun:
        """Return a queue whose workers wait for batches; it owns the pool until it is closed."""
        from taskcarrier.workers.processes.stream_run import StreamRun  # noqa: PLC0415  # as above

        self._end_stuck_workers()
        self._ledger.reset(job.n_workers)
        return StreamRun(job, self._ledger, payload, self._get_worker)

    def close(self, *, wait: bool = True) -> None:
        """End the workers: with `wait`, idle ones have time for exit hooks; others are killed."""
        with self._workers_lock:
            self._is_closed = True
        workers = [worker for worker in self._workers.values() if worker.pidfd >= 0]
        for worker in workers:
            worker.channel.close()
            if not wait or not worker.is_free:
                worker.kill()
        deadline = time.monotonic() + _EXIT_SECONDS
        for worker in workers:
            left = max(0.0, deadline - time.monotonic())
            if not is_readable(worker.pidfd, left):
                worker.kill()
            worker.wait_and_reap()
        self._starter.close()
        self._close_files()
        # Not when the last reference to the pool is gone: mapped memory keeps a descriptor open.
        del self._ledger

    def drop_after_fork(self) -> None:
        """Drop everything in a forked child: the workers belong to its parent."""
        for worker in self._workers.values():
            worker.drop_after_fork()
        self._workers = {}
        self._starter.drop_after_fork()
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds[:3]:
            os.close(fd)
        if self._memory is not None:
            self._memory.close()

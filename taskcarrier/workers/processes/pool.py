"""Pools of worker processes.

Who owns what. A `ProcessPool` owns its workers, the memory of their ledger, the file whose
position is the ledger's counter, and a descriptor of the parent's memory. A worker is a process
of joblib's loky context (started without fork) with one socket of its own. The parent sends runs
and descriptors; the worker sends batches of results, and its stats. Workers share only the ledger,
which has no lock; so the death of a worker harms no other.

How workers end. An idle worker ends by itself when its socket is closed. A busy one ends when the
parent is gone, however it went: each worker holds the reading end of a pipe whose only writer is
the parent, and has asked the kernel to be killed when that pipe closes (``O_ASYNC`` with
``F_SETSIG``; unlike ``PR_SET_PDEATHSIG`` this does not mistake the end of the thread that started
the worker for the end of the process).

How deaths are seen. By a descriptor of the process (`taskcarrier.workers.processes.exits`). The
socket would not do: a process that the worker forked can hold it open.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import process as multiprocessing_process
from multiprocessing.connection import Connection
from typing import Any

from joblib.externals.loky.backend import get_context

from taskcarrier.memory import parent_memory
from taskcarrier.notes import add_note
from taskcarrier.scheduling.counters import FileCounter, FileSetOnce
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger, ledger_nbytes
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.descriptors import Descriptor, keep_standard_free
from taskcarrier.system.interrupts import is_raised_by_handler, run_sheltered
from taskcarrier.workers.pickling import Payload
from taskcarrier.workers.processes.exits import ProcessExit, is_readable
from taskcarrier.workers.processes.grid_run import GridRun
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.stream_run import StreamRun
from taskcarrier.workers.processes.worker import (
    open_ledger,
    worker_main,
)
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import make_worker_environment
from taskcarrier.workers.threads import TICK

# The seconds that an idle worker has for its exit hooks before it is killed.
_EXIT_SECONDS = 5.0

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each chunk are faulted in again: over 256 MB,
# sqrt(c) * sin(c) spent 0.18 s of system time on that, more than on everything else. With these
# variables workers keep up to 32 MiB. Other allocators ignore them.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}


# One seed for all workers of this program: `hash` of a text must be the same in each, or results
# of a function that uses it depend on which worker runs which chunk.
_HASH_SEED = str(random.SystemRandom().randrange(1, 1 << 32))


def _own_environment() -> dict[str, str]:
    """Return variables for a worker alone, not for programs that the function starts.

    joblib makes a semaphore when it is imported, to see whether that works. A worker that is killed
    at that moment would leave it in /dev/shm, so the first variable turns this off.
    """
    environment = {"JOBLIB_MULTIPROCESSING": "0"}
    if os.environ.get("PYTHONHASHSEED", "random") in {"random", ""}:
        environment["PYTHONHASHSEED"] = _HASH_SEED
    return environment


class WorkerProcess:
    """A worker process, seen from the parent.

    It is made, and its descriptors are closed, only where no asynchronous exception can come.
    """

    is_free = True
    """Whether the worker waits for a run: it has sent its stats of the last one."""

    def __init__(self, number: int, environment: dict[str, str], fds: list[int]) -> None:
        if not os.access(sys.executable, os.X_OK, effective_ids=True):
            raise PermissionError(
                errno.EACCES,
                "worker processes cannot be started, for this user cannot run Python; pass "
                "backend='threading'",
                sys.executable,
            )
        own = _own_environment()
        self._reap_lock = threading.Lock()
        self._exitcode: int | None = None
        with keep_standard_free(), contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            our_end, their_end = socket.socketpair()
            self.channel = MessageSocket(our_end)
            ours.callback(self.channel.close)
            their_end.settimeout(None)  # as for the channel, or the worker's reads would not wait
            connection = theirs.enter_context(Connection(their_end.detach()))
            lifeline_end, self._lifeline = os.pipe()
            ours.callback(os.close, self._lifeline)
            lifeline = theirs.enter_context(Connection(lifeline_end, writable=False))
            self.process = get_context("loky").Process(
                target=worker_main,
                name=f"taskcarrier-{number}",
                args=(number, connection, lifeline, {name: os.environ.get(name) for name in own}),
                env=environment | own,
                daemon=False,
            )
            try:
                with _make_streams_flushable(), _block_interrupts():
                    self.process.start()
            except UnboundLocalError as error:  # loky raises this when it cannot open a pipe
                raise error.__context__ or error from None
            # This class handles the end of the process; multiprocessing would join it at exit.
            multiprocessing_process._children.discard(self.process)  # type: ignore[attr-defined]  # no public way
            self.pid: int = self.process.pid
            self.name = f"process {self.pid}"
            # If anything fails from here on, the process is killed and its descriptors are closed.
            after_join = ours.enter_context(contextlib.ExitStack())
            ours.callback(self.process.join)
            ours.callback(os.kill, self.pid, signal.SIGKILL)
            self._exit = ProcessExit(self.pid)
            after_join.callback(self._exit.close)
            self.channel.send(b"", fds)
            ours.pop_all()

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable once the process has ended; -1 if it was reaped."""
        return self._exit.fd

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended yet."""
        return self.pidfd >= 0 and not is_readable(self.pidfd)

    def kill(self) -> None:
        """Kill the process."""
        if self.pidfd < 0:
            return
        try:
            self._exit.kill()
        except PermissionError:
            # The program has changed its user since. The worker itself has asked the kernel to be
            # killed when this pipe is closed.
            self._close_lifeline()

    def _close_lifeline(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        with contextlib.suppress(OSError):  # closed before, by this class or by the program
            os.close(lifeline)

    def reap(self) -> int | None:
        """Close the descriptors of a process that has ended, and return its exit code."""
        return run_sheltered(self.wait_and_reap)

    def wait_and_reap(self) -> int | None:
        """Wait for the end of the process and reap it, in a thread that is not interrupted."""
        with self._reap_lock:
            if self.pidfd >= 0:
                self.process.join()
                self._exitcode = self.process.exitcode
                self.channel.close()
                self._exit.close()
                self._close_lifeline()
        return self._exitcode

    def drop_after_fork(self) -> None:
        """Close, in a forked child, the descriptors that it has of its parent's worker."""
        self.channel.close()
        self._exit.drop_after_fork()
        self._close_lifeline()


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
        # Variables that the user has set for the allocator stay.
        allocator = {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
        self._environment = make_worker_environment() | allocator
        self._n = n
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
            return WorkerProcess(number, self._environment, self._fds)
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
        self._end_stuck_workers()
        workers = [self._get_worker(number) for number in range(job.n_workers)]
        ledger = self._ledger
        ledger.reset(job.n_workers)
        ledger.set_marks(job.open_marks(), len(job.grid))
        if job.marks is None and ledger.marks is not None:
            ledger.marks[:] = bytes(len(job.grid))
        run = GridRun(job, ledger, deliver, payload, self._get_worker)
        # If the run is interrupted, a worker may write to the segments for a moment longer.
        for segment in payload.segments:
            segment.is_lent = True
        try:
            for number, worker in enumerate(workers):
                run.start(number, worker)
            while run.is_running():
                run.step(None if tick is None else TICK)
                if tick is not None:
                    tick(ledger)
            for segment in payload.segments:
                segment.is_lent = False
            return run.make_result()
        finally:
            run.close()
            ledger.marks = None

    def stream(self, job: Job, payload: Payload) -> StreamRun:
        """Return a queue whose workers wait for batches; it owns the pool until it is closed."""
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
        self._close_files()

    def drop_after_fork(self) -> None:
        """Drop everything in a forked child: the workers belong to its parent."""
        for worker in self._workers.values():
            worker.drop_after_fork()
        self._workers = {}
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds[:3]:
            os.close(fd)
        if self._memory is not None:
            self._memory.close()


@contextmanager
def _make_streams_flushable() -> Iterator[None]:
    """Replace stdout and stderr while they cannot be flushed, which loky does before each start.

    The program may have set them to None, a closed file or any other object.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream: Any = getattr(sys, name)
            try:
                stream.flush()
            except Exception as error:  # the program's object may raise anything
                if is_raised_by_handler(error):
                    raise
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, io.StringIO())
        yield


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT, so that a process started meanwhile ignores Ctrl-C until it unblocks it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

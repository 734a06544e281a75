"""Pools of worker processes.

Who owns what. A `ProcessPool` owns its workers, the memory of their ledger, the file whose
position is the ledger's counter, and a descriptor of the caller's memory. A worker is a process
of joblib's loky context (started without fork) with one socket of its own: runs and descriptors
go down, batches of results and the account come up. Nothing is shared between workers but the
ledger, which has no lock; so the death of one costs no other anything.

How they end. An idle worker whose socket is closed ends by itself. A busy one, when the
caller's process is gone however it went: each worker holds the reading end of a pipe whose
only writer is the caller, and has asked the kernel to be killed when that pipe closes
(``O_ASYNC`` with ``F_SETSIG``; unlike ``PR_SET_PDEATHSIG`` this does not mistake the end of
the thread that started the worker for the end of the process).

How deaths are seen. By the process's own descriptor (`taskcarrier.workers.processes.exits`): the end of
the socket can be held open by a process that the worker forked.
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
from taskcarrier.system.interrupts import is_of_the_program, run_sheltered
from taskcarrier.workers.pickling import Payload
from taskcarrier.workers.processes.exits import ProcessExit, is_readable
from taskcarrier.workers.processes.grid_run import ProcessRun
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.stream_run import ProcessQueue
from taskcarrier.workers.processes.worker import (
    ledger_over,
    worker_main,
)
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import inner_environment
from taskcarrier.workers.threads import TICK

# How long an idle worker has for its own exit hooks before it is killed.
_EXIT_SECONDS = 5.0

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each chunk are faulted in again: over 256 MB,
# sqrt(c) * sin(c) spent 0.18 s of system time on that, more than on everything else. Workers
# keep up to this much instead. Other allocators ignore the variables.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}


# One for all workers of this program: `hash` of a text must be the same in each of them, or a
# function that goes by it gives results that depend on who runs what.
_HASH_SEED = str(random.SystemRandom().randrange(1, 1 << 32))


def _own_environment() -> dict[str, str]:
    """Variables for a worker alone, and not for programs that the function starts.

    joblib makes a semaphore when it is imported, to see whether that works. A worker that is killed
    at that moment would leave it in /dev/shm, so the first variable turns this off.
    """
    environment = {"JOBLIB_MULTIPROCESSING": "0"}
    if os.environ.get("PYTHONHASHSEED", "random") in {"random", ""}:
        environment["PYTHONHASHSEED"] = _HASH_SEED
    return environment


class WorkerProcess:
    """A worker process as the caller sees it.

    It is made, and its descriptors are closed, where no exception comes from outside.
    """

    is_free = True
    """Whether it waits for a run: it has told what came of the last one."""

    def __init__(self, number: int, environment: dict[str, str], fds: list[int]) -> None:
        if not os.access(sys.executable, os.X_OK, effective_ids=True):
            raise PermissionError(
                errno.EACCES,
                "worker processes cannot be started, for this user cannot run Python; pass "
                "backend='threading'",
                sys.executable,
            )
        own = _own_environment()
        self._burying = threading.Lock()
        self._exitcode: int | None = None
        with keep_standard_free(), contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            our_end, their_end = socket.socketpair()
            self.channel = MessageSocket(our_end)
            ours.callback(self.channel.close)
            their_end.settimeout(None)  # likewise; here it is the end itself that would not wait
            down = theirs.enter_context(Connection(their_end.detach()))
            life_end, self._life = os.pipe()
            ours.callback(os.close, self._life)
            life = theirs.enter_context(Connection(life_end, writable=False))
            self.process = get_context("loky").Process(
                target=worker_main,
                name=f"taskcarrier-{number}",
                args=(number, down, life, {name: os.environ.get(name) for name in own}),
                env=environment | own,
                daemon=False,
            )
            try:
                with _flushable_streams(), _born_deaf():
                    self.process.start()
            except UnboundLocalError as error:  # how loky fails where it cannot open a pipe
                raise error.__context__ or error from None
            # Its end is ours to see to: multiprocessing would join it when the program exits.
            multiprocessing_process._children.discard(self.process)  # type: ignore[attr-defined]  # no public way
            self.pid: int = self.process.pid
            self.name = f"process {self.pid}"
            # If anything fails from here on, nothing is left of it.
            told = ours.enter_context(contextlib.ExitStack())
            ours.callback(self.process.join)
            ours.callback(os.kill, self.pid, signal.SIGKILL)
            self._ending = ProcessExit(self.pid)
            told.callback(self._ending.close)
            self.channel.send(b"", fds)
            ours.pop_all()

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable once it has ended; -1 if it was reaped."""
        return self._ending.fd

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.pidfd >= 0 and not is_readable(self.pidfd)

    def kill(self) -> None:
        """End it now."""
        if self.pidfd < 0:
            return
        try:
            self._ending.kill()
        except PermissionError:
            # The program has become another user since. The worker itself has asked the kernel to
            # be killed when this pipe is closed.
            self._close_life()

    def _close_life(self) -> None:
        life, self._life = self._life, -1
        with contextlib.suppress(OSError):  # it was, or the program closes what it likes
            os.close(life)

    def reap(self) -> int | None:
        """Exit code of a process that has ended; its descriptors are closed."""
        return run_sheltered(self.wait_and_reap)

    def wait_and_reap(self) -> int | None:
        """The same, in a thread that is not interrupted."""
        with self._burying:
            if self.pidfd >= 0:
                self.process.join()
                self._exitcode = self.process.exitcode
                self.forget(forked=False)
        return self._exitcode

    def forget(self, *, forked: bool = True) -> None:
        """Close this process's descriptors, without a word to the worker."""
        self.channel.close()
        self._ending.close(forked=forked)
        self._close_life()


class ProcessPool:
    """Up to `n` worker processes that run jobs together.

    Parameters
    ----------
    n : int
        The number of workers.

    Attributes
    ----------
    is_short : bool
        Whether one that was needed could not be started.
    """

    shares_memory = False

    def __init__(self, n: int) -> None:
        # What the user has set for the allocator stays.
        allocator = {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
        self._environment = inner_environment() | allocator
        self._n = n
        self._workers: dict[int, WorkerProcess] = {}
        self.is_short = False
        self._is_closed = False
        self._renewing = threading.Lock()  # only in threads that are not interrupted
        self._fds: list[int] = []  # of the ledger's three files, and of the caller's memory
        self._memory: Descriptor | None = None
        try:
            with keep_standard_free():
                self._fds.append(os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC))
                os.ftruncate(self._fds[0], ledger_nbytes(n) + OWN_MARKS)
                self._fds.append(FileCounter.create())
                self._fds.append(FileSetOnce.create())
                self._ledger = ledger_over(*self._fds)
                memory = parent_memory.open_own_memory()
        except BaseException:
            self._close_files()
            raise
        self._memory = memory
        if memory is not None:
            self._fds.append(memory.fileno())

    def _get_worker(self, number: int) -> WorkerProcess:
        """A worker that is free: the one there is, or a new one if none was needed yet."""
        worker = self._workers.get(number)
        if worker is None or not (worker.is_free and worker.alive):
            worker = run_sheltered(functools.partial(self._replace_worker, number, worker))
        return worker

    def _replace_worker(self, number: int, worker: WorkerProcess | None) -> WorkerProcess:
        """A new worker in place of one that is dead, or has something of an earlier run in hand.

        It is not started by half: here no exception comes from outside.
        """
        with self._renewing:
            # An earlier call that was interrupted may have left this going on.
            if self._is_closed:
                raise RuntimeError("the crew has ended")
            if self._workers.get(number) is worker:
                if worker is not None:
                    self._end(number, worker)
                self._workers[number] = self._new(number)
            return self._workers[number]

    def _new(self, number: int) -> WorkerProcess:
        self.is_short = False
        try:
            return WorkerProcess(number, self._environment, self._fds)
        except (OSError, RuntimeError, MemoryError) as error:
            self.is_short = True
            # A child of multiprocessing that is still importing the main module starts no process;
            # Python's error says so.
            if getattr(multiprocessing_process.current_process(), "_inheriting", False):
                raise
            n_living = sum(one.pidfd >= 0 for one in self._workers.values())
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
        """End workers that still have something of an earlier run in hand.

        They would write to the ledger.
        """
        stuck = [one for one in self._workers.copy().items() if not one[1].is_free]
        if stuck:
            run_sheltered(functools.partial(self._end_all, stuck))

    def _end_all(self, workers: list[tuple[int, WorkerProcess]]) -> None:
        with self._renewing:
            for number, worker in workers:
                # If this is left going on too, others are at work in their places by now.
                if self._workers.get(number) is worker:
                    self._end(number, worker)

    def run(
        self,
        job: Job,
        payload: Payload,
        deliver: Deliver,
        tick: Callable[[Ledger], None] | None,
    ) -> RunResult:
        """Run a packed job to its end; accounts in the order of the workers.

        When interrupted, workers stop at their next chunk, and those that do not come to it soon
        are killed.
        """
        self._end_stuck_workers()
        workers = [self._get_worker(number) for number in range(job.n_workers)]
        ledger = self._ledger
        ledger.reset(job.n_workers)
        ledger.set_marks(job.open_marks(), len(job.grid))
        if job.marks is None and ledger.marks is not None:
            ledger.marks[:] = bytes(len(job.grid))
        run = ProcessRun(job, ledger, deliver, payload, self._get_worker)
        # If the run is cut short, a worker may write to them for a moment longer.
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
            return run.ran()
        finally:
            if run.at_work:
                run.abort()
            if run.memory_kept:
                for segment in payload.segments:
                    segment.retire()
            ledger.marks = None

    def stream(self, job: Job, payload: Payload) -> ProcessQueue:
        """Have workers wait for blocks of items; the pool is its own until it is closed."""
        self._end_stuck_workers()
        self._ledger.reset(job.n_workers)
        return ProcessQueue(job, self._ledger, payload, self._get_worker)

    def close(self, *, wait: bool = True) -> None:
        """End the workers; who has something in hand is killed."""
        with self._renewing:
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

    def forget(self) -> None:
        """Drop everything in a forked child: the workers are its parent's."""
        for worker in self._workers.values():
            worker.forget()
        self._workers = {}
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds[:3]:
            os.close(fd)
        if self._memory is not None:
            self._memory.close()


@contextmanager
def _flushable_streams() -> Iterator[None]:
    """Loky flushes both before it starts a process; they may be None, closed, or anything else."""
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream: Any = getattr(sys, name)
            try:
                stream.flush()
            except Exception as error:  # whatever the program has put there
                if is_of_the_program(error):
                    raise
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, io.StringIO())
        yield


@contextmanager
def _born_deaf() -> Iterator[None]:
    """A process that is started meanwhile does not hear Ctrl-C until it says otherwise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

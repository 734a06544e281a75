"""Crews of worker processes.

Who owns what. A `ProcessCrew` owns its workers, the memory of their ledger, the file whose
position is the ledger's cursor, and a descriptor of the caller's memory. A worker is a process
of joblib's loky context (started without fork) with one socket of its own: runs and descriptors
go down, batches of results and the account come up. Nothing is shared between workers but the
ledger, which has no lock; so the death of one costs no other anything.

How they end. An idle worker whose socket is closed ends by itself. A busy one, when the
caller's process is gone however it went: each worker holds the reading end of a pipe whose
only writer is the caller, and has asked the kernel to be killed when that pipe closes
(``O_ASYNC`` with ``F_SETSIG``; unlike ``PR_SET_PDEATHSIG`` this does not mistake the end of
the thread that started the worker for the end of the process).

How deaths are seen. By the process's own descriptor (`taskcarrier.backends.endings`): the end of
the socket can be held open by a process that the worker forked.
"""

from __future__ import annotations

import contextlib
import errno
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

from taskcarrier import caller_memory
from taskcarrier.backends.endings import Ending, is_readable
from taskcarrier.backends.inner import inner_environment
from taskcarrier.backends.parcels import Channel, Parcel
from taskcarrier.backends.process_feeds import ProcessFeed
from taskcarrier.backends.process_runs import ProcessRun
from taskcarrier.backends.threads import TICK
from taskcarrier.backends.work import Deliver, Job, Ran
from taskcarrier.backends.worker_process import (
    ledger_over,
    worker_main,
)
from taskcarrier.contexts import contextmanager
from taskcarrier.descriptors import above_standard
from taskcarrier.interrupts import is_of_the_program
from taskcarrier.ledger import (
    OWN_MARKS,
    FileAgreement,
    FileCursor,
    Ledger,
    ledger_nbytes,
)
from taskcarrier.notes import add_note

# How long an idle worker has for its own exit hooks before it is killed.
_EXIT_SECONDS = 5.0

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each cell are faulted in anew: over 256 MB,
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
    """A worker process as the caller sees it."""

    def __init__(self, number: int, environment: dict[str, str], fds: list[int]) -> None:
        if not os.access(sys.executable, os.X_OK, effective_ids=True):
            raise PermissionError(
                errno.EACCES,
                "worker processes cannot be started, for this user cannot run Python; pass "
                "backend='threading'",
                sys.executable,
            )
        own = _own_environment()
        with above_standard, contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            our_end, their_end = socket.socketpair()
            self.channel = Channel(our_end)
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
                with _streams_that_can_be_flushed():
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
            self._ending = Ending(self.pid)
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
        return not is_readable(self.pidfd)

    def kill(self) -> None:
        """End it now."""
        try:
            self._ending.kill()
        except PermissionError:
            # The program has become another user since. The worker itself has asked the kernel to
            # be killed when this pipe is closed.
            self._close_life()

    def _close_life(self) -> None:
        with contextlib.suppress(OSError):  # it was, or the program closes what it likes
            os.close(self._life)
        self._life = -1

    def reap(self) -> int | None:
        """Exit code of a process that has ended; its descriptors are closed."""
        self.process.join()
        exitcode: int | None = self.process.exitcode
        self.forget(forked=False)
        return exitcode

    def forget(self, *, forked: bool = True) -> None:
        """Close this process's descriptors, without a word to the worker."""
        self.channel.close()
        self._ending.close(forked=forked)
        self._close_life()


class ProcessCrew:
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
        self._fds: list[int] = []
        try:
            with above_standard:
                self._fds.append(os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC))
                os.ftruncate(self._fds[0], ledger_nbytes(n) + OWN_MARKS)
                self._fds.append(FileCursor.create())
                self._fds.append(FileAgreement.create())
                self._ledger = ledger_over(*self._fds)
                memory_fd = caller_memory.opened()
        except BaseException:
            self._close_files()
            raise
        if memory_fd is not None:
            self._fds.append(memory_fd)

    def _living(self, number: int) -> WorkerProcess:
        """A worker: the one there is, or a new one if none was needed yet or it is dead."""
        worker = self._workers.get(number)
        if worker is not None and worker.pidfd >= 0 and not worker.alive:
            worker.reap()
        if worker is None or worker.pidfd < 0:
            try:
                with _interrupts_held():
                    worker = WorkerProcess(number, self._environment, self._fds)
                    self._workers[number] = worker
            except (OSError, RuntimeError, MemoryError) as error:
                self.is_short = True
                n_living = sum(one.pidfd >= 0 for one in self._workers.values())
                add_note(
                    error,
                    f"only {n_living:,} of {self._n:,} worker processes could be started; pass a "
                    "smaller n_jobs, or raise the limits (`ulimit -u`, `ulimit -n`, or the control "
                    "group's)",
                )
                raise
        return worker

    def run(
        self,
        job: Job,
        parcel: Parcel,
        deliver: Deliver,
        tick: Callable[[Ledger], None] | None,
    ) -> Ran:
        """Run a packed job to its end; accounts in the order of the workers.

        When interrupted, workers stop at their next cell, and those that do not come to it soon
        are killed.
        """
        workers = [self._living(number) for number in range(job.n_workers)]
        ledger = self._ledger
        ledger.reset(job.n_workers)
        ledger.mark_in(job.marks_here(), len(job.grid))
        if job.marks is None and ledger.marks is not None:
            ledger.marks[:] = bytes(len(job.grid))
        run = ProcessRun(job, ledger, deliver, parcel, self._living)
        try:
            for number, worker in enumerate(workers):
                run.start(number, worker)
            while run.goes_on():
                run.step(None if tick is None else TICK)
                if tick is not None:
                    tick(ledger)
            return run.ran()
        finally:
            if run.at_work:
                run.abort()
            if run.memory_kept:
                for segment in parcel.segments:
                    segment.retire()
            ledger.marks = None

    def feed(self, job: Job, parcel: Parcel) -> ProcessFeed:
        """Have workers wait for blocks of items; the crew is its own until it is closed."""
        self._ledger.reset(job.n_workers)
        return ProcessFeed(job, self._ledger, parcel, self._living)

    def close(self, *, wait: bool = True) -> None:
        """End the workers; they are idle."""
        workers = [worker for worker in self._workers.values() if worker.pidfd >= 0]
        for worker in workers:
            worker.channel.close()
            if not wait:
                worker.kill()
        deadline = time.monotonic() + _EXIT_SECONDS
        for worker in workers:
            left = max(0.0, deadline - time.monotonic())
            if not is_readable(worker.pidfd, left):
                worker.kill()
            worker.reap()
        self._close_files()

    def forget(self) -> None:
        """Drop everything in a forked child: the workers are its parent's."""
        for worker in self._workers.values():
            worker.forget()
        self._workers = {}
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds:
            os.close(fd)


@contextmanager
def _streams_that_can_be_flushed() -> Iterator[None]:
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
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is heard at the end: a worker started by half would wait for the rest until we end.

    Two holds are needed. A process started meanwhile is born with this thread's mask, and so is
    deaf until it says otherwise. But the mask does not keep a signal from other threads (a
    library's, say), and wherever it arrives, its handler runs in the main thread.
    """
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    swapped = callable(handler) and threading.current_thread() is threading.main_thread()
    if swapped:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if swapped:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)

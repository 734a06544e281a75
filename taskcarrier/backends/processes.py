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

How deaths are seen. By the process's own descriptor (`os.pidfd_open`): the end of the socket
can be held open by a process that the worker forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import process as multiprocessing_process
from multiprocessing.connection import Connection
from typing import Any

from joblib.externals.loky.backend import get_context

from taskcarrier import caller_memory, kept_mappings
from taskcarrier.backends.inner import inner_environment, serial_joblib
from taskcarrier.backends.parcels import (
    Channel,
    Parcel,
    pack_error,
    pack_items,
    unpack,
    unpack_error,
    unpack_items,
)
from taskcarrier.backends.threads import TICK
from taskcarrier.backends.work import (
    Account,
    Death,
    Deliver,
    Failure,
    Job,
    Ran,
    add_note,
    mark_worker_process,
    work,
)
from taskcarrier.ledger import FileAgreement, FileCursor, Ledger, ledger_nbytes

# Results that are not put in place travel in batches: when this many bytes or seconds have
# come together. Both are arbitrary within an order of magnitude.
_BATCH_NBYTES = 1 << 20
_BATCH_SECONDS = 0.02
# How long an interrupted run waits for a worker to finish its cell before it is killed.
_GRACE_SECONDS = 0.5
# How long an idle worker has for its own exit hooks before it is killed.
_EXIT_SECONDS = 5.0

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each cell are faulted in anew: over 256 MB,
# sqrt(c) * sin(c) spent 0.18 s of system time on that, more than on everything else. Workers
# keep up to this much instead. Other allocators ignore the variables.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}

_RESULTS, _ACCOUNT = b"R", b"A"
_KEPT, _FREE = b"K", b"F"


class _Worker:
    """A worker process as the caller sees it."""

    def __init__(self, number: int, environment: dict[str, str], fds: list[int]) -> None:
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            our_end, their_end = socket.socketpair()
            self.channel = Channel(our_end)
            ours.callback(self.channel.close)
            down = theirs.enter_context(Connection(their_end.detach()))
            life_end, self._life = os.pipe()
            ours.callback(os.close, self._life)
            life = theirs.enter_context(Connection(life_end, writable=False))
            self.process = get_context("loky").Process(
                target=_worker_main,
                name=f"taskcarrier-{number}",
                args=(number, down, life),
                env=environment,
                daemon=False,
            )
            try:
                with _interrupts_held():
                    self.process.start()
            except UnboundLocalError as error:  # how loky fails where it cannot open a pipe
                raise error.__context__ or error from None
            # Its end is ours to see to: multiprocessing would join it when the program exits.
            multiprocessing_process._children.discard(self.process)  # type: ignore[attr-defined]  # no public way
            # If anything fails from here on, the end of the pipe ends the process.
            self.pid: int = self.process.pid
            self.name = f"process {self.pid}"
            self.pidfd = os.pidfd_open(self.pid)
            ours.callback(os.close, self.pidfd)
            self.channel.send(b"", fds)
            ours.pop_all()

    @property
    def alive(self) -> bool:
        return not _is_readable(self.pidfd)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> int | None:
        """Exit code of a process that has ended; its descriptors are closed."""
        self.process.join()
        exitcode: int | None = self.process.exitcode
        self.forget()
        return exitcode

    def forget(self) -> None:
        """Close this process's descriptors, without a word to the worker."""
        self.channel.close()
        for fd in (self.pidfd, self._life):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.pidfd = self._life = -1


class ProcessCrew:
    """`n` worker processes that run jobs together.

    Parameters
    ----------
    n : int
        The number of workers.
    """

    shares_memory = False

    def __init__(self, n: int) -> None:
        # What the user has set for the allocator stays.
        allocator = {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
        self._environment = inner_environment() | allocator
        self._workers: dict[int, _Worker] = {}
        self._fds: list[int] = []
        try:
            self._fds.append(os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC))
            os.ftruncate(self._fds[0], ledger_nbytes(n))
            self._fds.append(FileCursor.create())
            self._fds.append(FileAgreement.create())
            self._ledger = _ledger_over(*self._fds)
            memory_fd = caller_memory.opened()
        except BaseException:
            self._close_files()
            raise
        if memory_fd is not None:
            self._fds.append(memory_fd)

    def _living(self, number: int) -> _Worker:
        """A worker: the one there is, or a new one if none was needed yet or it is dead."""
        worker = self._workers.get(number)
        if worker is not None and worker.pidfd >= 0 and not worker.alive:
            worker.reap()
        if worker is None or worker.pidfd < 0:
            worker = self._workers[number] = _Worker(number, self._environment, self._fds)
        return worker

    def run(
        self,
        job: Job,
        parcel: Parcel,
        deliver: Deliver,
        tick: Callable[[Ledger], None] | None,
    ) -> Ran:
        """Run a packed job to its end; accounts in the order of the workers.

        A worker that dies leaves its cells; the others work on. When interrupted, workers
        stop at their next cell, and those that do not come to it soon are killed.
        """
        workers = [self._living(number) for number in range(job.n_workers)]
        ledger = self._ledger
        ledger.reset(job.n_workers)
        run = _Run(ledger, deliver, parcel, self._living)
        try:
            for number, worker in enumerate(workers):
                run.start(number, worker)
            while run.at_work:
                run.step(None if tick is None else TICK)
                if tick is not None:
                    tick(ledger)
        finally:
            if run.at_work:
                run.abort()
            if run.memory_kept:
                for segment in parcel.segments:
                    segment.retire()
        deaths = [_death(number, run.died[number], job, ledger) for number in sorted(run.died)]
        accounts = [run.accounts[number] for number in sorted(run.accounts)]
        return Ran.read(accounts, deaths, ledger)

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
            if not _is_readable(worker.pidfd, left):
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


class _Run:
    """The caller's side of one run: who is at work, what has come back."""

    def __init__(
        self,
        ledger: Ledger,
        deliver: Deliver,
        parcel: Parcel,
        living: Callable[[int], _Worker],
    ) -> None:
        self._ledger = ledger
        self._deliver = deliver
        self._parcel = parcel
        self._living = living
        self._replaced: set[int] = set()
        self._poll = select.poll()
        self._by_fd: dict[int, tuple[int, _Worker]] = {}
        self.at_work: dict[int, _Worker] = {}
        self.accounts: dict[int, Account] = {}
        self.died: dict[int, tuple[_Worker, int | None]] = {}
        self._unreadable: dict[int, Failure] = {}
        self.memory_kept = False

    def start(self, number: int, worker: _Worker) -> None:
        self.at_work[number] = worker
        for fd in (worker.channel.fileno(), worker.pidfd):
            self._by_fd[fd] = (number, worker)
            self._poll.register(fd, select.POLLIN)
        # A worker that is just dying is seen by its descriptor.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(self._parcel.data, self._parcel.fds)

    def step(self, seconds: float | None) -> None:
        """Wait for something to happen, and take it in."""
        events = self._poll.poll(None if seconds is None else seconds * 1e3)
        ended = []
        for fd, _ in events:
            number, worker = self._by_fd[fd]
            if fd == worker.pidfd:
                ended.append((number, worker))
            elif not self._take_in(number, worker):
                # The stream has ended; the process's own descriptor tells the rest.
                self._poll.unregister(fd)
        for number, worker in ended:
            if number in self.at_work:
                self._take_in(number, worker)  # what it sent before it died
            if number in self.at_work:
                self._leave(number, worker)
                exitcode = worker.reap()
                if self._ledger.untouched(number) and number not in self._replaced:
                    # It was dying when the run began, and the function has seen nothing of it.
                    self._replaced.add(number)
                    self.start(number, self._living(number))
                else:
                    self.died[number] = (worker, exitcode)

    def abort(self) -> None:
        """Stop: workers at their next cell, or soon by force."""
        self._ledger.halt()
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            while self.at_work and (left := deadline - time.monotonic()) > 0:
                self.step(left)
        finally:
            for worker in self.at_work.values():
                worker.kill()
                worker.reap()
            self.at_work.clear()

    def _take_in(self, number: int, worker: _Worker) -> bool:
        messages, open_ = worker.channel.ready()
        for message in messages:
            if message[:1] == _RESULTS:
                for cell, packed in pickle.loads(message[1:]):
                    self._unpack_result(number, worker, cell, packed)
            else:
                account = _account_from(message[2:])
                self.memory_kept |= message[1:2] == _KEPT
                account.name = worker.name
                account.failure = self._unreadable.get(number, account.failure)
                self.accounts[number] = account
                self._leave(number, worker)
        return open_

    def _unpack_result(self, number: int, worker: _Worker, cell: int, packed: bytes) -> None:
        try:
            result = unpack_items(packed)
        except Exception as error:  # noqa: BLE001  # whatever a user's object raises
            add_note(error, "taskcarrier could not unpickle this result of a worker process")
            self._unreadable.setdefault(number, Failure(cell, error, worker.name))
            self._ledger.halt()
        else:
            self._deliver(cell, result)

    def _leave(self, number: int, worker: _Worker) -> None:
        del self.at_work[number]
        for fd in (worker.channel.fileno(), worker.pidfd):
            del self._by_fd[fd]
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)


def _ledger_over(words_fd: int, cursor_fd: int, agreement_fd: int) -> Ledger:
    words = memoryview(mmap.mmap(words_fd, 0)).cast("q")
    return Ledger(words, FileCursor(cursor_fd), FileAgreement(agreement_fd))


def _death(number: int, ended: tuple[_Worker, int | None], job: Job, ledger: Ledger) -> Death:
    worker, exitcode = ended
    n_cells = len(job.grid)
    cell = ledger.in_hand(number, job.n_workers, n_cells)
    done = -(-ledger.items_of(number) // job.grid.chunksize)
    planned = job.balance.planned(number, job.n_workers, n_cells)[done:]
    unstarted = planned[1:] if cell is not None else planned
    return Death(number, worker.name, exitcode, cell, unstarted)


def _is_readable(fd: int, seconds: float = 0) -> bool:
    """Whether there is something to read; not by `select`, which ends at descriptor 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """No Ctrl-C in this thread; a process started meanwhile is born without it too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The worker's side


def _worker_main(number: int, down: Connection, life: Connection) -> None:
    """A worker process, from its start to the end of its socket."""
    mark_worker_process()
    _die_with(life.fileno())
    # Ctrl-C reaches the whole terminal; what becomes of a run is the caller's decision. A
    # handler, not SIG_IGN, so that programs started by the user's function are not deaf to it.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    serial_joblib()
    kept_mappings.keep()
    channel = Channel(socket.socket(fileno=os.dup(down.fileno())))
    down.close()
    with contextlib.suppress(EOFError, ConnectionResetError):
        _, (words_fd, cursor_fd, agreement_fd, *memory_fd) = channel.receive()
        for fd in memory_fd:
            caller_memory.attach(fd)
        ledger = _ledger_over(words_fd, cursor_fd, agreement_fd)
        os.close(words_fd)
        while True:
            data, fds = channel.receive()
            _run_parcel(number, channel, ledger, data, fds)
            del data
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # a closed or full terminal is not ours
                    stream.flush()


def _die_with(life: int) -> None:
    """Have the kernel kill this process when the other end of the pipe is closed."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if _is_readable(life):  # it was closed before we asked
        os._exit(1)


def _run_parcel(number: int, channel: Channel, ledger: Ledger, data: bytes, fds: list[int]) -> None:
    outbox = _Outbox(channel)
    try:
        job = unpack(data, fds)
    except BaseException as error:  # noqa: BLE001  # the caller raises it
        ledger.halt()
        add_note(error, "while a worker process unpickled the function or its arguments")
        account = Account(number, failure=Failure(-1, error))
    else:
        job.surroundings.take_on()
        account = work(job, ledger, number, outbox.deliver)
        del job
    outbox.flush()
    packed = _packed_account(account)
    # An exception's traceback refers to chunks, and to the account through the loop's frame.
    account.failure = None
    del account
    # What the function still holds on to must not be overwritten by a later call's data.
    channel.send(_ACCOUNT + (_KEPT if kept_mappings.anything_in_use() else _FREE) + packed)


class _Outbox:
    """Results on their way up, in batches."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._batch: list[tuple[int, bytes]] = []
        self._nbytes = 0
        self._since = 0.0

    def deliver(self, cell: int, result: Any) -> None:
        try:
            packed = pack_items(result)
        except Exception as error:
            add_note(error, "taskcarrier could not pickle the result for the caller")
            raise
        now = time.monotonic()
        if not self._batch:
            self._since = now
        self._batch.append((cell, packed))
        self._nbytes += len(packed)
        if self._nbytes >= _BATCH_NBYTES or now - self._since >= _BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._batch:
            self._channel.send(_RESULTS + pickle.dumps(self._batch, protocol=5))
            self._batch = []
            self._nbytes = 0


def _packed_account(account: Account) -> bytes:
    failure = account.failure
    packed_failure = None if failure is None else (failure.cell, pack_error(failure.error))
    numbers = (account.worker, account.ranges, account.items, account.busy_ns)
    return pickle.dumps((numbers, account.facts, packed_failure), protocol=5)


def _account_from(packed: bytes) -> Account:
    (worker, ranges, items, busy_ns), facts, packed_failure = pickle.loads(packed)
    failure = None
    if packed_failure is not None:
        cell, packed_error = packed_failure
        failure = Failure(cell, unpack_error(packed_error))
    return Account(worker, "", ranges, items, busy_ns, facts, failure)

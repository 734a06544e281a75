"""Starts worker processes: the fork server, seen from the parent.

A fork server keeps what it got when it was started: its user, its limits, the cores that it may
use, and the variables that Python, the C library and BLAS read when they start. If one of these has
changed in the parent since, the next worker gets a new fork server, so that it begins as any new
process of the parent would.

Where a sandbox gives no descriptors of processes, the end of a fork server's child cannot be seen.
There each worker is a fork server of its own that becomes the worker.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import process, resource_tracker, spawn
from multiprocessing import util as multiprocessing_util
from typing import Any, NamedTuple

from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.descriptors import Descriptor, keep_standard_free, list_open_standard
from taskcarrier.workers.processes.exits import ProcessExit, can_watch_any, is_readable
from taskcarrier.workers.processes.fork_server import (
    JOBLIB_SWITCH,
    Become,
    Fork,
    Reap,
    WorkerSetup,
)
from taskcarrier.workers.processes.messages import MessageSocket

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each chunk are faulted in again: over 256 MB,
# sqrt(c) * sin(c) spent 0.18 s of system time on that, more than on everything else. With these
# variables workers keep up to 32 MiB. Other allocators ignore them.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}

# One seed for all workers of this program: `hash` of a text must be the same in each, or results
# of a function that uses it depend on which worker runs which chunk.
_HASH_SEED = str(random.SystemRandom().randrange(1, 1 << 32))

# The beginnings of variables that are read once, when a process starts or a library is loaded.
_READ_AT_START = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "NPY_", "OMP_", "GOMP_", "KMP_"),
    *("MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "NUMEXPR_"),
)

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from taskcarrier.workers.processes.fork_server import fork_server_main; "
    "fork_server_main(int(sys.argv[1]))"
)

# The seconds that a fork server has to end, or to reap a worker. Either takes a millisecond.
_END_SECONDS = 5.0


class _Inheritance(NamedTuple):
    """What a process gets when it starts, and keeps."""

    environment: dict[str, str]
    ids: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    cores: frozenset[int]
    priority: int
    groups: tuple[int, int]
    umask: bytes | None

    @classmethod
    def read(cls, environment: dict[str, str]) -> _Inheritance:
        """Return what a process would get now, with these variables."""
        limits = (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
        return cls(
            {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)},
            (*os.getresuid(), *os.getresgid(), *os.getgroups()),
            tuple(map(resource.getrlimit, limits)),
            frozenset(os.sched_getaffinity(0)),
            os.getpriority(os.PRIO_PROCESS, 0),
            (os.getpgrp(), os.getsid(0)),
            _read_umask(),
        )


def _read_umask() -> bytes | None:
    """Return the mask of this process; None without /proc (`os.umask` reads it by changing it)."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        return next((line for line in file if line.startswith(b"Umask:")), None)
    return None


class StartedWorker(NamedTuple):
    """A worker process that was started."""

    pid: int
    exit: ProcessExit
    reap: Callable[[], int | None]
    """Reaps the process, which has ended; the result is its exit code, None if nobody knows it."""


class _ForkServer:
    """A fork server process, which forks one worker after the other.

    Parameters
    ----------
    environment : dict
        The environment variables of its workers.
    inherited : _Inheritance
        What it gets when it starts.
    """

    def __init__(self, environment: dict[str, str], inherited: _Inheritance) -> None:
        own = {JOBLIB_SWITCH: "0"}
        if environment.get("PYTHONHASHSEED", "random") in {"random", ""}:
            own["PYTHONHASHSEED"] = _HASH_SEED
        self.inherited = inherited
        self._lock = threading.Lock()  # only in threads that are not interrupted
        self._workers: set[int] = set()  # those that are not reaped
        self._is_retired = False
        with keep_standard_free(), contextlib.ExitStack() as stack:
            our_end, their_end = socket.socketpair()
            stack.enter_context(their_end)
            self._channel = MessageSocket(our_end)
            their_end.settimeout(None)  # or its reads would not wait
            with contextlib.ExitStack() as after_failure, block_interrupts():
                after_failure.callback(self._channel.close)
                self._process = subprocess.Popen(  # this Python, and no shell
                    [sys.executable, "-c", _PROGRAM, str(their_end.fileno()), *_list_path()],
                    env=environment | own,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[their_end.fileno()],
                )
                after_failure.pop_all()

    def fork(self, setup: WorkerSetup, fds: list[int]) -> StartedWorker:
        """Start a worker; raise `EOFError` if the fork server has died."""
        with self._lock:
            pid, [pidfd] = self._ask(Fork(setup), fds)
            self._workers.add(pid)
        reap = functools.partial(self._reap, pid)
        try:
            with keep_standard_free():
                return StartedWorker(pid, ProcessExit(pid, pidfd), reap)
        except BaseException:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
            reap()
            raise

    def become(self, setup: WorkerSetup, fds: list[int]) -> StartedWorker:
        """Make the fork server itself a worker; it takes no more requests."""
        self._channel.send(pickle.dumps(Become(setup)), fds)
        self._channel.close()
        pid = self._process.pid
        return StartedWorker(pid, ProcessExit(pid), self._process.wait)

    def _ask(
        self, request: Fork | Reap, fds: list[int], seconds: float | None = None
    ) -> tuple[Any, list[Descriptor]]:
        """Send a request and wait for the answer, at most for `seconds`; else it counts as dead."""
        try:
            self._channel.send(pickle.dumps(request), fds)
            if seconds is not None and not is_readable(self._channel.fileno(), seconds):
                raise EOFError
            data, descriptors = self._channel.receive()
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None
        answer = pickle.loads(data)
        if isinstance(answer, OSError):
            raise answer
        return answer, descriptors

    def _reap(self, pid: int) -> int | None:
        exitcode: int | None = None
        with self._lock:
            try:
                exitcode, _ = self._ask(Reap(pid), [], _END_SECONDS)
            except EOFError:
                self._kill()  # the system reaps its children
            self._workers.discard(pid)
            if self._is_retired and not self._workers:
                self._close()
        return exitcode

    def retire(self) -> None:
        """End the fork server as soon as all its workers are reaped."""
        with self._lock:
            self._is_retired = True
            if not self._workers:
                self._close()

    def _close(self) -> None:
        self._channel.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(PermissionError):  # the program has changed its user since
            self._process.kill()
            self._process.wait()

    def drop_after_fork(self) -> None:
        """Close the socket in a forked child; the fork server belongs to its parent."""
        self._channel.close()
        self._process.returncode = 0  # it is no child of this process


class WorkerStarter:
    """Starts the worker processes of a pool, and owns their fork server.

    It is used only in threads that are not interrupted, by one at a time.

    Parameters
    ----------
    environment : dict
        Variables for the workers alone.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        # Variables that the user has set for the allocator stay.
        allocator = {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()}
        self._environment = environment | allocator
        self._server: _ForkServer | None = None

    def start(self, number: int, fds: list[int]) -> StartedWorker:
        """Start a worker with these descriptors: of its socket, and of its lifeline."""
        check_python()
        environment = os.environ | self._environment
        setup, fds = _make_setup(number, environment, fds)
        if not can_watch_any():
            return _ForkServer(environment, _Inheritance.read(environment)).become(setup, fds)
        with contextlib.suppress(EOFError):  # it has died
            return self._renew_server(environment).fork(setup, fds)
        self.close()
        try:
            return self._renew_server(environment).fork(setup, fds)
        except EOFError:
            self.close()
            raise RuntimeError(
                "a new Python process could not import taskcarrier: standard error has its "
                "reason; pass backend='threading' to do without processes"
            ) from None

    def _renew_server(self, environment: dict[str, str]) -> _ForkServer:
        """Return a fork server that has what a new process would get: this one, or a new one."""
        inherited = _Inheritance.read(environment)
        if self._server is not None and self._server.inherited != inherited:
            self.close()
        if self._server is None:
            self._server = _ForkServer(environment, inherited)
        return self._server

    def close(self) -> None:
        """End the fork server as soon as its workers are reaped."""
        if self._server is not None:
            self._server.retire()
            self._server = None

    def drop_after_fork(self) -> None:
        """Drop the fork server in a forked child."""
        if self._server is not None:
            self._server.drop_after_fork()
            self._server = None


def check_python() -> None:
    """Raise an error if this user cannot run Python."""
    if not os.access(sys.executable, os.X_OK, effective_ids=True):
        raise PermissionError(
            errno.EACCES,
            "worker processes cannot be started, for this user cannot run Python; pass "
            "backend='threading'",
            sys.executable,
        )


def _make_setup(
    number: int, environment: dict[str, str], fds: list[int]
) -> tuple[WorkerSetup, list[int]]:
    """Return the setup of a worker, and all descriptors that it gets."""
    spawn._check_not_importing_main()  # type: ignore[attr-defined]  # for its error; no public way
    this = process.current_process()
    standard = list_open_standard()
    setup = WorkerSetup(
        number=number,
        name=f"taskcarrier-{number}",
        parent=(this.name, os.getpid()),
        environment=environment,
        preparation=_make_preparation(),
        standard=standard,
    )
    tracker_fd: Any = resource_tracker.getfd()
    return setup, [*fds, tracker_fd, *standard]


def _make_preparation() -> dict[str, Any]:
    """Return what `multiprocessing` tells a new process, for `multiprocessing.spawn.prepare`."""
    this: Any = process.current_process()
    data = {
        "log_to_stderr": multiprocessing_util._log_to_stderr,  # type: ignore[attr-defined]  # as `multiprocessing` does
        "authkey": bytes(this.authkey),
        "sys_path": _list_path(),
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]  # as above
    }
    with contextlib.suppress(FileNotFoundError):  # the folder was removed
        data["dir"] = os.getcwd()
    if multiprocessing_util._logger is not None:  # type: ignore[attr-defined]  # as above
        data["log_level"] = multiprocessing_util._logger.getEffectiveLevel()  # type: ignore[attr-defined]  # as above
    method = multiprocessing.get_start_method(allow_none=True)
    if method in {"fork", "forkserver", "spawn"}:  # libraries add their own, which workers lack
        data["start_method"] = method
    return data


def _list_path() -> list[str]:
    """Return ``sys.path``, with the folder in which the program was started spelled out."""
    start: str = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]  # as above
    return [path or start for path in sys.path]


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block SIGINT, so that a process started meanwhile ignores Ctrl-C until it unblocks it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

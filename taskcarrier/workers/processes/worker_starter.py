"""Starts worker processes: the fork server, seen from the parent.

A fork server keeps what it got when it was started: its user, its limits, the cores that it may
use, and the variables that Python, the C library and BLAS read when they start. If any of this has
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
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import process
from typing import Any, NamedTuple

from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.descriptors import Descriptor, keep_standard_free, list_open_standard
from taskcarrier.workers.processes.exits import ProcessExit, can_watch_any, is_readable
from taskcarrier.workers.processes.inheritance import Inheritance
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.requests import (
    JOBLIB_SWITCH,
    Become,
    End,
    Fork,
    Reap,
    WorkerSetup,
)

# glibc gives freed memory at the top of its heap back to the kernel as soon as it is twice the
# largest freed block, so the temporaries of each chunk are faulted in again: over 256 MB,
# sqrt(c) * sin(c) spent 0.18 s of system time on that, more than on everything else. With these
# variables workers keep up to 32 MiB. Other allocators ignore them.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}

# One seed for all workers of this program: `hash` of a text must be the same in each, or results
# of a function that uses it depend on which worker runs which chunk.
_HASH_SEED = str(int.from_bytes(os.urandom(4), "little") or 1)

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from taskcarrier.workers.processes.fork_server import fork_server_main; "
    "fork_server_main(int(sys.argv[1]))"
)

# The seconds that a fork server has to end, or to reap a worker. Either takes a millisecond, but
# the machine may be swapping.
_END_SECONDS = 20.0


class ServerDiedError(RuntimeError):
    """A fork server has ended before it has started a worker."""


class StartedWorker(NamedTuple):
    """A worker process that was started."""

    pid: int
    exit: ProcessExit
    reap: Callable[[], int | None]
    """Reaps the process, which has ended; returns its exit code, or None if it is not known."""


class _ForkServer:
    """A fork server process, which forks one worker after the other.

    Parameters
    ----------
    environment : dict
        The environment variables of its workers.
    inherited : Inheritance
        What it gets when it starts.

    Attributes
    ----------
    is_usable : bool
        Whether it takes requests.
    """

    def __init__(self, environment: dict[str, str], inherited: Inheritance) -> None:
        own = {JOBLIB_SWITCH: "0"}
        if environment.get("PYTHONHASHSEED", "random") in {"random", ""}:
            own["PYTHONHASHSEED"] = _HASH_SEED
        self.inherited = inherited
        self.is_usable = True
        self._lock = threading.Lock()  # only in threads that are not interrupted
        self._workers: set[int] = set()  # those that are not reaped
        self._is_retired = False
        with keep_standard_free(), contextlib.ExitStack() as stack:
            our_end, their_end = socket.socketpair()
            stack.enter_context(their_end)
            self._channel = MessageSocket(our_end)
            their_end.settimeout(None)  # or its reads would not wait
            with contextlib.ExitStack() as after_failure, _block_interrupts():
                after_failure.callback(self._channel.close)
                self._process = subprocess.Popen(  # this Python, and no shell
                    [sys.executable, "-c", _PROGRAM, str(their_end.fileno()), *_list_path()],
                    env=environment | own,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[their_end.fileno()],
                )
                after_failure.pop_all()

    def start_worker(self, setup: WorkerSetup, fds: list[int]) -> StartedWorker:
        """Start a worker; raise `EOFError` if the server has died, or must not be used again."""
        with self._lock:
            pid, descriptors = self._ask(Fork(setup), fds)
            if pid is None:
                return self.become_worker(setup, fds)
            self._workers.add(pid)
        reap = functools.partial(self._reap, pid)
        [pidfd] = descriptors
        try:
            with keep_standard_free():
                return StartedWorker(pid, ProcessExit(pid, pidfd), reap)
        except BaseException:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
            reap()
            raise

    def become_worker(self, setup: WorkerSetup, fds: list[int]) -> StartedWorker:
        """Make the server itself a worker."""
        try:
            self._channel.send(pickle.dumps(Become(setup)), fds)
            pid = self._process.pid
            started = StartedWorker(pid, ProcessExit(pid), self._process.wait)
        except BaseException:
            self._kill()
            raise
        self.is_usable = False
        self._channel.close()
        return started

    def _ask(
        self, request: Fork | Reap, fds: list[int], seconds: float | None = None
    ) -> tuple[Any, list[Descriptor]]:
        """Send a request and wait for the answer, at most for `seconds`.

        If none comes, or not all of it, the server is killed: the next answer would be a wrong one.
        """
        if not self.is_usable:
            raise EOFError
        try:
            self._channel.send(pickle.dumps(request), fds)
            if seconds is not None and not is_readable(self._channel.fileno(), seconds):
                raise EOFError  # noqa: TRY301  # handled below
            data, descriptors = self._channel.receive()
        except (BrokenPipeError, ConnectionResetError):
            self._kill()
            raise EOFError from None
        except BaseException:
            self._kill()
            raise
        answer = pickle.loads(data)
        if isinstance(answer, OSError):
            raise answer  # it is the answer
        return answer, descriptors

    def _reap(self, pid: int) -> int | None:
        with self._lock:
            try:
                answer, _ = self._ask(Reap(pid), [], _END_SECONDS)
                exitcode: int | None = answer
            except EOFError:
                exitcode = _reap_adopted(pid)
            self._workers.discard(pid)
            if self._is_retired and not self._workers:
                self._close()
        return exitcode

    def retire(self) -> None:
        """End the server as soon as all its workers are reaped."""
        with self._lock:
            self._is_retired = True
            if not self._workers:
                self._close()

    def _close(self) -> None:
        if self.is_usable:
            self.is_usable = False
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died
                self._channel.send(pickle.dumps(End()))
            self._channel.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()

    def _kill(self) -> None:
        self.is_usable = False
        self._channel.close()
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
        """Start a worker with these descriptors: of its socket, and of its lifeline.

        Raises `ServerDiedError` if the server has died. Then another attempt needs other
        descriptors: there may be a worker that has these.
        """
        _check_python()
        environment = os.environ | self._environment
        setup, fds = _make_setup(number, environment, fds)
        if not can_watch_any():
            return _ForkServer(environment, Inheritance.read(environment)).become_worker(setup, fds)
        try:
            return self._get_server(environment).start_worker(setup, fds)
        except EOFError:
            raise ServerDiedError(
                "the Python process that starts worker processes has ended; if it could not import "
                "taskcarrier, standard error has the reason; pass backend='threading' to do "
                "without processes"
            ) from None

    def prepare(self) -> None:
        """Start the fork server if possible, for workers that will be needed soon.

        If it cannot be started, `start` says why.
        """
        with contextlib.suppress(OSError, RuntimeError, MemoryError):
            _check_python()
            if can_watch_any() and not getattr(process.current_process(), "_inheriting", False):
                self._get_server(os.environ | self._environment)

    def _get_server(self, environment: dict[str, str]) -> _ForkServer:
        """Return a fork server that has what a new process of the parent would have."""
        inherited, server = Inheritance.read(environment), self._server
        if server is None or not server.is_usable or server.inherited != inherited:
            self.close()
            self._server = server = _ForkServer(environment, inherited)
        return server

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


def _reap_adopted(pid: int) -> int | None:
    """Reap a worker whose server is gone, if that has made it a child of this process.

    It does so if this process is the first one of a container, or a subreaper. Otherwise the
    system reaps the worker, and the exit code is lost.
    """
    with contextlib.suppress(ChildProcessError):
        found, status = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None
    return None


def _check_python() -> None:
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
    from multiprocessing import resource_tracker, spawn  # noqa: PLC0415  # after the server

    spawn._check_not_importing_main()  # type: ignore[attr-defined]  # for its error; no public way
    this: Any = process.current_process()
    standard = list_open_standard()
    setup = WorkerSetup(
        number=number,
        name=f"taskcarrier-{number}",
        identity=(*this._identity, number + 1),
        parent=(this.name, os.getpid()),
        environment=environment,
        preparation=_make_preparation(),
        standard=standard,
    )
    tracker_fd: Any = resource_tracker.getfd()
    return setup, [*fds, tracker_fd, *standard]


def _make_preparation() -> dict[str, Any]:
    """Return what `multiprocessing` tells a new process, for `multiprocessing.spawn.prepare`."""
    from multiprocessing import util  # noqa: PLC0415  # as above

    this: Any = process.current_process()
    data = {
        "log_to_stderr": util._log_to_stderr,  # type: ignore[attr-defined]  # as `multiprocessing` does
        "authkey": bytes(this.authkey),
        "sys_path": _list_path(),
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]  # as above
    }
    with contextlib.suppress(FileNotFoundError):  # the folder was removed
        data["dir"] = os.getcwd()
    if util._logger is not None:  # type: ignore[attr-defined]  # as above
        data["log_level"] = util._logger.getEffectiveLevel()  # type: ignore[attr-defined]  # as above
    method = multiprocessing.get_start_method(allow_none=True)
    if method in {"fork", "forkserver", "spawn"}:  # libraries add their own, which workers lack
        data["start_method"] = method
    return data


def _list_path() -> list[str]:
    """Return ``sys.path``, with the folder in which the program was started spelled out."""
    start: str = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]  # as above
    entries: list[Any] = sys.path
    return [path or start for path in entries if isinstance(path, str)]  # Python ignores others


@contextmanager
def _block_interrupts() -> Iterator[None]:
    """Block SIGINT, so that a process started meanwhile ignores Ctrl-C until it unblocks it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

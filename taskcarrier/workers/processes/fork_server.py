"""The fork server, from within: an interpreter that has imported all workers need, and forks them.

A fork takes a millisecond where a new interpreter takes some tenths of a second. It is safe here:
the server has one thread, and runs no code but this. What a new interpreter would take over from
the caller comes with each request: environment, ``sys.path``, folder, and standard descriptors.

What must not be imported here: numba, and whatever uses OpenMP, as their threads do not survive a
fork; and modules of the program, which may change.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import resource_tracker, spawn
from types import ModuleType
from typing import TYPE_CHECKING, Any

from taskcarrier.system.descriptors import STANDARD, Descriptor, keep_standard_free
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.requests import (
    JOBLIB_SWITCH,
    Become,
    End,
    Fork,
    Reap,
    WorkerSetup,
)

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

# What every order to a worker names, or workers use in every run. The first worker waits for it.
_NEEDED = (
    "threadpoolctl",
    "taskcarrier.arrays.task",
    "taskcarrier.lists.task",
    "taskcarrier.workers.processes.worker",
)
# What some orders name, or some functions use. It is imported when there is nothing else to do.
_OFTEN_NEEDED = (
    "numpy.random",
    "taskcarrier.arrays.mapping",
    "taskcarrier.arrays.reducing",
    "taskcarrier.estimators.verbs",
)
# The seconds without a request after which there is nothing else to do; arbitrary. The workers of a
# first map are often done before.
_IDLE_SECONDS = 0.5


def fork_server_main(fd: int) -> None:
    """Run the server, which takes its requests from this socket, until the socket's end.

    In a worker this raises `SystemExit`, as `multiprocessing` does at the end of a process.
    """
    child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or nothing could be reaped
    _import_needed()
    with keep_standard_free():
        channel = MessageSocket(socket.socket(fileno=fd))
    left = list(_OFTEN_NEEDED)
    request: Any = None
    while not isinstance(request, (Fork, Become)):
        if left and not channel.next_kind() and not is_readable(fd, _IDLE_SECONDS):
            importlib.import_module(left.pop(0))
            continue
        try:
            data, descriptors = channel.receive()
            request = _answer(channel, pickle.loads(data))
        except (EOFError, ConnectionResetError, BrokenPipeError):  # the parent is gone
            os._exit(0)
    channel.close()
    signal.signal(signal.SIGCHLD, child_handler)
    sys.exit(_run_worker(request.setup, descriptors))


def _import_needed() -> None:
    """Import what workers need, without the garbage collector, which would find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    for name in _NEEDED:
        importlib.import_module(name)
    if was_enabled:
        gc.enable()


def _answer(channel: MessageSocket, request: Any) -> Any:
    """Do what is asked; return the request in the worker that it has made, else None."""
    if isinstance(request, End):
        os._exit(0)  # nothing here is worth a hook
    if isinstance(request, Become):
        return request
    if isinstance(request, Reap):
        _, status = os.waitpid(request.pid, 0)
        channel.send(pickle.dumps(os.waitstatus_to_exitcode(status)))
        return None
    return request if _fork(channel) else None


def _fork(channel: MessageSocket) -> bool:
    """Fork a worker and answer the parent; return whether this is the worker."""
    if _has_other_threads():
        channel.send(pickle.dumps(None))
        return False
    gc.freeze()  # a garbage collection in a worker would copy the pages that it shares
    try:
        pid = os.fork()
        if pid == 0:
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    except OSError as error:
        channel.send(pickle.dumps(error))
    else:
        channel.send(pickle.dumps(pid), [pidfd])
        os.close(pidfd)
    return False


def _has_other_threads() -> bool:
    """Return whether a module that was imported, or ``sitecustomize``, has started a thread."""
    try:
        return len(os.listdir("/proc/self/task")) > 1
    except OSError:  # there is no /proc
        return threading.active_count() > 1


def _run_worker(setup: WorkerSetup, descriptors: list[Descriptor]) -> int:
    """Run a worker process to its end; return its exit code."""
    from taskcarrier.workers.processes.worker import worker_main  # noqa: PLC0415  # preloaded

    their_socket, lifeline, tracker, *standard = descriptors
    _set_streams(setup.standard, standard)
    _set_environment(setup.environment)
    spawn.prepare(setup.preparation)
    importlib.invalidate_caches()  # folders may have changed since they were read
    _seed_global_generators()
    sys.meta_path.insert(0, _JoblibFinder())
    with keep_standard_free():
        channel = MessageSocket(socket.socket(fileno=os.dup(their_socket.fileno())))
        own_tracker: Any = resource_tracker._resource_tracker  # as forkserver does
        own_tracker._fd = os.dup(tracker.fileno())
    this: Any = multiprocessing.Process(
        target=worker_main, name=setup.name, args=(setup.number, channel, lifeline)
    )
    # Otherwise these would be of this process, which has begun as another.
    this._identity = setup.identity
    this._parent_name, this._parent_pid = setup.parent
    # Duplicates of the program's own descriptors would keep its files and pipes open.
    del their_socket, tracker, standard
    descriptors.clear()
    exitcode: int = this._bootstrap(parent_sentinel=lifeline.fileno())  # as popen_fork does
    return exitcode


def _set_streams(fds: list[int], descriptors: Sequence[Descriptor]) -> None:
    """Make the standard streams those of the parent.

    Streams that ``sitecustomize`` has put in their place stay.
    """
    for fd, descriptor in zip(fds, descriptors, strict=True):
        os.dup2(descriptor.fileno(), fd)
    for fd in STANDARD:
        if fd not in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
    if 0 not in fds:
        sys.stdin = None  # as in a new process
    for fd, name in ((1, "stdout"), (2, "stderr")):
        before: Any = getattr(sys, f"__{name}__")
        stream = _open_stream(fd, name, before) if fd in fds else None
        if getattr(sys, name) is before:
            setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _open_stream(fd: int, name: str, before: Any) -> Any:
    """Return a stream as Python makes it for this descriptor when it starts."""
    stream: Any = open(  # noqa: SIM115  # for as long as the process lives
        fd,
        "w",
        buffering=1 if fd == STANDARD[-1] or os.isatty(fd) else -1,
        encoding=getattr(before, "encoding", None),
        errors=getattr(before, "errors", None),
        closefd=False,
    )
    stream.buffer.raw.name = f"<{name}>"
    stream.reconfigure(write_through=getattr(before, "write_through", False))  # after ``python -u``
    return stream


def _set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    time.tzset()


def _seed_global_generators() -> None:
    """Seed NumPy's global generator, as in a new process; `random` does so by itself."""
    if "numpy.random" in sys.modules:  # else it is seeded when it is imported
        import numpy as np  # noqa: PLC0415  # preloaded

        np.random.seed()  # noqa: NPY002  # it is the one that functions may use


class _JoblibFinder:  # what it derives from by rights takes 7 ms to import
    """Finds joblib with a loader that makes it serial."""

    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        """Return the spec of joblib as the other finders know it, with another loader."""
        if name != "joblib":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, *args)) is not None:
                loader: Any = _JoblibLoader(spec.loader)
                spec.loader = loader
                return spec
        return None


class _JoblibLoader:
    """Loads joblib by its own loader, without a semaphore, and makes it serial in this thread."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader makes."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        from taskcarrier.workers.thread_limits import make_joblib_serial  # noqa: PLC0415  # preloaded

        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        before = os.environ.get(JOBLIB_SWITCH)
        os.environ[JOBLIB_SWITCH] = "0"
        try:
            self._loader.exec_module(module)
        finally:
            if before is None:
                del os.environ[JOBLIB_SWITCH]
            else:
                os.environ[JOBLIB_SWITCH] = before
        make_joblib_serial()

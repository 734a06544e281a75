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
import importlib.abc
import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing import resource_tracker, spawn
from types import ModuleType
from typing import Any

from taskcarrier.system.descriptors import STANDARD, Descriptor, keep_standard_free
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.messages import MessageSocket

JOBLIB_SWITCH = "JOBLIB_MULTIPROCESSING"
"""The variable without which joblib, while it is imported, makes a semaphore to see whether that
works. A worker that is killed at that moment would leave it in /dev/shm."""

# What every order to a worker names, or the worker uses in every run.
_NEEDED = (
    "numpy.random",
    "threadpoolctl",
    "taskcarrier.arrays.task",
    "taskcarrier.lists.map",
    "taskcarrier.workers.processes.worker",
)
# What some orders name. It is imported when there is nothing else to do.
_OFTEN_NEEDED = (
    "taskcarrier.lists.imap",
    "taskcarrier.arrays.mapping",
    "taskcarrier.arrays.reducing",
    "taskcarrier.estimators.verbs",
)


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """How a worker process begins.

    Attributes
    ----------
    number : int
        The worker's number in its pool.
    name : str
        The name of its `multiprocessing.Process`.
    parent : (str, int)
        The name and the number of the process that it works for.
    environment : dict
        Its environment variables.
    preparation : dict
        The argument of `multiprocessing.spawn.prepare`.
    standard : list of int
        The standard descriptors that are open in the parent. Duplicates of them come with the
        setup, after those of the worker's socket, its lifeline and the parent's resource tracker.
    """

    number: int
    name: str
    parent: tuple[str, int]
    environment: dict[str, str]
    preparation: dict[str, Any]
    standard: list[int]


@dataclass(frozen=True)
class Fork:
    """A request to start a worker; the answer is its number and its descriptor, or an `OSError`."""

    setup: WorkerSetup


@dataclass(frozen=True)
class Become:
    """A request to become a worker, where the end of a grandchild cannot be seen; no answer."""

    setup: WorkerSetup


@dataclass(frozen=True)
class Reap:
    """A request to reap a worker that has ended; the answer is its exit code."""

    pid: int


def fork_server_main(fd: int) -> None:
    """Run the fork server, which takes its requests from this socket, until the socket's end.

    In a worker this raises `SystemExit`, as `multiprocessing` does at the end of a process.
    """
    for name in _NEEDED:
        importlib.import_module(name)
    with keep_standard_free():
        channel = MessageSocket(socket.socket(fileno=fd))
    for name in _OFTEN_NEEDED:
        while is_readable(fd):
            _serve(channel)
        importlib.import_module(name)
    while True:
        _serve(channel)


def _serve(channel: MessageSocket) -> None:
    """Wait for a request, and answer it; in a worker, do its work and exit."""
    try:
        data, descriptors = channel.receive()
    except (EOFError, ConnectionResetError):
        os._exit(0)  # nothing here is worth a hook
    request = pickle.loads(data)
    if isinstance(request, Reap):
        _, status = os.waitpid(request.pid, 0)
        channel.send(pickle.dumps(os.waitstatus_to_exitcode(status)))
    elif isinstance(request, Become) or _fork(channel):
        channel.close()
        sys.exit(_run_worker(request.setup, descriptors))


def _fork(channel: MessageSocket) -> bool:
    """Fork a worker and answer the parent; return whether this is the worker."""
    gc.freeze()  # a garbage collection in a worker would copy the pages that it shares
    try:
        pid = os.fork()
        if pid == 0:
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise
    except OSError as error:
        channel.send(pickle.dumps(error))
    else:
        channel.send(pickle.dumps(pid), [pidfd])
        os.close(pidfd)
    return False


def _run_worker(setup: WorkerSetup, descriptors: list[Descriptor]) -> int:
    """Run a worker process to its end; return its exit code."""
    from taskcarrier.workers.processes.worker import worker_main  # noqa: PLC0415  # preloaded

    their_socket, lifeline, tracker, *standard = descriptors
    _set_streams(setup.standard, standard)
    _set_environment(setup.environment)
    spawn.prepare(setup.preparation)
    importlib.invalidate_caches()  # folders may have changed since they were read
    _seed_global_generators()
    sys.meta_path.insert(0, _SerialJoblib())
    with keep_standard_free():
        channel = MessageSocket(socket.socket(fileno=os.dup(their_socket.fileno())))
        own_tracker: Any = resource_tracker._resource_tracker  # as forkserver does
        own_tracker._fd = os.dup(tracker.fileno())
    this: Any = multiprocessing.Process(
        target=worker_main, name=setup.name, args=(setup.number, channel, lifeline)
    )
    this._parent_name, this._parent_pid = setup.parent  # else it is this process
    # Duplicates of the program's own descriptors would keep its files and pipes open.
    del their_socket, tracker, standard
    descriptors.clear()
    exitcode: int = this._bootstrap(parent_sentinel=lifeline.fileno())  # as popen_fork does
    return exitcode


def _set_streams(fds: list[int], descriptors: Sequence[Descriptor]) -> None:
    """Make the standard streams those of the parent."""
    for fd, descriptor in zip(fds, descriptors, strict=True):
        os.dup2(descriptor.fileno(), fd)
    for fd in STANDARD:
        if fd not in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        before: Any = getattr(sys, f"__{name}__")
        stream = None
        if fd in fds:
            is_terminal = os.isatty(fd)
            stream = open(  # noqa: SIM115  # for as long as the process lives
                fd,
                "w",
                buffering=1 if is_terminal or fd == STANDARD[-1] else -1,
                encoding=getattr(before, "encoding", None),
                errors=getattr(before, "errors", None),
                closefd=False,
            )
            if getattr(before, "write_through", False):  # Python was told not to buffer
                stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    time.tzset()


def _seed_global_generators() -> None:
    """Seed NumPy's global generator, as in a new process; `random` does so by itself."""
    import numpy as np  # noqa: PLC0415  # preloaded

    np.random.seed()  # noqa: NPY002  # it is the one that functions may use


class _SerialJoblib(importlib.abc.MetaPathFinder):
    """Makes joblib serial, in this process, as soon as the function imports it."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Return the spec of joblib, with a loader that also makes it serial."""
        if name != "joblib":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_serial(module: ModuleType) -> None:
            from taskcarrier.workers.thread_limits import make_joblib_serial  # noqa: PLC0415  # preloaded

            before = os.environ.get(JOBLIB_SWITCH)
            os.environ[JOBLIB_SWITCH] = "0"
            try:
                load(module)
            finally:
                if before is None:
                    del os.environ[JOBLIB_SWITCH]
                else:
                    os.environ[JOBLIB_SWITCH] = before
            make_joblib_serial()

        loader.exec_module = load_serial
        return spec

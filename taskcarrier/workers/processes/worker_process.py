"""A worker process, seen from the parent.

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
import os
import socket
import threading

from taskcarrier.system.descriptors import keep_standard_free
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.workers.processes.exits import is_readable
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.worker_starter import WorkerStarter


class WorkerProcess:
    """A worker process, seen from the parent.

    It is made, and its descriptors are closed, only where no asynchronous exception can come.
    """

    is_free = True
    """Whether the worker waits for a run: it has sent its stats of the last one."""

    def __init__(self, number: int, starter: WorkerStarter, fds: list[int]) -> None:
        self._reap_lock = threading.Lock()
        self._exitcode: int | None = None
        with keep_standard_free(), contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            our_end, their_end = socket.socketpair()
            theirs.enter_context(their_end)
            self.channel = MessageSocket(our_end)
            ours.callback(self.channel.close)
            their_end.settimeout(None)  # as for the channel, or the worker's reads would not wait
            lifeline_end, self._lifeline = os.pipe()
            theirs.callback(os.close, lifeline_end)
            ours.callback(os.close, self._lifeline)
            started = starter.start(number, [their_end.fileno(), lifeline_end])
            self._exit = started.exit
            self._reap = started.reap
            self.pid = started.pid
            self.name = f"process {self.pid}"
            # If anything fails from here on, the process is killed and its descriptors are closed.
            ours.callback(self._exit.close)
            ours.callback(self._reap)
            ours.callback(self._exit.wait)
            ours.callback(self._exit.kill)
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
                self._exit.wait()
                self._exitcode = self._reap()
                self.channel.close()
                self._exit.close()
                self._close_lifeline()
        return self._exitcode

    def drop_after_fork(self) -> None:
        """Close, in a forked child, the descriptors that it has of its parent's worker."""
        self.channel.close()
        self._exit.drop_after_fork()
        self._close_lifeline()

"""A descriptor that becomes readable when a process ends.

It is the descriptor of the process (`os.pidfd_open`). If there is none (a sandbox refuses the call,
or Python was built without it), a thread waits for the process and then writes to an `eventfd`.
The process stays a zombie until it is reaped, so no other process gets its number before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading

from taskcarrier.system.descriptors import Descriptor

# The errors by which sandboxes refuse a call.
_REFUSED = {errno.ENOSYS, errno.EPERM, errno.EACCES}


# The seconds of one wait for the end of a process; arbitrary.
_LONGEST_WAIT = 3600.0


def is_readable(fd: int, seconds: float = 0) -> bool:
    """Return whether there is something to read, after a wait of at most `seconds`.

    Use `poll`: `select` takes no descriptors above 1023.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


def can_watch_any() -> bool:
    """Return whether the end of any process can be seen, and not only that of a child."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _REFUSED:
            raise
        return False
    return True


class ProcessExit:
    """The end of a process that is not reaped yet.

    Parameters
    ----------
    pid : int
        The process.
    pidfd : Descriptor, optional
        The descriptor of the process, if it is not a child of this one.

    Attributes
    ----------
    fd : int
        A descriptor that is readable once the process has ended.
    """

    def __init__(self, pid: int, pidfd: Descriptor | None = None) -> None:
        self._pid = pid
        self._thread: threading.Thread | None = None
        if pidfd is not None:
            self.fd = os.dup(pidfd.fileno())
            return
        try:
            self.fd = os.pidfd_open(pid)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _REFUSED:
                raise
            self.fd = os.eventfd(0)
            self._thread = threading.Thread(
                target=self._wait, name="taskcarrier-waiting", daemon=True
            )
            try:
                self._thread.start()
            except BaseException:
                os.close(self.fd)
                raise

    def _wait(self) -> None:
        with contextlib.suppress(ChildProcessError):  # it has just been reaped
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        os.eventfd_write(self.fd, 1)

    def kill(self) -> None:
        """Kill the process; raise `PermissionError` if it belongs to another user."""
        try:
            if self._thread is None:
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
                return
        except ProcessLookupError:
            return
        except (AttributeError, OSError):  # refused too, or the process is another user's
            pass
        if not is_readable(self.fd):  # else its number may be that of another process
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for the end of the process."""
        while not is_readable(self.fd, _LONGEST_WAIT):
            pass

    def close(self) -> None:
        """Close the descriptor of a process that has been reaped."""
        if self._thread is not None:
            self._thread.join()
        self._close_fd()

    def drop_after_fork(self) -> None:
        """Close the descriptor in a forked child, where the thread does not exist."""
        self._close_fd()

    def _close_fd(self) -> None:
        with contextlib.suppress(OSError):  # the program may have closed any descriptor
            os.close(self.fd)
        self.fd = -1

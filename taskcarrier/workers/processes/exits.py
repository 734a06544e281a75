"""How the end of a child process is seen: by a descriptor that becomes readable.

That is the process's own (`os.pidfd_open`). Where there is none to be had (a sandbox refuses the
call, or Python was built without it), a thread waits for the process and tells by an `eventfd`.
The process stays a zombie until it is reaped, so its number is its own until then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading

# What sandboxes answer.
_REFUSED = {errno.ENOSYS, errno.EPERM, errno.EACCES}


def is_readable(fd: int, seconds: float = 0) -> bool:
    """Whether there is something to read; not by `select`, which ends at descriptor 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


class ProcessExit:
    """The end of a child process that is not reaped yet.

    Parameters
    ----------
    pid : int
        The process.

    Attributes
    ----------
    fd : int
        Is readable once the process has ended.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._waiting: threading.Thread | None = None
        try:
            self.fd = os.pidfd_open(pid)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _REFUSED:
                raise
            self.fd = os.eventfd(0)
            self._waiting = threading.Thread(
                target=self._wait, name="taskcarrier-waiting", daemon=True
            )
            try:
                self._waiting.start()
            except BaseException:
                os.close(self.fd)
                raise

    def _wait(self) -> None:
        with contextlib.suppress(ChildProcessError):  # it was reaped just now
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        os.eventfd_write(self.fd, 1)

    def kill(self) -> None:
        """End the process now; a `PermissionError` if it is another user's."""
        try:
            if self._waiting is None:
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
                return
        except ProcessLookupError:
            return
        except (AttributeError, OSError):  # likewise refused, or it is another user's
            pass
        if not is_readable(self.fd):  # else its number may be another's
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self, *, forked: bool = False) -> None:
        """Close the descriptor, once the process was reaped; or in a forked child, at any time."""
        if self._waiting is not None and not forked:
            self._waiting.join()
        with contextlib.suppress(OSError):  # the program may close what it likes
            os.close(self.fd)
        self.fd = -1

"""How long a thread was on a core, and how long it was ready to run and had none.

The kernel keeps both. The second is a file of the thread, `/proc/self/task/<number>/schedstat`. It
is read by a call that keeps the interpreter's lock: the usual ones release it, and a thread that
measures how long it waits for the lock would wait once more.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from taskcarrier.system.descriptors import Descriptor, open_owned

_LENGTH = 100

_read: Any = None


class ThreadTimes(NamedTuple):
    """What a thread has done with its time so far, in seconds.

    Attributes
    ----------
    time : float
        The time now, since some moment.
    on_core : float
        How long it was on a core.
    queued : float
        How long it was ready to run, and had no core.
    """

    time: float
    on_core: float
    queued: float

    def shares_since(self, before: ThreadTimes) -> tuple[float, float]:
        """Return the share of the time on a core, and that of the time without one.

        The first is of the time in which the thread did not wait for a core.

        >>> ThreadTimes(4.0, 1.5, 2.0).shares_since(ThreadTimes(0.0, 0.0, 0.0))
        (0.75, 0.5)
        """
        seconds = max(1e-9, self.time - before.time)
        queued = min(seconds, self.queued - before.queued)
        return (self.on_core - before.on_core) / max(1e-9, seconds - queued), queued / seconds


class ThreadClock:
    """The clocks of a living thread; zeros where the kernel does not tell.

    Parameters
    ----------
    thread : Thread
        The thread, which has begun.
    """

    def __init__(self, thread: threading.Thread) -> None:
        ident, native_id = thread.ident, thread.native_id
        self._clock: int | None = None
        if hasattr(time, "pthread_getcpuclockid") and ident is not None:
            self._clock = time.pthread_getcpuclockid(ident)
        self._file: Descriptor | None = None
        self._buffer: Any = None
        with suppress(OSError):
            path = f"/proc/self/task/{native_id}/schedstat"
            self._file = open_owned(os.open, path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ThreadTimes:
        """Return the times; the thread must live."""
        on_core = 0.0 if self._clock is None else time.clock_gettime(self._clock)
        return ThreadTimes(time.perf_counter(), on_core, self.read_queued())

    def read_queued(self) -> float:
        """Return for how many seconds the thread was ready to run, and had no core."""
        if self._file is None:
            return 0.0
        if self._buffer is None:
            self._buffer = _make_buffer()
        length = _read(self._file.fileno(), self._buffer, _LENGTH, 0)
        fields = self._buffer.raw[: max(0, length)].split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0


def _make_buffer() -> Any:
    """Return memory to read into."""
    global _read  # noqa: PLW0603  # loaded when it is needed
    import ctypes  # noqa: PLC0415  # takes 3 ms, and only long calls need it

    if _read is None:
        read = ctypes.PyDLL(None).pread
        read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
        read.restype = ctypes.c_ssize_t
        _read = read
    return ctypes.create_string_buffer(_LENGTH)

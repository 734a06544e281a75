"""How long a thread was on a core, and how long it was ready to run and had none.

The kernel keeps both. The second is in a file of the thread, `/proc/self/task/<number>/schedstat`.
It is read by C calls that keep the interpreter's lock: the usual ones release it, and a thread that
measures how long it waits for the lock would wait once more. One call into C makes
all of them: no other thread can see the descriptor, nor inherit it by a fork, and no exception from
outside leaves it open.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from itertools import chain
from typing import Any, NamedTuple

_LENGTH = 100


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
        self._clock: int | None = None
        if hasattr(time, "pthread_getcpuclockid") and thread.ident is not None:
            self._clock = time.pthread_getcpuclockid(thread.ident)
        self._path = f"/proc/self/task/{thread.native_id}/schedstat".encode()

    def read(self) -> ThreadTimes:
        """Return the times; the thread must live."""
        on_core = 0.0 if self._clock is None else time.clock_gettime(self._clock)
        return ThreadTimes(time.perf_counter(), on_core, self.read_queued())

    def read_queued(self) -> float:
        """Return for how many seconds the thread was ready to run, and had no core."""
        fields = _read_file(self._path).split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0


def _read_file(path: bytes) -> bytes:
    """Return the beginning of a file; nothing if it cannot be read."""
    libc, make_buffer = _load()
    text, fds = make_buffer(_LENGTH), list[int]()
    opened = map(libc.open, (path,), (os.O_RDONLY | os.O_CLOEXEC,))
    list(  # the one call into C
        chain(
            map(fds.extend, (opened,)),
            map(libc.read, fds, (text,), (_LENGTH,)),
            map(libc.close, fds),
        )
    )
    content: bytes = text.value
    return content


@functools.cache
def _load() -> tuple[Any, Any]:
    """Return the C library, whose calls keep the interpreter's lock, and what makes buffers."""
    import ctypes  # noqa: PLC0415  # takes 3 ms, and only long calls need it

    libc = ctypes.PyDLL(None)
    libc.open.argtypes = [ctypes.c_char_p, ctypes.c_int]
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.read.restype = ctypes.c_ssize_t
    return libc, ctypes.create_string_buffer

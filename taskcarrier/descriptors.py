"""Descriptors 0 to 2 are the program's own, also while they are closed.

Daemons close them, and so may the function in a worker. The kernel gives out the lowest number that
is free, so memory or a socket of ours would get it, and the next `print` would go there. Whatever
opens a descriptor that stays open does so inside ``with above_standard:``.
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType

from taskcarrier.locks import ModuleLock

STANDARD = range(3)


class _AboveStandard:
    """While it is entered, what is opened gets no standard descriptor, in any thread."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._n_inside = 0
        self._plugs: list[int] = []  # standard descriptors that are ours meanwhile

    def __enter__(self) -> None:
        with self._lock:
            self._n_inside += 1
            while not all(map(_is_open, STANDARD)):
                # Of this kind nothing can be read, and nothing written: as if it were closed. Older
                # lokys let children inherit it, and Python does not start on a folder.
                plug = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
                if plug not in STANDARD:  # another thread has opened something
                    os.close(plug)
                    break
                self._plugs.append(plug)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                while self._plugs:
                    plug = self._plugs.pop()
                    if _is_plug(plug):  # the program may have put something else there
                        os.close(plug)


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def _is_plug(fd: int) -> bool:
    import fcntl  # noqa: PLC0415  # POSIX only

    with suppress(OSError):
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)
    return False


above_standard = _AboveStandard()
"""The process's own: ``with above_standard:``."""

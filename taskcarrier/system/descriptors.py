"""Descriptors 0 to 2 are the program's own, also while they are closed.

Daemons close them, and so may the function in a worker. The kernel gives out the lowest number that
is free, so memory or a socket of ours would get it, and the next `print` would go there. Whatever
opens a descriptor that stays open does so inside ``with above_standard():``.

And none is a bare number for longer than it takes to open it: an exception that comes from outside
(`taskcarrier.system.interrupts`) would leave it open for ever.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Holder, Holders
from taskcarrier.system.locks import ModuleLock

STANDARD = range(3)


_lock = ModuleLock()
_inside = Holders()
_plugs: list[int] = []  # standard descriptors that are ours meanwhile


@contextmanager
def keep_standard_free() -> Iterator[None]:
    """While it is entered, what is opened gets no standard descriptor, in any thread."""
    opening = Holder()
    try:
        with _lock:
            _inside.add(opening)
            while not all(map(_is_open, STANDARD)):
                # Of this kind nothing can be read, and nothing written: as if it were closed. Older
                # lokys let children inherit it, and Python does not start on a folder.
                _plugs.extend(map(os.open, (os.devnull,), (os.O_PATH | os.O_CLOEXEC,)))
                if _plugs[-1] not in STANDARD:  # another thread has opened something
                    _pull()
                    break
        yield
    finally:
        with _lock:
            _inside.discard(opening)
            while _plugs and not _inside:
                _pull()


def _pull() -> None:
    """Close the last plug; done twice, this does no harm."""
    if _is_plug(_plugs[-1]):  # the program may have put something else there
        os.close(_plugs[-1])
    _plugs.pop()


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


if sys.platform == "linux":
    Descriptor = select.epoll
    """The owner of an open descriptor, whatever that is of: ``fileno()``, ``close()``.

    It closes the descriptor when nothing refers to it any more. Of all that can own one, only this
    does so without a word and without a line of Python, which an exception could cut short; nothing
    else is done with it.
    """
    own = select.epoll.fromfd
    """Makes one of a number; C code."""
else:

    class Descriptor:
        """The same, where there is no epoll."""

        def __init__(self, fd: int) -> None:
            self._fd = fd

        def fileno(self) -> int:
            """Its number."""
            return self._fd

        def close(self) -> None:
            """Close it, unless that was done."""
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

        __del__ = close

    own = Descriptor


def open_owned(function: Callable[..., int], *args: object) -> Descriptor:
    """What a function of C opens, which has an owner before an exception can come between."""
    with keep_standard_free():
        (descriptor,) = map(own, map(function, *((one,) for one in args)))
    return descriptor

"""Descriptors 0 to 2 belong to the program, even while they are closed.

Daemons close them, and so may the function in a worker. The kernel gives out the lowest free
number, so our memory or socket would get it, and the next `print` would write there. Code that
opens a descriptor that stays open does so inside ``with keep_standard_free():``.

A descriptor is a bare number only while it is being opened: an exception from outside
(`taskcarrier.system.interrupts`) would leave it open for ever.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from taskcarrier.system.interrupts import Holder, Holders
from taskcarrier.system.locks import ModuleLock

STANDARD = range(3)


_lock = ModuleLock()
_openings = Holders()
_plugs: list[int] = []  # standard descriptors that are blocked while something is opened


class _KeepStandardFree:
    """The context manager of `keep_standard_free`."""

    __slots__ = ("_opening",)

    def __init__(self) -> None:
        self._opening: Holder | None = None

    def __enter__(self) -> None:
        with _lock:
            if _plugs or not _are_all_open():
                self._opening = Holder()
                _openings.add(self._opening)
                try:
                    self._plug_all()
                except BaseException:
                    self.__exit__()
                    raise

    @staticmethod
    def _plug_all() -> None:
        while not _are_all_open():
            # With O_PATH nothing can be read or written, as if it were closed. Older versions
            # of loky let children inherit it, and Python does not start with a folder there.
            _plugs.extend(map(os.open, (os.devnull,), (os.O_PATH | os.O_CLOEXEC,)))
            if _plugs[-1] not in STANDARD:  # another thread has opened something
                _pull_plug()
                break

    def __exit__(self, *_: object) -> None:
        if self._opening is not None:
            with _lock:
                _openings.discard(self._opening)
                while _plugs and not _openings:
                    _pull_plug()


def keep_standard_free() -> AbstractContextManager[None]:
    """Keep what is opened meanwhile, in any thread, off the standard descriptors."""
    return _KeepStandardFree()


def list_open_standard() -> list[int]:
    """Return those of the standard descriptors that the program has open."""
    with _lock:
        return [fd for fd in STANDARD if _is_open(fd) and fd not in _plugs]


def _pull_plug() -> None:
    """Close the last plug; to repeat an interrupted call does no harm."""
    if _is_plug(_plugs[-1]):  # the program may have put something else there
        os.close(_plugs[-1])
    _plugs.pop()


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def _are_all_open() -> bool:
    """Return whether all standard descriptors are open."""
    try:  # one by one, without further calls: every message is received after this
        os.get_inheritable(0)
        os.get_inheritable(1)
        os.get_inheritable(2)
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
    """The owner of an open descriptor of any kind, with ``fileno()`` and ``close()``.

    It closes the descriptor when nothing refers to it any more. No other possible owner does so
    without a warning and without a line of Python, which an exception could interrupt. Nothing
    else of epoll is used.
    """
    make_owner = select.epoll.fromfd
    """The function, in C code, that makes the owner of a descriptor from its number."""
else:

    class Descriptor:
        """The owner of an open descriptor, on platforms without epoll."""

        def __init__(self, fd: int) -> None:
            self._fd = fd

        def fileno(self) -> int:
            """Return the number of the descriptor."""
            return self._fd

        def close(self) -> None:
            """Close the descriptor, if it is still open."""
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

        __del__ = close

    make_owner = Descriptor


def open_owned(function: Callable[..., int], *args: object) -> Descriptor:
    """Call a C function that opens a descriptor; no exception can come before it has an owner."""
    with keep_standard_free():
        (descriptor,) = map(make_owner, map(function, *((argument,) for argument in args)))
    return descriptor

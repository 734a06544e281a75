"""Small values that workers share: a counter, and a value that is set once."""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any, Protocol

from taskcarrier.system.descriptors import keep_standard_free
from taskcarrier.system.locks import Lock

_LENGTH = struct.Struct("<Q")


class Counter(Protocol):
    """A number that several workers advance; each value goes to exactly one of them."""

    def advance(self, n: int = 1) -> int:
        """Take the next `n` numbers, and return the first of them."""

    def position(self) -> int:
        """Return the number that is given out next."""

    def reset(self, start: int = 0) -> None:
        """Start from this number; no worker may be claiming."""


class ThreadCounter:
    """A counter for the threads of one process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next = 0

    def advance(self, n: int = 1) -> int:  # noqa: D102  # as in Counter
        with self._lock:
            number = self._next
            self._next = number + n
        return number

    def position(self) -> int:  # noqa: D102  # as in Counter
        return self._next

    def reset(self, start: int = 0) -> None:  # noqa: D102  # as in Counter
        self._next = start


class FileCounter:
    """A counter for processes: the position of one shared open file description.

    Parameters
    ----------
    fd : int
        A descriptor of that file. The code that created it owns it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    def create() -> int:
        """Return a new descriptor that can serve as a counter; the calling code owns it."""
        return _create_memory_file(0)

    def advance(self, n: int = 1) -> int:  # noqa: D102  # as in Counter
        return os.lseek(self.fd, n, os.SEEK_CUR) - n

    def position(self) -> int:  # noqa: D102  # as in Counter
        return os.lseek(self.fd, 0, os.SEEK_CUR)

    def reset(self, start: int = 0) -> None:  # noqa: D102  # as in Counter
        os.lseek(self.fd, start, os.SEEK_SET)


class SetOnce(Protocol):
    """A small value that the first proposal decides; it must be picklable, and not None."""

    def propose(self, proposal: Any) -> Any:
        """Propose a value, and return the first of all proposals: this one or an earlier one."""

    def get(self) -> Any:
        """Return the first proposal, or None if there is none yet."""

    def reset(self) -> None:
        """Forget the value; no worker may be proposing."""


class ThreadSetOnce:
    """A set-once value for the threads of one process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._first: Any = None

    def propose(self, proposal: Any) -> Any:  # noqa: D102  # as in SetOnce
        with self._lock:
            if self._first is None:
                self._first = proposal
            return self._first

    def get(self) -> Any:  # noqa: D102  # as in SetOnce
        return self._first

    def reset(self) -> None:  # noqa: D102  # as in SetOnce
        self._first = None


class FileSetOnce:
    """A set-once value for processes: the first record of an append-only file.

    Parameters
    ----------
    fd : int
        A descriptor of the file. The code that created it owns it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    def create() -> int:
        """Return a new descriptor that can hold a set-once value; the calling code owns it."""
        return _create_memory_file(os.O_APPEND)

    def propose(self, proposal: Any) -> Any:  # noqa: D102  # as in SetOnce
        packed = pickle.dumps(proposal)
        # One write, so that the file has a proposal either completely or not at all.
        os.write(self.fd, _LENGTH.pack(len(packed)) + packed)
        return self.get()

    def get(self) -> Any:  # noqa: D102  # as in SetOnce
        header = os.pread(self.fd, _LENGTH.size, 0)
        if not header:
            return None
        return pickle.loads(os.pread(self.fd, _LENGTH.unpack(header)[0], _LENGTH.size))

    def reset(self) -> None:  # noqa: D102  # as in SetOnce
        os.ftruncate(self.fd, 0)


def _create_memory_file(flags: int) -> int:
    """Create a memory file and return its descriptor.

    It is opened through /proc, because the kernel serialises the position of such files only.
    """
    with keep_standard_free():
        raw = os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC)
        try:
            return os.open(f"/proc/self/fd/{raw}", os.O_RDWR | os.O_CLOEXEC | flags)
        except (FileNotFoundError, PermissionError):  # /proc is missing, or closed to us
            return _create_temporary_file(flags)
        finally:
            os.close(raw)


def _create_temporary_file(flags: int) -> int:
    """Create a file without a name on disk instead; very little is written to it."""
    import fcntl  # noqa: PLC0415  # rarely needed, like the next one
    import tempfile  # noqa: PLC0415  # slow

    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
    return fd

"""Small values that workers share: a counter that each number leaves once, a value that is set once."""

from __future__ import annotations

import os
import pickle
import struct
import threading
from typing import Any, Protocol

from taskcarrier.system.descriptors import keep_standard_free

_LENGTH = struct.Struct("<Q")


class Counter(Protocol):
    """A counter that several workers advance, each number going to exactly one of them."""

    def advance(self) -> int:
        """The next number, from 0."""

    def position(self) -> int:
        """How many numbers were given out."""

    def reset(self) -> None:
        """Start from 0 again; nobody may be claiming."""


class ThreadCounter:
    """A counter for the threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0

    def advance(self) -> int:  # noqa: D102  # as in Counter
        with self._lock:
            number = self._next
            self._next = number + 1
        return number

    def position(self) -> int:  # noqa: D102  # as in Counter
        return self._next

    def reset(self) -> None:  # noqa: D102  # as in Counter
        self._next = 0


class FileCounter:
    """A counter for processes: the position of one shared open file description.

    Parameters
    ----------
    fd : int
        A descriptor of the description. Owned by whoever made it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    def create() -> int:
        """A new descriptor fit to be a counter; the caller owns it."""
        return _memory_file(0)

    def advance(self) -> int:  # noqa: D102  # as in Counter
        return os.lseek(self.fd, 1, os.SEEK_CUR) - 1

    def position(self) -> int:  # noqa: D102  # as in Counter
        return os.lseek(self.fd, 0, os.SEEK_CUR)

    def reset(self) -> None:  # noqa: D102  # as in Counter
        os.lseek(self.fd, 0, os.SEEK_SET)


class SetOnce(Protocol):
    """One small value, settled by whoever proposes first; picklable, and not None."""

    def propose(self, proposal: Any) -> Any:
        """The first proposal of all: this one, or an earlier one."""

    def get(self) -> Any:
        """The first proposal, None before there is one."""

    def reset(self) -> None:
        """Forget it; nobody may be proposing."""


class ThreadSetOnce:
    """An agreement between the threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
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
    """An agreement between processes: the first record of an append-only file.

    Parameters
    ----------
    fd : int
        A descriptor of the file. Owned by whoever made it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    def create() -> int:
        """A new descriptor fit to be an agreement; the caller owns it."""
        return _memory_file(os.O_APPEND)

    def propose(self, proposal: Any) -> Any:  # noqa: D102  # as in SetOnce
        packed = pickle.dumps(proposal)
        # One write, so a proposal is there whole or not at all.
        os.write(self.fd, _LENGTH.pack(len(packed)) + packed)
        return self.get()

    def get(self) -> Any:  # noqa: D102  # as in SetOnce
        head = os.pread(self.fd, _LENGTH.size, 0)
        if not head:
            return None
        return pickle.loads(os.pread(self.fd, _LENGTH.unpack(head)[0], _LENGTH.size))

    def reset(self) -> None:  # noqa: D102  # as in SetOnce
        os.ftruncate(self.fd, 0)


def _memory_file(flags: int) -> int:
    """A new memory file, opened through /proc: the kernel serialises the position of these."""
    with keep_standard_free():
        raw = os.memfd_create("taskcarrier-ledger", os.MFD_CLOEXEC)
        try:
            return os.open(f"/proc/self/fd/{raw}", os.O_RDWR | os.O_CLOEXEC | flags)
        except (FileNotFoundError, PermissionError):  # there is no /proc, or not for us
            return _temporary_file(flags)
        finally:
            os.close(raw)


def _temporary_file(flags: int) -> int:
    """The same on disk, without a name; what is written to it is next to nothing."""
    import fcntl  # noqa: PLC0415  # rarely needed, as the next one
    import tempfile  # noqa: PLC0415  # slow

    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
    return fd

"""Reading the memory of the parent in its worker processes.

An array in ordinary memory need not be copied before workers can begin: each worker reads the
bytes of a chunk when it gets to it, into private memory that stays in its cache. Over 256 MB, two
workers that read 1 MiB at a time took 0.04 s. One `pwrite` into a new segment took 0.11 s before
they could begin. Nor is there ever a second copy of the array (`python -m bench sqrt_sin memory`).

This uses a descriptor of ``/proc/self/mem`` that the parent opens and sends to its own workers. The
kernel checks permissions when the file is opened, so neither ptrace rules nor namespaces matter
afterwards. The file is opened for reading only. Some memory cannot be read this way (device
mappings, secret memory); reading its first and last byte beforehand shows that.
"""

from __future__ import annotations

import os

import numpy as np

from taskcarrier.memory.strides import ALIGNMENT, address_of
from taskcarrier.system import descriptors
from taskcarrier.system.descriptors import Descriptor

_PATH = "/proc/self/mem"
# One read moves at most 2 GiB.
_READ_NBYTES = 1 << 30

_fd = -1  # in a worker: the descriptor of the parent's memory


def open_own_memory() -> Descriptor | None:
    """Return a new descriptor of this process's memory for its workers, or None if that fails."""
    try:
        return descriptors.open_owned(os.open, _PATH, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return None


def available() -> bool:
    """Return whether the memory of this process can be opened now."""
    return open_own_memory() is not None


def is_readable(low: int, high: int) -> bool:
    """Return whether workers can read the bytes from `low` up to `high` of this process."""
    memory = open_own_memory()
    if memory is None:
        return False
    try:
        return all(len(os.pread(memory.fileno(), 1, address)) == 1 for address in (low, high - 1))
    except OSError:
        return False


def attach(fd: int) -> None:
    """Set the descriptor of the parent's memory, in a worker."""
    global _fd  # noqa: PLW0603  # a fact about the process, set once
    _fd = fd


def read(low: int, nbytes: int) -> tuple[np.ndarray, int]:
    """Copy `nbytes` of the parent from address `low` into private memory, in a worker.

    Returns the memory and the offset at which the bytes begin. Their new address is the same as
    `low` modulo a cache line.
    """
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = (low - address_of(memory)) % ALIGNMENT
    target = memory.data[begin : begin + nbytes]
    n_done = 0
    while n_done < nbytes:
        piece = target[n_done : n_done + _READ_NBYTES]
        try:
            n_read = os.preadv(_fd, [piece], low + n_done)
        except OSError as error:
            error.add_note("an array of the caller cannot be read: was its file cut off meanwhile?")
            raise
        if n_read == 0:
            raise OSError(f"the caller's memory ends at {low + n_done:#x}")
        n_done += n_read
    return memory, begin

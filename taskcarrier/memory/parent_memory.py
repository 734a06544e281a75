"""Reading the caller's memory from its worker processes.

An array in ordinary memory need not be copied before workers can begin: each worker reads the
bytes of a chunk when it comes to it, into private memory that stays in its cache. Over 256 MB,
two workers that read 1 MiB at a time took 0.04 s where one `pwrite` into a fresh segment took
0.11 s before they could begin, and the second copy of the array is never there
(`python -m bench sqrt_sin memory`).

The means is a descriptor of ``/proc/self/mem`` that the caller opens and sends to its own
workers. The kernel checks who may look when the file is opened, so neither ptrace rules nor
namespaces matter afterwards; it is opened for reading only. Memory that cannot be read so
(device mappings, secret memory) is found out by reading its two ends first.
"""

from __future__ import annotations

import os

import numpy as np

from taskcarrier.memory.strides import ALIGNMENT, address_of
from taskcarrier.system import descriptors
from taskcarrier.system.descriptors import Descriptor

_PATH = "/proc/self/mem"
# One read moves 2 GiB at most.
_READ_NBYTES = 1 << 30

_fd = -1  # in a worker: the caller's memory


def open_own_memory() -> Descriptor | None:
    """A new descriptor of this process's memory, for its workers; None if it cannot be had."""
    try:
        return descriptors.open_owned(os.open, _PATH, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return None


def available() -> bool:
    """Whether this process's memory can be opened at all, now."""
    return open_own_memory() is not None


def readable(low: int, high: int) -> bool:
    """Whether workers will be able to read the bytes from `low` up to `high` of this process."""
    memory = open_own_memory()
    if memory is None:
        return False
    try:
        return all(len(os.pread(memory.fileno(), 1, one)) == 1 for one in (low, high - 1))
    except OSError:
        return False


def attach(fd: int) -> None:
    """In a worker: this is the caller's memory, from now on."""
    global _fd  # noqa: PLW0603  # a fact about the process, set once
    _fd = fd


def read(low: int, nbytes: int) -> tuple[np.ndarray, int]:
    """In a worker: a private copy of the caller's bytes from `low` on.

    Returns the memory and where in it the bytes begin, at the same address modulo a cache line.
    """
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = (low - address_of(memory)) % ALIGNMENT
    block = memory.data[begin : begin + nbytes]
    done = 0
    while done < nbytes:
        piece = block[done : done + _READ_NBYTES]
        try:
            n_read = os.preadv(_fd, [piece], low + done)
        except OSError as error:
            error.add_note("an array of the caller cannot be read: was its file cut off meanwhile?")
            raise
        if n_read == 0:
            raise OSError(f"the caller's memory ends at {low + done:#x}")
        done += n_read
    return memory, begin

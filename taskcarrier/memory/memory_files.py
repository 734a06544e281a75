"""Nameless files that segments lie in: how they are made, and how their pages are given back."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from typing import Any, NamedTuple

from taskcarrier.system.descriptors import Descriptor, keep_standard_free, make_owner, open_owned
from taskcarrier.system.interrupts import run_sheltered


def create_memory_file() -> Descriptor:
    """Create an anonymous file in memory, which the kernel keeps from shrinking."""
    import fcntl  # noqa: PLC0415  # POSIX only

    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    descriptor = open_owned(os.memfd_create, "taskcarrier", flags)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor


def create_nameless_file(folder: str) -> Descriptor:
    """Create a file that only its owner can read, and that has no name or loses it at once."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            errno.ENOENT, "temp_folder must be an existing folder", os.fspath(folder)
        )
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return open_owned(os.open, folder, flags | os.O_TMPFILE, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
    import tempfile  # noqa: PLC0415  # only on file systems without O_TMPFILE

    def create_file() -> Descriptor:
        with keep_standard_free():
            fd, path = tempfile.mkstemp(prefix="taskcarrier-", dir=folder)
        os.unlink(path)
        return make_owner(fd)

    return run_sheltered(create_file)


# The kernel's flags for taking pages out of a file.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# `fallocate`, which needs no mapping and no further descriptor; loaded with the first label.
_punch: Any = None


def load_punch() -> None:
    """Load `fallocate` from the C library, if that is not done yet."""
    global _punch  # noqa: PLW0603  # set once
    if _punch is None:
        import ctypes  # noqa: PLC0415  # takes 3 ms, and only runs need it

        _punch = ctypes.CDLL(None).fallocate
        _punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class OwnedMemory(NamedTuple):
    """What a segment owns: a descriptor, and the facts that are needed to release it."""

    descriptor: Descriptor
    nbytes: int
    on_disk: bool
    label: int

    # Functions needed when the interpreter ends are bound here: names of the module are gone then.
    def release(self, _fstat: Any = os.fstat, _is_ending: Any = sys.is_finalizing) -> None:
        """Close the descriptor; if others may have mapped the memory, take its pages out first."""
        if self.label and _punch is not None and not _is_ending():
            fd = self.descriptor.fileno()
            whole_pages = -(-_fstat(fd).st_size // mmap.PAGESIZE) * mmap.PAGESIZE
            _punch(fd, _KEEP_SIZE | _PUNCH_HOLE, 0, whole_pages)
        self.descriptor.close()

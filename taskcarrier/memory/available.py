"""The memory and disk space that is left: by the kernel, the control groups, the file systems."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from taskcarrier.system import cgroups
from taskcarrier.system.cgroups import read_text
from taskcarrier.system.contexts import contextmanager

# From this size on, memory is checked before it is used (reading the limits costs 60 µs).
CHECKED_NBYTES = 64 << 20

# The errors by which the system says that a file cannot have that many bytes.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}


def check_memory(
    nbytes: int,
    what: str = "a shared array",
    remedy: str = "use smaller arrays, fewer at once, or temp_folder= on a disk",
) -> None:
    """Raise a `MemoryError` with sizes if `nbytes` more are not available.

    Without that, the kernel would kill the process for lack of memory.
    """
    if nbytes < CHECKED_NBYTES:
        return
    available, source = _available_memory()
    if nbytes > available:
        raise MemoryError(
            f"{what} needs {nbytes:,} bytes more, but only {available:,} are available "
            f"({source}); {remedy}"
        )


def _available_memory() -> tuple[int, str]:
    """Return the bytes that can still be used, and what says so; `sys.maxsize` if nothing does."""
    limits = [(sys.maxsize, "no limit known"), *cgroups.find_memory_left()]
    with suppress(OSError):
        lines = read_text("/proc/meminfo").splitlines()
        fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
        if "MemAvailable" in fields:
            # Memory that is swapped out is slow, but it is there.
            amounts = (fields["MemAvailable"], fields.get("SwapFree", "0 kB"))
            left = sum(int(amount.split()[0]) << 10 for amount in amounts)
            limits.append((left, "MemAvailable and SwapFree in /proc/meminfo"))
    return min(limits)


@contextmanager
def explain_no_room(fd: int, nbytes: int) -> Iterator[None]:
    """Turn an error for lack of room into one with sizes, while a file is made `nbytes` long.

    The error has the number that the system gives, and names the file, or the folder of a file
    without a name.
    """
    try:
        if nbytes > sys.maxsize:  # system calls do not take it
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # noqa: TRY301  # one path for all
        yield
    except OSError as error:
        if not is_no_room(error):
            raise
        raise _make_no_room_error(error.errno or 0, fd, nbytes) from None


def is_no_room(error: Exception) -> bool:
    """Whether an error says that memory or a file system has no room."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _NO_ROOM
    )


def _make_no_room_error(number: int, fd: int, nbytes: int) -> OSError:
    name = find_path(fd)
    is_temporary = name is not None and os.path.isdir(name)
    if number == errno.ENOSPC:
        info = os.fstatvfs(fd)
        where = "the folder for temporary files" if is_temporary else "its file system"
        reason = f"{where} has {info.f_bavail * info.f_frsize:,} bytes left"
    elif number == errno.EDQUOT:
        reason = "a quota allows less"
    else:
        reason = _explain_size_limit(nbytes)
    what = "a file" if name is not None and not is_temporary else "a shared array"
    remedy = "; choose another temp_folder, or none to use memory" if is_temporary else ""
    message = f"no room for {what} of {nbytes:,} bytes: {reason}{remedy}"
    return OSError(number, message) if name is None else OSError(number, message, name)


def find_path(fd: int) -> str | None:
    """Return the path of an open file, or the folder of a nameless one; None for memory."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # no /proc
        return None
    if path.startswith("/memfd:"):
        return None
    return os.path.dirname(path) if path.endswith(" (deleted)") else path


def _explain_size_limit(nbytes: int) -> str:
    """Say what keeps a file from having `nbytes` bytes."""
    import resource  # noqa: PLC0415  # POSIX only

    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and soft < nbytes:
        return f"files of this process may have {soft:,} bytes (RLIMIT_FSIZE, `ulimit -f`)"
    return "the file system takes no file of that size"

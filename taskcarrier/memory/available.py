"""How much room there is to take, by the kernel, the control groups and the file systems."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from taskcarrier.system import cgroups
from taskcarrier.system.cgroups import text_of
from taskcarrier.system.contexts import contextmanager

# From this size on, memory is asked after before it is used (reading the limits costs 60 µs).
CHECKED_NBYTES = 64 << 20

# What the system says where a file cannot have so many bytes.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}


def check_memory(
    nbytes: int,
    what: str = "a shared array",
    remedy: str = "use smaller arrays, fewer at once, or temp_folder= on a disk",
) -> None:
    """An error with sizes beats the kernel ending the process for want of memory."""
    if nbytes < CHECKED_NBYTES:
        return
    available, source = _available_memory()
    if nbytes > available:
        raise MemoryError(
            f"{what} needs {nbytes:,} bytes more, but only {available:,} are available "
            f"({source}); {remedy}"
        )


def _available_memory() -> tuple[int, str]:
    """Bytes that can still be used, and what says so; unlimited where nothing tells."""
    limits = [(sys.maxsize, "no limit known"), *cgroups.memory_left()]
    with suppress(OSError):
        lines = text_of("/proc/meminfo").splitlines()
        facts = {name: value for name, _, value in (line.partition(":") for line in lines)}
        if "MemAvailable" in facts:
            # Swapped out it is slow, but there.
            words = (facts["MemAvailable"], facts.get("SwapFree", "0 kB"))
            left = sum(int(word.split()[0]) << 10 for word in words)
            limits.append((left, "MemAvailable and SwapFree in /proc/meminfo"))
    return min(limits)


@contextmanager
def room_for(fd: int, nbytes: int) -> Iterator[None]:
    """What is done inside makes room for so many bytes in a file; an error with sizes if it fails.

    The error has the number that the system gives, and names the file, or the folder of one that
    has no name.
    """
    try:
        if nbytes > sys.maxsize:  # which the system calls do not take
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # noqa: TRY301  # one way for all
        yield
    except OSError as error:
        if not is_no_room(error):
            raise
        raise _no_room(error.errno or 0, fd, nbytes) from None


def is_no_room(error: Exception) -> bool:
    """Whether an error says that memory or a file system has no room."""
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _NO_ROOM
    )


def _no_room(number: int, fd: int, nbytes: int) -> OSError:
    name = name_of_file(fd)
    is_temporary = name is not None and os.path.isdir(name)
    if number == errno.ENOSPC:
        info = os.fstatvfs(fd)
        where = "the folder for temporary files" if is_temporary else "its file system"
        why = f"{where} has {info.f_bavail * info.f_frsize:,} bytes left"
    elif number == errno.EDQUOT:
        why = "a quota allows less"
    else:
        why = _largest_file(nbytes)
    what = "a file" if name is not None and not is_temporary else "a shared array"
    remedy = "; choose another temp_folder, or none to use memory" if is_temporary else ""
    text = f"no room for {what} of {nbytes:,} bytes: {why}{remedy}"
    return OSError(number, text) if name is None else OSError(number, text, name)


def name_of_file(fd: int) -> str | None:
    """The path of an open file, or the folder of one without a name; None of memory."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # no /proc
        return None
    if path.startswith("/memfd:"):
        return None
    return os.path.dirname(path) if path.endswith(" (deleted)") else path


def _largest_file(nbytes: int) -> str:
    """What keeps a file from having so many bytes."""
    import resource  # noqa: PLC0415  # POSIX only

    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and soft < nbytes:
        return f"files of this process may have {soft:,} bytes (RLIMIT_FSIZE, `ulimit -f`)"
    return "the file system takes no file of that size"

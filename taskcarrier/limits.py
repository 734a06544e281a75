"""How much memory there is to take, by the kernel and the cgroup."""

from __future__ import annotations

import contextlib
import sys


def check_memory(nbytes: int) -> None:
    """An error with sizes beats the kernel ending the process for want of memory."""
    available, source = _available_memory()
    if nbytes > available:
        raise MemoryError(
            f"a shared array needs {nbytes:,} bytes more, but only {available:,} are available "
            f"({source}); use smaller arrays, fewer at once, or temp_folder= on a disk"
        )


def _available_memory() -> tuple[int, str]:
    """Bytes that can still be used, and what says so; unlimited where nothing tells."""
    limits = [(sys.maxsize, "no limit known")]
    with contextlib.suppress(OSError):
        lines = _text_of("/proc/meminfo").splitlines()
        found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        limits += [(value, "MemAvailable in /proc/meminfo") for value in found]
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit there
            left = int(_text_of(f"{folder}/{limit}")) - int(_text_of(f"{folder}/{used}"))
            limits.append((left + _reclaimable(folder), f"{folder}/{limit}"))
    return min(limits)


def _reclaimable(folder: str) -> int:
    """Bytes of a cgroup's use that are file cache, which the kernel gives back on demand."""
    try:
        lines = [line.split() for line in _text_of(f"{folder}/memory.stat").splitlines()]
    except OSError:
        return 0
    return sum(int(words[1]) for words in lines if words[0] == "inactive_file")


def _text_of(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()

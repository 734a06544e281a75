"""How much memory there is to take, by the kernel and the cgroup."""

from __future__ import annotations

import contextlib
import sys

from taskcarrier import cgroups
from taskcarrier.cgroups import text_of


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
    limits = [(sys.maxsize, "no limit known"), *cgroups.memory_left()]
    with contextlib.suppress(OSError):
        lines = text_of("/proc/meminfo").splitlines()
        found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        limits += [(value, "MemAvailable in /proc/meminfo") for value in found]
    return min(limits)

"""What a process gets when it starts, and keeps: what a fork server may have, and its parent lost.

A worker is forked by a server that was started earlier. It is as it would be if the parent had
started it itself only if these are still the same.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from typing import NamedTuple

# The beginnings of variables that are read once, when a process starts or a library is loaded.
_READ_AT_START = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "NPY_", "OMP_", "GOMP_", "KMP_"),
    *("MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "VECLIB_", "NUMEXPR_", "NUMPY_"),
)

# What has no function in `os` that would tell it: lines of /proc/self/status, and files beside it.
# (`os.umask` tells the mask only by changing it.)
_STATUS_LINES = (b"Umask:", b"SigIgn:", b"Cap", b"NoNewPrivs:", b"Seccomp:", b"Mems_allowed:")
_FILES = ("oom_score_adj", "coredump_filter", "cgroup")


class Inheritance(NamedTuple):
    """What a process would get that is started now by this thread, and can be compared."""

    environment: dict[str, str]
    ids: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    cores: frozenset[int]
    scheduling: tuple[int, int, int]
    groups: tuple[int, int]
    signal_mask: frozenset[int]
    others: tuple[bytes | str, ...]

    @classmethod
    def read(cls, environment: dict[str, str]) -> Inheritance:
        """Return what a process would get now, with these environment variables."""
        limits = (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
        return cls(
            {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)},
            (*os.getresuid(), *os.getresgid(), *os.getgroups()),
            tuple(map(resource.getrlimit, limits)),
            frozenset(os.sched_getaffinity(0)),
            (
                os.sched_getscheduler(0),
                os.sched_getparam(0).sched_priority,
                os.getpriority(os.PRIO_PROCESS, 0),
            ),
            (os.getpgrp(), os.getsid(0)),
            frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            tuple(_iterate_others()),
        )


def _iterate_others() -> Iterator[bytes | str]:
    """Yield what /proc tells of this process; nothing without it."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        yield from (line for line in file if line.startswith(_STATUS_LINES))
    for name in _FILES:
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "rb") as file:
            yield file.read()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/ns"):
            yield os.readlink(f"/proc/self/ns/{name}")

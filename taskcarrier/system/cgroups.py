"""The control groups that this process is in: each may limit its memory and its share of cores.

Limits may be set at any level: Docker sets them at the root that a container sees, systemd and
Slurm further down. So all levels are read, from the process's own group up to where the hierarchy
is mounted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

_GROUPS = "/proc/self/cgroup"
_MOUNTS = "/proc/self/mountinfo"
_UNIFIED = "cgroup2"  # the second version has one hierarchy for everything


def find_memory_left() -> list[tuple[int, str]]:
    """Return the bytes that each limit leaves (file cache counts as free) and the limit's file."""
    left = []
    for folder, version in _find_folders("memory"):
        limit, used = (
            ("memory.max", "memory.current")
            if version == _UNIFIED
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            room = int(read_text(f"{folder}/{limit}")) - int(read_text(f"{folder}/{used}"))
            left.append((room + _count_reclaimable(folder), f"{folder}/{limit}"))
    return left


def count_cores() -> float:
    """Return the number of cores that the tightest limit allows; infinity if there is no limit."""
    shares = [float("inf")]
    for folder, version in _find_folders("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):  # as above
            if version == _UNIFIED:
                quota, period = map(int, read_text(f"{folder}/cpu.max").split())
            else:
                quota = int(read_text(f"{folder}/cpu.cfs_quota_us"))
                period = int(read_text(f"{folder}/cpu.cfs_period_us"))
            if quota > 0:
                shares.append(quota / period)
    return min(shares)


def _find_folders(controller: str) -> Iterator[tuple[str, str]]:
    """Yield folder and version of a controller's groups, from this process's own group up."""
    for version, root, mounted_at, controllers in _find_mounts():
        if version != _UNIFIED and controller not in controllers:
            continue
        own = _find_own_group(version, controller)
        # In a container, the process's own group may lie outside of what is mounted.
        below = os.path.relpath(own, root) if own is not None else "."
        folder = mounted_at if below.startswith("..") else os.path.normpath(f"{mounted_at}/{below}")
        while True:
            yield folder, version
            if folder in {mounted_at, "/"}:
                break
            folder = os.path.dirname(folder)


def _find_mounts() -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield version, root, mount point and controllers of each mounted hierarchy."""
    with suppress(OSError):
        for line in read_text(_MOUNTS).splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            if kind in {"cgroup", _UNIFIED}:
                root, mounted_at = map(_unescape, before.split(" ")[3:5])
                yield kind, root, mounted_at, options.split(",")


def _find_own_group(version: str, controller: str) -> str | None:
    with suppress(OSError):
        for line in read_text(_GROUPS).splitlines():
            number, controllers, path = line.split(":", 2)
            if (number == "0") if version == _UNIFIED else (controller in controllers.split(",")):
                return path
    return None


def _unescape(word: str) -> str:
    return word.encode().decode("unicode_escape") if "\\" in word else word


def _count_reclaimable(folder: str) -> int:
    """Return the bytes of file cache in a group's use, which the kernel frees on demand."""
    try:
        lines = [line.split() for line in read_text(f"{folder}/memory.stat").splitlines()]
    except OSError:
        return 0
    values = {words[0]: int(words[1]) for words in lines}
    # In version 1 only the values with "total_" include the groups below, as the use does.
    return values.get("total_inactive_file", values.get("inactive_file", 0))


def read_text(path: str) -> str:
    """Return the text of a file of the kernel."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()

"""The control groups that this process is in: each may limit its memory and its share of cores.

Limits are set at any level, by Docker at the root that a container sees, by systemd or Slurm
further down. So all levels are asked, from the process's own group up to where the hierarchy is
mounted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

_GROUPS = "/proc/self/cgroup"
_MOUNTS = "/proc/self/mountinfo"
_UNIFIED = "cgroup2"  # the second version has one hierarchy for everything


def memory_left() -> list[tuple[int, str]]:
    """Bytes that each limit leaves, cached files not counted, and the file that says so."""
    left = []
    for folder, version in _folders("memory"):
        limit, used = (
            ("memory.max", "memory.current")
            if version == _UNIFIED
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        with suppress(OSError, ValueError):  # no such file, or "max": no limit there
            room = int(text_of(f"{folder}/{limit}")) - int(text_of(f"{folder}/{used}"))
            left.append((room + _reclaimable(folder), f"{folder}/{limit}"))
    return left


def cores() -> float:
    """The share of cores that the tightest limit allows; infinite if there is none."""
    shares = [float("inf")]
    for folder, version in _folders("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):  # as above
            if version == _UNIFIED:
                quota, period = map(int, text_of(f"{folder}/cpu.max").split())
            else:
                quota = int(text_of(f"{folder}/cpu.cfs_quota_us"))
                period = int(text_of(f"{folder}/cpu.cfs_period_us"))
            if quota > 0:
                shares.append(quota / period)
    return min(shares)


def _folders(controller: str) -> Iterator[tuple[str, str]]:
    """Folders of a controller's groups, from this process's own up, and which version they are."""
    for version, root, mounted_at, controllers in _mounts():
        if version != _UNIFIED and controller not in controllers:
            continue
        own = _own_group(version, controller)
        # Seen from a container, the own group may lie outside of what is mounted.
        below = os.path.relpath(own, root) if own is not None else "."
        folder = mounted_at if below.startswith("..") else os.path.normpath(f"{mounted_at}/{below}")
        while True:
            yield folder, version
            if folder in {mounted_at, "/"}:
                break
            folder = os.path.dirname(folder)


def _mounts() -> Iterator[tuple[str, str, str, list[str]]]:
    """Version, root, place and controllers of each hierarchy that is mounted."""
    with suppress(OSError):
        for line in text_of(_MOUNTS).splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            if kind in {"cgroup", _UNIFIED}:
                root, mounted_at = map(_unescape, before.split(" ")[3:5])
                yield kind, root, mounted_at, options.split(",")


def _own_group(version: str, controller: str) -> str | None:
    with suppress(OSError):
        for line in text_of(_GROUPS).splitlines():
            number, controllers, path = line.split(":", 2)
            if (number == "0") if version == _UNIFIED else (controller in controllers.split(",")):
                return path
    return None


def _unescape(word: str) -> str:
    return word.encode().decode("unicode_escape") if "\\" in word else word


def _reclaimable(folder: str) -> int:
    """Bytes of a group's use that are file cache, which the kernel gives back on demand."""
    try:
        lines = [line.split() for line in text_of(f"{folder}/memory.stat").splitlines()]
    except OSError:
        return 0
    found = {words[0]: int(words[1]) for words in lines}
    # In the first version only what begins so counts groups below, as the use does.
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def text_of(path: str) -> str:
    """What the kernel says in a file."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()

"""The entries of /dev/shm that a process tree has made or holds; all programs use the folder."""

import re
from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED = Path("/dev/shm")
# joblib, loky and others put the number of the process into a name, delimited by other characters.
NUMBER = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")
# Semaphores of multiprocessing have random names, in which a digit may stand alone.
RANDOM = "sem.mp-"


class SharedMemoryWatch:
    """The means to tell the entries of one process tree from those of other programs.

    The kernel keeps no record of who made a file. An entry belongs to the tree if one of its
    processes has it open or mapped, or if its name carries the number of a process that is in the
    tree or has ended. An entry that was there before the watch began, or that was once seen while
    another program had its number, never belongs to the tree by its name. An entry without a
    number in its name that is neither open nor mapped cannot be assigned and is not counted.
    """

    def __init__(self) -> None:
        self.of_others = all_entries()

    def entries_of(self, family: set[int], present: set[Path]) -> set[Path]:
        """Return the `present` entries that belong to the tree of `family`, its living processes.

        List the entries first, then the processes, so that the maker of a new entry is among them.
        """
        if not present:
            return set()
        living = set(psutil.pids())
        made = set()
        for path in present - self.of_others:
            maker = maker_of(path)
            if maker is None:
                continue
            if maker in living and maker not in family:
                self.of_others.add(path)
            else:
                made.add(path)
        return made | (held_by(family) & present)


def all_entries() -> set[Path]:
    return set(SHARED.iterdir()) if SHARED.is_dir() else set()


def maker_of(path: Path) -> int | None:
    """Return the number of the process that made an entry, if its name has one."""
    if path.name.startswith(RANDOM):
        return None
    found = NUMBER.search(path.name)
    return int(found[0]) if found else None


def held_by(pids: Iterable[int]) -> set[Path]:
    """Return the entries, or their topmost folders, that these processes have open or mapped."""
    held = set()
    for pid in pids:
        for path in files_of(pid):
            if path.startswith(f"{SHARED}/"):
                held.add(SHARED / Path(path).relative_to(SHARED).parts[0])
    return held


def files_of(pid: int) -> Iterable[str]:
    folder = Path(f"/proc/{pid}")
    try:
        maps = (folder / "maps").read_text()
        links = list((folder / "fd").iterdir())
    except OSError:  # the process has ended
        return
    for line in maps.splitlines() if f" {SHARED}/" in maps else ():
        _, slash, rest = line.partition(" /")
        if slash:
            yield f"/{rest.strip()}"
    for link in links:
        try:
            yield str(link.readlink())
        except OSError:  # closed since
            continue

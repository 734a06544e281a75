"""The ledger of a pool of processes, which lies in files that all of them have open."""

from __future__ import annotations

import mmap

from taskcarrier.scheduling.counters import FileCounter, FileSetOnce
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger


def open_ledger(words_fd: int, counter_fd: int, set_once_fd: int) -> Ledger:
    """Return the ledger of a pool, over the pool's files."""
    memory = memoryview(mmap.mmap(words_fd, 0))
    words, marks = memory[:-OWN_MARKS].cast("q"), memory[-OWN_MARKS:]
    return Ledger(words, FileCounter(counter_fd), FileSetOnce(set_once_fd), marks)

"""The ledger of a pool, over files that its workers have open too."""

import mmap
import os

from taskcarrier.scheduling.counters import FileCounter, FileSetOnce
from taskcarrier.scheduling.ledger import OWN_MARKS, SENT, ledger_nbytes
from taskcarrier.workers.processes.shared_ledger import open_ledger

fds = [os.memfd_create("words"), FileCounter.create(), FileSetOnce.create()]
try:
    os.ftruncate(fds[0], ledger_nbytes(2) + OWN_MARKS)
    one, other = open_ledger(*fds), open_ledger(*fds)
    one.set_marks(None, OWN_MARKS)
    one.marks[:] = bytes([SENT]) * OWN_MARKS
    one.reset(2)
    one.claim(1)
    one.finish(1, 7)
    one.set_start_time(1, 99)
    # The other, as in another process, sees all of it.
    other.set_marks(None, OWN_MARKS)
    assert bytes(other.marks) == bytes([SENT]) * OWN_MARKS
    assert (other.n_items_of(1), other.start_time_ns(1), other.n_claimed()) == (7, 99, 1)
    with mmap.mmap(fds[0], 0) as memory:
        assert bytes(memory[-OWN_MARKS:]) == bytes([SENT]) * OWN_MARKS
finally:
    for fd in fds:
        os.close(fd)

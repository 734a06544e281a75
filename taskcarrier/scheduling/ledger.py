"""The one shared record of a run: which chunk is next, and what each worker has in hand.

A ledger is a counter, a few words per worker and, where workers can die, a byte per chunk. Workers
only ever write their own words; nobody takes a lock that a dying worker could keep.

Claiming a chunk. Measured with two claimers contending on a two-core machine, as multiples of the
first way, which took 0.5 µs on a quiet machine (`python -m bench claims`; medians, smallest to
largest):

=================================================  ===============  ==============================
way                                                          times  what speaks against it
=================================================  ===============  ==============================
``lseek(fd, 1, SEEK_CUR)``, memfd opened by /proc                1  nothing: processes use it
``lseek`` on the memfd as it was created                       0.8  up to 0.6 % of claims double
counter under a `threading.Lock`                               0.4  one process only: threads do
one byte with ``O_APPEND``, then the position      3.1 (2.4 - 4.4)  a byte of memory for each chunk
``flock``                                          2.8 (2.0 - 4.0)  kept by a dead claimer's child
POSIX record locks                                 3.8 (2.7 - 5.7)  lost when another fd is closed
=================================================  ===============  ==============================

A file from ``memfd_create`` itself does not ask the kernel to serialise its position; the
same file opened again through ``/proc/self/fd`` does, so that is what is used (no double
claim in 720,000).

Compiled loops claim from a word, by one atomic instruction (10 ns; `taskcarrier.arrays.kernels.compiler`).

Marks. Beside the words there is a byte for each chunk, which the worker that has finished it sets.
Whoever dies, wherever in its code, the marks say which chunks are still to be run; so a claim that
nobody has written down is found again, and so is a result that was sent and never arrived. In a
file they outlive every process (`taskcarrier.arrays.resume.ledger_file`).

Agreeing. Workers can settle on one value, whoever speaks first (`Ledger.propose`): the first
record of a file opened for appending. The kernel puts appended records one after the other.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from taskcarrier.memory.strides import ALIGNMENT, address_of
from taskcarrier.scheduling.counters import Counter, SetOnce, ThreadCounter, ThreadSetOnce

# The words of a ledger (signed 64-bit): a row for what all look at, one for what all change, then
# one for each worker.
# 128 bytes: two workers never write one cache line, nor one of a pair, which are fetched together.
_ROW = 16
_HALTED = 0
_CURSOR = _ROW  # where compiled loops claim
_IN_HAND, _ITEMS, _ITEM, _RANGES, _SINCE, _ATTEMPTS_DONE = range(6)

# For compiled loops: bytes from the first word, and from a worker's row.
COUNTER_AT = 8 * _CURSOR
IN_HAND_AT, ITEMS_AT, ITEM_AT, RANGES_AT = (8 * n for n in (_IN_HAND, _ITEMS, _ITEM, _RANGES))

_NOTHING = -1  # in hand: no chunk
_CLAIMING = -2  # in hand: about to get one from the counter
_ATTEMPT_BASE = -3  # in hand: this minus the number of a range that was given out again

PENDING = 0
"""Mark of a chunk that nobody has finished."""
DONE = 1
"""Mark of a chunk whose result is where it belongs."""
SENT = 2
"""Mark of a chunk whose result is on its way to the caller."""
RECLAIMED = 3
"""Mark of a chunk that the caller gives out again, whole or in pieces."""
OWN_MARKS = 4096
"""So many chunks are marked beside the words; no grid has more by default."""


def ledger_nbytes(n_workers: int) -> int:
    """Bytes of a ledger's words for so many workers."""
    return 8 * _ROW * (2 + n_workers)


class Ledger:
    """What is taken and in hand, over words that all workers of a run can see.

    Parameters
    ----------
    words : memoryview or list of int
        Writable signed 64-bit words, at least ``ledger_nbytes(n_workers) / 8`` of them.
    counter : Counter
        Gives out the next chunk.
    agreement : SetOnce
        Where workers settle on a value.
    own_marks : memoryview, optional
        `OWN_MARKS` writable bytes that all workers of a run can see.
    """

    address: int
    """Where the words lie in memory; only of one that is `with_address`."""

    marks: memoryview | None = None
    """A byte for each chunk; None where no worker can die and nothing is to be resumed."""

    def __init__(
        self,
        words: memoryview | list[int],
        cursor: Counter,
        agreement: SetOnce,
        own_marks: memoryview | None = None,
    ) -> None:
        self._words = words
        self._cursor = cursor
        self._agreement = agreement
        self._own_marks = own_marks
        self._items_before = 0  # of workers whose place others have taken

    @classmethod
    def local(cls, n_workers: int) -> Self:
        """A fresh ledger for the workers of this process."""
        ledger = cls([0] * (ledger_nbytes(n_workers) // 8), ThreadCounter(), ThreadSetOnce())
        ledger.reset(n_workers)
        return ledger

    @classmethod
    def with_address(cls, n_workers: int) -> Self:
        """A fresh one for compiled loops in threads of this process, which know where words lie."""
        buffer = np.zeros(ledger_nbytes(n_workers) + ALIGNMENT, np.uint8)
        address = address_of(buffer)
        begin = -address % ALIGNMENT
        words = buffer[begin : begin + ledger_nbytes(n_workers)].data.cast("q")
        ledger = cls(words, ThreadCounter(), ThreadSetOnce())
        ledger.address = address + begin
        ledger.reset(n_workers)
        return ledger

    def reset(self, n_workers: int) -> None:
        """Forget the last run. No worker may be at work."""
        words = self._words
        words[_HALTED] = 0
        for worker in range(n_workers):
            self.begin(worker)
        self._items_before = 0
        words[_CURSOR] = 0
        self._cursor.reset()
        self._agreement.reset()

    def begin(self, worker: int) -> None:
        """Have nothing written down of a worker: it, or one in its place, is about to begin."""
        row = _row(worker)
        self._items_before += self._words[row + _ITEMS]
        self._words[row + _IN_HAND] = _NOTHING
        for word in (_ITEMS, _RANGES, _SINCE, _ATTEMPTS_DONE):
            self._words[row + word] = 0

    def set_marks(self, given: memoryview | None, n_chunks: int) -> None:
        """Where the chunks of a run are marked: in bytes that were given, else in its own if any."""
        own = self._own_marks
        self.marks = given if given is not None or own is None else own[:n_chunks]

    def chunks_marked(self, mark: int) -> list[int]:
        """The chunks with this mark; none where chunks are not marked."""
        if self.marks is None:
            return []
        return np.flatnonzero(np.frombuffer(self.marks, np.uint8) == mark).tolist()

    # What workers do

    def claim(self, worker: int) -> int:
        """Take the next chunk off the counter; it is in the worker's hand from then on."""
        words = self._words
        chunk_in_hand = _row(worker) + _IN_HAND
        words[chunk_in_hand] = _CLAIMING
        index = self._cursor.advance()
        words[chunk_in_hand] = index
        return index

    def hold(self, worker: int, index: int) -> None:
        """Take a chunk that is the worker's own by the rule of balance."""
        self._words[_row(worker) + _IN_HAND] = index

    def hold_attempt(self, worker: int, number: int) -> None:
        """Take a range that was given out again to this worker: the one with that number."""
        self._words[_row(worker) + _IN_HAND] = _ATTEMPT_BASE - number

    def set_start_time(self, worker: int, now_ns: int) -> None:
        """When the worker has begun with what it has in hand."""
        self._words[_row(worker) + _SINCE] = now_ns

    def finish(self, worker: int, n_items: int) -> None:
        """The chunk in hand is finished: so many items more."""
        row = _row(worker)
        self._words[row + _SINCE] = 0  # first, or the next chunk is charged with this one's time
        self._words[row + _IN_HAND] = _NOTHING
        self._words[row + _ITEMS] += n_items

    def finish_attempt(self, worker: int, number: int, n_items: int) -> None:
        """A range that was given out again is finished; the ones before it were earlier."""
        self._words[_row(worker) + _ATTEMPTS_DONE] = number + 1
        self.finish(worker, n_items)

    def propose(self, proposal: Any) -> Any:
        """What the workers of this run have settled on: the first proposal of all."""
        return self._agreement.propose(proposal)

    def halt(self) -> None:
        """Ask every worker to stop at its next chunk."""
        self._words[_HALTED] = 1

    def resume(self) -> None:
        """Take back what `halt` asked for, from workers that have not seen it yet."""
        self._words[_HALTED] = 0

    @property
    def is_halted(self) -> bool:
        """Whether workers were asked to stop."""
        return self._words[_HALTED] != 0

    # What the caller reads

    def n_items_done(self, n_workers: int) -> int:
        """Items finished so far by all workers."""
        return self._items_before + sum(self.n_items_of(worker) for worker in range(n_workers))

    def n_items_of(self, worker: int) -> int:
        """Items finished so far by one worker."""
        return self._words[_row(worker) + _ITEMS]

    def row_address(self, worker: int) -> int:
        """Where the words of one worker lie in memory."""
        return self.address + 8 * _row(worker)

    def n_ranges_of(self, worker: int) -> int:
        """Ranges that a compiled loop has finished."""
        return self._words[_row(worker) + _RANGES]

    def count(self, worker: int, n_items: int, *, finished: bool) -> None:
        """Items of a range that a compiled loop has left half done, and whether it was the rest."""
        row = _row(worker)
        self._words[row + _ITEMS] += n_items
        if finished:
            self._words[row + _RANGES] += 1

    def loop_position(self, worker: int) -> tuple[int, int]:
        """The chunk that a compiled loop has in hand, -1 if none, and the item it came to."""
        row = _row(worker)
        return self._words[row + _IN_HAND], self._words[row + _ITEM]

    def first_proposal(self) -> Any:
        """What the workers have settled on; None if nobody has proposed anything."""
        return self._agreement.get()

    def n_claimed(self) -> int:
        """Chunks below this number were claimed from the counter."""
        return self._cursor.position()

    def chunk_in_hand(self, worker: int, n_chunks: int) -> int | None:
        """The chunk of the grid that a worker has in hand, or None.

        Of one that died while it claimed, the chunk is told by its mark alone.
        """
        index = self._words[_row(worker) + _IN_HAND]
        return index if 0 <= index < n_chunks else None

    def attempt_in_hand(self, worker: int) -> int | None:
        """The number of the range in hand, if that was given out again."""
        loop_position = self._words[_row(worker) + _IN_HAND]
        return _ATTEMPT_BASE - loop_position if loop_position <= _ATTEMPT_BASE else None

    def n_attempts_done(self, worker: int) -> int:
        """How many of the ranges given out again to this worker are finished."""
        return self._words[_row(worker) + _ATTEMPTS_DONE]

    def start_time_ns(self, worker: int) -> int:
        """When the worker has begun with what it has in hand (ns), 0 if that was not noted."""
        return self._words[_row(worker) + _SINCE]


def _row(worker: int) -> int:
    return _ROW * (2 + worker)

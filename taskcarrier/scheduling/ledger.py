"""The shared record of a run: which chunk is next, and what each worker has in hand.

A ledger is a counter, a few words per worker and, where workers can die, a byte per chunk. Workers
write only their own words, and take no lock that could stay locked when a worker dies.

Claiming a chunk. Measured with two workers that claim at the same time on a two-core machine, as
multiples of the first way, which took 0.5 µs on a quiet machine (`python -m bench claims`; medians,
smallest to largest):

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

The kernel does not serialise the position of a file as ``memfd_create`` returns it. It does for the
same file opened again through ``/proc/self/fd``, so processes use that (no double claim in
720,000).

Compiled loops claim from a word, by one atomic instruction (10 ns;
`taskcarrier.arrays.kernels.loops`).

Marks. Beside the words there is a byte for each chunk. The worker that finishes the chunk sets it.
Wherever in its code a worker dies, the marks say which chunks are still to be run. So a claim that
the worker did not record is found, and so is a result that was sent but never arrived. In a file,
marks outlive every process (`taskcarrier.arrays.resume.ledger_file`).

Set once. Workers can agree on one value, and the first proposal decides (`Ledger.propose`): it is
the first record of a file opened for appending. The kernel appends records one after the other.

An example. The row of worker 1 while it runs chunk 7, of 526 items, under dynamic balance with a
time limit; it has run three chunks before. ``ITEM`` and ``RANGES`` are words of compiled loops.

==============================  =======  =====  ====  ======  =========  =============  =======
the worker ...                  IN_HAND  ITEMS  ITEM  RANGES      SINCE  ATTEMPTS_DONE  mark 7
==============================  =======  =====  ====  ======  =========  =============  =======
has finished its third chunk         -1   1578     0       0          0              0  PENDING
is about to claim                    -2   1578     0       0          0              0  PENDING
has claimed chunk 7                   7   1578     0       0          0              0  PENDING
calls the function                    7   1578     0       0  123456789              0  PENDING
has the result, in place              7   1578     0       0          0              0  PENDING
has marked the chunk                  7   1578     0       0          0              0  DONE
has finished it                      -1   2104     0       0          0              0  DONE
==============================  =======  =====  ====  ======  =========  =============  =======

A worker that dies at any of these steps leaves chunk 7 with the mark that says what to do:
run it again while it is ``PENDING``, nothing once it is ``DONE``. ``IN_HAND`` says who had it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np

from taskcarrier.memory.strides import ALIGNMENT, address_of
from taskcarrier.scheduling.counters import Counter, SetOnce, ThreadCounter, ThreadSetOnce

# The words of a ledger (signed 64-bit): a row that all workers read, a row that all workers change,
# then one row for each worker. A row has 128 bytes, so that two workers never write to one cache
# line, nor to the two lines of a pair, which are fetched together.
_ROW = 16
_HALTED = 0
_COUNTER = _ROW  # from which compiled loops claim
_IN_HAND, _ITEMS, _ITEM, _RANGES, _SINCE, _ATTEMPTS_DONE = range(6)

# Offsets in bytes, for compiled loops: from the first word, and from the start of a worker's row.
COUNTER_AT = 8 * _COUNTER
IN_HAND_AT, ITEMS_AT, ITEM_AT, RANGES_AT = (8 * n for n in (_IN_HAND, _ITEMS, _ITEM, _RANGES))

_NOTHING = -1  # in hand: no chunk and no attempt
_CLAIMING = -2  # in hand: a chunk that is being taken from the counter
_ATTEMPT_BASE = -3  # in hand: this minus the position of an attempt

PENDING = 0
"""The mark of a chunk that is not finished."""
DONE = 1
"""The mark of a chunk whose result is in place."""
SENT = 2
"""The mark of a chunk whose result is on its way to the parent."""
RECLAIMED = 3
"""The mark of a chunk that the parent has taken back, to be run again whole or in parts."""
OWN_MARKS = 4096
"""The number of chunks that can be marked beside the words; no grid has more by default."""


def ledger_nbytes(n_workers: int) -> int:
    """Return the bytes that the words of a ledger for `n_workers` take."""
    return 8 * _ROW * (2 + n_workers)


class Begun(NamedTuple):
    """What was done of a run before its workers begin.

    Attributes
    ----------
    first : int
        The first chunk that is not finished.
    n_items : int
        The number of items that were finished.
    proposal : object
        What was agreed on; None if nothing.
    """

    first: int = 0
    n_items: int = 0
    proposal: Any = None


NOT_BEGUN = Begun()


class Ledger:
    """The shared record of a run, in words that all its workers can see.

    Parameters
    ----------
    words : memoryview or list of int
        Writable signed 64-bit words, at least ``ledger_nbytes(n_workers) / 8`` of them.
    counter : Counter
        The counter that gives out the next chunk.
    set_once : SetOnce
        The value on which workers agree.
    own_marks : memoryview, optional
        `OWN_MARKS` writable bytes that all workers of a run can see.
    """

    address: int
    """The address of the words; set only by `with_address`."""

    marks: memoryview | None = None
    """A byte for each chunk; None if no worker can die and the run cannot be resumed."""

    def __init__(
        self,
        words: memoryview | list[int],
        counter: Counter,
        set_once: SetOnce,
        own_marks: memoryview | None = None,
    ) -> None:
        self._words = words
        self._counter = counter
        self._set_once = set_once
        self._own_marks = own_marks
        self._items_before = 0  # of workers that were replaced

    @classmethod
    def local(cls, n_workers: int, begun: Begun = NOT_BEGUN) -> Self:
        """Return a new ledger for the threads of this process."""
        ledger = cls([0] * (ledger_nbytes(n_workers) // 8), ThreadCounter(), ThreadSetOnce())
        ledger.reset(n_workers, begun)
        return ledger

    @classmethod
    def with_address(cls, n_workers: int, begun: Begun = NOT_BEGUN) -> Self:
        """Return a new ledger for compiled loops in threads of this process, with its `address`."""
        buffer = np.zeros(ledger_nbytes(n_workers) + ALIGNMENT, np.uint8)
        address = address_of(buffer)
        begin = -address % ALIGNMENT
        words = buffer[begin : begin + ledger_nbytes(n_workers)].data.cast("q")
        ledger = cls(words, ThreadCounter(), ThreadSetOnce())
        ledger.address = address + begin
        ledger.reset(n_workers, begun)
        return ledger

    def reset(self, n_workers: int, begun: Begun = NOT_BEGUN) -> None:
        """Forget the last run, and go on from what was done of this one. No worker may run."""
        words = self._words
        words[_HALTED] = 0
        for worker in range(n_workers):
            self.clear_row(worker)
        self._items_before = begun.n_items
        self.go_on(begun.first)
        self._set_once.reset()
        if begun.proposal is not None:
            self._set_once.propose(begun.proposal)

    def reset_shares(self, n_workers: int, n_chunks: int) -> None:
        """Forget the last run as `reset` does, for one under static balance in which none proposes.

        No chunk is marked.
        """
        self._words[_HALTED] = 0
        for worker in range(n_workers):
            self.clear_row(worker)
        self._items_before = 0
        self.set_marks(None, n_chunks)
        if self.marks is not None:
            self.marks[:] = bytes(n_chunks)

    def go_on(self, first: int) -> None:
        """Give out chunks from `first` on: those before were taken in another way."""
        self._words[_COUNTER] = first
        self._counter.reset(first)

    def count_before(self, n_items: int) -> None:
        """Count items that were finished by others than the workers of this ledger."""
        self._items_before += n_items

    def clear_row(self, worker: int) -> None:
        """Clear the row of a worker that is about to begin, or to replace one that died."""
        row = _row(worker)
        self._items_before += self._words[row + _ITEMS]
        self._words[row + _IN_HAND] = _NOTHING
        for word in (_ITEMS, _RANGES, _SINCE, _ATTEMPTS_DONE):
            self._words[row + word] = 0

    def set_marks(self, marks: memoryview | None, n_chunks: int) -> None:
        """Have chunks marked in `marks`, or if that is None, in the ledger's own bytes, if any."""
        own = self._own_marks
        self.marks = marks if marks is not None or own is None else own[:n_chunks]

    def find_marked(self, mark: int) -> list[int]:
        """Return the chunks with this mark; none if chunks are not marked."""
        if self.marks is None:
            return []
        return np.flatnonzero(np.frombuffer(self.marks, np.uint8) == mark).tolist()

    # What workers do

    def claim(self, worker: int) -> int:
        """Take the next chunk from the counter; the worker has it in hand from then on."""
        words = self._words
        in_hand = _row(worker) + _IN_HAND
        words[in_hand] = _CLAIMING
        index = self._counter.advance()
        words[in_hand] = index
        return index

    def stop_claims(self, n_chunks: int) -> int:
        """Leave nothing to be claimed; return the first of `n_chunks` chunks that was left."""
        return min(n_chunks, self._counter.advance(n_chunks))

    def hold(self, worker: int, index: int) -> None:
        """Take in hand a chunk that static balance has given to this worker."""
        self._words[_row(worker) + _IN_HAND] = index

    def hold_attempt(self, worker: int, position: int) -> None:
        """Take in hand the attempt at this position, from 0, among those given to this worker."""
        self._words[_row(worker) + _IN_HAND] = _ATTEMPT_BASE - position

    def set_start_time(self, worker: int, now_ns: int) -> None:
        """Record when the worker began what it has in hand; 0 to forget it."""
        self._words[_row(worker) + _SINCE] = now_ns

    def finish(self, worker: int, n_items: int) -> None:
        """Record that the chunk in hand is finished, which had `n_items` items."""
        row = _row(worker)
        self._words[row + _SINCE] = 0  # first, or this chunk's time is charged to the next one
        self._words[row + _IN_HAND] = _NOTHING
        self._words[row + _ITEMS] += n_items

    def finish_attempt(self, worker: int, position: int, n_items: int) -> None:
        """Record that the attempt at this position is finished, as all before it are already."""
        self._words[_row(worker) + _ATTEMPTS_DONE] = position + 1
        self.finish(worker, n_items)

    def propose(self, proposal: Any) -> Any:
        """Propose a value, and return the first proposal of all workers, which decides."""
        return self._set_once.propose(proposal)

    def halt(self) -> None:
        """Ask all workers to stop before their next chunk."""
        self._words[_HALTED] = 1

    def resume(self) -> None:
        """Take back the request of `halt`; workers that have seen it already stop."""
        self._words[_HALTED] = 0

    @property
    def is_halted(self) -> bool:
        """Whether workers are asked to stop."""
        return self._words[_HALTED] != 0

    # What the parent reads

    def n_items_done(self, n_workers: int) -> int:
        """Return how many items all workers have finished so far."""
        return self._items_before + sum(self.n_items_of(worker) for worker in range(n_workers))

    def n_items_of(self, worker: int) -> int:
        """Return how many items one worker has finished so far."""
        return self._words[_row(worker) + _ITEMS]

    def row_address(self, worker: int) -> int:
        """Return the address of the words of one worker."""
        return self.address + 8 * _row(worker)

    def n_ranges_of(self, worker: int) -> int:
        """Return how many ranges a compiled loop has finished."""
        return self._words[_row(worker) + _RANGES]

    def count(self, worker: int, n_items: int, *, finished: bool) -> None:
        """Count items of a range that a compiled loop broke off; `finished` if none are left."""
        row = _row(worker)
        self._words[row + _ITEMS] += n_items
        if finished:
            self._words[row + _RANGES] += 1

    def loop_position(self, worker: int) -> tuple[int, int]:
        """Return the chunk that a compiled loop has in hand, -1 if none, and its current item."""
        row = _row(worker)
        return self._words[row + _IN_HAND], self._words[row + _ITEM]

    def first_proposal(self) -> Any:
        """Return the first proposal of all workers, or None if there is none yet."""
        return self._set_once.get()

    def n_claimed(self) -> int:
        """Return how many chunks were claimed from the counter: all below this index."""
        return self._counter.position()

    def chunk_in_hand(self, worker: int, n_chunks: int) -> int | None:
        """Return the chunk of the grid that a worker has in hand, or None.

        It is None too if the worker died while it claimed; then only the mark of the chunk, which
        is still `PENDING`, shows that it was lost.
        """
        index = self._words[_row(worker) + _IN_HAND]
        return index if 0 <= index < n_chunks else None

    def attempt_in_hand(self, worker: int) -> int | None:
        """Return the position of the attempt that a worker has in hand, or None."""
        in_hand = self._words[_row(worker) + _IN_HAND]
        return _ATTEMPT_BASE - in_hand if in_hand <= _ATTEMPT_BASE else None

    def n_attempts_done(self, worker: int) -> int:
        """Return how many of the attempts given to this worker are finished."""
        return self._words[_row(worker) + _ATTEMPTS_DONE]

    def start_time_ns(self, worker: int) -> int:
        """Return when the worker began what it has in hand (ns), 0 if that was not recorded."""
        return self._words[_row(worker) + _SINCE]


def _row(worker: int) -> int:
    """Return the index of the first word of a worker's row."""
    return _ROW * (2 + worker)

"""How the items of a list get to worker processes when the caller has begun the map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from taskcarrier.lists.task import Calls, PackedTask
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import describe_items
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.processes.packed_chunks import PackedChunks, pickle_chunks
from taskcarrier.workers.snapshots import Snapshot
from taskcarrier.workers.task import Task

# A list of more items than this for each further worker can wait for help until the end of a chunk:
# then the caller has done less than 1/32 of its share alone.
_FEW_ITEMS = 32
# Objects that take longer to pickle, all together, are pickled when they are needed: this much may
# be in vain.
_EARLY_SECONDS = 0.001

_PLAIN = {type(None), bool, int, float, complex, str, bytes, range, *np.sctypeDict.values()}
_COLLECTIONS = {tuple, list, set, frozenset}
# Items with more parts than this are not looked through; arbitrary.
_MAX_PARTS = 100_000


class ListMove:
    """The move of a map over a list (`taskcarrier.workers.task.Move`).

    It is made before the caller calls the function. A few objects of the user's are pickled then:
    pickling them is code of the user's, which runs in no other thread, and the caller may be in its
    first chunk for long. With `are_long`, the items are known to take long.
    """

    def __init__(
        self,
        calls: Calls,
        items: Sequence[Any],
        grid: ChunkGrid,
        staging: Staging,
        n_workers: int,
        *,
        are_long: bool = False,
    ) -> None:
        self.notes: Sequence[str] = ()
        self.snapshot = Snapshot(calls.call, lambda: calls.call, staging)
        self._calls = calls
        self._items = items
        self._grid = grid
        self._pickles: list[bytes] | None = None
        self._error: Exception | None = None
        is_short = len(items) <= _FEW_ITEMS * (n_workers - 1)
        self._is_plain = None if not is_short else is_plain(items)
        if self._is_plain is False:
            self._pickle_early(math.inf if are_long else _EARLY_SECONDS)

    def _pickle_early(self, seconds: float) -> None:
        pickles = []
        begin = perf_counter()
        try:
            for pickled in self._pickle(1):
                pickles.append(pickled)
                if perf_counter() - begin > seconds:
                    break
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self._error = error
        if len(pickles) == len(self._grid):
            self._pickles = pickles

    def _pickle(self, first: int) -> Any:
        describe = partial(describe_items, noun=self._calls.noun)
        return pickle_chunks(
            lambda start, stop: self._items[start:stop], self._grid, describe, first
        )

    @property
    def runs_user_code(self) -> bool:
        """Whether there are objects that are still to be pickled."""
        if self._pickles is not None or self._error is not None:
            return False
        if self._is_plain is None:
            self._is_plain = is_plain(self._items)
        return not self._is_plain

    def make_task(self, first: int) -> Task:
        """Return the task for processes, with the items from chunk `first` on."""
        if self._error is not None:
            raise self._error
        pickles = self._pickles or self._pickle(first)
        packed_chunks = PackedChunks.from_pickles(pickles, self.snapshot.staging)
        return PackedTask(self._calls, packed_chunks, self._grid.chunksize)

    def count_item_bytes(self) -> tuple[float, float]:
        """Return zeros: the bytes of items and results are not known."""
        return 0.0, 0.0

    def begin(self) -> None:
        """Do nothing: results are for the caller."""

    def carry(self, items: tuple[int, int], proposal: Any, agreed: Any) -> None:
        """Do nothing: the caller's results are delivered already."""


def is_plain(items: Sequence[Any]) -> bool:
    """Return whether objects are pickled without code of the user's: numbers, text, arrays.

    Collections of such objects count, too.
    """
    if type(items) is range:
        return True
    candidates = list(items)
    n_parts = len(candidates)
    while candidates and n_parts <= _MAX_PARTS:
        value = candidates.pop()
        kind = type(value)
        if kind in _PLAIN or (kind is np.ndarray and not value.dtype.hasobject):
            continue
        if kind is dict:
            candidates += [*value.keys(), *value.values()]
            n_parts += 2 * len(value)
        elif kind in _COLLECTIONS:
            candidates += value
            n_parts += len(value)
        else:
            return False
    return not candidates

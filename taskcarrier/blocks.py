"""Python objects for worker processes: pickled once, by cells, into the run's shared memory.

Whoever comes to run a cell finds it there, so static and dynamic balance ship the same bytes and
taking a block costs no message.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.backends.given import add_note
from taskcarrier.partition import Grid
from taskcarrier.segments import SharedView, Staging


@dataclass(frozen=True, eq=False)
class Blocks:
    """One pickle for each cell of a grid, one after the other, and where each ends."""

    packed: SharedView
    ends: SharedView

    @classmethod
    def pack(
        cls,
        read: Callable[[int, int], object],
        grid: Grid,
        staging: Staging,
        describe: Callable[[int, int], str],
    ) -> Blocks:
        """Pickle what `read` returns for each cell; an error names the cell by `describe`."""
        from taskcarrier.backends.parcels import pack_items  # noqa: PLC0415  # loads joblib

        packed = bytearray()
        ends = np.empty(len(grid), np.int64)
        for cell in range(len(grid)):
            start, stop = grid.bounds(cell)
            try:
                packed += pack_items(read(start, stop))
            except Exception as error:
                add_note(
                    error,
                    f"taskcarrier could not pickle {describe(start, stop)} for worker processes; "
                    "use backend='threading' if they cannot be pickled",
                )
                raise
            ends[cell] = len(packed)
        return cls(*staging.share([np.frombuffer(packed, np.uint8), ends]))

    def open(self) -> Callable[[int], Any]:
        """In a worker: a function that takes a cell's number and returns what was packed."""
        packed = memoryview(self.packed.open("read").data)
        ends = [0, *self.ends.open("read").tolist()]
        return lambda cell: pickle.loads(packed[ends[cell] : ends[cell + 1]])

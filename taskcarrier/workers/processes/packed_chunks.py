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

from taskcarrier.memory.mapping_cache import open_for_reading
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note
from taskcarrier.scheduling.grid import Grid


@dataclass(frozen=True, eq=False)
class Blocks:
    """One pickle for each cell of a grid, one after the other, and where each begins and ends.

    The pickles lie in the segment of that table.
    """

    bounds: SharedView

    @classmethod
    def pack(
        cls,
        read: Callable[[int, int], object],
        grid: Grid,
        staging: Staging,
        describe: Callable[[int, int], str],
    ) -> Blocks:
        """Pickle what `read` returns for each cell; an error names the cell by `describe`."""
        from taskcarrier.workers.pickling import pack_items  # noqa: PLC0415  # loads joblib

        packed = bytearray()
        ends = [0]
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
            ends.append(len(packed))
        _, begin = staging.add(memoryview(packed))
        return cls(*staging.share([np.array(ends, np.int64) + begin]))

    def open(self) -> Callable[[int], Any]:
        """In a worker: a function that takes a cell's number and returns what was packed."""
        segment, bounds = self.bounds.segment, open_for_reading(self.bounds).data
        assert segment is not None  # for the type checker: there is a table

        def block(cell: int) -> Any:
            return pickle.loads(segment.read(bounds[cell], bounds[cell + 1]))

        return block

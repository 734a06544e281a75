"""Python objects for worker processes, pickled once, chunk by chunk, into the run's shared memory.

Every worker can read every chunk there. So static and dynamic balance ship the same bytes, and
taking a chunk costs no message.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from taskcarrier.memory.mapping_cache import open_for_reading
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.scheduling.grid import ChunkGrid


@record
class PackedChunks:
    """One pickle for each chunk of a grid, one after the other, and a table of their bounds.

    The pickles lie in the segment of the table.
    """

    bounds: SharedView

    @classmethod
    def pack(
        cls,
        read: Callable[[int, int], object],
        grid: ChunkGrid,
        staging: Staging,
        describe: Callable[[int, int], str],
    ) -> PackedChunks:
        """Pickle what `read` returns for each chunk; errors name the chunk as `describe` does."""
        from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # loads joblib

        packed = bytearray()
        ends = [0]
        for index in range(len(grid)):
            start, stop = grid.range_of(index)
            try:
                packed += pickle_items(read(start, stop))
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
        """Return, in a worker, a function that takes a chunk's index and returns its objects."""
        segment, bounds = self.bounds.segment, open_for_reading(self.bounds).data
        assert segment is not None  # for the type checker: there is a table

        def read_chunk(index: int) -> Any:
            return pickle.loads(segment.read(bounds[index], bounds[index + 1]))

        return read_chunk

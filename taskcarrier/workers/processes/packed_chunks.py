"""Python objects for worker processes, pickled once, chunk by chunk, into the run's shared memory.

Every worker can read every chunk there. So static and dynamic balance ship the same bytes, and
taking a chunk costs no message.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from taskcarrier.memory.mapping_cache import open_for_reading
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.scheduling.grid import ChunkGrid


def pickle_chunks(
    read: Callable[[int, int], object],
    grid: ChunkGrid,
    describe: Callable[[int, int], str],
    first: int = 0,
) -> Iterator[bytes]:
    """Yield a pickle of what `read` returns for each chunk; nothing for those before `first`.

    Errors name the chunk as `describe` does.
    """
    from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # slow to import

    for index in range(len(grid)):
        start, stop = grid.range_of(index)
        try:
            yield b"" if index < first else pickle_items(read(start, stop))
        except Exception as error:
            add_note(
                error,
                f"taskcarrier could not pickle {describe(start, stop)} for worker processes; "
                "use backend='threading' if they cannot be pickled",
            )
            raise


@record
class PackedChunks:
    """One pickle for each chunk of a grid, one after the other, and a table of their bounds.

    The pickles lie in the segment of the table.
    """

    bounds: SharedView

    @classmethod
    def from_pickles(cls, pickles: Iterable[bytes], staging: Staging) -> PackedChunks:
        """Copy the pickles of all chunks to `staging`."""
        packed = bytearray()
        ends = [0]
        for pickled in pickles:
            packed += pickled
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

"""Python objects for worker processes: pickled once, by cells, into the run's shared memory.

Whoever comes to run a cell finds it there, so static and dynamic balance ship the same bytes and
taking a block costs no message. Blocks may be packed while workers are at work on others.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.backends.given import add_note
from taskcarrier.kept_mappings import open_for_reading
from taskcarrier.partition import Grid
from taskcarrier.segments import Segment, SharedView, Staging


@dataclass(frozen=True, eq=False)
class Blocks:
    """One pickle for each cell of a grid, and a table of where each begins and ends.

    Pickles lie in the segment of the table.
    """

    places: SharedView

    @property
    def _segment(self) -> Segment:
        assert self.places.segment is not None  # for the type checker: there is a cell
        return self.places.segment

    @classmethod
    def room(cls, grid: Grid, staging: Staging) -> Blocks:
        """A table for the blocks of a grid, none of which is packed."""
        dtype = np.dtype(np.int64)
        segment, offset = staging.place(2 * len(grid) * dtype.itemsize)
        return cls(SharedView(segment, offset, (2 * len(grid),), (dtype.itemsize,), dtype))

    @classmethod
    def pack(
        cls,
        read: Callable[[int, int], object],
        grid: Grid,
        staging: Staging,
        describe: Callable[[int, int], str],
    ) -> Blocks:
        """All blocks of a grid, packed (see `fill`)."""
        blocks = cls.room(grid, staging)
        for _ in blocks.fill(range(len(grid)), read, grid, staging, describe):
            pass
        return blocks

    def fill(
        self,
        cells: Iterable[int],
        read: Callable[[int, int], object],
        grid: Grid,
        staging: Staging,
        describe: Callable[[int, int], str],
    ) -> Iterator[int]:
        """Pickle what `read` returns for each of these cells; they are yielded once they are there.

        An error names the cell by `describe`.
        """
        from taskcarrier.backends.parcels import pack_items  # noqa: PLC0415  # loads joblib

        segment, places = self._segment, self.places.open("write").data
        for cell in cells:
            start, stop = grid.bounds(cell)
            try:
                packed = pack_items(read(start, stop))
            except Exception as error:
                add_note(
                    error,
                    f"taskcarrier could not pickle {describe(start, stop)} for worker processes; "
                    "use backend='threading' if they cannot be pickled",
                )
                raise
            places[2 * cell], places[2 * cell + 1] = staging.append(segment, packed)
            yield cell

    def open(self) -> Callable[[int], Any]:
        """In a worker: a function that takes a cell's number and returns what was packed."""
        segment, places = self._segment, open_for_reading(self.places).data

        def block(cell: int) -> Any:
            begin, end = places[2 * cell], places[2 * cell + 1]
            return pickle.loads(segment.read(begin, end - begin))

        return block

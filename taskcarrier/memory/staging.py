"""Copies of what a run needs, all in one segment."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from taskcarrier.memory.segments import Recycler, Segment, SharedView, locate
from taskcarrier.memory.strides import (
    ALIGNMENT,
    address_of,
    align,
    byte_bounds,
    count_copy_nbytes,
    view_bytes,
)

SHARED_NBYTES = 1 << 14
"""Arrays in arguments, closures and results go into shared memory from this size on; arbitrary."""


class Staging:
    """Copies of arrays and bytes in one segment, one after the other.

    Parameters
    ----------
    folder : str, optional
        The folder in which the segment lies; None for memory.
    recycler : Recycler, optional
        The source of the segment, to which it returns.

    Attributes
    ----------
    nbytes : int
        The bytes copied so far. Code that copies in another way for the run adds to it.
    """

    def __init__(self, folder: str | None = None, recycler: Recycler | None = None) -> None:
        self._folder = folder
        self._recycler = recycler
        self._segment: Segment | None = None
        self._end = 0
        self.nbytes = 0

    def share(self, arrays: Iterable[np.ndarray]) -> list[SharedView]:
        """Return views of arrays; those that are not in a segment yet are copied.

        All bytes from an array's first to its last are copied, including gaps.
        """
        located = [(array, locate(array)) for array in arrays]
        self._prepare(sum(count_copy_nbytes(array) for array, view in located if view is None))
        return [self._copy(array) if view is None else view for array, view in located]

    def place(self, nbytes: int, low: int = 0) -> tuple[Segment, int]:
        """Reserve room for `nbytes` from address `low`, and return the segment and the offset."""
        offset = align(self._end) + low % ALIGNMENT
        end = offset + nbytes
        if self._segment is None:
            self._prepare(end)
        self._end = end
        assert self._segment is not None  # for the type checker
        self._segment.reserve(end)
        self.nbytes += nbytes
        return self._segment, offset

    def add(self, block: memoryview) -> tuple[Segment, int]:
        """Copy bytes, and return the segment and the offset at which they lie."""
        segment, offset = self.place(len(block))
        segment.write(offset, block)
        return segment, offset

    def _prepare(self, nbytes: int) -> None:
        """Make the segment if there is none, and reserve `nbytes` more in one step."""
        if nbytes == 0:
            return
        if self._segment is None:
            if self._recycler is None:
                self._segment = Segment.create(self._folder)
            else:
                self._segment = self._recycler.segment(nbytes, self._folder)
        self._segment.reserve(self._end + nbytes)

    def _copy(self, array: np.ndarray) -> SharedView:
        if array.nbytes == 0:
            return SharedView(None, 0, array.shape, array.strides, array.dtype)
        low, high = byte_bounds(array)
        # Bytes are copied as they lie, including gaps: the strides stay the same, so the function
        # adds up in the same order as it would on the original. Overlapping and repeated items
        # (windows, zero strides) are not expanded.
        segment, offset = self.place(high - low, low)
        segment.write(offset, view_bytes(low, high - low))
        start = offset + address_of(array) - low
        return SharedView(segment, start, array.shape, array.strides, array.dtype)

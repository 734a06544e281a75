"""Where workers find the items of the mapped arrays.

A `Source` says where one array is and can travel; opened in a worker, it reads ranges of items
along the mapped axis, as read-only arrays with the strides of the original. Which kind an array
gets is decided by `sources_for_processes`; threads and the caller read views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from taskcarrier import caller_memory
from taskcarrier.arrays.inputs import Inputs, read_only
from taskcarrier.layout import address_of, byte_bounds
from taskcarrier.partition import Grid
from taskcarrier.segments import SharedView, Staging, locate

Reader = Callable[[int, int], np.ndarray]
"""Takes ``(start, stop)``, returns those items, axis kept."""

# An array this small is read in one go by each worker; arbitrary.
_WHOLE_NBYTES = 64 << 10


class Source(Protocol):
    """Where one mapped array is."""

    def open(self) -> Reader:
        """Called once in each worker, before its first cell."""


@dataclass(frozen=True)
class LocalSource:
    """An array of this process."""

    array: np.ndarray
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        array = read_only(self.array)
        before = (slice(None),) * self.axis
        return lambda start, stop: array[(*before, slice(start, stop))]


@dataclass(frozen=True)
class SharedSource:
    """An array in a segment."""

    view: SharedView
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        return LocalSource(self.view.open("read"), self.axis).open()


@dataclass(frozen=True)
class CallerSource:
    """An array in the ordinary memory of the caller, read cell by cell."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int

    @classmethod
    def of(cls, array: np.ndarray, axis: int) -> CallerSource:
        """For an array of this process, which must live as long as the run."""
        return cls(address_of(array), array.shape, array.strides, array.dtype, axis)

    @property
    def item_nbytes(self) -> int:
        """Bytes from the first to the last of one item."""
        spans = [
            (n - 1) * abs(stride)
            for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True))
            if axis != self.axis
        ]
        return sum(spans) + self.dtype.itemsize

    def nbytes_of(self, n_items: int) -> int:
        """Bytes from the first to the last of so many items."""
        return self.item_nbytes + (n_items - 1) * abs(self.strides[self.axis])

    def is_worth_it(self, grid: Grid) -> bool:
        """Whether reading it cell by cell reads little twice."""
        whole = self.nbytes_of(grid.n_items)
        stride = abs(self.strides[self.axis])
        in_cells = len(grid) * (self.item_nbytes - stride) + grid.n_items * stride
        return whole <= _WHOLE_NBYTES or in_cells <= whole + whole // 4

    def open(self) -> Reader:  # noqa: D102  # as in Source
        n_items = self.shape[self.axis]
        if self.nbytes_of(n_items) <= _WHOLE_NBYTES:
            return LocalSource(self._read(0, n_items), self.axis).open()
        return self._read

    def _read(self, start: int, stop: int) -> np.ndarray:
        axis, strides = self.axis, self.strides
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        first = self.address + start * strides[axis]
        low = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
        memory, begin = caller_memory.read(low, self.nbytes_of(stop - start))
        memory.flags.writeable = False
        return np.ndarray(shape, self.dtype, memory, begin + first - low, strides)


def sources_here(inputs: Inputs) -> list[Source]:
    """Sources for workers in this process."""
    return [LocalSource(*pair) for pair in zip(inputs.arrays, inputs.axes, strict=True)]


def sources_for_processes(inputs: Inputs, grid: Grid, staging: Staging) -> list[Source]:
    """Sources for worker processes: shared arrays as they are, others read or copied once.

    `inputs` must live as long as the run: workers may read from its arrays.
    """
    sources: list[Source | None] = []
    to_stage = []
    for array, axis in zip(inputs.arrays, inputs.axes, strict=True):
        read = CallerSource.of(array, axis)
        if array.nbytes and locate(array) is None and read.is_worth_it(grid):
            low, high = byte_bounds(array)
            if caller_memory.readable(low, high):
                staging.nbytes += high - low
                sources.append(read)
                continue
        sources.append(None)
        to_stage.append(array)
    views = iter(staging.share(to_stage))
    return [
        SharedSource(next(views), axis) if source is None else source
        for source, axis in zip(sources, inputs.axes, strict=True)
    ]

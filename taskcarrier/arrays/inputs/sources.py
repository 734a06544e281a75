"""Where workers find the items of the mapped arrays.

A `Source` says where one array is, and can travel. Opened in a worker, it reads ranges of items
along the mapped axis, as read-only arrays with the strides of the original.
`sources_for_processes` decides which kind an array gets; threads and the caller read views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from taskcarrier.arrays.inputs.check import Inputs, to_plain_range
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.memory import parent_memory
from taskcarrier.memory.mapping_cache import open_for_reading
from taskcarrier.memory.memmaps import find_shared
from taskcarrier.memory.segments import SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.memory.strides import address_of, byte_bounds
from taskcarrier.memory.views import make_read_only
from taskcarrier.record import record
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call
from taskcarrier.workers.processes.packed_chunks import PackedChunks, pickle_chunks

Reader = Callable[[int, int], np.ndarray]
"""A function that takes ``(start, stop)`` and returns these items; the axis is kept."""

# Each worker reads an array of at most this many bytes as a whole; arbitrary.
_WHOLE_NBYTES = 64 << 10


class Source(Protocol):
    """Where one mapped array is."""

    def open(self) -> Reader:
        """Return a reader; called once in each worker, before its first chunk."""


@record
class LocalSource:
    """An array of this process."""

    array: np.ndarray
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        array = make_read_only(self.array)
        before = (slice(None),) * self.axis
        return lambda start, stop: array[(*before, slice(start, stop))]


@record
class SharedSource:
    """An array in a segment."""

    view: SharedView
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        return LocalSource(open_for_reading(self.view), self.axis).open()


@record
class ParentMemorySource:
    """An array in the ordinary memory of the caller, read chunk by chunk."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int

    @classmethod
    def of(cls, array: np.ndarray, axis: int) -> ParentMemorySource:
        """Return the source of an array of this process, which must live as long as the run."""
        return cls(address_of(array), array.shape, array.strides, array.dtype, axis)

    @property
    def item_nbytes(self) -> int:
        """The span of one item in bytes, gaps included."""
        spans = [
            (n - 1) * abs(stride)
            for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True))
            if axis != self.axis
        ]
        return sum(spans) + self.dtype.itemsize

    def nbytes_of(self, n_items: int) -> int:
        """Return the bytes from the first to the last one of `n_items` items."""
        return self.item_nbytes + (n_items - 1) * abs(self.strides[self.axis])

    def is_worth_it(self, grid: ChunkGrid, depth: int) -> bool:
        """Return whether reading it chunk by chunk, with `depth` neighbours, reads little twice."""
        whole = self.nbytes_of(grid.n_items)
        stride = abs(self.strides[self.axis])
        by_chunk = len(grid) * (self.item_nbytes + (2 * depth - 1) * stride)
        by_chunk += grid.n_items * stride
        return whole <= _WHOLE_NBYTES or by_chunk <= whole + whole // 4

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
        memory, begin = parent_memory.read(low, self.nbytes_of(stop - start))
        memory.flags.writeable = False
        return np.ndarray(shape, self.dtype, memory, begin + first - low, strides)


@record
class ArrayLikeSource:
    """An array-like that is not in memory, read by range in every worker.

    It is wrapped in a `Call` because it travels as the user's functions do.
    """

    wrapped: Call
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        before = (slice(None),) * self.axis
        array: Any = self.wrapped.func
        return lambda start, stop: make_read_only(
            to_plain_range(array[(*before, slice(start, stop))])
        )


@record
class PickledSource:
    """An array of Python objects, pickled into shared memory chunk by chunk."""

    packed_chunks: PackedChunks
    chunksize: int
    axis: int

    def open(self) -> Reader:  # noqa: D102  # as in Source
        read_chunk = self.packed_chunks.open()

        def read(start: int, stop: int) -> np.ndarray:
            first, last = start // self.chunksize, -(-stop // self.chunksize)
            chunks = [read_chunk(index) for index in range(first, last)]
            whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=self.axis)
            offset = first * self.chunksize
            return LocalSource(whole, self.axis).open()(start - offset, stop - offset)

        return read


@record
class HaloSource:
    """Another source, read with neighbours."""

    inner: Source
    axis: int
    halo: Halo

    def open(self) -> Reader:  # noqa: D102  # as in Source
        read, axis, halo = self.inner.open(), self.axis, self.halo
        return lambda start, stop: halo.read(read, axis, start, stop)


def local_sources(inputs: Inputs, halo: Halo | None) -> list[Source]:
    """Return sources for workers in this process."""
    return [
        _add_halo(
            LocalSource(array, axis)
            if isinstance(array, np.ndarray)
            else ArrayLikeSource(Call(array), axis),
            axis,
            halo,
        )
        for array, axis in zip(inputs.arrays, inputs.axes, strict=True)
    ]


def sources_for_processes(
    inputs: Inputs, grid: ChunkGrid, halo: Halo | None, staging: Staging
) -> tuple[list[Source], list[str]]:
    """Return sources for worker processes, and notes for the report.

    Arrays that are shared already or lie in a file are mapped; other arrays are read or copied
    once. `inputs` must live as long as the run: workers may read from its arrays.
    """
    sources: dict[int, Source] = {}
    to_stage: dict[int, np.ndarray] = {}
    notes = []
    depth = 0 if halo is None else halo.depth
    for number, (array, axis) in enumerate(zip(inputs.arrays, inputs.axes, strict=True)):
        if not isinstance(array, np.ndarray):
            sources[number] = ArrayLikeSource(Call(array), axis)
            notes.append(f"array {number} is read by range in every worker")
        elif array.dtype.hasobject:
            sources[number] = _pickle_by_chunk(array, axis, grid, staging)
            notes.append(f"array {number} has dtype {array.dtype}: it is pickled by range")
        elif (view := find_shared(array)) is not None:
            sources[number] = SharedSource(view, axis)
        elif _can_be_read(array, axis, grid, depth):
            low, high = byte_bounds(array)
            staging.nbytes += high - low
            sources[number] = ParentMemorySource.of(array, axis)
        else:
            to_stage[number] = array
    views = staging.share(to_stage.values())
    for number, view in zip(to_stage, views, strict=True):
        sources[number] = SharedSource(view, inputs.axes[number])
    return [_add_halo(sources[n], axis, halo) for n, axis in enumerate(inputs.axes)], notes


def _add_halo(source: Source, axis: int, halo: Halo | None) -> Source:
    return source if halo is None else HaloSource(source, axis, halo)


def _can_be_read(array: np.ndarray, axis: int, grid: ChunkGrid, depth: int) -> bool:
    return (
        array.nbytes > 0
        and ParentMemorySource.of(array, axis).is_worth_it(grid, depth)
        and parent_memory.is_readable(*byte_bounds(array))
    )


def _pickle_by_chunk(
    array: np.ndarray, axis: int, grid: ChunkGrid, staging: Staging
) -> PickledSource:
    read = LocalSource(array, axis).open()

    def describe(start: int, stop: int) -> str:
        return f"items {start}:{stop} of an array of dtype {array.dtype}"

    return PickledSource(
        PackedChunks.from_pickles(pickle_chunks(read, grid, describe), staging),
        grid.chunksize,
        axis,
    )

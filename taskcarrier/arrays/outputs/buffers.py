"""Where the outputs of a run lie.

The layout is a pure function of the spec and the number of items, and shared memory only grows, so
a worker that knows the spec can make room for the whole output and write its part: nobody is
elected to allocate, nobody waits, and nothing needs repair when a worker dies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.memory.available import check_memory
from taskcarrier.memory.npy import header_of
from taskcarrier.memory.segments import Segment, SharedView, descriptors_are_scarce
from taskcarrier.memory.strides import ALIGNMENT, contiguous_strides

Place = np.ndarray | SharedView
"""An array of this process, or where an array lies that every process can open."""


@dataclass(frozen=True, eq=False)
class NpyPlace:
    """Output into a ``.npy`` file: its data begin where the header will end."""

    segment: Segment

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> SharedView:
        """Where the output lies in the file; there is room for it then, and its header."""
        header = header_of(dtype, shape, order)
        offset = len(header)
        nbytes = math.prod(shape) * dtype.itemsize
        self.segment.reserve(offset + nbytes)
        # Before the first result, so that a later run finds out what results are like.
        self.segment.write(0, memoryview(header))
        strides = contiguous_strides(shape, dtype.itemsize, order)
        return SharedView(self.segment if nbytes else None, offset, shape, strides, dtype)


@dataclass(frozen=True, eq=False)
class Output:
    """What the caller has asked of one output.

    Attributes
    ----------
    dtype : dtype or None
        What results are cast to.
    shape : tuple of int or None
        The shape that ``out=`` has.
    place : ndarray, SharedView, NpyPlace or None
        Where workers write; None for fresh memory.
    """

    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] | None = None
    place: np.ndarray | SharedView | NpyPlace | None = None

    def where(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> Place | None:
        """Where the output lies; None if it is to be in fresh memory."""
        if isinstance(self.place, NpyPlace):
            return self.place.view(dtype, shape, order)
        return self.place


ANY = Output()
"""Nothing was asked."""


class OutputBuffer(Protocol):
    """Where the outputs of a run lie."""

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place] | None:
        """The whole outputs; None if they cannot lie there. Asked by workers and the caller."""

    def write_lock(self) -> threading.Lock | None:
        """A lock that one worker holds while it writes; None if it need not."""

    def check_open(self) -> None:
        """Nothing while the call goes on; to be asked behind the door."""

    def close(self) -> None:
        """The call is over."""


# What to do where the memory of this process has no room.
_SMALLER = "map over fewer items at once, or pass out= as a path that ends in .npy"


class CallIsOverError(Exception):
    """A worker comes with a result after the call has returned; nobody sees this."""


class LocalBuffer:
    """Outputs in ordinary memory, shared by the threads of this process.

    A thread cannot be stopped: one that is interrupted goes on until its range is done, and may
    come to its result when the call is long over. It finds its door closed then.
    """

    def __init__(self, n_items: int, order: str) -> None:
        self._is_closed = False
        self._write_locks: list[threading.Lock] = []
        self._n_items = n_items
        self._order: Any = order
        self._lock = threading.Lock()
        self._made: list[Place] | None = None

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place]:
        """The whole outputs, the same for every thread that asks."""
        with self._lock:
            if self._made is None:
                made = []
                for (dtype, _), shape, output in zip(
                    spec.parts, spec.shapes(self._n_items), outputs, strict=True
                ):
                    place = output.where(dtype, shape, self._order)
                    if place is None:
                        check_memory(math.prod(shape) * dtype.itemsize, "the result", _SMALLER)
                        place = np.empty(shape, dtype, self._order)
                    made.append(place)
                self._made = made
            return self._made

    def write_lock(self) -> threading.Lock | None:  # noqa: D102  # as in OutputBuffer
        write_lock = threading.Lock()
        self._write_locks.append(write_lock)
        return write_lock

    def check_open(self) -> None:  # noqa: D102  # as in OutputBuffer
        if self._is_closed:
            raise CallIsOverError

    def close(self) -> None:
        """From now on nothing is written; whoever is just writing is waited for."""
        self._is_closed = True
        for write_lock in list(self._write_locks):
            with write_lock:
                pass


class SharedBuffer:
    """Outputs in one segment, one after the other, or where they were asked for."""

    def __init__(self, segment: Segment, n_items: int, order: str) -> None:
        self._segment = segment
        self._n_items = n_items
        self._order = order

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place] | None:
        """Where the outputs lie, with room for them; None for dtypes that hold objects."""
        if any(dtype.hasobject for dtype, _ in spec.parts):
            return None
        places, end = self._layout(spec, outputs)
        if end:
            self._segment.reserve(end)
        return places

    def write_lock(self) -> threading.Lock | None:
        """None is needed: no process outlives the call with a range in hand."""
        return None

    def check_open(self) -> None:
        """It is."""

    def close(self) -> None:
        """Nothing, as there are no doors."""

    def is_wasteful(self, spec: Spec, outputs: Sequence[Output]) -> bool:
        """Whether results should be copied out: much too large a segment, or scarce descriptors."""
        _, end = self._layout(spec, outputs)
        return descriptors_are_scarce() or self._segment.nbytes > 2 * end + _SLACK_NBYTES

    def _layout(self, spec: Spec, outputs: Sequence[Output]) -> tuple[list[Place], int]:
        places: list[Place] = []
        end = 0
        for (dtype, _), shape, output in zip(
            spec.parts, spec.shapes(self._n_items), outputs, strict=True
        ):
            place = output.where(dtype, shape, self._order)
            if place is None:
                nbytes = math.prod(shape) * dtype.itemsize
                strides = contiguous_strides(shape, dtype.itemsize, self._order)
                place = SharedView(self._segment if nbytes else None, end, shape, strides, dtype)
                end += -(-nbytes // ALIGNMENT) * ALIGNMENT
            places.append(place)
        return places, end


# Segments up to this size are not worth copying out of; arbitrary.
_SLACK_NBYTES = 1 << 16


def open_place(place: Place) -> np.ndarray:
    """The whole output in this process, to be written to."""
    return place.open("write") if isinstance(place, SharedView) else place


class Writer:
    """How one worker writes its parts of one output.

    Parameters
    ----------
    place : ndarray or SharedView
        Where the output lies.
    axis : int
        Its mapped axis.

    Notes
    -----
    Where a range of the output is one piece of memory, it is written by `pwrite`: over 256 MB two
    workers took 0.6 (0.3 to 0.9) of the time that writing through mappings took, which pay for each
    page when it is first touched (`python -m bench sqrt_sin chain`).
    """

    def __init__(self, place: Place, axis: int) -> None:
        self._place = place
        self._before = (slice(None),) * axis
        self._array: np.ndarray | None = place if isinstance(place, np.ndarray) else None
        self._order = None if self._array is not None else _order_by_pieces(place, axis)
        self._stride = place.strides[axis]

    def put(self, start: int, stop: int, result: np.ndarray) -> None:
        """Write the items from `start` to `stop`."""
        if self._order is not None and isinstance(self._place, SharedView):
            segment, offset = self._place.segment, self._place.offset
            assert segment is not None  # for the type checker
            piece = result if self._order == "C" else result.T
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            segment.write(offset + start * self._stride, flat.data)
            return
        if self._array is None:
            self._array = open_place(self._place)
        self._array[(*self._before, slice(start, stop))] = result


def _order_by_pieces(place: Place, axis: int) -> str | None:
    """The order in which a range of items is one piece of memory; None if it is several."""
    if isinstance(place, np.ndarray) or place.segment is None:
        return None
    for order, outer in (("C", place.shape[:axis]), ("F", place.shape[axis + 1 :])):
        dense = contiguous_strides(place.shape, place.dtype.itemsize, order)
        if place.strides == dense and math.prod(outer) == 1:
            return order
    return None

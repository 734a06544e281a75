"""The memory of the outputs of a run, and how workers write to it.

The layout is a pure function of the spec and the number of items, and shared memory only grows. So
any worker that knows the spec can make room for the whole output and write its part: no worker is
elected to allocate, none waits, and nothing needs repair when a worker dies.
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
from taskcarrier.memory.npy import make_header
from taskcarrier.memory.segments import Segment, SharedView, descriptors_are_scarce
from taskcarrier.memory.strides import ALIGNMENT, contiguous_strides

Place = np.ndarray | SharedView
"""Where one output lies: an array of this process, or a view that every process can open."""


@dataclass(frozen=True, eq=False)
class NpyPlace:
    """The place of an output in a ``.npy`` file: its data begin where the header ends."""

    segment: Segment

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> SharedView:
        """Make room for the output in the file, write its header, and return where its data lie."""
        header = make_header(dtype, shape, order)
        offset = len(header)
        nbytes = math.prod(shape) * dtype.itemsize
        self.segment.reserve(offset + nbytes)
        # Before the first result, so that a later run can read what results are like.
        self.segment.write(0, memoryview(header))
        strides = contiguous_strides(shape, dtype.itemsize, order)
        return SharedView(self.segment if nbytes else None, offset, shape, strides, dtype)


@dataclass(frozen=True, eq=False)
class Output:
    """What the user has asked of one output.

    Attributes
    ----------
    dtype : dtype or None
        The dtype that results are cast to; None to keep theirs.
    shape : tuple of int or None
        The shape of ``out=``, if that is an array.
    place : ndarray, SharedView, NpyPlace or None
        Where workers write; None for fresh memory.
    """

    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] | None = None
    place: np.ndarray | SharedView | NpyPlace | None = None

    def where(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> Place | None:
        """Return where the output lies, or None if it is to lie in fresh memory."""
        if isinstance(self.place, NpyPlace):
            return self.place.view(dtype, shape, order)
        return self.place


ANY = Output()
"""An output of which nothing is asked: any dtype and shape, in fresh memory."""


class OutputBuffer(Protocol):
    """The memory of all outputs of a run."""

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place] | None:
        """Return where each whole output lies, or None if outputs cannot lie in this memory.

        Workers and the caller call this.
        """

    def write_lock(self) -> threading.Lock | None:
        """Make the lock that one worker holds while it writes; None if it needs none."""

    def check_open(self) -> None:
        """Raise `CallIsOverError` if the call is over; call it with the write lock held."""

    def close(self) -> None:
        """Let no worker write any more: the call is over."""


# Advice to the user when the memory of this process has no room.
_ADVICE = "map over fewer items at once, or pass out= as a path that ends in .npy"


class CallIsOverError(Exception):
    """A worker has a result after the call has returned; users never see this error."""


class LocalBuffer:
    """Outputs in ordinary memory, shared by the threads of this process.

    A thread cannot be stopped. One whose call was interrupted goes on until its range is done, and
    may have its result long after the call is over. `check_open` then keeps it from writing.
    """

    def __init__(self, n_items: int, order: str) -> None:
        self._is_closed = False
        self._write_locks: list[threading.Lock] = []
        self._n_items = n_items
        self._order: Any = order
        self._lock = threading.Lock()
        self._places: list[Place] | None = None

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place]:
        """Return the whole outputs, made by the first call and the same for every thread."""
        with self._lock:
            if self._places is None:
                places = []
                for (dtype, _), shape, output in zip(
                    spec.parts, spec.shapes(self._n_items), outputs, strict=True
                ):
                    place = output.where(dtype, shape, self._order)
                    if place is None:
                        check_memory(math.prod(shape) * dtype.itemsize, "the result", _ADVICE)
                        place = np.empty(shape, dtype, self._order)
                    places.append(place)
                self._places = places
            return self._places

    def write_lock(self) -> threading.Lock | None:  # noqa: D102  # as in OutputBuffer
        write_lock = threading.Lock()
        self._write_locks.append(write_lock)
        return write_lock

    def check_open(self) -> None:  # noqa: D102  # as in OutputBuffer
        if self._is_closed:
            raise CallIsOverError

    def close(self) -> None:
        """Let no thread write from now on, and wait for those that are writing."""
        self._is_closed = True
        for write_lock in list(self._write_locks):
            with write_lock:
                pass


class SharedBuffer:
    """Outputs in one segment, one after the other, or at the places that the user asked for."""

    def __init__(self, segment: Segment, n_items: int, order: str) -> None:
        self._segment = segment
        self._n_items = n_items
        self._order = order

    def places(self, spec: Spec, outputs: Sequence[Output]) -> list[Place] | None:
        """Make room for the outputs and return where they lie; None if dtypes hold objects."""
        if any(dtype.hasobject for dtype, _ in spec.parts):
            return None
        places, end = self._layout(spec, outputs)
        if end:
            self._segment.reserve(end)
        return places

    def write_lock(self) -> threading.Lock | None:
        """Return None: no lock is needed, as no process outlives the call with a range in hand."""
        return None

    def check_open(self) -> None:
        """Do nothing: no process outlives the call with a range in hand."""

    def close(self) -> None:
        """Do nothing: there are no write locks to wait for."""

    def is_wasteful(self, spec: Spec, outputs: Sequence[Output]) -> bool:
        """Return whether results should be copied out of the segment.

        They should if the segment is much too large for them, or descriptors are scarce.
        """
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


# A segment of up to this size is not worth copying out of; arbitrary.
_SLACK_NBYTES = 1 << 16


def open_place(place: Place) -> np.ndarray:
    """Return the whole output at `place` as a writable array of this process."""
    return place.open("write") if isinstance(place, SharedView) else place


class Writer:
    """Writes one worker's parts of one output.

    Parameters
    ----------
    place : ndarray or SharedView
        Where the output lies.
    axis : int
        The mapped axis of the output.

    Notes
    -----
    A range of the output that is one piece of memory is written by `pwrite`: over 256 MB two
    workers took 0.6 (0.3 to 0.9) of the time of writing through mappings, which pay for each page
    when it is first touched (`python -m bench sqrt_sin chain`).
    """

    def __init__(self, place: Place, axis: int) -> None:
        self._place = place
        self._leading_index = (slice(None),) * axis
        self._array: np.ndarray | None = place if isinstance(place, np.ndarray) else None
        self._order = None if self._array is not None else _find_piece_order(place, axis)
        self._stride = place.strides[axis]

    def put(self, start: int, stop: int, result: np.ndarray) -> None:
        """Write `result` to the items from `start` to `stop`."""
        if self._order is not None and isinstance(self._place, SharedView):
            segment, offset = self._place.segment, self._place.offset
            assert segment is not None  # for the type checker
            piece = result if self._order == "C" else result.T
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            segment.write(offset + start * self._stride, flat.data)
            return
        if self._array is None:
            self._array = open_place(self._place)
        self._array[(*self._leading_index, slice(start, stop))] = result


def _find_piece_order(place: Place, axis: int) -> str | None:
    """Return the order in which a range of items is one piece of memory; None if it is several."""
    if isinstance(place, np.ndarray) or place.segment is None:
        return None
    for order, outer in (("C", place.shape[:axis]), ("F", place.shape[axis + 1 :])):
        dense = contiguous_strides(place.shape, place.dtype.itemsize, order)
        if place.strides == dense and math.prod(outer) == 1:
            return order
    return None

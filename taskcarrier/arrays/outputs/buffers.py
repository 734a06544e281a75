"""The memory of the outputs of a run, and how workers write to it.

The layout is a pure function of the spec and the number of items, and shared memory only grows. So
any worker that knows the spec can make room for the whole output and write its part: no worker is
elected to allocate, none waits, and nothing needs repair when a worker dies.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskcarrier.arrays.casting import MakeFill, find_missing_value
from taskcarrier.arrays.outputs.specs import DeferredResult, Spec
from taskcarrier.memory.available import check_memory
from taskcarrier.memory.npy import NpyWriter, find_order
from taskcarrier.memory.segments import Segment, SharedView, descriptors_are_scarce
from taskcarrier.memory.strides import ALIGNMENT, contiguous_strides
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.system.locks import Lock
from taskcarrier.workers.records import Where

Place = np.ndarray | SharedView
"""Where one output lies: an array of this process, or a view that every process can open."""

WriteRange = Callable[[int, int, np.ndarray], None]
"""A function that writes a result to the items of one output from a start to a stop."""


@record
class Output:
    """What workers must know of one output.

    Attributes
    ----------
    dtype : dtype or None
        The dtype that results are cast to; None to keep theirs.
    shape : tuple of int or None
        The shape of ``out=``, if that is an array.
    place : ndarray, SharedView, NpyWriter or None
        Where workers write; None for fresh memory.
    """

    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] | None = None
    place: Place | NpyWriter | None = None

    def find_place(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> Place | None:
        """Return where the output lies, or None if it is to lie in fresh memory."""
        if isinstance(self.place, NpyWriter):
            return self.place.make_view(dtype, shape, order)
        return self.place


ANY = Output()
"""An output of which nothing is asked: any dtype and shape, in fresh memory."""


class CallIsOverError(Exception):
    """A worker has a result after the call has returned; users never see this error."""


@dataclass(eq=False, kw_only=True)
class OutputBuffer(ABC):
    """The memory of all outputs of a run, and what is asked of results, in a form that can travel.

    Nothing is asked until a request is applied to it (`OutputRequest.apply_to`).

    Attributes
    ----------
    n_items : int
        The number of items along the mapped axis.
    order : str
        The order of outputs in fresh memory, "C" or "F".
    out_axis : int or tuple of int
        Where the mapped axis stands in results, as the user gave it.
    outputs : Output or tuple of Output
        What is asked of every output, or of each.
    promote_dtypes : bool
        Whether results of different dtypes promote; otherwise they disagree.
    make_fill : callable
        Returns the value that stands where the function failed, for a dtype.
    earlier_spec : Spec or None
        The spec that an earlier run has agreed on, if this run continues it.
    """

    n_items: int
    order: Any
    out_axis: int | tuple[int, ...] = 0
    outputs: Output | tuple[Output, ...] = ANY
    promote_dtypes: bool = False
    make_fill: MakeFill = find_missing_value
    earlier_spec: Spec | None = None

    @abstractmethod
    def make_places(self, spec: Spec) -> list[Place] | None:
        """Return where each whole output lies, or None if outputs cannot lie in this memory.

        Workers and the caller call this.
        """

    @abstractmethod
    def make_write_lock(self) -> Lock | None:
        """Make the lock that one worker holds while it writes; None if it needs none."""

    @abstractmethod
    def check_open(self) -> None:
        """Raise `CallIsOverError` if the call is over; call it with the write lock held."""

    @abstractmethod
    def close(self) -> None:
        """Stop workers from writing: the call is over."""

    def is_wasteful(self, spec: Spec) -> bool:  # noqa: ARG002  # shared memory may be
        """Return whether results should be copied out of this memory."""
        return False

    @property
    def asked_dtypes(self) -> list[np.dtype[Any]]:
        """The dtypes that results are to have, as far as they are asked for."""
        outputs = (self.outputs,) if isinstance(self.outputs, Output) else self.outputs
        return [output.dtype for output in outputs if output.dtype is not None]

    def get_outputs(self, n_results: int) -> tuple[Output, ...]:
        """Return what is asked of each of `n_results` results; raise if their number is wrong."""
        if isinstance(self.outputs, Output):
            return (self.outputs,) * n_results
        if len(self.outputs) != n_results:
            raise ValueError(
                f"out= or dtype= has {len(self.outputs)} entries, but func returned {n_results} "
                "results"
            )
        return self.outputs

    def get_axes(self, n_results: int) -> tuple[int, ...]:
        """Return the mapped axis of each of `n_results` results; raise if their number is wrong."""
        if not isinstance(self.out_axis, tuple):
            return (self.out_axis,) * n_results
        if len(self.out_axis) != n_results:
            raise ValueError(
                f"out_axis has {len(self.out_axis)} entries, func returned {n_results}; a tuple "
                "is one axis for each result"
            )
        return self.out_axis

    def check(self, spec: Spec, *, promote_dtypes: bool) -> None:
        """Raise if results of this spec cannot satisfy what is asked for."""
        outputs = self.get_outputs(len(spec.parts))
        for output, shape in zip(outputs, spec.shapes(self.n_items), strict=True):
            if output.shape is not None and output.shape != shape:
                raise ValueError(f"out has shape {output.shape}, but the results need {shape}")
            if isinstance(output.place, NpyWriter) and any(d.hasobject for d, _ in spec.parts):
                raise TypeError("Python objects cannot be mapped in a .npy file; out= an array")
        if not promote_dtypes:  # otherwise the dtype may still change
            for dtype, _ in spec.parts:
                self.make_fill(dtype)

    def complete(
        self, spec: Spec, deferred: Sequence[DeferredResult], holes: Sequence[slice]
    ) -> list[np.ndarray]:
        """Return the whole outputs, after writing deferred results and filling the holes."""
        outputs = self.get_outputs(len(spec.parts))
        arrays = [open_place(place) for place in self.make_places(spec) or self._make_local(spec)]
        leading = [(slice(None),) * axis for axis in spec.axes]
        missing: list[Where] = [*(where for where, _ in deferred), *holes]
        for number, (dtype, _) in enumerate(spec.parts):
            promoted = _promote_dtypes({dtype, *(results[number].dtype for _, results in deferred)})
            if arrays[number].dtype != promoted:
                for where in missing:  # values that were never written might not survive a cast
                    arrays[number][(*leading[number], where)] = np.zeros((), arrays[number].dtype)
                arrays[number] = _promote(arrays[number], promoted, outputs[number])
        for where, results in deferred:
            for array, index, result in zip(arrays, leading, results, strict=True):
                array[(*index, where)] = result
        values = [self.make_fill(array.dtype) for array in arrays]
        for hole in holes:
            for array, index, value in zip(arrays, leading, values, strict=True):
                array[(*index, hole)] = value
        return arrays

    def _make_local(self, spec: Spec) -> list[Place]:
        """Return places for Python objects, which the caller writes itself."""
        outputs = tuple(replace(one, place=None) for one in self.get_outputs(len(spec.parts)))
        return LocalBuffer(n_items=self.n_items, order="C", outputs=outputs).make_places(spec)

    def _iterate_parts(
        self, spec: Spec
    ) -> Iterator[tuple[np.dtype[Any], tuple[int, ...], Place | None]]:
        """Yield dtype, whole shape and place of each output; the place is None for fresh memory."""
        outputs = self.get_outputs(len(spec.parts))
        shapes = spec.shapes(self.n_items)
        for (dtype, _), shape, output in zip(spec.parts, shapes, outputs, strict=True):
            yield dtype, shape, output.find_place(dtype, shape, self.order)


# Advice to the user when the memory of this process has no room.
_ADVICE = "map over fewer items at once, or pass out= as a path that ends in .npy"


@dataclass(eq=False, kw_only=True)
class LocalBuffer(OutputBuffer):
    """Outputs in ordinary memory, shared by the threads of this process.

    A thread cannot be stopped. One whose call was interrupted goes on until its range is done, and
    may have its result long after the call is over. `check_open` then keeps it from writing.
    """

    def __post_init__(self) -> None:
        self._is_closed = False
        self._write_locks: list[Lock] = []
        self._lock = Lock()
        self._places: list[Place] | None = None

    def make_places(self, spec: Spec) -> list[Place]:
        """Return the whole outputs, made by the first call and the same for every thread."""
        with self._lock:
            if self._places is None:
                places = []
                for dtype, shape, place in self._iterate_parts(spec):
                    if place is None:
                        check_memory(math.prod(shape) * dtype.itemsize, "the result", _ADVICE)
                        # Text is cast even where no result was written, and must be valid.
                        make = np.zeros if dtype.kind in "SU" else np.empty
                        place = make(shape, dtype, self.order)  # noqa: PLW2901  # as said
                    places.append(place)
                self._places = places
            return self._places

    @property
    def nbytes(self) -> int:
        """The bytes of the outputs that were made so far."""
        return sum(open_place(place).nbytes for place in self._places or ())

    def make_write_lock(self) -> Lock | None:  # noqa: D102  # as in OutputBuffer
        write_lock = Lock()
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


@dataclass(eq=False, kw_only=True)
class SharedBuffer(OutputBuffer):
    """Outputs in one segment, one after the other, or at the places that the user asked for.

    Attributes
    ----------
    segment : Segment
        The memory of outputs that have no other place; it grows.
    """

    segment: Segment

    def make_places(self, spec: Spec) -> list[Place] | None:
        """Make room for the outputs and return where they lie; None if dtypes hold objects."""
        if any(dtype.hasobject for dtype, _ in spec.parts):
            return None
        places, end = self._lay_out(spec)
        if end:
            self.segment.reserve(end)
        return places

    def make_write_lock(self) -> None:
        """Return None: no lock is needed, as no process outlives the call with a range in hand."""

    def check_open(self) -> None:
        """Do nothing: no process outlives the call with a range in hand."""

    def close(self) -> None:
        """Do nothing: there are no write locks to wait for."""

    def is_wasteful(self, spec: Spec) -> bool:
        """Return whether results should be copied out of the segment.

        They should if the segment is much too large for them, or descriptors are scarce.
        """
        _, end = self._lay_out(spec)
        return descriptors_are_scarce() or self.segment.nbytes > 2 * end + _SLACK_NBYTES

    def _lay_out(self, spec: Spec) -> tuple[list[Place], int]:
        """Return the place of each output, and where the last one in the segment ends."""
        places: list[Place] = []
        end = 0
        for dtype, shape, place in self._iterate_parts(spec):
            if place is None:
                nbytes = math.prod(shape) * dtype.itemsize
                strides = contiguous_strides(shape, dtype.itemsize, self.order)
                segment = self.segment if nbytes else None
                place = SharedView(segment, end, shape, strides, dtype)  # noqa: PLW2901
                end += -(-nbytes // ALIGNMENT) * ALIGNMENT
            places.append(place)
        return places, end


# A segment of up to this size is not worth copying out of; arbitrary.
_SLACK_NBYTES = 1 << 16


def open_place(place: Place) -> np.ndarray:
    """Return the whole output at `place` as a writable array of this process."""
    return place.open("write") if isinstance(place, SharedView) else place


def make_range_writer(place: Place, axis: int) -> WriteRange:
    """Return a function that writes to ranges of the output at `place`, along its mapped axis.

    A range of the output that is one piece of memory is written by `pwrite`: over 256 MB two
    workers took 0.6 (0.3 to 0.9) of the time of writing through mappings, which pay for each page
    when it is first touched (`python -m bench sqrt_sin chain`).
    """
    if isinstance(place, SharedView) and place.segment is not None:
        order = _find_piece_order(place, axis)
        if order is not None:
            return _make_piece_writer(place.segment, place.offset, place.strides[axis], order)
    array = open_place(place)
    leading_index = (slice(None),) * axis

    def write_rows(start: int, stop: int, result: np.ndarray) -> None:
        array[start:stop] = result

    def write_range(start: int, stop: int, result: np.ndarray) -> None:
        array[(*leading_index, slice(start, stop))] = result

    return write_range if axis else write_rows


def _make_piece_writer(segment: Segment, offset: int, stride: int, order: str) -> WriteRange:
    def write_piece(start: int, stop: int, result: np.ndarray) -> None:  # noqa: ARG001
        piece = result if order == "C" else result.T
        flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        segment.write(offset + start * stride, flat.data)

    return write_piece


def _find_piece_order(place: SharedView, axis: int) -> str | None:
    """Return the order in which a range of items is one piece of memory; None if it is several."""
    for order, outer in (("C", place.shape[:axis]), ("F", place.shape[axis + 1 :])):
        dense = contiguous_strides(place.shape, place.dtype.itemsize, order)
        if place.strides == dense and math.prod(outer) == 1:
            return order
    return None


def _promote(array: np.ndarray, dtype: np.dtype[Any], output: Output) -> np.ndarray:
    """Return an output with another dtype; in a file it stays in the file."""
    promoted = array.astype(dtype)
    if not isinstance(output.place, NpyWriter):
        return promoted
    file = open_place(output.place.make_view(dtype, array.shape, find_order(array)))
    file[...] = promoted
    return file


def _promote_dtypes(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the dtype that `numpy.stack` makes of several; one alone keeps its byte order."""
    if len(dtypes) == 1:
        return dtypes.pop()
    ordered = sorted(dtypes, key=str)
    try:
        # Not `result_type`: that has a dtype for dates and durations, which NumPy does not stack.
        return np.concatenate([np.empty(0, dtype) for dtype in ordered]).dtype
    except TypeError as error:
        names = ", ".join(map(str, ordered))
        add_note(error, f"func returned values of dtypes {names}, which have none in common")
        raise

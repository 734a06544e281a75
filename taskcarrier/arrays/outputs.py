"""Results in place: from what the function returns to one array over all cells.

The first result of a run defines the `Spec` of all: number of outputs, dtypes, and shapes but for
the mapped axis. Workers settle on it through the ledger (`Agree`): the first proposal counts. The
layout of the output is a pure function of the spec and the number of items, and shared memory only
grows, so a worker that knows the spec can make room for the whole output and write its part:
nobody is elected to allocate, nobody waits, and nothing needs repair when a worker dies.

What cannot be put in place is handed to the caller instead: results of Python objects in
processes, and, where dtypes promote, results of another dtype than the agreed one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from taskcarrier.arrays.casting import Fill, checked_cast
from taskcarrier.arrays.files import header_of
from taskcarrier.arrays.inputs import normalize_axis
from taskcarrier.backends.work import Agree
from taskcarrier.layout import ALIGNMENT, contiguous_strides
from taskcarrier.segments import Segment, SharedView, descriptors_are_scarce


@dataclass(frozen=True)
class Spec:
    """What the results of all cells must agree in.

    Attributes
    ----------
    parts : tuple of (dtype, shape)
        For each output, its dtype and its shape without the mapped axis.
    axes : tuple of int
        For each output, where the mapped axis stands, not negative.
    several : bool
        Whether the function returns a tuple.
    """

    parts: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]
    axes: tuple[int, ...]
    several: bool

    def shapes(self, length: int) -> list[tuple[int, ...]]:
        """Whole shapes, for so many items along the mapped axis."""
        return [
            (*shape[:axis], length, *shape[axis:])
            for (_, shape), axis in zip(self.parts, self.axes, strict=True)
        ]

    def agrees(self, other: Spec, *, promotes: bool) -> bool:
        """Whether results of both can stand in one array; dtypes may differ where they promote."""
        if not promotes:
            return self == other
        shapes = [shape for _, shape in self.parts] == [shape for _, shape in other.parts]
        return shapes and (self.axes, self.several) == (other.axes, other.several)

    def of_dtypes(self, dtypes: Sequence[np.dtype[Any]]) -> Spec:
        """The same with other dtypes."""
        parts = zip(dtypes, (shape for _, shape in self.parts), strict=True)
        return replace(self, parts=tuple(parts))

    def describe(self, length: int) -> str:
        """The results of a cell of so many items, in words."""
        parts = [
            f"{dtype} {shape}"
            for (dtype, _), shape in zip(self.parts, self.shapes(length), strict=True)
        ]
        if not self.several:
            return f"an array {parts[0]}"
        return f"a tuple of {len(parts)} ({'; '.join(parts)})"


class DisagreementError(Exception):
    """A cell's results differ from what the run has settled on; the face words the error."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.spec = spec


@dataclass(frozen=True)
class NpyPlace:
    """Output into a ``.npy`` file: its data begin where the header will end."""

    segment: Segment

    def open(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> np.ndarray:
        """The whole output, mapped into this process."""
        view = self.view(dtype, shape, order)
        if view.segment is not None:
            view.segment.reserve(view.offset + math.prod(shape) * dtype.itemsize)
        return view.open("write")

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> SharedView:
        """Where the output lies in the file."""
        offset = len(header_of(dtype, shape, order))
        segment = self.segment if math.prod(shape) * dtype.itemsize else None
        strides = contiguous_strides(shape, dtype.itemsize, order)
        return SharedView(segment, offset, shape, strides, dtype)


@dataclass(frozen=True)
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

    def opened(self, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> np.ndarray | None:
        """The whole output in this process; None where it is to be in fresh memory."""
        if isinstance(self.place, NpyPlace):
            return self.place.open(dtype, shape, order)
        return self.place.open("write") if isinstance(self.place, SharedView) else self.place


ANY = Output()
"""Nothing was asked."""

NO_FILL = Fill()


class Allocation(Protocol):
    """Where the outputs of a run lie."""

    def arrays(self, spec: Spec, outputs: Sequence[Output]) -> list[np.ndarray] | None:
        """The whole outputs; None if they cannot lie there. Called in workers and the caller."""


class LocalAllocation:
    """Outputs in ordinary memory, shared by the threads of this process."""

    def __init__(self, n_items: int, order: str) -> None:
        self._n_items = n_items
        self._order: Any = order
        self._lock = threading.Lock()
        self._made: list[np.ndarray] | None = None

    def arrays(self, spec: Spec, outputs: Sequence[Output]) -> list[np.ndarray]:
        """The whole outputs, the same for every thread that asks."""
        with self._lock:
            if self._made is None:
                self._made = [
                    self._array(dtype, shape, output)
                    for (dtype, _), shape, output in zip(
                        spec.parts, spec.shapes(self._n_items), outputs, strict=True
                    )
                ]
            return self._made

    def _array(self, dtype: np.dtype[Any], shape: tuple[int, ...], output: Output) -> np.ndarray:
        array = output.opened(dtype, shape, self._order)
        return np.empty(shape, dtype, self._order) if array is None else array


class SharedAllocation:
    """Outputs in one segment, one after the other, or where they were asked for."""

    def __init__(self, segment: Segment, n_items: int, order: str) -> None:
        self._segment = segment
        self._n_items = n_items
        self._order = order

    def arrays(self, spec: Spec, outputs: Sequence[Output]) -> list[np.ndarray] | None:
        """The whole outputs, mapped into this process; None for dtypes that hold objects."""
        if any(dtype.hasobject for dtype, _ in spec.parts):
            return None
        views, end = self._layout(spec, outputs)
        if end:
            self._segment.reserve(end)
            mapping = self._segment.map("write")
        arrays = []
        for view, (dtype, _), shape, output in zip(
            views, spec.parts, spec.shapes(self._n_items), outputs, strict=True
        ):
            array = output.opened(dtype, shape, self._order)
            if array is None:
                array = view.over(mapping) if view.segment else view.open("write")
            arrays.append(array)
        return arrays

    def is_wasteful(self, spec: Spec, outputs: Sequence[Output]) -> bool:
        """Whether results should be copied out: much too large a segment, or scarce descriptors."""
        _, end = self._layout(spec, outputs)
        return descriptors_are_scarce() or self._segment.nbytes > 2 * end + _SLACK_NBYTES

    def _layout(self, spec: Spec, outputs: Sequence[Output]) -> tuple[list[SharedView], int]:
        views = []
        end = 0
        for (dtype, _), shape, output in zip(
            spec.parts, spec.shapes(self._n_items), outputs, strict=True
        ):
            nbytes = 0 if output.place is not None else math.prod(shape) * dtype.itemsize
            strides = contiguous_strides(shape, dtype.itemsize, self._order)
            segment = self._segment if nbytes else None
            views.append(SharedView(segment, end, shape, strides, dtype))
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return views, end


# Segments up to this size are not worth copying out of; arbitrary.
_SLACK_NBYTES = 1 << 16


@dataclass(frozen=True)
class Plan:
    """How the results of a run are put in place, in a form that can travel.

    Attributes
    ----------
    allocation : Allocation
        Where outputs lie.
    n_items : int
        Items along the mapped axis.
    out_axis : int or tuple of int
        Where the mapped axis stands in results, as the user gave it.
    outputs : Output or tuple of Output
        What was asked of every output, or of each.
    promotes : bool
        Whether results of different dtypes promote, or disagree.
    fill : Fill
        What is to stand where func failed.
    """

    allocation: LocalAllocation | SharedAllocation
    n_items: int
    out_axis: int | tuple[int, ...]
    outputs: Output | tuple[Output, ...] = ANY
    promotes: bool = False
    fill: Fill = NO_FILL

    def outputs_for(self, n_results: int) -> tuple[Output, ...]:
        """What was asked of each of so many results."""
        if isinstance(self.outputs, Output):
            return (self.outputs,) * n_results
        if len(self.outputs) != n_results:
            raise ValueError(
                f"out= or dtype= has {len(self.outputs)} entries, but func returned {n_results} "
                "results"
            )
        return self.outputs

    def check(self, spec: Spec) -> None:
        """An error if what was asked for cannot be had with results like these."""
        outputs = self.outputs_for(len(spec.parts))
        for output, shape in zip(outputs, spec.shapes(self.n_items), strict=True):
            if output.shape is not None and output.shape != shape:
                raise ValueError(f"out has shape {output.shape}, but the results need {shape}")
        for dtype, _ in spec.parts:
            self.fill.of(dtype)


class Sink:
    """One worker's way of putting results in place.

    Parameters
    ----------
    plan : Plan
        How.
    agree : callable
        Settles on a value with the other workers.
    """

    def __init__(self, plan: Plan, agree: Agree) -> None:
        self._plan = plan
        self._agree = agree
        self._spec: Spec | None = None
        self._outputs: list[np.ndarray] | None = None
        self._before: list[tuple[slice, ...]] = []
        # What one plain array must look like, by the length of its cell (there are two: the
        # last may be shorter). Comparing with it takes 0.2 µs a cell, making a spec 4 µs.
        self._dtype: np.dtype[Any] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.first: tuple[int, Spec] | None = None

    def place(
        self, start: int, stop: int, result: Any, margins: tuple[int, int] = (0, 0)
    ) -> list[np.ndarray] | None:
        """Put the result of one cell where it belongs, or say what is wrong with it.

        Of the result, as many items as `margins` says are cut off before and after. What is
        returned could not be put in place: it is for the caller.
        """
        length = stop - start
        if (
            type(result) is np.ndarray
            and result.shape == self._shapes.get(length)
            and result.dtype == self._dtype
            and margins == (0, 0)
            and self._outputs is not None
        ):
            self._outputs[0][(*self._before[0], slice(start, stop))] = result
            return None
        several = isinstance(result, tuple)
        results = [_as_result(one) for one in (result if several else (result,))]
        axes = self._axes_of(results, length, margins)
        spec, results = self._prepared(results, axes, several, length, margins)
        if self._spec is None:
            self._settle(start, spec)
        assert self._spec is not None  # for the type checker
        if spec != self._spec:
            if self._plan.promotes and spec.agrees(self._spec, promotes=True):
                return results
            raise DisagreementError(spec)
        if self._outputs is None:
            return results
        if not several:
            self._dtype = results[0].dtype
            self._shapes[length] = results[0].shape
        for output, before, one in zip(self._outputs, self._before, results, strict=True):
            output[(*before, slice(start, stop))] = one
        return None

    def _settle(self, start: int, spec: Spec) -> None:
        self.first = (start, spec)
        self._plan.check(spec)
        settled: Spec = self._agree(spec)
        self._spec = settled
        outputs = self._plan.outputs_for(len(settled.parts))
        self._outputs = self._plan.allocation.arrays(settled, outputs)
        self._before = [(slice(None),) * axis for axis in settled.axes]

    def _axes_of(
        self, results: list[np.ndarray], length: int, margins: tuple[int, int]
    ) -> tuple[int, ...]:
        wanted = self._plan.out_axis
        if not isinstance(wanted, tuple):
            wanted = (wanted,) * len(results)
        elif len(wanted) != len(results):
            raise ValueError(f"out_axis has {len(wanted)} entries, func returned {len(results)}")
        length += sum(margins)
        return tuple(_axis_of(one, axis, length) for one, axis in zip(results, wanted, strict=True))

    def _prepared(
        self,
        results: list[np.ndarray],
        axes: tuple[int, ...],
        several: bool,
        length: int,
        margins: tuple[int, int],
    ) -> tuple[Spec, list[np.ndarray]]:
        """The spec of results that were trimmed and cast."""
        before, _ = margins
        if margins != (0, 0):
            own = slice(before, before + length)
            results = [
                one[(slice(None),) * axis + (own,)] for one, axis in zip(results, axes, strict=True)
            ]
        outputs = self._plan.outputs_for(len(results))
        results = [
            one if output.dtype is None else checked_cast(one, output.dtype)
            for one, output in zip(results, outputs, strict=True)
        ]
        parts = tuple(
            (one.dtype, one.shape[:axis] + one.shape[axis + 1 :])
            for one, axis in zip(results, axes, strict=True)
        )
        return Spec(parts, axes, several), results


def _as_result(value: Any) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            "func returned a masked array, whose mask would be lost; return result.filled(value) "
            "or a tuple of data and mask"
        )
    array = np.asarray(value)
    if array.ndim == 0:
        raise TypeError(
            f"func returned {_short(value)} ({type(value).__name__}) for a chunk; map_array needs "
            "an array with the chunk's length along the mapped axis (or a tuple of such arrays)"
        )
    return array


def _axis_of(result: np.ndarray, wanted: int, length: int) -> int:
    try:
        axis = normalize_axis(wanted, result.ndim, "out_axis")
    except np.exceptions.AxisError as error:
        error.add_note(
            f"func returned an array of shape {result.shape}, which has no axis {wanted}; out_axis "
            "says where the mapped axis stands in what func returns (default: axis)"
        )
        raise
    if result.shape[axis] != length:
        raise ValueError(
            f"func returned an array of shape {result.shape}, length {result.shape[axis]} along "
            f"axis {axis}, for a chunk of length {length}; it must keep the length of the mapped "
            "axis, or say with out_axis where it stands in the result"
        )
    return axis


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004  # fits a line


def check_out_axis(out_axis: object, axis: object) -> int | tuple[int, ...]:
    """`out_axis` as given, or `axis` (of the first array) where it is None."""
    if out_axis is None:
        out_axis = axis[0] if isinstance(axis, tuple) else axis
    entries: Sequence[object] = out_axis if isinstance(out_axis, tuple) else (out_axis,)
    for entry in entries:
        if not hasattr(entry, "__index__"):
            raise TypeError(f"out_axis must be an integer or a tuple of them, got {out_axis!r}")
    return out_axis  # type: ignore[return-value]  # checked entry by entry

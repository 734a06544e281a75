"""Results in place: from what the function returns to one array over all cells.

The first result a worker gets defines what it expects of all others: number of outputs,
dtypes, and shapes but for the mapped axis (a `Spec`). The layout of the output is a pure
function of the spec and the number of items, and shared memory only grows, so a worker that
knows a spec can make room for the whole output and write its part: nobody is elected to
allocate, nobody waits, and nothing needs repair when a worker dies. That all workers had the
same spec is checked at the end, in the caller; if not, the call fails anyway.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from taskcarrier.arrays.inputs import normalize_axis
from taskcarrier.layout import ALIGNMENT
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

    @property
    def signature(self) -> int:
        """A number that tells specs apart, and is not 0."""
        return 1 + zlib.crc32(repr(self).encode())

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
    """A cell's results differ from what its worker had before; the face words the error."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.spec = spec


class Allocation(Protocol):
    """Where the outputs of a run lie."""

    def arrays(self, spec: Spec) -> list[np.ndarray]:
        """The whole outputs, allocated by whoever asks first; called in workers."""


class LocalAllocation:
    """Outputs in ordinary memory, shared by the threads of this process."""

    def __init__(self, n_items: int, order: str) -> None:
        self._n_items = n_items
        self._order: Any = order
        self._lock = threading.Lock()
        self._made: dict[Spec, list[np.ndarray]] = {}

    def arrays(self, spec: Spec) -> list[np.ndarray]:
        """The whole outputs for a spec, the same for every thread that asks."""
        with self._lock:
            if spec not in self._made:
                self._made[spec] = [
                    np.empty(shape, dtype, self._order)
                    for (dtype, _), shape in zip(
                        spec.parts, spec.shapes(self._n_items), strict=True
                    )
                ]
            return self._made[spec]

    def collect(self, spec: Spec) -> list[np.ndarray]:
        """The outputs, for the caller to keep."""
        return self.arrays(spec)


class SharedAllocation:
    """Outputs in one segment, one after the other."""

    def __init__(self, segment: Segment, n_items: int, order: str) -> None:
        self._segment = segment
        self._n_items = n_items
        self._order = order

    def arrays(self, spec: Spec) -> list[np.ndarray]:
        """The whole outputs for a spec, mapped into this process."""
        views, end = self._layout(spec)
        if end == 0:
            return [view.open("write") for view in views]
        self._segment.reserve(end)
        mapping = self._segment.map("write")
        return [view.over(mapping) if view.segment else view.open("write") for view in views]

    def collect(self, spec: Spec) -> list[np.ndarray]:
        """The outputs, for the caller to keep.

        They stay shared, so that mapping over them copies nothing; unless the segment is much
        too large for them (it was recycled) or the process runs out of descriptors.
        """
        arrays = self.arrays(spec)
        _, end = self._layout(spec)
        if descriptors_are_scarce() or self._segment.nbytes > 2 * end + _SLACK_NBYTES:
            return [array.copy(order="K") for array in arrays]
        return arrays

    def _layout(self, spec: Spec) -> tuple[list[SharedView], int]:
        views = []
        end = 0
        for (dtype, _), shape in zip(spec.parts, spec.shapes(self._n_items), strict=True):
            if dtype.hasobject:
                raise TypeError(
                    f"func returned an array of dtype {dtype}, which cannot lie in shared memory; "
                    "pass backend='threading'"
                )
            nbytes = math.prod(shape) * dtype.itemsize
            strides = _strides(shape, dtype.itemsize, self._order)
            segment = self._segment if nbytes else None
            views.append(SharedView(segment, end, shape, strides, dtype))
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return views, end


# Segments up to this size are not worth copying out of; arbitrary.
_SLACK_NBYTES = 1 << 16


def _strides(shape: tuple[int, ...], itemsize: int, order: str) -> tuple[int, ...]:
    strides = []
    step = itemsize
    for length in shape if order == "F" else reversed(shape):
        strides.append(step)
        step *= length
    return tuple(strides) if order == "F" else tuple(reversed(strides))


class Sink:
    """One worker's way of putting results in place.

    Parameters
    ----------
    allocation : LocalAllocation or SharedAllocation
        Where the outputs lie.
    out_axis : int or tuple of int
        Where the mapped axis stands in results, as the user gave it.
    """

    def __init__(self, allocation: Allocation, out_axis: int | tuple[int, ...]) -> None:
        self._allocation = allocation
        self._out_axis = out_axis
        self._spec: Spec | None = None
        self._outputs: list[np.ndarray] = []
        self._before: list[tuple[slice, ...]] = []
        # What one plain array must look like, by the length of its cell (there are two: the
        # last may be shorter). Comparing with it takes 0.2 µs a cell, making a spec 4 µs.
        self._dtype: np.dtype[Any] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.first: tuple[int, Spec] | None = None

    def place(self, start: int, stop: int, result: Any) -> None:
        """Put the result of one cell where it belongs, or say what is wrong with it."""
        length = stop - start
        if (
            type(result) is np.ndarray
            and result.shape == self._shapes.get(length)
            and result.dtype == self._dtype
        ):
            self._outputs[0][(*self._before[0], slice(start, stop))] = result
            return
        several = isinstance(result, tuple)
        results = [_as_result(one) for one in (result if several else (result,))]
        spec = self._spec_of(results, several, length)
        if spec != self._spec:
            if self._spec is not None:
                raise DisagreementError(spec)
            self._outputs = self._allocation.arrays(spec)
            self._before = [(slice(None),) * axis for axis in spec.axes]
            self._spec = spec
            self.first = (start, spec)
        if not several:
            self._dtype = results[0].dtype
            self._shapes[length] = results[0].shape
        for output, before, one in zip(self._outputs, self._before, results, strict=True):
            output[(*before, slice(start, stop))] = one

    def _spec_of(self, results: list[np.ndarray], several: bool, length: int) -> Spec:
        wanted = self._out_axis
        if not isinstance(wanted, tuple):
            wanted = (wanted,) * len(results)
        elif len(wanted) != len(results):
            raise ValueError(f"out_axis has {len(wanted)} entries, func returned {len(results)}")
        axes = tuple(_axis_of(one, axis, length) for one, axis in zip(results, wanted, strict=True))
        parts = tuple(
            (one.dtype, one.shape[:axis] + one.shape[axis + 1 :])
            for one, axis in zip(results, axes, strict=True)
        )
        return Spec(parts, axes, several)


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

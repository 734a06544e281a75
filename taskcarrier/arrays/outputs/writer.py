"""Results in place: from what the function returns to one array over all chunks.

The first result of a run defines the `Spec` of all: number of outputs, dtypes, and shapes but for
the mapped axis. Workers settle on it through the ledger (`Propose`): the first proposal counts.

What cannot be put in place is handed to the caller instead: results of Python objects in
processes, and, where dtypes promote, results of another dtype than the agreed one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskcarrier.arrays.casting import Fill, cast_checked
from taskcarrier.arrays.inputs.check import holds_mask, normalize_axis
from taskcarrier.arrays.outputs.buffers import (
    ANY,
    LocalBuffer,
    NpyPlace,
    Output,
    SharedBuffer,
    Writer,
)
from taskcarrier.arrays.outputs.specs import DisagreementError, Spec
from taskcarrier.workers.task import Propose

NO_FILL = Fill()
_NO_MARGINS = (0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the results of a run are put in place, in a form that can travel.

    Attributes
    ----------
    allocation : OutputBuffer
        Where outputs lie.
    n_items : int
        Items along the mapped axis.
    out_axis : int or tuple of int
        Where the mapped axis stands in results, as the user gave it.
    outputs : Output or tuple of Output
        What was asked of every output, or of each.
    promote_dtypes : bool
        Whether results of different dtypes promote, or disagree.
    fill : Fill
        What is to stand where func failed.
    settled : Spec or None
        What results must be like, where an earlier run has settled on that.
    """

    allocation: LocalBuffer | SharedBuffer
    n_items: int
    out_axis: int | tuple[int, ...]
    outputs: Output | tuple[Output, ...] = ANY
    promote_dtypes: bool = False
    fill: Fill = NO_FILL
    settled: Spec | None = None

    @property
    def asks_for_objects(self) -> bool:
        """Whether results are to be Python objects."""
        outputs = (self.outputs,) if isinstance(self.outputs, Output) else self.outputs
        return any(output.dtype is not None and output.dtype.hasobject for output in outputs)

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

    def axes_for(self, n_results: int) -> tuple[int, ...]:
        """Where the mapped axis stands in each of so many results."""
        if not isinstance(self.out_axis, tuple):
            return (self.out_axis,) * n_results
        if len(self.out_axis) != n_results:
            raise ValueError(
                f"out_axis has {len(self.out_axis)} entries, func returned {n_results}; a tuple "
                "is one axis for each result"
            )
        return self.out_axis

    def check(self, spec: Spec, *, promote_dtypes: bool) -> None:
        """An error if what was asked for cannot be had with results like these."""
        outputs = self.outputs_for(len(spec.parts))
        for output, shape in zip(outputs, spec.shapes(self.n_items), strict=True):
            if output.shape is not None and output.shape != shape:
                raise ValueError(f"out has shape {output.shape}, but the results need {shape}")
            if isinstance(output.place, NpyPlace) and any(d.hasobject for d, _ in spec.parts):
                raise TypeError("Python objects cannot be mapped in a .npy file; out= an array")
        if not promote_dtypes:  # else the dtype may still change
            for dtype, _ in spec.parts:
                self.fill.of(dtype)


class OutputWriter:
    """One worker's way of putting results in place.

    Parameters
    ----------
    plan : Plan
        How.
    propose : callable
        Settles on a value with the other workers.
    """

    def __init__(self, plan: Plan, propose: Propose) -> None:
        self._plan = plan
        self._agree = propose
        self._door = plan.allocation.write_lock()
        self._check_open = plan.allocation.check_open
        self._spec: Spec | None = None
        self._dtypes: list[np.dtype[Any]] = []
        self._writers: list[Writer] | None = None
        # What one plain array must look like, by the length of its chunk (there are two: the
        # last may be shorter). Comparing with it takes 0.2 µs a chunk, making a spec 4 µs.
        self._put: Callable[[int, int, np.ndarray], None]
        self._dtype: np.dtype[Any] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.first: tuple[int, Spec] | None = None

    def place(
        self, start: int, stop: int, result: Any, margins: tuple[int, int] = _NO_MARGINS
    ) -> list[np.ndarray] | None:
        """Put the result of one chunk where it belongs, or say what is wrong with it.

        Of the result, as many items as `margins` says are cut off before and after. What is
        returned could not be put in place: it is for the caller.
        """
        length = stop - start
        if (
            type(result) is np.ndarray
            and result.shape == self._shapes.get(length)
            and result.dtype == self._dtype
            and margins == _NO_MARGINS
        ):
            if self._door is None:
                self._put(start, stop, result)
            else:
                with self._door:
                    self._check_open()
                    self._put(start, stop, result)
            return None
        results = self.check_result(start, length, result, margins)
        dtypes = [one.dtype for one in results]
        if self._writers is None or dtypes != self._dtypes:
            return results
        if type(result) is np.ndarray and margins == _NO_MARGINS:
            self._put = self._writers[0].put
            self._dtype = results[0].dtype
            self._shapes[length] = results[0].shape
        with self._door or nullcontext():
            self._check_open()
            for writer, one in zip(self._writers, results, strict=True):
                writer.put(start, stop, one)
        return None

    def check_result(
        self, start: int, length: int, result: Any, margins: tuple[int, int] = _NO_MARGINS
    ) -> list[np.ndarray]:
        """The results of so many items, trimmed and cast, if they agree with the others."""
        is_tuple = isinstance(result, tuple)
        results = [_to_result(one) for one in (result if is_tuple else (result,))]
        axes = self._axes_of(results, length, margins)
        spec, results = self._prepare(results, axes, is_tuple, length, margins)
        if self._spec is None:
            self._settle(start, spec)
        assert self._spec is not None  # for the type checker
        if not spec.agrees(self._spec, promote_dtypes=self._plan.promote_dtypes):
            raise DisagreementError(spec)
        return results

    def _settle(self, start: int, spec: Spec) -> None:
        self.first = (start, spec)
        self._plan.check(spec, promote_dtypes=self._plan.promote_dtypes)
        earlier = self._plan.settled
        if earlier is not None:  # files do not tell whether they were one result or a tuple
            earlier = replace(earlier, is_tuple=spec.is_tuple)
        settled: Spec = self._agree(earlier or spec)
        self._spec = settled
        self._dtypes = [dtype for dtype, _ in settled.parts]
        outputs = self._plan.outputs_for(len(settled.parts))
        places = self._plan.allocation.places(settled, outputs)
        if places is not None:
            self._writers = [Writer(*pair) for pair in zip(places, settled.axes, strict=True)]

    def _axes_of(
        self, results: list[np.ndarray], length: int, margins: tuple[int, int]
    ) -> tuple[int, ...]:
        wanted = self._plan.axes_for(len(results))
        length += sum(margins)
        return tuple(_axis_of(one, axis, length) for one, axis in zip(results, wanted, strict=True))

    def _prepare(
        self,
        results: list[np.ndarray],
        axes: tuple[int, ...],
        is_tuple: bool,
        length: int,
        margins: tuple[int, int],
    ) -> tuple[Spec, list[np.ndarray]]:
        """The spec of results that were trimmed and cast."""
        before, _ = margins
        if margins != _NO_MARGINS:
            own = slice(before, before + length)
            results = [
                one[(slice(None),) * axis + (own,)] for one, axis in zip(results, axes, strict=True)
            ]
        outputs = self._plan.outputs_for(len(results))
        results = [
            one if output.dtype is None else cast_checked(one, output.dtype)
            for one, output in zip(results, outputs, strict=True)
        ]
        parts = tuple(
            (one.dtype, one.shape[:axis] + one.shape[axis + 1 :])
            for one, axis in zip(results, axes, strict=True)
        )
        return Spec(parts, axes, is_tuple), results


def _to_result(value: Any) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    if holds_mask(value):
        raise TypeError(
            "func returned a masked array, whose mask would be lost; return result.filled(value) "
            "or a tuple of data and mask"
        )
    array = np.asarray(value)
    if array.ndim == 0:
        raise TypeError(
            f"func returned {_short(value)} ({type(value).__name__}) for a chunk; map_array needs "
            "an array with the chunk's length along the mapped axis (or a tuple of such arrays). "
            "Functions of one item go to map_items; for one value from each chunk there are "
            "map_chunks and reduce_array"
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
            "axis (with depth, that of the neighbours too: they are cut off afterwards), or say "
            "with out_axis where it stands in the result. To reduce over the axis there is "
            "reduce_array, for results of any length map_chunks"
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

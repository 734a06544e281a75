"""Putting results in place: from what the function returns to one array over all chunks.

The first result of a run defines the `Spec` of all: number of outputs, dtypes, and shapes without
the mapped axis. Workers agree on it through the ledger (`Propose`): the first proposal counts.

Results that cannot be put in place go to the caller instead: Python objects in processes, and,
where dtypes promote, results of another dtype than the agreed one.
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
from taskcarrier.workers.task import WorkerContext

NO_FILL = Fill()
_NO_MARGINS = (0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the results of a run are put in place, in a form that can travel.

    Attributes
    ----------
    allocation : OutputBuffer
        The memory of the outputs.
    n_items : int
        The number of items along the mapped axis.
    out_axis : int or tuple of int
        Where the mapped axis stands in results, as the user gave it.
    outputs : Output or tuple of Output
        What is asked of every output, or of each.
    promote_dtypes : bool
        Whether results of different dtypes promote; otherwise they disagree.
    fill : Fill
        The values that stand where the function failed.
    settled : Spec or None
        The spec that an earlier run has agreed on, if this run continues it.
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
        """Return what is asked of each of `n_results` results; raise if their number is wrong."""
        if isinstance(self.outputs, Output):
            return (self.outputs,) * n_results
        if len(self.outputs) != n_results:
            raise ValueError(
                f"out= or dtype= has {len(self.outputs)} entries, but func returned {n_results} "
                "results"
            )
        return self.outputs

    def axes_for(self, n_results: int) -> tuple[int, ...]:
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
        outputs = self.outputs_for(len(spec.parts))
        for output, shape in zip(outputs, spec.shapes(self.n_items), strict=True):
            if output.shape is not None and output.shape != shape:
                raise ValueError(f"out has shape {output.shape}, but the results need {shape}")
            if isinstance(output.place, NpyPlace) and any(d.hasobject for d, _ in spec.parts):
                raise TypeError("Python objects cannot be mapped in a .npy file; out= an array")
        if not promote_dtypes:  # otherwise the dtype may still change
            for dtype, _ in spec.parts:
                self.fill.of(dtype)


class OutputWriter:
    """Puts the results of one worker in place.

    Parameters
    ----------
    plan : Plan
        How results are put in place.
    worker : WorkerContext
        Where workers agree on the spec, and the first result of this one is left for the caller:
        its start and spec.
    """

    def __init__(self, plan: Plan, worker: WorkerContext) -> None:
        self._plan = plan
        self._worker = worker
        self._write_lock = plan.allocation.write_lock()
        self._check_open = plan.allocation.check_open
        self._spec: Spec | None = None
        self._dtypes: list[np.dtype[Any]] = []
        self._writers: list[Writer] | None = None
        # What a result that is one array must look like, by the length of its chunk (there are two,
        # as the last chunk may be shorter). Comparing takes 0.2 µs a chunk, making a spec 4 µs.
        self._put: Callable[[int, int, np.ndarray], None]
        self._dtype: np.dtype[Any] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}

    def place(
        self, start: int, stop: int, result: Any, margins: tuple[int, int] = _NO_MARGINS
    ) -> list[np.ndarray] | None:
        """Put the result of one chunk in place, and raise if something is wrong with it.

        `margins` says how many items are cut off before and after. Returns None, or the results
        that could not be put in place, for the caller.
        """
        length = stop - start
        if (
            type(result) is np.ndarray
            and result.shape == self._shapes.get(length)
            and result.dtype == self._dtype
            and margins == _NO_MARGINS
        ):
            if self._write_lock is None:
                self._put(start, stop, result)
            else:
                with self._write_lock:
                    self._check_open()
                    self._put(start, stop, result)
            return None
        results = self.check_result(start, length, result, margins)
        dtypes = [array.dtype for array in results]
        if self._writers is None or dtypes != self._dtypes:
            return results
        if type(result) is np.ndarray and margins == _NO_MARGINS:
            self._put = self._writers[0].put
            self._dtype = results[0].dtype
            self._shapes[length] = results[0].shape
        with self._write_lock or nullcontext():
            self._check_open()
            for writer, array in zip(self._writers, results, strict=True):
                writer.put(start, stop, array)
        return None

    def check_result(
        self, start: int, length: int, result: Any, margins: tuple[int, int] = _NO_MARGINS
    ) -> list[np.ndarray]:
        """Return the results of `length` items, trimmed and cast; raise if they break the spec."""
        is_tuple = isinstance(result, tuple)
        results = [_to_result(value) for value in (result if is_tuple else (result,))]
        axes = self._normalize_axes(results, length, margins)
        spec, results = self._prepare(results, axes, is_tuple, length, margins)
        if self._spec is None:
            self._agree_on_spec(start, spec)
        assert self._spec is not None  # for the type checker
        if not spec.agrees(self._spec, promote_dtypes=self._plan.promote_dtypes):
            raise DisagreementError(spec)
        return results

    def _agree_on_spec(self, start: int, spec: Spec) -> None:
        self._worker.facts = (start, spec)
        self._plan.check(spec, promote_dtypes=self._plan.promote_dtypes)
        earlier = self._plan.settled
        if earlier is not None:  # files do not say whether they were one result or a tuple
            earlier = replace(earlier, is_tuple=spec.is_tuple)
        agreed: Spec = self._worker.propose(earlier or spec)
        self._spec = agreed
        self._dtypes = [dtype for dtype, _ in agreed.parts]
        outputs = self._plan.outputs_for(len(agreed.parts))
        places = self._plan.allocation.places(agreed, outputs)
        if places is not None:
            self._writers = [Writer(*pair) for pair in zip(places, agreed.axes, strict=True)]

    def _normalize_axes(
        self, results: list[np.ndarray], length: int, margins: tuple[int, int]
    ) -> tuple[int, ...]:
        wanted = self._plan.axes_for(len(results))
        length += sum(margins)
        return tuple(
            _check_axis(result, axis, length) for result, axis in zip(results, wanted, strict=True)
        )

    def _prepare(
        self,
        results: list[np.ndarray],
        axes: tuple[int, ...],
        is_tuple: bool,
        length: int,
        margins: tuple[int, int],
    ) -> tuple[Spec, list[np.ndarray]]:
        """Trim and cast results; return their spec and the results."""
        before, _ = margins
        if margins != _NO_MARGINS:
            own = slice(before, before + length)
            results = [
                result[(slice(None),) * axis + (own,)]
                for result, axis in zip(results, axes, strict=True)
            ]
        outputs = self._plan.outputs_for(len(results))
        results = [
            result if output.dtype is None else cast_checked(result, output.dtype)
            for result, output in zip(results, outputs, strict=True)
        ]
        parts = tuple(
            (result.dtype, result.shape[:axis] + result.shape[axis + 1 :])
            for result, axis in zip(results, axes, strict=True)
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
            f"func returned {_shorten(value)} ({type(value).__name__}) for a chunk; map_array "
            "needs an array with the chunk's length along the mapped axis (or a tuple of such "
            "arrays). Functions of one item go to map_items; for one value from each chunk there "
            "are map_chunks and reduce_array"
        )
    return array


def _check_axis(result: np.ndarray, wanted: int, length: int) -> int:
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


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004  # fits a line


def check_out_axis(out_axis: object, axis: object) -> int | tuple[int, ...]:
    """Check `out_axis` and return it; if it is None, return `axis` (of the first array)."""
    if out_axis is None:
        out_axis = axis[0] if isinstance(axis, tuple) else axis
    entries: Sequence[object] = out_axis if isinstance(out_axis, tuple) else (out_axis,)
    for entry in entries:
        if not hasattr(entry, "__index__"):
            raise TypeError(f"out_axis must be an integer or a tuple of them, got {out_axis!r}")
    return out_axis  # type: ignore[return-value]  # each entry is checked

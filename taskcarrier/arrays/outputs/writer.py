"""Putting results in place: from what the function returns to one array over all chunks.

The first result of a run defines the `Spec` of all: number of outputs, dtypes, and shapes without
the mapped axis. Workers agree on it through the ledger (`Propose`): the first proposal counts.

Results that cannot be put in place go to the caller instead: Python objects in processes, and,
where dtypes promote, results of another dtype than the agreed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from taskcarrier.arrays.casting import cast_checked
from taskcarrier.arrays.inputs.check import holds_mask, normalize_axis
from taskcarrier.arrays.outputs.buffers import OutputBuffer, WriteRange, make_range_writer
from taskcarrier.arrays.outputs.specs import (
    DeferredResult,
    DisagreementError,
    Spec,
    shorten_repr,
)
from taskcarrier.arrays.outputs.stacking import MixedDtypes
from taskcarrier.workers.task import WorkerContext

_NO_MARGINS = (0, 0)


class OutputWriter:
    """Puts the results of one worker in place.

    Parameters
    ----------
    buffer : OutputBuffer
        The memory of the outputs, and what is asked of results.
    worker : WorkerContext
        Where workers agree on the spec, and the first result of this one is left for the caller:
        its start and spec.
    """

    def __init__(self, buffer: OutputBuffer, worker: WorkerContext) -> None:
        self._buffer = buffer
        self._worker = worker
        self._write_lock = buffer.make_write_lock()
        self._check_open = buffer.check_open
        self._spec: Spec | None = None
        self._dtypes: list[np.dtype[Any]] = []
        self._range_writers: list[WriteRange] | None = None
        # What a result that is one array must look like, by the length of its chunk (there are two,
        # as the last chunk may be shorter). Comparing takes 0.2 µs a chunk, making a spec 4 µs.
        self._write_range: WriteRange
        self._dtype: np.dtype[Any] | None = None
        self._shapes: dict[int, tuple[int, ...]] = {}

    def write(
        self, start: int, stop: int, result: Any, margins: tuple[int, int] = _NO_MARGINS
    ) -> Sequence[DeferredResult]:
        """Put the result of one chunk in place, and raise if something is wrong with it.

        `margins` says how many items are cut off before and after. Returns the results that could
        not be put in place, for the caller.
        """
        length = stop - start
        if (
            type(result) is np.ndarray
            and result.shape == self._shapes.get(length)
            and result.dtype == self._dtype
            and margins == _NO_MARGINS
        ):
            if self._write_lock is None:
                self._write_range(start, stop, result)
            else:
                with self._write_lock:
                    self._check_open()
                    self._write_range(start, stop, result)
            return ()
        if isinstance(result, MixedDtypes):
            return [
                (start + positions, self._check_result(start, len(positions), group, margins))
                for positions, group in result.groups
            ]
        results = self._check_result(start, length, result, margins)
        if self._range_writers is None or [array.dtype for array in results] != self._dtypes:
            return [(slice(start, stop), results)]
        if type(result) is np.ndarray and margins == _NO_MARGINS:
            self._write_range = self._range_writers[0]
            self._dtype = results[0].dtype
            self._shapes[length] = results[0].shape
        with self._write_lock or nullcontext():
            self._check_open()
            for write_range, array in zip(self._range_writers, results, strict=True):
                write_range(start, stop, array)
        return ()

    def _check_result(
        self, start: int, length: int, result: Any, margins: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return the results of `length` items, trimmed and cast; raise if they break the spec."""
        is_tuple = isinstance(result, tuple)
        results = _to_results(result)
        axes = self._normalize_axes(results, length, margins)
        spec, results = self._prepare(results, axes, is_tuple, length, margins)
        agreed = self._spec or self._agree_on_spec(start, spec)
        if not spec.agrees(agreed, promote_dtypes=self._buffer.promote_dtypes):
            raise DisagreementError(spec)
        return results

    def _agree_on_spec(self, start: int, spec: Spec) -> Spec:
        self._worker.facts = (start, spec)
        self._buffer.check(spec, promote_dtypes=self._buffer.promote_dtypes)
        earlier = self._buffer.earlier_spec
        if earlier is not None:  # files do not say whether they were one result or a tuple
            earlier = replace(earlier, is_tuple=spec.is_tuple)
        agreed: Spec = self._worker.propose(earlier or spec)
        self._spec = agreed
        self._dtypes = [dtype for dtype, _ in agreed.parts]
        places = self._buffer.make_places(agreed)
        if places is not None:
            self._range_writers = [
                make_range_writer(*pair) for pair in zip(places, agreed.axes, strict=True)
            ]
        return agreed

    def _normalize_axes(
        self, results: list[np.ndarray], length: int, margins: tuple[int, int]
    ) -> tuple[int, ...]:
        wanted = self._buffer.get_axes(len(results))
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
        outputs = self._buffer.get_outputs(len(results))
        results = [
            result if output.dtype is None else cast_checked(result, output.dtype)
            for result, output in zip(results, outputs, strict=True)
        ]
        parts = tuple(
            (result.dtype, result.shape[:axis] + result.shape[axis + 1 :])
            for result, axis in zip(results, axes, strict=True)
        )
        return Spec(parts, axes, is_tuple), results


def make_arrays(result: Any, length: int) -> Any:
    """Return the result of `length` items as an array or tuple of arrays; raise if it is neither.

    The items stand along the first axis. Groups of different dtypes are returned as they are.
    """
    if isinstance(result, MixedDtypes):
        return result
    results = _to_results(result)
    for array in results:
        _check_axis(array, 0, length)
    return tuple(results) if isinstance(result, tuple) else results[0]


def _to_results(result: Any) -> list[np.ndarray]:
    """Return the arrays that a function has returned; raise if it has returned anything else."""
    is_tuple = isinstance(result, tuple)
    if is_tuple and not result:
        raise _make_no_array_error(result)
    return [_to_result(value) for value in (result if is_tuple else (result,))]


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
        raise _make_no_array_error(value)
    return array


def _make_no_array_error(value: object) -> TypeError:
    return TypeError(
        f"func returned {shorten_repr(value)} ({type(value).__name__}) for a chunk; map_array "
        "needs an array with the chunk's length along the mapped axis (or a tuple of such "
        "arrays). Functions of one item go to map_items; for one value from each chunk there "
        "are map_chunks and reduce_array"
    )


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

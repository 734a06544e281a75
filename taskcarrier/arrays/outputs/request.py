"""Where the user wants results: in new arrays, in arrays of their own, or in ``.npy`` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskcarrier.arguments import iterate_arrays
from taskcarrier.arrays.casting import check_dtype
from taskcarrier.arrays.inputs.check import Inputs, normalize_axis
from taskcarrier.arrays.outputs.buffers import (
    ANY,
    LocalBuffer,
    NpyPlace,
    Output,
    SharedBuffer,
    open_place,
)
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.arrays.outputs.writer import Plan
from taskcarrier.memory.memmaps import check_not_cut_off, find_region, find_shared, identify_file
from taskcarrier.memory.npy import NpyWriter, check_path, make_header
from taskcarrier.memory.strides import has_internal_overlap
from taskcarrier.notes import add_note
from taskcarrier.workers.records import Where

# How much work to spend on whether two interleaved views share an item; arbitrary.
_MAX_WORK: Any = 10_000

DeferredResult = tuple[Where, list[np.ndarray]]
"""A result that the worker could not put in place, and its position along the mapped axis."""


@dataclass(eq=False)
class OutputRequest:
    """What a call asks of its results, from the check of its arguments to the end of the run.

    Attributes
    ----------
    entries : tuple of (ndarray or str), or None
        The arrays and paths that ``out=`` names, one for each result.
    dtypes : tuple of (dtype or None), or None
        The dtypes that ``dtype=`` asks for.
    has_several_dtypes : bool
        Whether there is one dtype for each result; otherwise one dtype holds for all results.
    is_several : bool
        Whether ``out=`` or ``dtype=`` is a tuple.
    keeps : bool
        Whether unfinished files stay when the run fails.
    is_running : bool
        Whether the unfinished files are those that an earlier run has left.
    """

    entries: tuple[np.ndarray | str, ...] | None = None
    dtypes: tuple[np.dtype[Any] | None, ...] | None = None
    has_several_dtypes: bool = False
    is_several: bool = False
    keeps: bool = False
    is_running: bool = False
    _writers: dict[int, NpyWriter] = field(default_factory=dict)

    @property
    def known_dtypes(self) -> list[np.dtype[Any]]:
        """The dtypes that are asked for: those of arrays in ``out=``, else those of ``dtype=``."""
        arrays = [entry for entry in self.entries or () if isinstance(entry, np.ndarray)]
        return [array.dtype for array in arrays] or [
            dtype for dtype in self.dtypes or () if dtype is not None
        ]

    @property
    def knows_dtypes(self) -> bool:
        """Whether a dtype is asked for every result."""
        arrays = [entry for entry in self.entries or () if isinstance(entry, np.ndarray)]
        if self.entries and len(arrays) == len(self.entries):
            return True
        # Not `None in`: comparing with a dtype takes None for float64.
        return self.dtypes is not None and all(dtype is not None for dtype in self.dtypes)

    def make_empty_result(self) -> Any:
        """Return what a function of no items would return to satisfy this request."""
        dtypes = self.dtypes or (None,)
        entries: tuple[Any, ...] = self.entries or (None,) * len(dtypes)
        dtypes = dtypes if self.has_several_dtypes else dtypes * len(entries)
        results = tuple(
            np.empty_like(entry) if isinstance(entry, np.ndarray) else np.empty(0, dtype)
            for entry, dtype in zip(entries, dtypes, strict=True)
        )
        return results if self.is_several else results[0]

    def outputs(self, *, shared: bool) -> Output | tuple[Output, ...]:
        """Return what is asked of every output, or of each, and make the files.

        `shared` says whether workers are processes, which write to shared memory alone.
        """
        if self.entries is None:
            if self.dtypes is None:
                return ANY
            outputs = tuple(Output(dtype) for dtype in self.dtypes)
            return outputs if self.has_several_dtypes else outputs[0]
        dtypes = self.dtypes or (None,)
        if not self.has_several_dtypes:
            dtypes *= len(self.entries)
        return tuple(
            self._make_output(number, entry, dtype, shared=shared)
            for number, (entry, dtype) in enumerate(zip(self.entries, dtypes, strict=True))
        )

    def _make_output(
        self, number: int, entry: np.ndarray | str, dtype: np.dtype[Any] | None, *, shared: bool
    ) -> Output:
        if isinstance(entry, str):
            writer = NpyWriter(entry, keeps=self.keeps, is_running=self.is_running)
            self._writers[number] = writer
            return Output(dtype, None, NpyPlace(writer.segment))
        # An array in ordinary memory is filled at the end, from the memory that workers share.
        place = find_shared(entry, writable=True) if shared else entry
        return Output(entry.dtype, entry.shape, place)

    @property
    def paths(self) -> list[str]:
        """The paths of the files that are asked for."""
        return [os.path.realpath(entry) for entry in self.entries or () if isinstance(entry, str)]

    def read_spec(self, out_axis: int | tuple[int, ...], n_items: int) -> Spec | None:
        """Return the spec of the results that an earlier run has left in its files, or None."""
        headers = [writer.header() for writer in self._writers.values()]
        axes = out_axis if isinstance(out_axis, tuple) else (out_axis,) * len(headers)
        parts = []
        mapped_axes = []
        for header, signed_axis in zip(headers, axes, strict=True):
            if header is None:
                return None
            dtype, shape = header
            axis = signed_axis % len(shape) if shape else 0
            if not shape or shape[axis] != n_items:
                return None
            parts.append((dtype, shape[:axis] + shape[axis + 1 :]))
            mapped_axes.append(axis)
        return Spec(tuple(parts), tuple(mapped_axes), self.is_several)

    def fill_outputs(
        self,
        plan: Plan,
        spec: Spec,
        deferred: Sequence[DeferredResult],
        holes: Sequence[tuple[int, int]],
    ) -> list[np.ndarray]:
        """Return the whole outputs, after writing deferred results and filling the holes."""
        outputs = plan.outputs_for(len(spec.parts))
        places = plan.allocation.places(spec, outputs)
        if places is None:  # Python objects: all results are in `deferred`
            local_outputs = [replace(output, place=None) for output in outputs]
            places = LocalBuffer(plan.n_items, "C").places(spec, local_outputs)
        arrays = list(map(open_place, places))
        dtypes = [
            _promote_dtypes({dtype, *(results[number].dtype for _, results in deferred)})
            for number, (dtype, _) in enumerate(spec.parts)
        ]
        leading = [(slice(None),) * axis for axis in spec.axes]
        missing: list[Where] = [where for where, _ in deferred]
        missing += [slice(*hole) for hole in holes]
        for number, (dtype, index) in enumerate(zip(dtypes, leading, strict=True)):
            if arrays[number].dtype != dtype:
                for where in missing:  # values that were never written might not survive a cast
                    arrays[number][(*index, where)] = np.zeros((), arrays[number].dtype)
                arrays[number] = self._promote(arrays[number], dtype, outputs[number])
        for where, results in deferred:
            for array, index, result in zip(arrays, leading, results, strict=True):
                array[(*index, where)] = result
        values = [plan.fill.of(array.dtype) for array in arrays]
        for hole in holes:
            for array, index, value in zip(arrays, leading, values, strict=True):
                array[(*index, slice(*hole))] = value
        return arrays

    @staticmethod
    def _promote(array: np.ndarray, dtype: np.dtype[Any], output: Output) -> np.ndarray:
        promoted = array.astype(dtype)
        if not isinstance(output.place, NpyPlace):
            return promoted
        order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        file = open_place(output.place.view(dtype, array.shape, order))
        file[...] = promoted
        return file

    def finish(self, plan: Plan, spec: Spec, arrays: list[np.ndarray]) -> Any:
        """Return what the call returns, and give files their names."""
        results = []
        outputs = plan.outputs_for(len(arrays))
        for number, (array, output) in enumerate(zip(arrays, outputs, strict=True)):
            entry = None if self.entries is None else self.entries[number]
            if isinstance(entry, str):
                order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
                header = make_header(array.dtype, array.shape, order)
                results.append(self._writers[number].finish(array, header))
            elif entry is not None:
                if output.place is None:
                    entry[...] = array
                results.append(entry)
            elif isinstance(plan.allocation, SharedBuffer) and plan.allocation.is_wasteful(
                spec, outputs
            ):
                results.append(array.copy(order="K"))
            else:
                results.append(array)
        return tuple(results) if spec.is_tuple else results[0]

    def discard(self) -> None:
        """Remove the unfinished files."""
        for writer in self._writers.values():
            writer.discard()


def _promote_dtypes(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the dtype that `numpy.stack` makes of several; one alone keeps its byte order."""
    if len(dtypes) == 1:
        return dtypes.pop()
    try:
        return np.result_type(*dtypes)
    except TypeError as error:
        names = ", ".join(sorted(map(str, dtypes)))
        add_note(error, f"func returned values of dtypes {names}, which have none in common")
        raise


def check_output_request(
    out: object,
    dtype: object,
    out_axis: int | tuple[int, ...],
    inputs: Inputs,
    others: Iterable[object],
) -> OutputRequest:
    """Check ``out=`` and ``dtype=`` and return what they ask for.

    `others` are further objects that `func` will see, arrays among them: no output may overlap
    with them or with an input.
    """
    is_tuple = isinstance(dtype, tuple)
    dtypes: tuple[np.dtype[Any] | None, ...] | None = None
    if dtype is not None:
        dtypes = tuple(
            check_dtype(value) for value in (dtype if isinstance(dtype, tuple) else (dtype,))
        )
    if out is None:
        return OutputRequest(None, dtypes, is_tuple, is_tuple)
    entries = tuple(_check_entry(value) for value in (out if isinstance(out, tuple) else (out,)))
    if is_tuple and dtypes is not None and len(dtypes) != len(entries):
        raise ValueError(f"dtype has {len(dtypes)} entries, out has {len(entries)}")
    axes = out_axis if isinstance(out_axis, tuple) else (out_axis,) * len(entries)
    if len(axes) != len(entries):
        raise ValueError(f"out_axis has {len(axes)} entries, out has {len(entries)}")
    wanted_dtypes = (dtypes or (None,)) * (1 if is_tuple else len(entries))
    other_arrays = list(iterate_arrays([*inputs.arrays, *others]))
    for entry, axis, wanted_dtype in zip(entries, axes, wanted_dtypes, strict=True):
        if isinstance(entry, np.ndarray):
            _check_array(entry, axis, wanted_dtype, inputs.n_items)
            _check_no_overlap(entry, other_arrays)
            other_arrays.append(entry)
    paths = [os.path.realpath(entry) for entry in entries if isinstance(entry, str)]
    for path in paths:
        _check_file(path, other_arrays)
        if paths.count(path) > 1:
            raise ValueError(f"out names {path!r} twice")
    return OutputRequest(entries, dtypes, is_tuple, is_tuple or isinstance(out, tuple))


def _check_entry(value: object) -> np.ndarray | str:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("out is a masked array; pass its .data")
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (str, os.PathLike)):
        return check_path(value)
    raise TypeError(
        "out must be an ndarray, a memmap, a path ending in .npy or a tuple of these, got "
        f"{value!r}"
    )


def _check_array(out: np.ndarray, axis: int, dtype: np.dtype[Any] | None, n_items: int) -> None:
    if not out.flags.writeable:
        raise ValueError("out is read-only; pass an array that may be written to")
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"out has dtype {out.dtype}, but dtype={dtype} is asked for")
    length = out.shape[normalize_axis(axis, out.ndim, "out_axis")]
    if length != n_items:
        raise ValueError(
            f"out has length {length} along axis {axis} (shape {out.shape}), but there are "
            f"{n_items} items"
        )
    check_not_cut_off(out)
    if has_internal_overlap(out):
        raise ValueError("out overlaps with itself: some of its items lie in the same memory")


def _check_no_overlap(out: np.ndarray, others: Iterable[np.ndarray]) -> None:
    for other in others:
        if overlap(out, other):
            raise ValueError(
                f"out overlaps with an input of shape {other.shape} (or another out): workers "
                "would read what others have written; pass other memory, or a copy of the input"
            )


def _check_file(path: str, others: Iterable[np.ndarray]) -> None:
    file = identify_file(path)
    for other in others:
        if file is not None and other.nbytes and find_region(other)[0] == file:
            raise ValueError(
                f"out={path!r} is the file that an input or another out maps; choose another one"
            )


def overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays share memory, also through different mappings of one file."""
    if one.nbytes == 0 or other.nbytes == 0:
        return False
    if np.may_share_memory(one, other):
        try:
            return np.shares_memory(one, other, max_work=_MAX_WORK)
        except np.exceptions.TooHardError:
            return True
    (owner, low, high), (other_owner, other_low, other_high) = find_region(one), find_region(other)
    return owner != "memory" and owner == other_owner and low < other_high and other_low < high

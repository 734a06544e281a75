"""Where the user wants results: in new arrays, in arrays of their own, or in ``.npy`` files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskcarrier.arrays.casting import MakeFill, check_dtype, find_missing_value
from taskcarrier.arrays.inputs.check import Inputs, normalize_axis
from taskcarrier.arrays.outputs.buffers import (
    LocalBuffer,
    Output,
    OutputBuffer,
    SharedBuffer,
)
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.memory.memmaps import check_not_cut_off, find_region, find_shared, identify_file
from taskcarrier.memory.npy import NpyWriter, check_path
from taskcarrier.memory.strides import has_internal_overlap
from taskcarrier.memory.views import iterate_arrays

# How much work to spend on whether two interleaved views share an item; arbitrary.
_MAX_WORK: Any = 10_000


@dataclass(eq=False, kw_only=True)
class OutputRequest:
    """What the user said about outputs, checked.

    Attributes
    ----------
    entries : tuple of (ndarray, str or None)
        For each output, the array or path that ``out=`` names; None for a new array.
    dtypes : tuple of (dtype or None)
        For each output, the dtype that is asked for; None for that of the results.
    is_tuple : bool
        Whether ``out=`` or ``dtype=`` is a tuple, of one entry for each result.
    out_axis : int or tuple of int
        Where the mapped axis stands in results.
    promote_dtypes : bool
        Whether results of different dtypes promote; otherwise they disagree.
    make_fill : callable
        Returns the value that stands where the function failed, for a dtype.
    """

    entries: tuple[np.ndarray | str | None, ...] = (None,)
    dtypes: tuple[np.dtype[Any] | None, ...] = (None,)
    is_tuple: bool = False
    out_axis: int | tuple[int, ...] = 0
    promote_dtypes: bool = False
    make_fill: MakeFill = find_missing_value
    _files: list[NpyWriter] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        """The paths of the files that are asked for."""
        return [os.path.realpath(entry) for entry in self.entries if isinstance(entry, str)]

    def make_empty_result(self) -> Any:
        """Return what a function of no items would return to satisfy this request."""
        results = tuple(
            np.empty_like(entry) if isinstance(entry, np.ndarray) else np.empty(0, dtype)
            for entry, dtype in zip(self.entries, self.dtypes, strict=True)
        )
        return results if self.is_tuple else results[0]

    def apply_to(
        self, buffer: OutputBuffer, *, keep_files: bool = False, is_resumed: bool = False
    ) -> None:
        """Make the files that are asked for, and set what is asked of results in `buffer`.

        With `keep_files`, unfinished files stay when the run fails. With `is_resumed`, the run goes
        on with those that an earlier run has left.
        """
        outputs = []
        for entry, dtype in zip(self.entries, self.dtypes, strict=True):
            if isinstance(entry, str):
                file = NpyWriter(entry, keep=keep_files, is_resumed=is_resumed)
                self._files.append(file)
                outputs.append(Output(dtype, place=file))
            elif entry is None:
                outputs.append(Output(dtype))
            else:
                # What processes do not share is filled at the end.
                is_shared = isinstance(buffer, SharedBuffer)
                place = find_shared(entry, writable=True) if is_shared else entry
                outputs.append(Output(dtype, entry.shape, place))
        # Without out= and a tuple, what is asked for holds for any number of results.
        is_for_all = not self.is_tuple and self.entries[0] is None
        buffer.outputs = outputs[0] if is_for_all else tuple(outputs)
        buffer.out_axis = self.out_axis
        buffer.promote_dtypes = self.promote_dtypes
        buffer.make_fill = self.make_fill
        if is_resumed:
            buffer.earlier_spec = self._read_spec(buffer.n_items)

    def move(self, local: LocalBuffer, shared: SharedBuffer) -> None:
        """Ask the same of results in `shared` as in `local`, whose files it takes over."""
        outputs = (local.outputs,) if isinstance(local.outputs, Output) else local.outputs
        moved = tuple(
            replace(output, place=find_shared(output.place, writable=True))
            if isinstance(output.place, np.ndarray)
            else output
            for output in outputs
        )
        shared.outputs = moved[0] if isinstance(local.outputs, Output) else moved
        shared.out_axis = local.out_axis
        shared.promote_dtypes = local.promote_dtypes
        shared.make_fill = local.make_fill
        shared.earlier_spec = local.earlier_spec

    def _read_spec(self, n_items: int) -> Spec | None:
        """Return the spec of the results that an earlier run has left in its files, or None."""
        headers = [file.read_header() for file in self._files]
        axes = (
            self.out_axis if isinstance(self.out_axis, tuple) else (self.out_axis,) * len(headers)
        )
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
        return Spec(tuple(parts), tuple(mapped_axes), self.is_tuple)

    def finish(self, buffer: OutputBuffer, spec: Spec, arrays: list[np.ndarray]) -> Any:
        """Return what the call returns, and give files their names."""
        results = []
        outputs = buffer.get_outputs(len(arrays))
        entries = self.entries if isinstance(buffer.outputs, tuple) else self.entries * len(arrays)
        for array, output, entry in zip(arrays, outputs, entries, strict=True):
            if isinstance(output.place, NpyWriter):
                results.append(output.place.finish(array))
            elif isinstance(entry, np.ndarray):
                if output.place is None:
                    entry[...] = array
                results.append(entry)
            else:
                results.append(array.copy(order="K") if buffer.is_wasteful(spec) else array)
        return tuple(results) if spec.is_tuple else results[0]

    def discard(self) -> None:
        """Remove the unfinished files."""
        for file in self._files:
            file.discard()


def check_output_request(
    out: object,
    dtype: object,
    out_axis: int | tuple[int, ...],
    inputs: Inputs,
    others: Iterable[object],
    *,
    promote_dtypes: bool = False,
    resume: bool = False,
    make_fill: MakeFill = find_missing_value,
) -> OutputRequest:
    """Check ``out=`` and ``dtype=`` and return what they ask for.

    `others` are further objects that `func` will see, arrays among them: no output may overlap
    with them or with an input. With `promote_dtypes`, results promote unless each has its dtype.
    Text without a length always does: the longest decides. With `resume` nothing promotes.
    """
    entries: tuple[Any, ...] = out if isinstance(out, tuple) else (out,)
    dtypes = [check_dtype(one) for one in (dtype if isinstance(dtype, tuple) else (dtype,))]
    if out is None:
        entries *= len(dtypes)
    else:
        entries = tuple(map(_check_entry, entries))
        if not isinstance(dtype, tuple):
            dtypes *= len(entries)
        _check_outputs(entries, dtypes, out_axis, inputs, others)
        for number, entry in enumerate(entries):
            if isinstance(entry, np.ndarray):
                dtypes[number] = entry.dtype
    # Not `None in`: comparing with a dtype takes None for float64.
    known_dtypes = [one for one in dtypes if one is not None]
    for one in known_dtypes:
        make_fill(one)
    may_differ = (promote_dtypes and len(known_dtypes) < len(dtypes)) or any(
        one.kind in "SU" and one.itemsize == 0 for one in known_dtypes
    )
    return OutputRequest(
        entries=entries,
        dtypes=tuple(dtypes),
        is_tuple=isinstance(out, tuple) or isinstance(dtype, tuple),
        out_axis=out_axis,
        promote_dtypes=may_differ and not resume,
        make_fill=make_fill,
    )


def check_out_axis(out_axis: object, axis: object) -> int | tuple[int, ...]:
    """Check `out_axis` and return it; if it is None, return `axis` (of the first array)."""
    if out_axis is None:
        out_axis = axis[0] if isinstance(axis, tuple) else axis
    entries: Sequence[object] = out_axis if isinstance(out_axis, tuple) else (out_axis,)
    for entry in entries:
        if not hasattr(entry, "__index__"):
            raise TypeError(f"out_axis must be an integer or a tuple of them, got {out_axis!r}")
    return out_axis  # type: ignore[return-value]  # each entry is checked


def _check_outputs(
    entries: Sequence[np.ndarray | str],
    dtypes: Sequence[np.dtype[Any] | None],
    out_axis: int | tuple[int, ...],
    inputs: Inputs,
    others: Iterable[object],
) -> None:
    """Raise if an output has another dtype or length than asked for, or overlaps with an array."""
    if len(dtypes) != len(entries):
        raise ValueError(f"dtype has {len(dtypes)} entries, out has {len(entries)}")
    axes = out_axis if isinstance(out_axis, tuple) else (out_axis,) * len(entries)
    if len(axes) != len(entries):
        raise ValueError(f"out_axis has {len(axes)} entries, out has {len(entries)}")
    other_arrays = list(iterate_arrays([*inputs.arrays, *others]))
    for entry, axis, dtype in zip(entries, axes, dtypes, strict=True):
        if isinstance(entry, np.ndarray):
            _check_array(entry, axis, dtype, inputs.n_items)
            _check_no_overlap(entry, other_arrays)
            other_arrays.append(entry)
    paths = [os.path.realpath(entry) for entry in entries if isinstance(entry, str)]
    for path in paths:
        _check_file(path, other_arrays)
        if paths.count(path) > 1:
            raise ValueError(f"out names {path!r} twice")


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
        if do_overlap(out, other):
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


def do_overlap(one: np.ndarray, other: np.ndarray) -> bool:
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

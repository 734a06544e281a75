"""Checks of the arrays to map over and their axes; errors name the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from taskcarrier.arguments import check_integer
from taskcarrier.memory.memmaps import check_not_cut_off
from taskcarrier.memory.npy import load
from taskcarrier.memory.views import drop_wide_gaps
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.system.interrupts import is_raised_by_handler

# Types that `numpy.asarray` would accept with a loss, by the module that defines them.
_LOSSY = {
    "scipy.sparse": "a sparse matrix: pass X.toarray(), or map over its index pointer",
    "dask": "a dask array: pass X.compute(), or use dask's own map_blocks",
}
_MASKED_RANGES = (
    "have it give plain arrays (of a netCDF4 variable, set_auto_mask(False)), or fill them before"
)
_SEVERAL_AXES = (
    "To map over several axes of an array, make them one: X.reshape(-1, *X.shape[2:]) has the "
    "first two as axis 0; reshape the result back"
)
# Modules of types with a dtype and a shape whose values are in memory: they are converted.
_IN_MEMORY = ("pandas", "xarray")


@record
class Inputs:
    """Arrays of equal length along their mapped axes.

    Attributes
    ----------
    arrays : list of array
        Base-class ndarrays, or array-likes (zarr arrays, for example) that are read by range.
    axes : list of int
        The mapped axis of each array, not negative.
    n_items : int
        Their common length along these axes.
    """

    arrays: list[Any]
    axes: list[int]
    n_items: int

    @property
    def dtypes(self) -> list[np.dtype[Any]]:
        """The dtype of each array."""
        return [array.dtype for array in self.arrays]

    @property
    def nbytes(self) -> int:
        """The bytes of all items."""
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in self.arrays)

    @property
    def item_nbytes(self) -> int:
        """The bytes of one item of all arrays together."""
        return self.nbytes // max(1, self.n_items)

    @property
    def order(self) -> str:
        """The memory order of results: that of the first array, so that chunks stay contiguous."""
        flags = getattr(self.arrays[0], "flags", None)
        return "F" if flags and flags.f_contiguous and not flags.c_contiguous else "C"

    def describe(self, start: int, stop: int) -> str:
        """Describe a range in words."""
        shape = self.arrays[0].shape
        return f"axis {self.axes[0]}, items {start}:{stop} of an array of shape {shape}"


def check_inputs(
    arrays: Sequence[object], axis: object, names: Sequence[str] | None = None
) -> Inputs:
    """Check the arrays of a call; an error says which one is wrong and what to do.

    In errors each array has its number, or its name among `names`.
    """
    if not arrays:
        raise TypeError("expected at least one array to map over")
    names = names or [f"array {number}" for number in range(len(arrays))]
    checked = [_convert_to_array(*pair) for pair in zip(arrays, names, strict=True)]
    if axis is None or isinstance(axis, list):
        raise TypeError(
            "axis must be an integer, or a tuple that is one axis for each array, got "
            f"{axis!r}. {_SEVERAL_AXES}"
        )
    entries = list(axis) if isinstance(axis, tuple) else [axis] * len(checked)
    if len(entries) != len(checked):
        remedy = f". {_SEVERAL_AXES}" if len(entries) > len(checked) else ""
        raise ValueError(
            f"axis has {len(entries)} entries for {len(checked)} arrays: a tuple is one axis for "
            f"each array{remedy}"
        )
    axes = [
        normalize_axis(entry, array.ndim, "axis")
        for entry, array in zip(entries, checked, strict=True)
    ]
    for array in checked:
        if isinstance(array, np.ndarray):
            check_not_cut_off(array)
    lengths = [array.shape[mapped_axis] for mapped_axis, array in zip(axes, checked, strict=True)]
    if len(set(lengths)) > 1:
        raise ValueError(
            "arrays must have equal lengths along the mapped axis, got "
            + ", ".join(
                f"{length} (axis {mapped_axis} of shape {array.shape})"
                for length, mapped_axis, array in zip(lengths, axes, checked, strict=True)
            )
            + "; what every chunk is to get whole goes into args="
        )
    return Inputs([drop_wide_gaps(array) for array in checked], axes, lengths[0])


def normalize_axis(axis: object, ndim: int, name: str) -> int:
    """Return `axis` counted from the front; raise an `AxisError` of NumPy if it does not exist."""
    value = check_integer(axis, name, "an integer")
    if not -ndim <= value < ndim:
        raise np.exceptions.AxisError(value, ndim, name)
    return value % ndim


def refuse_masked(value: object, what: str, remedy: str) -> None:
    """Raise a `TypeError` for a masked array, or a sequence that holds one: NumPy drops masks."""
    if holds_mask(value):
        raise TypeError(f"{what} is masked, or has masked items, and masks would be lost: {remedy}")


def holds_mask(value: object) -> bool:
    """Return whether a value is a masked array, or a list or tuple that holds one at any depth."""
    if isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
            return True
        return any(issubclass(kind, (list, tuple)) for kind in kinds) and any(
            map(holds_mask, value)
        )
    return isinstance(value, np.ma.MaskedArray)


def to_plain_range(items: object) -> np.ndarray:
    """Convert what an array-like gave for a range to an array."""
    refuse_masked(items, "what the array gives for a range", _MASKED_RANGES)
    return np.asarray(items)


def _convert_to_array(value: object, which: str) -> Any:
    if type(value) is np.ndarray and value.ndim:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{which} is a masked array, whose mask would be lost: pass X.filled(value), or map "
            "over X.data and numpy.ma.getmaskarray(X) together"
        )
    for prefix, remedy in _LOSSY.items():
        if _is_defined_in(value, (prefix,)):
            raise TypeError(f"{which} is {remedy}")
    if isinstance(value, (str, bytes, os.PathLike)):
        if isinstance(value, bytes) or not os.fspath(value).endswith(".npy"):
            raise TypeError(
                f"{which} is {value!r}: a path must end in .npy; open other files first, and pass "
                "the array"
            )
        array: Any = load(value)
    elif _is_read_by_range(value):
        array = value
        refuse_masked(_read_no_items(array), f"what is read from {which}", _MASKED_RANGES)
    else:
        array = _convert_in_memory(value, which)
    if array.ndim == 0:
        what = type(value).__name__ + " is 0-dimensional as an array"
        if isinstance(value, (str, os.PathLike)):
            what = f"the file {os.fspath(value)} holds a 0-dimensional array"
        raise TypeError(
            f"{which} has no axis to map over: {what}; pass an array with at least one axis, "
            "constants in args=, or use a mapper for other sequences"
        )
    return array


def _convert_in_memory(value: object, which: str) -> np.ndarray:
    refuse_masked(value, which, "pass each item's .filled(value)")
    try:
        array = np.asanyarray(value)
        refuse_masked(array, f"what {which} becomes as an array", "pass its .filled(value)")
        return np.asarray(array)
    except ValueError as error:
        if isinstance(value, Iterable):
            add_note(
                error,
                f"{which} could not become an array (its items have different lengths?); for "
                "sequences that are no array there are mappers: "
                "StaticParallelMapper()(func, items)",
            )
        raise


def _read_no_items(array: Any) -> object:
    """Read an empty range of an array-like; return None if that fails: later ranges are checked."""
    try:
        return array[:0]
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        return None


def _is_defined_in(value: object, prefixes: Iterable[str]) -> bool:
    modules = [f"{kind.__module__}." for kind in type(value).__mro__]
    return any(module.startswith(f"{prefix}.") for prefix in prefixes for module in modules)


def _is_read_by_range(value: object) -> bool:
    """Return whether a value is an array-like that is not in memory (zarr, HDF5, and others)."""
    return (
        not isinstance(value, (np.ndarray, np.generic))
        and isinstance(getattr(value, "dtype", None), np.dtype)
        and isinstance(getattr(value, "shape", None), tuple)
        and hasattr(value, "ndim")
        and hasattr(value, "__getitem__")
        and not hasattr(value, "__array_interface__")
        and not _is_defined_in(value, _IN_MEMORY)
    )

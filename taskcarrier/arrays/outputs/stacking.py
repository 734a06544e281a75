"""Stacking: the values of items become one array, as `numpy.stack` makes it.

Numbers of one type become an array in one step: 20 ns an item, where `numpy.stack` takes over a
microsecond (a call of the function takes 100 ns; `python -m bench items`). Values of different
dtypes stay apart until all values of the run are known: promoting some first and then the others
can give another dtype and other values than promoting all at once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from taskcarrier.arrays.inputs.check import holds_mask, normalize_axis
from taskcarrier.arrays.outputs.specs import shorten_repr
from taskcarrier.record import record

_PYTHON_NUMBERS = {bool: np.bool_, float: np.float64, complex: np.complex128}


@record
class MixedDtypes:
    """The values of a range, grouped by their dtypes.

    Attributes
    ----------
    groups : list of (ndarray of int, result)
        For each group, the positions of its values in the range, and their array (or tuple).
    """

    groups: list[tuple[np.ndarray, Any]]


ObjectRule = Literal["refuse", "allow", "keep"]
"""What becomes of objects: refuse all but numbers, allow any, or keep numbers as objects too."""

_Column = np.ndarray | list[np.ndarray]
"""The values of one result: one array of all, or, if dtypes differ, an array for each value."""


def holds_objects(dtype: np.dtype[Any]) -> bool:
    """Return whether values are Python objects, or records that have some."""
    return dtype.hasobject and dtype.kind != "T"  # of a StringDType NumPy says that it has them


def stack_values(
    values: Sequence[Any],
    start: int,
    out_axis: int | tuple[int, ...],
    *,
    objects: ObjectRule,
) -> Any:
    """Stack the values of consecutive items into an array, or a tuple of arrays for tuples.

    Parameters
    ----------
    values : sequence
        The values that the function returned, at least one.
    start : int
        The number of the first item, for messages.
    out_axis : int or tuple of int
        Where the mapped axis stands in results, in all or in each.
    objects : str
        What becomes of values that are Python objects (`ObjectRule`).

    Returns
    -------
    ndarray, tuple of ndarray, or MixedDtypes

    Raises
    ------
    TypeError
        If objects are refused, and a value is neither an array nor a number; if it is an empty
        tuple.
    ValueError
        If values have different shapes, or tuples different lengths.
    """
    is_tuple = isinstance(values[0], tuple)
    n_results = len(values[0]) if is_tuple else 1
    if n_results == 0:
        raise TypeError(
            f"func returned an empty tuple for item {start}; map_items needs a number or an array "
            "(or a tuple of them)"
        )
    axes = out_axis if isinstance(out_axis, tuple) else (out_axis,) * n_results
    if len(axes) != n_results:
        raise ValueError(f"out_axis has {len(axes)} entries, func returned {n_results}")
    if is_tuple:
        _check_tuples(values, start, n_results)
    columns = [
        _stack_column(column, start, objects)
        for column in (zip(*values, strict=True) if is_tuple else (values,))
    ]
    if all(isinstance(column, np.ndarray) for column in columns):
        return _pack([_move_axis(*pair) for pair in zip(columns, axes, strict=True)], is_tuple)
    return _group_by_dtypes(columns, axes, is_tuple)


def _group_by_dtypes(
    columns: Sequence[_Column], axes: Sequence[int], is_tuple: bool
) -> MixedDtypes:
    """Stack the values apart whose results have the same dtypes."""
    rows: dict[tuple[np.dtype[Any], ...], list[int]] = {}
    for row, values in enumerate(zip(*columns, strict=True)):
        rows.setdefault(tuple(value.dtype for value in values), []).append(row)
    groups = []
    for group in rows.values():
        arrays = [
            _move_axis(np.stack([column[row] for row in group]), axis)
            for column, axis in zip(columns, axes, strict=True)
        ]
        groups.append((np.array(group), _pack(arrays, is_tuple)))
    return MixedDtypes(groups)


def _check_tuples(values: Sequence[Any], start: int, n_results: int) -> None:
    for number, value in enumerate(values):
        if not isinstance(value, tuple) or len(value) != n_results:
            raise ValueError(
                f"func returned a tuple of {n_results} for item {start}, but {shorten_repr(value)} "
                f"for item {start + number}; every item must give as many results"
            )


def _pack(arrays: list[np.ndarray], is_tuple: bool) -> Any:
    return tuple(arrays) if is_tuple else arrays[0]


def _move_axis(array: Any, out_axis: int) -> np.ndarray:
    axis = normalize_axis(out_axis, array.ndim, "out_axis")
    return np.moveaxis(array, 0, axis) if axis else array


def _stack_column(values: Sequence[Any], start: int, objects: ObjectRule) -> _Column:
    if objects == "keep":
        return np.stack(_to_arrays(values, start, objects))
    numbers = _stack_numbers(values)
    if numbers is not None:
        return numbers
    arrays = _to_arrays(values, start, objects)
    if len({array.dtype for array in arrays}) > 1:
        return arrays
    return np.stack(arrays)


def _stack_numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Return an array of numbers that are all of one type; None for anything else."""
    kind = type(values[0])
    if operator.countOf(map(type, values), kind) < len(values):
        return None
    if kind in _PYTHON_NUMBERS:
        return np.fromiter(values, _PYTHON_NUMBERS[kind], len(values))
    if kind is not np.timedelta64 and issubclass(kind, (np.number, np.bool_)):
        return np.fromiter(values, kind, len(values))
    if kind is int:
        stacked = np.array(values)
        if stacked.dtype == np.int64:  # otherwise some do not fit into 64 bits
            return stacked
    return None


def _to_arrays(values: Sequence[Any], start: int, objects: ObjectRule) -> list[np.ndarray]:
    """Return each value as an array; raise unless all have one shape."""
    arrays = []
    dtype = np.dtype(object) if objects == "keep" else None
    for number, value in enumerate(values):
        if holds_mask(value):
            raise TypeError(
                f"func returned a masked array for item {start + number}, whose mask would be "
                "lost; return its .filled(value), or data and mask"
            )
        arrays.append(np.asarray(value, dtype))
    shape = arrays[0].shape
    for number, (array, value) in enumerate(zip(arrays, values, strict=True)):
        if isinstance(values[0], tuple):
            raise ValueError(  # noqa: TRY004  # as for tuples of different lengths
                f"func returned a tuple within a tuple, {shorten_repr(values[0])}, for item "
                f"{start}; return one tuple of numbers and arrays, or use a mapper for a list of "
                "the results"
            )
        if isinstance(value, tuple):
            raise ValueError(  # noqa: TRY004  # as for tuples of different lengths
                f"func returned {shorten_repr(values[0])} for item {start}, but a tuple for item "
                f"{start + number}; every item must give as many results"
            )
        if objects == "refuse" and holds_objects(array.dtype):
            raise TypeError(
                f"func returned {shorten_repr(value)} ({type(value).__name__}) for item "
                f"{start + number}; map_items stacks numbers and arrays: pass dtype=object to "
                "collect them, or use a mapper for a list of them"
            )
        if array.shape != shape:
            raise ValueError(
                f"func returned a value of shape {array.shape} for item {start + number}, but of "
                f"shape {shape} for item {start}; all items must give the same shape"
            )
    return arrays

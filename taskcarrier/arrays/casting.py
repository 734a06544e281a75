"""Casts of values to other dtypes; a cast that would lose a value raises an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_REMEDY = "return that dtype from func, or another one with dtype= or out="


def check_dtype(dtype: object, name: str = "dtype") -> np.dtype[Any] | None:
    """Return `dtype` as a NumPy dtype, or None for None; raise a `TypeError` if it is neither."""
    if dtype is None:
        return None
    try:
        return np.dtype(dtype)  # type: ignore[call-overload, no-any-return]  # any object
    except TypeError as error:
        raise TypeError(f"{name} must be a NumPy dtype, got {dtype!r}: {error}") from None


def cast_checked(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Cast `values` to `dtype`.

    Floats are cast within their kind (``same_kind``), integers to integers if every value fits,
    strings, dates and structures only if that is safe. Integers become floats as NumPy rounds
    them, which NumPy calls safe: 2**53 + 1 as a double is 2**53.

    Raises
    ------
    TypeError
        If values of their dtype cannot become `dtype` at all.
    ValueError
        If an integer does not fit.
    """
    if values.dtype == dtype:
        return values
    source = values.dtype
    if dtype.kind in "iu" and source.kind in "iu":
        _check_limits(values, dtype)
    else:
        stays_number = source.kind in "biufc" and dtype.kind in "fcO"
        stays_text = source.kind == "U" and dtype.kind == "T"  # which loses nothing
        rule: Any = "same_kind" if stays_number or stays_text else "safe"
        if not np.can_cast(source, dtype, rule):
            raise TypeError(f"results of dtype {source} cannot become {dtype} ({_REMEDY})")
    return values.astype(dtype)


def _check_limits(values: np.ndarray, dtype: np.dtype[Any]) -> None:
    if values.size == 0 or np.can_cast(values.dtype, dtype):
        return
    limits = np.iinfo(dtype)
    for value in (int(values.min()), int(values.max())):
        if not limits.min <= value <= limits.max:
            raise ValueError(
                f"the result {value} does not fit into {dtype}, which holds {limits.min} to "
                f"{limits.max} ({_REMEDY})"
            )


def cast_scalar(value: object, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """Return one value as a 0-d array of `dtype`, where it must still be the same value.

    Raises
    ------
    TypeError
        If it is not; the message has the argument's `name`, the value and the dtype.
    """
    result = _cast_if_preserved(value, dtype)
    if result is None:
        raise TypeError(f"{name}={value!r} is no value of dtype {dtype}")
    return result


def _cast_if_preserved(value: object, dtype: np.dtype[Any]) -> np.ndarray | None:
    """Return one value as a 0-d array of `dtype`; None if it is not the same value any more."""
    if dtype.kind == "T" and not isinstance(value, str) and value is not _get_na_object(dtype):
        return None  # NumPy would make text of it
    result: np.ndarray
    try:
        if dtype.hasobject:
            result = np.empty((), dtype)
            result[()] = value
            return result
        original = np.asarray(value)
        if original.dtype.kind == "c" and dtype.kind != "c":
            return None
        with np.errstate(all="ignore"):  # the result is checked below
            result = original.astype(dtype)
        is_preserved = original.ndim == 0 and _is_preserved(original, result)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if is_preserved else None


def _is_preserved(original: np.ndarray, result: np.ndarray) -> bool:
    """Return whether a cast kept the value; floats may be rounded, NaN and NaT must stay."""
    if result.dtype.kind in "fc" and original.dtype.kind in "biufc":
        keeps_imaginary = result.dtype.kind == "c" or original.dtype.kind != "c"
        return bool(keeps_imaginary and np.isfinite(original) == np.isfinite(result))
    if result.dtype.kind in "mM" and original.dtype.kind in "mM":
        return bool(
            result.dtype.kind == original.dtype.kind
            and ((np.isnat(original) and np.isnat(result)) or original == result)
        )
    if result.dtype.kind in "SUV" or original.dtype.kind in "SUV":
        return bool(original.dtype.kind == result.dtype.kind and original == result)
    numbers = "biufc"
    return bool(
        original.dtype.kind in numbers and result.dtype.kind in numbers and original == result
    )


MakeFill = Callable[[np.dtype[Any]], object]
"""A function that returns what stands for missing results of a dtype, or raises a `TypeError`."""


def find_missing_value(dtype: np.dtype[Any]) -> object:
    """Return the missing value of a dtype: NaN, NaT or None; for others what stands for it.

    That is zero, empty text, and for records that of numbers and text, with None for objects.
    """
    if dtype.kind in "fc":
        return np.nan
    if dtype.kind in "mM":
        return np.array("NaT", dtype)
    if dtype.kind == "T":
        return _get_na_object(dtype)
    if dtype.kind == "O":
        return None
    zeros = np.zeros((), dtype)
    _set_objects_to_none(zeros)
    return zeros


def require_missing_value(dtype: np.dtype[Any]) -> object:
    """Return the missing value of a dtype; raise a `TypeError` if it has none."""
    if dtype.kind not in "fcmMO" and not hasattr(dtype, "na_object"):
        raise TypeError(f"results of dtype {dtype} have no NaN: pass fill_value=")
    return find_missing_value(dtype)


def _get_na_object(dtype: np.dtype[Any]) -> object:
    """Return the missing value with which a `StringDType` was made; no text if it has none."""
    return getattr(dtype, "na_object", "")


def _set_objects_to_none(array: np.ndarray) -> None:
    """Set all objects in fields of records to None."""
    for name in array.dtype.names or ():
        _set_objects_to_none(array[name])
    if array.dtype.kind == "O":
        array[...] = None

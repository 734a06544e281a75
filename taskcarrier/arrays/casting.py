"""Which values may become which: casts that lose nothing without saying so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_REMEDY = "return that dtype from func, or another one with dtype= or out="


def check_dtype(dtype: object, name: str = "dtype") -> np.dtype[Any] | None:
    """`dtype` as a NumPy dtype or None; a `TypeError` for anything that is none."""
    if dtype is None:
        return None
    try:
        return np.dtype(dtype)  # type: ignore[call-overload, no-any-return]  # whatever was passed
    except TypeError as error:
        raise TypeError(f"{name} must be a NumPy dtype, got {dtype!r}: {error}") from None


def cast_checked(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`values` as `dtype`.

    Floats are cast within their kind (``same_kind``), integers to integers when every value fits,
    strings, dates and structures only when it is safe. Integers become floats as NumPy rounds
    them, which it calls safe: 2**53 + 1 as a double is 2**53.

    Raises
    ------
    TypeError
        If values of that dtype cannot become the other at all.
    ValueError
        If an integer does not fit.
    """
    if values.dtype == dtype:
        return values
    source = values.dtype
    if dtype.kind in "iu" and source.kind in "iu":
        _check_range(values, dtype)
    else:
        rule: Any = "same_kind" if dtype.kind in "fcO" and source.kind in "biufc" else "safe"
        if not np.can_cast(source, dtype, rule):
            raise TypeError(f"results of dtype {source} cannot become {dtype} ({_REMEDY})")
    return values.astype(dtype)


def _check_range(values: np.ndarray, dtype: np.dtype[Any]) -> None:
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
    """One value as a 0-d array of `dtype`, if it is that value there too.

    Raises
    ------
    TypeError
        If it is not: the message has the argument's `name`, the value and the dtype.
    """
    if dtype.hasobject:
        made = np.empty((), dtype)
        made[()] = value
        return made
    try:
        given = np.asarray(value)
        if given.dtype.kind == "c" and dtype.kind != "c":
            raise TypeError("a complex value")  # noqa: TRY301  # worded below
        with np.errstate(all="ignore"):  # what does not survive is found below
            made = given.astype(dtype)
        kept = given.ndim == 0 and _is_kept(given, made)
    except (TypeError, ValueError, OverflowError):
        kept = False
    if not kept:
        raise TypeError(f"{name}={value!r} is no value of dtype {dtype}")
    return made


def _is_kept(given: np.ndarray, made: np.ndarray) -> bool:
    """Whether a value survived its cast; floats may be rounded, NaN and NaT stay what they are."""
    if made.dtype.kind in "fc" and given.dtype.kind in "biufc":
        real = made.dtype.kind == "c" or given.dtype.kind != "c"
        return bool(real and np.isfinite(given) == np.isfinite(made))
    if made.dtype.kind in "mM" and given.dtype.kind in "mM":
        return bool(
            made.dtype.kind == given.dtype.kind
            and ((np.isnat(given) and np.isnat(made)) or given == made)
        )
    if made.dtype.kind in "SUV" or given.dtype.kind in "SUV":
        return bool(given.dtype.kind == made.dtype.kind and given == made)
    numbers = "biufc"
    return bool(given.dtype.kind in numbers and made.dtype.kind in numbers and given == made)


@dataclass(frozen=True)
class Fill:
    """What stands where there is no result.

    Attributes
    ----------
    is_given : bool
        Whether the caller has said what.
    value : object
        What it was.
    is_needed : bool
        Whether zero will not do where a dtype has no missing value of its own.
    """

    is_given: bool = False
    value: object = None
    is_needed: bool = False

    def of(self, dtype: np.dtype[Any]) -> object:
        """The value for results of a dtype; a `TypeError` if there is none such."""
        if self.is_given:
            return cast_scalar(self.value, dtype, "fill_value")
        if dtype.kind in "fc":
            return np.nan
        if dtype.kind in "mM":
            return np.array("NaT", dtype)
        if dtype.hasobject:
            return None
        if self.is_needed:
            raise TypeError(f"results of dtype {dtype} have no NaN: pass fill_value=")
        return np.zeros((), dtype)

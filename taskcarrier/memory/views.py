"""Values as workers may see them: read-only, and without wide gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from taskcarrier.memory.memmaps import find_shared
from taskcarrier.memory.strides import copy_without_gaps, is_mostly_gaps


def iterate_arrays(value: object) -> Iterator[np.ndarray]:
    """Yield `value` if it is an array, or all arrays in a container, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from iterate_arrays(member)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for member in value:
            yield from iterate_arrays(member)


def make_read_only(value: Any) -> Any:
    """Return `value` in a form through which the caller's memory cannot be written to.

    Arrays, also those in tuples, become read-only views; a record becomes a copy.
    """
    if isinstance(value, np.ndarray) and value.flags.writeable:
        value = value.view()
        value.flags.writeable = False
    elif isinstance(value, np.void):
        value = value.copy()
    elif type(value) is tuple:
        value = tuple(map(make_read_only, value))
    return value


def copy_or_make_read_only(value: Any, *, own: bool) -> Any:
    """Return a copy of an array if `own` is set, else what `make_read_only` returns."""
    if own and isinstance(value, np.ndarray):
        return np.array(value)
    return make_read_only(value)


def drop_wide_gaps(array: Any) -> Any:
    """Return the array itself, or a copy without gaps if it is mostly gaps.

    Workers of every backend see the copy, so a sum over such a view does not depend on the
    backend. Views of memory that is shared already stay as they are, also in every backend.
    """
    if type(array) not in {np.ndarray, np.memmap} or array.dtype.hasobject:
        return array  # a copy would lose what a subclass holds besides its values
    if not is_mostly_gaps(array):
        return array
    return array if find_shared(array) else copy_without_gaps(array)

"""What of a range is for the caller: results that could not be put in place, and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.notes import related, set_plainly

Where = slice | np.ndarray
"""Items along the mapped axis."""

Fault = tuple[int, int, BaseException]
"""``(start, stop, error)`` of a range that failed."""


@dataclass(eq=False)
class Parts:
    """What of a range is for the caller.

    Attributes
    ----------
    results : list of (slice or ndarray of int, object)
        Items whose results were not put in place, and the results.
    faults : list of (int, int, Exception)
        ``(start, stop, error)`` of ranges that failed.
    """

    results: list[tuple[Where, Any]]
    faults: list[Fault]
    _packed: list[tuple[int, int, bytes]] | None = None

    def __reduce__(self) -> Any:
        # Exceptions need care on their way to the caller.
        from taskcarrier.backends.exceptions import pack_error  # noqa: PLC0415  # loads joblib

        if self._packed is None:  # pickling may be tried twice
            self._packed = [(start, stop, pack_error(error)) for start, stop, error in self.faults]
            # Tracebacks refer to frames, frames to their callers, and these to the errors and to
            # chunks: the worker would hold on to shared memory until the next garbage collection.
            for _, _, error in self.faults:
                _forget_tracebacks(error)
        return _unpacked_parts, (self.results, self._packed)


def _forget_tracebacks(error: BaseException) -> None:
    for one in related(error):
        set_plainly(one, "__traceback__", None)


def _unpacked_parts(
    results: list[tuple[Where, Any]], packed: list[tuple[int, int, bytes]]
) -> Parts:
    from taskcarrier.backends.exceptions import unpack_error  # noqa: PLC0415  # loads joblib

    return Parts(results, [(start, stop, unpack_error(error)) for start, stop, error in packed])

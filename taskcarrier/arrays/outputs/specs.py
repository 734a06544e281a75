"""The dtypes, shapes and axes on which the results of all chunks of a run must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskcarrier.workers.records import Where

DeferredResult = tuple[Where, list[np.ndarray]]
"""A result that the worker could not put in place, and its position along the mapped axis."""


@dataclass(frozen=True)
class Spec:
    """The dtypes, shapes and axes of a chunk's results, on which all workers agree.

    Attributes
    ----------
    parts : tuple of (dtype, shape)
        For each output, its dtype and its shape without the mapped axis.
    axes : tuple of int
        For each output, the position of the mapped axis, not negative.
    is_tuple : bool
        Whether the function returns a tuple.
    """

    parts: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]
    axes: tuple[int, ...]
    is_tuple: bool

    def shapes(self, length: int) -> list[tuple[int, ...]]:
        """Return the whole shapes, for `length` items along the mapped axis."""
        return [
            (*shape[:axis], length, *shape[axis:])
            for (_, shape), axis in zip(self.parts, self.axes, strict=True)
        ]

    def agrees(self, other: Spec, *, promote_dtypes: bool) -> bool:
        """Return whether results of both fit into one array; dtypes may differ if they promote."""
        if not promote_dtypes:
            return self == other
        has_same_shapes = [shape for _, shape in self.parts] == [shape for _, shape in other.parts]
        return has_same_shapes and (self.axes, self.is_tuple) == (other.axes, other.is_tuple)

    def with_dtypes(self, dtypes: Sequence[np.dtype[Any]]) -> Spec:
        """Return the same spec with other dtypes."""
        parts = zip(dtypes, (shape for _, shape in self.parts), strict=True)
        return replace(self, parts=tuple(parts))

    def describe(self, length: int) -> str:
        """Return a description of the results of a chunk of `length` items."""
        return self._describe(self.shapes(length))

    def describe_item(self) -> str:
        """Return a description of the results of one item."""
        return self._describe([shape for _, shape in self.parts])

    def _describe(self, shapes: list[tuple[int, ...]]) -> str:
        parts = [f"{dtype} {shape}" for (dtype, _), shape in zip(self.parts, shapes, strict=True)]
        if not self.is_tuple:
            return f"an array {parts[0]}"
        return f"a tuple of {len(parts)} ({'; '.join(parts)})"


def shorten_repr(value: object) -> str:
    """Return the ``repr`` of what a function returned, cut so that it fits a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004  # fits a line


class DisagreementError(Exception):
    """The results of a chunk differ from the agreed spec; the caller words the error for users."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.spec = spec

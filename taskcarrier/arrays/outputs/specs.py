"""What the results of all chunks of a run must agree in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spec:
    """What the results of all chunks must agree in.

    Attributes
    ----------
    parts : tuple of (dtype, shape)
        For each output, its dtype and its shape without the mapped axis.
    axes : tuple of int
        For each output, where the mapped axis stands, not negative.
    is_tuple : bool
        Whether the function returns a tuple.
    """

    parts: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]
    axes: tuple[int, ...]
    is_tuple: bool

    def shapes(self, length: int) -> list[tuple[int, ...]]:
        """Whole shapes, for so many items along the mapped axis."""
        return [
            (*shape[:axis], length, *shape[axis:])
            for (_, shape), axis in zip(self.parts, self.axes, strict=True)
        ]

    def agrees(self, other: Spec, *, promote_dtypes: bool) -> bool:
        """Whether results of both can stand in one array; dtypes may differ where they promote."""
        if not promote_dtypes:
            return self == other
        shapes = [shape for _, shape in self.parts] == [shape for _, shape in other.parts]
        return shapes and (self.axes, self.is_tuple) == (other.axes, other.is_tuple)

    def with_dtypes(self, dtypes: Sequence[np.dtype[Any]]) -> Spec:
        """The same with other dtypes."""
        parts = zip(dtypes, (shape for _, shape in self.parts), strict=True)
        return replace(self, parts=tuple(parts))

    def describe(self, length: int) -> str:
        """The results of a chunk of so many items, in words."""
        return self._describe(self.shapes(length))

    def describe_item(self) -> str:
        """The results of one item, in words."""
        return self._describe([shape for _, shape in self.parts])

    def _describe(self, shapes: list[tuple[int, ...]]) -> str:
        parts = [f"{dtype} {shape}" for (dtype, _), shape in zip(self.parts, shapes, strict=True)]
        if not self.is_tuple:
            return f"an array {parts[0]}"
        return f"a tuple of {len(parts)} ({'; '.join(parts)})"


class DisagreementError(Exception):
    """A chunk's results differ from what the run has settled on; the face words the error."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.spec = spec

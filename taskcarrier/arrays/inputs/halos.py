"""Neighbours of a chunk: `depth` items on each side, made up by a rule at the array's ends.

The rules have the names and meanings of `scipy.ndimage`. Positions beyond an end are mapped back
into the array by arithmetic on indices; only what a chunk needs is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from taskcarrier.arguments import check_integer
from taskcarrier.arrays.casting import cast_scalar
from taskcarrier.arrays.inputs.check import Inputs

BOUNDARIES = ("reflect", "nearest", "mirror", "wrap", "constant", "none")

Reader = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Halo:
    """The neighbours that are read with every chunk.

    Attributes
    ----------
    depth : int
        The neighbours on each side; 0 for none.
    boundary : str
        The rule at the array's ends.
    cval : object
        The value beyond the ends if the rule is ``"constant"``.
    n_items : int
        The length of the mapped axis.
    """

    depth: int
    boundary: str
    cval: object
    n_items: int

    def margins(self, start: int, stop: int) -> tuple[int, int]:
        """Return how many neighbours are read before and after a chunk's own items."""
        if self.n_items == 0:
            return 0, 0
        if self.boundary == "none":
            return min(self.depth, start), min(self.depth, self.n_items - stop)
        return self.depth, self.depth

    def read(self, read: Reader, axis: int, start: int, stop: int) -> np.ndarray:
        """Read a chunk with its neighbours."""
        before, after = self.margins(start, stop)
        low, high = start - before, stop + after
        inside = read(max(low, 0), min(high, self.n_items))
        if low >= 0 and high <= self.n_items:
            return inside
        parts = [inside]
        if low < 0:
            parts.insert(0, self._read_beyond(read, axis, np.arange(low, 0), inside))
        if high > self.n_items:
            parts.append(self._read_beyond(read, axis, np.arange(self.n_items, high), inside))
        chunk = np.concatenate(parts, axis=axis, dtype=inside.dtype)  # keeps the byte order
        chunk.flags.writeable = False
        return chunk

    def _read_beyond(
        self, read: Reader, axis: int, positions: np.ndarray, like: np.ndarray
    ) -> np.ndarray:
        if self.boundary == "constant":
            shape = (*like.shape[:axis], len(positions), *like.shape[axis + 1 :])
            constant = np.empty(shape, like.dtype)
            constant[...] = cast_scalar(self.cval, like.dtype, "cval")
            return constant
        inside = positions_inside(positions, self.n_items, self.boundary)
        low, high = int(inside.min()), int(inside.max()) + 1
        return read(low, high).take(inside - low, axis)


def positions_inside(positions: np.ndarray, n_items: int, boundary: str) -> np.ndarray:
    """Return the positions in the array that stand for positions beyond its ends.

    >>> positions_inside(np.arange(-2, 6), 4, "reflect").tolist()
    [1, 0, 0, 1, 2, 3, 3, 2]
    >>> positions_inside(np.arange(-2, 6), 4, "mirror").tolist()
    [2, 1, 0, 1, 2, 3, 2, 1]
    """
    if boundary == "nearest":
        return np.asarray(np.clip(positions, 0, n_items - 1))
    if boundary == "wrap":
        return np.asarray(np.mod(positions, n_items))
    if boundary == "reflect":
        folded = np.mod(positions, 2 * n_items)
        return np.asarray(np.minimum(folded, 2 * n_items - 1 - folded))
    period = max(1, 2 * n_items - 2)
    folded = np.mod(positions, period)
    return np.asarray(np.minimum(folded, period - folded))


def check_halo(depth: object, boundary: object, cval: object, inputs: Inputs) -> Halo | None:
    """Check the options and return the halo of a call; None if chunks have no neighbours."""
    checked_depth = check_integer(depth, "depth", "a number of items, 0 or more")
    if checked_depth < 0:
        raise ValueError(f"depth must be 0 or more items, got {checked_depth}")
    if not isinstance(boundary, str) or boundary not in BOUNDARIES:
        allowed = ", ".join(map(repr, BOUNDARIES))
        raise ValueError(f"boundary must be one of {allowed}, got {boundary!r}")
    if checked_depth == 0:
        return None
    if (
        inputs.n_items
        and boundary in {"reflect", "mirror", "wrap"}
        and checked_depth > inputs.n_items
    ):
        raise ValueError(
            f"depth={checked_depth} is more than the {inputs.n_items} items there are, so "
            f"boundary={boundary!r} has nothing to fill it with; use a smaller depth, or "
            "'nearest', 'constant' or 'none'"
        )
    if boundary == "constant":
        for dtype in inputs.dtypes:
            cast_scalar(cval, dtype, "cval")
    return Halo(checked_depth, boundary, cval, inputs.n_items)

"""Cutting a range of items into contiguous slices: arithmetic only, no data.

`Partition` cuts a range into a given number of near-equal slices; `ChunkGrid` cuts it into chunks
of a given length. Both hold a few integers: nothing is materialised, and each slice or chunk is
computed when it is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex, overload


class Partition(Sequence[slice]):
    """At most `n_parts` contiguous, non-empty, near-equal slices of ``range(size)``.

    The slices cover ``range(size)`` in order, without gap or overlap. Their lengths differ
    by at most one, and the longer ones come first.

    Parameters
    ----------
    n_parts : int
        The number of slices wanted, at least 1. There are never more slices than items.
    size : int
        The number of items to cut, at least 0. A size of 0 has no slices.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If `n_parts` is below 1 or `size` below 0.

    Notes
    -----
    A partition is a sequence in O(1) memory: it has a length, and can be indexed (also from the
    end), sliced (which gives a partition again) and iterated over.

    Examples
    --------
    >>> from taskcarrier import Partition
    >>> [part.stop - part.start for part in Partition(5, 333)]
    [67, 67, 67, 66, 66]
    >>> Partition(100, 5)[-1]
    slice(4, 5, None)
    """

    __slots__ = ("_indices", "n_parts", "size")

    def __init__(self, n_parts: SupportsIndex, size: SupportsIndex) -> None:
        self.n_parts = operator.index(n_parts)
        self.size = operator.index(size)
        if self.n_parts < 1:
            raise ValueError(f"n_parts must be at least 1, got {self.n_parts}")
        if self.size < 0:
            raise ValueError(f"size must be at least 0, got {self.size}")
        self._indices = range(min(self.n_parts, self.size))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: SupportsIndex) -> slice: ...
    @overload
    def __getitem__(self, index: slice) -> Partition: ...
    def __getitem__(self, index: SupportsIndex | slice) -> slice | Partition:
        if isinstance(index, slice):
            part = Partition(self.n_parts, self.size)
            part._indices = self._indices[index]
            return part
        return self._slice(self._indices[index])

    def __iter__(self) -> Iterator[slice]:
        return map(self._slice, self._indices)

    def _slice(self, index: int) -> slice:
        length, longer = divmod(self.size, min(self.n_parts, self.size))
        start = index * length + min(index, longer)
        return slice(start, start + length + (index < longer))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        ends = (self[0].start, self[-1].stop) if self else ()
        return hash((len(self), ends))

    def __repr__(self) -> str:
        whole = range(min(self.n_parts, self.size))
        cut = "" if self._indices == whole else f", {len(self)} of {len(whole)} slices"
        return f"Partition(n_parts={self.n_parts}, size={self.size}{cut})"

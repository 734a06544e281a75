"""What a worker process keeps mapped of the caller's memory from one call to the next.

To map a segment afresh costs 0.35 µs for each page that is touched, with or without asking for
them all at once, and as much as reading the bytes into memory of one's own: half the time of a sum
over rows that are shared already (`python -m bench reducing`). So the segments last read stay
mapped, by the label that the caller has given them. Memory is not held by this: the caller takes
the pages out when it lets go of a segment (`taskcarrier.memory.segments`).

Only where `keep` was called, which workers do.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import numpy as np

from taskcarrier.memory import segments
from taskcarrier.memory.segments import Mapping, SharedView, live_mappings

# A chain of calls reads three; arbitrary beyond that. Each holds up to two descriptors.
_MAX_KEPT = 8

_mappings: OrderedDict[int, Mapping] | None = None  # by label, last used last
_arrays: list[weakref.ref[np.ndarray]] = []  # over them; views of an array refer to it
_n_forks = 0  # as far as is known here


def keep() -> None:
    """From now on, keep what is mapped for reading."""
    global _mappings  # noqa: PLW0603  # a fact about the process, set once
    _mappings = OrderedDict()


def open_for_reading(view: SharedView) -> np.ndarray:
    """The array, over a mapping that may be kept."""
    segment = view.segment
    if _mappings is None or segment is None or not segment.label:
        return view.open("read")
    mapping = _mappings.pop(segment.label, None)
    if mapping is None or len(mapping) < segment.nbytes:  # it has grown since
        mapping = segment.map("read")
    _mappings[segment.label] = mapping
    if len(_mappings) > _MAX_KEPT:
        _mappings.popitem(last=False)
    array = view.map_over(mapping)
    _arrays.append(weakref.ref(array))
    return array


def is_anything_in_use() -> bool:
    """Whether anything but this module still refers to shared memory; then nothing is kept.

    The caller will not touch the pages of a segment again that is in use here, so that memory has
    to go with the last that refers to it. A child that the function has forked refers to all.
    """
    global _n_forks  # noqa: PLW0603  # what was last seen of a counter
    forked = segments.n_forks != _n_forks
    _n_forks = segments.n_forks
    kept = set() if _mappings is None else {id(mapping) for mapping in _mappings.values()}
    _arrays[:] = [array for array in _arrays if array() is not None]
    if not forked and not _arrays and all(id(mapping) in kept for mapping in live_mappings()):
        return False
    if _mappings is not None:
        _mappings.clear()
    return True

"""The segments of the parent that a worker process keeps mapped from one call to the next.

Mapping a segment again costs 0.35 µs for each page that is touched, whether or not all are asked
for at once. That is as much as reading the bytes into private memory, and half the time of a sum
over rows that are shared already (`python -m bench reducing`). So the segments that were read last
stay mapped, by the label that the parent gave them. This holds no memory: the parent takes the
pages out when it releases a segment (`taskcarrier.memory.segments`).

Mappings are kept only in processes that have called `keep`, as workers do.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import numpy as np

from taskcarrier.memory import segments
from taskcarrier.memory.segments import Mapping, SharedView, live_mappings

# A chain of calls reads three segments; arbitrary beyond that. Each holds up to two descriptors.
_MAX_KEPT = 8

_mappings: OrderedDict[int, Mapping] | None = None  # by label; the last one was used last
_arrays: list[weakref.ref[np.ndarray]] = []  # over these mappings; views of an array refer to it
_n_forks = 0  # as last seen by this module


def keep() -> None:
    """Keep the segments that are mapped for reading, from now on."""
    global _mappings, _n_forks  # noqa: PLW0603  # facts about the process, set once
    _mappings = OrderedDict()
    _n_forks = segments.n_forks  # this process may be a fork itself


def open_for_reading(view: SharedView) -> np.ndarray:
    """Return the array of a view, over a mapping that may be kept."""
    segment = view.segment
    if _mappings is None or segment is None or not segment.label:
        return view.open("read")
    mapping = _mappings.pop(segment.label, None)
    if mapping is None or len(mapping) < segment.nbytes:  # it has grown since then
        mapping = segment.map("read")
    _mappings[segment.label] = mapping
    if len(_mappings) > _MAX_KEPT:
        _mappings.popitem(last=False)
    array = view.map_over(mapping)
    _arrays.append(weakref.ref(array))
    return array


def is_anything_in_use() -> bool:
    """Return whether anything but this module refers to shared memory; if so, drop all mappings.

    The parent does not touch a segment again that is in use here, so its memory must be freed with
    the last reference to it. A child that the function has forked refers to every segment.
    """
    global _n_forks  # noqa: PLW0603  # the last value of a counter
    has_forked = segments.n_forks != _n_forks
    _n_forks = segments.n_forks
    kept_ids = set() if _mappings is None else {id(mapping) for mapping in _mappings.values()}
    _arrays[:] = [array for array in _arrays if array() is not None]
    if (
        not has_forked
        and not _arrays
        and all(id(mapping) in kept_ids for mapping in live_mappings())
    ):
        return False
    if _mappings is not None:
        _mappings.clear()
    return True

"""What a worker keeps mapped: found again by label, bounded, and never what is in use."""

import gc
from collections import OrderedDict

import numpy as np
import pytest

from taskcarrier.memory import mapping_cache, segments
from taskcarrier.memory.mapping_cache import is_anything_in_use, open_for_reading
from taskcarrier.memory.segments import Segment, SharedView


@pytest.fixture(autouse=True)
def _as_in_a_worker(monkeypatch):
    gc.collect()
    monkeypatch.setattr(mapping_cache, "_mappings", OrderedDict())
    monkeypatch.setattr(mapping_cache, "_arrays", [])
    monkeypatch.setattr(mapping_cache, "_n_forks", segments.n_forks)


def shared(*values, label=0):
    """A view of numbers in a segment that the caller calls so."""
    array = np.array(values)
    segment = Segment.create()
    segment.reserve(array.nbytes)
    segment.write(0, memoryview(array).cast("B"))
    segment.label = label
    return SharedView(segment, 0, array.shape, array.strides, array.dtype)


def kept():
    return list(mapping_cache._mappings)


def test_by_its_label_a_segment_is_found_mapped():
    view = shared(1.0, 2.0, label=7)
    assert open_for_reading(view).tolist() == [1, 2]
    mapping = mapping_cache._mappings[7]
    tail = SharedView(view.segment, 8, (1,), (8,), np.dtype("f8"))
    array = open_for_reading(tail)
    assert array.tolist() == [2]
    assert not array.flags.writeable
    assert mapping_cache._mappings[7] is mapping


def test_without_a_label_nothing_is_kept():
    assert open_for_reading(shared(1.0)).tolist() == [1]
    assert kept() == []
    assert is_anything_in_use() is False


def test_where_keep_was_not_called_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(mapping_cache, "_mappings", None)
    array = open_for_reading(shared(1.0, label=7))
    assert array.tolist() == [1]
    assert is_anything_in_use() is True
    del array
    assert is_anything_in_use() is False


def test_keep_begins_with_nothing(monkeypatch):
    monkeypatch.setattr(mapping_cache, "_mappings", None)
    mapping_cache.keep()
    open_for_reading(shared(1.0, label=7))
    assert kept() == [7]


def test_an_array_without_bytes():
    assert open_for_reading(SharedView(None, 0, (0, 2), (16, 8), np.dtype("f8"))).shape == (0, 2)
    assert kept() == []


def test_a_segment_that_has_grown_is_mapped_anew():
    view = shared(1.0, label=7)
    open_for_reading(view)
    view.segment.reserve(1 << 20)
    longer = SharedView(view.segment, 0, (1 << 17,), (8,), np.dtype("f8"))
    assert open_for_reading(longer)[0] == 1
    assert kept() == [7]
    assert len(mapping_cache._mappings[7]) == 1 << 20


def test_the_last_used_are_kept():
    views = [shared(float(label), label=label) for label in range(1, 12)]
    for view in views[:8]:
        open_for_reading(view)
    open_for_reading(views[0])
    for view in views[8:]:
        open_for_reading(view)
    assert kept() == [5, 6, 7, 8, 1, 9, 10, 11]


def test_what_only_this_module_refers_to_is_not_in_use():
    open_for_reading(shared(1.0, label=7))
    assert is_anything_in_use() is False
    assert kept() == [7]


@pytest.mark.parametrize("held", [lambda a: a, lambda a: a[1:], memoryview, lambda a: a[::-1].T])
def test_what_is_in_use_is_not_kept(held):
    holder = held(open_for_reading(shared(1.0, 2.0, label=7)))
    open_for_reading(shared(3.0, label=8))
    assert is_anything_in_use() is True
    assert kept() == []
    assert is_anything_in_use() is True  # as long as it lives
    del holder
    assert is_anything_in_use() is False


def test_other_mappings_are_in_use_as_well():
    array = shared(1.0, label=7).open("private")
    assert is_anything_in_use() is True
    del array
    assert is_anything_in_use() is False


def test_after_a_fork_nothing_is_kept(monkeypatch):
    open_for_reading(shared(1.0, label=7))
    assert is_anything_in_use() is False
    monkeypatch.setattr(segments, "n_forks", segments.n_forks + 1)  # its child sees it
    assert is_anything_in_use() is True
    assert kept() == []
    assert is_anything_in_use() is False

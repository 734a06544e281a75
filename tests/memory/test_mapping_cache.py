"""The mapping cache: found by label, bounded, and without mappings in use."""

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
    """Return a view of numbers in a segment with that label."""
    array = np.array(values)
    segment = Segment.create()
    segment.reserve(array.nbytes)
    segment.write(0, memoryview(array).cast("B"))
    segment.label = label
    return SharedView(segment, 0, array.shape, array.strides, array.dtype)


def kept():
    return list(mapping_cache._mappings)


def test_a_segment_is_found_mapped_by_its_label():
    view = shared(1.0, 2.0, label=7)
    assert open_for_reading(view).tolist() == [1, 2]
    mapping = mapping_cache._mappings[7]
    tail = SharedView(view.segment, 8, (1,), (8,), np.dtype("f8"))
    array = open_for_reading(tail)
    assert array.tolist() == [2]
    assert not array.flags.writeable
    assert mapping_cache._mappings[7] is mapping


def test_a_segment_without_a_label_is_not_kept():
    assert open_for_reading(shared(1.0)).tolist() == [1]
    assert kept() == []
    assert is_anything_in_use() is False


def test_nothing_is_kept_before_keep_is_called(monkeypatch):
    monkeypatch.setattr(mapping_cache, "_mappings", None)
    array = open_for_reading(shared(1.0, label=7))
    assert array.tolist() == [1]
    assert is_anything_in_use() is True
    del array
    assert is_anything_in_use() is False


def test_keep_starts_with_an_empty_cache(monkeypatch):
    monkeypatch.setattr(mapping_cache, "_mappings", None)
    mapping_cache.keep()
    open_for_reading(shared(1.0, label=7))
    assert kept() == [7]


def test_an_array_without_bytes_is_opened():
    assert open_for_reading(SharedView(None, 0, (0, 2), (16, 8), np.dtype("f8"))).shape == (0, 2)
    assert kept() == []


def test_a_segment_that_has_grown_is_mapped_again():
    view = shared(1.0, label=7)
    open_for_reading(view)
    view.segment.reserve(1 << 20)
    longer = SharedView(view.segment, 0, (1 << 17,), (8,), np.dtype("f8"))
    assert open_for_reading(longer)[0] == 1
    assert kept() == [7]
    assert len(mapping_cache._mappings[7]) == 1 << 20


def test_the_most_recently_used_mappings_are_kept():
    views = [shared(float(label), label=label) for label in range(1, 12)]
    for view in views[:8]:
        open_for_reading(view)
    open_for_reading(views[0])
    for view in views[8:]:
        open_for_reading(view)
    assert kept() == [5, 6, 7, 8, 1, 9, 10, 11]


def test_a_mapping_that_only_the_cache_refers_to_is_not_in_use():
    open_for_reading(shared(1.0, label=7))
    assert is_anything_in_use() is False
    assert kept() == [7]


@pytest.mark.parametrize("held", [lambda a: a, lambda a: a[1:], memoryview, lambda a: a[::-1].T])
def test_a_mapping_in_use_is_not_kept(held):
    holder = held(open_for_reading(shared(1.0, 2.0, label=7)))
    open_for_reading(shared(3.0, label=8))
    assert is_anything_in_use() is True
    assert kept() == []
    assert is_anything_in_use() is True  # as long as it lives
    del holder
    assert is_anything_in_use() is False


def test_other_mappings_count_as_in_use():
    array = shared(1.0, label=7).open("private")
    assert is_anything_in_use() is True
    del array
    assert is_anything_in_use() is False


def test_a_forked_child_keeps_no_mapping(monkeypatch):
    open_for_reading(shared(1.0, label=7))
    assert is_anything_in_use() is False
    monkeypatch.setattr(segments, "n_forks", segments.n_forks + 1)  # its child sees it
    assert is_anything_in_use() is True
    assert kept() == []
    assert is_anything_in_use() is False

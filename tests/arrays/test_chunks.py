"""`map_chunks`: what the function returned for every range, in order."""

import threading
import time

import numpy as np
import pytest

from taskcarrier import last_report, map_chunks
from tests.strategies import EVERYWHERE, keep_pools_warm

pools = keep_pools_warm(2)


@pytest.mark.parametrize("chunksize", [1, 3, 7, 20, 100])
@pytest.mark.parametrize("axis", [0, 1])
def test_results_are_a_list_in_the_order_of_the_ranges(run, chunksize, axis):
    X = np.arange(40.0).reshape(20, 2) if axis == 0 else np.arange(40.0).reshape(2, 20)
    result = map_chunks(np.ndarray.tolist, X, axis=axis, chunksize=chunksize, **run)
    starts = range(0, 20, chunksize)
    cut = [X.take(range(i, min(i + chunksize, 20)), axis) for i in starts]
    assert result == [chunk.tolist() for chunk in cut]
    assert last_report().ranges == len(starts)


def test_order_is_kept_when_later_ranges_are_done_first(run):
    def slow_first(chunk):
        time.sleep(0.05 if chunk[0] < 2 else 0)
        return int(chunk[0])

    assert map_chunks(slow_first, np.arange(30), chunksize=1, **run) == list(range(30))


def test_ranges_do_not_depend_on_the_run():
    X = np.zeros((3000, 40))
    lengths = [map_chunks(len, X, backend=b, balance=rule, n_jobs=2) for b, rule in EVERYWHERE]
    assert sum(lengths[0]) == 3000
    assert len(lengths[0]) > 2
    assert all(found == lengths[0] for found in lengths)


def test_anything_may_be_returned(run):
    things = [None, "text", {1: 2}, {3}, (4, 5), 6.5, int, lambda i: i + 7, [np.arange(8)]]
    result = map_chunks(lambda c: things[c[0]], np.arange(9), chunksize=1, **run)
    assert result[:7] == things[:7]
    assert result[7](1) == 8
    assert result[8][0].tolist() == list(range(8))


def test_a_tuple_stays_one_result_and_large_results_come_whole(run):
    result = map_chunks(lambda c: (c[0], np.repeat(c, 100_000)), np.arange(6), chunksize=2, **run)
    assert [first for first, _ in result] == [0, 2, 4]
    for first, rows in result:
        assert np.array_equal(rows, np.repeat([first, first + 1], 100_000))


@pytest.mark.fault(28)
def test_an_array_without_items_has_one_empty_range(run):
    assert map_chunks(np.shape, np.zeros((3, 0)), axis=1, **run) == [(3, 0)]


def test_several_arrays_arguments_and_neighbours(run):
    X, Y = np.arange(10), np.arange(20).reshape(2, 10)

    def func(x, y, more, *, name):
        return x.tolist(), y[1].tolist(), more, name

    options = {"axis": (0, 1), "args": (1,), "kwargs": {"name": "n"}, "chunksize": 4, "depth": 1}
    result = map_chunks(func, X, Y, boundary="none", **options, **run)
    whole = list(range(10)), list(range(10, 20))
    bounds = [(0, 5), (3, 9), (7, 10)]
    assert result == [(whole[0][a:b], whole[1][a:b], 1, "n") for a, b in bounds]


@pytest.mark.fault(6)
def test_chunks_are_read_only_unless_private(run):
    def overwrite(chunk):
        chunk[0] = -1
        return chunk.tolist()

    X = np.arange(4)
    with pytest.raises(ValueError, match="read-only") as caught:
        map_chunks(overwrite, X, chunksize=2, **run)
    assert any("writable=True" in note for note in caught.value.__notes__)
    assert map_chunks(overwrite, X, chunksize=2, writable=True, **run) == [[-1, 1], [-1, 3]]
    assert X.tolist() == [0, 1, 2, 3]


@pytest.mark.fault(8)
@pytest.mark.parametrize("balance", ["static", "dynamic"])
def test_a_result_that_cannot_be_pickled_is_an_error_with_its_range(balance):
    run = {"balance": balance, "n_jobs": 2}
    lock = threading.Lock

    def func(chunk):
        return lock() if chunk[0] == 4 else 1

    with pytest.raises(TypeError, match="lock") as caught:
        map_chunks(func, np.arange(9), chunksize=2, backend="loky", **run)
    notes = caught.value.__notes__
    assert any("could not pickle the result" in note for note in notes)
    assert any("items 4:6" in note for note in notes)
    found = map_chunks(func, np.arange(9), chunksize=2, backend="threading", **run)
    assert [one for one in found if one != 1] == [found[2]]


def test_an_error_names_the_range(run):
    def func(chunk):
        if chunk[0] == 6:
            raise KeyError("no", 6)
        return 1

    with pytest.raises(KeyError) as caught:
        map_chunks(func, np.arange(11), chunksize=3, **run)
    assert caught.value.args == ("no", 6)
    assert any("axis 0, items 6:9" in note for note in caught.value.__notes__)


def test_collected_errors_leave_none_in_the_list(run):
    def func(chunk):
        if chunk[0] in {3, 9}:
            raise ValueError(chunk.tolist())
        return len(chunk)

    result, failures = map_chunks(func, np.arange(11), chunksize=3, on_error="collect", **run)
    assert result == [3, None, 3, None]
    assert [(start, stop) for start, stop, _ in failures] == [(3, 6), (9, 11)]
    assert [error.args for *_, error in failures] == [([3, 4, 5],), ([9, 10],)]
    result, failures = map_chunks(len, np.arange(4), chunksize=2, on_error="collect", **run)
    assert (result, failures) == ([2, 2], [])


def test_map_chunks_has_nothing_to_fill(run):
    with pytest.raises(ValueError, match="'raise', 'collect', got 'fill'"):
        map_chunks(len, np.arange(4), on_error="fill", **run)

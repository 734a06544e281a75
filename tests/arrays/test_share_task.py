"""The results of a share: what is joined, what does not fit, and how it is taken apart again."""

import pickle

import numpy as np
import pytest

from taskcarrier.arrays.share_task import (
    ArrayShareTask,
    JoinedResults,
    ShareResults,
    describe_layout,
)
from taskcarrier.workers.call import Call

X = np.arange(24.0).reshape(12, 2)


def sent(results):
    return ShareResults(*pickle.loads(pickle.dumps(results.pack())))


class TestJoinedResults:
    def test_results_in_any_order_are_joined(self):
        results = JoinedResults(4, 10)
        for start, stop in ((6, 8), (8, 10), (4, 6)):
            assert results.put(X[start:stop], start, stop)
        share = sent(results)
        assert share.ranges == [(6, 10), (4, 6)]
        assert not share.is_tuple
        assert np.array_equal(share.arrays[0], X[4:10])

    def test_tuples_are_joined_array_by_array(self):
        results = JoinedResults(0, 4)
        for start in (0, 2):
            chunk = X[start : start + 2]
            assert results.put((chunk, chunk[:, 0] > 3), start, start + 2)
        share = sent(results)
        assert share.is_tuple
        assert [array.dtype for array in share.arrays] == [np.dtype(float), np.dtype(bool)]

    @pytest.mark.parametrize(
        "result",
        [X[:2].astype(int), X[:2, 0], X[:1], (X[:2],), [X[:2]], None, np.float64(1), X[:2].T],
        ids=repr,
    )
    def test_what_is_unlike_the_first_does_not_fit(self, result):
        results = JoinedResults(0, 6)
        assert results.put(X[:2, :], 0, 2)
        fits = type(result) is np.ndarray and result.shape == (2, 2) and result.dtype == float
        assert results.put(result, 2, 4) == fits
        assert sent(results).ranges == [(0, 4) if fits else (0, 2)]

    @pytest.mark.parametrize(
        "result", [(), None, 1, np.array(1), np.array([None]), np.zeros((1, 10**6)), np.ma.ones(1)]
    )
    def test_what_is_unusual_does_not_begin(self, result):
        results = JoinedResults(0, 2)
        assert not results.put(result, 0, 1)
        assert sent(results) == ([], 0, [], False, {})
        assert results.put(X[:1], 0, 1)

    def test_a_number_is_not_taken_for_a_float_array_without_a_dtype(self):
        assert JoinedResults(0, 1).put(np.array([1.5]), 0, 1)


class TestShareResults:
    def test_ranges_are_split_at_chunks(self):
        results = JoinedResults(3, 11)
        assert results.put(X[3:5], 3, 5)
        assert results.put(X[5:10], 5, 10)
        parts = sent(results).split(3)
        assert sorted(parts) == [3, 6, 9]
        assert np.array_equal(np.concatenate([parts[start] for start in sorted(parts)]), X[3:10])

    def test_arrays_without_bytes_are_arrays(self):
        results = JoinedResults(0, 2)
        assert results.put(X[:2, :0], 0, 2)
        assert sent(results).arrays[0].shape == (2, 0)


def test_shares_hold_the_items_of_all_arrays():
    Y = np.arange(12, dtype=">i2")
    starts = [0, 4, 12]
    layouts = [describe_layout(X), describe_layout(Y)]
    task = ArrayShareTask(Call(np.add), b"", False, True, layouts, starts)
    shares = task.pack_shares([X, Y])
    assert list(map(len, shares)) == [4 * 18, 8 * 18]
    for number, (start, stop) in enumerate([(0, 4), (4, 12)]):
        own = ArrayShareTask(task.call, shares[number], *task.arguments)
        arrays = own._open(start, stop - start)
        for array, whole in zip(arrays, (X, Y), strict=True):
            assert np.array_equal(array, whole[start:stop])
            assert array.dtype == whole.dtype
            assert not array.flags.writeable

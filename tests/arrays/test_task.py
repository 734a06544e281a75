"""Results of the function, from its return to their place."""

import re
import threading

import numpy as np
import pytest

import taskcarrier
from taskcarrier import last_report, map_array, map_chunks, map_items, reduce_array
from tests.strategies import (
    assert_same,
    each_parallel_run,
    keep_pools_warm,
    run_script,
    warm_pools,
)

pools = keep_pools_warm(2)


# Results that are the chunk's own memory.
VIEWS = {
    "the chunk": lambda c: c,
    "a view": lambda c: c[:],
    "reversed": lambda c: c[:, ::-1],
    "columns": lambda c: c[:, :1],
    "one more axis": lambda c: c[:, None],
    "twice": lambda c: (c, c[:, ::-1]),
    "repeated": lambda c: np.broadcast_to(c[:, None], (len(c), 3, c.shape[1])),
}


@pytest.mark.fault(7)
class TestResultsFromChunks:
    @pytest.mark.parametrize("case", VIEWS)
    def test_results_that_are_the_chunk_own_their_memory(self, case, run):
        X = np.random.default_rng(0).normal(size=(50, 4))
        expected = VIEWS[case](X.copy())
        result = map_array(VIEWS[case], X, chunksize=7, **run)
        X[:] = -1
        results = result if isinstance(result, tuple) else (result,)
        expecteds = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(results, expecteds, strict=True):
            assert not np.shares_memory(one, X)
            assert np.array_equal(one, other)
            assert one.flags.writeable
            one[...] = 5  # it is a copy
        assert (X == -1).all()

    def test_results_are_right_after_the_workers_are_gone(self, tmp_path):
        code = (
            "import gc\n"
            "import numpy as np\n"
            "import taskcarrier\n"
            "from taskcarrier import map_array, map_chunks, map_items\n"
            "X = np.arange(100_000.0).reshape(-1, 4)\n"
            "for backend in ('loky', 'threading'):\n"
            "    options = dict(backend=backend, n_jobs=2)\n"
            "    Y = map_array(lambda c: c, X, **options)\n"
            "    V = map_items(lambda x: x[::-1], X[:100], **options)\n"
            "    L = map_chunks(lambda c: c[:1], X, **options)\n"
            "    taskcarrier.shutdown()\n"
            "    gc.collect()\n"
            "    assert np.array_equal(Y, X)\n"
            "    assert np.array_equal(V, X[:100, ::-1])\n"
            "    assert np.array_equal(L[-1][0], X[-len(X) % len(L) - 1]) or len(L) > 1\n"
            "    Y += 1\n"
            "    assert np.array_equal(Y, X + 1)\n"
            "print('right')\n"
        )
        assert run_script(tmp_path, code).strip() == "right"

    @each_parallel_run
    def test_chunks_and_items_that_are_returned_outlive_the_call(self, backend, balance):
        options = {"backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 6}
        X = np.arange(20.0).reshape(10, 2)
        chunks = map_chunks(lambda c: c, X, **options)
        items = map_items(lambda x: x, X, **options)
        map_array(np.negative, X, **options)
        assert np.array_equal(np.concatenate(chunks), X)
        assert_same(items, X)

    def test_writable_chunks_that_are_returned_own_their_memory(self, run):
        def spoil(chunk):
            chunk *= 2
            return chunk

        X = np.arange(20.0)
        assert_same(map_array(spoil, X, writable=True, chunksize=3, **run), X * 2)
        assert np.array_equal(X, np.arange(20.0))


@pytest.mark.fault(5)
class TestUnusableResults:
    """Results that cannot become an array: errors that say what and where."""

    @pytest.mark.parametrize(
        ("func", "said"),
        [
            (lambda c: None, "NoneType"),
            (lambda c: (x for x in c), "generator"),
            (lambda c: 3.0, "float"),
            (lambda c: {"a": 1}, "dict"),
            (lambda c: "abc", "str"),
            (lambda c: c.sum(), "float64"),
            (lambda c: threading.Lock(), "lock"),
            (lambda c: (), r"() (tuple)"),
        ],
    )
    def test_results_that_are_no_arrays_are_named_with_their_type(self, func, said, run):
        with pytest.raises(TypeError, match="needs an array with the chunk's length") as caught:
            map_array(func, np.arange(10.0), chunksize=4, **run)
        assert said in str(caught.value)
        assert re.search(r"items \d+:\d+ of an array", "\n".join(caught.value.__notes__))

    @pytest.mark.parametrize(
        ("func", "said"),
        [
            (lambda c: c[:-1], r"length 3 along axis 0, for a chunk of length 4"),
            (lambda c: np.r_[c, c], r"length 8 along axis 0, for a chunk of length 4"),
            (lambda c: [1.0], r"length 1 along axis 0"),
            (lambda c: (c, c[:2]), r"length 2 along axis 0"),
        ],
    )
    def test_results_of_a_wrong_length_are_refused(self, func, said, run):
        with pytest.raises(ValueError, match=said):
            map_array(func, np.arange(8.0), chunksize=4, **run)

    def test_masked_results_are_refused(self, run):
        with pytest.raises(TypeError, match="masked"):
            map_array(np.ma.masked_array, np.arange(8.0), **run)
        with pytest.raises(TypeError, match="masked"):
            map_items(lambda x: np.ma.masked_array([x]), np.arange(8.0), **run)

    def test_sequences_of_masked_results_are_refused(self, run):
        with pytest.raises(TypeError, match="masked"):
            map_array(lambda c: [np.ma.masked_array([x]) for x in c], np.arange(8.0), **run)
        with pytest.raises(TypeError, match="masked"):
            map_items(lambda x: [x, np.ma.masked], np.arange(8.0), **run)
        with pytest.raises(TypeError, match="masked"):
            map_items(lambda x: np.ma.masked_array([x]), np.arange(8.0), dtype=object, **run)

    def test_masked_items_are_refused(self, run):
        # The warning that NumPy gives on the way may come first; no number may.
        with pytest.raises((TypeError, UserWarning), match="masked"):
            map_items(lambda x: np.ma.masked if x == 2 else x, np.arange(8.0), **run)

    @pytest.mark.parametrize("value", [None, "generator", {"a": 1}, {1, 2}, object()], ids=repr)
    def test_items_that_are_no_numbers_are_refused(self, value, run):
        def func(x):
            if x != 5:
                return x
            return (y for y in [x]) if isinstance(value, str) else value

        with pytest.raises(TypeError, match=r"for item 5; map_items stacks numbers and arrays"):
            map_items(func, np.arange(8.0), **run)

    def test_items_of_different_shapes_are_refused(self, run):
        with pytest.raises(ValueError, match=r"same shape"):
            map_items(lambda x: np.zeros(int(x)), np.arange(8.0), **run)

    def test_ragged_items_are_refused(self, run):
        with pytest.raises(ValueError, match=r"inhomogeneous|different lengths|same shape"):
            map_items(lambda x: [[1], [2, 3]], np.arange(8.0), **run)

    @pytest.mark.parametrize("chunksize", [1, 3, 8])
    def test_items_that_are_tuples_only_sometimes_are_refused(self, chunksize, run):
        for odd in (0, 3, 7):
            with pytest.raises(ValueError, match="tuple"):
                map_items(
                    lambda x, odd=odd: (1.0, 2.0) if x == odd else np.zeros(2),
                    np.arange(8.0),
                    chunksize=chunksize,
                    **run,
                )


class Unloadable:
    """Can be pickled, but not read again."""

    def __reduce__(self):
        return _fail_to_load, ()


def _fail_to_load():
    raise RuntimeError("cannot be read again")


@pytest.mark.fault(8)
class TestResultsThatCannotTravel:
    @pytest.mark.parametrize("balance", ["static", "dynamic"])
    @pytest.mark.parametrize("verb", ["chunks", "reduce"])
    @pytest.mark.parametrize(
        "make", [threading.Lock, lambda: (x for x in "ab"), Unloadable], ids=["lock", "gen", "load"]
    )
    def test_results_that_cannot_be_pickled_are_errors_and_workers_stay(self, make, verb, balance):
        options = {"balance": balance, "backend": "loky", "n_jobs": 2}
        map_chunks(len, np.arange(4), **options)
        before = _pids(options)
        called = map_chunks if verb == "chunks" else reduce_array
        more = {} if verb == "chunks" else {"combine": _first}
        with pytest.raises((TypeError, RuntimeError), match=r"pickle|read again"):
            called(lambda c: make(), np.arange(8), chunksize=2, **more, **options)
        assert _pids(options) == before

    @pytest.mark.parametrize("balance", ["static", "dynamic"])
    def test_threads_return_results_that_cannot_be_pickled(self, balance):
        locks = map_chunks(
            lambda c: threading.Lock(), np.arange(4), backend="threading", balance=balance, n_jobs=2
        )
        assert len(locks) == last_report().ranges
        assert all(lock.acquire(blocking=False) for lock in locks)

    @pytest.mark.parametrize("balance", ["static", "dynamic"])
    def test_objects_in_an_output_must_be_picklable(self, balance):
        with pytest.raises(TypeError, match="pickle"):
            map_items(
                lambda x: threading.Lock(),
                np.arange(8),
                dtype=object,
                backend="loky",
                n_jobs=2,
                balance=balance,
            )


def _first(one, other):
    return one


def _pids(options):
    import os

    def pid(chunk):
        return os.getpid()

    return sorted(
        set(map_chunks(pid, np.zeros(2), chunksize=1, **{**options, "balance": "static"}))
    )


class TestOrder:
    def test_chunks_are_returned_in_the_order_of_ranges(self, run):
        found = map_chunks(lambda c: c.tolist(), np.arange(103), chunksize=4, **run)
        assert found == [list(range(start, min(start + 4, 103))) for start in range(0, 103, 4)]

    @pytest.mark.parametrize("chunksize", [1, 3, 17, 200])
    def test_folds_go_from_the_first_range_to_the_last(self, chunksize, run):
        found = reduce_array(
            lambda c: c.tolist(),
            np.arange(103),
            combine=lambda one, other: one + other,
            chunksize=chunksize,
            **run,
        )
        assert found == list(range(103))


@pytest.mark.fault(5)
class TestItemsAgainstStack:
    @pytest.mark.parametrize(
        "dtype", ["f8", ">f8", "f4", "?", "i1", ">u2", "c8", "U2", "M8[s]", "g"]
    )
    @pytest.mark.parametrize("chunksize", [1, 3, 50])
    def test_items_of_every_dtype_are_stacked(self, dtype, chunksize, run):
        for shape in ((20,), (20, 2)):
            X = np.arange(20 * len(shape)).reshape(20, -1)[:, : len(shape)].astype(dtype)
            X = X[:, 0] if len(shape) == 1 else X
            result = map_items(lambda x: x, X, chunksize=chunksize, **run)
            expected = np.stack([np.asarray(x) for x in X])
            assert result.dtype == expected.dtype.newbyteorder("=") or result.dtype == X.dtype
            assert np.array_equal(result, expected)

    @pytest.mark.parametrize("chunksize", [1, 3, 50])
    @pytest.mark.parametrize(
        "values",
        [
            (1, 2.5),
            (True, 2),
            (np.int8(1), 300),
            (np.float32(0.1), 0.1),
            (2**63, -1),
            ("a", "abc"),
            (np.array([1, 2], "i2"), np.array([0.5, 1], "f4")),
            (np.datetime64("2020", "D"), np.datetime64("2020-01-01T01", "h")),
        ],
        ids=repr,
    )
    def test_promotion_does_not_depend_on_the_chunksize(self, values, chunksize, run):
        for order in ((0, 1), (1, 0)):
            picks = [order[0]] * 7 + [order[1]] * 6

            def func(i, picks=picks):
                return values[picks[i]]

            result = map_items(func, np.arange(13), chunksize=chunksize, **run)
            expected = np.stack([np.asarray(values[pick]) for pick in picks])
            assert result.dtype == expected.dtype
            assert np.array_equal(result, expected)


def test_workers_can_be_started_again_after_shutdown():
    taskcarrier.shutdown()
    warm_pools(2)
    assert_same(map_array(np.negative, np.arange(3.0), n_jobs=2, backend="loky"), -np.arange(3.0))

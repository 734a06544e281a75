"""Collected errors: missing items are named one by one, whatever the chunksize."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import FailedRange, TaskError, map_array, map_chunks, map_items, share
from taskcarrier.memory.segments import locate
from tests.helpers import never
from tests.strategies import EVERYWHERE, assert_same, examples, keep_pools_warm, run_script

VERBS = [map_array, map_items]


pools = keep_pools_warm(2)


def root(values):
    """Take roots of items or chunks; negative values are errors."""
    if np.any(np.asarray(values) < 0):
        raise ValueError(f"negative: {np.asarray(values).tolist()}")
    return np.sqrt(values)


def plus_one(values):
    if np.any(np.asarray(values) < 0):
        raise ValueError("negative")
    return values + 1


def ranges(failures):
    assert all(type(failure) is FailedRange for failure in failures)
    return [(failure.start, failure.stop) for failure in failures]


def one_by_one(items):
    return [(int(item), int(item) + 1) for item in items]


@examples(120)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.none() | st.integers(1, 45),
    st.sampled_from(VERBS),
    st.sampled_from(EVERYWHERE),
)
def test_failing_items_are_named_whatever_the_cut(bad, chunksize, verb, run):
    backend, balance = run
    bad = np.array(bad)
    X = np.where(bad, -1.0, np.arange(len(bad)))
    result, failures = verb(
        root,
        X,
        on_error="collect",
        chunksize=chunksize,
        backend=backend,
        balance=balance,
        n_jobs=2,
    )
    assert ranges(failures) == one_by_one(np.flatnonzero(bad))
    assert all(type(failure.error) is ValueError for failure in failures)
    assert [str(failure.error) for failure in failures] == [
        "negative: [-1.0]" if verb is map_array else "negative: -1.0"
    ] * len(failures)
    if bad.all():
        assert result is None
    else:
        with np.errstate(invalid="ignore"):
            assert_same(result, np.where(bad, np.nan, np.sqrt(np.abs(X))))


class TestCollect:
    @pytest.mark.parametrize("verb", VERBS)
    def test_collecting_gives_an_empty_list_if_nothing_fails(self, verb, run):
        X = np.arange(20.0)
        result, failures = verb(root, X, on_error="collect", **run)
        assert failures == []
        assert_same(result, np.sqrt(X))

    @pytest.mark.parametrize("verb", VERBS)
    def test_collecting_gives_none_if_everything_fails(self, verb, run, tmp_path):
        for out in (None, tmp_path / "Y.npy"):
            result, failures = verb(root, -np.ones(7), on_error="collect", out=out, **run)
            assert result is None
            assert ranges(failures) == one_by_one(range(7))
        assert list(tmp_path.iterdir()) == []

    def test_several_results_along_another_axis_are_collected(self, run):
        X = np.arange(24.0).reshape(4, 6)
        X[2, [1, 4]] = -1

        def func(chunk):
            return root(chunk), root(chunk).sum(axis=0)

        (one, other), failures = map_array(
            func, X, axis=1, out_axis=(1, 0), on_error="collect", chunksize=4, **run
        )
        assert ranges(failures) == one_by_one([1, 4])
        good = [0, 2, 3, 5]
        assert_same(np.ascontiguousarray(one[:, good]), np.sqrt(X[:, good]))
        assert np.isnan(one[:, [1, 4]]).all()
        assert np.isnan(other[[1, 4]]).all()
        np.testing.assert_allclose(other[good], np.sqrt(X[:, good]).sum(axis=0), rtol=1e-15)

    def test_collected_errors_name_their_range(self, run):
        _, failures = map_array(
            root, np.array([1.0, -1.0, 4.0]), on_error="collect", chunksize=3, **run
        )
        (failure,) = failures
        notes = "\n".join(failure.error.__notes__)
        assert "items 1:2 of an array of shape (3,)" in notes

    def test_one_exception_for_several_items_has_the_note_of_each_once(self):
        error = ValueError("the same")

        def func(x):
            if x != 3:
                raise error
            return x

        _, failures = map_items(func, np.arange(4.0), on_error="collect", n_jobs=1)
        assert ranges(failures) == one_by_one([0, 1, 2])
        assert {failure.error for failure in failures} == {error}
        assert len(error.__notes__) == len(set(error.__notes__))

    @pytest.mark.parametrize("chunksize", [1, 4, 20])
    def test_failures_are_collected_with_an_output_file(self, chunksize, run, tmp_path):
        X = np.where(np.arange(20) % 7 == 3, -1.0, np.arange(20))
        path = tmp_path / "Y.npy"
        result, failures = map_array(
            root, X, on_error="collect", out=path, chunksize=chunksize, **run
        )
        assert ranges(failures) == one_by_one([3, 10, 17])
        assert_same(result, np.where(X < 0, np.nan, np.sqrt(np.abs(X))))
        assert_same(np.load(path), result)

    def test_failed_items_overwrite_the_array_of_the_caller(self, run):
        X = np.array([1, -1, 4])
        out = np.full(3, 99, "i2")
        result, _ = map_array(plus_one, X, on_error="collect", fill_value=-7, out=out, **run)
        assert result is out
        assert out.tolist() == [2, -7, 5]

    def test_a_function_that_fails_only_on_several_items_is_called_item_by_item(self, run):
        def func(chunk):
            if len(chunk) > 1:
                raise ValueError("one at a time")
            return chunk * 2

        X = np.arange(13.0)
        result, failures = map_array(func, X, on_error="collect", chunksize=5, **run)
        assert failures == []
        assert_same(result, X * 2)

    def test_stop_iteration_is_collected_like_other_errors(self, run):
        def func(x):
            if x in {0, 5, 9}:
                raise StopIteration
            return x

        result, failures = map_items(func, np.arange(10.0), on_error="collect", chunksize=4, **run)
        assert ranges(failures) == one_by_one([0, 5, 9])
        assert np.flatnonzero(np.isnan(result)).tolist() == [0, 5, 9]

    def test_an_array_without_items_has_no_failures(self, run):
        result, failures = map_items(root, np.empty(0), on_error="collect", **run)
        assert (result.shape, failures) == ((0,), [])
        result, failures = map_array(root, np.empty((0, 3)), on_error="collect", **run)
        assert (result.shape, failures) == ((0, 3), [])

    def test_workers_release_the_arrays_they_failed_on(self):
        for verb in VERBS:
            X = share(np.where(np.arange(10_000) < 3, -1.0, 1.0))
            fd = os.dup(locate(X).segment.fd)
            try:
                _, failures = verb(root, X, on_error="collect", backend="loky", n_jobs=2)
                assert ranges(failures) == one_by_one(range(3))
                assert os.fstat(fd).st_blocks > 0
                del X
                assert os.fstat(fd).st_blocks == 0  # else workers said that they hold it
            finally:
                os.close(fd)


class TestChunks:
    def test_failed_chunks_are_named_whole(self, run):
        X = np.arange(20.0)
        X[[3, 17]] = -1
        results, failures = map_chunks(
            lambda c: float(root(c)[0]), X, on_error="collect", chunksize=5, **run
        )
        assert ranges(failures) == [(0, 5), (15, 20)]
        assert results == [None, 5**0.5, 10**0.5, None]

    def test_chunks_that_return_none_have_not_failed(self, run):
        results, failures = map_chunks(
            lambda c: None, np.arange(4), on_error="collect", chunksize=2, **run
        )
        assert (results, failures) == ([None, None], [])

    def test_all_chunks_may_fail(self, run):
        results, failures = map_chunks(root, -np.ones(4), on_error="collect", chunksize=2, **run)
        assert results == [None, None]
        assert ranges(failures) == [(0, 2), (2, 4)]


class TestFill:
    @pytest.mark.parametrize("verb", VERBS)
    def test_filling_returns_the_result_alone(self, verb, run):
        X = np.array([1.0, -1.0, 4.0])
        assert_same(verb(root, X, on_error="fill", **run), np.array([1.0, np.nan, 2.0]))

    @pytest.mark.parametrize("verb", VERBS)
    def test_filling_raises_the_first_error_if_everything_fails(self, verb, run):
        with pytest.raises(ValueError, match="negative") as caught:
            verb(root, -np.ones(7), on_error="fill", chunksize=2, **run)
        assert "every item failed" in "\n".join(caught.value.__notes__)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [("f4", np.nan), ("c8", np.nan), ("M8[s]", np.datetime64("NaT", "D")),
         ("m8[D]", np.timedelta64("NaT", "D"))],
    )  # fmt: skip
    def test_the_default_fill_is_the_missing_value_of_the_dtype(self, dtype, value, run):
        def func(chunk):
            return plus_one(chunk).astype(dtype)

        result = map_array(func, np.array([1, -1, 4]), on_error="fill", chunksize=2, **run)
        assert result.dtype == dtype
        assert np.isnan(result.real if result.dtype.kind == "c" else result).tolist() == [0, 1, 0]
        assert str(result[1:2].astype(dtype)[0]) == str(np.array(value, dtype)[()])

    def test_the_default_fill_of_objects_is_none(self, run):
        def func(x):
            plus_one(x)
            return {int(x): "a"}

        result = map_items(func, np.array([1, -1]), on_error="fill", dtype=object, **run)
        assert result.tolist() == [{1: "a"}, None]

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("dtype", ["i8", "u1", "?", "U2", "S1", "i4, f8"])
    def test_a_fill_value_is_required_where_there_is_no_missing_value(self, verb, dtype, run):
        def func(values):
            return np.zeros(np.shape(values), dtype)

        with pytest.raises(TypeError, match="pass fill_value="):
            verb(func, np.arange(4.0), on_error="fill", **run)
        with pytest.raises(TypeError, match="pass fill_value="):
            verb(never, np.arange(4.0), on_error="fill", dtype=dtype, **run)

    @pytest.mark.parametrize("chunksize", [1, 2, 100])
    def test_items_that_promote_to_floats_are_filled_with_nan(self, chunksize, run):
        def func(x):
            if x == 7:
                raise ValueError("seven")
            return 1 if x < 5 else 2.5

        result = map_items(func, np.arange(10), on_error="fill", chunksize=chunksize, **run)
        assert_same(result, np.array([1.0] * 5 + [2.5, 2.5, np.nan, 2.5, 2.5]))

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(
        ("dtype", "value"),
        [("i4", -5), ("i4", 5.0), ("f4", 0.1), ("?", True), ("U3", "abc"), ("S2", b"ab"),
         ("M8[D]", np.datetime64("2020-01-01")), ("c8", 1j), ("u1", 255), ("f8", np.inf)],
    )  # fmt: skip
    def test_failed_items_get_the_given_fill_value(self, verb, dtype, value, run):
        def func(values):
            plus_one(values)
            return np.zeros(np.shape(values), dtype)

        result = verb(func, np.array([1, -1, 4]), on_error="fill", fill_value=value, **run)
        expected = np.zeros(3, dtype)
        expected[1] = value
        assert_same(result, expected)

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(
        ("dtype", "value"),
        [("i4", np.nan), ("i4", 1.5), ("u1", -1), ("u1", 256), ("U2", "abc"), ("M8[D]", 3),
         ("f8", "x"), ("f8", 1j), ("f4", 1e300), ("f8", None), ("?", 2), ("f8", [1.0, 2.0])],
    )  # fmt: skip
    def test_a_fill_value_that_is_no_value_of_the_dtype_is_an_error_at_once(
        self, verb, dtype, value, run
    ):
        options = {"on_error": "fill", "fill_value": value, **run}
        out = np.zeros(4, dtype)
        with pytest.raises(TypeError, match="fill_value="):
            verb(never, np.arange(4.0), dtype=dtype, **options)
        with pytest.raises(TypeError, match="fill_value="):
            verb(never, np.arange(4.0), out=out, **options)

        def func(values):
            return np.zeros(np.shape(values), dtype)

        with pytest.raises(TypeError, match="fill_value="):
            verb(func, np.arange(4.0), **options)

    def test_collected_integers_are_zero_or_the_fill_value(self, run):
        X = np.array([1, -1, 4])
        for options, value in (({}, 0), ({"fill_value": 99}, 99)):
            result, failures = map_array(plus_one, X, on_error="collect", **options, **run)
            assert ranges(failures) == [(1, 2)]
            assert_same(result, np.array([2, value, 5]))

    def test_a_fill_value_without_collecting_is_refused(self):
        with pytest.raises(ValueError, match="fill_value has no meaning"):
            map_array(never, np.arange(4.0), fill_value=0)


class TestNotCollected:
    @pytest.mark.parametrize("verb", [*VERBS, map_chunks])
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_exceptions_that_end_programs_are_not_collected(self, kind, verb, run):
        def func(values):
            if np.max(values) >= 5:
                raise kind("now")
            return values

        with pytest.raises(kind, match="now"):
            verb(func, np.arange(10.0), on_error="collect", chunksize=2, **run)

    @pytest.mark.parametrize("rule", ["collect", "fill"])
    def test_results_of_another_shape_are_not_collected(self, rule, run):
        with pytest.raises(ValueError, match="must return the same dtype and the same shape"):
            map_array(
                lambda c: np.zeros((len(c), 2 if c[0] else 3)),
                np.arange(10.0),
                on_error=rule,
                chunksize=2,
                **run,
            )
        with pytest.raises(ValueError, match="same shape"):
            map_items(lambda x: np.zeros(2 + (x == 5)), np.arange(10.0), on_error=rule, **run)

    @pytest.mark.parametrize("rule", ["collect", "fill"])
    def test_results_of_a_wrong_length_are_not_collected(self, rule, run):
        with pytest.raises(ValueError, match="for a chunk of length 2"):
            map_array(lambda c: c[:1], np.arange(10.0), on_error=rule, chunksize=2, **run)

    def test_results_that_cannot_be_cast_are_not_collected(self, run):
        with pytest.raises(TypeError, match="cannot become"):
            map_array(lambda c: c + 1j, np.arange(10.0), on_error="collect", dtype="f8", **run)

    @pytest.mark.parametrize("rule", ["ignore", None, True, "RAISE", ["fill"]])
    def test_unknown_values_of_on_error_are_refused(self, rule):
        for verb in (*VERBS, map_chunks):
            with pytest.raises(ValueError, match="on_error must be one of 'raise', 'collect'"):
                verb(never, np.arange(3), on_error=rule)

    def test_map_chunks_has_nothing_to_fill(self):
        with pytest.raises(ValueError, match="one of 'raise', 'collect', got 'fill'"):
            map_chunks(never, np.arange(3), on_error="fill")


class StuckError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class TwoError(Exception):
    """Is made from other arguments than it keeps."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize("verb", [*VERBS, map_chunks])
@pytest.mark.parametrize("kind", [StuckError, TwoError])
def test_only_exceptions_that_cannot_travel_arrive_as_task_errors(kind, verb):
    def func(values):
        if np.min(values) < 0:
            raise kind("a") if kind is StuckError else kind("a", "b")
        return values

    X = np.array([1.0, -1.0, 4.0, 9.0, -1.0])
    _, failures = verb(func, X, on_error="collect", chunksize=1, backend="loky", n_jobs=2)
    assert ranges(failures) == one_by_one([1, 4])
    for failure in failures:
        if kind is StuckError:
            assert type(failure.error) is TaskError
            assert failure.error.type_name.endswith("StuckError")
            assert "StuckError" in str(failure.error)
        else:
            assert type(failure.error) is TwoError
            assert str(failure.error) == "a and b"
        assert "in func" in str(failure.error.__cause__)
    _, failures = verb(func, X, on_error="collect", chunksize=1, backend="threading", n_jobs=2)
    assert [type(failure.error) for failure in failures] == [kind, kind]


def test_exceptions_of_the_main_program_arrive_as_themselves(tmp_path):
    code = (
        "import numpy as np\n"
        "from taskcarrier import map_items\n"
        "class Odd(Exception):\n"
        "    pass\n"
        "def func(x):\n"
        "    if x % 2:\n"
        "        raise Odd(int(x))\n"
        "    return x\n"
        "if __name__ == '__main__':\n"
        "    _, failures = map_items(\n"
        "        func, np.arange(6), on_error='collect', backend='loky', n_jobs=2)\n"
        "    print([type(one.error) is Odd and one.error.args[0] for one in failures])\n"
    )
    assert run_script(tmp_path, code).strip() == "[1, 3, 5]"

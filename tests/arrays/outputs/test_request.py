"""Results where the caller wants them: in arrays of its own and in `.npy` files."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import empty, last_report, load, map_array, map_items, share
from taskcarrier.arrays.casting import require_missing_value
from taskcarrier.arrays.inputs.check import check_inputs
from taskcarrier.arrays.outputs.buffers import LocalBuffer
from taskcarrier.arrays.outputs.request import (
    check_out_axis,
    check_output_request,
    do_overlap,
)
from tests.descriptors import n_descriptors
from tests.helpers import double, never
from tests.strategies import (
    EVERYWHERE,
    ONE_OF_EACH,
    assert_same,
    examples,
    keep_pools_warm,
    run_script,
    same_bits,
    samples,
    shut_down_pools,
    warm_pools,
)

SHAPE = (30, 4)


pools = keep_pools_warm(2)


@pytest.fixture(params=ONE_OF_EACH, ids=" ".join)
def some_run(request):
    backend, balance = request.param
    return {"backend": backend, "balance": balance, "n_jobs": 2}


@pytest.fixture
def X():  # noqa: N802  # what the field calls its arrays
    return np.random.default_rng(0).normal(size=SHAPE)


def failing(chunk):
    if chunk[-1].max() >= 0:
        raise RuntimeError("as planned")
    return chunk


# Arrays of that shape, each a view of something larger or other.
ARRAYS = {
    "C": lambda: np.full(SHAPE, 7.0),
    "F": lambda: np.full(SHAPE, 7.0, order="F"),
    "transposed": lambda: np.full(SHAPE[::-1], 7.0).T,
    "reversed": lambda: np.full(SHAPE, 7.0)[::-1, ::-1],
    "every third": lambda: np.full((90, 8), 7.0)[::3, ::2],
    "columns": lambda: np.full((30, 40), 7.0)[:, 3:40:10],
    "unaligned": lambda: np.ndarray(SHAPE, "f8", bytearray(8 * 120 + 1), 1),
    "field": lambda: np.zeros(SHAPE, "i1, f8, i2")["f1"],
    "shared": lambda: empty(SHAPE),
    "view of what is shared": lambda: empty((8, 60), order="F").T[::2, ::-2],
}


@pytest.mark.parametrize("layout", ARRAYS)
def test_results_fill_an_array_of_any_layout(layout, run, X):
    out = ARRAYS[layout]()
    whole = out if out.base is None else out.base
    outside = np.array(whole, copy=True) if isinstance(whole, np.ndarray) else None
    result = map_array(double, X, out=out, chunksize=4, **run)
    assert result is out
    assert np.array_equal(out, X * 2)
    if outside is not None:  # nothing beside the view was touched
        out[...] = 7.0 if layout != "field" else 0.0
        if layout not in {"shared", "view of what is shared"}:
            assert np.array_equal(np.asarray(whole), outside)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_results_fill_an_array_along_every_axis(axis, order, run, X):
    out = np.empty(SHAPE, order=order)
    assert map_array(double, X, axis=axis, out=out, chunksize=3, **run) is out
    assert np.array_equal(out, X * 2)


def test_out_axis_may_differ_from_the_mapped_axis(run, X):
    out = np.empty((4, 30))
    map_array(lambda c: c.T.copy(), X, out=out, out_axis=1, chunksize=7, **run)
    assert np.array_equal(out, X.T)


@examples(40)
@given(samples(dtypes=[np.dtype("f8"), np.dtype(">i4")]), st.data())
def test_any_writable_array_can_be_the_output(sample, data):
    with sample.array() as array:
        axis = data.draw(st.integers(0, array.ndim - 1))
        source = array.copy()
        # Written through a fresh base, with the strides of the sample where they do not overlap.
        out = np.empty_like(source, order=data.draw(st.sampled_from("CFK")))
        backend, balance = data.draw(st.sampled_from(EVERYWHERE))
        found = map_array(
            np.copy, source, axis=axis, out=out, backend=backend, balance=balance, n_jobs=2
        )
        assert found is out
        assert same_bits(out, source)


class TestMemmaps:
    @pytest.mark.parametrize("mode", ["r+", "w+"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_workers_fill_memmaps(self, mode, order, run, X, tmp_path):
        path = tmp_path / "Y.dat"
        path.write_bytes(bytes(8 * 120 + 64))
        out = np.memmap(
            path, "f8", mode, offset=64 if mode == "r+" else 0, shape=SHAPE, order=order
        )
        assert map_array(double, X, out=out, chunksize=4, **run) is out
        assert np.array_equal(out, X * 2)
        again = np.memmap(path, "f8", "r", out.offset, SHAPE, order)
        assert np.array_equal(again, X * 2)

    @pytest.mark.parametrize(
        "view_of", [lambda m: m.T, lambda m: m[::-1], lambda m: m[::2], lambda m: m[3:, 1:]]
    )
    def test_workers_fill_views_of_memmaps(self, view_of, run, tmp_path):
        base = np.memmap(tmp_path / "Y.dat", "i4", "w+", shape=(12, 6))
        base[...] = -1
        expected = np.array(base)
        view_of(expected)[...] = np.arange(view_of(base).size).reshape(view_of(base).shape)
        view = view_of(base)
        map_array(np.copy, view_of(expected).copy(), out=view, chunksize=2, **run)
        assert np.array_equal(base, expected)

    def test_a_private_memmap_leaves_its_file_alone(self, run, X, tmp_path):
        path = tmp_path / "Y.dat"
        path.write_bytes(bytes(8 * 120))
        out = np.memmap(path, "f8", "c", shape=SHAPE)
        map_array(double, X, out=out, **run)
        assert np.array_equal(out, X * 2)
        assert path.read_bytes() == bytes(8 * 120)

    def test_a_memmap_of_a_deleted_file_is_filled(self, run, X, tmp_path):
        path = tmp_path / "Y.dat"
        out = np.memmap(path, "f8", "w+", shape=SHAPE)
        path.unlink()
        map_array(double, X, out=out, **run)
        assert np.array_equal(out, X * 2)

    def test_a_memmap_of_a_replaced_file_is_filled(self, run, X, tmp_path):
        path, other = tmp_path / "Y.dat", tmp_path / "Z.dat"
        out = np.memmap(path, "f8", "w+", shape=SHAPE)
        other.write_bytes(bytes(8 * 120))
        other.rename(path)
        map_array(double, X, out=out, **run)
        assert np.array_equal(out, X * 2)
        assert path.read_bytes() == bytes(8 * 120)

    def test_a_memmap_opened_with_load_is_filled(self, run, X, tmp_path):
        np.save(tmp_path / "Y.npy", np.zeros(SHAPE))
        map_array(double, X, out=load(tmp_path / "Y.npy", "r+"), **run)
        assert np.array_equal(np.load(tmp_path / "Y.npy"), X * 2)


class TestTuples:
    def test_one_tuple_may_mix_all_kinds_of_outputs(self, run, X, tmp_path):
        plain = np.empty((4, 30), "f4").T
        mapped = np.memmap(tmp_path / "M.dat", "f8", "w+", shape=SHAPE)
        shared = empty(SHAPE)
        path = tmp_path / "P.npy"
        out = (plain, path, mapped, shared)
        result = map_array(lambda c: (c, c + 1, c + 2, c + 3), X, out=out, chunksize=4, **run)
        assert isinstance(result, tuple)
        assert (result[0], result[2], result[3]) == (plain, mapped, shared) or (
            result[0] is plain and result[2] is mapped and result[3] is shared
        )
        assert np.array_equal(plain, X.astype("f4"))
        for number, one in enumerate((np.load(path), mapped, shared), start=1):
            assert np.array_equal(one, X + number)

    def test_a_tuple_of_one_output_takes_a_tuple_of_one_result(self, some_run, X):
        out = np.empty(SHAPE)
        (result,) = map_array(lambda c: (c * 2,), X, out=(out,), **some_run)
        assert result is out
        assert np.array_equal(out, X * 2)

    @pytest.mark.parametrize("n", [0, 1, 3])
    def test_a_tuple_of_the_wrong_length_is_refused(self, n, some_run, X):
        with pytest.raises(ValueError, match="2"):
            map_array(lambda c: (c, c), X, out=tuple(np.empty(SHAPE) for _ in range(n)), **some_run)

    def test_each_output_of_a_tuple_has_its_own_axis(self, some_run, X):
        one, other = np.empty(SHAPE), np.empty(SHAPE[::-1])
        map_array(lambda c: (c, c.T), X, out=(one, other), out_axis=(0, 1), **some_run)
        assert np.array_equal(one, X)
        assert np.array_equal(other, X.T)


class TestItems:
    def test_items_are_stacked_in_place(self, run, X):
        out = np.empty((4, 30), order="F")
        assert map_items(lambda x: x + 1, X, out=out, out_axis=1, chunksize=4, **run) is out
        assert np.array_equal(out, X.T + 1)

    def test_several_results_of_items_go_to_a_file_and_an_array(self, run, X, tmp_path):
        out = np.empty(30, "f4")
        first, _ = map_items(
            lambda x: (x, x.sum()), X, out=(tmp_path / "Y.npy", out), chunksize=4, **run
        )
        assert_same(first, X)
        assert np.array_equal(out, np.array([row.sum() for row in X], "f4"))

    def test_dtypes_of_items_promote_into_a_file(self, run, tmp_path):
        def func(x):
            return int(x) if x < 13 else x / 2

        for chunksize in (1, 3, 100):
            result = map_items(
                func, np.arange(20), out=tmp_path / "Y.npy", chunksize=chunksize, **run
            )
            assert_same(result, np.stack([func(x) for x in np.arange(20)]))
            assert_same(np.load(tmp_path / "Y.npy"), result)

    def test_dtypes_of_items_promote_into_a_file_with_a_longer_header(self, run, tmp_path):
        def func(x):
            return "ab" if x < 13 else "abcdefghij" * 100

        for chunksize in (1, 100):
            result = map_items(
                func, np.arange(20), out=tmp_path / "Y.npy", chunksize=chunksize, **run
            )
            assert_same(result, np.stack([np.asarray(func(x)) for x in range(20)]))
            assert_same(np.load(tmp_path / "Y.npy"), result)

    @pytest.mark.parametrize("length", [0, 3])
    def test_no_items_leave_the_output_as_it_is(self, length, some_run):
        out = np.empty((0, length))
        assert map_items(never, np.empty((0, 5)), out=out, **some_run) is out


@pytest.mark.fault(5)
class TestCasts:
    @pytest.mark.parametrize(
        ("given_", "into"),
        [("f8", "f4"), ("f8", ">f8"), ("i8", "f4"), ("i8", "i1"), ("u1", "i8"), ("?", "f8"),
         ("f8", "c8"), ("U3", "U7"), ("M8[D]", "M8[s]"), ("i8", "u2"), ("f8", "O")],
    )  # fmt: skip
    def test_results_are_cast_to_the_dtype_of_the_output(self, given_, into, run):
        X = np.arange(20).astype(given_)
        out = np.empty(20, into)
        assert map_array(np.copy, X, out=out, chunksize=3, **run) is out
        assert out.tolist() == X.astype(into).tolist()

    @pytest.mark.parametrize(
        ("given_", "into"),
        [
            ("f8", "i8"),
            ("c16", "f8"),
            ("U7", "U3"),
            ("M8[s]", "M8[D]"),
            ("f8", "?"),
            ("f8", "M8[s]"),
        ],
    )
    def test_casts_that_lose_something_are_refused(self, given_, into, some_run):
        X = np.arange(20).astype(given_)
        with pytest.raises(TypeError, match="cannot become"):
            map_array(np.copy, X, out=np.empty(20, into), chunksize=3, **some_run)

    def test_integers_that_do_not_fit_are_named(self, some_run):
        with pytest.raises(ValueError, match=r"300 does not fit into int8"):
            map_array(lambda c: c, np.array([1, 300]), out=np.empty(2, "i1"), **some_run)

    @pytest.mark.parametrize("verb", [map_array, map_items])
    def test_a_file_has_the_dtype_that_was_asked_for(self, verb, run, X, tmp_path):
        result = verb(double, X, out=tmp_path / "Y.npy", dtype=">f4", chunksize=4, **run)
        assert_same(result, (X * 2).astype(">f4"))
        assert_same(np.load(tmp_path / "Y.npy"), (X * 2).astype(">f4"))


class TestText:
    WORDS = ("ab", "abcde", "", "xyz", "q" * 12)

    @pytest.mark.parametrize("chunksize", [1, 2, 5])
    @pytest.mark.parametrize("kind", [str, "S", "U"])
    def test_the_longest_decides_where_no_length_is_asked_for(self, kind, chunksize, run, tmp_path):
        words = list(np.array(self.WORDS, kind))
        options = {"dtype": kind, "chunksize": chunksize, **run}
        expected = np.stack(words, dtype=kind)
        X = np.arange(5)
        # Each chunk has the length of its own longest word.
        assert_same(map_array(lambda c: np.stack([words[i] for i in c]), X, **options), expected)
        assert_same(map_items(lambda i: words[i], X, **options), expected)
        assert_same(map_items(lambda i: words[0], X, **options), np.stack([words[0]] * 5))
        assert_same(map_items(int, X, **options), X.astype(kind))
        path = tmp_path / "Y.npy"
        map_items(lambda i: words[i], X, out=path, **options)
        assert same_bits(np.load(path), expected)
        filled, _ = map_items(
            lambda i: words[i] if i != 3 else 1 / 0, X, on_error="collect", **options
        )
        assert_same(filled, np.where(X != 3, expected, np.zeros((), kind)))

    def test_runs_that_can_be_resumed_have_one_length(self, some_run, tmp_path):
        X = np.arange(5)
        options = {"resume": True, "dtype": str, "chunksize": 1, **some_run}
        match = "pass dtype=, of text with a length, as 'U20'"
        with pytest.raises(ValueError, match=match):
            map_items(lambda i: self.WORDS[i], X, out=tmp_path / "items.npy", **options)
        with pytest.raises(ValueError, match=match):
            map_array(lambda c: np.array([self.WORDS[c[0]]]), X, out=tmp_path / "Y.npy", **options)
        mapped = map_items(lambda i: "abc", X, out=tmp_path / "same.npy", **options)
        assert same_bits(np.array(mapped), np.array(["abc"] * 5))

    def test_rows_need_a_length(self):
        for kind in (str, "S"):
            with pytest.raises(ValueError, match="needs a length, as 'U20'; got"):
                map_items(never, np.arange(3), out_shape=2, dtype=kind)


class TestRefusals:
    """All refusals but those of the shape of results come before any call of the function."""

    @staticmethod
    def refused(out, match, *arrays, error=ValueError, **options):
        arrays = arrays or (np.zeros(SHAPE),)
        for backend, balance in ONE_OF_EACH:
            calls = []
            with pytest.raises(error, match=match):
                map_array(
                    lambda *c, calls=calls: calls.append(1) or c[0],
                    *arrays,
                    out=out,
                    backend=backend if backend != "loky" else "threading",
                    balance=balance,
                    n_jobs=2,
                    **options,
                )
            assert not calls
            with pytest.raises(error, match=match):
                map_array(never, *arrays, out=out, backend=backend, n_jobs=2, **options)

    def test_a_read_only_output_is_refused(self):
        out = np.empty(SHAPE)
        out.flags.writeable = False
        self.refused(out, "read-only")

    @pytest.mark.parametrize("shape", [(29, 4), (31, 4), (0, 4), (4, 30)])
    def test_an_output_of_the_wrong_length_is_refused(self, shape):
        self.refused(np.empty(shape), "there are 30 items")

    @pytest.mark.parametrize("axis", [2, -3])
    def test_an_out_axis_that_the_output_lacks_is_refused(self, axis):
        self.refused(np.empty(SHAPE), "axis", out_axis=axis, error=np.exceptions.AxisError)

    @pytest.mark.parametrize("within", [list, tuple, lambda one: {"a": [(1, *one)]}])
    def test_an_output_inside_an_argument_is_refused(self, within):
        out = np.empty(SHAPE)
        self.refused(out, "overlaps", args=(within([out[::2]]),))
        self.refused(out, "overlaps", kwargs={"extra": within([out.T])})

    def test_a_masked_output_is_refused(self):
        self.refused(np.ma.zeros(SHAPE), "masked", error=TypeError)

    @pytest.mark.parametrize("out", [3, [np.empty(SHAPE)], b"Y.npy", (np.empty(SHAPE), 3)])
    def test_an_output_that_is_no_array_or_path_is_refused(self, out):
        with pytest.raises((TypeError, ValueError), match=r"out must be|expected a path"):
            map_array(never, np.zeros(SHAPE), out=out)

    def test_a_path_of_another_format_is_refused(self, tmp_path):
        self.refused(tmp_path / "Y.dat", "ends in .npy")

    def test_an_output_of_another_dtype_than_asked_for_is_refused(self):
        self.refused(np.empty(SHAPE), "float32", dtype="f4")

    def test_an_output_that_overlaps_itself_is_refused(self):
        self.refused(np.lib.stride_tricks.as_strided(np.zeros(1), SHAPE, (0, 0)), "itself")
        windows = np.lib.stride_tricks.sliding_window_view(np.zeros(33), 4, writeable=True)
        self.refused(windows, "itself")

    @pytest.mark.parametrize("shape", [(30,), (30, 3), (30, 4, 1), (30, 5)])
    def test_an_output_of_another_shape_than_the_results_is_refused(self, shape, some_run, X):
        with pytest.raises(ValueError, match=r"out has shape .* need \(30, 4\)"):
            map_array(double, X, out=np.empty(shape), **some_run)

    def test_an_input_as_the_output_is_refused(self, X):
        for out in (X, X[:], X.view(), X[::-1], X.reshape(4, 30).reshape(SHAPE)):
            self.refused(out, "overlaps with an input", X)
        self.refused(X, "overlaps", np.zeros(SHAPE), X)

    def test_part_of_an_input_as_the_output_is_refused(self):
        memory = np.zeros(200)
        self.refused(memory[:100], "overlaps with an input", memory[99:199])
        self.refused(memory[50:150], "overlaps with an input", memory[149:49:-1])

    def test_an_argument_as_the_output_is_refused(self, X):
        out = np.empty(SHAPE)
        self.refused(out, "overlaps", args=(out,))
        self.refused(out, "overlaps", kwargs={"a": out[3:]})

    def test_two_outputs_in_the_same_memory_are_refused(self):
        memory = np.zeros((31, 4))
        self.refused((memory[1:], memory[:-1]), "overlaps")

    def test_the_file_of_an_input_as_the_output_is_refused(self, tmp_path):
        path, link = tmp_path / "X.npy", tmp_path / "L.npy"
        np.save(path, np.zeros(SHAPE))
        link.hardlink_to(path)
        before = path.read_bytes()
        for out in (path, str(path), link):
            for X in (
                path,
                load(path),
                np.load(path, mmap_mode="r"),
                np.load(path, mmap_mode="r+"),
            ):
                self.refused(out, r"file (of|that) an input", X)
        for mapped in (load(path, "r+"), np.load(path, mmap_mode="r+")):
            for X in (path, load(path), np.load(path, mmap_mode="r")[::-1]):
                self.refused(mapped, "overlaps with an input", X)
        assert path.read_bytes() == before
        assert sorted(tmp_path.iterdir()) == [link, path]

    def test_the_file_of_a_privately_mapped_input_as_the_output_is_refused(self, tmp_path):
        path = tmp_path / "X.npy"
        np.save(path, np.zeros(SHAPE))
        private = np.load(path, mmap_mode="c")
        self.refused(np.load(path, mmap_mode="r+"), "overlaps with an input", private[::-1])

    def test_the_deleted_file_of_an_input_as_the_output_is_refused(self, tmp_path):
        path = tmp_path / "X.npy"
        np.save(path, np.zeros(SHAPE))
        X, out = np.load(path, mmap_mode="r"), np.load(path, mmap_mode="r+")
        path.unlink()
        self.refused(out, "overlaps with an input", X[::-1])

    def test_an_output_that_overlaps_an_input_in_one_segment_is_refused(self):
        X = share(np.zeros((60, 4)))
        self.refused(X[:30], "overlaps with an input", X[29:59])

    def test_the_same_path_twice_is_refused(self, tmp_path):
        path = tmp_path / "Y.npy"
        np.save(path, np.arange(3.0))
        before = path.read_bytes()
        self.refused((path, path), "out")
        self.refused((path, tmp_path / "." / "Y.npy"), "out")
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_path_together_with_a_memmap_of_it_is_refused(self, tmp_path):
        path = tmp_path / "Y.npy"
        np.save(path, np.zeros(SHAPE))
        mapped = np.load(path, mmap_mode="r+")
        self.refused((mapped, path), "out")
        self.refused((path, mapped), "out")


class TestNeighbouringMemory:
    """Interleaved memory without common bytes is no overlap."""

    @pytest.mark.parametrize("make", [np.zeros, empty])
    def test_interleaved_memory_may_hold_input_and_output(self, make, run):
        memory = make((60, 8))
        memory[...] = np.arange(480.0).reshape(60, 8)
        before = memory.copy()
        for source, target in (
            (np.s_[::2], np.s_[1::2]),
            (np.s_[:, ::2], np.s_[:, 1::2]),
            (np.s_[:30], np.s_[30:]),
            (np.s_[::-2, 3], np.s_[::2, 5]),
        ):
            memory[...] = before
            map_array(np.negative, memory[source], out=memory[target], chunksize=4, **run)
            expected = before.copy()
            expected[target] = -before[source]
            assert np.array_equal(memory, expected)

    def test_interleaved_parts_of_one_memmap_are_no_overlap(self, run, tmp_path):
        memory = np.memmap(tmp_path / "X.dat", "i8", "w+", shape=(40,))
        memory[...] = np.arange(40)
        map_array(np.negative, memory[::2], out=memory[1::2], chunksize=4, **run)
        assert np.array_equal(memory[1::2], -np.arange(0, 40, 2))
        assert np.array_equal(memory[::2], np.arange(0, 40, 2))

    def test_two_memmaps_of_separate_parts_of_one_file_are_no_overlap(self, run, tmp_path):
        path = tmp_path / "X.dat"
        np.arange(20_000.0).tofile(path)
        X = np.memmap(path, "f8", "r", shape=(10_000,))
        out = np.memmap(path, "f8", "r+", offset=80_000, shape=(10_000,))
        map_array(np.negative, X, out=out, **run)
        assert np.array_equal(np.fromfile(path), np.r_[np.arange(10_000.0), -np.arange(10_000.0)])


@given(st.data())
@examples(200)
def test_overlap_equals_what_numpy_says(data):
    memory = np.zeros(100, np.uint8)

    def view():
        start, step = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 5))
        shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
        strides = (data.draw(st.integers(0, 5)), step)
        made = np.ndarray(shape, np.uint8, memory, start, strides)
        return made[:: data.draw(st.sampled_from([1, -1]))]

    one, other = view(), view()
    assert do_overlap(one, other) is np.shares_memory(one, other)


class TestFiles:
    def test_files_hold_the_result_and_are_returned(self, run, X, tmp_path):
        path = tmp_path / "Y.npy"
        result = map_array(double, X, out=path, chunksize=4, **run)
        assert_same(result, X * 2)
        assert_same(np.load(path), X * 2)
        assert list(tmp_path.iterdir()) == [path]
        result[0, 0] = 5.0  # what is returned is the file
        assert np.load(path)[0, 0] == 5.0

    def test_a_result_file_may_be_the_next_input_without_a_copy(self, X, tmp_path):
        first = map_array(double, X, out=tmp_path / "Y.npy", backend="loky", n_jobs=2)
        again = map_array(double, first.T, axis=1, backend="loky", n_jobs=2)
        assert last_report().bytes_copied == 0
        assert np.array_equal(again, X.T * 4)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_files_keep_the_order_of_axes(self, axis, run, X, tmp_path):
        map_array(double, np.asfortranarray(X), axis=axis, out=tmp_path / "Y.npy", **run)
        loaded = np.load(tmp_path / "Y.npy")
        assert loaded.flags.f_contiguous
        assert np.array_equal(loaded, X * 2)

    @pytest.mark.parametrize(
        "dtype",
        ["f4", ">f8", "c16", "?", "S3", "U2", ">U2", "M8[ns]", "V5", "i1, f8", "g",
         [("a", "i2", (2, 3)), ("b", [("x", "f4")])],
         np.dtype([("a", "i1"), ("b", "f8")], align=True)],
    )  # fmt: skip
    def test_files_of_every_dtype_are_written(self, dtype, some_run, tmp_path):
        X = np.zeros((20, 2), dtype)
        result = map_array(np.copy, X, out=tmp_path / "Y.npy", chunksize=3, **some_run)
        assert_same(result, X)
        assert np.load(tmp_path / "Y.npy").dtype == X.dtype

    def test_field_names_of_any_letters_are_written_to_files(self, some_run, tmp_path):
        X = np.ones(20, [("λ", "f8"), ("長さ", "i4")])
        result = map_array(np.copy, X, out=tmp_path / "Y.npy", chunksize=3, **some_run)
        assert_same(result, X)
        assert_same(np.load(tmp_path / "Y.npy"), X)

    def test_dtypes_of_very_many_fields_are_written_to_files(self, some_run, tmp_path):
        X = np.ones(4, [(f"field {number}", "f8") for number in range(900)])
        result = map_array(np.copy, X, out=tmp_path / "Y.npy", **some_run)
        assert_same(result, X)

    @pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (5, 0, 2)])
    def test_results_without_bytes_are_written_to_files(self, shape, run, tmp_path):
        result = map_array(np.copy, np.empty(shape, "f4"), out=tmp_path / "Y.npy", **run)
        assert_same(result, np.empty(shape, "f4"))
        assert_same(np.load(tmp_path / "Y.npy"), np.empty(shape, "f4"))

    @pytest.mark.parametrize(
        "name", ["two words.npy", "line\nbreak.npy", "ü λ 長.npy", "back\\012slash.npy",
                 "50% {x}.npy", " lead.npy", "cr\rr.npy", "gone (deleted).npy", "n" * 240 + ".npy"],
    )  # fmt: skip
    def test_files_of_any_name_are_written(self, name, some_run, X, tmp_path):
        path = tmp_path / name
        assert_same(map_array(double, X, out=path, **some_run), X * 2)
        assert list(tmp_path.iterdir()) == [path]
        assert_same(map_array(double, path, **some_run), X * 4)

    def test_a_relative_path_is_written_and_read(self, some_run, X, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert_same(map_array(double, X, out="Y.npy", **some_run), X * 2)
        assert_same(map_array(double, "Y.npy", **some_run), X * 4)

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o027])
    def test_files_have_the_permissions_of_new_files(self, umask, some_run, X, tmp_path):
        before = os.umask(umask)
        try:
            map_array(double, X, out=tmp_path / "Y.npy", **some_run)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "Y.npy").stat().st_mode) == 0o666 & ~umask

    @pytest.mark.fault(42)
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o000])
    @pytest.mark.parametrize("more", [{}, {"resume": True}])
    def test_files_keep_the_permissions_of_what_they_replace(
        self, mode, more, some_run, X, tmp_path
    ):
        path = tmp_path / "Y.npy"
        path.touch()
        path.chmod(mode)
        part = path.with_name("Y.npy.part")

        def seeing(chunk):
            return np.full(len(chunk), stat.S_IMODE(part.stat().st_mode))

        seen = map_array(seeing, X, out=path, **more, **some_run)
        assert set(seen.tolist()) == {mode | 0o600}  # never readable for others
        assert stat.S_IMODE(path.stat().st_mode) == mode
        seen[0] = 7  # what is returned can be written to all the same
        path.chmod(0o600)
        assert np.load(path)[0] == 7

    @pytest.mark.fault(42)
    def test_special_permissions_of_a_replaced_file_are_dropped(self, X, tmp_path):
        path = tmp_path / "Y.npy"
        path.touch()
        path.chmod(0o6755)  # to run it with the rights of its owner
        map_array(double, X, out=path, n_jobs=2, backend="loky")
        assert stat.S_IMODE(path.stat().st_mode) == 0o755

    @pytest.mark.fault(42)
    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_files_keep_the_group_and_the_owner_of_what_they_replace(self, some_run, X, tmp_path):
        path = tmp_path / "Y.npy"
        path.touch()
        path.chmod(0o640)
        os.chown(path, 65534, 65533)
        map_array(double, X, out=path, **some_run)
        facts = path.stat()
        assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (65534, 65533, 0o640)

    @pytest.mark.fault(42)
    @pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
    def test_another_group_does_not_inherit_the_permissions_of_the_group(
        self, number, X, tmp_path, monkeypatch
    ):
        path = tmp_path / "Y.npy"
        path.touch()
        path.chmod(0o674)

        def refuse(*_):
            raise OSError(number, "no")

        real = os.stat

        def of_another_group(one, *more, **named):
            found = real(one, *more, **named)
            if one != str(path):
                return found
            return os.stat_result((*found[:5], found.st_gid + 1, *found[6:]))

        monkeypatch.setattr(os, "stat", of_another_group)
        monkeypatch.setattr(os, "fchown", refuse)
        map_array(double, X, out=path, n_jobs=2, backend="loky")
        monkeypatch.undo()
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def test_files_are_not_there_before_they_are_complete(self, run, X, tmp_path):
        path = tmp_path / "Y.npy"

        def spying(chunk):
            return np.full(len(chunk), path.exists())

        def seeing(chunk):
            return np.full(len(chunk), path.with_name("Y.npy.part").exists())

        assert not map_array(spying, X, out=path, chunksize=4, **run).any()
        assert map_array(seeing, X, out=path, chunksize=4, **run).all()
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("before", [None, b"\x93 something else"])
    @pytest.mark.parametrize("fault", ["error", "disagreement", "cast", "died"])
    def test_files_are_unchanged_after_an_error(self, fault, before, some_run, X, tmp_path):
        path = tmp_path / "Y.npy"
        if before is not None:
            path.write_bytes(before)
        first = X[0, 0]

        def func(chunk):
            if chunk[0, 0] == first:
                return chunk
            if fault == "died" and some_run["backend"] == "loky":
                os._exit(3)
            if fault == "disagreement":
                return chunk[:, :2]
            if fault == "cast":
                return chunk * 1j
            raise RuntimeError("as planned")

        with pytest.raises((ValueError, TypeError, RuntimeError)):
            map_array(func, X, out=path, chunksize=4, dtype="f8", **some_run)
        assert list(tmp_path.iterdir()) == ([] if before is None else [path])
        assert before is None or path.read_bytes() == before
        if fault == "died":  # the worker that took its place is a pool's, not a leak
            shut_down_pools()
            warm_pools(2)

    @pytest.mark.parametrize("verb", ["map_array", "map_items"])
    def test_files_of_python_objects_are_refused_and_existing_files_stay(
        self, verb, some_run, tmp_path
    ):
        # In a program of its own: objects in a file could bring it down.
        code = (
            "import sys\n"
            "import numpy as np\n"
            f"from taskcarrier import {verb}\n"
            "X = np.array([{}, {}, 1], object)\n"
            "try:\n"
            f"    {verb}(lambda c: c, X, out='Y.npy', **{some_run!r})\n"
            "except (TypeError, ValueError) as error:\n"
            "    print(error)\n"
        )
        path = tmp_path / "Y.npy"
        np.save(path, np.arange(3.0))
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert "object" in run_script(tmp_path, code)
        assert path.read_bytes() == before
        assert sorted(one.name for one in tmp_path.iterdir()) == ["Y.npy", "script.py"]

    def test_files_replace_the_part_file_of_an_earlier_run(self, some_run, X, tmp_path):
        part = tmp_path / "Y.npy.part"
        part.write_bytes(b"half" * 10_000)
        assert_same(map_array(double, X, out=tmp_path / "Y.npy", **some_run), X * 2)
        assert not part.exists()
        assert (tmp_path / "Y.npy").stat().st_size == X.nbytes + 128

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_in_place_of_the_part_file_is_not_followed(self, there, some_run, X, tmp_path):
        victim = tmp_path / "victim"
        if there:
            victim.write_bytes(b"mine")
        part = tmp_path / "Y.npy.part"
        part.symlink_to(victim)
        with pytest.raises(FileExistsError, match="no ordinary file"):
            map_array(never, X, out=tmp_path / "Y.npy", **some_run)
        assert part.is_symlink()
        assert victim.exists() is there
        assert not there or victim.read_bytes() == b"mine"

    def test_a_missing_folder_is_an_error_at_once(self, some_run, X, tmp_path):
        with pytest.raises(OSError, match="missing"):
            map_array(never, X, out=tmp_path / "missing" / "Y.npy", **some_run)

    def test_a_file_that_cannot_be_made_leaves_no_other_file(self, some_run, X, tmp_path):
        with pytest.raises(OSError, match="missing"):
            map_array(
                never, X, out=(tmp_path / "Y.npy", tmp_path / "missing" / "Z.npy"), **some_run
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_that_name_is_an_error_at_once(self, some_run, X, tmp_path):
        (tmp_path / "Y.npy").mkdir()
        with pytest.raises(IsADirectoryError, match="is a folder"):
            map_array(never, X, out=tmp_path / "Y.npy", **some_run)
        assert list(tmp_path.iterdir()) == [tmp_path / "Y.npy"]

    @pytest.mark.fault(42)
    @pytest.mark.parametrize("resume", [False, True])
    def test_a_pipe_of_that_name_is_replaced(self, resume, some_run, X, tmp_path):
        path = tmp_path / "Y.npy"
        os.mkfifo(path)
        mapped = map_array(double, X, out=path, resume=resume, **some_run)
        assert_same(mapped, X * 2)
        assert path.is_file()

    @pytest.mark.fault(29)
    def test_a_memmap_whose_file_a_pipe_has_replaced_is_mapped(self, some_run, X, tmp_path):
        path = tmp_path / "X.npy"
        np.save(path, X)
        memmap = np.load(path, mmap_mode="r")
        path.unlink()
        os.mkfifo(path)
        assert_same(map_array(double, memmap, **some_run), X * 2)

    def test_files_leave_no_descriptors_or_maps(self, some_run, X, tmp_path):
        def held():
            warm_pools(2)  # their descriptors count, so they must be there
            maps = Path("/proc/self/maps").read_text(encoding="utf-8")
            return maps.count(str(tmp_path)), n_descriptors()

        before = held()
        for _ in range(5):
            map_array(double, X, out=tmp_path / "Y.npy", **some_run)
            map_array(double, tmp_path / "Y.npy", **some_run)
        assert held() == before


def test_several_dtypes_need_as_many_outputs():
    inputs = check_inputs((np.zeros(4),), 0)
    with pytest.raises(ValueError, match="dtype has 2 entries, out has 1"):
        check_output_request(np.zeros(4), ("f4", "f8"), 0, inputs, ())
    with pytest.raises(ValueError, match="out_axis has 2 entries, out has 1"):
        check_output_request(np.zeros(4), None, (0, 0), inputs, ())


def test_a_request_has_one_entry_for_each_output():
    inputs = check_inputs((np.zeros(4),), 0)

    def request_of(out=None, dtype=None, **options):
        return check_output_request(out, dtype, 0, inputs, (), **options)

    f4, i8 = np.dtype("f4"), np.dtype("i8")
    mine = np.zeros(4, "i8")
    for request, entries, dtypes, is_tuple in (
        (request_of(), (None,), (None,), False),
        (request_of(dtype="f4"), (None,), (f4,), False),
        (request_of(dtype=("f4", None)), (None, None), (f4, None), True),
        (request_of(mine), (mine,), (i8,), False),
        (request_of((mine, "Y.npy")), (mine, "Y.npy"), (i8, None), True),
        (request_of(("Y.npy", "Z.npy"), "f4"), ("Y.npy", "Z.npy"), (f4, f4), True),
    ):
        assert request.entries[0] is entries[0] or request.entries == entries
        assert request.dtypes == dtypes
        assert request.is_tuple is is_tuple
        assert len(request.paths) == sum(isinstance(entry, str) for entry in entries)
    assert request_of((mine, "Y.npy"), promote_dtypes=True).promote_dtypes
    assert not request_of((mine, "Y.npy")).promote_dtypes
    assert not request_of((mine, "Y.npy"), ("i8", "f4"), promote_dtypes=True).promote_dtypes


def test_what_is_asked_for_without_a_tuple_holds_for_any_number_of_results():
    inputs = check_inputs((np.zeros(4),), 0)

    def buffer_for(out, dtype):
        buffer = LocalBuffer(n_items=4, order="C")
        check_output_request(out, dtype, 0, inputs, ()).apply_to(buffer)
        return buffer

    outputs = buffer_for(None, "f4").get_outputs(3)
    assert [output.dtype for output in outputs] == [np.dtype("f4")] * 3
    for out, dtype in ((np.zeros(4), None), (None, ("f4",))):
        buffer = buffer_for(out, dtype)
        assert len(buffer.get_outputs(1)) == 1
        with pytest.raises(ValueError, match="has 1 entries, but func returned 3 results"):
            buffer.get_outputs(3)


def test_a_value_for_missing_results_is_needed_at_once_where_a_dtype_is_known():
    inputs = check_inputs((np.zeros(4),), 0)
    options = {"make_fill": require_missing_value}
    check_output_request(None, "f4", 0, inputs, (), **options)
    for out, dtype in ((np.zeros(4, int), None), (None, (None, "i8"))):
        with pytest.raises(TypeError, match="int64 have no NaN"):
            check_output_request(out, dtype, 0, inputs, (), **options)


def test_out_axis_is_the_axis_of_the_first_array_unless_given():
    assert check_out_axis(None, -1) == -1
    assert check_out_axis(None, (1, 0)) == 1
    assert check_out_axis((0, 2), 1) == (0, 2)
    with pytest.raises(TypeError, match="out_axis"):
        check_out_axis((0, 1.5), 0)

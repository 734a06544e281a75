"""Kernels of numba over items, fused into loops: the same as a list comprehension, on every run."""

import gc
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import DynamicParallelMapper, last_report, load, map_array, map_items
from taskcarrier.arrays.kernels import compiler
from tests.strategies import (
    assert_same,
    axes_of,
    chunksizes,
    examples,
    keep_pools_warm,
    same_bits,
    samples,
)

RUNS = [
    ("sequential", "static", 1),
    ("threading", "static", 2),
    ("threading", "dynamic", 3),
    (None, "static", 2),
]


pools = keep_pools_warm(2, 3)


# A kernel is compiled for each: `make test` has the run in which threads claim.
@pytest.fixture(
    params=[
        *[pytest.param(run, marks=pytest.mark.thorough) for run in (*RUNS[:2], RUNS[3])],
        RUNS[2],
    ],
    ids=lambda run: f"{run[0]}-{run[1]}-{run[2]}",
)
def run(request):
    backend, balance, n_jobs = request.param
    return {"backend": backend, "balance": balance, "n_jobs": n_jobs}


RAISES_WITH_ROW = """
@numba.njit
def check(row, argument):
    if row[0] >= 3:
        raise ValueError("too large", row, argument)

@numba.njit(cache=cached)
def kernel(row, argument):
    check(row, argument)
    return row[0]
"""


@numba.njit
def root(x):
    return np.sqrt(x) + 1


@numba.njit
def same(x):
    return x


@numba.njit
def total(row):
    s = 0.0
    for value in row.flat:
        s += value
    return s


@numba.njit
def doubled(row, out):
    for j in range(row.size):
        out[j] = 2 * row[j]


@numba.njit
def small_only(x):
    if x >= 5:
        raise ValueError("too large", 7)
    return x


X = np.random.default_rng(0).random(1000)
R = np.random.default_rng(1).random((300, 4))


def expected_from(kernel, *items, dtype=None):
    return np.array([kernel(*one) for one in zip(*items, strict=True)], dtype)


class TestItems:
    def test_scalars_are_mapped_in_a_fused_loop(self, run):
        assert_same(map_items(root, X, **run), np.sqrt(X) + 1)
        report = last_report()
        assert report.items == 1000
        assert report.ranges == 1000
        assert run["backend"] in (None, report.backend)
        assert sum(worker.items for worker in report.workers) == 1000

    @pytest.mark.parametrize("chunksize", [1, 7, 10_000])
    def test_the_result_does_not_depend_on_the_chunksize(self, chunksize, run):
        assert_same(map_items(root, X, chunksize=chunksize, **run), np.sqrt(X) + 1)
        assert last_report().ranges == -(-1000 // chunksize)

    def test_rows_and_scalars_are_mapped_along_axes_of_their_own(self, run):
        @numba.njit
        def mixed(x, row, column):
            return x * row[1] + column.sum(), column[2]

        first, second = map_items(mixed, X[:300], R, R.T[::-1], axis=(0, 0, 1), **run)
        assert_same(second, R[:, 1].copy())
        assert np.allclose(first, X[:300] * R[:, 1] + R.sum(axis=1))

    @examples(25)
    @given(st.data())
    def test_arrays_of_any_layout_and_place_are_mapped(self, data):
        sample = data.draw(samples([np.dtype(d) for d in ("f8", "f4", "i2", "u8", "?", "c16")]))
        with sample.array() as array:
            axis = data.draw(axes_of(array))
            kernel = same if array.ndim == 1 else _corner
            items = np.moveaxis(np.asarray(array), axis, 0)
            chunksize = data.draw(chunksizes())
            if items.size == 0:
                return
            ordinary = items if array.ndim == 1 else items.reshape(len(items), -1)[:, -1]
            for backend, balance, n_jobs in RUNS[:3]:
                options = {"backend": backend, "balance": balance, "n_jobs": n_jobs}
                result = map_items(kernel, array, axis=axis, chunksize=chunksize, **options)
                assert result.dtype == array.dtype
                assert same_bits(result, ordinary.copy()), sample

    @pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16", "i1", "u2", "i4", "u8", "?"])
    def test_results_have_the_dtype_that_the_kernel_returns(self, dtype, run):
        values = (X * 100).astype(dtype)
        assert_same(map_items(same, values, **run), values)

    @pytest.mark.one_case
    @pytest.mark.parametrize("dtype", ["f4", "i2", "u8", "c8", "?"])
    def test_dtypes_are_the_same_in_processes_and_threads(self, dtype):
        values = np.arange(1, 6).astype(dtype)
        kernel = numba.njit(lambda x: (x, np.float32(3)))
        results = [map_items(kernel, values, n_jobs=2, backend=b) for b in ("loky", "threading")]
        assert_same(results[0], results[1])
        assert results[0][0].dtype == dtype

    def test_dates_are_mapped(self, run):
        days = np.arange("2020-01-01", "2020-03-01", dtype="M8[D]")
        days[3] = "NaT"
        assert_same(map_items(same, days, **run), days)

    def test_records_are_private_copies(self, run):
        @numba.njit
        def of_record(record):
            record.a = 5  # its own
            return record.b * 2 + record.a

        records = np.zeros(50, [("a", "f8"), ("b", "i4")])
        records["b"] = np.arange(50)
        assert_same(map_items(of_record, records, **run), np.arange(50) * 2.0 + 5)
        assert not records["a"].any()

    @pytest.mark.fault(33)
    def test_npy_files_are_mapped(self, run, tmp_path):
        path = str(tmp_path / "X.npy")
        np.save(path, X)
        assert_same(map_items(root, path, **run), np.sqrt(X) + 1)
        assert_same(map_items(root, load(path)[::-1], **run), np.sqrt(X[::-1]) + 1)

    def test_an_array_without_items_gives_an_empty_result(self, run):
        assert map_items(root, X[:0], **run).shape == (0,)


@numba.njit
def _corner(row):
    last = row.flat[0]
    for value in row.flat:
        last = value
    return last


class TestArguments:
    def test_kernels_get_scalars_arrays_and_keywords(self, run):
        @numba.njit
        def weighted(x, weights, power=1, shift=0.0):
            return (x * weights).sum() ** power + shift

        weights = np.arange(6.0)[::2]
        result = map_items(weighted, X, args=(weights,), kwargs={"shift": 2.0}, **run)
        assert_same(result, expected_from(lambda x: weighted(x, weights, 1, 2.0), X))
        result = map_items(weighted, X, args=(weights, 2), **run)
        assert_same(result, expected_from(lambda x: weighted(x, weights, 2), X))

    def test_arguments_that_do_not_fit_are_an_error_before_anything_runs(self, run):
        with pytest.raises(TypeError, match="unexpected keyword argument 'shfit'"):
            map_items(_add, X, kwargs={"shfit": 2.0}, **run)

    def test_arguments_stay_read_only_where_items_are_copies(self, run):
        @numba.njit
        def count(x, counter):
            counter[0] += 1
            return counter[0]

        for options in ({}, {"writable": True}):
            with pytest.raises(numba.TypingError, match="Cannot modify readonly") as caught:
                map_items(count, X, args=(np.zeros(3),), **options, **run)
            (note,) = caught.value.__notes__
            assert note.startswith("items, chunks and arrays in args are read-only; writable=True")

    def test_arguments_are_copied_where_a_signature_wants_to_write_to_them(self, run):
        kernel = numba.njit("float64(float64, float64[:])")(lambda x, w: x * w[1])
        assert_same(map_items(kernel, X, args=(np.arange(3.0),), **run), X)
        rows = numba.njit("float64(float64[:], float64[:])")(lambda row, w: (row * w).sum())
        assert_same(map_items(rows, R, args=(np.ones(R.shape[1]),), **run), R.sum(axis=1))
        assert_same(
            map_items(rows, R, args=(np.ones(R.shape[1]),), n_jobs=2, backend="loky"), R.sum(axis=1)
        )

    def test_arguments_after_the_output_row_are_passed_by_name(self, run):
        @numba.njit
        def fill(x, n, out, shift=0.0):
            out[:] = x * n + shift

        expected = np.stack([X * 3 + 1] * 2, 1)
        for func in (fill, fill.py_func):
            options = {"out_shape": 2, "args": (3,), "kwargs": {"shift": 1.0}}
            assert_same(map_items(func, X, **options, **run), expected)
            with pytest.raises(TypeError, match="multiple values"):
                map_items(func, X, out_shape=2, kwargs={"n": 3}, **run)

    def test_a_missing_argument_is_named(self, run):
        kernel = numba.njit(lambda x, y, out: None)
        with pytest.raises(
            TypeError, match=r"\(x, y, out\) cannot .* 1 mapped array, 1 of args .*out_shape"
        ):
            map_items(kernel, X, args=(1,), **run)

    def test_array_arguments_are_read_only(self, run):
        @numba.njit
        def spoil(x, weights):
            weights[0] = x
            return x

        with pytest.raises(numba.TypingError) as caught:
            map_items(spoil, X, args=(np.zeros(3),), **run)
        assert any("writable=True" in note for note in caught.value.__notes__)


@numba.njit
def _add(x, shift=1.0):
    return x + shift


class TestResults:
    def test_a_kernel_writes_its_result_into_the_output_row(self, run):
        assert_same(map_items(doubled, R, out_shape=4, **run), R * 2)
        result = map_items(doubled, R, out_shape=(4,), out_axis=-1, dtype="f4", **run)
        assert_same(result, (R * 2).astype("f4").T.copy())

    def test_a_python_function_writes_its_result_into_the_output_row(self, run):
        def python(row, out, factor=1):
            out[:] = row * factor

        result = map_items(python, R, out_shape=4, kwargs={"factor": 3}, **run)
        assert_same(result, R * 3)
        assert map_items(python, R[:0], out_shape=(4, 2), out_axis=1).shape == (4, 0, 2)

    def test_output_rows_are_written_in_processes(self):
        result = map_items(doubled, R, out_shape=4, backend="loky", n_jobs=2)
        assert_same(result, R * 2)

    def test_results_are_written_to_an_array_or_a_file(self, run, tmp_path):
        out = np.zeros(2000)[::2]
        assert map_items(root, X, out=out, **run) is out
        assert np.array_equal(out, np.sqrt(X) + 1)
        written = map_items(root, X, out=tmp_path / "Y.npy", **run)
        assert np.array_equal(written, np.sqrt(X) + 1)
        assert np.array_equal(np.load(tmp_path / "Y.npy"), np.sqrt(X) + 1)

    def test_results_are_cast_to_the_dtype_asked_for(self, run):
        assert_same(map_items(root, X, dtype="f4", **run), (np.sqrt(X) + 1).astype("f4"))
        with pytest.raises((TypeError, ValueError)):
            map_items(root, X, dtype="i4", **run)
        out = np.zeros(1000, ">f8")
        map_items(root, X, out=out, **run)
        assert np.array_equal(out, np.sqrt(X) + 1)

    def test_a_tuple_gives_several_results(self, run):
        @numba.njit
        def both(x):
            return x, np.float32(x), x > 0.5

        results = map_items(both, X, **run)
        assert_same(results, (X, X.astype("f4"), X > 0.5))

    def test_array_results_are_stacked(self, run):
        assert_same(map_items(_times_two, R, **run), R * 2)

    def test_out_axis_must_exist_and_be_one(self, run):
        with pytest.raises(np.exceptions.AxisError):
            map_items(root, X, out_axis=1, **run)
        with pytest.raises(ValueError, match="out_axis has 2 entries, func returned 1"):
            map_items(root, X, out_axis=(0, 0), **run)

    @pytest.mark.parametrize("shape", [-1, (2, -1), 2.5, "ab"])
    def test_a_bad_out_shape_is_refused(self, shape):
        with pytest.raises(TypeError, match="out_shape must be a tuple of lengths"):
            map_items(doubled, R, out_shape=shape)

    def test_an_output_row_has_one_dtype(self):
        with pytest.raises(TypeError, match="there is one result"):
            map_items(doubled, R, out_shape=4, dtype=("f8", "f8"))


@numba.njit
def _times_two(row):
    return row * 2


@numba.njit
def weighed(item):
    total = 0.0
    for value in item.flat:
        total = total * 3 + value
    item.flat[0] = -1
    return total


class TestKernels:
    """Compiled in every way."""

    @pytest.mark.fault(33)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"nogil": True},
            {"fastmath": True},
            {"error_model": "numpy"},
            {"boundscheck": True},
            {"inline": "always"},
        ],
        ids=str,
    )
    def test_kernels_compiled_with_options_are_mapped(self, options, run):
        kernel = numba.njit(**options)(lambda row, k: row[k] * 2)
        assert_same(map_items(kernel, R, args=(3,), **run), R[:, 3] * 2)

    @pytest.mark.parametrize("signature", ["f8(f8)", ["f4(f4)", "f8(f8)"]], ids=str)
    def test_kernels_with_signatures_of_scalars_are_mapped(self, signature, run):
        kernel = numba.njit(signature)(lambda x: x * 2)
        assert_same(map_items(kernel, X, **run), X * 2)
        assert last_report().notes == ()

    @pytest.mark.fault(33)
    @pytest.mark.parametrize("signature", ["f8(f8[:])", "f8(f8[::1])"])
    def test_kernels_with_writable_array_signatures_get_copies(self, signature, run):
        @numba.njit(signature)
        def spoil(row):
            row[0] += 1
            return row[0]

        before = R.copy()
        assert_same(map_items(spoil, R, **run), R[:, 0] + 1)
        assert np.array_equal(R, before)
        assert "private copies" in last_report().notes[0]

    def test_a_kernel_without_a_fitting_signature_is_an_error(self, run):
        kernel = numba.njit("i8(i8[:,:])")(lambda rows: rows[0, 0])
        with pytest.raises(numba.TypingError):
            map_items(kernel, R, **run)

    def test_writable_gives_private_copies(self, run):
        @numba.njit
        def spoil(row):
            row[0] += 1
            return row[0]

        before = R.copy()
        assert_same(map_items(spoil, R, writable=True, **run), R[:, 0] + 1)
        assert np.array_equal(R, before)
        with pytest.raises(numba.TypingError) as caught:
            map_items(spoil, R, **run)
        assert any("writable=True" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize("chunksize", [1, 3, 50])
    @pytest.mark.parametrize(
        ("X", "axis"),
        [
            (np.broadcast_to(np.arange(4.0)[:, None], (4, 10)), 1),
            (np.lib.stride_tricks.sliding_window_view(np.arange(13.0), 4).T, 1),
            (np.arange(120.0).reshape(10, 4, 3), 0),
            (np.asfortranarray(np.arange(120.0).reshape(10, 4, 3)), 0),
            (np.arange(120.0).reshape(3, 4, 10).T, 0),
            (np.arange(120.0).reshape(10, 4, 3).transpose(2, 1, 0), 2),
            (np.arange(240.0).reshape(10, 8, 3)[:, ::-2], 0),
            (np.arange(120.0).reshape(4, 10, 3), 1),
        ],
        ids=range(8),
    )
    def test_private_copies_are_right_for_any_layout(self, X, axis, chunksize, run):
        items = np.moveaxis(X, axis, 0)
        expected = expected_from(weighed.py_func, [one.copy() for one in items])
        options = {"axis": axis, "chunksize": chunksize, "writable": True, **run}
        assert_same(map_items(weighed, X, **options), expected)

    def test_bounds_are_checked_if_the_kernel_says_so(self, run):
        kernel = numba.njit(boundscheck=True)(lambda row, k: row[k])
        with pytest.raises(IndexError, match="out of bounds"):
            map_items(kernel, R, args=(9,), **run)

    def test_inlined_kernels_keep_their_options(self, run):
        checked = numba.njit(inline="always", boundscheck=True)(lambda k: np.zeros(3)[k])
        with pytest.raises(IndexError, match="out of bounds"):
            map_items(checked, np.array([7, 7]), **run)
        divided = numba.njit(inline="always")(lambda a, b: a // b)
        with pytest.raises(ZeroDivisionError) as caught:
            map_items(divided, np.array([5, 5]), np.array([1, 0]), **run)
        assert caught.value.__notes__[0] == "func failed on item 1"
        numpy_like = numba.njit(inline="always", error_model="numpy")(lambda a: 1 / a)
        assert_same(map_items(numpy_like, np.zeros(2), **run), np.full(2, np.inf))

    def test_kernels_may_keep_their_rows_in_typed_lists(self):
        rows = numba.types.Array(numba.float64, 1, "C", readonly=True)
        kept = numba.typed.List.empty_list(rows)

        @numba.njit
        def keep(row, kept):
            kept.append(row)
            return row[0]

        @numba.njit
        def add_up(kept):
            total = 0.0
            for row in kept:
                total += row.sum()
            return total

        # In the caller: numba's lists are not for several threads.
        map_items(keep, np.ones((3, 100_000)), args=(kept,), n_jobs=1)
        assert add_up(kept) == 300_000

    def test_kernels_that_run_python_code_may_keep_their_rows(self, run):
        kept = []

        @numba.njit
        def keep(row):
            with numba.objmode():
                kept.append(row)
            return row[0]

        map_items(keep, np.arange(4.0).repeat(50_000).reshape(4, -1), **run)
        assert sorted(row[7] for row in kept) == [0, 1, 2, 3]

    def test_kernels_whose_helpers_run_python_code_may_keep_their_rows(self, run):
        kept = []

        @numba.njit
        def helper(row):
            with numba.objmode():
                kept.append(row)
            return row[0]

        kernel = numba.njit(lambda row: helper(row) + 1)
        map_items(kernel, np.arange(4.0).repeat(50_000).reshape(4, -1), **run)
        gc.collect()
        assert sorted(row[7] for row in kept) == [0, 1, 2, 3]

    @pytest.mark.parametrize("cached", [False, True])
    @pytest.mark.parametrize("on_error", ["raise", "collect"])
    def test_kernels_may_raise_exceptions_that_hold_their_row(
        self, on_error, cached, run, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
        (tmp_path / "kernels.py").write_text(RAISES_WITH_ROW)
        code = compile(RAISES_WITH_ROW, str(tmp_path / "kernels.py"), "exec")
        for _ in range(2):  # the second time, a cached one is read from its file
            exec(code, namespace := {"numba": numba, "cached": cached})
            rows = np.arange(6.0).repeat(50_000).reshape(6, -1)
            if on_error == "raise":
                with pytest.raises(ValueError, match="too large") as caught:
                    map_items(namespace["kernel"], rows, args=(np.full(50_000, 8.0),), **run)
                errors = [caught.value]
            else:
                options = {"args": (np.full(50_000, 8.0),), "on_error": on_error, **run}
                result, failures = map_items(namespace["kernel"], rows, **options)
                assert_same(result, np.array([0.0, 1, 2, np.nan, np.nan, np.nan]))
                errors = [failed.error for failed in failures]
                assert [error.args[1][0] for error in errors] == [3, 4, 5]
            del rows
            gc.collect()
            others = [np.full(50_000, 99.0) for _ in range(20)]  # where the rows were
            for error in errors:
                _, row, argument = error.args
                assert row.shape == argument.shape == (50_000,)
                assert np.all(row == row[0])
                assert 3 <= row[0] <= 5
                assert np.all(argument == 8)
            del others

    def test_a_recompiled_kernel_gets_a_new_loop(self, run):
        namespace = {"K": 2.0}
        exec("def scaled(x):\n    return x * K", namespace)
        kernel = numba.njit(namespace["scaled"])
        for factor in (2.0, 5.0, 7.0):
            namespace["K"] = factor
            kernel.recompile()
            assert_same(map_items(kernel, X, **run), X * factor)
            assert_same(map_array(lambda c: c, map_items(kernel, X, **run)), X * factor)

    @pytest.mark.thorough
    def test_kernels_compiled_for_literal_values_are_mapped(self, run):
        kernel = numba.njit(lambda x, n: numba.literally(n) * x)
        assert_same(map_items(kernel, X, args=(3,), **run), X * 3)
        (note,) = last_report().notes
        assert "numba compiles it for values of its arguments" in note

    @pytest.mark.parametrize("dtype", ["i4", "f8"])
    def test_kernels_whose_signatures_would_convert_items_are_called_from_python(self, dtype, run):
        kernel = numba.njit("f8(f8)")(lambda x: x / 2)
        values = np.arange(-3, 40).astype(dtype)
        assert_same(map_items(kernel, values, **run), values / 2)
        notes = " ".join(last_report().notes)
        assert ("its signatures take other numbers than it is given" in notes) == (dtype == "i4")

    @pytest.mark.parametrize(
        ("signature", "error"),
        [("u8(u8)", OverflowError), (["u1(u1)", "u2(u2)"], TypeError)],
        ids=["one", "several"],
    )
    def test_numbers_that_do_not_fit_a_signature_are_refused(self, signature, error, run):
        kernel = numba.njit(signature)(lambda x: x * 2)
        with pytest.raises(error, match=r"negative|Ambiguous"):
            map_items(kernel, np.arange(-3, 3), **run)

    def test_rows_of_records_are_private_copies(self, run):
        @numba.njit
        def spoil(row):
            row[0].a = 50
            return row[0].a

        records = np.zeros((6, 2), [("a", "i4"), ("b", "f8")])
        assert_same(map_items(spoil, records, **run), np.full(6, 50, "i4"))
        assert records["a"].max() == 0
        assert any("private copies" in note for note in last_report().notes)

    @pytest.mark.parametrize("out_axis", [0, 1])
    def test_output_rows_that_must_be_contiguous_are_written_along_any_axis(self, out_axis, run):
        @numba.njit("void(float64, float64[::1])")
        def powers(x, out):
            for j in range(3):
                out[j] = x**j

        expected = np.stack([X**0, X, X**2], 1 - out_axis)
        options = {"out_shape": 3, "out_axis": out_axis, **run}
        assert_same(map_items(powers, X, **options), expected)
        out = np.zeros((*expected.shape, 2))[..., 0]
        map_items(powers, X, out=out, **options)
        assert np.array_equal(out, expected)

    def test_output_rows_of_another_byte_order_are_written(self, run):
        kernel = numba.njit(lambda x, out: out.fill(x))
        out = np.zeros((len(X), 2), ">f8")
        map_items(kernel, X, out_shape=2, out=out, **run)
        assert np.array_equal(out, np.stack([X, X], 1))

    @pytest.mark.fault(33)
    def test_kernels_that_refer_to_parallel_ones_run_in_the_caller(self):
        parallel = numba.njit(parallel=True)(lambda n: np.ones(int(n)).sum())
        kernel = numba.njit(lambda n: parallel(n) + 1)
        assert_same(map_items(kernel, np.full(5, 300.0), n_jobs=2), np.full(5, 301.0))
        assert "parallel=True" in last_report().reason

    def test_kernels_from_the_cache_on_disk_are_mapped(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
        kernel = numba.njit(cache=True)(_plain)
        assert_same(map_items(kernel, X, **run), X * 3)

    @pytest.mark.fault(33)
    def test_kernels_are_compiled_once(self):
        kernel = numba.njit(lambda x: x * 5)
        map_items(kernel, X, n_jobs=2, backend="threading")
        assert last_report().compiling > 0
        for balance in ("static", "dynamic"):
            run = {"n_jobs": 2, "backend": "threading", "balance": balance}
            assert_same(map_items(kernel, X, **run), X * 5)
        (found,) = compiler._get_cache(kernel).results.values()
        assert len(found.loops) == 1
        assert len(kernel.signatures) == 1

    def test_several_threads_can_map_a_new_kernel_at_once(self):
        kernel = numba.njit(lambda x: x * 6)
        with ThreadPoolExecutor(8) as pool:
            results = list(
                pool.map(lambda _: map_items(kernel, X, n_jobs=2, backend="threading"), range(8))
            )
        for result in results:
            assert_same(result, X * 6)
        assert len(kernel.signatures) == 1

    def test_objects_are_mapped_one_by_one(self, run):
        objects = np.array([1, None, "a", 2.5], dtype=object)
        assert map_items(same, objects, **run).tolist() == [1, None, "a", 2.5]

    @pytest.mark.parametrize("dtype", [">f8", "g"])
    def test_items_of_dtypes_that_numba_does_not_know_are_an_error(self, dtype, run):
        # A scalar of these is a float for numba, an array is not.
        with pytest.raises((TypeError, numba.TypingError)):
            map_items(total, R.astype(dtype), **run)


def _plain(x):
    return x * 3


class TestErrors:
    @pytest.mark.fault(33)
    def test_an_error_names_its_item(self, run):
        values = np.arange(10.0)
        with pytest.raises(ValueError, match="too large") as caught:
            map_items(small_only, values, chunksize=3, **run)
        error = caught.value
        assert error.args == ("too large", 7)
        # The first bad item of a range; which range depends on which worker was first.
        item = int(error.__notes__[0].removeprefix("func failed on item "))
        assert item in {1: {5}, 2: {5, 6}, 3: {5, 6, 9}}[run["n_jobs"]]
        assert "while mapping axis 0, items" in error.__notes__[1]

    @pytest.mark.parametrize("chunksize", [1, 4, 100])
    def test_errors_are_collected_by_item(self, chunksize, run):
        values = np.random.default_rng(0).permutation(60) / 6
        result, failures = map_items(
            small_only, values, chunksize=chunksize, on_error="collect", **run
        )
        bad = np.flatnonzero(values >= 5)
        assert [failure[:2] for failure in failures] == [(i, i + 1) for i in bad]
        assert all(failure.error.args == ("too large", 7) for failure in failures)
        assert np.isnan(result[bad]).all()
        good = np.setdiff1d(np.arange(60), bad)
        assert np.array_equal(result[good], values[good])
        report = last_report()
        assert report.items == 60
        assert report.ranges == -(-60 // chunksize)

    def test_failed_items_are_filled(self, run):
        values = np.arange(10)
        with pytest.raises(TypeError, match="pass fill_value="):
            map_items(small_only, values, on_error="fill", **run)
        result = map_items(small_only, values, on_error="fill", fill_value=-1, **run)
        assert_same(result, np.array([0, 1, 2, 3, 4, -1, -1, -1, -1, -1]))
        cast = map_items(small_only, values, on_error="fill", fill_value=-1, dtype="i1", **run)
        assert_same(cast, np.array([0, 1, 2, 3, 4, -1, -1, -1, -1, -1], "i1"))

    def test_failed_items_are_filled_in_the_caller(self):
        result = map_items(small_only, np.arange(10), on_error="fill", fill_value=-1, n_jobs=1)
        assert_same(result, np.array([0, 1, 2, 3, 4, -1, -1, -1, -1, -1]))

    def test_errors_of_all_items_are_collected(self, run):
        X = np.full(9, 9.0)
        result, failures = map_items(small_only, X, on_error="collect", **run)
        assert len(failures) == 9
        assert result is None
        with pytest.raises(ValueError, match="too large") as caught:
            map_items(small_only, X, on_error="fill", **run)
        assert "every item failed" in caught.value.__notes__[-1]

    def test_an_error_stops_the_other_threads(self):
        @numba.njit
        def slow_or_bad(x):
            if x < 0:
                raise ValueError("bad")
            s = 0.0
            for i in range(200_000):
                s += np.sqrt(x + i)
            return s

        values = np.ones(60_000)
        values[0] = -1
        map_items(slow_or_bad, values[1:3], n_jobs=2, backend="threading")  # compiled
        with pytest.raises(ValueError, match="bad"):
            map_items(slow_or_bad, values, n_jobs=2, backend="threading", chunksize=30_000)
        assert sum(worker.items for worker in last_report().workers) == 0


class TestTogether:
    def test_several_threads_can_map_at_once(self):
        def one(number):
            return map_items(root, X + number, n_jobs=2, backend="threading", balance="dynamic")

        with ThreadPoolExecutor(4) as pool:
            for number, result in enumerate(pool.map(one, range(8))):
                assert_same(result, np.sqrt(X + number) + 1)

    def test_every_item_is_computed_once(self):
        counts = np.zeros(200_000, np.int64)

        @numba.njit
        def count(i, counts_):
            return counts_[i] + 1

        result = map_items(
            count,
            np.arange(200_000),
            args=(counts,),
            chunksize=1,
            n_jobs=3,
            backend="threading",
            balance="dynamic",
        )
        assert_same(result, counts + 1)
        assert last_report().ranges == 200_000
        assert sum(worker.ranges for worker in last_report().workers) == 200_000

    @pytest.mark.parametrize("backend", [None, "threading"])
    def test_a_bar_shows_the_items(self, backend, capsys):
        mapper = DynamicParallelMapper(n_jobs=2, backend=backend, verbosity=1)
        assert_same(mapper.map_items(root, X), np.sqrt(X) + 1)
        assert "1000/1000" in capsys.readouterr().err

    def test_a_map_of_a_kernel_inside_a_worker_is_serial(self):
        def outer(chunk):
            return map_items(root, chunk)

        assert_same(map_array(outer, X, n_jobs=2, backend="threading"), np.sqrt(X) + 1)

    @pytest.mark.fault(19)
    def test_a_forked_child_maps_while_its_parent_compiles(self):
        map_items(root, X, n_jobs=2, backend="threading")
        with compiler._compile_lock:
            child = os.fork()
            if child == 0:
                found = map_items(root, X, n_jobs=2, backend="threading")
                same = np.array_equal(found, np.sqrt(X) + 1)
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_a_chunksize_beyond_every_array_is_allowed(self, run):
        assert_same(map_items(root, X, chunksize=1 << 63, **run), np.sqrt(X) + 1)

    def test_an_interrupt_ends_fused_loops(self):
        @numba.njit
        def long(x):
            s = 0.0
            for i in range(2_000_000):
                s += np.sqrt(x + i)
            return s

        map_items(long, X[:2], n_jobs=2, backend="threading")  # compiled
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

        def go():
            interrupt.start()
            map_items(long, np.ones(100_000), n_jobs=2, backend="threading")

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
        try:
            with pytest.raises(KeyboardInterrupt):
                go()
        finally:
            signal.signal(signal.SIGINT, before)
        interrupt.join()
        assert_same(map_items(root, X, n_jobs=2, backend="threading"), np.sqrt(X) + 1)


class TestByteOrder:
    """Compiled code takes only the byte order of this machine; numba misreads other dates."""

    DATES = np.array(["2020-01-01", "NaT", "2021-05-05T01:02:03"], ">M8[s]")

    @pytest.fixture(
        params=[
            *[pytest.param(run, marks=pytest.mark.thorough) for run in (*RUNS[:2], RUNS[3])],
            RUNS[2],
            ("loky", "static", 2),
        ],
        ids=lambda run: f"{run[0]}-{run[1]}",
    )
    def run(self, request):
        backend, balance, n_jobs = request.param
        return {"backend": backend, "balance": balance, "n_jobs": n_jobs}

    @pytest.mark.one_case
    @pytest.mark.parametrize("dtype", [">M8[s]", ">m8[us]", ">f8", ">i4"])
    def test_items_of_another_byte_order_are_converted(self, dtype, run):
        values = self.DATES.astype(dtype) if dtype[1] == "M" else np.arange(3).astype(dtype)
        native = values.astype(values.dtype.newbyteorder("="))
        assert_same(map_items(same, values, **run), native)
        out = np.empty(3, dtype)
        assert_same(map_items(same, values, out=out, **run), values)
        assert_same(map_items(same, native, dtype=dtype, **run), values)

    @pytest.mark.parametrize("dtype", [">f8", ">M8[s]", ">i2", ">c16"])
    @pytest.mark.parametrize("jitted", [False, True])
    def test_output_rows_of_another_byte_order_are_filled(self, jitted, dtype, run):
        values = np.arange(3).astype(dtype)
        native = values.astype(values.dtype.newbyteorder("="))

        def fill(value, row):
            row[:] = value

        kernel = numba.njit(fill) if jitted else fill
        result = map_items(kernel, native, out_shape=(2,), dtype=dtype, **run)
        assert_same(result, np.stack([values, values], axis=1).astype(dtype))

    @pytest.mark.parametrize(
        "values", [DATES, np.arange(3).astype(">f8"), np.zeros(3, [("a", ">M8[s]"), ("b", "f8")])]
    )
    def test_chunks_and_arguments_of_another_byte_order_are_refused(self, values, run):
        with pytest.raises(TypeError, match="another byte order than this machine"):
            map_array(same, values, **run)
        first = numba.njit(lambda x, values: x + 1)
        with pytest.raises(TypeError, match="another byte order than this machine"):
            map_items(first, X, args=(values,), **run)

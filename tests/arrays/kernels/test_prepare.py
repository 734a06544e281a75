"""Functions that numba has compiled, called with chunks: without the GIL, compiled beforehand."""

import operator
import os
import sys
import textwrap
import threading
from pathlib import Path

import numba
import numpy as np
import pytest

from taskcarrier import last_report, map_array, map_chunks, map_items, reduce_array
from taskcarrier.arrays.kernels import compiler
from taskcarrier.arrays.kernels.intrinsics import load
from tests.strategies import assert_same, keep_pools_warm, run_script, start_script

pytestmark = pytest.mark.one_case  # each compiles

X = np.random.default_rng(0).random((1000, 3))
RUNS = [
    {"backend": "sequential", "n_jobs": 1},
    {"backend": "threading", "n_jobs": 2},
    {"backend": "threading", "n_jobs": 3, "balance": "dynamic"},
    {"backend": "loky", "n_jobs": 2},
]


pools = keep_pools_warm(2, 3)


@pytest.fixture(
    params=[*[pytest.param(run, marks=pytest.mark.thorough) for run in RUNS[:2]], *RUNS[2:]],
    ids=str,
)
def run(request):
    return request.param


@numba.njit
def doubled(chunk):
    return chunk * 2


@numba.njit
def named(x, row):
    row[0] = "ab" if x > 1 else "c"


@numba.njit
def names(chunk):
    out = np.empty(len(chunk), "U2")
    for i in range(len(chunk)):
        out[i] = "ab" if chunk[i] > 1 else "c"
    return out


class TestTexts:
    """Kernels that fill arrays of strings."""

    @pytest.mark.thorough
    def test_kernels_that_return_strings_map_chunks(self, run):
        assert_same(map_array(names, np.arange(4.0), **run), np.array(["c", "c", "ab", "ab"]))

    def test_kernels_that_fill_strings_map_items(self, run):
        result = map_items(named, np.arange(4.0), out_shape=(1,), dtype="U2", **run)
        assert_same(result, np.array([["c"], ["c"], ["ab"], ["ab"]]))


class TestChunks:
    @pytest.mark.fault(33)
    @pytest.mark.parametrize("nogil", [False, True])
    def test_jitted_functions_map_chunks(self, nogil, run):
        kernel = numba.njit(nogil=nogil)(lambda c, a, b=1.0: c * a + b)
        result = map_array(kernel, X[:, ::-1], args=(2.0,), kwargs={"b": 3.0}, **run)
        assert_same(result, X[:, ::-1] * 2 + 3)
        report = last_report()
        assert report.backend == run["backend"]

    @pytest.mark.parametrize("verb", [map_array, map_items])
    def test_kernels_run_without_the_gil(self, verb):
        # Each range ends when another thread of the interpreter has had its turn.
        @numba.njit
        def waiting(values, address):
            while load(address) == 0:
                pass
            return values * 2

        flag = np.ones(1, np.int64)
        address = flag.ctypes.data
        run = {"args": (address,), "n_jobs": 2, "backend": "threading"}
        verb(waiting, X[:, 0], **run)  # compiled
        flag[0] = 0
        timer = threading.Timer(0.2, flag.fill, (1,))
        timer.start()
        assert_same(verb(waiting, X[:, 0], **run), X[:, 0] * 2)
        timer.join()

    def test_kernels_can_be_reduced_and_map_to_chunks(self, run):
        total = numba.njit(lambda c: c.sum())
        assert np.isclose(reduce_array(total, X, combine=operator.add, **run), X.sum())
        results = {reduce_array(total, X, combine=operator.add, **each) for each in RUNS}
        assert len(results) == 1
        assert len(map_chunks(total, X, chunksize=100, **run)) == 10

    def test_kernels_get_chunks_with_neighbours(self, run):
        kernel = numba.njit(lambda c: c[:, ::-1] * 1.0)
        assert_same(map_array(kernel, X, depth=2, boundary="wrap", **run), X[:, ::-1].copy())

    @pytest.mark.fault(33)
    @pytest.mark.parametrize("signature", ["f8[:,:](f8[:,:])", "f8[:,::1](f8[:,::1])"])
    def test_kernels_whose_signatures_write_get_copies(self, signature, run):
        @numba.njit(signature)
        def spoil(chunk):
            chunk[0, 0] = 7
            return chunk * 2

        before = X.copy()
        expected = X * 2
        expected[::100, 0] = 14
        assert_same(map_array(spoil, X, chunksize=100, **run), expected)
        assert np.array_equal(X, before)
        assert any("private copies" in note for note in last_report().notes)

    @pytest.mark.thorough
    def test_kernels_whose_signatures_write_get_copies_of_arguments(self, run):
        kernel = numba.njit("float64[:](float64[:, :], float64[:])")(
            lambda c, w: (c * w).sum(axis=1)
        )
        weights = np.arange(3.0)
        assert_same(map_array(kernel, X, args=(weights,), **run), (X * weights).sum(axis=1))

    def test_writing_to_a_read_only_chunk_is_an_error_with_the_remedy(self, run):
        @numba.njit
        def spoil(chunk):
            chunk[0, 0] = 7
            return chunk

        with pytest.raises(numba.TypingError) as caught:
            map_array(spoil, X, **run)
        assert any("writable=True" in note for note in caught.value.__notes__)

    @pytest.mark.fault(33)
    def test_an_error_of_a_kernel_names_its_range(self, run):
        @numba.njit
        def odd(chunk):
            if chunk[0, 0] == X_500:
                raise ValueError("here", 3)
            return chunk

        with pytest.raises(ValueError, match="here") as caught:
            map_array(odd, X, chunksize=100, **run)
        assert caught.value.args == ("here", 3)
        assert "items 500:600" in "".join(caught.value.__notes__)

    @pytest.mark.parametrize(
        ("kernel", "words"),
        [
            (numba.njit(lambda c, n: numba.literally(n) * c), "values of its arguments"),
            (numba.njit("f8[:,:](f8[:,:], f8)")(lambda c, n: n * c), "other numbers than"),
        ],
        ids=["literal", "converting"],
    )
    def test_the_report_says_why_a_kernel_is_called_from_python(self, kernel, words, run):
        assert_same(map_array(kernel, X, args=(3,), **run), X * 3)
        is_noted = any(words in note for note in last_report().notes)
        assert is_noted == (run["backend"] != "loky")  # there every kernel is

    def test_kernels_in_object_mode_run_in_processes(self):
        with np.errstate(all="ignore"):
            kernel = numba.jit(forceobj=True)(_python)
        assert_same(map_array(kernel, X, n_jobs=2), X + 1)
        assert last_report().backend == "loky"

    @pytest.mark.fault(33)
    def test_kernels_are_compiled_once_before_they_run(self):
        kernel = numba.njit(lambda c: c - 1)
        map_array(kernel, X, n_jobs=2, backend="threading")
        assert last_report().compiling > 0
        assert "of compiling" in str(last_report())
        map_array(kernel, X, n_jobs=2, backend="threading", balance="dynamic")
        (called,) = compiler._get_cache(kernel).wrappers.values()
        assert len(called.signatures) == 1
        assert len(kernel.signatures) == 1


X_500 = X[500, 0]


def _python(chunk):
    return chunk + 1


def _largest(x, out):
    out[0] = x.max()


class TestUfuncs:
    def test_vectorized_functions_map_chunks(self, run):
        dynamic = numba.vectorize(_add)
        fixed = numba.vectorize(["f8(f8,f8)"])(_add)
        for func in (dynamic, fixed):
            assert_same(map_array(func, X, X[:, ::-1].copy(), **run), X + X[:, ::-1] + 1)
            assert last_report().backend == run.get("backend", "threading")

    def test_ufuncs_never_get_empty_core_axes(self, run):
        largest = numba.guvectorize(["void(float64[:], float64[:])"], "(n)->()")(_largest)
        assert reduce_array(largest, X[:, 0], combine=max, **run) == X[:, 0].max()

    def test_ufuncs_take_arguments_of_the_length_of_a_chunk(self, run):
        added = numba.vectorize(lambda x, y: x + y)
        options = {"args": (X[:, 0].copy(),), "chunksize": len(X)}
        assert_same(map_array(added, X[:, 0], **options, **run), X[:, 0] * 2)

    def test_generalized_ufuncs_map_chunks(self, run):
        func = numba.guvectorize(["void(f8[:],f8[:])"], "(n)->()")(_row_sum)
        assert_same(map_array(func, X, **run), func(X))
        assert last_report().backend == run.get("backend", "threading")

    def test_ufuncs_map_items(self, run):
        func = numba.vectorize(_add)
        assert_same(map_items(func, X[:, 0], X[:, 1], **run), X[:, 0] + X[:, 1] + 1)


def test_ufuncs_are_compiled_before_threads_call_them():
    added = numba.vectorize(_add)
    run = {"n_jobs": 2, "backend": "threading", "chunksize": 4}
    assert_same(map_array(added, X, X, **run), X + X + 1)
    assert_same(map_array(added, X[:, 0], args=(1.0,), **run), X[:, 0] + 2)


def _add(x, y):
    return x + y + 1


def _row_sum(row, out):
    out[0] = row.sum()


class TestDocumentedExample:
    """The kernel of numba's page about threads: the result first, with a signature."""

    def test_the_documented_kernel_runs_inside_a_function_of_a_chunk(self):
        @numba.njit("void(double[:],double[:],double[:])", nogil=True)
        def inner(result, a, b):
            for i in range(len(result)):
                result[i] = np.exp(2.1 * a[i] + 3.2 * b[i])

        def func(a, b):
            result = np.empty_like(a)
            inner(result, a, b)
            return result

        a, b = X[:, 0].copy(), X[:, 1].copy()
        expected = np.empty_like(a)
        inner(expected, a, b)
        result = map_array(func, a, b, n_jobs=2, backend="threading", writable=True)
        assert_same(result, expected)
        with pytest.raises(TypeError) as caught:
            map_array(func, a, b, n_jobs=2, backend="threading")
        assert any("writable=True" in note for note in caught.value.__notes__)


PARALLEL = """
import operator, sys, threading
import numba, numpy as np
from concurrent.futures import ThreadPoolExecutor
from taskcarrier import last_report, map_array, map_items, reduce_array

X = np.random.default_rng(0).random(20_000)


@numba.njit(parallel=True)
def spread(chunk):
    out = np.empty_like(chunk)
    for i in numba.prange(len(chunk)):
        out[i] = 2 * chunk[i]
    return out


@numba.njit
def root(x):
    return np.sqrt(x)


assert np.array_equal(spread(X), 2 * X)
assert numba.threading_layer() == sys.argv[1], numba.threading_layer()
for backend in (None, "threading", "sequential"):
    assert np.array_equal(map_array(spread, X, backend=backend, n_jobs=2), 2 * X)
    assert last_report().n_jobs == 1
    assert "parallel=True" in last_report().reason or backend == "sequential"
threads = {"backend": "threading", "n_jobs": 2}
assert np.array_equal(map_items(root, X, **threads), np.sqrt(X))
assert np.array_equal(map_array(spread, X, backend="loky", n_jobs=2), 2 * X)
with ThreadPoolExecutor(4) as pool:
    for result in pool.map(lambda _: map_items(root, X, balance="dynamic", **threads), range(8)):
        assert np.array_equal(result, np.sqrt(X))
assert np.array_equal(spread(X), 2 * X)
print("done")
"""


@pytest.mark.fault(33)
@pytest.mark.thorough
@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_results_are_right_under_every_threading_layer(layer, tmp_path):
    library = Path(sys.prefix) / "lib"
    if layer == "tbb" and not list(library.glob("libtbb.so*")):
        pytest.skip("TBB is not installed (extra: optional)")
    environment = {"NUMBA_THREADING_LAYER": layer, "LD_LIBRARY_PATH": str(library)}
    assert run_script(tmp_path, PARALLEL, layer, **environment).strip() == "done"


CACHED = """
import sys
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from taskcarrier import map_array, map_items
from cached_kernels import of_chunk, of_item

X = np.arange(5000.0)


def both(_):
    run = {"backend": "threading", "n_jobs": 2}
    return map_items(of_item, X, **run), map_array(of_chunk, X, **run)


with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    for items, chunks in pool.map(both, range(int(sys.argv[1]))):
        assert np.array_equal(items, X * 3) and np.array_equal(chunks, X * 5)
print("done")
"""


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("n_processes", "n_threads"), [(1, 8), pytest.param(8, 1, marks=pytest.mark.thorough)]
)
def test_many_processes_and_threads_may_compile_a_cached_kernel_at_once(
    n_processes, n_threads, tmp_path
):
    (tmp_path / "cached_kernels.py").write_text(
        textwrap.dedent(
            """
            import numba

            @numba.njit(cache=True)
            def of_item(x):
                return x * 3

            @numba.njit(cache=True)
            def of_chunk(chunk):
                return chunk * 5
            """
        ),
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    folders = [tmp_path / str(number) for number in range(n_processes)]
    for folder in folders:
        folder.mkdir()
    processes = [
        start_script(folder, CACHED, str(n_threads), PYTHONPATH=path) for folder in folders
    ]
    ends = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert ends == [("done\n", "", 0)] * n_processes


def test_everything_but_kernels_works_without_numba(tmp_path):
    code = """
    import sys
    sys.modules["numba"] = None  # as if its import failed
    import numpy as np
    from taskcarrier import StaticParallelMapper, map_array, map_items, reduce_array
    X = np.arange(100.0)
    for backend in ("loky", "threading", "sequential"):
        assert np.array_equal(map_array(np.sqrt, X, backend=backend, n_jobs=2), np.sqrt(X))
        assert np.array_equal(map_items(lambda x: x + 1, X, backend=backend, n_jobs=2), X + 1)
        assert StaticParallelMapper(2, backend=backend)(abs, [-1, 2]) == [1, 2]
    print("done")
    """
    assert run_script(tmp_path, textwrap.dedent(code)).strip() == "done"

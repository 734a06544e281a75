"""Compiled parts: atomic claims, arrays from addresses, results of kernels."""

import gc
import threading
import weakref

import numba
import numpy as np
import pytest

from taskcarrier import map_array, map_items, shutdown
from taskcarrier.arrays.kernels import compiler
from taskcarrier.arrays.kernels.compiler import ArrayLayout, ExtraArgs


@numba.njit(nogil=True)
def claim(address, counts):
    while True:
        number = compiler._take(address)
        if number >= len(counts):
            return
        counts[number] += 1


def test_threads_take_each_number_once():
    for _ in range(5):
        word = np.zeros(1, np.int64)
        counts = np.zeros(200_000, np.int64)
        threads = [
            threading.Thread(target=claim, args=(word.ctypes.data, counts)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (counts == 1).all()
        assert word[0] == len(counts) + 4


def test_compiled_code_reads_and_writes_words():
    @numba.njit
    def swapped(first, second):
        one, other = compiler._load(first), compiler._load(second)
        compiler._store(first, other)
        compiler._store(second, one)

    words = np.array([-5, 1 << 62])
    swapped(words.ctypes.data, words.ctypes.data + 8)
    assert words.tolist() == [1 << 62, -5]


class TestArrayLayout:
    def test_the_layout_of_items_drops_the_mapped_axis(self):
        X = np.zeros((5, 4, 3), "f4")
        assert ArrayLayout.of(X, 0) == ArrayLayout(np.dtype("f4"), 2, "C", True)
        assert ArrayLayout.of(X, 2) == ArrayLayout(np.dtype("f4"), 2, "A", True)
        assert ArrayLayout.of(X.T, 2) == ArrayLayout(np.dtype("f4"), 2, "F", True)
        assert ArrayLayout.of(X.T, 0) == ArrayLayout(np.dtype("f4"), 2, "A", True)
        assert ArrayLayout.of(X[:, ::-1], 0).layout == "A"

    def test_the_layout_of_scalars_keeps_alignment(self):
        X = np.zeros(6)
        assert ArrayLayout.of(X, 0) == ArrayLayout(np.dtype("f8"), 0, "C", True)
        assert ArrayLayout.of(X[::2], 0).layout == "A"
        unaligned = np.frombuffer(b"x" * 17, np.uint8)[1:].view("f8")
        assert ArrayLayout.of(unaligned, 0).aligned is False

    def test_a_layout_knows_the_numba_type_of_an_item(self):
        layout = ArrayLayout.of(np.zeros((2, 3)), 0)
        assert str(layout.item(writable=False)) == "readonly array(float64, 1d, C)"
        assert str(layout.item(writable=True)) == "array(float64, 1d, C)"
        assert layout.item(writable=False).mutable is False
        assert ArrayLayout.of(np.zeros(3, "i2"), 0).item(writable=False) == numba.int16


class TestBindArguments:
    @staticmethod
    def kernel():
        return numba.njit(lambda x, y, a, b=2, c=3: x + y + a + b + c)

    def test_positional_arguments_are_bound_as_given(self):
        assert compiler.bind_arguments(self.kernel(), 2, (5,), {}) == ExtraArgs((5,))

    def test_keywords_are_bound_to_their_positions(self):
        assert compiler.bind_arguments(self.kernel(), 2, (), {"c": 1, "a": 5}) == ExtraArgs(
            (), (5, 2, 1)
        )
        assert compiler.bind_arguments(self.kernel(), 2, (5,), {"c": 1}) == ExtraArgs((5,), (2, 1))

    @pytest.mark.parametrize("kwargs", [{"d": 1}, {"x": 1}])
    def test_unknown_keywords_are_errors(self, kwargs):
        with pytest.raises(TypeError):
            compiler.bind_arguments(self.kernel(), 2, (5,), kwargs)

    def test_the_output_row_follows_the_positional_arguments(self):
        kernel = numba.njit(lambda x, a, out, b=1, c=2: None)
        assert compiler.bind_arguments(kernel, 1, (5,), {"c": 3}, fills=True) == ExtraArgs(
            (5,), (1, 3)
        )
        kernel = numba.njit(lambda x, a, out: None)
        with pytest.raises(TypeError, match=r"\(x, a, out\) .* the row to fill, a= \(mult"):
            compiler.bind_arguments(kernel, 1, (), {"a": 5}, fills=True)

    def test_a_kernel_may_take_any_number_of_arguments(self):
        kernel = numba.njit(lambda x, y=1.0, *rest: x)
        assert compiler.bind_arguments(kernel, 1, (), {"y": 2.0}) == ExtraArgs((), (2.0,))
        assert compiler.bind_arguments(kernel, 1, (1.0, 2, 3), {}) == ExtraArgs((1.0, 2, 3))


class TestInferResult:
    LAYOUTS = (ArrayLayout(np.dtype("f8"), 0, "C", True),)

    def returned(self, func, *extras, layouts=LAYOUTS):
        kernel = numba.njit(func)
        return compiler.infer_result(kernel, layouts, ExtraArgs(extras), None, writable=False)

    @pytest.mark.parametrize(
        ("func", "dtypes"),
        [
            (lambda x: x, ["f8"]),
            (lambda x: 3, ["i8"]),
            (lambda x: x > 0, ["?"]),
            (lambda x: np.float32(x + 1), ["f4"]),
            (lambda x: 1j * x, ["c16"]),
        ],
    )
    def test_the_dtype_of_a_number_is_inferred(self, func, dtypes):
        found = self.returned(func)
        assert found.dtypes == tuple(map(np.dtype, dtypes))
        assert found.is_tuple is False

    def test_the_dtypes_of_a_tuple_are_inferred(self):
        found = self.returned(lambda x: (x, 1, x > 0))
        assert found.dtypes == (np.dtype("f8"), np.dtype("i8"), np.dtype("?"))
        assert found.is_tuple is True
        assert self.returned(lambda x: (x,)).is_tuple is True

    @pytest.mark.parametrize(
        "func", [lambda x: None, lambda x: "text", lambda x: np.ones(3), lambda x: ()]
    )
    def test_results_that_must_be_stacked_are_not_inferred(self, func):
        assert self.returned(func) is None

    @pytest.mark.parametrize("dtype", ["O", ">f8", "g"])
    def test_dtypes_that_numba_does_not_know_are_not_inferred(self, dtype):
        assert (
            self.returned(lambda x: x, layouts=(ArrayLayout(np.dtype(dtype), 0, "C", True),))
            is None
        )

    def test_arguments_that_numba_does_not_know_prevent_inference(self):
        assert self.returned(lambda x, y: x, object()) is None


def test_a_loop_is_made_once_for_each_array_layout():
    kernel = numba.njit(lambda x: x * 2)
    C = ArrayLayout(np.dtype("f8"), 0, "C", True)
    A = ArrayLayout(np.dtype("f8"), 0, "A", True)
    loops = []
    for layout in (C, A, C):
        found = compiler.infer_result(kernel, (layout,), ExtraArgs(()), None, writable=False)
        loops.append(
            compiler.compile_loop(kernel, (layout,), ExtraArgs(()), (C,), found, rows_out=False)
        )
    assert loops[0] is loops[2]
    assert loops[0] is not loops[1]
    assert len(kernel.signatures) == 1


def test_shutdown_forgets_a_kernel_that_is_gone():
    kernel = numba.njit(lambda x: x * 2)
    map_items(kernel, np.arange(5.0), n_jobs=2)
    map_array(kernel, np.arange(5.0), n_jobs=2)
    known = weakref.ref(kernel)
    del kernel
    shutdown()
    gc.collect()
    assert known() is None


def test_the_most_recent_kernels_are_kept():
    first = numba.njit(lambda x: x * 2)
    made = compiler._get_cache(first)
    for _ in range(compiler._MAX_KERNELS - 1):
        compiler._get_cache(numba.njit(lambda x: x))
        assert compiler._get_cache(first) is made
    for _ in range(compiler._MAX_KERNELS):
        compiler._get_cache(numba.njit(lambda x: x))
    assert len(compiler._kernel_caches) == compiler._MAX_KERNELS
    assert compiler._get_cache(first) is not made


class TestWithoutGil:
    def test_a_version_without_the_gil_is_made_once_for_each_number_of_arguments(self):
        kernel = numba.njit(lambda x, y=1: x + y)
        one = compiler.without_gil(kernel, 1)
        assert compiler.without_gil(kernel, 1) is one
        assert compiler.without_gil(kernel, 2) is not one
        assert one.targetoptions["nogil"] is True
        assert (one(4), compiler.without_gil(kernel, 2)(4, 2)) == (5, 6)

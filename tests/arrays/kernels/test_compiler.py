"""What is compiled for kernels: their results, loops and wrappers, and what is kept of them."""

import gc
import weakref

import numba
import numpy as np
import pytest

from taskcarrier import map_array, map_items, shutdown
from taskcarrier.arrays.kernels import compiler
from taskcarrier.arrays.kernels.signatures import ArrayLayout, ExtraArgs


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
    map_items(kernel, np.arange(5.0), n_jobs=2, backend="threading")
    map_array(kernel, np.arange(5.0), n_jobs=2, backend="threading")
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

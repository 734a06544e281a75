"""What is known of functions without calling them."""

import numba
import numpy as np
import pytest

from taskcarrier.backends.functions import (
    releases_gil,
)


class Adder:
    def __call__(self, x):
        return x + 1


class TestReleasesGil:
    @pytest.mark.parametrize("func", [np.isnan, np.logaddexp, np.spacing])
    def test_ufuncs_without_loops_over_objects(self, func):
        assert not any("O" in loop for loop in func.types)
        assert releases_gil(func) is True

    def test_ufuncs_over_objects(self):
        assert releases_gil(np.frompyfunc(lambda x: x, 1, 1)) is False

    @pytest.mark.parametrize(("options", "expected"), [({"nogil": True}, True), ({}, False)])
    @pytest.mark.parametrize("kind", [numba.njit, numba.jit])
    def test_numba(self, kind, options, expected):
        assert releases_gil(kind(**options)(lambda x: x)) is expected

    @pytest.mark.parametrize(("options", "expected"), [({"nogil": True}, True), ({}, False)])
    def test_numba_with_signatures(self, options, expected):
        func = numba.njit(["i8(i8)"], **options)(lambda x: x)
        assert releases_gil(func) is expected

    @pytest.mark.parametrize(
        "func", [len, np.sort, np.vectorize(len), lambda x: x, Adder(), Adder, np.ndarray.sum]
    )
    def test_what_cannot_be_seen(self, func):
        assert releases_gil(func) is False

    def test_a_wrapped_one_is_a_python_function(self):
        assert releases_gil(lambda x: np.isnan(x)) is False  # noqa: PLW0108  # a Python function is what is asked about

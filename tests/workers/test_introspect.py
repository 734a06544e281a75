"""What can be known of functions and classes without calling them."""

import sys

import numba
import numpy as np
import pytest

from taskcarrier.workers.introspect import (
    has_own_threads,
    is_jitted,
    is_made_at_run_time,
    is_numba_ufunc,
    releases_gil,
)


class Adder:
    def __call__(self, x):
        return x + 1


def plain(x):
    return x


class TestReleasesGil:
    @pytest.mark.parametrize("func", [np.isnan, np.logaddexp, np.spacing])
    def test_ufuncs_without_object_loops_release_the_gil(self, func):
        assert not any("O" in loop for loop in func.types)
        assert releases_gil(func) is True

    def test_ufuncs_with_object_loops_among_others_release_the_gil(self):
        assert releases_gil(np.sqrt) is True

    def test_ufuncs_over_objects_keep_the_gil(self):
        assert releases_gil(np.frompyfunc(plain, 1, 1)) is False

    @pytest.mark.parametrize("options", [{"nogil": True}, {}, {"parallel": True}])
    @pytest.mark.parametrize("kind", [numba.njit, numba.jit])
    def test_numba_functions_release_the_gil(self, kind, options):
        assert releases_gil(kind(**options)(plain)) is True

    @pytest.mark.parametrize("options", [{"nogil": True}, {}])
    def test_numba_functions_with_signatures_release_the_gil(self, options):
        assert releases_gil(numba.njit(["i8(i8)"], **options)(plain)) is True

    def test_numba_functions_in_object_mode_keep_the_gil(self):
        assert releases_gil(numba.jit(forceobj=True)(plain)) is False

    @pytest.mark.parametrize(
        "func",
        [
            numba.vectorize(plain),
            numba.vectorize(["f8(f8)"])(plain),
            numba.guvectorize("(n)->()")(lambda x, out: None),
        ],
    )
    def test_numba_ufuncs_release_the_gil(self, func):
        assert releases_gil(func) is True

    @pytest.mark.parametrize(
        "func", [len, np.sort, np.vectorize(len), lambda x: x, Adder(), Adder, np.ndarray.sum]
    )
    def test_other_callables_keep_the_gil(self, func):
        assert releases_gil(func) is False

    def test_a_python_function_around_a_ufunc_keeps_the_gil(self):
        assert releases_gil(lambda x: np.isnan(x)) is False  # noqa: PLW0108  # a Python function is what is asked about


def test_jitted_functions_are_recognised():
    assert is_jitted(numba.njit(plain)) is True
    assert is_jitted(numba.njit(parallel=True)(plain)) is True
    for func in (plain, np.sqrt, numba.vectorize(plain), numba.jit(forceobj=True)(plain)):
        assert is_jitted(func) is False


def test_parallel_functions_have_their_own_threads():
    assert has_own_threads(numba.njit(parallel=True)(plain)) is True
    for func in (plain, np.sqrt, numba.njit(plain), numba.njit(parallel=False)(plain)):
        assert has_own_threads(func) is False


def test_a_parallel_function_as_a_default_has_its_own_threads():
    parallel = numba.njit(parallel=True)(plain)
    assert has_own_threads(numba.njit(lambda x, func=parallel: func(x))) is True


def test_numba_ufuncs_are_recognised():
    assert is_numba_ufunc(numba.vectorize(plain)) is True
    assert is_numba_ufunc(numba.guvectorize("(n)->()")(lambda x, out: None)) is True
    for func in (plain, np.sqrt, numba.njit(plain)):
        assert is_numba_ufunc(func) is False


def test_without_numba_nothing_is_jitted(monkeypatch):
    for name in ("numba.core.registry", "numba.np.ufunc.dufunc", "numba.np.ufunc.gufunc"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not is_jitted(plain)
    assert not is_numba_ufunc(plain)


def test_classes_of_a_program_are_told_from_those_written_in_c():
    class Claiming(int):
        __module__ = "builtins"

    assert is_made_at_run_time(Adder)
    assert is_made_at_run_time(Claiming)
    assert not any(map(is_made_at_run_time, (int, type, OSError, np.ndarray)))

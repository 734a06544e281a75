"""`reduce_array`: a left fold of partial results, in the order of the ranges."""

import operator
import threading
import time
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import reduce_array
from tests.strategies import (
    EVERYWHERE,
    REALS,
    RUNS,
    axes_of,
    examples,
    keep_runs_warm,
    same_bits,
    samples,
)

pools = keep_runs_warm()


def on_every_run(func, *arrays, runs=RUNS, **options):
    found = [
        reduce_array(func, *arrays, backend=backend, balance=balance, n_jobs=n, **options)
        for backend, balance, n in runs
    ]
    return found[0], found[1:]


X = np.random.default_rng(3).standard_normal((500, 7)) * 10.0 ** np.arange(-3, 4)


@pytest.mark.parametrize("chunksize", [None, 1, 3, 77, 500, 10_000])
def test_sums_have_the_same_bits_on_every_run(chunksize):
    first, others = on_every_run(
        lambda c: c.sum(axis=0), X, combine=operator.add, chunksize=chunksize
    )
    assert all(same_bits(other, first) for other in others)
    np.testing.assert_allclose(first, X.sum(axis=0), rtol=1e-9)
    if chunksize:
        cut = [X[i : i + chunksize].sum(axis=0) for i in range(0, 500, chunksize)]
        assert same_bits(first, reduce(operator.add, cut))


@pytest.mark.fault(29)
@examples(30)
@given(st.data())
def test_any_layout_and_axis_is_folded_from_left_to_right(data):
    sample = data.draw(samples(REALS))
    chunksize = data.draw(st.integers(1, 25))
    with sample.array() as Y:
        axis = data.draw(axes_of(Y))
        rows = np.moveaxis(np.asarray(Y), axis, 0)
        starts = range(0, len(rows), chunksize)
        cut = [rows[i : i + chunksize].tobytes() for i in starts]
        found, others = on_every_run(
            lambda c: np.moveaxis(c, axis, 0).tobytes(),
            Y,
            runs=[(backend, balance, 2) for backend, balance in EVERYWHERE],
            combine=lambda left, right: (left, right),
            initial="first",
            axis=axis,
            chunksize=chunksize,
        )
        assert found == reduce(lambda left, right: (left, right), cut, "first")
        assert all(other == found for other in others)


def test_the_order_is_kept_when_later_ranges_are_done_first(run):
    def slow_first(chunk):
        time.sleep(0.05 if chunk[0] < 2 else 0)
        return str(chunk[0])

    text = reduce_array(slow_first, np.arange(10), combine=operator.add, chunksize=1, **run)
    assert text == "0123456789"


def test_an_operation_that_is_not_associative_is_folded_from_left_to_right(run):
    found = reduce_array(
        lambda c: float(c[0]), np.arange(1, 9), combine=operator.sub, chunksize=1, **run
    )
    assert found == 1 - sum(range(2, 9))


def test_combine_runs_in_the_caller_one_time_less_than_there_are_ranges(run):
    calls = []

    def combine(left, right):
        calls.append((threading.current_thread(), left, right))
        return right

    assert reduce_array(np.max, np.arange(9), combine=combine, chunksize=2, **run) == 8
    here = threading.current_thread()
    assert calls == [(here, 1, 3), (here, 3, 5), (here, 5, 7), (here, 7, 8)]


@pytest.mark.parametrize("initial", [None, 0, "text", [1]])
def test_the_fold_begins_with_the_initial_value(run, initial):
    found = reduce_array(
        lambda c: int(c[0]),
        np.arange(4),
        combine=lambda left, right: (left, right),
        initial=initial,
        chunksize=2,
        **run,
    )
    assert found == ((initial, 0), 2)


def test_one_range_without_an_initial_value_is_what_the_function_returned(run):
    def combine(left, right):
        raise AssertionError("there is nothing to combine")

    found = reduce_array(lambda c: [c.sum()], np.arange(5), combine=combine, chunksize=5, **run)
    assert found == [10]


def test_the_first_partial_result_may_be_changed_in_place(run):
    def combine(left, right):
        left += right
        return left

    found = reduce_array(lambda c: c.sum(axis=0), X[:, :1] * 0 + 1, combine=combine, **run)
    assert found.tolist() == [500]


@pytest.mark.fault(28)
def test_without_items_only_an_initial_value_is_a_result(run):
    called = []
    options = {"combine": lambda *both: called.append(both), **run}
    with pytest.raises(ValueError, match=r"needs initial= \(shape \(3, 0\), axis 1\)"):
        reduce_array(called.append, np.zeros((3, 0)), axis=1, **options)
    for initial in (None, 7):
        assert reduce_array(called.append, np.zeros(0), initial=initial, **options) is initial
    assert called == []


def test_an_error_while_combining_names_the_range(run):
    def combine(left, right):
        if right == 6:
            raise ZeroDivisionError("on purpose")
        return right

    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        reduce_array(lambda c: int(c[0]), np.arange(11), combine=combine, chunksize=3, **run)
    (note,) = caught.value.__notes__
    assert "while combining the result of axis 0, items 6:9" in note


def test_the_last_range_is_named_up_to_its_end(run):
    with pytest.raises(TypeError) as caught:
        reduce_array(
            lambda c: "x" if c[0] == 9 else 1,
            np.arange(11),
            combine=operator.add,
            chunksize=3,
            **run,
        )
    assert "items 9:11" in caught.value.__notes__[0]


def test_an_error_of_the_function_names_the_range(run):
    def func(chunk):
        return 1 // int(chunk[0] != 6)

    with pytest.raises(ZeroDivisionError) as caught:
        reduce_array(func, np.arange(11), combine=operator.add, chunksize=3, **run)
    assert any("items 6:9" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("combine", [None, "add", 3])
def test_combine_must_be_callable(combine):
    with pytest.raises(TypeError, match="combine must be callable"):
        reduce_array(np.sum, X, combine=combine, n_jobs=2)


def test_several_arrays_arguments_and_neighbours_can_be_reduced(run):
    Y, Z = np.arange(10), np.arange(20).reshape(2, 10)

    def func(y, z, more, *, times):
        return [[*y.tolist(), more * times, int(z[1].sum())]]

    found = reduce_array(
        func, Y, Z, combine=operator.add, axis=(0, 1), args=(2,), kwargs={"times": 3},
        chunksize=5, depth=1, boundary="none", **run,
    )  # fmt: skip
    assert found == [[0, 1, 2, 3, 4, 5, 6, 75], [4, 5, 6, 7, 8, 9, 6, 99]]

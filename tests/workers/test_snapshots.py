"""What a function carries, and how it is kept as it was."""

import functools
import operator
import threading

import numpy as np
import pytest

from taskcarrier.workers.call import Call
from taskcarrier.workers.snapshots import Snapshot, may_carry_state

HISTORY = []


def named(x):
    HISTORY.append(x)
    return x


class Adder:
    def __init__(self):
        self.total = 0

    def add(self, x):
        self.total += x
        return self.total

    __call__ = add


def make_closure(value):
    return lambda x: (x, value)


def make_with_default(value):
    def func(x, value=value):
        return x, value

    return func


def make_with_attribute():
    def func(x):
        return x

    func.n_calls = 0
    return func


def make_nested(value):
    def outer(x):
        def inner():
            return value

        return x, inner()

    return outer


CONSTANT = [
    named,
    np.sqrt,
    operator.neg,
    len,
    np.ndarray.sum,
    functools.partial(np.add, 1.5),
    functools.partial(named, "text"),
    make_closure(3),
    make_closure((1, "a", None)),
    make_closure(np.sin),
    make_closure(named),
    make_closure(make_closure(1)),
    make_nested(2),
    make_with_default(np.float64(2)),
    lambda x: x + 1,
    np.vectorize,
]
STATEFUL = [
    Adder(),
    Adder().add,
    functools.partial(Adder()),
    functools.partial(named, [1]),
    make_closure([1]),
    make_closure(np.random.default_rng(0)),
    make_closure(np.zeros(3)),
    make_closure(Adder()),
    make_closure(make_closure({})),
    make_nested([]),
    make_with_default({}),
    make_with_attribute(),
]


@pytest.mark.parametrize("func", CONSTANT)
def test_functions_of_constants_carry_no_state(func):
    assert not may_carry_state(func)


@pytest.mark.parametrize("func", STATEFUL)
def test_what_a_call_may_change_is_state(func):
    assert may_carry_state(func)


def test_a_function_that_refers_to_itself_is_looked_at_once():
    def func(x):
        return func(x - 1) if x else 0

    assert not may_carry_state(func)


def test_a_name_that_is_not_bound_yet_is_state():
    def func(x):
        return later, x

    assert may_carry_state(func)
    later = 1


def test_a_snapshot_is_the_function_as_it_was():
    rng = np.random.default_rng(0)
    counter = [0]

    def func(x):
        counter[0] += 1
        return counter[0], rng.random()

    call = Call(func, (1,), {"a": 2})
    snapshot = Snapshot(call)
    first = [func(0), func(0)]
    restored = snapshot.restore()
    assert (restored.args, restored.kwargs) == ((1,), {"a": 2})
    assert [restored.func(0), restored.func(0)] == first
    assert func(0)[0] == 3


def test_a_snapshot_does_not_copy_large_arrays():
    large = np.zeros(10**6)
    restored = Snapshot(Call(make_closure([large]))).restore().func
    (found,) = restored(0)[1]
    assert np.shares_memory(found, large)


def test_a_function_without_state_is_restored_as_it_is():
    call = Call(named)
    assert Snapshot(call).restore() is call


def test_a_function_that_cannot_be_pickled_is_an_error_when_it_is_restored():
    snapshot = Snapshot(Call(make_closure(threading.Lock())))
    with pytest.raises(TypeError, match="cannot pickle"):
        snapshot.restore()

"""What a function carries, and how it is kept as it was."""

import functools
import operator
import os
import threading
import types

import numpy as np
import pytest

import taskcarrier
from taskcarrier.memory.staging import SHARED_NBYTES, Staging
from taskcarrier.system.descriptors import make_owner
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_task, unpickle_task
from taskcarrier.workers.snapshots import Snapshot, find_state

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


class Counted:
    n = 0


def make_counter():
    n = 0

    def count(x):
        nonlocal n
        n += 1
        return n

    return count


def make_inner_counter():
    n = 0

    def outer(x):
        def inner():
            nonlocal n
            n += 1

        inner()
        return n

    return outer


def by_value(code):
    """Return a function of the main module, which is pickled by value."""
    names = {"__name__": "__main__"}
    exec(code, names)  # as a script would define it
    return names["func"]


def own_cell(x):
    n = 0

    def inner():
        return n

    n = 1
    return inner() + x


SMALL, LARGE = np.zeros(3), np.zeros(SHARED_NBYTES // 8)
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
    make_closure(LARGE),
    make_nested(2),
    make_with_default(np.float64(2)),
    lambda x: x + 1,
    np.vectorize,
    np.copy,
    np.linalg.norm,
    functools.cache(named),
    functools.cache(make_closure(1)),
    np.random.default_rng,
    np.random.Generator,
    by_value("def func(x): return x"),
    by_value("import os\ndef func(x): return os.sep, x"),
    by_value("def func(x):\n    n = 0\n    def inner(): return n\n    n = 1\n    return inner()"),
    own_cell,
]
STATEFUL = [
    make_counter(),
    make_inner_counter(),
    by_value("n = 0\ndef func(x):\n    global n\n    n += 1\n    return n"),
    by_value("n = None\ndef help():\n    global n\n    n = 1\ndef func(x): return help()"),
    by_value("def func(x):\n    func.n = x\n    return x"),
    by_value("class C: n = 0\ndef func(x):\n    return C.n"),
    by_value("def func(x):\n    global n\n    del n"),
    make_closure(types.ModuleType("made")),
    make_closure(type("Made", (), {})),
    Adder(),
    Adder().add,
    functools.partial(Adder()),
    functools.partial(named, [1]),
    make_closure([1]),
    make_closure(np.random.default_rng(0)),
    make_closure(np.zeros(3, object)),
    make_closure(np.ma.zeros(3)),
    make_closure(Adder()),
    make_closure(make_closure({})),
    make_nested([]),
    make_with_default({}),
    make_with_attribute(),
    functools.cache(make_closure([])),
    np.random.default_rng(0).random,
    np.random.random,
    [].append,
]


@pytest.mark.parametrize("func", CONSTANT)
def test_functions_of_constants_carry_no_state(func):
    assert find_state(Call(func)) == []


@pytest.mark.parametrize("func", STATEFUL)
def test_what_a_call_may_change_is_state(func):
    assert find_state(Call(func)) is None


@pytest.mark.parametrize(
    "func",
    [
        make_closure(SMALL),
        make_closure((1, SMALL)),
        make_nested(SMALL),
        make_with_default(SMALL),
        functools.partial(named, SMALL),
        make_closure(make_closure(SMALL)),
    ],
)
def test_small_arrays_are_found_wherever_a_function_keeps_them(func):
    (found,) = find_state(Call(func))
    assert found is SMALL


def test_arguments_are_state_but_for_arrays_which_are_read_only():
    assert find_state(Call(named, (1, SMALL), {"a": LARGE})) == []
    assert find_state(Call(named, ([1],))) is None
    assert find_state(Call(named, (), {"a": {}})) is None


def test_arrays_in_shared_memory_are_no_state_that_must_be_kept():
    assert find_state(Call(make_closure(taskcarrier.empty(3)))) == []


def test_a_function_that_refers_to_itself_is_looked_at_once():
    def func(x):
        return func(x - 1) if x else 0

    assert find_state(Call(func)) == []


def test_a_name_that_is_not_bound_yet_is_state():
    def func(x):
        return later, x

    assert find_state(Call(func)) is None
    later = 1


def sent(snapshot, call):
    """Return what a worker unpickles."""
    payload = pickle_task(call, snapshot.staging, snapshot.get_pickler())
    return unpickle_task(payload.data, [make_owner(os.dup(fd)) for fd in payload.fds])


def snapshot_of(call):
    return Snapshot(call, lambda: call, Staging())


def test_workers_get_the_function_as_it_was():
    rng = np.random.default_rng(0)
    counter = [0]

    def func(x):
        counter[0] += 1
        return counter[0], rng.random()

    call = Call(func, (1,), {"a": 2})
    snapshot = snapshot_of(call)
    first = [func(0), func(0)]
    arrived = sent(snapshot, call)
    assert (arrived.args, arrived.kwargs) == ((1,), {"a": 2})
    assert [arrived.func(0), arrived.func(0)] == first
    assert func(0)[0] == 3


@pytest.mark.parametrize("shape", [3, (2, 3)])
def test_small_arrays_arrive_as_they_were_however_often_a_function_has_them(shape):
    array = np.zeros(shape)
    call = Call(lambda x: (x, array, make_closure(array)))
    snapshot = snapshot_of(call)
    array += 1
    _, arrived, inner = sent(snapshot, call).func(0)
    assert not arrived.any()
    assert inner(0)[1] is arrived
    arrived += 2
    assert (array == 1).all()


@pytest.mark.parametrize("carried", [lambda array: [array], lambda array: array])
def test_large_arrays_arrive_as_they_are_now(carried):
    array = np.zeros(SHARED_NBYTES)
    call = Call(make_closure(carried(array)))
    snapshot = snapshot_of(call)
    assert snapshot.staging.nbytes == 0
    array += 1
    _, arrived = sent(snapshot, call).func(0)
    assert (np.asarray(arrived) == 1).all()


@pytest.mark.parametrize("carried", [lambda array: [array], lambda array: array])
def test_workers_write_to_shared_arrays_that_a_function_carries(carried):
    array = taskcarrier.empty(3)
    array[:] = 0
    call = Call(make_closure(carried(array)))
    _, arrived = sent(snapshot_of(call), call).func(0)
    (arrived[0] if isinstance(arrived, list) else arrived)[:] = 5
    assert (array == 5).all()


def test_a_function_that_cannot_be_pickled_is_an_error_when_it_is_sent():
    snapshot = snapshot_of(Call(make_closure(threading.Lock())))
    with pytest.raises(TypeError, match="lock"):
        snapshot.get_pickler()

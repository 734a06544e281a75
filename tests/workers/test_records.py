"""Results and errors of a range on their way to the caller."""

import gc
import pickle
import weakref

import numpy as np

from taskcarrier.errors import TaskError
from taskcarrier.workers.pickling import pickle_items, unpickle_items
from taskcarrier.workers.records import PartialResult


class Thing:
    pass


class UnsendableError(Exception):
    def __reduce__(self):
        raise TypeError("stays where it is")


def raised(error):
    """Raise an error in a frame that refers to a thing; return a weak reference to that."""
    thing = Thing()
    there = weakref.ref(thing)
    try:
        raise error
    except type(error):
        return there


def test_results_and_failures_arrive():
    parts = PartialResult(
        [(slice(0, 2), [np.arange(2.0)]), (np.array([3, 5]), ["a", "b"])],
        [(2, 3, ValueError("no", 3)), (4, 5, KeyError("k"))],
    )
    arrived = unpickle_items(pickle_items(parts))
    (where, (array,)), (positions, words) = arrived.results
    assert where == slice(0, 2)
    assert array.tolist() == [0.0, 1.0]
    assert (positions.tolist(), words) == ([3, 5], ["a", "b"])
    assert [failure[:2] for failure in arrived.failures] == [(2, 3), (4, 5)]
    errors = [repr(failure[2]) for failure in arrived.failures]
    assert errors == ["ValueError('no', 3)", "KeyError('k')"]


def test_failures_arrive_with_their_traceback():
    error = ValueError("no")
    raised(error)
    ((_, _, arrived),) = pickle.loads(pickle.dumps(PartialResult([], [(0, 1, error)]))).failures
    assert "in raised" in str(arrived.__cause__)


def test_a_failure_that_cannot_be_pickled_is_replaced():
    ((_, _, arrived),) = pickle.loads(
        pickle.dumps(PartialResult([], [(0, 1, UnsendableError("no"))]))
    ).failures
    assert type(arrived) is TaskError
    assert arrived.type_name == f"{__name__}.UnsendableError"


def test_pickling_twice_gives_the_same():
    error = ValueError("no")
    raised(error)
    parts = PartialResult([(slice(0, 1), "result")], [(1, 2, error)])
    first, second = (pickle.loads(pickle.dumps(parts)) for _ in range(2))
    assert first.results == second.results
    # The traceback is gone after the first time, but not its text.
    assert "in raised" in str(second.failures[0][2].__cause__)
    assert str(first.failures[0][2].__cause__) == str(second.failures[0][2].__cause__)


def test_pickled_errors_keep_nothing_alive_in_the_worker():
    inner, outer = ValueError("inner"), LookupError("outer")
    things = [raised(inner), raised(outer)]
    outer.__cause__ = inner
    gc.disable()
    try:
        assert all(thing() is not None for thing in things)
        packed = pickle.dumps(PartialResult([], [(0, 1, outer)]))
        assert [thing() for thing in things] == [None, None]
    finally:
        gc.enable()
    ((_, _, arrived),) = pickle.loads(packed).failures
    assert repr(arrived) == "LookupError('outer')"

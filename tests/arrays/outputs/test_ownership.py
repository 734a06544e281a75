"""Results belong to the caller: no object in them holds a view of the input."""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import pytest

from taskcarrier import map_array, map_chunks, map_items, reduce_array
from taskcarrier.arrays.outputs.ownership import own_memory
from tests.strategies import keep_pools_warm

pools = keep_pools_warm(2)


class Pair(NamedTuple):
    first: Any
    second: Any = None


@dataclasses.dataclass
class Record:
    value: Any


class Items(list):
    pass


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Marked(np.ndarray):
    pass


class Cycle:
    def __init__(self, value):
        self.value, self.own = value, self


def data_frame(chunk):
    import pandas as pd

    return pd.DataFrame(chunk)


# Objects that hold a chunk, and how it is got out of them.
HOLDERS = {
    "array": (lambda c: c, lambda r: r),
    "view": (lambda c: c[::-1][::-1], lambda r: r),
    "tuple": (lambda c: (1, c), lambda r: r[1]),
    "list": (lambda c: [c], lambda r: r[0]),
    "dict": (lambda c: {"c": {"d": c}}, lambda r: r["c"]["d"]),
    "named tuple": (Pair, lambda r: r.first),
    "dataclass": (Record, lambda r: r.value),
    "slots": (Slotted, lambda r: r.value),
    "ordered dict": (lambda c: collections.OrderedDict(c=c), lambda r: r["c"]),
    "default dict": (lambda c: collections.defaultdict(list, c=c), lambda r: r["c"]),
    "list subclass": (lambda c: Items([c]), lambda r: r[0]),
    "deque": (lambda c: collections.deque([c]), lambda r: r[0]),
    "data frame": (data_frame, lambda r: r.to_numpy()),
    "masked": (np.ma.masked_array, lambda r: r.data),
    "array subclass": (lambda c: c.view(Marked), np.asarray),
    "array of objects": (lambda c: np.array([Record(c), None], object), lambda r: r[0].value),
    "partial": (lambda c: functools.partial(np.add, c), lambda r: r.args[0]),
    "closure": (lambda c: lambda: c, lambda r: r()),
    "method of an array": (lambda c: c.sum, lambda r: r.__self__),
    "bound method": (lambda c: Record(c).__eq__, lambda r: r.__self__.value),
    "cycle": (Cycle, lambda r: r.value),
    "deep": (lambda c: Record([Pair(1, {"c": Items([c])})]), lambda r: r.value[0].second["c"][0]),
}


# pandas shows its values so, and pickle keeps the arrays of functions as they were.
STAY_READ_ONLY = {"data frame", "closure", "method of an array"}


@pytest.mark.fault(7)
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_object_that_holds_a_chunk_keeps_its_values(holder, run):
    if holder == "data frame":
        pytest.importorskip("pandas", reason="its frames are one of the cases")
    hold, take = HOLDERS[holder]
    X = np.arange(12.0).reshape(6, 2)
    before = X.copy()
    results = map_chunks(hold, X, chunksize=3, **run)
    X[:] = -1
    for start, result in zip((0, 3), results, strict=True):
        taken = take(result)
        assert np.array_equal(taken, before[start : start + 3])
        if holder not in STAY_READ_ONLY:
            taken[:] = 7
    assert np.all(X == -1)


@pytest.mark.fault(7)
def test_a_folded_object_keeps_its_values(run):
    X = np.arange(6.0)
    total = reduce_array(Record, X, combine=lambda a, b: a, chunksize=3, **run)
    X[:] = -1
    assert total.value.tolist() == [0, 1, 2]


@pytest.mark.fault(7)
def test_arguments_that_are_returned_keep_their_values(run):
    B = np.arange(3.0)
    results = map_chunks(lambda c, b: Record(b), np.zeros(4), args=(B,), chunksize=2, **run)
    B[:] = -1
    for result in results:
        assert result.value.tolist() == [0, 1, 2]


@pytest.mark.fault(7)
def test_objects_in_an_output_keep_their_values(run):
    X = np.arange(6.0).reshape(3, 2)
    rows = map_items(lambda row: {"row": row}, X, dtype=object, **run)
    pairs = map_array(chunks_as_objects, X, chunksize=1, out_axis=0, **run)
    X[:] = -1
    assert [one["row"].tolist() for one in rows] == [[0, 1], [2, 3], [4, 5]]
    assert [one.value.tolist() for one in pairs] == [[0, 1], [2, 3], [4, 5]]


def chunks_as_objects(chunk):
    made = np.empty(len(chunk), object)
    made[:] = [Record(row) for row in chunk]
    return made


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("name", "hold"),
    [
        ("generator", lambda c: (x for x in c)),
        ("flatiter", lambda c: c.flat),
        ("broadcast", lambda c: np.broadcast(c, c)),
        ("nditer", np.nditer),
        ("memoryview", memoryview),
    ],
)
def test_an_object_that_cannot_be_copied_is_an_error_with_the_remedy(name, hold):
    with pytest.raises(TypeError, match=name) as caught:
        map_chunks(hold, np.arange(3.0), n_jobs=1)
    assert "have it hold chunk.copy() instead" in caught.value.__notes__[0]


class Uncopiable:
    def __deepcopy__(self, memo):
        raise AssertionError("it holds nothing of ours")

    __reduce__ = __copy__ = __deepcopy__


@pytest.mark.parametrize(
    "value",
    [
        Uncopiable(),
        Record(np.zeros(3)),
        Pair(np.zeros(3), "text"),
        collections.OrderedDict(a=[1, 2.0]),
        np.array([Record(1), None], object),
        lambda: 1,
        functools.partial(max, 1),
        np,
        Record,
        None,
    ],
    ids=repr,
)
def test_objects_that_hold_no_input_are_not_copied(value):
    given = [np.zeros(2)]
    assert own_memory(value, given) is value
    assert own_memory([value], given)[0] is value


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "value",
    [
        Pair(Uncopiable(), read_only(np.arange(3.0))),
        read_only(np.arange(3.0)),
        np.broadcast_to(np.float64(3), (2, 3)),
    ],
    ids=["an object", "an array", "a broadcast"],
)
def test_read_only_memory_that_is_no_input_is_not_copied(value):
    for backend in ("sequential", "threading"):
        results = map_chunks(
            lambda c: value, np.arange(4.0), chunksize=2, n_jobs=2, backend=backend
        )
        assert all(result is value for result in results)

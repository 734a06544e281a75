"""Maps over lists: the same as the built-in `map`."""

import functools
import itertools
import operator
import threading
import time
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskcarrier
from tests.errors import Unreadable
from tests.interrupted import interrupted_between_items
from tests.lists.makers import MAKERS
from tests.strategies import examples, keep_pools_warm, run_script, same_bits

ORDERED = ["serial", "dynamic threads", "dynamic processes"]


pools = keep_pools_warm(2)

T = TypeVar("T")


@pytest.fixture(params=sorted(MAKERS))
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def mapper(make):
    return make()


ITEMS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)


@examples(60)
@given(st.lists(ITEMS | st.tuples(ITEMS), max_size=30), st.none() | st.integers(1, 40))
def test_map_equals_the_builtin_map(items, chunksize):
    for make in MAKERS.values():
        mapper = make(chunksize=chunksize)
        assert mapper(lambda item: [item], items) == [[item] for item in items]


@examples(30)
@given(
    st.lists(st.integers(), max_size=12),
    st.lists(st.text(max_size=3), max_size=12),
    st.lists(ITEMS, max_size=12),
    st.none() | st.integers(1, 5),
)
def test_the_shortest_of_several_sequences_wins(first, second, third, chunksize):
    expected = list(zip(first, second, third, strict=False))
    for make in MAKERS.values():
        mapper = make(chunksize=chunksize)
        assert mapper.map(lambda *items: items, first, second, third) == expected


@pytest.mark.parametrize("n_items", [0, 1, 2, 3, 100])
def test_few_items_are_mapped(mapper, n_items):
    assert mapper(operator.neg, range(n_items)) == [-i for i in range(n_items)]
    assert mapper.report.items == n_items
    assert sum(worker.items for worker in mapper.report.workers) == n_items


def test_an_empty_list_calls_nothing(mapper):
    called = []
    assert mapper(called.append, []) == []
    assert mapper(called.append, [], [1, 2]) == []
    assert called == []


def test_all_kinds_of_iterables_are_mapped(mapper):
    class Countdown:
        def __getitem__(self, index):
            if index > 2:
                raise IndexError(index)
            return 2 - index

    assert mapper(str, (i * i for i in range(4))) == ["0", "1", "4", "9"]
    assert mapper(str, {"a": 1, "b": 2}) == ["a", "b"]
    assert mapper(str, "abc") == ["a", "b", "c"]
    assert mapper(str, range(9, 0, -3)) == ["9", "6", "3"]
    assert mapper(str, iter([1, 2])) == ["1", "2"]
    assert mapper(str, Countdown()) == ["2", "1", "0"]
    assert mapper(sum, np.arange(6).reshape(2, 3)) == [3, 12]
    assert mapper(pow, itertools.count(), [2, 2, 2]) == [0, 1, 4]


def test_an_error_of_the_generator_is_its_own(mapper):
    def items():
        yield 1
        raise ZeroDivisionError("while making items")

    with pytest.raises(ZeroDivisionError, match="while making items"):
        mapper(str, items())


def test_bad_sequences_and_functions_are_refused(mapper):
    with pytest.raises(TypeError, match="not iterable"):
        mapper(str, 5)
    with pytest.raises(TypeError, match="callable"):
        mapper(None, [1])
    with pytest.raises(TypeError):
        mapper(str)
    with pytest.raises(TypeError, match="colour"):
        mapper(str, [1], colour="red")
    for bad, error in ((0, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="chunksize"):
            mapper(str, [1], chunksize=bad)


def test_order_is_kept_when_later_items_are_done_first(make):
    def slow_first(i):
        time.sleep(0.05 if i < 2 else 0)
        return i

    assert make(chunksize=1)(slow_first, range(30)) == list(range(30))


def test_twenty_thousand_small_items_are_mapped(mapper):
    assert mapper(operator.neg, range(20_000)) == list(range(0, -20_000, -1))
    assert mapper.report.ranges <= 128


def test_large_items_and_results_are_mapped(mapper):
    items = [np.full(300_000, number) for number in range(8)]
    results = mapper(lambda item: (item[0], item * 2), items)
    for number, (first, doubled) in enumerate(results):
        assert first == number
        assert same_bits(doubled, np.full(300_000, 2 * number))


def test_results_of_every_kind_are_returned(mapper):
    results = mapper(lambda i: [None, "text", np.arange(i), {i}, lambda: i, i, int][i], range(7))
    assert results[:2] == [None, "text"]
    assert results[2].tolist() == [0, 1]
    assert (results[3], results[4](), results[5], results[6]) == ({3}, 4, 5, int)


class Adder:
    def __init__(self, n):
        self.n = n

    def add(self, i):
        return self.n + i

    def __call__(self, i):
        return self.n - i


@pytest.mark.fault(9)
def test_every_kind_of_function_is_called(mapper):
    n = 10

    def closure(i):
        return n + i

    for func in (
        closure,
        lambda i: i + n,
        functools.partial(operator.add, n),
        Adder(n).add,
        n.__add__,
    ):
        assert mapper(func, range(3)) == [10, 11, 12]
    assert mapper(Adder(n), range(3)) == [10, 9, 8]
    assert [item.n for item in mapper(Adder, range(3))] == [0, 1, 2]


def test_items_changed_in_place_are_seen_by_the_next_call(mapper):
    items = [[0], [0]]
    with mapper:
        for number in range(3):
            items[1][0] = number
            assert mapper(sum, items) == [0, number]


def test_the_error_names_the_item(make):
    def func(i):
        if i >= 37:
            raise KeyError("no", i)
        return i

    mapper = make(chunksize=10)
    with pytest.raises(KeyError) as caught:
        mapper(func, range(40))
    assert caught.value.args == ("no", 37)
    assert "func failed on item 37" in caught.value.__notes__
    assert any(note.startswith("while mapping items 30:40") for note in caught.value.__notes__)
    assert mapper(func, range(5)) == list(range(5))


@pytest.mark.parametrize("kind", ORDERED)
def test_the_lowest_item_that_fails_is_raised_on_every_run(kind):
    def func(i):
        if i in {7, 8, 30}:
            raise ValueError(i)
        return i

    mapper = MAKERS[kind](chunksize=1)
    for _ in range(20):
        with pytest.raises(ValueError, match="7") as caught:
            mapper(func, range(40))
        assert caught.value.args == (7,)


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_timeout_cuts_the_same_ranges_for_any_number_of_workers(timeout):
    mapper = MAKERS["dynamic processes"]()
    assert mapper(abs, range(20_000), timeout=timeout) == list(range(20_000))
    assert mapper.report.ranges == (32 if timeout is None else 128)


@pytest.mark.parametrize("kind", ["static processes", "dynamic processes"])
def test_an_item_that_cannot_be_pickled_is_named(kind):
    mapper, lock = MAKERS[kind](chunksize=1), threading.Lock()
    ran = []
    with pytest.raises(TypeError, match="lock") as caught:
        mapper(ran.append, [1, 2, lock])
    assert any("item 2" in note and "threading" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="lock") as caught:
        mapper(lambda i: lock, range(4))
    assert any("the function" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="lock") as caught:
        mapper(lambda i: threading.Lock() if i == 2 else i, range(4))
    assert any("the result" in note for note in caught.value.__notes__)
    assert mapper(abs, [-1, 2]) == [1, 2]


@pytest.mark.parametrize("balance", ["static", "dynamic"])
def test_large_results_lie_in_shared_memory(balance):
    mapper = MAKERS[f"{balance} processes"]()
    # The last one is so large that it travels alone.
    results = mapper(lambda n: {"n": n, "array": np.full((n, 50_000), n)}, range(5))
    for n, result in enumerate(results):
        np.testing.assert_array_equal(result["array"], np.full((n, 50_000), n))
    results[-1]["array"][0] = -1  # the caller's own
    mapper.map_array(np.negative, results[-1]["array"])
    assert mapper.report.bytes_copied == 0


def test_large_results_lie_in_the_temporary_folder(tmp_path):
    mapper = MAKERS["dynamic processes"](temp_folder=str(tmp_path))
    results = mapper(np.zeros, [100_000] * 4)
    assert [len(result) for result in results] == [100_000] * 4
    assert list(tmp_path.iterdir()) == []


MANY_RESULTS = """
import resource
import numpy as np
from taskcarrier import DynamicParallelMapper

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
mapper = DynamicParallelMapper(2, backend="loky", chunksize=1)
results = mapper(np.full, [50_000] * 100, range(100))
assert [int(result[-1]) for result in results] == list(range(100))
"""


def test_there_may_be_more_large_results_than_descriptors(tmp_path):
    run_script(tmp_path, MANY_RESULTS)


class Weighted:
    def __init__(self, weights):
        self.weights = weights

    def at(self, n):
        return float(self.weights[n])


@pytest.mark.parametrize("of", ["closure", "partial", "bound method", "two"])
def test_arrays_that_the_function_carries_are_noted(of):
    X = np.arange(10_000.0)
    func, n = {
        "closure": (lambda n: float(X[n]), 1),
        "partial": (functools.partial(np.take, X), 1),
        "bound method": (Weighted(X).at, 1),
        "two": (lambda n: float(X[n] + carried_too[n]), 2),
    }[of]
    carried_too = np.zeros((100, 200))[:, ::2].ravel()
    mapper = MAKERS["dynamic processes"]()
    assert mapper(func, range(10)) == list(range(10))
    many = "1 array of 80,000" if n == 1 else "2 arrays of 160,000"
    (note,) = mapper.report.notes
    assert note.startswith(
        f"the function carries {many} bytes: each call copies them to shared memory"
    )
    mapper(abs, range(10), shared=None)
    assert mapper.report.notes == ()


def test_arrays_passed_as_shared_are_not_noted():
    mapper = MAKERS["dynamic processes"]()
    X = np.arange(10_000.0)
    assert mapper(lambda n, X: float(X[n]), range(3), shared={"X": X}) == [0, 1, 2]
    assert mapper.report.notes == ()


def ends_early(n, *_, rng=None):
    if n % 5 == 3:
        raise StopIteration(n, "early")
    return n


@pytest.mark.fault(1)
@pytest.mark.parametrize("rng", [None, 0])
@pytest.mark.parametrize("n_lists", [1, 2])
def test_stop_iteration_is_an_error(n_lists, rng, make):
    # The built-in `map` would end there, and say nothing.
    with pytest.raises(StopIteration) as caught:
        make(chunksize=10).map(ends_early, *[range(10)] * n_lists, rng=rng)
    assert caught.value.args == (3, "early")
    assert any("item 3" in note for note in caught.value.__notes__)


@pytest.mark.fault(1)
@pytest.mark.parametrize("rng", [None, 0])
@pytest.mark.parametrize("n_lists", [1, 2])
def test_stop_iteration_can_be_collected(n_lists, rng, make):
    results, failed = make(chunksize=4).map(
        ends_early, *[range(10)] * n_lists, rng=rng, on_error="collect"
    )
    assert results == [n if n % 5 != 3 else None for n in range(10)]
    assert [(one.start, one.stop) for one in failed] == [(3, 4), (8, 9)]
    assert [(type(one.error), one.error.args) for one in failed] == [
        (StopIteration, (3, "early")),
        (StopIteration, (8, "early")),
    ]


@pytest.mark.fault(44)
@pytest.mark.parametrize("n_items", [2, 5])
@pytest.mark.parametrize("n_lists", [1, 2])
def test_an_exception_from_outside_between_two_items_is_not_collected(n_lists, n_items):
    mapper, lists = MAKERS["serial"](), [range(n_items)] * n_lists
    with pytest.raises(ArithmeticError, match="outside"):
        interrupted_between_items(
            "call_items",
            ArithmeticError("outside"),
            lambda: (
                mapper.map(max, [[0]] * n_items, on_error="collect")
                if n_lists == 1
                else mapper.map(pow, *lists, on_error="collect")
            ),
        )


@pytest.mark.parametrize("kind", ["static processes", "dynamic processes"])
def test_a_value_that_cannot_be_unpickled_raises_its_own_error(kind):
    mapper, bad = MAKERS[kind](chunksize=1), Unreadable(ArithmeticError, "broken on purpose")
    with pytest.raises(ArithmeticError, match="broken on purpose") as caught:
        mapper(
            lambda i: Unreadable(ArithmeticError, "broken on purpose") if i == 2 else i, range(9)
        )
    assert any("unpickle this result" in note for note in caught.value.__notes__)
    with pytest.raises(ArithmeticError, match="broken on purpose") as caught:
        mapper(lambda i: bad, range(9))
    assert any("unpickled the function" in note for note in caught.value.__notes__)
    assert not any("-" in note for note in caught.value.__notes__ if note.startswith("also failed"))
    with pytest.raises(ArithmeticError, match="broken on purpose") as caught:
        mapper(str, [0, 1, bad, 3])
    assert any("item 2" in note or "items 2:3" in note for note in caught.value.__notes__)
    assert mapper(abs, [-1, 2]) == [1, 2]


MAIN = """
import threading, sys
import taskcarrier
from taskcarrier import DynamicParallelMapper, StaticParallelMapper

class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return type(other) is Point and other.x == self.x
    def moved(self): return Point(self.x + SHIFT)

class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.both = first, second

class Plain(Exception):
    pass

class Locked(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()

SHIFT = 1
def shifted(point): return point.moved()
def raises(kind): raise {0: Plain("one", 2), 1: Odd("a", "b"), 2: Locked("held")}[kind]

if __name__ == "__main__":
    for kind in (DynamicParallelMapper, StaticParallelMapper):
        with kind(n_jobs=2, backend="loky") as mapper:
            points = [Point(i) for i in range(5)]
            moved = Point.moved
            for SHIFT in (1, 2):
                for func in (shifted, Point.moved):
                    assert mapper(func, points) == [Point(i + SHIFT) for i in range(5)], SHIFT
            assert Point.moved is moved, "the map has changed a class of the script"
            def shifted(point): return "redefined"
            assert mapper(shifted, points) == ["redefined"] * 5
            def shifted(point): return point.moved()
            try:
                mapper(raises, [0])
            except Plain as error:
                assert error.args == ("one", 2), error.args
            else:
                raise SystemExit("Plain was not raised")
            for number, name, text in ((1, "Odd", "a and b"), (2, "Locked", "held")):
                try:
                    mapper(raises, [number, number])
                except (Odd, Locked) as error:
                    assert type(error).__name__ == name and text in str(error)
                except taskcarrier.TaskError as error:
                    assert error.type_name.endswith(name), error.type_name
                    assert name in str(error) and text in str(error)
                    assert "raises" in str(error.__cause__)
                else:
                    raise SystemExit(name + " was not raised")
            assert mapper(shifted, points)[0] == Point(2)
    print("fine")
"""


def test_classes_functions_and_errors_of_a_script_are_mapped(tmp_path):
    assert run_script(tmp_path, MAIN) == "fine\n"


def test_functions_given_on_the_command_line_are_mapped(tmp_path):
    code = """
import subprocess, sys
code = '''
import numpy as np
from taskcarrier import StaticParallelMapper, map_array
class Item:
    def __init__(self, i): self.i = i
def double(item): return Item(2 * item.i)
mapper = StaticParallelMapper(n_jobs=2, backend="loky")
print([item.i for item in mapper(double, [Item(1), Item(2)])])
def half(chunk): return chunk / 2
print(map_array(half, np.arange(3.0), n_jobs=2, backend="loky"))
'''
command = [sys.executable, "-c", code]
print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
"""
    assert run_script(tmp_path, code).split("\n")[:2] == ["[2, 4]", "[0.  0.5 1. ]"]


def test_a_chunksize_changes_ranges_but_not_results(make):
    for chunksize in (1, 3, 100, 10**9):
        mapper = make(chunksize=chunksize)
        assert mapper(operator.neg, range(10)) == list(range(0, -10, -1))
        assert mapper.report.ranges == -(-10 // chunksize)


def test_a_chunksize_of_the_call_overrides_that_of_the_mapper(make):
    mapper = make(chunksize=5)
    for given_here, ranges in ((None, 2), (1, 10), (np.int64(4), 3)):
        assert mapper.map(operator.neg, range(10), chunksize=given_here) == list(range(0, -10, -1))
        assert mapper.report.ranges == ranges


def test_only_items_are_copied(mapper):
    mapper(abs, [1, 2, 3])
    copied = taskcarrier.last_report().bytes_copied
    assert copied == 0 if mapper.report.backend != "loky" else 0 < copied < 10_000


@pytest.mark.parametrize("is_generic", [False, True])
def test_named_tuples_of_the_program_are_mapped(is_generic):
    if is_generic:

        class Point(NamedTuple, Generic[T]):
            x: T
            y: int = 3

    else:

        class Point(NamedTuple):
            x: int
            y: int = 3

    mapper = MAKERS["dynamic processes"]()
    assert mapper.map(Point, range(2)) == [Point(0), Point(1)]
    assert mapper.map(lambda point: point.x + point.y, [Point(1), Point(2)]) == [4, 5]
    assert list(mapper.imap(Point, range(2))) == [Point(0), Point(1)]
    added = mapper.map_array(lambda c, point: c + point.y, np.arange(3.0), args=(Point(1),))
    assert added.tolist() == [3, 4, 5]

"""What `functools` makes of functions travels to processes. Plain calls are the oracle."""

import functools
import threading

import pytest

from taskcarrier import DynamicParallelMapper
from taskcarrier.workers.call import Call
from tests.strategies import keep_pools_warm, run_script
from tests.workers.helpers import travelled_task

pools = keep_pools_warm(2)


@functools.cache
def importable(x):
    return x + 1


@functools.singledispatch
def generic(x):
    return "object"


def sent(func):
    (call, _) = travelled_task(Call(func))
    return call.func


@pytest.mark.parametrize("func", [importable, generic])
def test_importable_functions_are_pickled_by_name(func):
    assert sent(func) is func


def test_a_cached_function_keeps_its_parameters_and_attributes():
    @functools.lru_cache(maxsize=3, typed=True)
    def func(x):
        """What it does."""
        return x * 2

    func.extra = [1]
    func(1)
    there = sent(func)
    assert there.cache_parameters() == {"maxsize": 3, "typed": True}
    assert there.cache_info().currsize == 0
    assert (there.extra, there.__doc__, there.__name__) == ([1], "What it does.", "func")
    assert [there(x) for x in (1, 1, 2)] == [2, 2, 4]
    assert there.cache_info().hits == 1


def test_a_cached_function_that_calls_itself_does_so_through_its_cache():
    @functools.cache
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    there = sent(fibonacci)
    assert there(90) == fibonacci(90)
    assert there.cache_info().misses == 91


def test_cached_methods_of_a_class_travel():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        @functools.cached_property
        def double(self):
            """Twice the factor."""
            return 2 * self.factor

        @functools.cache  # noqa: B019  # users cache methods like this, and that is tested
        def times(self, x):
            return self.factor * x

        @staticmethod
        @functools.cache
        def plus(x):
            return x + 1

        @classmethod
        @functools.cache
        def named(cls, x):
            return cls.__name__, x

    scale = Scale(3)
    assert sent(scale.times)(2) == 6
    assert sent(Scale.plus)(2) == 3
    assert sent(scale.named)(2) == ("Scale", 2)
    there = sent(lambda: scale.double)
    assert there() == 6
    assert sent(lambda: Scale)().double.__doc__ == "Twice the factor."


def test_a_generic_function_dispatches_on_classes_that_travel():
    class Own:
        pass

    @functools.singledispatch
    def kind(x):
        return "object"

    @kind.register
    def _(x: int):
        return "int"

    @kind.register(list)
    def _(x):
        return [kind(one) for one in x]

    kind.register(Own, lambda x: "own")
    kind.extra = 3
    there = sent(kind)
    assert there.extra == 3
    assert [there(x) for x in ("a", 1, True, [1, "b"])] == [
        "object",
        "int",
        "int",
        ["int", "object"],
    ]
    there_too = sent(lambda: (kind, Own))
    func, own = there_too()
    assert func(own()) == "own"


def test_a_generic_method_dispatches_after_travelling():
    class Kinds:
        @functools.singledispatchmethod
        def of(self, x):
            return "object"

        @of.register
        def _(self, x: int):
            return "int"

    kinds = Kinds()
    kinds.of(1)  # what it keeps of that does not travel
    assert [sent(kinds.of)(x) for x in (1, "a")] == ["int", "object"]
    assert [sent(kinds).of(x) for x in (1, "a")] == ["int", "object"]


MAIN = """
import functools
import numpy as np
from taskcarrier import DynamicParallelMapper, map_array, map_items

@functools.lru_cache(maxsize=None)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

@functools.singledispatch
def kind(x):
    return "object"

@kind.register
def _(x: int):
    return "int"

class Circle:
    def __init__(self, r):
        self.r = r

    @functools.cached_property
    def area(self):
        return 3 * self.r ** 2

    @functools.lru_cache
    def scaled(self, x):
        return self.r * x

if __name__ == "__main__":
    mapper = DynamicParallelMapper(2, backend="loky")
    assert mapper.map(fibonacci, [80, 81]) == [fibonacci(80), fibonacci(81)]
    assert list(mapper.imap(fibonacci, [80, 81])) == [fibonacci(80), fibonacci(81)]
    assert mapper.map(kind, [1, "a"]) == ["int", "object"]
    circles = [Circle(1), Circle(2)]
    assert circles[0].area == 3
    assert mapper.map(lambda circle: circle.area, circles) == [3, 12]
    (one, two) = mapper.map(Circle, [1, 2])
    assert (type(one), two.area) == (Circle, 12)
    assert mapper.map(circles[1].scaled, [5, 6]) == [10, 12]
    assert map_items(fibonacci, np.arange(9), n_jobs=2, backend="loky").tolist() == [
        fibonacci(n) for n in range(9)
    ]
    assert map_array(
        lambda c: c + fibonacci(len(c)), np.arange(4), chunksize=2, n_jobs=2, backend="loky"
    ).tolist() == [1, 2, 3, 4]
    print("right")
"""


@pytest.mark.fault(9)
def test_functions_of_main_work_in_every_verb(tmp_path):
    assert run_script(tmp_path, MAIN) == "right\n"


@pytest.mark.fault(9)
def test_a_cached_function_that_holds_a_lock_is_refused():
    lock = threading.Lock()

    @functools.cache
    def func(x):
        return lock and x

    with pytest.raises(TypeError, match="lock") as caught:
        DynamicParallelMapper(2, backend="loky").map(func, range(4))
    assert any("could not pickle the function" in note for note in caught.value.__notes__)

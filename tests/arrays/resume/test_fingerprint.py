"""Digests of what decides values: equal for equal values in all processes, else different."""

import array
import collections
import datetime as dt
import enum
import functools
import importlib
import math
import operator
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numba
import numpy as np
import pytest

from taskcarrier.arrays.resume.fingerprint import Fingerprint
from tests.strategies import ROOT


def digest(value):
    return Fingerprint().digest(value, "value")


def not_looked_into(value):
    found = Fingerprint()
    found.digest(value, "value")
    return list(found.not_looked_into)


def defined(source, **names):
    """Return the function `f` of a piece of code with these globals."""
    exec(textwrap.dedent(source), names)  # as in a notebook
    return names["f"]


class Point:
    def __init__(self, x=0):
        self.x = x

    def moved(self, by):
        return self.x + by


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Number(int):
    pass


class Text(str):
    pass


class Numbers(list):
    def __init__(self, x):
        super().__init__([x])


class Table(dict):
    def __init__(self, x):
        super().__init__(x=x)


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


VALUES = [
    None,
    ...,
    True,
    False,
    0,
    1,
    -1,
    10**30,
    0.0,
    -0.0,
    1.0,
    math.inf,
    0.1,
    1j,
    complex(0.0, -0.0),
    "",
    "1",
    "a",
    "\ud800",
    b"",
    b"a",
    bytearray(b"a"),
    range(3),
    range(0, 4, 3),
    slice(3),
    slice(0, 3),
    (),
    (1,),
    (1, 2),
    (2, 1),
    ((1,), 2),
    (1, (2,)),
    [],
    [1, 2],
    set(),
    {1, 2},
    frozenset({1, 2}),
    {},
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {1: "a"},
    np.float64(1),
    np.float32(1),
    np.int64(1),
    np.datetime64("2000-01-01"),
    np.datetime64("2000-01-01", "ns"),
    np.array(1.0),
    np.array([1.0]),
    np.array([[1.0]]),
    np.array([1]),
    np.array([1, None], object),
    np.array([1, 2], object),
    np.zeros(0),
    np.zeros((0, 2)),
    np.dtype("f8"),
    np.dtype(">f8"),
    int,
    float,
    Point,
    len,
    math.sqrt,
    np.sqrt,
    np.add,
    np,
    math,
    Colour.RED,
    Colour.GREEN,
    functools.partial(max, 1),
    functools.partial(max, 2),
    functools.partial(min, 1),
    functools.partial(max, 1, key=abs),
]


class TestValues:
    def test_different_values_have_different_digests(self):
        seen = {}
        for value in VALUES:
            key = digest(value)
            assert key not in seen, (value, seen.get(key))
            seen[key] = value

    def test_the_tested_values_are_all_looked_into(self):
        assert not_looked_into(VALUES) == []

    @pytest.mark.parametrize("value", VALUES, ids=repr)
    def test_the_same_value_has_the_same_digest(self, value):
        assert digest(value) == digest(value)
        assert digest([value]) == digest([value])
        assert len(digest(value)) == 32
        int(digest(value), 16)

    def test_the_order_of_sets_does_not_matter_and_that_of_dicts_does(self):
        assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})
        assert digest({"a": [1], "b": 2}) != digest({"b": 2, "a": [1]})
        assert digest({8, 0, 16}) == digest({16, 8, 0})
        assert digest(frozenset("abc")) == digest(frozenset("cab"))

    def test_nan_has_one_digest(self):
        assert digest(math.nan) == digest(float("nan"))

    @pytest.mark.parametrize(
        "make",
        [
            Point,
            Fraction,
            Decimal,
            Path,
            Number,
            Text,
            Numbers,
            Table,
            Slotted,
            operator.itemgetter,
            operator.methodcaller,
            re.compile,
            random.Random,
            np.random.default_rng,
            np.random.RandomState,
            lambda n: iter([n]),
            lambda n: collections.deque([n]),
            lambda n: collections.Counter({n: 1}),
            lambda n: collections.defaultdict(int, {n: 1}),
            lambda n: collections.OrderedDict({n: 1}),
            lambda n: dt.date(2000, 1, int(n)),
            lambda n: dt.timedelta(int(n)),
            lambda n: functools.lru_cache(lambda x: (x, n)),
            lambda n: np.vectorize(lambda x: (x, n)),
            lambda n: np.poly1d([1, int(n)]),
            lambda n: array.array("i", [int(n)]),
            lambda n: memoryview(bytes([int(n)])),
            lambda n: types.SimpleNamespace(n=n),
            lambda n: types.MappingProxyType({"n": n}),
            lambda n: Point([Point(n)]),
        ],
    )
    @pytest.mark.parametrize("number", [1, 2])
    def test_values_of_other_kinds_count_or_are_named(self, number, make):
        kind = str if make in {Path, Text, re.compile, operator.methodcaller} else int
        one, same, other = (make(kind(n)) for n in (number, number, 3))
        assert digest(one) == digest(same)
        assert not_looked_into(one) == not_looked_into(same)
        assert digest(one) != digest(other) or not_looked_into(one)

    def test_values_that_are_not_looked_into_are_named(self):
        value = threading.Lock()
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        assert not_looked_into({"a": [1, value]}) == [f"value['a'][1] ({kind})"]
        assert not_looked_into(lambda x, y=value: x) == [f"value: default values[0] ({kind})"]

    def test_names_of_values_not_looked_into_do_not_depend_on_addresses(self):
        found = [not_looked_into({threading.Lock(): threading.Lock()}) for _ in range(2)]
        assert found[0] == found[1]
        assert len(found[0]) == 2

    def test_values_may_contain_themselves(self):
        one, other = [1], [1]
        one.append(one)
        other.append([1, other])
        again = [1]
        again.append(again)
        assert digest(one) == digest(again)
        assert digest(one) != digest([1, [1]])
        table = {"a": 1}
        table["self"] = table
        assert digest(table) != digest({"a": 1, "self": {"a": 1}})
        objects = np.array([None, 1], object)
        objects[0] = objects
        assert digest(objects) != digest(np.array([None, 1], object))

    def test_the_same_value_in_two_places_is_no_cycle(self):
        part = [1]
        assert digest([part, part]) == digest([[1], [1]])


def test_integers_too_long_to_be_printed_have_digests():
    n = 10**5000
    values = [n, n + 1, [n], [n + 1], {"a": n}, {"a": n + 1}, {n: "a"}, (n,)]
    assert len({digest(value) for value in values}) == len(values)
    assert digest([n]) == digest([10**5000])


def test_masks_of_arrays_count_or_are_named():
    one, other = (np.ma.array([1.0, 2.0], mask=mask) for mask in ([0, 1], [1, 0]))
    assert digest(one) != digest(other) or not_looked_into(one)


SOURCES = [
    "f = lambda x: x + 1",
    "f = lambda x: x - 1",
    "f = lambda x: x + 1.0",
    "f = lambda x: x + 2",
    "f = lambda x, y=1: x + y",
    "f = lambda x, y=2: x + y",
    "f = lambda x, *, y=2: x + y",
    "f = lambda x: abs(x)",
    "f = lambda x: str(x)",
    "f = lambda x: x.real",
    "f = lambda x: x.imag",
    "f = lambda x: x in {1, 2}",
    "f = lambda x: x in {1, 3}",
    "f = lambda x: x in (1, 3)",
    "f = lambda x: [x for _ in range(3)]",
    "f = lambda x: [x for _ in range(4)]",
    "f = lambda x: (lambda y: y + 1)(x)",
    "f = lambda x: (lambda y: y + 3)(x)",
    "def f(x):\n    try:\n        return x\n    except KeyError:\n        return 1",
    "def f(x):\n    try:\n        return x\n    except ValueError:\n        return 1",
    "def f(x):\n    def g():\n        return (x, {1: 2})\n    return g()",
    "def f(x):\n    def g():\n        return (x, {1: 3})\n    return g()",
    "def f(x):\n    yield x",
    "async def f(x):\n    return x",
]


class TestFunctions:
    def test_functions_differ_by_all_of_their_code(self):
        digests = [digest(defined(source)) for source in SOURCES]
        assert len(set(digests)) == len(SOURCES)
        assert digests == [digest(defined(f"\n\n{source}")) for source in SOURCES]

    def test_function_names_comments_and_line_numbers_do_not_count(self):
        one = defined("def f(x):\n    return x + 1")
        other = defined("# here\n\ndef g(x):\n    # there\n    return x + 1\nf = g")
        assert digest(one) == digest(other)

    def test_having_run_a_function_does_not_count(self):
        f = defined("def f(x):\n    s = 0\n    for i in range(x):\n        s += i\n    return s")
        before = digest(f)
        for _ in range(200):
            f(50)
        assert digest(f) == before

    def test_enclosed_values_count(self):
        def enclosing(value):
            return lambda x: (x, value)

        assert digest(enclosing(1)) == digest(enclosing(1))
        assert digest(enclosing(1)) != digest(enclosing(2))
        assert digest(enclosing(np.zeros(3))) != digest(enclosing(np.ones(3)))
        inner = [enclosing(enclosing(enclosing(n))) for n in (1, 1, 2)]
        assert digest(inner[0]) == digest(inner[1]) != digest(inner[2])
        assert not_looked_into(enclosing(threading.Lock()))[0].startswith("value.value (")

    def test_enclosed_values_are_not_confused_with_defaults(self):
        def enclosing(value, default):
            defaults = __defaults__ = value
            return lambda x, y=default: (x, y, defaults, __defaults__)

        assert digest(enclosing(1, 2)) != digest(enclosing(1, 3))
        assert digest(enclosing(1, 2)) != digest(enclosing(2, 2))

    def test_each_part_of_a_function_has_its_own_digest(self):
        source = "def f(x, y=1):\n    return g(x), h(x), N, M, f"
        globals_ = [
            {
                "g": defined(f"f = lambda x: x + {n}"),
                "h": defined("f = lambda x: x"),
                "N": 1,
                "M": m,
            }
            for n, m in ((1, 1), (2, 1), (1, 2))
        ]
        first, other_g, other_m = (
            Fingerprint().digest_function(defined(source, **names), "func") for names in globals_
        )
        assert set(first) == {
            "func",
            "func: default values",
            "func: keyword defaults",
            *(f"func: global {name}" for name in ("M", "N", "f", "g", "h")),
        }
        assert {name for name in first if first[name] != other_g[name]} == {"func: global g"}
        assert {name for name in first if first[name] != other_m[name]} == {"func: global M"}

    def test_a_callable_that_is_no_function_is_one_part(self):
        value = functools.partial(len)
        assert Fingerprint().digest_function(value, "func") == {"func": digest(value)}

    def test_an_enclosed_name_may_be_unbound(self):
        def outer():
            def inner(x):
                return late + x

            found = digest(inner)
            late = 1
            return found, digest(inner)

        before, after = outer()
        assert before != after

    def test_functions_may_call_themselves(self):
        def recursive(step):
            def go(n):
                return go(n - step) if n > 0 else n

            return go

        assert digest(recursive(1)) == digest(recursive(1))
        assert digest(recursive(1)) != digest(recursive(2))

    def test_globals_that_a_function_uses_count(self):
        source = "def f(x):\n    def g():\n        return [x * C for _ in range(2)]\n    return g()"
        made = [defined(source, C=c, D=d) for c, d in [(1, 1), (1, 2), (2, 1)]]
        assert digest(made[0]) == digest(made[1]) != digest(made[2])
        arrays = [defined(source, C=np.full(3, c)) for c in (1, 1, 2)]
        assert digest(arrays[0]) == digest(arrays[1]) != digest(arrays[2])
        texts = [defined(source, C=c) for c in ("a", "a", "b")]
        assert digest(texts[0]) == digest(texts[1]) != digest(texts[2])

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (functools.partial(Point(1).moved, by=1), functools.partial(Point(1).moved, by=2)),
            (functools.partial(lambda x, y: x, 1), functools.partial(lambda x, y: y, 1)),
            (Point(1).moved, Point(1).__init__),
            (Point(1).moved, Point.moved),
        ],
    )
    def test_partials_and_methods_differ_by_their_parts(self, one, other):
        assert digest(one) == digest(one)
        assert digest(one) != digest(other)

    def test_the_object_of_a_bound_method_counts(self):
        assert digest(Point(1).moved) == digest(Point(1).moved) != digest(Point(2).moved)

    def test_methods_that_a_method_calls_count(self):
        def made(number):
            class Thing:
                def helper(self):
                    return number

                def method(self, x):
                    return x + self.helper()

            return Thing().method

        assert digest(made(1)) == digest(made(1)) != digest(made(2))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({1: 2}.get, {1: 3}.get),
            ([1, 2].index, [2, 1].index),
            ("ab".find, "cd".find),
            (np.array([1, 2]).take, np.array([3, 4]).take),
        ],
        ids=["dict", "list", "str", "ndarray"],
    )
    def test_the_object_of_a_bound_builtin_counts_or_is_named(self, one, other):
        assert digest(one) != digest(other) or not_looked_into(one)

    def test_callables_of_user_classes_differ_by_what_they_do(self):
        def adder(n):
            class Adder:
                def __call__(self, x):
                    return x + n

            return Adder()

        assert digest(adder(1)) == digest(adder(1)) != digest(adder(2))


# Programs that bind `f`; they differ by `{n}`, which decides what `f` returns.
DECIDING = {
    "number": "N = {n}",
    "array": "N = np.full(3, {n})",
    "dataclass": """
        @dataclasses.dataclass
        class Settings:
            rate: int = 0
        N = Settings({n})
        """,
    "frozen dataclass with slots": """
        @dataclasses.dataclass(frozen=True, slots=True)
        class Settings:
            rate: int = 0
        N = Settings({n})
        """,
    "default of a dataclass": """
        @dataclasses.dataclass
        class Settings:
            rate: int = {n}
        def f(x):
            return Settings().rate * x
        """,
    "default factory of a dataclass": """
        @dataclasses.dataclass
        class Settings:
            rates: list = dataclasses.field(default_factory=lambda: [{n}])
        def f(x):
            return Settings().rates * x
        """,
    "argparse.Namespace": "N = argparse.Namespace(rate={n})",
    "SimpleNamespace": "N = types.SimpleNamespace(rate={n})",
    "class attribute": """
        class Settings:
            rate = {n}
        def f(x):
            return Settings.rate * x
        """,
    "attribute of a base class": """
        class Base:
            rate = {n}
        class Settings(Base):
            pass
        def f(x):
            return Settings.rate * x
        """,
    "attribute of a metaclass": """
        class Meta(type):
            rate = {n}
        class Settings(metaclass=Meta):
            pass
        def f(x):
            return Settings.rate * x
        """,
    "attribute of the class of an object": """
        class Settings:
            rates = np.full(3, {n})
        N = Settings()
        """,
    "property": """
        class Settings:
            @property
            def rate(self):
                return {n}
        N = Settings()
        """,
    "cached property": """
        class Settings:
            @functools.cached_property
            def rate(self):
                return {n}
        N = Settings()
        """,
    "static method": """
        class Settings:
            @staticmethod
            def rate():
                return {n}
        N = Settings()
        """,
    "class method": """
        class Settings:
            @classmethod
            def rate(cls):
                return {n}
        def f(x):
            return Settings.rate() * x
        """,
    "descriptor": """
        class Rate:
            def __get__(self, *_):
                return {n}
        class Settings:
            rate = Rate()
        N = Settings()
        """,
    "class that is called": """
        class Scale:
            def __init__(self, x):
                self.scaled = {n} * x
        def f(x):
            return Scale(x).scaled
        """,
    "callable object": """
        class Scale:
            def __init__(self, n):
                self.n = n
            def __call__(self, x):
                return self.n * x
        N = Scale({n})
        """,
    "bound method": """
        class Scale:
            def __init__(self, n):
                self.n = n
            def scaled(self, x):
                return self.n * x
        N = Scale({n}).scaled
        """,
    "object with slots": """
        class Scale:
            __slots__ = ("n",)
        N = Scale()
        N.n = {n}
        """,
    "object with slots and a dict": """
        class Base:
            __slots__ = ("n",)
        class Scale(Base):
            pass
        N = Scale()
        N.n = {n}
        """,
    "object that says what pickle is to send": """
        class Scale:
            def __init__(self, n):
                self.n = n
                self.lock = threading.Lock()
            def __getstate__(self):
                return self.n
            def __setstate__(self, n):
                self.__init__(n)
        N = Scale({n})
        """,
    "subclass of list": """
        class Rates(list):
            pass
        N = Rates([{n}])
        """,
    "subclass of dict": """
        class Rates(dict):
            pass
        N = Rates(rate={n})
        """,
    "subclass of set": """
        class Rates(set):
            pass
        N = Rates([{n}])
        """,
    "subclass of str": """
        class Rate(str):
            pass
        N = Rate("{n}")
        """,
    "subclass of float": """
        class Rate(float):
            pass
        N = Rate({n})
        """,
    "enumeration": """
        class Rate(enum.Enum):
            HIGH = {n}
        def f(x):
            return Rate.HIGH.value * x
        """,
    "member of an enumeration": """
        class Rate(enum.IntEnum):
            HIGH = {n}
        N = Rate.HIGH
        """,
    "method of an enumeration": """
        class Rate(enum.Enum):
            HIGH = 7
            def scaled(self, x):
                return {n} * x
        N = Rate.HIGH
        """,
    "flags": """
        class Rate(enum.Flag):
            A = {n}
            B = 8
        N = Rate.A | Rate.B
        """,
    "namedtuple": "N = collections.namedtuple('Settings', 'rate')({n})",
    "NamedTuple": """
        class Settings(typing.NamedTuple):
            rate: int = 0
        N = Settings({n})
        """,
    "default of a NamedTuple": """
        class Settings(typing.NamedTuple):
            rate: int = {n}
        def f(x):
            return Settings().rate * x
        """,
    "OrderedDict": "N = collections.OrderedDict(rate={n})",
    "order of an OrderedDict": "N = collections.OrderedDict([({n}, 1), (5, 1)][:: 2 * {n} - 3])",
    "defaultdict": "N = collections.defaultdict(lambda: {n})",
    "Counter": "N = collections.Counter(rate={n})",
    "ChainMap": "N = collections.ChainMap(dict(rate={n}))",
    "deque": "N = collections.deque([{n}])",
    "length of a deque": "N = collections.deque([1], maxlen={n})",
    "MappingProxyType": "N = types.MappingProxyType(dict(rate={n}))",
    "array.array": "N = array.array('i', [{n}])",
    "Decimal": "N = decimal.Decimal({n})",
    "Fraction": "N = fractions.Fraction({n})",
    "date": "N = datetime.date(2000, 1, {n})",
    "timezone": "N = datetime.timezone(datetime.timedelta(hours={n}))",
    "regular expression": "N = re.compile('{n}')",
    "itemgetter": "N = operator.itemgetter({n})",
    "methodcaller": "N = operator.methodcaller('replace', 'n', '{n}')",
    "iterator": "N = iter([{n}])",
    "partial": "N = functools.partial(max, {n})",
    "subclass of partial": """
        class Part(functools.partial):
            pass
        N = Part(max, {n})
        """,
    "partialmethod": """
        class Scale:
            def scaled(self, n, x):
                return n * x
            f = functools.partialmethod(scaled, {n})
        N = Scale()
        """,
    "partial of a function that reads a global": """
        M = {n}
        def scaled(x):
            return M * x
        N = functools.partial(scaled)
        """,
    "np.vectorize": "N = np.vectorize(lambda x: x + {n})",
    "np.poly1d": "N = np.poly1d([{n}])",
    "np.recarray": "N = np.rec.array([({n}, 2)])",
    "records with objects": "N = np.array([({n}, 'a', [1]), (2, 'b', None)], 'i8,O,O')",
    "record with objects": "N = np.array([(1, ['a', {n}])], 'i8,O')[0]",
    "weak set": """
        class N:
            known = weakref.WeakSet()
        class Others:
            classes = [type(f"C{i}", (), dict(rate={n} * i)) for i in range(60)]
        N.known.update(Others.classes)
        """,
    "masked array": "N = np.ma.array([1, 2], mask=[{n} == 1, False])",
    "Generator": "N = np.random.default_rng({n})",
    "RandomState": "N = np.random.RandomState({n})",
    "random.Random": "N = random.Random({n})",
    "path": "N = pathlib.Path('{n}')",
    "DataFrame": "import pandas; N = pandas.DataFrame(dict(rate=[{n}]))",
    "Series with an index": "import pandas; N = pandas.Series([1], index=[{n}])",
    "sparse matrix": "import scipy.sparse; N = scipy.sparse.eye_array({n})",
    "estimator": "import sklearn.svm; N = sklearn.svm.SVC(C={n})",
    "fitted tree": """
        import sklearn.tree
        N = sklearn.tree.DecisionTreeRegressor().fit([[0], [1]], [0, {n}])
        """,
    "kernel": "N = numba.njit(lambda x: x + {n})",
    "ufunc of a kernel": "N = numba.vectorize(['f8(f8)'])(lambda x: x + {n})",
    "lru_cache": """
        @functools.lru_cache
        def scaled(x):
            return {n} * x
        def f(x):
            return scaled(x)
        """,
    "function that was wrapped": """
        def logged(func):
            @functools.wraps(func)
            def inner(x):
                return func(x)
            return inner
        @logged
        def f(x):
            return {n} * x
        """,
    "context manager": """
        @contextlib.contextmanager
        def rate():
            yield {n}
        def f(x):
            with rate() as n:
                return n * x
        """,
    "singledispatch": """
        @functools.singledispatch
        def scaled(x):
            return x
        @scaled.register
        def _(x: int):
            return {n} * x
        def f(x):
            return scaled(x)
        """,
    "function of a function": """
        def helper(x):
            return other(x)
        def other(x):
            return {n} * x
        def f(x):
            return helper(x)
        """,
    "functions that call each other": """
        def even(x):
            return x == 0 or odd(x - 1)
        def odd(x):
            return x != 0 and even(x - {n})
        def f(x):
            return even(x)
        """,
    "function in a table": """
        def helper(x):
            return {n} * x
        N = dict(helper=helper, other=len)
        """,
    "global of a method": """
        M = {n}
        class Scale:
            def scaled(self, x):
                return M * x
        N = Scale()
        """,
    "attribute of a module": """
        settings = types.ModuleType("settings")
        settings.rate = {n}
        def f(x):
            return settings.rate * x
        """,
    "function of a module": """
        settings = types.ModuleType("settings")
        exec("def scaled(x): return {n} * x", vars(settings))
        def f(x):
            return settings.scaled(x)
        """,
    "attribute of a module in a package": """
        package = types.ModuleType("package")
        package.settings = types.ModuleType("package.settings")
        package.settings.rate = {n}
        def f(x):
            return package.settings.rate * x
        """,
    "attribute of a function": """
        def f(x):
            return f.rate * x
        f.rate = {n}
        """,
    "attribute of a helper": """
        def helper(x):
            return x
        helper.rate = {n}
        def f(x):
            return helper.rate * x
        """,
    "attribute of a partial": """
        N = functools.partial(max)
        N.rate = {n}
        """,
    "attribute of a cached function": """
        N = functools.cache(len)
        N.rate = {n}
        """,
    "wrapper with a registry": """
        def logged(func):
            def inner(x):
                return func(x)
            inner.registry = {}
            return inner
        @logged
        def f(x):
            return {n} * x
        """,
    "default beside an enclosed name": """
        def made(defaults):
            def f(x, n={n}):
                return defaults, n * x
            return f
        f = made(7)
        """,
    "make_dataclass": "N = dataclasses.make_dataclass('S', [('rate', int, {n})])",
    "class that says it is of another module": """
        class Settings:
            rate = {n}
        Settings.__module__ = "builtins"
        N = Settings
        """,
    "new_class": "N = types.new_class('S', (), {}, lambda names: names.update(rate={n}))",
    "enumeration with a value of its own": """
        class Rate(enum.Enum):
            def __new__(cls, number, rate):
                member = object.__new__(cls)
                member._value_ = number
                member.rate = rate
                return member
            HIGH = (1, {n})
        N = Rate.HIGH
        """,
    "enumeration that finds what is missing": """
        class Rate(enum.Enum):
            HIGH = 7
            @classmethod
            def _missing_(cls, value):
                return {n}
        N = Rate
        """,
    "order of an enumeration": """
        Rate = enum.Enum("Rate", [("A", 1), ("B", 2)][:: 2 * {n} - 3])
        N = Rate
        """,
    "object with a path": """
        class Source:
            def __init__(self, rate):
                self.rate = rate
            def __fspath__(self):
                return "a.txt"
        N = Source({n})
        """,
    "subclass of a number of NumPy": """
        class Metres(np.float64):
            factor = {n}
        N = Metres(1)
        """,
    "subclass of a number of NumPy with an attribute": """
        class Metres(np.float64):
            pass
        N = Metres(1)
        N.factor = {n}
        """,
    "set with places": """
        class Rates(set):
            __slots__ = ("rate",)
        N = Rates()
        N.rate = {n}
        """,
    "order of a dict": "N = dict([('a', [1]), ('b', [2])][:: 2 * {n} - 3])",
    "order of a table of functions": "N = dict([('a', len), ('b', abs)][:: 2 * {n} - 3])",
    "signature of a kernel": "N = numba.njit(['', 'f8(f4)', 'f8(f8)'][{n}])(lambda x: x)",
    "slice": "N = slice(np.full(3, {n}), None)",
    "name among the builtins": """
        import builtins
        builtins.rate_of_tests = {n}
        def f(x):
            return rate_of_tests * x
        """,
    "class with a metaclass of the standard library": """
        import abc
        N = abc.ABCMeta("S", (), dict(rate={n}))
        """,
    "cfunc": "N = numba.cfunc('f8(f8)')(lambda x: x + {n})",
    "kernel with a value for numba alone": "N = numba.njit(boundscheck={n} == 1)(lambda x: x)",
    "imported by the function": """
        sys.modules["settings_of_tests"] = settings = types.ModuleType("settings_of_tests")
        settings.rate = {n}
        def f(x):
            from settings_of_tests import rate
            return rate * x
        """,
    "imported by the function, relatively": """
        __package__ = "package_of_tests"
        name = "package_of_tests.settings"
        sys.modules[name] = settings = types.ModuleType(name)
        settings.rate = {n}
        def f(x):
            from .settings import rate
            return rate * x
        """,
}

OF_LIBRARIES = {
    "DataFrame": "pandas",
    "Series with an index": "pandas",
    "sparse matrix": "scipy.sparse",
    "estimator": "sklearn",
    "fitted tree": "sklearn",
}

_NAMES = """
import array, argparse, collections, contextlib, dataclasses, datetime, decimal, enum, fractions
import functools, operator, pathlib, random, re, sys, threading, types, typing, weakref
import numba
import numpy as np

def f(x):
    return N, x
"""


def program(kind, n):
    """Return the function `f` of a program."""
    source = textwrap.dedent(DECIDING[kind])
    names = {"__name__": "program_of_tests"}
    sys.modules["program_of_tests"] = types.ModuleType("program_of_tests")
    try:
        exec(_NAMES + source.replace("{n}", str(n)), names)
    finally:
        del sys.modules["program_of_tests"]
    return names["f"]


class Node:
    def __init__(self, value):
        self.value, self.near = value, []


def grid(n, value):
    nodes = [[Node(value) for _ in range(n)] for _ in range(n)]
    for i, row in enumerate(nodes):
        for j, node in enumerate(row):
            node.near = [nodes[i - 1][j], row[j - 1], nodes[i - n + 1][j], row[j - n + 1]]
    return nodes[0][0]


def doubled(n, value):
    found = [value]
    for _ in range(n):
        found = [found, found]
    return found


def nested_sets(n, value):
    found = frozenset([value])
    for _ in range(n):
        found = frozenset([(found, 1), (found, 2)])
    return found


def related_classes(n, value):
    names = {"N0": value}
    for level in range(n):
        for name in "AB":
            exec(f"class {name}{level}:\n    def method(self): return N{level}", names)
        names[f"N{level + 1}"] = {names[f"A{level}"], names[f"B{level}"]}
    return names[f"N{n}"]


class Shape(enum.Enum):
    ROUND = 1

    @functools.cached_property
    def corners(self):
        return self.value - 1


def dated():
    import pandas as pd

    return pd.DataFrame({"a": [1, 2]}, index=pd.date_range("2020", periods=2))


def sparse():
    import scipy.sparse

    return scipy.sparse.csr_matrix(np.eye(3))


def get_label():
    import xarray

    return xarray.Dataset({"a": (("x",), np.arange(3))}, coords={"x": [1, 2, 3]})


# The library of an object, how it is made, and what makes it cache something.
ASKED = {
    "member of an enumeration": (None, lambda: Shape.ROUND, lambda shape: shape.corners),
    "frame with dates": ("pandas", dated, lambda frame: frame.loc[frame.index[1]]),
    "sparse matrix": ("scipy.sparse", sparse, lambda matrix: matrix.has_canonical_format),
    "dataset": ("xarray", get_label, lambda dataset: (dataset.a, dataset.sel(x=1))),
}


class TestGlobals:
    @pytest.mark.parametrize("kind", DECIDING)
    def test_the_value_of_a_global_counts(self, kind):
        if kind in OF_LIBRARIES:
            pytest.importorskip(OF_LIBRARIES[kind], reason="its objects are what this is about")
        found = Fingerprint()
        one = found.digest(program(kind, 1), "value")
        assert not found.not_looked_into
        assert one == digest(program(kind, 1))
        assert one != digest(program(kind, 2))

    @pytest.mark.parametrize(
        "value",
        [threading.Lock(), sys.stderr, (n for n in ()), memoryview(b""), weakref.ref(Point)],
        ids=["lock", "file", "generator", "memoryview", "weak reference"],
    )
    def test_globals_that_cannot_be_compared_are_named(self, value):
        f = defined("def f(x):\n    return N, x", N=value)
        assert not_looked_into(f)[0].startswith("value: global N")

    def test_modules_of_the_program_are_named_if_they_are_used_whole(self):
        settings = types.ModuleType("settings")
        f = defined("def f(x):\n    return getattr(settings, x)", settings=settings)
        assert not_looked_into(f) == ["value: global settings (builtins.module)"]

    def test_modules_that_are_not_imported_yet_are_named(self):
        f = defined("def f(x):\n    from no_such_module_of_tests import y\n    return x + y")
        assert not_looked_into(f) == ["value: import no_such_module_of_tests.y (builtins.module)"]

    def test_a_module_is_the_same_before_and_after_the_function_has_imported_it(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.syspath_prepend(tmp_path)
        digests = set()
        for number in (1, 2):
            name = f"late_of_tests_{number}"
            (tmp_path / f"{name}.py").write_text(f"rate = {number}")
            f = defined(f"def f(x):\n    from {name} import rate as own\n    return own")
            before = digest(f)
            assert f(0) == number
            assert digest(f) == before
            digests.add(Fingerprint().digest_function(f, "f")[f"f: import {name}.rate"])
        assert len(digests) == 2

    def test_an_installed_module_need_not_be_imported(self, monkeypatch):
        f = defined("def f(x):\n    import colorsys, hypothesis.extra.pytz\n    return x")
        monkeypatch.delitem(sys.modules, "colorsys", raising=False)
        before = digest(f)
        assert not_looked_into(f) == []
        assert "colorsys" not in sys.modules
        assert "hypothesis.extra.pytz" not in sys.modules
        importlib.import_module("colorsys")
        assert digest(f) == before
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
        assert digest(f) != before

    @pytest.mark.parametrize("what", ASKED)
    def test_answers_that_an_object_caches_do_not_count(self, what):
        library, make, ask = ASKED[what]
        if library is not None:
            pytest.importorskip(library, reason="its objects are what this is about")
        value = make()
        before = digest(value)
        ask(value)
        assert digest(value) == before == digest(make())

    def test_modules_of_installed_packages_count_by_name_and_version(self, monkeypatch):
        f = defined("def f(x):\n    import numpy\n    return np.sqrt(x), numpy", np=np)
        before = digest(f)
        assert not_looked_into(f) == []
        monkeypatch.setattr(np, "__version__", "0.0")
        assert digest(f) != before

    def test_functions_of_installed_packages_are_not_followed(self):
        found = Fingerprint()
        found.digest(np.median, "value")
        found.digest(np.vectorize(len), "value")
        assert not found.not_looked_into

    def test_proxies_are_named(self):
        class Proxy:
            def __init__(self, func):
                self.func = func

            @property
            def __class__(self):
                return types.FunctionType

            def __reduce_ex__(self, protocol):
                raise NotImplementedError

        assert digest(Proxy(len)) != digest(len)
        (named,) = not_looked_into(Proxy(len))
        assert named.endswith("Proxy)")

    def test_attributes_that_a_module_would_make_up_are_not_asked_for(self):
        settings = types.ModuleType("settings")

        def made_up(name):
            raise ImportError(name)

        settings.__getattr__ = made_up
        f = defined("def f(x):\n    return x or settings.gpu", settings=settings)
        assert not_looked_into(f) == ["value: global settings.gpu (builtins.module)"]

    def test_c_functions_without_a_module_are_not_named(self):
        linalg = pytest.importorskip("scipy.linalg", reason="some of its functions are Cython's")
        f = defined("def f(x):\n    return issymmetric(x)", issymmetric=linalg.issymmetric)
        assert not_looked_into(f) == []

    def test_numba_objects_that_are_no_kernels_are_named(self):
        @numba.stencil
        def neighbours(a):
            return a[0] + a[-1]

        f = defined("def f(x):\n    return N(x)", N=neighbours)
        assert not_looked_into(f) == ["value: global N (numba.stencils.stencil.StencilFunc)"]

    @pytest.mark.parametrize("module", ["random", "numpy.random"])
    def test_random_streams_behind_functions_count_by_name(self, module):
        stream = importlib.import_module(module)
        gauss = stream.gauss if module == "random" else stream.normal
        f = defined("def f(x):\n    return gauss(x)", gauss=gauss)
        before = digest(f)
        assert not_looked_into(f) == []
        stream.seed(7)
        assert digest(f) == before

    def test_cached_properties_do_not_count(self):
        class Thing:
            @functools.cached_property
            def found(self):
                return 7

        thing, vectorized = Thing(), np.vectorize(abs, otypes=[float])
        cached = functools.cache(abs)
        f = defined("def f(x):\n    return A, B, C", A=thing, B=vectorized, C=cached)
        before = digest(f)
        assert thing.found == vectorized(7) == cached(7) == 7
        assert digest(f) == before

    def test_the_environment_of_the_program_is_named(self):
        f = defined("def f(x):\n    return environ", environ=os.environ)
        before = digest(f)
        assert not_looked_into(f) == ["value: global environ (os._Environ)"]
        os.environ["TASKCARRIER_TEST"] = "7"
        try:
            assert digest(f) == before
        finally:
            del os.environ["TASKCARRIER_TEST"]

    def test_a_chain_of_functions_may_be_longer_than_the_stack(self):
        table = {}
        exec("\n".join(f"def f{n}(x): return f{n + 1}(x)" for n in range(3000)), table)
        exec("def f3000(x): return x", table)
        before = digest(table["f0"])
        assert not_looked_into(table["f0"]) == []
        exec("def f3000(x): return x + 1", table)
        assert digest(table["f0"]) != before

    @pytest.mark.parametrize("kind", ["grid", "twice", "sets", "classes"])
    def test_time_grows_linearly_with_the_number_of_objects(self, kind):
        makers = {"grid": grid, "twice": doubled, "sets": nested_sets, "classes": related_classes}
        found = [digest(makers[kind](60, value)) for value in (1, 1, 2)]
        assert found[0] == found[1] != found[2]

    def test_many_functions_that_call_each_other_are_looked_into_once_each(self):
        names = [f"f{n}" for n in range(40)]
        calls = ", ".join(f"{name}(x)" for name in names)
        table = {}
        exec("\n".join(f"def {name}(x): return {calls}" for name in names), table)
        assert len(digest(table["f0"])) == 32

    def test_values_may_be_nested_deeper_than_the_recursion_limit(self):
        def nested(value, depth=10_000):
            for _ in range(depth):
                value = [value]
            return value

        assert digest(nested(1)) == digest(nested(1))
        assert digest(nested(1)) != digest(nested(2))
        assert digest(nested(1)) != digest(nested(1, 9_999))

    def test_an_exception_of_a_signal_handler_is_raised(self):
        class TimeIsUpError(Exception):
            pass

        def raising(*_):
            raise TimeIsUpError

        class Slow:
            def __reduce__(self):
                signal.raise_signal(signal.SIGUSR1)
                return Slow, ()

        before = signal.signal(signal.SIGUSR1, raising)
        try:
            with pytest.raises(TimeIsUpError):
                digest(Slow())
        finally:
            signal.signal(signal.SIGUSR1, before)


class TestKernels:
    def test_kernels_differ_by_code_and_enclosed_values(self):
        def kernel(n):
            return numba.njit(lambda x: x + n)

        assert digest(kernel(1)) == digest(kernel(1))
        assert digest(kernel(1)) != digest(kernel(2))
        assert digest(kernel(1)) != digest(numba.njit(lambda x: x - 1))
        assert digest(kernel(1)) != digest(kernel(1).py_func)
        assert not_looked_into(kernel(1)) == []

    def test_being_compiled_does_not_change_a_kernel_s_digest(self):
        kernel = numba.njit(lambda x: x + 1)
        before = digest(kernel)
        kernel(1.0)
        assert digest(kernel) == before

    def test_kernel_options_that_decide_values_count(self):
        def body(x):
            return x / 3 + x

        kernels = [numba.njit(**options)(body) for options in ({}, {"fastmath": True})]
        assert digest(kernels[0]) != digest(kernels[1])

    def test_functions_compiled_as_ufuncs_differ_or_are_named(self):
        one, other = (numba.vectorize(["f8(f8)"])(f) for f in (lambda x: x + 1, lambda x: x + 2))
        assert digest(one) != digest(other) or not_looked_into(one)


PROGRAM = """
import functools, operator
import numpy as np
from taskcarrier.arrays.resume.fingerprint import Fingerprint

NAMES = "one"

class Thing:
    def method(self, x):
        return x in {"a", "b", "c", "d"}

def func(x, *, words=frozenset({"here", "there", "where"})):
    table = {"x": x, "y": {"p", "q", "r"}}
    return [word for word in words if word in {"u", "v", "w", NAMES}], table

values = {
    "func": func,
    "set": {"a", "b", "c", 1, None, (2, "x")},
    "nested": {frozenset({"a", "b"}), frozenset({"c", "d"})},
    "dict": {"k": {"a", "b"}, "l": [{"c": {"d", "e"}}]},
    "partial": functools.partial(func, words={"one", "two"}),
    "method": Thing().method,
    "objects": {"a", "b", "c", Thing(), operator.itemgetter(1)},
    "array": np.arange(12.0).reshape(3, 4)[:, ::2],
    "ufunc": np.add,
}
for name, value in values.items():
    found = Fingerprint()
    print(name, found.digest(value, name), found.not_looked_into)
"""

KERNEL = """
import numba
from taskcarrier.arrays.resume.fingerprint import Fingerprint
kernel = numba.njit(fastmath={"nnan", "nsz", "arcp", "contract"})(abs_)
print(Fingerprint().digest(kernel, "kernel"))
"""


def printed(code, seed):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def programs():
    return [printed(PROGRAM, seed) for seed in ("0", "1", "2")]


@pytest.mark.parametrize("number", range(9))
def test_digests_do_not_depend_on_the_order_of_hashes(number, programs):
    assert len({lines[number] for lines in programs}) == 1, [lines[number] for lines in programs]


def test_options_of_kernels_do_not_depend_on_the_order_of_hashes():
    code = KERNEL.replace("abs_", "lambda x: abs(x)")
    assert len({tuple(printed(code, seed)) for seed in ("0", "1", "2")}) == 1

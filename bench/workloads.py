"""The workloads of `defaults`, as a table: what is called, on what, how large.

Their plain calls take from 1 µs to 1 s. A third is held out: no constant of the library may have
been chosen by looking at those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.kernels import steps, steps_serial
from bench.timing import Settings
from bench.work import (
    LeastSquares,
    accumulate_rows,
    add,
    decompose,
    multiply,
    root,
    sleep_each,
    sleep_item,
    soften,
    sort_rows,
    spin,
    spin_item,
    sqrt_sin,
    square_plus_one,
    transform_rows,
)

# The smaller sizes, as parts of the full one, and the least number of items of each.
QUICK_PART, QUICK_LEAST = 10, 16
TINY_PART, TINY_LEAST = 10_000, 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Something that a user may want to map.

    Attributes
    ----------
    name, group : str
        What the table calls it.
    func : callable
        What is mapped; for fits, the estimator.
    make : callable
        Makes the inputs from a number of items: a tuple of arrays, or of one list of items; for
        fits, of the rows of each fit, X and y.
    n_items : int
        That number at full size.
    verb : str
        One of `map_array`, `map_items`, `map`, `imap`, `fit_many`.
    balance : str
        The balance of all arms that have one.
    whole : callable, optional
        For `map_items`, what a user would call on a whole array instead.
    chained : int
        How many maps follow each other, each over the result of the one before.
    is_known_free : bool
        Whether the library can know that the function releases the GIL, so that the default may
        use threads.
    is_one_pass : bool
        Whether the call does little more than read and write memory once.
    is_held_out : bool
        Whether no constant may have been chosen by looking at it.
    """

    name: str
    group: str
    func: Any
    make: Callable[[int], tuple[Any, ...]]
    n_items: int
    verb: str = "map_array"
    balance: str = "static"
    whole: Callable[..., np.ndarray] | None = None
    chained: int = 1
    is_known_free: bool = False
    is_one_pass: bool = False
    is_held_out: bool = False

    def make_inputs(self, settings: Settings) -> tuple[Any, ...]:
        """Return the inputs at the size of ``settings``."""
        quick = max(QUICK_LEAST, self.n_items // QUICK_PART)
        tiny = max(TINY_LEAST, self.n_items // TINY_PART)
        return self.make(settings.pick(full=self.n_items, quick=quick, tiny=tiny))

    def is_asked_for(self, word: str | None) -> bool:
        """Return whether the name or the group has this word; None asks for all."""
        return word is None or word in self.name or word in self.group


# Inputs of arrays


def make_floats(n: int, *shape: int, count: int = 1) -> tuple[np.ndarray, ...]:
    """Return ``count`` arrays of ``n`` items, each of this shape."""
    rng = np.random.default_rng(0)
    return tuple(rng.random((n, *shape)) for _ in range(count))


def make_even(n: int, cost: int) -> tuple[np.ndarray]:
    """Return equal costs."""
    return (np.full(n, cost),)


def make_rising(n: int, cost: int) -> tuple[np.ndarray]:
    """Return costs that rise with the position from almost 0 to ``cost``."""
    return (np.linspace(1, cost, n).astype(int),)


def make_falling(n: int, cost: int) -> tuple[np.ndarray]:
    """Return the same costs the other way round."""
    return (make_rising(n, cost)[0][::-1].copy(),)


def make_heavy_tailed(n: int, cost: int) -> tuple[np.ndarray]:
    """Return costs of which few make up much: Pareto's, from ``cost`` on, cut at 200 times it."""
    tail = np.random.default_rng(2).pareto(1.2, n)
    return ((cost * np.minimum(1 + tail, 200)).astype(int),)


def make_one_slow(n: int, cost: int, *, where: int) -> tuple[np.ndarray]:
    """Return equal costs, but for one item, which costs half as much as all others together."""
    costs = np.full(n, cost)
    costs[where] = n * cost // 2
    return (costs,)


def make_changing(n: int, cost: int, *, factor: int) -> tuple[np.ndarray]:
    """Return equal costs that are ``factor`` times as large from the middle on."""
    costs = np.full(n, cost)
    costs[n // 2 :] *= factor
    return (costs,)


def make_seconds(n: int, seconds: float) -> tuple[np.ndarray]:
    """Return equal times to sleep."""
    return (np.full(n, seconds),)


# Inputs of lists and fits


def make_list(n: int, make: Callable[[int], tuple[np.ndarray]]) -> tuple[list[Any]]:
    """Return what ``make`` returns as a list of Python numbers."""
    return (make(n)[0].tolist(),)


def make_range(n: int) -> tuple[list[int]]:
    """Return the first integers."""
    return (list(range(n)),)


def make_fits(n: int, drawn: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the bootstrap rows of each fit, and the data of all."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=(20_000, 20))
    y = X @ rng.normal(size=20) + rng.normal(size=len(X))
    return [rng.integers(len(X), size=drawn) for _ in range(n)], X, y


def _choose_estimator() -> Any:
    try:
        from sklearn.linear_model import Ridge
    except ImportError:
        return LeastSquares()
    return Ridge()


def list_workloads() -> list[Workload]:
    """Return the whole table."""
    return [*_light(), *_heavy(), *_python(), *_sleeping(), *_compiled(), *_lists(), *_others()]


def _light() -> list[Workload]:
    light = partial(Workload, group="numpy light")
    memory = partial(Workload, group="numpy memory", is_one_pass=True)
    pair = partial(make_floats, count=2)
    return [
        light(name="sqrt 1 KB", func=root, make=make_floats, n_items=128),
        light(
            name="np.sqrt 100 KB",
            func=np.sqrt,
            make=make_floats,
            n_items=12_800,
            is_known_free=True,
        ),
        light(name="sqrt 200 KB", func=root, make=make_floats, n_items=25_600, is_held_out=True),
        light(name="sqrt * sin 64 KB", func=sqrt_sin, make=make_floats, n_items=8_192),
        light(name="sqrt * sin 1 MB", func=sqrt_sin, make=make_floats, n_items=2**17),
        light(
            name="sqrt * sin 8 MB", func=sqrt_sin, make=make_floats, n_items=2**20, is_held_out=True
        ),
        light(name="sqrt * sin 64 MB", func=sqrt_sin, make=make_floats, n_items=2**23),
        memory(name="add 2 x 128 KB", func=add, make=pair, n_items=2**14, is_held_out=True),
        memory(name="add 2 x 1 MB", func=add, make=pair, n_items=2**17),
        memory(name="add 2 x 128 MB", func=add, make=pair, n_items=2**24),
        memory(name="sqrt 256 MB", func=root, make=make_floats, n_items=2**25, is_held_out=True),
        memory(name="cumsum 2 MB", func=accumulate_rows, make=_rows(64), n_items=4_096),
        memory(name="cumsum 64 MB", func=accumulate_rows, make=_rows(1024), n_items=8_192),
    ]


def _rows(*shape: int, count: int = 1) -> Callable[[int], tuple[np.ndarray, ...]]:
    """Return a maker of items of this shape."""
    return lambda n: make_floats(n, *shape, count=count)


def _heavy() -> list[Workload]:
    heavy = partial(Workload, group="numpy heavy")
    pairs_of_8, pairs_of_16 = _rows(8, 8, count=2), _rows(16, 16, count=2)
    return [
        heavy(name="sort 200 x 100", func=sort_rows, make=_rows(100), n_items=200),
        heavy(
            name="sort 100000 x 100",
            func=sort_rows,
            make=_rows(100),
            n_items=100_000,
            is_held_out=True,
        ),
        heavy(name="fft 64 x 256", func=transform_rows, make=_rows(256), n_items=64),
        heavy(name="fft 2000 x 256", func=transform_rows, make=_rows(256), n_items=2_000),
        heavy(
            name="fft 20000 x 256",
            func=transform_rows,
            make=_rows(256),
            n_items=20_000,
            is_held_out=True,
        ),
        heavy(name="svd 60 x 24 x 24", func=decompose, make=_rows(24, 24), n_items=60),
        heavy(name="svd 600 x 24 x 24", func=decompose, make=_rows(24, 24), n_items=600),
        heavy(name="product 200 x 8 x 8", func=multiply, make=pairs_of_8, n_items=200),
        heavy(
            name="product 20000 x 16 x 16",
            func=multiply,
            make=pairs_of_16,
            n_items=20_000,
            is_held_out=True,
        ),
    ]


def _python() -> list[Workload]:
    python = partial(Workload, group="python", func=spin)
    first, last = partial(make_one_slow, where=0), partial(make_one_slow, where=-1)
    change = partial(make_changing, factor=50)
    return [
        python(name="even 64 x 10", make=partial(make_even, cost=10), n_items=64),
        python(
            name="even 200 x 50", make=partial(make_even, cost=50), n_items=200, is_held_out=True
        ),
        python(name="even 2000 x 400", make=partial(make_even, cost=400), n_items=2_000),
        python(name="even 1000 x 5000", make=partial(make_even, cost=5_000), n_items=1_000),
        python(name="rising 600", make=partial(make_rising, cost=2_000), n_items=600),
        python(
            name="rising 4000, dynamic",
            make=partial(make_rising, cost=2_000),
            n_items=4_000,
            balance="dynamic",
            is_held_out=True,
        ),
        python(name="falling 2000", make=partial(make_falling, cost=4_000), n_items=2_000),
        python(
            name="heavy tail 500",
            make=partial(make_heavy_tailed, cost=50),
            n_items=500,
            is_held_out=True,
        ),
        python(
            name="heavy tail 5000, dynamic",
            make=partial(make_heavy_tailed, cost=100),
            n_items=5_000,
            balance="dynamic",
        ),
        python(name="first slow 1000", make=partial(first, cost=1_000), n_items=1_000),
        python(
            name="last slow 1000", make=partial(last, cost=1_000), n_items=1_000, is_held_out=True
        ),
        python(name="changing 1000", make=partial(change, cost=80), n_items=1_000),
        python(name="changing 64", make=partial(change, cost=80), n_items=64, is_held_out=True),
    ]


def _sleeping() -> list[Workload]:
    sleeping = partial(Workload, group="sleeping")
    return [
        sleeping(
            name="sleep 64 x 0.1 ms",
            func=sleep_each,
            make=partial(make_seconds, seconds=1e-4),
            n_items=64,
        ),
        sleeping(
            name="sleep list 40 x 10 ms",
            func=sleep_item,
            make=partial(make_list, make=partial(make_seconds, seconds=0.01)),
            n_items=40,
            verb="map",
            is_held_out=True,
        ),
    ]


def _compiled() -> list[Workload]:
    compiled = partial(
        Workload,
        group="numba",
        func=steps,
        whole=steps_serial,
        verb="map_items",
        is_known_free=True,
    )
    return [
        compiled(name="kernel 2000 x 8", make=partial(make_even, cost=8), n_items=2_000),
        compiled(name="kernel 200000 x 400", make=partial(make_even, cost=400), n_items=200_000),
        compiled(
            name="kernel rising 10000",
            make=partial(make_rising, cost=1_000),
            n_items=10_000,
            is_held_out=True,
        ),
    ]


def _lists() -> list[Workload]:
    lists = partial(Workload, group="lists", verb="map")
    stream = partial(Workload, group="imap", verb="imap")
    even = partial(make_list, make=partial(make_even, cost=20_000))
    return [
        lists(name="list 100 light", func=square_plus_one, make=make_range, n_items=100),
        lists(name="list 20000 light", func=square_plus_one, make=make_range, n_items=20_000),
        lists(
            name="list 100 x 500",
            func=spin_item,
            make=partial(make_list, make=partial(make_even, cost=500)),
            n_items=100,
        ),
        lists(name="list 200 x 20000", func=spin_item, make=even, n_items=200, is_held_out=True),
        stream(
            name="imap 2000 light",
            func=square_plus_one,
            make=make_range,
            n_items=2_000,
            is_held_out=True,
        ),
        stream(name="imap 100 x 20000", func=spin_item, make=even, n_items=100),
    ]


def _others() -> list[Workload]:
    estimator = _choose_estimator()
    kind = type(estimator).__name__
    fits = partial(Workload, group="fits", func=estimator, verb="fit_many")
    chain = partial(Workload, group="chained", func=soften, make=make_floats, chained=4)
    rows = partial(make_fits, drawn=500)
    return [
        fits(name=f"20 {kind}", make=rows, n_items=20),
        fits(name=f"400 {kind}", make=rows, n_items=400, is_held_out=True),
        chain(name="four maps 1 MB", n_items=2**17),
        chain(name="four maps 32 MB", n_items=2**22, is_held_out=True),
    ]

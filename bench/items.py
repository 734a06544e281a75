"""A trivial Python function called once for each of many items: what one call costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

import taskcarrier
from bench import ours
from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare

N_JOBS = 2
SERIAL = "serial, [f(x) for x in X]"
CEILING = "the calls alone, two processes"
BEST_OF_OURS = "ours dynamic, mapper"


def increased(x: Any) -> Any:
    """Add one, as little as a function can do."""
    return x + 1.0


def only_called(chunk: np.ndarray) -> None:
    """Make the calls alone: the best that two processes can do on this machine."""
    for x in chunk:
        increased(x)


def run(settings: Settings) -> list[Comparison]:
    """Measure `map_items` in processes against list comprehensions."""
    X = np.random.default_rng(0).random(settings.pick(full=10**7, quick=10**6, tiny=10**3))
    with ExitStack() as stack:
        arms = [
            Arm(SERIAL, partial(_serial, lambda: X)),
            Arm("serial, [f(x) for x in X.tolist()]", partial(_serial, X.tolist)),
        ]
        promises = []
        for balance in ours.BALANCES:
            function = partial(
                taskcarrier.map_items, balance=balance, n_jobs=N_JOBS, backend="loky"
            )
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            for how, verb in (("function", function), ("mapper", mapper.map_items)):
                name = f"ours {balance}, {how}"
                arms.append(Arm(name, partial(verb, increased, X)))
                promises.append(Promise(SERIAL, name, required=1.7, aim=1.9))
        calls = partial(
            mapper.map_chunks,
            only_called,
            X,
            chunksize=settings.pick(full=10**4, quick=10**3, tiny=10),
        )
        arms.append(Arm(CEILING, partial(_without_answer, calls, X)))
        return [
            compare(
                f"items: {len(X):,} calls of a function that adds 1.0, loky, {N_JOBS} jobs",
                arms,
                rounds=settings.turns(full=5, quick=3),
                reference=BEST_OF_OURS,
                promises=promises,
                notes=[
                    "serial arms end with a list; making an array of it is not in their time",
                    f"{CEILING!r} keeps no result: its answer is NumPy's, outside the time",
                ],
            )
        ]


def _serial(items: Callable[[], Iterable[Any]]) -> Measured:
    begin = time.perf_counter()
    values = [increased(x) for x in items()]
    seconds = time.perf_counter() - begin
    return Measured(seconds, np.array(values))


def _without_answer(calls: Callable[[], object], X: np.ndarray) -> Measured:
    begin = time.perf_counter()
    calls()
    seconds = time.perf_counter() - begin
    return Measured(seconds, X + 1.0)

"""The default call, which names no backend, against every way that a user could have chosen.

All arms have one BLAS thread: the library's workers have no more, so plain calls get no more
either, and what is compared is the choice of a backend, not BLAS's own threads. Workers are warm.

- ``plain``: the function on the whole array, or ``[func(x) for x in items]``
- ``loop``: the function on the chunks of the library's grid, and ``np.concatenate``; for lists and
  fits the plain call again, which is that loop already
- ``default``: two jobs and no backend; ``auto``: ``backend="auto"``
- ``sequential``, ``threading``, ``loky``: these backends
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import taskcarrier
from bench import ours
from bench.overview import Judged, Overview
from bench.timing import Arm, Measured, Settings, compare, timed
from bench.workloads import Workload, list_workloads
from taskcarrier.scheduling.grid import chunk_grid, item_grid

N_JOBS = 2
EXPLICIT = ("sequential", "threading", "loky")
WARM_CALLS = 2
# A sample takes at least this long, but is of no more calls than this.
SAMPLE_SECONDS, MOST_CALLS = 2e-3, 100
# From this many seconds of the plain call on there are fewer rounds.
SLOW = 0.15


def run(settings: Settings) -> list[Overview]:
    """Measure every workload by itself, then put all together."""
    workloads = [w for w in list_workloads() if w.is_asked_for(settings.only)]
    if not workloads:
        raise SystemExit(f"defaults: no workload has {settings.only!r} in its name or group")
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        for backend in ("threading", "loky"):  # their idle workers are kept
            ours.warm_mapper(stack, "static", N_JOBS, backend)
        rows = [_judge(settings, workload) for workload in workloads]
        return [Overview(rows, is_part=settings.only is not None)]


def _judge(settings: Settings, workload: Workload) -> Judged:
    inputs = workload.make_inputs(settings)
    calls = list_calls(workload, inputs)
    for call in calls.values():
        for _ in range(WARM_CALLS):
            call()
    seconds = _time(calls["plain"])
    most = settings.pick(full=MOST_CALLS, quick=10, tiny=1)
    repeats = min(most, math.ceil(SAMPLE_SECONDS / seconds))
    arms = [Arm(name, _make_sample(call, repeats)) for name, call in calls.items()]
    rounds = settings.turns(full=5 if seconds >= SLOW else 11, quick=3)
    notes = [f"{repeats} calls a sample"] if repeats > 1 else []
    return Judged(workload, compare(workload.name, arms, rounds=rounds, notes=notes))


def _time(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _make_sample(call: Callable[[], Any], repeats: int) -> Callable[[], Measured]:
    """Make an arm of some calls: seconds of one, and the last answer in a form to be compared."""

    def run_all() -> Any:
        for _ in range(repeats - 1):
            call()
        return call()

    def run() -> Measured:
        sample = timed(run_all, _to_comparable)()
        return Measured(sample.amount / repeats, sample.answer)

    return run


def _to_comparable(answer: Any) -> Any:
    """Return the numbers of fitted estimators, and any other answer as it is."""
    if isinstance(answer, list) and hasattr(answer[0], "coef_"):
        return np.array([[*one.coef_, one.intercept_] for one in answer])
    return answer


# The calls of a workload, by arm


def list_calls(workload: Workload, inputs: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """Return the call of each arm."""
    options: dict[str, dict[str, str]] = {"default": {}}
    options |= {backend: {"backend": backend} for backend in ("auto", *EXPLICIT)}
    plain = _list_plain_calls(workload, inputs)
    return plain | {name: _our_call(workload, inputs, **given) for name, given in options.items()}


def _list_plain_calls(workload: Workload, inputs: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    func = workload.func
    if workload.verb == "fit_many":
        rows, X, y = inputs
        fit = partial(_fit_all, func, rows, X, y)
        return {"plain": fit, "loop": fit}
    if workload.verb in {"map", "imap"}:
        (items,) = inputs

        def run_list() -> list[Any]:
            return [func(item) for item in items]

        return {"plain": run_list, "loop": run_list}
    whole = workload.whole or func
    loop = partial(_run_chunks, whole, workload.verb == "map_items")
    chained = partial(_chain, workload.chained)
    return {"plain": partial(chained, whole, *inputs), "loop": partial(chained, loop, *inputs)}


def _chain(times: int, call: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Return the result of calls in a row, each over the result of the one before."""
    result = call(*arrays)
    for _ in range(times - 1):
        result = call(result)
    return result


def _run_chunks(func: Callable[..., np.ndarray], by_item: bool, *arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [func(*(array[start:stop] for array in arrays)) for start, stop in _ranges(by_item, arrays)]
    )


def _ranges(by_item: bool, arrays: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the library's grid."""
    n_items = len(arrays[0])
    item_nbytes = sum(array.nbytes for array in arrays) // n_items
    grid = item_grid(n_items) if by_item else chunk_grid(n_items, item_nbytes)
    return map(grid.range_of, range(len(grid)))


def _fit_all(estimator: Any, rows: Sequence[np.ndarray], X: np.ndarray, y: np.ndarray) -> list[Any]:
    return [type(estimator)().fit(X[some], y[some]) for some in rows]


def _our_call(workload: Workload, inputs: tuple[Any, ...], **given: str) -> Callable[[], Any]:
    """Return the library's call: a function, or the method of a mapper where there is none."""
    if workload.verb in {"map", "imap"}:
        mapper = ours.MAPPERS[workload.balance](N_JOBS, **given)
        if workload.verb == "map":
            return partial(mapper.map, workload.func, *inputs)
        return lambda: list(mapper.imap(workload.func, *inputs))
    options = {"n_jobs": N_JOBS, "balance": workload.balance, **given}
    if workload.verb == "fit_many":
        rows, X, y = inputs
        return partial(taskcarrier.fit_many, workload.func, X, y, rows=rows, **options)
    verb = partial(getattr(taskcarrier, workload.verb), workload.func, **options)
    return partial(_chain, workload.chained, verb, *inputs)

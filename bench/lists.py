"""Lists of light items: what mapping a small function costs, and what dynamic balance adds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

from joblib import Parallel, delayed

from bench import ours
from bench.timing import Arm, Comparison, Promise, Settings, compare, repeated
from bench.work import light, square_plus_one

N_JOBS = 2
POOL, JOBLIB, MPIRE = "multiprocessing.Pool.map", "joblib loky", "mpire"

Map: TypeAlias = Callable[[Callable[[Any], Any], list[Any]], list[Any]]


def run(settings: Settings) -> list[Comparison]:
    """Measure both balances against the maps of others, then against each other."""
    return [_light_items(settings), _one_by_one(settings)]


def _light_items(settings: Settings) -> Comparison:
    items = list(range(settings.pick(full=20_000, quick=2_000, tiny=50)))
    our_calls = settings.pick(full=25, quick=10, tiny=2)
    # joblib and mpire take tens of times as long.
    calls = {POOL: our_calls, JOBLIB: 1, MPIRE: settings.pick(full=3, quick=3, tiny=1)}
    with ExitStack() as stack:
        theirs, absent = _peers(stack, items)
        arms = [
            Arm(name, repeated(partial(apply, square_plus_one, items), calls[name]))
            for name, apply in theirs.items()
        ]
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            call = partial(mapper.map, square_plus_one, items)
            arms.append(Arm(f"ours {balance}", repeated(call, our_calls)))
        return compare(
            f"lists: {len(items):,} calls of a function of an int, loky, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=11, quick=3),
            reference="ours dynamic",
            promises=[
                Promise(POOL, "ours static", required=1.0, aim=1.5),
                Promise(POOL, "ours dynamic", required=1.0, aim=1.2),
                Promise(JOBLIB, "ours dynamic", required=10, aim=20),
                Promise(MPIRE, "ours dynamic", required=20, aim=40),
            ],
            notes=absent,
        )


def _one_by_one(settings: Settings) -> Comparison:
    items = list(range(settings.pick(full=4_000, quick=400, tiny=10)))
    with ExitStack() as stack:
        arms = []
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky", chunksize=1)
            arms.append(Arm(balance, partial(mapper.map, light, items)))
        promise = Promise(
            "dynamic",
            "static",
            required=10,
            aim=3,
            at_most=True,
            scale=1e6 / len(items),
            difference=True,
            label="dynamic - static, µs an item",
        )
        return compare(
            f"lists: {len(items):,} items that sleep 0.1 ms, one a range, loky, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=15, quick=3),
            reference="static",
            promises=[promise],
        )


@contextmanager
def _multiprocessing() -> Iterator[Map]:
    with multiprocessing.Pool(N_JOBS) as pool:
        yield pool.map


@contextmanager
def _mpire() -> Iterator[Map]:
    from mpire import WorkerPool

    with WorkerPool(n_jobs=N_JOBS, keep_alive=True) as pool:
        yield pool.map


@contextmanager
def _joblib() -> Iterator[Map]:
    with Parallel(n_jobs=N_JOBS) as parallel:

        def apply(func: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
            return parallel(delayed(func)(item) for item in items)

        yield apply


# Forking pools first: they must not inherit what the others start.
PEERS: dict[str, Callable[[], AbstractContextManager[Map]]] = {
    POOL: _multiprocessing,
    MPIRE: _mpire,
    JOBLIB: _joblib,
}


def _peers(stack: ExitStack, items: list[int]) -> tuple[dict[str, Map], list[str]]:
    """Return the maps of other packages, their workers started, and which are absent."""
    opened: dict[str, Map] = {}
    absent = []
    for name, peer in PEERS.items():
        try:
            opened[name] = stack.enter_context(peer())
        except ImportError as error:
            absent.append(f"{name}: not installed ({error.name}), left out")
        else:
            opened[name](square_plus_one, items)
    return opened, absent

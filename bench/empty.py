"""A function that does nothing, on 2 KB: what a call costs by itself.

Two tables have many calls in a row of each arm. In the third the arms take turns after each single
call, so that none finds its code and data in the caches, as in a program that does other things.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from bench import ours
from bench.peers import PROCESSES, THREADS, Apply, open_peers
from bench.timing import Arm, Comparison, Promise, Settings, compare, repeated
from bench.work import identity
from taskcarrier.scheduling.grid import chunk_grid

N_JOBS = 2
EXECUTORS = ("concurrent.futures threads", "concurrent.futures processes")
LOOP = "loop over the chunks"
THREAD_PEERS = tuple(name for name in THREADS if not name.endswith("fine"))


def run(settings: Settings) -> list[Comparison]:
    """Measure a warm mapper against two empty tasks on every peer's warm pool."""
    return [
        _study(settings, "threading", THREAD_PEERS, "joblib threads", required=25, aim=60),
        _study(settings, "loky", PROCESSES, "joblib loky", required=8, aim=12),
        _single_calls(settings),
    ]


def _study(
    settings: Settings,
    backend: str,
    peers: tuple[str, ...],
    rival: str,
    *,
    required: float,
    aim: float,
) -> Comparison:
    X = np.random.default_rng(0).random((64, 4))
    ours_calls = settings.pick(full=300, quick=60, tiny=2)
    their_calls = settings.pick(full=25, quick=8, tiny=2)
    with ExitStack() as stack:
        theirs, absent = open_peers(stack, peers, N_JOBS, identity, X)
        mappers = {f"ours {b}": ours.warm_mapper(stack, b, N_JOBS, backend) for b in ours.BALANCES}
        arms = [Arm("plain call", repeated(partial(identity, X), ours_calls))]
        arms += [_arm(name, m.map_array, X, ours_calls) for name, m in mappers.items()]
        arms += [_arm(name, apply, X, their_calls) for name, apply in theirs.items()]
        return compare(
            f"empty: a 64x4 float array that comes back unchanged, {backend}, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=11, quick=5),
            reference="ours static",
            promises=[Promise(rival, name, required=required, aim=aim) for name in mappers],
            notes=[*absent, *(_participation(n, m, X, ours_calls) for n, m in mappers.items())],
        )


def _single_calls(settings: Settings) -> Comparison:
    X = np.random.default_rng(0).random((64, 4))
    backends = {"default": None, **{name: name for name in ("sequential", "threading", "loky")}}
    with ExitStack() as stack:
        theirs, _ = open_peers(stack, EXECUTORS, N_JOBS, identity, X)
        for backend in ("threading", "loky"):  # their idle workers are kept
            ours.warm_mapper(stack, "static", N_JOBS, backend)
        applies = {
            f"ours {name}": ours.function("static", N_JOBS, backend)
            for name, backend in backends.items()
        }
        arms = [Arm("plain call", partial(identity, X)), Arm(LOOP, partial(_run_chunks, X))]
        arms += [Arm(n, partial(apply, identity, X)) for n, apply in (applies | theirs).items()]
        for arm in arms:
            arm.run()
        return compare(
            f"empty: a 64x4 float array that comes back unchanged, single calls, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=301, quick=31),
            reference=LOOP,
            promises=[
                Promise(
                    "ours sequential",
                    LOOP,
                    required=60,
                    aim=30,
                    at_most=True,
                    scale=1e6,
                    label="ours sequential - loop, µs",
                    difference=True,
                ),
                Promise("ours threading", EXECUTORS[0], required=1.2, aim=1.0, at_most=True),
                Promise("ours loky", EXECUTORS[1], required=1.2, aim=1.0, at_most=True),
            ],
        )


def _run_chunks(X: np.ndarray) -> np.ndarray:
    grid = chunk_grid(len(X), X.nbytes // len(X))
    ranges = map(grid.range_of, range(len(grid)))
    return np.concatenate([identity(X[start:stop]) for start, stop in ranges])


def _arm(name: str, apply: Apply, X: np.ndarray, calls: int) -> Arm:
    return Arm(name, repeated(partial(apply, identity, X), calls))


def _participation(name: str, mapper: Any, X: np.ndarray, calls: int) -> str:
    """Count how many workers really took a range, over some further calls."""
    seen: Counter[int] = Counter()
    for _ in range(calls):
        mapper.map_array(identity, X)
        seen[sum(worker.ranges > 0 for worker in mapper.report.workers)] += 1
    shares = ", ".join(f"{n} in {100 * count / calls:.0f} %" for n, count in sorted(seen.items()))
    return f"{name}: {mapper.report.ranges} ranges; workers that took part: {shares} of the calls"

"""A function that does nothing, on 2 KB: what a call costs by itself."""

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

N_JOBS = 2
THREAD_PEERS = tuple(name for name in THREADS if not name.endswith("fine"))


def run(settings: Settings) -> list[Comparison]:
    """Measure a warm mapper against two empty tasks on every peer's warm pool."""
    return [
        _study(settings, "threading", THREAD_PEERS, "joblib threads", required=25, aim=60),
        _study(settings, "loky", PROCESSES, "joblib loky", required=8, aim=12),
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

"""Cheap arithmetic over a large array: the cost of taking data to workers and results back."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from bench import ours
from bench.peers import PROCESSES, THREADS, Apply, DaskThreads, open_peers
from bench.timing import Arm, Comparison, Promise, Settings, compare
from bench.work import sqrt_sin

N_JOBS = 2
BEST_OF_OURS = "ours dynamic, mapper"


def run(settings: Settings) -> list[Comparison]:
    """Measure processes and threads, each against the peers of their kind."""
    X = np.random.default_rng(0).random(settings.pick(full=2**25, quick=2**21, tiny=2**10)) * 100
    return [_processes(X, settings), _threads(X, settings)]


def _processes(X: np.ndarray, settings: Settings) -> Comparison:
    promises = [
        Promise("joblib loky", f"ours {balance}, {how}", required=4, aim=7)
        for balance in ours.BALANCES
        for how in ("function", "mapper")
    ]
    return _study(X, settings.turns(full=5, quick=3), "loky", PROCESSES, promises)


def _threads(X: np.ndarray, settings: Settings) -> Comparison:
    promises = [
        Promise("dask threads", f"ours {balance}, {how}", required=1.1, aim=1.3)
        for balance in ours.BALANCES
        for how in ("function", "mapper")
    ]
    return _study(X, settings.turns(full=9, quick=5), "threading", THREADS, promises)


def _study(
    X: np.ndarray, rounds: int, backend: str, peers: tuple[str, ...], promises: list[Promise]
) -> Comparison:
    title = f"sqrt_sin: sqrt(c) * sin(c) over {X.nbytes / 2**20:.3g} MiB, {backend}, {N_JOBS} jobs"
    with ExitStack() as stack:
        theirs, absent = open_peers(stack, peers, N_JOBS, sqrt_sin, X[:64])
        applies = {**_ours(stack, backend), **theirs}
        arms = [Arm("plain NumPy", partial(sqrt_sin, X))]
        arms += [Arm(name, partial(apply, sqrt_sin, X)) for name, apply in applies.items()]
        found = compare(
            title, arms, rounds=rounds, reference=BEST_OF_OURS, promises=promises, notes=absent
        )
    for apply in theirs.values():
        if isinstance(apply, DaskThreads):
            block = X.itemsize * apply.rows[X.shape] / 2**20
            found.notes.append(f"dask threads: blocks of {block:.3g} MiB were the fastest")
    return found


def _ours(stack: ExitStack, backend: str) -> dict[str, Apply]:
    arms: dict[str, Apply] = {}
    for balance in ours.BALANCES:
        arms[f"ours {balance}, function"] = ours.function(balance, N_JOBS, backend)
        mapper = ours.warm_mapper(stack, balance, N_JOBS, backend)
        arms[f"ours {balance}, mapper"] = mapper.map_array
    return arms

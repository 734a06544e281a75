"""Work that grows along the array: how close dynamic balancing comes to a perfect split."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from bench import ours
from bench.timing import Arm, Comparison, Promise, Settings, compare
from bench.work import spin

N_JOBS = 2
RANGES = 400
BY_HAND = "two halves of equal work, cut by hand"


def run(settings: Settings) -> list[Comparison]:
    """Measure serial, static and dynamic, and two bare processes with a hand-made fair cut.

    The fair cut knows the work beforehand; it shows what this machine's second core is worth.
    """
    counts = np.arange(1, RANGES + 1) * settings.pick(full=300, quick=40, tiny=1)
    mappers: dict[str, Any] = {}
    with ExitStack() as stack:
        executor = stack.enter_context(ProcessPoolExecutor(N_JOBS))
        arms = [
            Arm("serial", partial(spin, counts)),
            Arm(BY_HAND, partial(_by_hand, executor, counts)),
        ]
        arms[1].run()  # starts its processes before ours exist
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            arms.append(Arm(balance, partial(mapper.map_array, spin, counts, chunksize=1)))
            mappers[balance] = mapper
        found = compare(
            f"triangular: {RANGES} ranges, range i has work proportional to i, loky, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=9, quick=3),
            reference="dynamic",
            promises=[_share("dynamic")],
        )
    for name in ("static", BY_HAND):
        share = found.ratio("serial", name, scale=1 / N_JOBS)
        found.notes.append(f"share of the ideal, {name}: {share}")
    for name, mapper in mappers.items():
        found.notes.append(f"idle share of the workers' time, {name}: {_idle(mapper.report):.3f}")
    return [found]


def _idle(report: Any) -> float:
    """Return the share of time that the last run's workers waited; other load changes it little."""
    idle = sum(worker.idle for worker in report.workers)
    return idle / (idle + sum(worker.busy for worker in report.workers))


def _share(arm: str) -> Promise:
    label = f"share of the ideal, {arm}: (serial / {N_JOBS}) / {arm}"
    return Promise("serial", arm, required=0.93, aim=0.97, scale=1 / N_JOBS, label=label)


def _by_hand(executor: ProcessPoolExecutor, counts: np.ndarray) -> np.ndarray:
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / N_JOBS))
    return np.concatenate(list(executor.map(spin, [counts[:middle], counts[middle:]])))

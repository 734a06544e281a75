"""Ranges of equal work: the cost of taking ranges one by one instead of having them assigned."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from bench import ours
from bench.timing import Arm, Comparison, Promise, Settings, compare
from bench.work import spin

N_JOBS = 2
RANGES = 400


def run(settings: Settings) -> list[Comparison]:
    """Measure dynamic against static on even pure Python work, one item a range."""
    counts = np.full(RANGES, settings.pick(full=50_000, quick=5_000, tiny=10))
    with ExitStack() as stack:
        arms = [Arm("serial", partial(spin, counts))]
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            arms.append(Arm(balance, partial(mapper.map_array, spin, counts, chunksize=1)))
        return [
            compare(
                f"even: {RANGES} ranges of {counts[0]} Python steps each, loky, {N_JOBS} jobs",
                arms,
                rounds=settings.turns(full=11, quick=3),
                reference="static",
                promises=[Promise("dynamic", "static", required=1.05, aim=1.02, at_most=True)],
            )
        ]

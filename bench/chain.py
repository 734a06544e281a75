"""Four light maps in a row, each result being the next input."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from bench import ours
from bench.peers import Apply, Func, open_peers
from bench.timing import Arm, Comparison, Promise, Settings, compare

N_JOBS = 2
RIVAL = "joblib loky"
BEST_OF_OURS = "ours dynamic, mapper"


def doubled(chunk: np.ndarray) -> np.ndarray:
    """First step."""
    return chunk * 2


def increased(chunk: np.ndarray) -> np.ndarray:
    """Second step."""
    return chunk + 1


def rooted(chunk: np.ndarray) -> np.ndarray:
    """Third step."""
    return np.sqrt(chunk)


def lowered(chunk: np.ndarray) -> np.ndarray:
    """Last step."""
    return chunk - 0.5


STEPS = (doubled, increased, rooted, lowered)


def run(settings: Settings) -> list[Comparison]:
    """Measure the chain in processes, every step a map of its own over the result before it."""
    X = np.random.default_rng(0).random(settings.pick(full=2**25, quick=2**21, tiny=2**10))
    with ExitStack() as stack:
        theirs, absent = open_peers(stack, [RIVAL], N_JOBS, doubled, X[:64])
        applies: dict[str, Apply] = {}
        for balance in ours.BALANCES:
            applies[f"ours {balance}, function"] = ours.function(balance, N_JOBS, "loky")
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            applies[f"ours {balance}, mapper"] = mapper.map_array
        promises = [Promise(RIVAL, name, required=6, aim=9) for name in applies]
        arms = [Arm("plain NumPy", partial(chained, _plain, X))]
        arms += [Arm(name, partial(chained, a, X)) for name, a in {**applies, **theirs}.items()]
        return [
            compare(
                f"chain: c * 2, c + 1, sqrt(c), c - 0.5, one map after the other, over "
                f"{X.nbytes / 2**20:.3g} MiB, loky, {N_JOBS} jobs",
                arms,
                rounds=settings.turns(full=5, quick=3),
                reference=BEST_OF_OURS,
                promises=promises,
                notes=absent,
            )
        ]


def chained(apply: Apply, X: np.ndarray) -> np.ndarray:
    """Apply every step; each intermediate result is dropped as soon as the next one exists."""
    for step in STEPS:
        X = apply(step, X)
    return X


def _plain(func: Func, X: np.ndarray) -> np.ndarray:
    return func(X)

"""Many small fits on bootstrap rows of the same data: the cost of bringing them to the workers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

import taskcarrier
from bench import ours
from bench.timing import Arm, Comparison, Promise, Settings, compare, timed
from bench.work import normal_equations, ridge_fit

N_JOBS = 2
DRAWN = 500
SERIAL, JOBLIB = "serial", "joblib idiom"
BEST_OF_OURS = "ours dynamic"

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


def run(settings: Settings) -> list[Comparison]:
    """Measure `fit_many`, and a mapper with ``shared=``, against one joblib task for each fit."""
    try:
        import sklearn.linear_model  # noqa: F401  # ridge_fit needs it
    except ImportError:
        print("fits: scikit-learn is not installed, left out")
        return []
    rng = np.random.default_rng(0)
    n = settings.pick(full=20_000, quick=20_000, tiny=600)
    X = rng.normal(size=(n, 20))
    y = X @ rng.normal(size=20) + rng.normal(size=n)
    # One inner thread, as workers have, joblib's too.
    with threadpool_limits(1):
        return [_ridge(settings, X, y), _equations(settings, X, y)]


def _ridge(settings: Settings, X: np.ndarray, y: np.ndarray) -> Comparison:
    from sklearn.linear_model import Ridge

    rows = _bootstraps(settings.pick(full=2_000, quick=200, tiny=4), len(X))
    many = partial(taskcarrier.fit_many, Ridge(), X, y, rows=rows, n_jobs=N_JOBS, backend="loky")
    share = f"share of the ideal: (serial / {N_JOBS}) / {BEST_OF_OURS}"
    with ExitStack() as stack:
        calls = _others(stack, ridge_fit, rows, X, y)
        calls |= {f"ours {b}": partial(many, balance=b) for b in ours.BALANCES}
        return compare(
            f"fits: {len(rows):,} ridge regressions, each on {DRAWN} rows of {len(X):,} x "
            f"{X.shape[1]}, loky, {N_JOBS} jobs",
            [Arm(name, timed(call, _numbers)) for name, call in calls.items()],
            rounds=settings.turns(full=7, quick=3),
            reference=BEST_OF_OURS,
            promises=[
                Promise(SERIAL, BEST_OF_OURS, 0.94, 0.98, scale=1 / N_JOBS, label=share),
                Promise(JOBLIB, BEST_OF_OURS, required=1.05, aim=1.1),
            ],
        )


def _equations(settings: Settings, X: np.ndarray, y: np.ndarray) -> Comparison:
    rows = _bootstraps(settings.pick(full=5_000, quick=500, tiny=4), len(X))
    shared = {"X": X, "y": y}
    with ExitStack() as stack:
        calls = _others(stack, normal_equations, rows, X, y)
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            calls[f"ours {balance}"] = partial(mapper.map, normal_equations, rows, shared=shared)
        return compare(
            f"fits: {len(rows):,} normal equations, each on {DRAWN} rows of {len(X):,} x "
            f"{X.shape[1]}, loky, {N_JOBS} jobs",
            [Arm(name, timed(call, np.array)) for name, call in calls.items()],
            rounds=settings.turns(full=7, quick=3),
            reference=BEST_OF_OURS,
            promises=[
                Promise(JOBLIB, f"ours {balance}", required=1.5, aim=2) for balance in ours.BALANCES
            ],
        )


def _bootstraps(n_fits: int, n_samples: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(n_samples, size=DRAWN) for _ in range(n_fits)]


def _others(
    stack: ExitStack, fit: Fit, rows: list[np.ndarray], X: np.ndarray, y: np.ndarray
) -> dict[str, Callable[[], list[Any]]]:
    """Return the list comprehension and the joblib idiom, whose workers are kept."""
    parallel = stack.enter_context(Parallel(n_jobs=N_JOBS))
    return {
        SERIAL: lambda: [fit(some, X, y) for some in rows],
        JOBLIB: lambda: parallel(delayed(fit)(some, X, y) for some in rows),
    }


def _numbers(fitted: list[Any]) -> np.ndarray:
    return np.array([[*one.coef_, one.intercept_] for one in fitted])

"""A random forest: fits of its trees, and its predictions, against scikit-learn's own ways."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from joblib import Parallel, delayed

import taskcarrier
from bench.peers import cut
from bench.timing import Arm, Comparison, Promise, Settings, compare, timed

N_JOBS = 2
COLUMNS = 20
OWN = "scikit-learn's forest"
OURS = "ours"
IDIOMS = {"joblib idiom, threads": "threading", "joblib idiom, processes": "loky"}


def run(settings: Settings) -> list[Comparison]:
    """Measure `fit_many` and `predict_array`, which choose threads for trees by themselves."""
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError:
        print("forest: scikit-learn is not installed, left out")
        return []
    n_trees = settings.pick(full=100, quick=10, tiny=4)
    X, y = _data(settings.pick(full=50_000, quick=10_000, tiny=200))
    forest = RandomForestClassifier(n_trees, random_state=0, n_jobs=N_JOBS).fit(X, y)
    asked, _ = _data(settings.pick(full=400_000, quick=40_000, tiny=300))
    return [_fitting(settings, forest, X, y), _asking(settings, forest, asked)]


def _data(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, COLUMNS)).astype(np.float32)  # what trees compute with
    y = (X[:, :5].sum(axis=1) + X[:, 5] * X[:, 6] + rng.normal(size=n) > 0).astype(int)
    return X, y


def _fitting(settings: Settings, forest: Any, X: np.ndarray, y: np.ndarray) -> Comparison:
    from sklearn.base import clone

    arms = [
        Arm(OWN, timed(lambda: clone(forest).fit(X, y).estimators_, _trees)),
        Arm(OURS, timed(partial(_fit_many, forest, X, y), _trees)),
    ]
    return compare(
        f"forest: {len(forest.estimators_)} decision trees on {len(X):,} x {COLUMNS}, threads, "
        f"{N_JOBS} jobs",
        arms,
        rounds=settings.turns(full=5, quick=3),
        reference=OURS,
        promises=[Promise(OWN, OURS, required=0.97, aim=1.0)],
        notes=["drawing the rows, as scikit-learn draws them, is in every arm's time"],
    )


def _fit_many(forest: Any, X: np.ndarray, y: np.ndarray) -> list[Any]:
    """Fit the trees of such a forest: it knows their random states and the rows that they drew."""
    counts = [np.bincount(rows, minlength=len(X)) for rows in forest.estimators_samples_]
    trees = forest.estimators_  # `fit_many` clones them
    return taskcarrier.fit_many(trees, X, y, sample_weight=np.array(counts), n_jobs=N_JOBS)


def _trees(fitted: list[Any]) -> np.ndarray:
    """Return features and thresholds of all nodes: what predictions depend on, but for leaves."""
    return np.concatenate([[one.tree_.feature, one.tree_.threshold] for one in fitted], axis=1)


def _asking(settings: Settings, forest: Any, X: np.ndarray) -> Comparison:
    forest.set_params(n_jobs=1)
    with ExitStack() as stack:
        arms = []
        for name, backend in IDIOMS.items():
            parallel = stack.enter_context(Parallel(n_jobs=N_JOBS, backend=backend))
            arms.append(Arm(name, partial(_idiom, parallel, forest, X)))
        call = partial(taskcarrier.predict_array, forest, X, "predict_proba", n_jobs=N_JOBS)
        arms.append(Arm(OURS, call))
        return compare(
            f"forest: probabilities by {len(forest.estimators_)} trees for {len(X):,} rows, "
            f"{N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=5, quick=3),
            reference=OURS,
            promises=[Promise(name, OURS, required=1.0, aim=1.2) for name in IDIOMS],
        )


def _idiom(parallel: Parallel, forest: Any, X: np.ndarray) -> np.ndarray:
    ask = delayed(forest.predict_proba)
    return np.concatenate(parallel(ask(X[rows]) for rows in cut(len(X), N_JOBS)))

"""Sums of squares over shared memory: a reduction that only has to read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

import taskcarrier
from bench import ours
from bench.peers import Func
from bench.timing import Arm, Comparison, Promise, Settings, compare

N_JOBS = 2
COLUMNS = 64
RTOL = 1e-12
PLAIN = "plain NumPy, (X**2).sum(axis=0)"
BEST_OF_OURS = "ours dynamic, mapper"


class Near:
    """Numbers that are equal up to rounding: each way of adding up rounds in its own order."""

    __hash__ = None  # type: ignore[assignment]  # near is not transitive

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Near):
            return NotImplemented
        mine, others = self.values, other.values
        return (
            mine.dtype == others.dtype
            and mine.shape == others.shape
            and bool(np.allclose(mine, others, rtol=RTOL, atol=0))
        )


def squares(rows: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each column, in the usual form."""
    return (rows**2).sum(axis=0)


def squares_einsum(rows: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each column without an array of the squares."""
    return np.einsum("ij,ij->j", rows, rows)


def run(settings: Settings) -> list[Comparison]:
    """Measure `reduce_array` over a shared array; NumPy gets an ordinary one, which suits it."""
    rows = settings.pick(full=2**19, quick=2**15, tiny=2**6)
    X = np.random.default_rng(0).random((rows, COLUMNS))
    shared = taskcarrier.share(X)
    with ExitStack() as stack:
        arms = [
            Arm(PLAIN, partial(_near, squares, X)),
            Arm("plain NumPy, einsum", partial(_near, squares_einsum, X)),
        ]
        promises = []
        for balance in ours.BALANCES:
            function = partial(
                taskcarrier.reduce_array, balance=balance, n_jobs=N_JOBS, backend="loky"
            )
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "loky")
            for how, verb in (("function", function), ("mapper", mapper.reduce_array)):
                name = f"ours {balance}, {how}"
                arms.append(Arm(name, _reducing(verb, squares, shared)))
                promises.append(Promise(PLAIN, name, required=1.7, aim=2.5))
            einsum = _reducing(mapper.reduce_array, squares_einsum, shared)
            arms.append(Arm(f"ours {balance}, mapper, einsum", einsum))
        return [
            compare(
                f"reducing: sums of squares of {COLUMNS} columns, {X.nbytes / 2**20:.3g} MiB that "
                f"are shared already, loky, {N_JOBS} jobs",
                arms,
                rounds=settings.turns(full=9, quick=5),
                reference=BEST_OF_OURS,
                promises=promises,
                notes=[f"answers are equal to {RTOL:g} of their size: sums round by their order"],
            )
        ]


def _reducing(verb: Callable[..., Any], func: Func, shared: np.ndarray) -> Callable[[], Near]:
    return partial(_near, partial(verb, func, combine=operator.add), shared)


def _near(reduction: Callable[[np.ndarray], np.ndarray], X: np.ndarray) -> Near:
    return Near(reduction(X))

"""TaskCarrier's own arms, in the same shape as the peers': ``apply(func, X)``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

import taskcarrier
from bench.peers import Apply, Func

BALANCES = ("static", "dynamic")
MAPPERS: dict[str, Any] = {
    "static": taskcarrier.StaticParallelMapper,
    "dynamic": taskcarrier.DynamicParallelMapper,
}


def function(balance: str, n_jobs: int, backend: str | None, **options: Any) -> Apply:
    """Return a plain call of ``map_array``; its input is an ordinary array every time."""

    def apply(func: Func, X: np.ndarray) -> np.ndarray:
        return taskcarrier.map_array(
            func, X, balance=balance, n_jobs=n_jobs, backend=backend, **options
        )

    return apply


def warm_mapper(stack: ExitStack, balance: str, n_jobs: int, backend: str, **options: Any) -> Any:
    """Return a mapper inside its ``with`` block, which ends with ``stack``."""
    mapper = MAPPERS[balance](n_jobs, backend=backend, **options)
    stack.enter_context(mapper)
    return mapper

"""The functions the benches map. They live here so that worker processes can import them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


def sqrt_sin(chunk: np.ndarray) -> np.ndarray:
    """Apply two ufuncs and a product: cheap arithmetic, so the transport of the data dominates."""
    return np.sqrt(chunk) * np.sin(chunk)


def identity(chunk: np.ndarray) -> np.ndarray:
    """Return the chunk itself: nothing but overhead is left to measure."""
    return chunk


def spin(counts: np.ndarray) -> np.ndarray:
    """Do ``counts[i]`` steps of pure Python arithmetic for item ``i``; the answer proves it."""
    return np.array([_spin(int(count)) for count in counts], dtype=np.int64)


def _spin(count: int) -> int:
    state = count
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    return state


def light(item: int) -> int:
    """Sleep for a tenth of a millisecond."""
    time.sleep(0.0001)
    return item


def heavy(item: int) -> int:
    """Sleep for ten milliseconds."""
    time.sleep(0.01)
    return item


def square_plus_one(x: int) -> int:
    """Return a product and a sum: a call takes hardly a tenth of a microsecond."""
    return x * x + 1


def ridge_fit(rows: np.ndarray, X: np.ndarray, y: np.ndarray) -> Any:
    """Return a ridge regression of scikit-learn, fitted on some rows."""
    from sklearn.linear_model import Ridge

    return Ridge().fit(X[rows], y[rows])


def normal_equations(rows: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the least squares solution on some rows, in the shortest way."""
    A = X[rows]
    return np.linalg.solve(A.T @ A, A.T @ y[rows])


def nearest_rows(rows: np.ndarray, numbers: np.ndarray, everything: np.ndarray, k: int) -> Any:
    """Return the numbers of the ``k`` rows of ``everything`` that are nearest to each of ``rows``.

    ``numbers`` says which rows of ``everything`` the given ``rows`` are; no row is its own
    neighbour. Of equally near rows, the one with the lower number comes first.
    """
    squares = (everything**2).sum(axis=1)
    distances = (rows**2).sum(axis=1)[:, None] + squares - 2.0 * (rows @ everything.T)
    distances[np.arange(len(rows)), numbers] = np.inf
    return np.argsort(distances, axis=1, kind="stable")[:, :k]

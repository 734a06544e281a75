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
    return np.array([spin_item(int(count)) for count in counts], dtype=np.int64)


def spin_item(count: int) -> int:
    """Do ``count`` steps of pure Python arithmetic."""
    state = count
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    return state


def measure_step() -> float:
    """Return the seconds that one step of `spin_item` takes here and now."""
    count = 50_000
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        spin_item(count)
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / count


def root(chunk: np.ndarray) -> np.ndarray:
    """Apply one ufunc, which no library can see from outside."""
    return np.sqrt(chunk)


def add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Add two arrays: hardly more than reading and writing memory."""
    return left + right


def soften(chunk: np.ndarray) -> np.ndarray:
    """Apply one light step, whose result is the input of the next one."""
    return np.sqrt(chunk) + 0.5


def accumulate_rows(rows: np.ndarray) -> np.ndarray:
    """Return the running sums of each row."""
    return np.cumsum(rows, axis=1)


def sort_rows(rows: np.ndarray) -> np.ndarray:
    """Sort each row."""
    return np.sort(rows, axis=1)


def transform_rows(rows: np.ndarray) -> np.ndarray:
    """Return the Fourier transform of each row."""
    return np.fft.fft(rows, axis=1)


def decompose(matrices: np.ndarray) -> np.ndarray:
    """Return the singular values of each matrix."""
    return np.linalg.svd(matrices, compute_uv=False)


def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply matrices pair by pair."""
    return left @ right


def sleep_each(seconds: np.ndarray) -> np.ndarray:
    """Sleep ``seconds[i]`` for item ``i``."""
    return np.array([sleep_item(one) for one in seconds], dtype=np.float64)


def sleep_item(seconds: float) -> float:
    """Sleep for some seconds."""
    time.sleep(seconds)
    return seconds


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


class LeastSquares:
    """An estimator in the style of scikit-learn around the normal equations."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {}

    def fit(self, X: np.ndarray, y: np.ndarray) -> LeastSquares:
        self.coef_ = np.linalg.solve(X.T @ X, X.T @ y)
        self.intercept_ = 0.0
        return self


class Spinner:
    """An estimator whose fit takes ``steps`` steps of pure Python."""

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"steps": self.steps}

    def fit(self, X: np.ndarray, y: Any = None) -> Spinner:
        self.state_ = spin_item(self.steps + len(X))
        return self


def nearest_rows(rows: np.ndarray, numbers: np.ndarray, everything: np.ndarray, k: int) -> Any:
    """Return the numbers of the ``k`` rows of ``everything`` that are nearest to each of ``rows``.

    ``numbers`` says which rows of ``everything`` the given ``rows`` are; no row is its own
    neighbour. Of equally near rows, the one with the lower number comes first.
    """
    squares = (everything**2).sum(axis=1)
    distances = (rows**2).sum(axis=1)[:, None] + squares - 2.0 * (rows @ everything.T)
    distances[np.arange(len(rows)), numbers] = np.inf
    return np.argsort(distances, axis=1, kind="stable")[:, :k]

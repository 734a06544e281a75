"""The packages that users would otherwise use, each in the best form of its documentation.

A peer is a context manager around ``apply(func, X)``, which maps ``func`` over slices of ``X`` and
returns one array. Pools are opened once and kept, so no arm pays for starting its workers.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from joblib import Parallel, delayed

Func: TypeAlias = Callable[[np.ndarray], np.ndarray]
Apply: TypeAlias = Callable[[Func, np.ndarray], np.ndarray]
Peer: TypeAlias = Callable[[int], AbstractContextManager[Apply]]

# Bytes of one dask block that are tried, besides one block per worker; the fastest is measured.
DASK_BLOCKS = (2**20, 2**22, 2**24)
# Slices of the finely cut thread pool, about a megabyte each of the 256 MB study.
FINE = 256


def cut(length: int, parts: int) -> list[slice]:
    """Return near-equal slices of ``range(length)``."""
    bounds = [length * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


@contextmanager
def joblib_idiom(n_jobs: int, backend: str) -> Iterator[Apply]:
    """Slices to ``Parallel`` inside ``with``, results concatenated."""
    with Parallel(n_jobs=n_jobs, backend=backend) as parallel:

        def apply(func: Func, X: np.ndarray) -> np.ndarray:
            return np.concatenate(parallel(delayed(func)(X[s]) for s in cut(len(X), n_jobs)))

        yield apply


def joblib_loky(n_jobs: int) -> AbstractContextManager[Apply]:
    """joblib's worker processes."""
    return joblib_idiom(n_jobs, "loky")


def joblib_threads(n_jobs: int) -> AbstractContextManager[Apply]:
    """joblib's threads."""
    return joblib_idiom(n_jobs, "threading")


@contextmanager
def futures(executor: Executor, parts: int) -> Iterator[Apply]:
    """Slices to an executor of the standard library, results concatenated."""
    with executor:

        def apply(func: Func, X: np.ndarray) -> np.ndarray:
            return np.concatenate(list(executor.map(func, (X[s] for s in cut(len(X), parts)))))

        yield apply


def futures_processes(n_jobs: int) -> AbstractContextManager[Apply]:
    """The standard library's process pool."""
    return futures(ProcessPoolExecutor(n_jobs), n_jobs)


def futures_threads(n_jobs: int) -> AbstractContextManager[Apply]:
    """The standard library's threads."""
    return futures(ThreadPoolExecutor(n_jobs), n_jobs)


def futures_threads_fine(n_jobs: int) -> AbstractContextManager[Apply]:
    """The standard library's threads on many small slices, as a careful user may write it."""
    return futures(ThreadPoolExecutor(n_jobs), FINE)


@contextmanager
def multiprocessing_pool(n_jobs: int) -> Iterator[Apply]:
    """The standard library's older process pool."""
    with multiprocessing.Pool(n_jobs) as pool:

        def apply(func: Func, X: np.ndarray) -> np.ndarray:
            return np.concatenate(pool.map(func, [X[s] for s in cut(len(X), n_jobs)], chunksize=1))

        yield apply


@contextmanager
def mpire_pool(n_jobs: int) -> Iterator[Apply]:
    """mpire cuts and concatenates NumPy arrays by itself."""
    from mpire import WorkerPool

    with WorkerPool(n_jobs=n_jobs, keep_alive=True) as pool:
        yield pool.map


class DaskThreads:
    """``map_blocks`` on dask's threads, with the block length that is fastest for the array."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs
        self.rows: dict[tuple[int, ...], int] = {}

    def __call__(self, func: Func, X: np.ndarray) -> np.ndarray:
        if X.shape not in self.rows:
            self.rows[X.shape] = self._fastest(func, X)
        return self._compute(func, X, self.rows[X.shape])

    def _compute(self, func: Func, X: np.ndarray, rows: int) -> np.ndarray:
        import dask.array as da

        # name=False: no hash over the data, which would cost more than the work.
        blocks = da.from_array(X, chunks=(rows, *X.shape[1:]), name=False)
        lazy = blocks.map_blocks(func, dtype=X.dtype)
        return lazy.compute(scheduler="threads", num_workers=self.n_jobs)

    def _candidates(self, X: np.ndarray) -> list[int]:
        half = -(-len(X) // self.n_jobs)
        row = X.nbytes // len(X)
        return [half, *(size // row for size in DASK_BLOCKS if size // row < half)]

    def _fastest(self, func: Func, X: np.ndarray) -> int:
        seconds: dict[int, list[float]] = {rows: [] for rows in self._candidates(X)}
        for _ in range(4):  # in turns, as the arms themselves
            for rows, found in seconds.items():
                begin = time.perf_counter()
                self._compute(func, X, rows)
                found.append(time.perf_counter() - begin)
        return min(seconds, key=lambda rows: min(seconds[rows]))


@contextmanager
def dask_threads(n_jobs: int) -> Iterator[Apply]:
    """dask keeps its threads by itself; nothing to close."""
    import dask.array  # noqa: F401  # an absent dask must be noticed when the peer is opened

    yield DaskThreads(n_jobs)


# Forking pools first: they must not inherit what the others start.
PEERS: dict[str, Peer] = {
    "multiprocessing.Pool": multiprocessing_pool,
    "concurrent.futures processes": futures_processes,
    "mpire": mpire_pool,
    "joblib loky": joblib_loky,
    "joblib threads": joblib_threads,
    "concurrent.futures threads": futures_threads,
    "concurrent.futures threads, fine": futures_threads_fine,
    "dask threads": dask_threads,
}
PROCESSES = ("multiprocessing.Pool", "concurrent.futures processes", "mpire", "joblib loky")
THREADS = (
    "joblib threads",
    "concurrent.futures threads",
    "concurrent.futures threads, fine",
    "dask threads",
)


def open_peers(
    stack: ExitStack, names: Iterable[str], n_jobs: int, func: Func, small: np.ndarray
) -> tuple[dict[str, Apply], list[str]]:
    """Open the named peers and start their workers on ``func(small)``; tell which are absent."""
    wanted = set(names)
    opened: dict[str, Apply] = {}
    absent = []
    for name in (name for name in PEERS if name in wanted):
        try:
            opened[name] = stack.enter_context(PEERS[name](n_jobs))
        except ImportError as error:
            absent.append(f"{name}: not installed ({error.name}), left out")
        else:
            opened[name](func, small)
    return opened, absent

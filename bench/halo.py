"""A Gaussian filter over an image: chunks that need their neighbours' rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import taskcarrier
from bench import ours
from bench.timing import Arm, Comparison, Promise, Settings, compare

N_JOBS = 2
DEPTH = 8
SIGMA = 2.0  # with the usual cut at four sigmas it reaches 8 rows
PARTS = (2, 4, 8, 16)  # chunks of the image that are tried
USUAL = "skimage apply_parallel"
AT_BEST = "skimage apply_parallel, at its best"
BEST_OF_OURS = "ours dynamic"

Apply = Callable[[np.ndarray, int], np.ndarray]


def blurred(chunk: np.ndarray) -> np.ndarray:
    """Gaussian filter across rows."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(chunk, SIGMA, axis=0, truncate=DEPTH / SIGMA, mode="reflect")


def run(settings: Settings) -> list[Comparison]:
    """Measure threads against skimage on dask's threads, all with the same chunks."""
    try:
        import scipy.ndimage  # noqa: F401  # blurred needs it
    except ImportError:
        print("halo: scipy is not installed, left out")
        return []
    image = np.random.default_rng(0).random(
        settings.pick(full=(4000, 8000), quick=(1000, 2000), tiny=(64, 32))
    )
    with _skimage() as theirs:
        rows, notes = _rows(theirs, image)
        arms = [Arm("plain SciPy", partial(blurred, image))]
        arms += [Arm(f"ours {b}", partial(_ours, b, image, rows)) for b in ours.BALANCES]
        arms += [Arm(name, partial(apply, image, rows)) for name, apply in theirs.items()]
        return [
            compare(
                f"halo: Gaussian over {DEPTH} rows to each side, {image.shape[0]:,} x "
                f"{image.shape[1]:,} image in chunks of {rows:,} rows, threading, {N_JOBS} jobs",
                arms,
                rounds=settings.turns(full=9, quick=5),
                reference=BEST_OF_OURS,
                promises=[
                    Promise(rival, f"ours {balance}", required=1.5, aim=2)
                    for rival in (USUAL, AT_BEST)
                    for balance in ours.BALANCES
                ],
                notes=notes,
            )
        ]


def _ours(balance: str, image: np.ndarray, rows: int) -> np.ndarray:
    return taskcarrier.map_array(
        blurred,
        image,
        depth=DEPTH,
        boundary="reflect",
        chunksize=rows,
        balance=balance,
        n_jobs=N_JOBS,
        backend="threading",
    )


@contextmanager
def _skimage() -> Iterator[dict[str, Apply]]:
    """Yield skimage's two forms, on two of dask's threads; none if skimage or dask is missing."""
    try:
        import dask
        import dask.array as da
        from skimage.util import apply_parallel
    except ImportError:
        yield {}
        return

    def usual(image: np.ndarray, rows: int) -> np.ndarray:
        chunks = (rows, image.shape[1])
        # "symmetric" is what SciPy calls "reflect".
        return apply_parallel(
            blurred, image, chunks=chunks, depth=DEPTH, mode="symmetric", dtype=image.dtype
        )

    def at_best(image: np.ndarray, rows: int) -> np.ndarray:
        # No hash over the data (name=False), and no neighbours along the axis that needs none.
        lazy = da.from_array(image, chunks=(rows, image.shape[1]), name=False)
        depth = (DEPTH, 0)
        return apply_parallel(
            blurred, lazy, depth=depth, mode="symmetric", dtype=image.dtype, compute=True
        )

    with dask.config.set(scheduler="threads", num_workers=N_JOBS):
        yield {USUAL: usual, AT_BEST: at_best}


def _rows(theirs: dict[str, Apply], image: np.ndarray) -> tuple[int, list[str]]:
    """Return the rows of a chunk that are the fastest for skimage, and notes about them."""
    candidates = [-(-len(image) // parts) for parts in PARTS]
    if not theirs:
        return candidates[-1], ["skimage: not installed (scikit-image, dask), left out"]
    seconds: dict[int, list[float]] = {rows: [] for rows in candidates}
    for _ in range(4):  # in turns, as the arms themselves
        for rows, found in seconds.items():
            begin = time.perf_counter()
            theirs[AT_BEST](image, rows)
            found.append(time.perf_counter() - begin)
    rows = min(seconds, key=lambda rows: min(seconds[rows]))
    return rows, [f"chunks of {rows:,} rows were the fastest for {AT_BEST}; all arms use them"]

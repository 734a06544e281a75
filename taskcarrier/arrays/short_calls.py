"""Short maps over plain arrays: a loop over the chunks, and nothing else.

A call of `map_array` that names no option but how to run, over plain arrays, with a function whose
last call was short, is run here in the caller. It has the grid of every call, read-only chunks and
one BLAS thread, and costs some 20 µs more than the loop. Whatever is unusual goes the general way
(`taskcarrier.arrays.placed`), with what the function has returned or raised already: it is not
called again for that. So results, errors and their notes are the same on both ways.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from taskcarrier.arrays.task import Raised
from taskcarrier.report import Report, ReportMaker, WorkerReport
from taskcarrier.scheduling import history
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid
from taskcarrier.workers.choose import is_joblib_configured
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.thread_limits import thread_limit

# Calls that are predicted to take longer go the general way: it may pay to hand them over, and what
# that way costs is a small part of them.
_MAX_SECONDS = 0.003
# Larger results are checked against the memory that is left.
_MAX_NBYTES = 1 << 23
_OPTIONS = {"n_jobs", "balance", "chunksize"}
_KINDS = set("biufcmMSU")


def run_short_call(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    keep_report: Callable[[ReportMaker], None],
) -> np.ndarray | dict[int, Any]:
    """Run a call of `map_array` if it is short and usual, and return the result.

    Otherwise return what the function has returned so far, by the start of chunks.
    """
    if not is_usual(func, arrays, options):
        return {}
    n_items, nbytes = len(arrays[0]), sum(array.nbytes for array in arrays)
    seconds = history.predict(func, n_items, nbytes)
    if seconds is None or seconds > _MAX_SECONDS or is_joblib_configured():
        return {}
    grid = chunk_grid(n_items, nbytes // n_items, options.get("chunksize"))
    outcomes: dict[int, Any] = {}
    begin = perf_counter()
    ending = "interrupted"
    try:
        with thread_limit.open():
            this_thread.is_worker = True
            result = _run_chunks(func, arrays, grid, outcomes)
        ending = ""
    finally:
        this_thread.is_worker = False
        seconds = perf_counter() - begin
        if not outcomes:
            keep_report(partial(_make_report, grid, seconds, ending))
    if result is None:
        return outcomes
    history.remember(func, seconds, n_items, nbytes)
    return result


def is_usual(func: Any, arrays: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a call may be run here, as far as its arguments show."""
    if not arrays or this_thread.is_worker or not callable(func):
        return False
    if options and not (
        options.keys() <= _OPTIONS
        and options.get("balance", "static") in ("static", "dynamic")
        and _is_count(options.get("n_jobs"), -sys.maxsize)
        and _is_count(options.get("chunksize"), 1)
    ):
        return False
    for array in arrays:
        if (
            type(array) is not np.ndarray
            or array.ndim == 0
            or array.dtype.kind not in _KINDS
            or not array.flags.c_contiguous
            or len(array) != len(arrays[0])
            # A view of a memmap is mapped as a file.
            or not (array.base is None or type(array.base) is np.ndarray)
            or array.nbytes == 0
        ):
            return False
    return True


def _is_count(value: Any, least: int) -> bool:
    return value is None or (type(value) is int and value >= least and value != 0)


def _run_chunks(
    func: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    grid: ChunkGrid,
    outcomes: dict[int, Any],
) -> np.ndarray | None:
    """Return the result; if something is unusual, put what the function gave into `outcomes`."""
    n_items, size = grid.n_items, grid.chunksize
    out: np.ndarray | None = None
    for start in range(0, n_items, size):
        stop = min(start + size, n_items)
        chunks = [array[start:stop] for array in arrays]
        for chunk in chunks:
            chunk.flags.writeable = False
        try:
            result = func(*chunks)
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            result = Raised(error)
        if type(result) is np.ndarray:
            if out is None and result.ndim and result.dtype.kind in _KINDS:
                shape, dtype = result.shape[1:], result.dtype
                if n_items * result.nbytes <= _MAX_NBYTES * stop:
                    out = np.empty((n_items, *shape), dtype)
            if out is not None and result.shape == (stop - start, *shape) and result.dtype == dtype:
                out[start:stop] = result
                continue
        if out is not None:
            for before in range(0, start, size):
                outcomes[before] = out[before : before + size]
        outcomes[start] = result
        return None
    return out


def _make_report(grid: ChunkGrid, seconds: float, ending: str) -> Report:
    caller = WorkerReport("caller", len(grid), grid.n_items, seconds, 0.0)
    return Report(
        backend="sequential",
        reason=f"an item took {seconds / grid.n_items:.2g} s in the caller: workers would have "
        "saved nothing",
        balance="serial",
        n_jobs=1,
        chunksize=grid.chunksize,
        ranges=len(grid),
        items=grid.n_items,
        bytes_copied=0,
        seconds=seconds,
        workers=() if ending else (caller,),
        notes=(ending,) if ending else (),
    )

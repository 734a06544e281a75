"""Short maps over plain arrays in worker processes (`taskcarrier.short_runs`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any

import numpy as np

from taskcarrier.arrays.share_task import ArrayShareTask, ShareResults, describe_layout
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.short_calls import ShortSettings
from taskcarrier.short_runs import ShortRun, plan_workers
from taskcarrier.workers.call import Call
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.replay import ReplayExecutor


def run_in_processes(
    func: Callable[..., Any],
    arrays: tuple[np.ndarray, ...],
    options: Mapping[str, Any],
    settings: ShortSettings,
    grid: ChunkGrid,
    *,
    by_item: bool,
    joins: bool,
) -> tuple[Any, ReplayExecutor | None]:
    """Run a call over plain arrays in processes, if it is short; return its result, and None.

    The result is None if the call goes the general way: with the executor, if it was run.
    `by_item` and `joins` are those of an `ArrayShareTask`.
    """
    started_ns = monotonic_ns()
    nbytes = sum([array.nbytes for array in arrays])
    plan = plan_workers(func, grid, nbytes, settings.n_jobs)
    if plan is None:
        return None, None
    run = ShortRun(func, grid, nbytes, *plan, settings, started_ns)
    task = ArrayShareTask(
        Call(func, options.get("args", ()), options.get("kwargs") or {}),
        b"",
        by_item,
        joins,
        [describe_layout(array) for array in arrays],
        run.list_starts(),
    )
    ended = run.run(task, task.pack_shares(arrays))
    if ended is None:
        return None, None
    result, delivered = ended
    shares = _read_shares(run, result, delivered)
    outputs = (_join if joins else _list_results)(run, result, shares, delivered)
    if outputs is not None:
        run.end(result)
        return outputs, None
    for share in shares:
        delivered.update(share.split(grid.chunksize))
    return None, run.make_replay(result, delivered)


def _read_shares(run: ShortRun, result: RunResult, delivered: dict[int, Any]) -> list[ShareResults]:
    """Return what workers have joined; add the results that they have kept one by one to others."""
    shares = []
    for stats in result.worker_stats:
        if stats.facts is not None:
            share = ShareResults(*stats.facts)
            shares.append(share)
            stats.facts = None
            if share.by_start:
                run.unpickle(share.by_start, stats.name, result, delivered)
    return shares


def _list_results(
    run: ShortRun, result: RunResult, _: Sequence[ShareResults], delivered: dict[int, Any]
) -> list[Any] | None:
    """Return the results of all ranges in order; None if some are missing."""
    if not run.is_complete(result) or len(delivered) < len(run.grid):
        return None
    return [delivered[start] for start in sorted(delivered)]


def _join(
    run: ShortRun, result: RunResult, shares: Sequence[ShareResults], delivered: dict[int, Any]
) -> np.ndarray | tuple[np.ndarray, ...] | None:
    """Return the results of all items as one; None if some are missing, or do not fit."""
    if delivered or len(shares) != run.n_workers or not run.is_complete(result):
        return None
    first = shares[0]
    dtypes = [part[0] for part in first.parts]
    item_shapes = [part[1][1:] for part in first.parts]
    for share in shares[1:]:
        if (
            share.is_tuple is not first.is_tuple
            or [part[0] for part in share.parts] != dtypes
            or [part[1][1:] for part in share.parts] != item_shapes
        ):
            return None
    n_items = run.grid.n_items
    outputs = tuple(
        np.empty((n_items, *item_shape), dtype)
        for dtype, item_shape in zip(dtypes, item_shapes, strict=True)
    )
    for share in shares:
        for output, array in zip(outputs, share.arrays, strict=True):
            output[share.first : share.first + len(array)] = array
    return outputs if first.is_tuple else outputs[0]

"""Short maps over lists: the calls, one after the other, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from taskcarrier.lists.task import Calls
from taskcarrier.notes import add_note
from taskcarrier.report import ReportMaker
from taskcarrier.run import add_failure_note
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.short_calls import run_short


def map_short_list(
    calls: Calls,
    items: Sequence[Any],
    grid: ChunkGrid,
    keep_report: Callable[[ReportMaker], None],
) -> list[Any]:
    """Return the results of a map that is known to be short."""
    return run_short(calls.call.func, partial(_call, calls, items, grid), grid, 0, keep_report)


def _call(calls: Calls, items: Sequence[Any], grid: ChunkGrid) -> list[Any]:
    func = calls.call.func
    results: list[Any] = []
    try:
        if calls.is_tuple:
            for arguments in items:
                results.append(func(*arguments))  # noqa: PERF401  # the number counts in an error
        else:
            for item in items:
                results.append(func(item))  # noqa: PERF401  # as above
    except BaseException as error:
        number = min(len(results), len(items) - 1)
        add_note(error, f"func failed on {calls.describe(number, number + 1)}")
        failed_range = grid.range_of(number // grid.chunksize)
        add_failure_note(error, calls.describe(*failed_range), "caller")
        raise
    return results

"""Maps over Python sequences: items in, a list of results out, in order.

A cell is a block of items. For processes every block is pickled once, into the run's shared
segment, whoever comes to run it; so static and dynamic balance ship the same bytes, and
taking a block costs no message. Results come back in batches.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

import numpy as np

from taskcarrier.arrays.inputs import check_callable
from taskcarrier.backends.choice import Choice
from taskcarrier.backends.work import Call
from taskcarrier.partition import Grid, list_grid
from taskcarrier.running import (
    Settings,
    decide,
    died_error,
    execute,
    raise_failure,
)
from taskcarrier.segments import SharedView, Staging


def mapped(
    settings: Settings,
    func: Callable[..., Any],
    sequences: tuple[Iterable[Any], ...],
    chunksize: int | None,
) -> list[Any]:
    """``list(map(func, *sequences))`` on the workers that `settings` ask for."""
    started_ns = monotonic_ns()
    check_callable(func)
    items = _gathered(sequences)
    grid = list_grid(len(items), chunksize)
    nothing = Choice("sequential", 1, "there is nothing to map")
    choice = decide(settings, func) if items else nothing
    several = len(sequences) > 1
    staging = None
    task: _ItemTask | _PackedTask
    if choice.backend == "loky":
        staging = settings.staging()
        blocks, ends = _packed_blocks(items, grid, staging)
        task = _PackedTask(Call(func), blocks, ends, grid.chunksize, several)
    else:
        task = _ItemTask(func, items, several)
    done: dict[int, list[Any]] = {}
    outcome = execute(
        task,
        grid,
        choice,
        settings,
        started_ns=started_ns,
        staging=staging,
        deliver=done.__setitem__,
    )
    raise_failure(outcome, grid, _describe)
    if outcome.deaths:
        missing = [cell for cell in range(len(grid)) if cell not in done]
        if missing:
            raise died_error(outcome, grid, _describe, missing, _joined(done, grid))
    return _joined(done, grid)


def _gathered(sequences: tuple[Iterable[Any], ...]) -> Sequence[Any]:
    """The items: one sequence as it is or as a list, several as a list of tuples."""
    if len(sequences) > 1:
        return list(zip(*sequences, strict=False))  # like `map`: the shortest wins
    (only,) = sequences
    return only if isinstance(only, (list, tuple, range)) else list(only)


def _joined(blocks: dict[int, list[Any]], grid: Grid) -> list[Any]:
    """The results in order; None for items of blocks that did not come."""
    results: list[Any] = []
    for cell in range(len(grid)):
        start, stop = grid.bounds(cell)
        results += blocks.get(cell) or [None] * (stop - start)
    return results


def _describe(start: int, stop: int) -> str:
    return f"item {start}" if stop == start + 1 else f"items {start}:{stop}"


@dataclass(frozen=True)
class _ItemTask:
    """`func` on items of this process; open already, for it keeps nothing."""

    func: Callable[..., Any]
    items: Sequence[Any]
    several: bool

    def open(self) -> _ItemTask:
        return self

    def __call__(self, start: int, stop: int) -> list[Any]:
        return _apply(self.func, self.items[start:stop], start, self.several)

    def facts(self) -> None:
        """Nothing."""

    def signature(self) -> int:
        """Nothing."""
        return 0


@dataclass(frozen=True)
class _PackedTask:
    """`func` on blocks of pickled items in shared memory."""

    call: Call
    blocks: SharedView
    ends: SharedView
    chunksize: int
    several: bool

    def open(self) -> _PackedItems:
        return _PackedItems(self)


class _PackedItems:
    """A `_PackedTask` opened in one worker."""

    def __init__(self, task: _PackedTask) -> None:
        self._task = task
        self._blocks: Any = memoryview(task.blocks.open("read").data)
        self._ends = task.ends.open("read")

    def __call__(self, start: int, stop: int) -> list[Any]:  # noqa: ARG002  # a cell is a block
        task = self._task
        cell = start // task.chunksize
        begin = int(self._ends[cell - 1]) if cell else 0
        items = pickle.loads(self._blocks[begin : int(self._ends[cell])])
        return _apply(task.call.func, items, start, task.several)

    def facts(self) -> None:
        """Nothing."""

    def signature(self) -> int:
        """Nothing."""
        return 0


def _packed_blocks(
    items: Sequence[Any], grid: Grid, staging: Staging
) -> tuple[SharedView, SharedView]:
    """All blocks, pickled one after the other, and where each ends."""
    from taskcarrier.backends.parcels import pack_items  # noqa: PLC0415  # loads joblib

    packed = bytearray()
    ends = np.empty(len(grid), np.int64)
    for cell in range(len(grid)):
        start, stop = grid.bounds(cell)
        try:
            packed += pack_items(items[start:stop])
        except Exception as error:
            error.add_note(
                f"taskcarrier could not pickle {_describe(start, stop)} for worker processes; use "
                "backend='threading' if they cannot be pickled"
            )
            raise
        ends[cell] = len(packed)
    blocks, where = staging.share([np.frombuffer(packed, np.uint8), ends])
    return blocks, where


def _apply(func: Callable[..., Any], items: Sequence[Any], start: int, several: bool) -> list[Any]:
    results: list[Any] = []
    try:
        if several:
            for item in items:
                results.append(func(*item))  # noqa: PERF401  # its length names the item that failed
        else:
            for item in items:
                results.append(func(item))  # noqa: PERF401  # likewise
    except BaseException as error:
        error.add_note(f"func failed on item {start + len(results)}")
        raise
    return results

"""Maps over Python sequences: items in, a list of results out, in order.

A cell is a block of items, which processes find pickled in shared memory. Results come back in
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from taskcarrier.arrays.inputs import check_callable
from taskcarrier.backends.choice import Choice
from taskcarrier.backends.work import Agree, Call, add_note
from taskcarrier.blocks import Blocks
from taskcarrier.partition import Grid, list_grid
from taskcarrier.running import (
    Settings,
    decide,
    died_error,
    execute,
    raise_failure,
)


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
        blocks = Blocks.pack(lambda start, stop: items[start:stop], grid, staging, _describe)
        task = _PackedTask(Call(func), blocks, grid.chunksize, several)
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


@dataclass(frozen=True, eq=False)
class _ItemTask:
    """`func` on items of this process; open already, for it keeps nothing."""

    func: Callable[..., Any]
    items: Sequence[Any]
    several: bool

    def open(self, agree: Agree) -> _ItemTask:  # noqa: ARG002  # nothing to agree on
        return self

    def __call__(self, start: int, stop: int) -> list[Any]:
        return _apply(self.func, self.items[start:stop], start, self.several)

    def facts(self) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class _PackedTask:
    """`func` on blocks of pickled items in shared memory."""

    call: Call
    blocks: Blocks
    chunksize: int
    several: bool

    def open(self, agree: Agree) -> _PackedItems:  # noqa: ARG002  # nothing to agree on
        return _PackedItems(self)


class _PackedItems:
    """A `_PackedTask` opened in one worker."""

    def __init__(self, task: _PackedTask) -> None:
        self._task = task
        self._block = task.blocks.open()

    def __call__(self, start: int, stop: int) -> list[Any]:  # noqa: ARG002  # a cell is a block
        task = self._task
        return _apply(task.call.func, self._block(start // task.chunksize), start, task.several)

    def facts(self) -> None:
        """Nothing."""


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
        add_note(error, f"func failed on item {start + len(results)}")
        raise
    return results

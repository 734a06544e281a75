"""Maps over Python sequences: items in, a list of results out, in order.

A cell is a block of items, which processes find pickled in shared memory. Results come back in
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from time import monotonic_ns
from typing import Any

from taskcarrier.arguments import check_callable, check_extras, check_on_error, read_only
from taskcarrier.notes import CARRIED, add_note, in_words, is_of_read_only
from taskcarrier.random_streams import WithStream, streams_for
from taskcarrier.run import (
    Settings,
    decide,
    execute,
    raise_failure,
    refuse_missing,
)
from taskcarrier.scheduling.grid import list_grid
from taskcarrier.scheduling.retries import Recovery, Retried
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.processes.packed_chunks import Blocks
from taskcarrier.workers.records import Fault, Parts, failed_ranges
from taskcarrier.workers.task import Agree


def mapped(
    settings: Settings,
    func: Callable[..., Any],
    sequences: tuple[Iterable[Any], ...],
    chunksize: int | None,
    *,
    on_error: str = "raise",
    rng: object = None,
    shared: object = None,
    are_arguments: bool = False,
) -> Any:
    """``list(map(func, *sequences))`` on the workers that `settings` ask for.

    Or ``list(starmap(func, *sequences))``, where the one sequence is of arguments.
    """
    started_ns = monotonic_ns()
    check_callable(func)
    collects = check_on_error(on_error, ("raise", "collect")) == "collect"
    items = _argument_tuples(*sequences) if are_arguments else _gathered(sequences)
    nothing = Choice("sequential", 1, "there is nothing to map")
    calls = Calls.checked(
        func,
        settings.recovery,
        several=are_arguments or len(sequences) > 1,
        collects=collects,
        rng=rng,
        shared=shared,
    )
    choice = decide(settings, func, lists=True) if items else nothing
    # A time limit is for each range: it must not depend on the number of workers what that is.
    by_workers = choice.backend == "loky" and settings.recovery.timeout is None
    grid = list_grid(len(items), chunksize, choice.n_jobs if by_workers else None)
    staging = None
    task: _ItemTask | _PackedTask
    if choice.backend == "loky":
        staging = settings.staging()
        blocks = Blocks.pack(lambda start, stop: items[start:stop], grid, staging, in_words)
        task = _PackedTask(calls, blocks, grid.chunksize)
    else:
        task = _ItemTask(calls, items)
    done: dict[int, list[Any] | Parts] = {}
    outcome = execute(
        task,
        grid,
        choice,
        settings,
        started_ns=started_ns,
        staging=staging,
        collects=collects,
        narrows=True,
        deliver=done.__setitem__,
    )
    raise_failure(outcome, in_words)
    results, faults, missing = _joined(done, len(items))
    refuse_missing(outcome, in_words, missing, lambda: results)
    if not collects:
        return results
    for start, stop, error in faults:
        add_note(error, f"while mapping {in_words(start, stop)}")
    return results, failed_ranges(faults)


def _argument_tuples(iterable: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Arguments of calls, each a tuple; a `TypeError` names what is none."""
    found: list[tuple[Any, ...]] = []
    for number, one in enumerate(iterable):
        if not isinstance(one, Iterable):
            raise TypeError(
                f"starmap needs a tuple of arguments for every call, got {one!r} as item {number}; "
                "for functions of one argument there is map"
            )
        found.append(tuple(one))
    return found


def _gathered(sequences: tuple[Iterable[Any], ...]) -> Sequence[Any]:
    """The items: one sequence as it is or as a list, several as a list of tuples."""
    if len(sequences) > 1:
        return list(zip(*sequences, strict=False))  # like `map`: the shortest wins
    (only,) = sequences
    return only if isinstance(only, (list, tuple, range)) else list(only)


def _joined(
    blocks: dict[int, list[Any] | Parts], n_items: int
) -> tuple[list[Any], list[Fault], list[tuple[int, int]]]:
    """The results in order, None where there is none; faults; ranges that did not come."""
    results: list[Any] = []
    faults: list[Fault] = []
    missing: list[tuple[int, int]] = []
    for start in sorted(blocks):
        if start > len(results):
            missing.append((len(results), start))
            results += [None] * (start - len(results))
        block = blocks[start]
        if isinstance(block, list):
            results += block
            continue
        for _, values in block.results:
            results += values
        faults += block.faults
        # A range that was given up has no results of its own.
        end = max(stop for _, stop, _ in block.faults)
        results += [None] * (end - len(results))
    if len(results) < n_items:
        missing.append((len(results), n_items))
        results += [None] * (n_items - len(results))
    return results, faults, missing


@dataclass(frozen=True, eq=False)
class Calls:
    """How the function is called with items.

    Attributes
    ----------
    call : Call
        The function.
    several : bool
        Whether an item is a tuple of arguments.
    collects : bool
        Whether errors are collected; else the first one ends the run.
    numbered : bool
        Whether it is called with the number of the item before all else.
    """

    call: Call
    several: bool
    collects: bool
    numbered: bool

    @classmethod
    def checked(
        cls,
        func: Callable[..., Any],
        recovery: Recovery,
        *,
        several: bool,
        collects: bool,
        rng: object,
        shared: object,
    ) -> Calls:
        """From the arguments of a call."""
        _, kwargs = check_extras((), shared, "shared")
        if rng is not None and "rng" in kwargs:
            raise TypeError("rng is given twice: as an option, and in shared")
        if rng is not None:
            func = WithStream(func, streams_for(func, rng))
        if recovery.retry_on:
            func = Retried(func, recovery.retry_on, recovery.retries)
        return cls(Call(func, (), kwargs), several, collects, rng is not None)

    def opened(self) -> Calls:
        """The same in a worker, with what every call gets bound, arrays read-only."""
        if not self.call.kwargs:
            return self
        shared = {name: read_only(value) for name, value in self.call.kwargs.items()}
        func = partial(self.call.func, **shared)
        return replace(self, call=replace(self.call, func=func))

    def of(self, items: Sequence[Any], start: int) -> list[Any] | Parts:
        """Results of items from `start` on; with what failed, if anything did."""
        func = self.call.func
        results: list[Any] = []
        faults: list[Fault] = []
        several = self.several
        rest: Iterator[Any] = iter(items)
        if self.numbered:
            numbered = enumerate(items, start)
            rest = ((n, *item) for n, item in numbered) if several else numbered
            several = True
        # What has come of it when it raises stays in the list, whose length names the item.
        calls: Iterator[Any] = starmap(func, rest) if several else map(func, rest)
        while True:
            try:
                results.extend(calls)
                if len(results) == len(items):
                    break
                # To the loop in there it was the end.
                raise StopIteration("func raised StopIteration")  # noqa: TRY301  # one way for all
            except BaseException as error:
                failed = start + len(results)
                if self.call.kwargs and is_of_read_only(error):
                    add_note(error, f"arrays in shared= are read-only; {CARRIED}")
                if (
                    not self.collects
                    or not isinstance(error, Exception)
                    or is_of_the_program(error)
                ):
                    add_note(error, f"func failed on item {failed}")
                    raise
                faults.append((failed, failed + 1, error))
                results.append(None)
        return Parts([(slice(start, start + len(items)), results)], faults) if faults else results


@dataclass(frozen=True, eq=False)
class _ItemTask:
    """`func` on items of this process."""

    calls: Calls
    items: Sequence[Any]

    def open(self, agree: Agree) -> _ItemTask:  # noqa: ARG002  # nothing to agree on
        return replace(self, calls=self.calls.opened())

    def __call__(self, start: int, stop: int) -> list[Any] | Parts:
        return self.calls.of(self.items[start:stop], start)

    def facts(self) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class _PackedTask:
    """`func` on blocks of pickled items in shared memory."""

    calls: Calls
    blocks: Blocks
    chunksize: int

    def open(self, agree: Agree) -> _PackedItems:  # noqa: ARG002  # nothing to agree on
        return _PackedItems(self)


class _PackedItems:
    """A `_PackedTask` opened in one worker."""

    def __init__(self, task: _PackedTask) -> None:
        self._task = task
        self._calls = task.calls.opened()
        self._block = task.blocks.open()

    def __call__(self, start: int, stop: int) -> list[Any] | Parts:
        cell, skip = divmod(start, self._task.chunksize)
        items = self._block(cell)  # a cell is a block; parts of one are run after deaths
        return self._calls.of(items[skip : skip + stop - start], start)

    def facts(self) -> None:
        """Nothing."""

"""Maps over Python sequences: items in, a list of results out, in order.

A chunk is a block of items, which processes find pickled in shared memory. Results come back in
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
from taskcarrier.notes import CARRIED, add_note, describe_items, is_of_read_only
from taskcarrier.random_streams import WithRandomStream, random_streams_for
from taskcarrier.run import (
    Settings,
    decide,
    execute,
    raise_failure,
    refuse_missing,
)
from taskcarrier.scheduling.grid import list_grid
from taskcarrier.scheduling.retries import RetryPolicy, WithRetries
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.processes.packed_chunks import PackedChunks
from taskcarrier.workers.records import Fault, PartialResult, list_failed_ranges
from taskcarrier.workers.task import Propose


def map_lists(
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
    collect_errors = check_on_error(on_error, ("raise", "collect")) == "collect"
    items = _argument_tuples(*sequences) if are_arguments else _gather(sequences)
    nothing = Choice("sequential", 1, "there is nothing to map")
    calls = Calls.from_arguments(
        func,
        settings.retry_policy,
        is_tuple=are_arguments or len(sequences) > 1,
        collect_errors=collect_errors,
        rng=rng,
        shared=shared,
    )
    choice = decide(settings, func, lists=True) if items else nothing
    # A time limit is for each range: it must not depend on the number of workers what that is.
    by_workers = choice.backend == "loky" and settings.retry_policy.timeout is None
    grid = list_grid(len(items), chunksize, choice.n_jobs if by_workers else None)
    staging = None
    task: _ListTask | _PackedTask
    if choice.backend == "loky":
        staging = settings.new_staging()
        blocks = PackedChunks.pack(
            lambda start, stop: items[start:stop], grid, staging, describe_items
        )
        task = _PackedTask(calls, blocks, grid.chunksize)
    else:
        task = _ListTask(calls, items)
    done: dict[int, list[Any] | PartialResult] = {}
    outcome = execute(
        task,
        grid,
        choice,
        settings,
        started_ns=started_ns,
        staging=staging,
        collect_errors=collect_errors,
        can_split=True,
        deliver=done.__setitem__,
    )
    raise_failure(outcome, describe_items)
    results, faults, missing = _join(done, len(items))
    refuse_missing(outcome, describe_items, missing, lambda: results)
    if not collect_errors:
        return results
    for start, stop, error in faults:
        add_note(error, f"while mapping {describe_items(start, stop)}")
    return results, list_failed_ranges(faults)


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


def _gather(sequences: tuple[Iterable[Any], ...]) -> Sequence[Any]:
    """The items: one sequence as it is or as a list, several as a list of tuples."""
    if len(sequences) > 1:
        return list(zip(*sequences, strict=False))  # like `map`: the shortest wins
    (only,) = sequences
    return only if isinstance(only, (list, tuple, range)) else list(only)


def _join(
    blocks: dict[int, list[Any] | PartialResult], n_items: int
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
    is_tuple : bool
        Whether an item is a tuple of arguments.
    collect_errors : bool
        Whether errors are collected; else the first one ends the run.
    passes_index : bool
        Whether it is called with the number of the item before all else.
    """

    call: Call
    is_tuple: bool
    collect_errors: bool
    passes_index: bool

    @classmethod
    def from_arguments(
        cls,
        func: Callable[..., Any],
        retry_policy: RetryPolicy,
        *,
        is_tuple: bool,
        collect_errors: bool,
        rng: object,
        shared: object,
    ) -> Calls:
        """From the arguments of a call."""
        _, kwargs = check_extras((), shared, "shared")
        if rng is not None and "rng" in kwargs:
            raise TypeError("rng is given twice: as an option, and in shared")
        if rng is not None:
            func = WithRandomStream(func, random_streams_for(func, rng))
        if retry_policy.retry_on:
            func = WithRetries(func, retry_policy.retry_on, retry_policy.retries)
        return cls(Call(func, (), kwargs), is_tuple, collect_errors, rng is not None)

    def bind_shared(self) -> Calls:
        """The same in a worker, with what every call gets bound, arrays read-only."""
        if not self.call.kwargs:
            return self
        shared = {name: read_only(value) for name, value in self.call.kwargs.items()}
        func = partial(self.call.func, **shared)
        return replace(self, call=replace(self.call, func=func))

    def call_items(self, items: Sequence[Any], start: int) -> list[Any] | PartialResult:
        """Results of items from `start` on; with what failed, if anything did."""
        func = self.call.func
        results: list[Any] = []
        faults: list[Fault] = []
        is_tuple = self.is_tuple
        rest: Iterator[Any] = iter(items)
        if self.passes_index:
            passes_index = enumerate(items, start)
            rest = ((n, *item) for n, item in passes_index) if is_tuple else passes_index
            is_tuple = True
        # What has come of it when it raises stays in the list, whose length names the item.
        calls: Iterator[Any] = starmap(func, rest) if is_tuple else map(func, rest)
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
                    not self.collect_errors
                    or not isinstance(error, Exception)
                    or is_of_the_program(error)
                ):
                    add_note(error, f"func failed on item {failed}")
                    raise
                faults.append((failed, failed + 1, error))
                results.append(None)
        return (
            PartialResult([(slice(start, start + len(items)), results)], faults)
            if faults
            else results
        )


@dataclass(frozen=True, eq=False)
class _ListTask:
    """`func` on items of this process."""

    calls: Calls
    items: Sequence[Any]

    def open(self, propose: Propose) -> _ListTask:  # noqa: ARG002  # nothing to agree on
        return replace(self, calls=self.calls.bind_shared())

    def __call__(self, start: int, stop: int) -> list[Any] | PartialResult:
        return self.calls.call_items(self.items[start:stop], start)

    def facts(self) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class _PackedTask:
    """`func` on blocks of pickled items in shared memory."""

    calls: Calls
    blocks: PackedChunks
    chunksize: int

    def open(self, propose: Propose) -> _PackedRunner:  # noqa: ARG002  # nothing to agree on
        return _PackedRunner(self)


class _PackedRunner:
    """A `_PackedTask` opened in one worker."""

    def __init__(self, task: _PackedTask) -> None:
        self._task = task
        self._calls = task.calls.bind_shared()
        self._block = task.blocks.open()

    def __call__(self, start: int, stop: int) -> list[Any] | PartialResult:
        index, skip = divmod(start, self._task.chunksize)
        items = self._block(index)  # a chunk is a block; parts of one are run after deaths
        return self._calls.call_items(items[skip : skip + stop - start], start)

    def facts(self) -> None:
        """Nothing."""

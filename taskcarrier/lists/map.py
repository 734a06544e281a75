"""Maps over Python sequences: items in, a list of results out, in the same order.

Worker processes find the items of a chunk pickled in shared memory, and send back the results of
several chunks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from operator import length_hint
from time import monotonic_ns
from typing import Any

from taskcarrier.arguments import check_callable, check_on_error
from taskcarrier.memory.views import make_read_only
from taskcarrier.notes import READ_ONLY_ADVICE, add_note, describe_items, is_read_only_error
from taskcarrier.random_streams import WithRandomStream, random_streams_for
from taskcarrier.run import (
    Settings,
    decide,
    execute,
    raise_first_failure,
    raise_if_missing,
    run_nothing,
)
from taskcarrier.scheduling.grid import ChunkGrid, list_grid
from taskcarrier.scheduling.retries import RetryPolicy, WithRetries
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call, check_extras
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.processes.packed_chunks import PackedChunks
from taskcarrier.workers.records import DeliveredFailure, PartialResult, list_failed_ranges
from taskcarrier.workers.task import RunRange, WorkerContext


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
    noun: str = "item",
) -> Any:
    """Return ``list(map(func, *sequences))``, run on the workers that `settings` ask for.

    With `are_arguments`, return ``list(starmap(func, *sequences))`` for one sequence of arguments.
    If errors are collected, return the failures too. Errors call an item by `noun`.
    """
    started_ns = monotonic_ns()
    check_callable(func)
    collect_errors = check_on_error(on_error, ("raise", "collect")) == "collect"
    items = _collect_arguments(*sequences) if are_arguments else _gather_items(sequences)
    calls = Calls.from_arguments(
        func,
        settings.retry_policy,
        is_tuple=are_arguments or len(sequences) > 1,
        collect_errors=collect_errors,
        rng=rng,
        shared=shared,
        noun=noun,
    )
    executor = decide(settings, func, over_lists=True) if items else run_nothing()
    grid, task = _make_task(calls, items, chunksize, executor, settings)
    outcome = execute(
        task,
        grid,
        executor,
        settings,
        started_ns=started_ns,
        collect_errors=collect_errors,
        can_split=True,
    )
    raise_first_failure(outcome, calls.describe)
    results, failures, missing = _join_results(dict(outcome.delivered), len(items))
    raise_if_missing(outcome, calls.describe, missing, lambda: results)
    if not collect_errors:
        return results
    for start, stop, error in failures:
        add_note(error, f"while mapping {calls.describe(start, stop)}")
    return results, list_failed_ranges(failures)


def _make_task(
    calls: Calls,
    items: Sequence[Any],
    chunksize: int | None,
    executor: Executor,
    settings: Settings,
) -> tuple[ChunkGrid, _ListTask | _PackedTask]:
    """Return the chunks of a list and the task over them, with the items where workers see them."""
    if executor.staging is None:
        return list_grid(len(items), chunksize, None), _ListTask(calls, items)
    # A timeout is for each range, so ranges must not depend on the number of workers.
    n_workers = executor.choice.n_jobs if settings.retry_policy.timeout is None else None
    grid = list_grid(len(items), chunksize, n_workers)
    packed_chunks = PackedChunks.pack(
        lambda start, stop: items[start:stop],
        grid,
        executor.staging,
        partial(describe_items, noun=calls.noun),
    )
    return grid, _PackedTask(calls, packed_chunks, grid.chunksize)


def _collect_arguments(iterable: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the arguments of calls as tuples; raise a `TypeError` if one is not iterable."""
    argument_tuples: list[tuple[Any, ...]] = []
    for index, item in enumerate(iterable):
        if not isinstance(item, Iterable):
            raise TypeError(
                f"starmap needs a tuple of arguments for every call, got {item!r} as item {index}; "
                "for functions of one argument there is map"
            )
        argument_tuples.append(tuple(item))
    return argument_tuples


def _gather_items(sequences: tuple[Iterable[Any], ...]) -> Sequence[Any]:
    """Return the items: one sequence as it is or as a list, several as a list of tuples."""
    if len(sequences) > 1:
        return list(zip(*sequences, strict=False))  # as in `map`, the shortest decides
    (only,) = sequences
    return only if isinstance(only, (list, tuple, range)) else list(only)


def _join_results(
    results_by_start: dict[int, list[Any] | PartialResult], n_items: int
) -> tuple[list[Any], list[DeliveredFailure], list[tuple[int, int]]]:
    """Return the results in order, None where there is none; the failures; missing ranges."""
    results: list[Any] = []
    failures: list[DeliveredFailure] = []
    missing: list[tuple[int, int]] = []
    for start in sorted(results_by_start):
        if start > len(results):
            missing.append((len(results), start))
            results += [None] * (start - len(results))
        part = results_by_start[start]
        if isinstance(part, list):
            results += part
            continue
        for _, values in part.results:
            results += values
        failures += part.failures
        # A range that was given up has no results of its own.
        end = max(stop for _, stop, _ in part.failures)
        results += [None] * (end - len(results))
    if len(results) < n_items:
        missing.append((len(results), n_items))
        results += [None] * (n_items - len(results))
    return results, failures, missing


@dataclass(frozen=True, eq=False, kw_only=True)
class Calls:
    """A function, and how it is called with items.

    Attributes
    ----------
    call : Call
        The function, with the arguments that every call gets.
    is_tuple : bool
        Whether an item is a tuple of arguments.
    collect_errors : bool
        Whether errors are collected; else the first error ends the run.
    passes_index : bool
        Whether the first argument of the function is the number of the item.
    noun : str
        What errors call an item.
    """

    call: Call
    is_tuple: bool
    collect_errors: bool
    passes_index: bool
    noun: str

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
        noun: str = "item",
    ) -> Calls:
        """Make calls from the options of a map."""
        _, kwargs = check_extras((), shared, "shared")
        if rng is not None and "rng" in kwargs:
            raise TypeError("rng is given twice: as an option, and in shared")
        if rng is not None:
            func = WithRandomStream(func, random_streams_for(func, rng))
        if retry_policy.retry_on:
            func = WithRetries(func, retry_policy.retry_on, retry_policy.retries)
        return cls(
            call=Call(func, (), kwargs),
            is_tuple=is_tuple,
            collect_errors=collect_errors,
            passes_index=rng is not None,
            noun=noun,
        )

    def describe(self, start: int, stop: int) -> str:
        """Return a range of items in words."""
        return describe_items(start, stop, self.noun)

    def bind_shared(self) -> Calls:
        """Return the same for a worker: shared arguments are bound, and their arrays read-only."""
        if not self.call.kwargs:
            return self
        shared = {name: make_read_only(value) for name, value in self.call.kwargs.items()}
        func = partial(self.call.func, **shared)
        return replace(self, call=replace(self.call, func=func))

    def _iterate_arguments(self, items_left: Iterator[Any], start: int) -> Iterator[Any]:
        """Iterate over the items as the function gets them: after their numbers, if it gets any."""
        if not self.passes_index:
            return items_left
        numbers = count(start)
        if self.is_tuple:
            return map(lambda number, item: (number, *item), numbers, items_left)
        return zip(numbers, items_left, strict=False)

    def call_items(self, items: Sequence[Any], start: int) -> list[Any] | PartialResult:
        """Return the results of items from number `start` on, and the failures if there are any."""
        func = self.call.func
        results: list[Any] = []
        failures: list[DeliveredFailure] = []
        items_left = iter(items)
        arguments = self._iterate_arguments(items_left, start)
        while True:
            try:
                # After an error the results so far stay in the list; its length gives the failed
                # item. (`extend` and `map` would take a StopIteration of func for the end.)
                if self.is_tuple or self.passes_index:
                    for each in arguments:
                        results.append(func(*each))  # noqa: PERF401  # as said
                else:
                    for item in arguments:
                        results.append(func(item))  # noqa: PERF401  # as said
                break
            except BaseException as error:
                failed = start + len(results)
                # Otherwise the exception came from outside, between two items.
                is_raised_by_func = length_hint(items_left) < len(items) - len(results)
                if self.call.kwargs and is_read_only_error(error):
                    add_note(error, f"arrays in shared= are read-only; {READ_ONLY_ADVICE}")
                if (
                    not self.collect_errors
                    or not isinstance(error, Exception)
                    or not is_raised_by_func
                    or is_raised_by_handler(error)
                ):
                    add_note(error, f"func failed on {self.describe(failed, failed + 1)}")
                    raise
                failures.append(DeliveredFailure(failed, failed + 1, error))
                results.append(None)
        return (
            PartialResult([(slice(start, start + len(items)), results)], failures)
            if failures
            else results
        )


@dataclass(frozen=True, eq=False)
class _ListTask:
    """Calls with items of this process, as a task."""

    calls: Calls
    items: Sequence[Any]

    def start(self, worker: WorkerContext) -> RunRange:  # noqa: ARG002  # nothing to agree on
        calls, items = self.calls.bind_shared(), self.items
        return lambda start, stop: calls.call_items(items[start:stop], start)


@dataclass(frozen=True, eq=False)
class _PackedTask:
    """Calls with items that are pickled in shared memory by chunks, as a task."""

    calls: Calls
    packed_chunks: PackedChunks
    chunksize: int

    def start(self, worker: WorkerContext) -> RunRange:  # noqa: ARG002  # nothing to agree on
        calls, read_chunk = self.calls.bind_shared(), self.packed_chunks.open()

        def run_range(start: int, stop: int) -> list[Any] | PartialResult:
            index, skip = divmod(start, self.chunksize)
            items = read_chunk(index)  # after deaths, parts of a chunk are run
            return calls.call_items(items[skip : skip + stop - start], start)

        return run_range

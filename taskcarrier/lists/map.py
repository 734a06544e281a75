"""Maps over Python sequences: items in, a list of results out, in the same order.

Worker processes find the items of a chunk pickled in shared memory, and send back the results of
several chunks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any

from taskcarrier.arguments import check_callable, check_on_error
from taskcarrier.lists.move import ListMove
from taskcarrier.lists.short_maps import Outcomes, find_short_call, map_short_list
from taskcarrier.lists.task import Calls, ListTask, PackedTask
from taskcarrier.notes import add_note, describe_items
from taskcarrier.run import (
    Settings,
    decide,
    execute,
    raise_first_failure,
    raise_if_missing,
    remember_call,
    run_nothing,
)
from taskcarrier.scheduling.grid import ChunkGrid, list_grid
from taskcarrier.scheduling.history import Known
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.processes.packed_chunks import PackedChunks, pickle_chunks
from taskcarrier.workers.records import DeliveredFailure, PartialResult, list_failed_ranges


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
    are_long: bool = False,
    known: Known | None = None,
) -> Any:
    """Return ``list(map(func, *sequences))``, run on the workers that `settings` ask for.

    With `are_arguments`, return ``list(starmap(func, *sequences))`` for one sequence of arguments.
    If errors are collected, return the failures too. Errors call an item by `noun`. With `are_long`
    each item is known to take long; `known` is what stands for `func` in the history.
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
    outcomes: Outcomes = {}
    is_usual = not (collect_errors or calls.passes_index or calls.call.kwargs)
    if items and is_usual and type(items) in {list, tuple, range}:
        grid = list_grid(len(items), chunksize)
        short_call = find_short_call(settings, func, len(items), lambda _: grid)
        if short_call is not None:
            results, outcomes = map_short_list(calls, items, short_call)
            if results is not None:
                return results
    size = len(items), 0
    executor = (
        decide(settings, func, over_lists=True, size=size, known=known) if items else run_nothing()
    )
    grid, task, move = _make_task(
        calls, items, chunksize, executor, settings, are_long=are_long, outcomes=outcomes
    )
    try:
        outcome = execute(
            task,
            grid,
            executor,
            settings,
            started_ns=started_ns,
            collect_errors=collect_errors,
            can_split=True,
            move=move,
        )
    finally:
        outcomes.clear()  # errors that were not raised refer to frames, and these to them
    if is_usual or known is not None:
        remember_call(known or func, len(items), 0, executor, outcome)
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
    *,
    are_long: bool,
    outcomes: Outcomes,
) -> tuple[ChunkGrid, ListTask | PackedTask, ListMove | None]:
    """Return the chunks of a list and the task over them, with the items where workers see them.

    If the caller may begin and hand over to processes, return how the items get there, too.
    `outcomes` are what the function has returned or raised before.
    """
    if executor.staging is None and not executor.may_move:
        return list_grid(len(items), chunksize, None), ListTask(calls, items, outcomes), None
    # A timeout is for each range, so ranges must not depend on the number of workers.
    n_workers = executor.choice.n_jobs if settings.retry_policy.timeout is None else None
    grid = list_grid(len(items), chunksize, n_workers)
    if executor.staging is None:
        move = ListMove(
            calls,
            items,
            grid,
            settings.new_staging(),
            executor.choice.n_jobs,
            are_long=are_long,
        )
        return grid, ListTask(calls, items, outcomes), move
    pickles = pickle_chunks(
        lambda start, stop: items[start:stop], grid, partial(describe_items, noun=calls.noun)
    )
    packed_chunks = PackedChunks.from_pickles(pickles, executor.staging)
    return grid, PackedTask(calls, packed_chunks, grid.chunksize), None


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

"""Short maps over lists: the calls, one after the other, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from operator import length_hint
from time import perf_counter
from typing import Any, NoReturn

from taskcarrier.lists.task import Calls
from taskcarrier.notes import add_note
from taskcarrier.report import ReportMaker
from taskcarrier.run import add_failure_note
from taskcarrier.scheduling import history
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.short_calls import MOST_SECONDS, Patience, make_short_report, run_short
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.thread_limits import thread_limit

# After so many blocks of items it is time to look at the clock; arbitrary.
_N_BLOCKS = 16


def map_short_list(
    calls: Calls,
    items: Sequence[Any],
    grid: ChunkGrid,
    keep_report: Callable[[ReportMaker], None],
) -> tuple[list[Any], bool]:
    """Return the results of a map that is taken for short, and whether they are all.

    They are only the first if it takes long after all.
    """
    results: list[Any] = []
    run = partial(_call, calls, items, grid, results)
    is_complete = run_short(calls.call.func, run, grid, 0, keep_report) is not None
    return results, is_complete


def _call(
    calls: Calls, items: Sequence[Any], grid: ChunkGrid, results: list[Any]
) -> list[Any] | None:
    # Of a copy: the function may change the list.
    func, items_left = calls.call.func, iter(list(items) if type(items) is list else items)
    n_items = len(items)
    patience = Patience(func)
    block_size = max(1, n_items // _N_BLOCKS)
    try:
        while len(results) < n_items:
            # Comprehensions, which cost no more than the user's own loop. (`map` would take a
            # StopIteration of func for the end.)
            block = islice(items_left, block_size)
            if calls.is_tuple:
                results += [func(*arguments) for arguments in block]
            else:
                results += [func(item) for item in block]
            if patience.has_ended and len(results) < n_items:
                return None
    except BaseException as error:
        # The iterator has already given the item that func was called with.
        number = max(0, n_items - length_hint(items_left) - 1)
        add_note(error, f"func failed on {calls.describe(number, number + 1)}")
        failed_range = grid.range_of(number // grid.chunksize)
        add_failure_note(error, calls.describe(*failed_range), "caller")
        raise
    return results


def stream_short_list(
    calls: Calls,
    items: Iterable[Any],
    block_size: int,
    keep_report: Callable[[ReportMaker], None],
    go_on: Callable[[Iterator[Any], int], Iterable[Any]],
) -> Generator[Any, None, None]:
    """Yield the results of a map that is taken for short, each when it is asked for.

    A block of `block_size` items is run at a time. If it takes long after all, `go_on` is called
    with the items that are left and the number of the first, and returns the other results.
    """
    call = partial(_call_with_tuple, calls.call.func) if calls.is_tuple else calls.call.func
    items_left = iter(items)
    number, busy_seconds = 0, 0.0
    patience, is_short = Patience(calls.call.func), True
    failure: BaseException | None = None
    begin = perf_counter()
    try:
        with thread_limit.open():
            while failure is None:
                results: list[Any] = []
                began = perf_counter()
                try:
                    this_thread.is_worker = True
                    for item in islice(items_left, block_size):
                        results.append(call(item))  # noqa: PERF401  # those before an error count
                except Exception as error:
                    if is_raised_by_handler(error):
                        raise
                    failure = error
                finally:
                    this_thread.is_worker = False
                    busy_seconds += perf_counter() - began
                if not results and failure is None:
                    break
                number += len(results)
                # Only what is spent in the function counts, and not what the caller does meanwhile.
                is_short = busy_seconds < MOST_SECONDS or not patience.has_ended
                yield from results
                if not is_short and failure is None:
                    break
        if not is_short and failure is None:
            yield from go_on(items_left, number)
            return
        if failure is not None:  # outside `except`: else it would be the context of what is raised
            raise_in_stream(failure, calls.describe(number, number + 1))
        history.remember(calls.call.func, busy_seconds, number, 0)
    finally:
        del failure
        if is_short:
            seconds = perf_counter() - begin
            grid = ChunkGrid(number, block_size)
            keep_report(partial(make_short_report, grid, seconds, busy_seconds))


def _call_with_tuple(func: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return func(*arguments)


def raise_in_stream(error: BaseException, where: str) -> NoReturn:
    """Raise what the function raised for an item of a stream, with a note that says where."""
    if isinstance(error, StopIteration):  # it would end the iterator silently
        cause, error = error, RuntimeError("func raised StopIteration")
        error.__cause__ = cause
    add_note(error, f"while mapping {where}")
    try:
        raise_again(error)
    finally:
        # The traceback refers to this frame, which must not refer to the error.
        del error

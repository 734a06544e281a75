"""Short maps over lists: the calls, one after the other, and little else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from operator import length_hint
from time import perf_counter
from typing import Any, NoReturn

from taskcarrier.lists.task import Calls
from taskcarrier.notes import add_note
from taskcarrier.run import Settings
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.short_calls import (
    MOST_SECONDS,
    Patience,
    ShortCall,
    ShortSettings,
)
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.records import Raised, WorkerStats
from taskcarrier.workers.thread_limits import thread_limit

Outcomes = dict[int, Any]
"""What a function has returned, by the number of its item; what it has raised is `Raised`."""


def find_short_call(
    settings: Settings,
    func: Callable[..., Any],
    n_items: int,
    make_grid: Callable[[Choice], ChunkGrid],
) -> ShortCall | None:
    """Return a call over a list if it is taken for short."""
    if not settings.may_be_short:
        return None
    short_settings = ShortSettings(
        settings.backend, settings.n_jobs, settings.balance.name, settings.keep_report
    )
    choice, known = short_settings.choose(func, n_items, 0)
    if choice is None:
        return None
    return ShortCall(func, known, make_grid(choice), 0, choice, short_settings)


def map_short_list(calls: Calls, items: Sequence[Any], call: ShortCall) -> tuple[Any, Outcomes]:
    """Return the results of a map that is taken for short; None if it goes the general way.

    And what the function has given so far, by the numbers of items.
    """
    work = _ListWork(calls, items)
    return call.run(work, can_join=True), work.outcomes


class _ListWork:
    """The work of one call (`taskcarrier.short_calls.ShortWork`)."""

    def __init__(self, calls: Calls, items: Sequence[Any]) -> None:
        self.outcomes: Outcomes = {}
        self._func = calls.call.func
        self._is_tuple = calls.is_tuple
        # A copy: the function may change the list.
        self._items = list(items) if type(items) is list else items
        self._results: dict[int, list[Any]] = {}  # by the first item of the unit

    def run_unit(self, start: int, stop: int) -> bool:
        """Run a unit, in any thread; return whether the call is still usual."""
        func, items_left = self._func, iter(self._items[start:stop])
        try:
            # Comprehensions, which cost no more than the user's own loop. (`map` would take a
            # StopIteration of func for the end.)
            if self._is_tuple:
                self._results[start] = [func(*arguments) for arguments in items_left]
            else:
                self._results[start] = [func(item) for item in items_left]
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            # The iterator has already given the item that func was called with. The results before
            # that are lost, and are not needed: the call ends with an error.
            number = max(start, stop - length_hint(items_left) - 1)
            self.outcomes.update(dict.fromkeys(range(start, number)))
            self.outcomes[number] = Raised(error)
            return False
        return True

    def join_results(self) -> list[Any] | None:
        """Return the results; None if something is unusual or missing, with all outcomes."""
        results = [*chain.from_iterable(self._results[start] for start in sorted(self._results))]
        if len(results) == len(self._items):
            return results
        for start, values in self._results.items():
            self.outcomes.update(enumerate(values, start))
        return None


def stream_short_list(
    calls: Calls,
    items: Iterable[Any],
    call: ShortCall,
    go_on: Callable[[Iterator[Any], int], Iterable[Any]],
) -> Generator[Any, None, None]:
    """Yield the results of a map that is taken for short, each when it is asked for.

    A chunk of items is run at a time. If it takes long after all, and the caller is not the only
    worker, `go_on` is called with the items that are left and the number of the first, and returns
    the other results.
    """
    func = partial(_call_with_tuple, call.func) if calls.is_tuple else call.func
    items_left, size = iter(items), call.grid.chunksize
    begins_in_caller = call.choice.begins_in_caller
    number, busy_seconds = 0, 0.0
    patience, is_short = Patience(call.func), True
    failure: BaseException | None = None
    begin = perf_counter()
    try:
        with thread_limit.open():
            while failure is None:
                results: list[Any] = []
                began = perf_counter()
                try:
                    this_thread.is_worker = True
                    for item in islice(items_left, size):
                        results.append(func(item))  # noqa: PERF401  # those before an error count
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
                is_short = (
                    not begins_in_caller or busy_seconds < MOST_SECONDS or not patience.has_ended
                )
                yield from results
                if not is_short and failure is None:
                    break
        if not is_short and failure is None:
            yield from go_on(items_left, number)
            return
        if failure is not None:  # outside `except`: else it would be the context of what is raised
            raise_in_stream(failure, calls.describe(number, number + 1))
        call._replace(grid=ChunkGrid(number, size)).remember(busy_seconds)
    finally:
        del failure
        if is_short:
            done = call._replace(grid=ChunkGrid(number, size))
            n_ranges = len(done.grid) if number else 0
            stats = WorkerStats(0, "caller", n_ranges, number, int(busy_seconds * 1e9))
            done.keep_report(perf_counter() - begin, [stats])


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

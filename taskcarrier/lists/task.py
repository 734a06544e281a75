"""The calls that a map over a list makes, as tasks: what worker processes need of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, replace
from functools import partial
from itertools import count
from operator import length_hint
from time import monotonic_ns
from typing import Any

from taskcarrier.memory.views import make_read_only
from taskcarrier.notes import READ_ONLY_ADVICE, add_note, describe_items, is_read_only_error
from taskcarrier.random_streams import WithRandomStream, random_streams_for
from taskcarrier.record import record
from taskcarrier.scheduling.retries import RetryPolicy, WithRetries
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call, check_extras
from taskcarrier.workers.processes.packed_chunks import PackedChunks
from taskcarrier.workers.queues import BatchResult
from taskcarrier.workers.records import DeliveredFailure, PartialResult, recall
from taskcarrier.workers.task import RunRange, WorkerContext


@record(kw_only=True)
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


@record
class ListTask:
    """Calls with items of this process, as a task.

    The function is not called again for `outcomes`, what it has returned before, by the numbers of
    items; what it has raised is `Raised`.
    """

    calls: Calls
    items: Sequence[Any]
    outcomes: dict[int, Any] = field(default_factory=dict)

    def start(self, worker: WorkerContext) -> RunRange:  # noqa: ARG002  # nothing to agree on
        """Return what calls the function with a range of the items."""
        calls, items = self.calls.bind_shared(), self.items
        if self.outcomes:
            recalling = partial(_recall_or_call, self.outcomes, calls.call.func)
            calls = replace(calls, call=Call(recalling), passes_index=True)
        return lambda start, stop: calls.call_items(items[start:stop], start)


def _recall_or_call(
    outcomes: dict[int, Any], func: Callable[..., Any], number: int, *arguments: Any
) -> Any:
    return recall(outcomes, number) if number in outcomes else func(*arguments)


@record
class PackedTask:
    """Calls with items that are pickled in shared memory by chunks, as a task."""

    calls: Calls
    packed_chunks: PackedChunks
    chunksize: int

    def start(self, worker: WorkerContext) -> RunRange:  # noqa: ARG002  # nothing to agree on
        """Return what calls the function with a range of the items."""
        calls, read_chunk = self.calls.bind_shared(), self.packed_chunks.open()

        def run_range(start: int, stop: int) -> list[Any] | PartialResult:
            index, skip = divmod(start, self.chunksize)
            items = read_chunk(index)  # after deaths, parts of a chunk are run
            return calls.call_items(items[skip : skip + stop - start], start)

        return run_range


@record
class StreamTask:
    """Calls with items that are handed to the worker, as a task."""

    calls: Calls

    def start(self, worker: WorkerContext) -> RunRange:
        """Return what calls the function with a range of the items."""
        calls = self.calls.bind_shared()

        def run_range(start: int, stop: int) -> BatchResult:
            first, read_items = worker.batch
            try:
                items = read_items()[start - first : stop - first]
            except Exception as error:  # noqa: BLE001  # unpickling objects may raise anything
                add_note(error, "taskcarrier could not unpickle these items in a worker process")
                failure = DeliveredFailure(start, stop, error)
                return BatchResult(start, stop, PartialResult([], [failure]))
            begin = monotonic_ns()
            result = calls.call_items(items, start)
            return BatchResult(start, stop, result, monotonic_ns() - begin)

        return run_range

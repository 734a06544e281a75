"""The work on one chunk of an array run: read it, call the function, put the result in place.

The function is called with chunks or with items; its results are put in place or handed to the
caller. Where errors are collected, a range that fails is narrowed down
to the items that fail, so what is missing at the end does not depend on how the array was cut.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import field
from itertools import repeat
from typing import Any

import numpy as np

from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import Source
from taskcarrier.arrays.outputs.buffers import OutputBuffer
from taskcarrier.arrays.outputs.ownership import own_memory, own_objects
from taskcarrier.arrays.outputs.stacking import ObjectRule, stack_values
from taskcarrier.arrays.outputs.writer import OutputWriter
from taskcarrier.memory.segments import trim_files
from taskcarrier.memory.views import copy_or_make_read_only, iterate_arrays
from taskcarrier.notes import READ_ONLY_ADVICE, add_note, is_read_only_error
from taskcarrier.record import record
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call
from taskcarrier.workers.records import DeliveredFailure, PartialResult, Where, recall
from taskcarrier.workers.task import IN_PLACE, RunRange, WorkerContext

# After this many bytes of chunks a worker drops the pages of files it has mapped; arbitrary.
_TRIM_NBYTES = 32 << 20


@record(kw_only=True)
class ArrayTask:
    """A function over ranges of arrays, as a task.

    Attributes
    ----------
    call : Call
        The function, and its further arguments.
    sources : list of Source
        Where the arrays are.
    axes : list of int
        The mapped axis of each array.
    by_item : bool
        Whether the function is called with items; else with chunks.
    writable : bool
        Whether the function gets private copies.
    copies_args : bool
        Whether every worker gets its own copies of arrays in `call`, which it may write to.
    halo : Halo or None
        The neighbours that are read with a chunk, and cut off its result.
    buffer : OutputBuffer or None
        Where results go; None if they are for the caller, which those of items never are.
    collect_errors : bool
        Whether errors are collected; else the first error ends the run.
    objects : str
        What becomes of Python objects that items give (`ObjectRule`).
    in_processes : bool
        Whether workers are processes, which drop the pages of files that they have read.
    passes_index : bool
        Whether the first argument of the function is the number of its item or chunk.
    chunksize : int
        The items in one chunk.
    outcomes : dict of (int, object)
        What the function has returned already, by the start of its range; what it has raised is
        `Raised`. It is not called again for these.
    returned : dict of (int, object)
        What workers have computed already, by the start of the range.
    """

    call: Call
    sources: list[Source]
    axes: list[int]
    by_item: bool
    writable: bool
    copies_args: bool
    halo: Halo | None
    buffer: OutputBuffer | None
    collect_errors: bool
    objects: ObjectRule
    in_processes: bool
    passes_index: bool = False
    chunksize: int = 1
    outcomes: dict[int, Any] = field(default_factory=dict)
    returned: dict[int, Any] = field(default_factory=dict)

    def start(self, worker: WorkerContext) -> RunRange:
        """Start the function in a worker: open its inputs and outputs."""
        runner = self.make_runner(worker)
        return runner.collect if self.collect_errors else runner.run

    def make_runner(self, worker: WorkerContext) -> RangeRunner:
        """Open inputs and outputs in a worker."""
        return (_ItemRunner if self.by_item else _ChunkRunner)(self, worker)


def explain_read_only(error: BaseException, *, writable: bool, has_extras: bool) -> None:
    """Add notes to an error of the function that tell the user what is read-only."""
    if is_read_only_error(error):
        if not writable:
            add_note(error, "chunks are read-only; pass writable=True for private copies")
        if has_extras:
            add_note(error, f"arrays in args and kwargs are read-only; {READ_ONLY_ADVICE}")


class RangeRunner(ABC):
    """An `ArrayTask` that was started in one worker."""

    def __init__(self, task: ArrayTask, worker: WorkerContext) -> None:
        self._task = task
        self._func = task.call.func
        copies, call = task.copies_args, task.call
        self._args = tuple(copy_or_make_read_only(value, own=copies) for value in call.args)
        self._kwargs = {
            name: copy_or_make_read_only(value, own=copies) for name, value in call.kwargs.items()
        }
        self._readers = [source.open() for source in task.sources]
        self._writer = None if task.buffer is None else OutputWriter(task.buffer, worker)
        self._writable = task.writable
        self._halo = task.halo
        self._in_processes = task.in_processes
        self._seen_nbytes = 0
        self._current_chunks: list[np.ndarray] = []

    def run(self, start: int, stop: int) -> Any:
        """Run a range; the first error ends it."""
        returned = self._task.returned
        result = returned[start] if start in returned else self.compute(start, stop)
        deferred = self._put_in_place(start, stop, result)
        return PartialResult(list(deferred), []) if deferred else IN_PLACE

    def collect(self, start: int, stop: int) -> Any:
        """Run a range and collect the errors of its items."""
        parts = PartialResult([], [])
        self._collect(start, stop, parts)
        return parts if parts.results or parts.failures else IN_PLACE

    @abstractmethod
    def compute(self, start: int, stop: int) -> Any:
        """Call the function on a range and return what it gives; its errors are the user's."""

    @abstractmethod
    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        """Compute a range and put its result in place; add the rest, and errors, to `parts`."""

    def _put_in_place(self, start: int, stop: int, result: Any) -> Sequence[tuple[Where, Any]]:
        """Put a result in place; return what cannot be, with its position, for the caller."""
        if self._writer is None:
            return ((slice(start, stop), own_memory(result, self._input_arrays)),)
        # Results of processes are copies, and so are numbers that are put in place.
        if not self._in_processes and (type(result) is not np.ndarray or result.dtype.hasobject):
            result = own_objects(result, self._input_arrays)
        margins = (0, 0) if self._halo is None else self._halo.margins(start, stop)
        return self._writer.write(start, stop, result, margins)

    def _read_chunks(self, start: int, stop: int) -> list[np.ndarray]:
        chunks = [read(start, stop) for read in self._readers]
        if self._writable:
            chunks = [chunk.copy(order="K") for chunk in chunks]
        if self._in_processes:
            self._seen_nbytes += sum(chunk.nbytes for chunk in chunks)
            if self._seen_nbytes > _TRIM_NBYTES:
                self._seen_nbytes = 0
                trim_files()
        self._current_chunks = chunks
        return chunks

    @property
    def _input_arrays(self) -> list[np.ndarray]:
        """The arrays that a result may be a view of."""
        return [*self._current_chunks, *iterate_arrays((self._args, self._kwargs))]

    def _explain(self, error: BaseException) -> None:
        has_extras = bool(self._args or self._kwargs)
        explain_read_only(error, writable=self._writable, has_extras=has_extras)


class _ChunkRunner(RangeRunner):
    """A runner that calls the function with chunks."""

    def compute(self, start: int, stop: int) -> Any:
        chunks: list[Any] = list(self._read_chunks(start, stop))
        if self._task.passes_index:
            chunks.insert(0, start // self._task.chunksize)
        try:
            if start in self._task.outcomes:
                return recall(self._task.outcomes, start)
            return self._func(*chunks, *self._args, **self._kwargs)
        except (ValueError, TypeError) as error:
            self._explain(error)
            raise

    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        middle = (start + stop) // 2
        can_split = middle > start and self._writer is not None and not self._task.passes_index
        try:
            result = self.compute(start, stop)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            if not can_split:
                parts.failures.append(DeliveredFailure(start, stop, error))
        else:
            parts.results += self._put_in_place(start, stop, result)
            return
        if can_split:  # outside `except`: else this error would be the context of the next
            self._collect(start, middle, parts)
            self._collect(middle, stop, parts)


class _ItemRunner(RangeRunner):
    """A runner that calls the function with items and stacks the values."""

    def __init__(self, task: ArrayTask, worker: WorkerContext) -> None:
        super().__init__(task, worker)
        self._out_axis = 0 if task.buffer is None else task.buffer.out_axis
        if self._kwargs:
            func, kwargs = self._func, self._kwargs
            self._func = lambda *args: func(*args, **kwargs)

    def _iterate_items(self, start: int, stop: int) -> list[Iterator[Any]]:
        """Return an iterator for each array, after one of item numbers if `passes_index` is set."""
        items: list[Iterator[Any]] = [
            iter(chunk) if axis == 0 else iter(chunk.transpose(_move_axis_first(axis, chunk.ndim)))
            for chunk, axis in zip(self._read_chunks(start, stop), self._task.axes, strict=True)
        ]
        return [iter(range(start, stop)), *items] if self._task.passes_index else items

    def _iterate_arguments(self, items: list[Iterator[Any]]) -> Iterator[tuple[Any, ...]]:
        return zip(*items, *map(repeat, self._args), strict=False)

    def compute(self, start: int, stop: int) -> Any:
        items = self._iterate_items(start, stop)
        try:
            # Not by `map`, for which a StopIteration of func is the end. With one argument this is
            # 4 to 10 % faster, too: the interpreter calls Python functions directly.
            func = self._func
            if self._task.outcomes:
                values = self._recall_or_call(items, start)
            elif len(items) == 1 and not self._args:
                values = [func(item) for item in items[0]]
            else:
                values = [func(*each) for each in self._iterate_arguments(items)]
        except BaseException as error:
            self._explain(error)
            # The iterator has already given the item that func was called with.
            add_note(error, f"func failed on item {stop - operator.length_hint(items[0]) - 1}")
            raise
        return self._stack(values, start)

    def _recall_or_call(self, items: list[Iterator[Any]], start: int) -> list[Any]:
        outcomes = self._task.outcomes
        return [
            recall(outcomes, number) if number in outcomes else self._func(*arguments)
            for number, arguments in enumerate(self._iterate_arguments(items), start)
        ]

    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        items = self._iterate_items(start, stop)
        arguments = self._iterate_arguments(items)
        while start < stop:
            values: list[Any] = []
            failures: list[DeliveredFailure] = []
            try:
                # After an error the values so far stay; their number gives the failed item.
                for each in arguments:
                    values.append(self._func(*each))  # noqa: PERF401  # as said
            except Exception as error:
                failed = start + len(values)
                # Otherwise the exception came from outside, between two items.
                is_raised_by_func = operator.length_hint(items[0]) < stop - failed
                if not is_raised_by_func or is_raised_by_handler(error):
                    raise
                self._explain(error)
                failures.append(DeliveredFailure(failed, failed + 1, error))
            if values:
                end = start + len(values)
                parts.results += self._put_in_place(start, end, self._stack(values, start))
            parts.failures += failures
            start += len(values) + len(failures)

    def _stack(self, values: list[Any], start: int) -> Any:
        return stack_values(
            values,
            start,
            self._out_axis,
            objects=self._task.objects,
        )


def _move_axis_first(axis: int, ndim: int) -> list[int]:
    """Return the order of axes that has `axis` first."""
    return [axis, *(other for other in range(ndim) if other != axis)]

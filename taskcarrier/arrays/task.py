"""What a chunk of an array run is: read chunks, call the function, put results in place.

Two ways to call it (with chunks, with items) and two ways for results (in place, handed to the
caller) make the four verbs. Where errors are collected, a range that fails is narrowed down to the
items that fail, so that what is missing in the end does not depend on how the array was cut.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from taskcarrier.arguments import arrays_within, own_or_read_only
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import Source
from taskcarrier.arrays.outputs.ownership import own_memory, own_objects
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.arrays.outputs.stacking import MixedDtypes, stack_values
from taskcarrier.arrays.outputs.writer import OutputWriter, Plan
from taskcarrier.memory.segments import trim_files
from taskcarrier.notes import CARRIED, add_note, is_of_read_only
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.call import Call
from taskcarrier.workers.records import Fault, PartialResult, Where
from taskcarrier.workers.task import IN_PLACE, Propose

# After so many bytes of chunks a worker lets go of the files it has mapped; arbitrary.
_TRIM_NBYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class ArrayTask:
    """`func` over ranges of arrays, as a task.

    Attributes
    ----------
    call : Call
        The function, and what it gets besides.
    sources : list of Source
        Where the items are.
    axes : list of int
        The mapped axis of each.
    by_item : bool
        Whether it is called with items; else with chunks.
    writable : bool
        Whether it gets private copies.
    copies_args : bool
        Whether every worker gets copies of arrays in its arguments, which it may write to.
    halo : Halo or None
        Neighbours that come with a chunk, and are cut off its result.
    plan : Plan or None
        Where results go; None if they are for the caller.
    collect_errors : bool
        Whether errors are collected; else the first one ends the run.
    takes_objects : bool
        Whether items may give any Python object.
    drop_file_pages : bool
        Whether workers are processes that let go of files they have gone through.
    passes_index : bool
        Whether the function is called with the number of its item or chunk before all else.
    chunksize : int
        Items of a chunk.
    """

    call: Call
    sources: list[Source]
    axes: list[int]
    by_item: bool
    writable: bool
    copies_args: bool
    halo: Halo | None
    plan: Plan | None
    collect_errors: bool
    takes_objects: bool
    drop_file_pages: bool
    passes_index: bool = False
    chunksize: int = 1

    def open(self, propose: Propose) -> _ChunkRunner | _ItemRunner:  # noqa: D102  # as in Task
        return (_ItemRunner if self.by_item else _ChunkRunner)(self, propose)


class _RangeRunner(ABC):
    """An `ArrayTask` opened in one worker."""

    def __init__(self, task: ArrayTask, propose: Propose) -> None:
        self._task = task
        self._func = task.call.func
        own, call = task.copies_args, task.call
        self._args = tuple(own_or_read_only(value, own=own) for value in call.args)
        self._kwargs = {
            name: own_or_read_only(value, own=own) for name, value in call.kwargs.items()
        }
        self._readers = [source.open() for source in task.sources]
        self._sink = None if task.plan is None else OutputWriter(task.plan, propose)
        self._collects = task.collect_errors
        self._writable = task.writable
        self._halo = task.halo
        self._trims = task.drop_file_pages
        self._seen_nbytes = 0
        self._current: list[np.ndarray] = []  # the chunks of this call

    def __call__(self, start: int, stop: int) -> Any:
        if not self._collects:
            left = self._keep(start, stop, self._compute(start, stop))
            return PartialResult(list(left), []) if left else IN_PLACE
        parts = PartialResult([], [])
        self._collect(start, stop, parts)
        return parts if parts.results or parts.faults else IN_PLACE

    @abstractmethod
    def _compute(self, start: int, stop: int) -> Any:
        """What the function makes of a range; its errors are the user's."""

    @abstractmethod
    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        """Compute and keep a range; errors go to `parts`."""

    def _keep(self, start: int, stop: int, result: Any) -> Sequence[tuple[Where, Any]]:
        """Put a result in place; what cannot be is returned, for the caller."""
        if self._sink is None:
            return ((slice(start, stop), own_memory(result, self._given)),)
        # What comes from a process is a copy, and so are numbers that are put in place.
        if not self._trims and (type(result) is not np.ndarray or result.dtype.hasobject):
            result = own_objects(result, self._given)
        margins = (0, 0) if self._halo is None else self._halo.margins(start, stop)
        left = self._sink.place(start, stop, result, margins)
        return () if left is None else ((slice(start, stop), left),)

    def _chunks(self, start: int, stop: int) -> list[np.ndarray]:
        chunks = [read(start, stop) for read in self._readers]
        if self._writable:
            chunks = [chunk.copy(order="K") for chunk in chunks]
        if self._trims:
            self._seen_nbytes += sum(chunk.nbytes for chunk in chunks)
            if self._seen_nbytes > _TRIM_NBYTES:
                self._seen_nbytes = 0
                trim_files()
        self._current = chunks
        return chunks

    @property
    def _given(self) -> list[np.ndarray]:
        """Arrays that a result may be a view of."""
        return [*self._current, *arrays_within((self._args, self._kwargs))]

    def _explain(self, error: BaseException) -> None:
        """Add what the user may want to know about an error of the function."""
        if is_of_read_only(error):
            if not self._writable:
                add_note(error, "chunks are read-only; pass writable=True for private copies")
            if self._args or self._kwargs:
                add_note(error, f"arrays in args and kwargs are read-only; {CARRIED}")

    def facts(self) -> tuple[int, Spec] | None:
        """Where this worker's first result came from, and what it was like."""
        return None if self._sink is None else self._sink.first


class _ChunkRunner(_RangeRunner):
    """The function is called with chunks."""

    def _compute(self, start: int, stop: int) -> Any:
        chunks: list[Any] = list(self._chunks(start, stop))
        if self._task.passes_index:
            chunks.insert(0, start // self._task.chunksize)
        try:
            return self._func(*chunks, *self._args, **self._kwargs)
        except (ValueError, TypeError) as error:
            self._explain(error)
            raise

    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        middle = (start + stop) // 2
        can_split = middle > start and self._sink is not None and not self._task.passes_index
        try:
            result = self._compute(start, stop)
        except Exception as error:
            if is_of_the_program(error):
                raise
            if not can_split:
                parts.faults.append((start, stop, error))
        else:
            parts.results += self._keep(start, stop, result)
            return
        if can_split:  # not while the error is handled: it would be the context of the next ones
            self._collect(start, middle, parts)
            self._collect(middle, stop, parts)


class _ItemRunner(_RangeRunner):
    """The function is called with items, whose values are stacked."""

    def __init__(self, task: ArrayTask, propose: Propose) -> None:
        super().__init__(task, propose)
        if self._kwargs:
            func, kwargs = self._func, self._kwargs
            self._func = lambda *args: func(*args, **kwargs)

    def _items(self, start: int, stop: int) -> list[Iterator[Any]]:
        """One iterator for each array, behind the numbers of the items where these are wanted."""
        items: list[Iterator[Any]] = [
            iter(chunk) if axis == 0 else iter(chunk.transpose(_first(axis, chunk.ndim)))
            for chunk, axis in zip(self._chunks(start, stop), self._task.axes, strict=True)
        ]
        return [iter(range(start, stop)), *items] if self._task.passes_index else items

    def _calls(self, items: list[Iterator[Any]]) -> Iterator[Any]:
        return map(self._func, *items, *map(repeat, self._args))

    def _compute(self, start: int, stop: int) -> Any:
        items = self._items(start, stop)
        try:
            if len(items) == 1 and not self._args:
                # 4 to 10 % faster than `map`: the interpreter calls Python functions directly.
                func = self._func
                values = [func(item) for item in items[0]]
            else:
                values = list(self._calls(items))
                _check_complete(values, stop - start)
        except BaseException as error:
            self._explain(error)
            # The item that func was called with is no longer to come.
            add_note(error, f"func failed on item {stop - operator.length_hint(items[0]) - 1}")
            raise
        return self._stack(values, start)

    def _collect(self, start: int, stop: int, parts: PartialResult) -> None:
        calls = self._calls(self._items(start, stop))
        while start < stop:
            values: list[Any] = []
            fault: list[Fault] = []
            try:
                # On an error the values so far stay, so their number tells the item.
                values.extend(calls)
                _check_complete(values, stop - start)
            except Exception as error:
                if is_of_the_program(error):
                    raise
                self._explain(error)
                failed = start + len(values)
                fault.append((failed, failed + 1, error))
            if values:
                end = start + len(values)
                parts.results += self._keep(start, end, self._stack(values, start))
            parts.faults += fault
            start += len(values) + len(fault)

    def _stack(self, values: list[Any], start: int) -> Any:
        plan = self._task.plan
        assert plan is not None  # for the type checker: items are always put in place
        return stack_values(
            values,
            start,
            plan.out_axis,
            takes_objects=self._task.takes_objects,
            as_objects=plan.asks_for_objects,
        )

    def _keep(self, start: int, stop: int, result: Any) -> Sequence[tuple[Where, Any]]:
        if not isinstance(result, MixedDtypes):
            return super()._keep(start, stop, result)
        assert self._sink is not None  # for the type checker: as above
        return [
            (start + positions, self._sink.check_result(start, len(positions), group))
            for positions, group in result.groups
        ]


def _check_complete(values: list[Any], n_items: int) -> None:
    if len(values) < n_items:  # a list takes it for the end of the items
        raise StopIteration("raised by func")


def _first(axis: int, ndim: int) -> list[int]:
    """The order of axes that brings one of them to the front."""
    return [axis, *(other for other in range(ndim) if other != axis)]

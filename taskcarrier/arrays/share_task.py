"""The work of a short map in a worker process, which gets its share of the arrays with its order.

What the function returns for the share is joined, and goes back with the worker's stats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from time import monotonic_ns
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.arrays.inputs.sources import Reader, Source
from taskcarrier.arrays.outputs.ownership import own_memory
from taskcarrier.arrays.outputs.writer import make_arrays
from taskcarrier.arrays.task import ArrayTask, explain_read_only
from taskcarrier.memory.strides import ALIGNMENT, address_of
from taskcarrier.record import record
from taskcarrier.scheduling.ledger import DONE, SENT, Ledger
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call
from taskcarrier.workers.records import WorkerStats
from taskcarrier.workers.task import Deliver, Job, RunRange, ShareTask, WorkerContext

# Larger results of one share are sent as those of any run are; arbitrary.
_MOST_NBYTES = 64 << 10
_KINDS = set("biufcmMSU")

Layout = tuple[str, tuple[int, ...], int, int]
"""The dtype of an array, the shape and the bytes of an item, and the address of the first one."""


def describe_layout(array: np.ndarray) -> Layout:
    """Return the layout of a C-contiguous array."""
    return array.dtype.str, array.shape[1:], array.nbytes // len(array), address_of(array)


@record
class ArrayShareTask(ShareTask):
    """A function over a share of C-contiguous arrays, as a task.

    Attributes
    ----------
    call : Call
        The function, and its further arguments, which are constants.
    share : bytes
        What `pack_shares` makes for this worker.
    by_item : bool
        Whether the function is called with items; else with chunks.
    joins : bool
        Whether results are to be one array, or a tuple of arrays; else there is one for each range.
    layouts : list of Layout
        The arrays. Workers give their share the address of the original modulo a cache line, as it
        decides on the order in which functions add up.
    starts : list of int
        The first item of each worker's share, and the number of items.
    """

    call: Call
    share: bytes
    by_item: bool
    joins: bool
    layouts: list[Layout]
    starts: list[int]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What makes it in a worker, besides the call and the share."""
        return self.by_item, self.joins, self.layouts, self.starts

    def pack_shares(self, arrays: Sequence[np.ndarray]) -> list[bytes]:
        """Return the bytes of each worker's items, array by array."""
        return [
            b"".join([array[start:stop].tobytes() for array in arrays])
            for start, stop in pairwise(self.starts)
        ]

    def run_share(self, job: Job, ledger: Ledger, stats: WorkerStats, deliver: Deliver) -> None:
        """Run the chunks of a worker's share; what they give goes back with its stats.

        This is what `taskcarrier.workers.loop.run_worker` does for tasks of other kinds, in fewer
        steps.
        """
        number, chunksize, marks, pid = stats.worker, job.grid.chunksize, ledger.marks, os.getpid()
        start, end = self.starts[number : number + 2]
        compute = self.start(WorkerContext(number, ledger.propose))
        results = JoinedResults(start, end) if self.joins else _CollectedResults()
        begin_ns = monotonic_ns()
        try:
            while start < end and not ledger.is_halted:
                ledger.hold(number, start // chunksize)
                stop = min(start + chunksize, end)
                stats.last_range = start, stop
                try:
                    result = compute(start, stop)
                finally:
                    if os.getpid() != pid:
                        os._exit(1)  # the function has forked, and both processes came back
                is_kept = results.put(result, start, stop)
                if not is_kept:
                    deliver(start, make_arrays(result, stop - start) if self.joins else result)
                if marks is not None:
                    marks[start // chunksize] = DONE if is_kept else SENT
                ledger.finish(number, stop - start)
                stats.n_ranges += 1
                stats.n_items += stop - start
                start = stop
        finally:
            stats.busy_ns = monotonic_ns() - begin_ns
            stats.facts = results.pack()

    def start(self, worker: WorkerContext) -> RunRange:
        """Start the function in a worker: open its share.

        Results are sent one by one, as it may take the place of a worker that has died.
        """
        first, end = self.starts[worker.number : worker.number + 2]
        arrays = self._open(first, end - first)
        if self.by_item:
            return self._start_items(arrays, first, worker)
        return self._start_chunks(arrays, first)

    def _open(self, first: int, n_items: int) -> list[np.ndarray]:
        arrays, begin = [], 0
        for dtype, item_shape, item_nbytes, address in self.layouts:
            nbytes = n_items * item_nbytes
            memory = np.empty(nbytes + ALIGNMENT, np.uint8)
            offset = (address + first * item_nbytes - address_of(memory)) % ALIGNMENT
            memory.data[offset : offset + nbytes] = self.share[begin : begin + nbytes]
            memory.flags.writeable = False
            arrays.append(np.ndarray((n_items, *item_shape), dtype, memory, offset))
            begin += nbytes
        return arrays

    def _start_chunks(self, arrays: list[np.ndarray], first: int) -> RunRange:
        func, args, kwargs = self.call.func, self.call.args, self.call.kwargs
        joins = self.joins

        def compute(start: int, stop: int) -> Any:
            chunks = [array[start - first : stop - first] for array in arrays]
            try:
                result = func(*chunks, *args, **kwargs)
            except (ValueError, TypeError) as error:
                explain_read_only(error, writable=False, has_extras=bool(args or kwargs))
                raise
            return result if joins else own_memory(result, chunks)

        return compute

    def _start_items(self, arrays: list[np.ndarray], first: int, worker: WorkerContext) -> RunRange:
        sources: list[Source] = [_ShareSource(array, first) for array in arrays]
        task = ArrayTask(
            call=self.call,
            sources=sources,
            axes=[0] * len(sources),
            by_item=True,
            writable=False,
            copies_args=False,
            halo=None,
            buffer=None,
            collect_errors=False,
            objects="refuse",
            in_processes=True,
        )
        return task.make_runner(worker).compute


@record
class _ShareSource:
    """The items of an array from number `first` on (`taskcarrier.arrays.inputs.sources.Source`)."""

    array: np.ndarray
    first: int

    def open(self) -> Reader:
        array, first = self.array, self.first
        return lambda start, stop: array[start - first : stop - first]


class ShareResults(NamedTuple):
    """The results of a share, as they are sent with a worker's stats.

    Attributes
    ----------
    ranges : list of (int, int)
        The ranges whose results are joined.
    first : int
        The first item of the joined arrays.
    parts : list of (str, tuple of int, bytes)
        The dtype, shape and content of each.
    is_tuple : bool
        Whether the function returns a tuple.
    by_start : dict of (int, bytes)
        The pickled results of other ranges, by the start.
    """

    ranges: list[tuple[int, int]]
    first: int
    parts: list[tuple[str, tuple[int, ...], bytes]]
    is_tuple: bool
    by_start: dict[int, bytes]

    @property
    def arrays(self) -> list[np.ndarray]:
        """The joined arrays, read-only."""
        return [np.ndarray(shape, dtype, content or None) for dtype, shape, content in self.parts]

    def split(self, chunksize: int) -> dict[int, Any]:
        """Return what is joined for each range, or for its parts in different chunks."""
        by_start: dict[int, Any] = {}
        arrays = self.arrays
        for first, last in self.ranges:
            begins = [first, *range(first - first % chunksize + chunksize, last, chunksize), last]
            for start, stop in pairwise(begins):
                results = tuple(array[start - self.first : stop - self.first] for array in arrays)
                by_start[start] = results if self.is_tuple else results[0]
        return by_start


class _CollectedResults:
    """The results of ranges of a share, pickled, in a worker; they become `ShareResults`."""

    def __init__(self) -> None:
        self._pickled: dict[int, bytes] = {}
        self._nbytes = 0

    def put(self, result: Any, start: int, stop: int) -> bool:  # noqa: ARG002  # as `JoinedResults`
        """Keep the result of a range; return False if it is large, or cannot be pickled."""
        from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # workers have it

        try:
            pickled = pickle_items(result)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            return False  # it is tried again, and its error explained, where others are sent
        self._nbytes += len(pickled)
        if self._nbytes > _MOST_NBYTES:
            return False
        self._pickled[start] = pickled
        return True

    def pack(self) -> tuple[Any, ...]:
        """Return the fields of the `ShareResults`."""
        return [], 0, [], False, self._pickled


class JoinedResults:
    """The results of a share as one array or tuple of arrays; they become `ShareResults`.

    Results that are unlike the first do not fit.
    """

    def __init__(self, first: int, end: int) -> None:
        self._first = first
        self._n_items = end - first
        self._arrays: list[np.ndarray] = []
        self._is_tuple = False
        self._only: np.ndarray | None = None  # the only array, if results are no tuples
        self._ranges: list[tuple[int, int]] = []

    def put(self, result: Any, start: int, stop: int) -> bool:
        """Put the result of a range in place; return False if it does not fit."""
        first, only = self._first, self._only
        # Most results are an array, which is put in place with few steps.
        if (
            only is not None
            and type(result) is np.ndarray
            and result.dtype == only.dtype
            and result.shape == (stop - start, *only.shape[1:])
        ):
            only[start - first : stop - first] = result
        elif not self._put_slowly(result, start - first, stop - first):
            return False
        ranges = self._ranges
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
        return True

    def _put_slowly(self, result: Any, start: int, stop: int) -> bool:
        is_tuple = type(result) is tuple
        results = result if is_tuple else (result,)
        if not self._arrays and not self._begin(results, stop - start, is_tuple=is_tuple):
            return False
        arrays = self._arrays
        if is_tuple is not self._is_tuple or len(results) != len(arrays):
            return False
        for one, array in zip(results, arrays, strict=True):
            if (
                type(one) is not np.ndarray
                or one.dtype != array.dtype
                or one.shape != (stop - start, *array.shape[1:])
            ):
                return False
            array[start:stop] = one
        return True

    def _begin(self, results: tuple[Any, ...], length: int, *, is_tuple: bool) -> bool:
        """Make room for results like these of `length` items; return False if they are unusual."""
        nbytes = 0
        for one in results:
            if type(one) is not np.ndarray or not one.ndim or one.dtype.kind not in _KINDS:
                return False
            nbytes += one.nbytes
        n_items = self._n_items
        if not results or n_items * nbytes > _MOST_NBYTES * length:
            return False
        self._arrays = [np.empty((n_items, *one.shape[1:]), one.dtype) for one in results]
        self._is_tuple = is_tuple
        self._only = None if is_tuple else self._arrays[0]
        return True

    def pack(self) -> tuple[Any, ...]:
        """Return the fields of the `ShareResults`."""
        parts = [(array.dtype.str, array.shape, array.tobytes()) for array in self._arrays]
        return self._ranges, self._first, parts, self._is_tuple, {}

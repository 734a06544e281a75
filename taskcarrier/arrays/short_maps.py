"""Short maps over plain arrays: a loop over the chunks or items, and little else.

A map that names no option but how to run, and constants for the function, over plain arrays, is
run here if it is taken for short (`taskcarrier.short_calls`). It has the grid of every call,
read-only chunks and one BLAS thread. Whatever is unusual goes the general way
(`taskcarrier.arrays.placed`), with what the function has returned or raised already: it is not
called again for that. So results, errors and their notes are the same on both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.arrays.call import Outcomes
from taskcarrier.arrays.outputs.ownership import own_memory
from taskcarrier.arrays.outputs.stacking import MixedDtypes, stack_values
from taskcarrier.arrays.short_processes import run_in_processes
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid, item_grid
from taskcarrier.short_calls import ShortCall, ShortSettings, is_count
from taskcarrier.workers.introspect import is_jitted
from taskcarrier.workers.records import Raised

# Larger results are checked against the memory that is left.
_MAX_NBYTES = 1 << 23
_CALL_OPTIONS = {"args", "kwargs", "chunksize"}
_ALL_OPTIONS = {*_CALL_OPTIONS, "n_jobs", "balance", "backend"}
_KINDS = set("biufcmMSU")
_SCALARS = {bool, int, float, complex, str, bytes, *np.sctypeDict.values()} - {np.object_}
_CONSTANTS = {type(None), type, np.object_, *_SCALARS}
_NUMBERS = {bool, float, complex}  # each of one type in compiled code; integers may have two
# A call of more chunks goes the general way: its units would take much memory.
_MAX_CHUNKS = 1 << 14

RunShort = Callable[
    [Callable[..., Any], tuple[Any, ...], Mapping[str, Any], ShortSettings | None],
    tuple[Any, Outcomes],
]
"""One of the functions below."""

NOT_SHORT = object()
"""What stands for the result of a call that goes the general way."""


def map_short_chunks(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    settings: ShortSettings | None = None,
) -> tuple[Any, Outcomes]:
    """Return what `map_array` returns if the call is short and usual; else `NOT_SHORT`.

    And what the function has given so far. By default, the settings are among the options.
    """
    return _run(_ChunkWork, func, arrays, options, settings)


def map_short_items(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    settings: ShortSettings | None = None,
) -> tuple[Any, Outcomes]:
    """Return the same of `map_items`."""
    return _run(_ItemWork, func, arrays, options, settings)


def collect_short_chunks(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    settings: ShortSettings | None = None,
) -> tuple[Any, Outcomes]:
    """Return the same of `map_chunks`."""
    return _run(_CollectingWork, func, arrays, options, settings)


def _run(
    kind: type[_Work],
    func: Any,
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    settings: ShortSettings | None,
) -> tuple[Any, Outcomes]:
    names = _CALL_OPTIONS
    if settings is None:
        settings, names = ShortSettings.from_options(options), _ALL_OPTIONS
    nbytes = _count_bytes(arrays) if callable(func) else None
    if settings is None or nbytes is None:
        return NOT_SHORT, {}
    if options and not (options.keys() <= names and _are_usual(options)):
        return NOT_SHORT, {}
    by_item = kind is _ItemWork
    n_items, chunksize = len(arrays[0]), options.get("chunksize")
    if by_item:
        grid = item_grid(n_items, chunksize)
    else:
        grid = chunk_grid(n_items, nbytes // n_items, chunksize)
    if settings.backend == "loky":
        joins = kind is not _CollectingWork
        result, replay = run_in_processes(
            func, arrays, options, settings, grid, by_item=by_item, joins=joins
        )
        return (NOT_SHORT if result is None else result), replay or {}
    choice, known = settings.choose(
        func, n_items, nbytes, kernel_args=options.get("args", ()) if by_item else None
    )
    if choice is None or (len(grid) > _MAX_CHUNKS and not by_item):
        return NOT_SHORT, {}
    call = ShortCall(func, known, grid, nbytes, choice, settings)
    if is_jitted(func):
        return _run_kernel(call, arrays, options) if by_item else (NOT_SHORT, {})
    work = kind(_bind_constants(func, len(arrays), options), arrays, grid)
    result = call.run(work, can_join=by_item)
    return (NOT_SHORT if result is None else result), work.outcomes


def _run_kernel(
    call: ShortCall, arrays: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, Outcomes]:
    """Do what `_run` does for a kernel of items, if its loop was compiled before."""
    from taskcarrier.arrays.kernels import short_loops  # noqa: PLC0415  # loads numba

    args = options.get("args", ())
    if options.get("kwargs") or not {*map(type, args)} <= _NUMBERS:
        return NOT_SHORT, {}
    work = short_loops.LoopWork.find(call, arrays, args, _MAX_NBYTES)
    if work is None:
        return NOT_SHORT, {}
    result = call.run(work, can_join=True, least_units=1)
    return (NOT_SHORT if result is None else result), work.outcomes


def _bind_constants(
    func: Callable[..., Any], n_arrays: int, options: Mapping[str, Any]
) -> Callable[..., Any]:
    if args := options.get("args"):
        func = partial(_call_with_constants, func, n_arrays, args)
    if kwargs := options.get("kwargs"):
        func = partial(func, **kwargs)
    return func


def _call_with_constants(
    func: Callable[..., Any], n: int, args: tuple[Any, ...], *chunks: Any, **kwargs: Any
) -> Any:
    return func(*chunks[:n], *args, **kwargs)


def _are_usual(options: Mapping[str, Any]) -> bool:
    """Return whether chunks and further arguments are usual: the latter are constants."""
    args, kwargs = options.get("args", ()), options.get("kwargs")
    if type(args) is not tuple or (kwargs is not None and type(kwargs) is not dict):
        return False
    names, values = (kwargs.keys(), kwargs.values()) if kwargs else ((), ())
    return (
        is_count(options.get("chunksize"), 1)
        and {*map(type, names)} <= {str}
        and {*map(type, args), *map(type, values)} <= _CONSTANTS
    )


def _count_bytes(arrays: tuple[Any, ...]) -> int | None:
    """Return the bytes of arrays; None if there is none, or if one of them is not usual."""
    nbytes = 0
    for array in arrays:
        if (
            type(array) is not np.ndarray
            or array.ndim == 0
            or array.dtype.kind not in _KINDS
            or not array.flags.c_contiguous
            or array.nbytes == 0
            or len(array) != len(arrays[0])
            # A view of a memmap is mapped as a file.
            or not (array.base is None or type(array.base) is np.ndarray)
        ):
            return None
        nbytes += array.nbytes
    return nbytes or None


class _Work(ABC):
    """The work of one call (`taskcarrier.short_calls.ShortWork`)."""

    def __init__(
        self, func: Callable[..., Any], arrays: tuple[np.ndarray, ...], grid: ChunkGrid
    ) -> None:
        self.outcomes: dict[int, Any] = {}
        self._func = func
        # Chunks are views of these, so they are read-only too.
        self._arrays = [array.view() for array in arrays]
        for view in self._arrays:
            view.flags.writeable = False
        self._n_items = grid.n_items
        self._chunksize = grid.chunksize

    @abstractmethod
    def run_unit(self, start: int, stop: int) -> bool:
        """Run a unit, in any thread; return whether the call is still usual."""

    @abstractmethod
    def join_results(self) -> Any:
        """Return the result; None if something is unusual or missing, with all outcomes."""


class _ChunkWork(_Work):
    """The work of `map_array`: results are put in place."""

    _outputs: _Outputs | None = None
    # A result that is one array is put in place here, which takes 1 µs less.
    _out: np.ndarray | None = None

    def __init__(
        self, func: Callable[..., Any], arrays: tuple[np.ndarray, ...], grid: ChunkGrid
    ) -> None:
        super().__init__(func, arrays, grid)
        # A list of chunks takes longer than one.
        self._only = self._arrays[0] if len(arrays) == 1 else None
        # The first is that of all workers: adding one is a call into C.
        self._candidates: list[_Outputs] = []
        self._starts: list[int] = []  # of chunks whose results are in place

    def run_unit(self, start: int, stop: int) -> bool:
        try:
            if self._only is None:
                result = self._func(*[array[start:stop] for array in self._arrays])
            else:
                result = self._func(self._only[start:stop])
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            self.outcomes[start] = Raised(error)
            return False
        place = None if self._out is None else self._out[start:stop]
        if (
            place is not None
            and type(result) is np.ndarray
            and result.dtype == place.dtype
            and result.shape == place.shape
        ):
            place[...] = result
        elif not self._put(result, start, stop):
            self.outcomes[start] = result
            return False
        self._starts.append(start)
        return True

    def _put(self, result: Any, start: int, stop: int) -> bool:
        """Put a result in place; return False if it is unusual."""
        if self._outputs is None:
            candidate = _Outputs.make(result, self._n_items, stop - start)
            if candidate is None:
                return False
            self._candidates.append(candidate)
            self._outputs = outputs = self._candidates[0]
            if not outputs.is_tuple:
                (self._out,) = outputs.arrays
        return self._outputs.put(result, start, stop)

    def join_results(self) -> np.ndarray | tuple[np.ndarray, ...] | None:
        outputs, size = self._outputs, self._chunksize
        if outputs is None:
            return None
        if len(self._starts) * size >= self._n_items:
            return outputs.get(0, self._n_items)  # type: ignore[no-any-return]  # as it says
        for start in self._starts:
            self.outcomes[start] = outputs.get(start, min(start + size, self._n_items))
        return None


class _Outputs(NamedTuple):
    """The whole results.

    Attributes
    ----------
    arrays : tuple of ndarray
        The results.
    is_tuple : bool
        Whether the function returns a tuple.
    """

    arrays: tuple[np.ndarray, ...]
    is_tuple: bool

    @classmethod
    def make(cls, result: Any, n_items: int, length: int) -> _Outputs | None:
        """Return outputs for results like that of the first `length` items; None if unusual."""
        results = result if type(result) is tuple else (result,)
        if not results or not all(map(_is_usual, results)):
            return None
        if n_items * sum(each.nbytes for each in results) > _MAX_NBYTES * length:
            return None
        arrays = tuple(np.empty((n_items, *each.shape[1:]), each.dtype) for each in results)
        return cls(arrays, type(result) is tuple)

    def put(self, result: Any, start: int, stop: int) -> bool:
        """Put a result in place; return False if it is not like the first."""
        results = result if type(result) is tuple else (result,)
        if (type(result) is tuple) is not self.is_tuple or len(results) != len(self.arrays):
            return False
        for each, array in zip(results, self.arrays, strict=True):
            if (
                type(each) is not np.ndarray
                or each.dtype != array.dtype
                or each.shape != (stop - start, *array.shape[1:])
            ):
                return False
            array[start:stop] = each
        return True

    def get(self, start: int, stop: int) -> Any:
        """Return the results of a range as the function returned them."""
        if stop - start == len(self.arrays[0]):
            return self.arrays if self.is_tuple else self.arrays[0]
        parts = tuple(array[start:stop] for array in self.arrays)
        return parts if self.is_tuple else parts[0]


def _is_usual(result: Any) -> bool:
    return type(result) is np.ndarray and result.ndim > 0 and result.dtype.kind in _KINDS


class _CollectingWork(_Work):
    """The work of `map_chunks`: results are listed."""

    def run_unit(self, start: int, stop: int) -> bool:
        chunks = [array[start:stop] for array in self._arrays]
        try:
            self.outcomes[start] = own_memory(self._func(*chunks), chunks)
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            self.outcomes[start] = Raised(error)
            return False
        return True

    def join_results(self) -> list[Any] | None:
        outcomes = self.outcomes
        if len(outcomes) * self._chunksize < self._n_items:
            return None
        results = [outcomes[start] for start in range(0, self._n_items, self._chunksize)]
        return None if any(type(result) is Raised for result in results) else results


class _ItemWork(_Work):
    """The work of `map_items`: values are stacked at the end."""

    def __init__(
        self, func: Callable[..., Any], arrays: tuple[np.ndarray, ...], grid: ChunkGrid
    ) -> None:
        super().__init__(func, arrays, grid)
        self._values: dict[int, list[Any]] = {}  # by the first item of the unit

    def run_unit(self, start: int, stop: int) -> bool:
        values = self._values[start] = list[Any]()
        for first in range(start, stop, self._chunksize):
            last = min(first + self._chunksize, stop)
            given = self._call(first, last)
            # At the end of each chunk, as on the general way: the function may fill the same array
            # for each item.
            copies = list(map(_copy_value, given))
            if len(copies) < last - first or any(copy is None for copy in copies):
                self.outcomes.update(enumerate(given, first))
                return False
            values += copies
        return True

    def _call(self, start: int, stop: int) -> list[Any]:
        """Return what the function gives for the items of a chunk, until it raises."""
        func, values = self._func, list[Any]()
        views = [array[start:stop] for array in self._arrays]
        try:
            for items in zip(*views, strict=True):
                values.append(func(*items))
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            self.outcomes[start + len(values)] = Raised(error)
        return values

    def join_results(self) -> np.ndarray | tuple[np.ndarray, ...] | None:
        values = [*chain.from_iterable(self._values[start] for start in sorted(self._values))]
        if len(values) == self._n_items:
            try:
                result = stack_values(values, 0, 0, objects="refuse")
            except (TypeError, ValueError):  # the general way says in which items
                result = None
            if result is not None and not isinstance(result, MixedDtypes):
                return result  # type: ignore[no-any-return]  # arrays, as it is neither of the others
        for start, results in self._values.items():
            self.outcomes.update(enumerate(results, start))
        return None


def _copy_value(value: Any) -> Any:
    """Return a copy of what func has returned for an item; None if it is unusual."""
    if type(value) in _SCALARS:
        return value
    if type(value) is np.ndarray:
        return value.copy()
    if type(value) is tuple and all(type(part) in _SCALARS | {np.ndarray} for part in value):
        return tuple(part.copy() if type(part) is np.ndarray else part for part in value)
    return None

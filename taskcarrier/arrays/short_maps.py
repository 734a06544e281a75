"""Short maps over plain arrays: a loop over the chunks or items, and nothing else.

A map that names no option but how to run, and constants for the function, over plain arrays, is
run here if it is known to be short (`taskcarrier.short_calls`). It has the grid of every call,
read-only chunks and one BLAS thread. Whatever is unusual goes the general way
(`taskcarrier.arrays.placed`), with what the function has returned or raised already: it is not
called again for that. So results, errors and their notes are the same on both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from taskcarrier.arrays.outputs.ownership import own_memory
from taskcarrier.arrays.outputs.stacking import MixedDtypes, stack_values
from taskcarrier.arrays.task import Raised
from taskcarrier.report import ReportMaker
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid, item_grid
from taskcarrier.short_calls import Patience, is_count, is_short, run_short

# Larger results are checked against the memory that is left.
_MAX_NBYTES = 1 << 23
# After so many blocks of items it is time to look at the clock; arbitrary.
_N_BLOCKS = 16
_RUN_OPTIONS = {"n_jobs", "balance", "chunksize"}
_CALL_OPTIONS = {"args", "kwargs"}
_KINDS = set("biufcmMSU")
_CONSTANTS = {type(None), bool, int, float, complex, str, bytes, type, *np.sctypeDict.values()}

KeepReport = Callable[[ReportMaker], None]
RunShort = Callable[
    [Callable[..., Any], tuple[Any, ...], Mapping[str, Any], KeepReport],
    tuple[Any, "Outcomes"],
]
"""One of the functions below."""
Outcomes = dict[int, Any]
"""What a function has returned, by the start of its chunk or the number of its item; what it has
raised is `Raised`."""

NOT_SHORT = object()
"""What stands for the result of a call that goes the general way."""


class _ShortCall(NamedTuple):
    """A short and usual call.

    Attributes
    ----------
    func : callable
        The function, with its constants.
    arrays : tuple of ndarray
        The arrays, which are C-contiguous and of one length.
    grid : ChunkGrid
        The chunks.
    outcomes : dict
        Where what the function has given is put, if the call is unusual after all.
    patience : Patience
        The time that the call may take.
    """

    func: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    grid: ChunkGrid
    outcomes: Outcomes
    patience: Patience


def map_short_chunks(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    keep_report: KeepReport,
) -> tuple[Any, Outcomes]:
    """Return what `map_array` returns if the call is short and usual; else `NOT_SHORT`.

    And what the function has given so far.
    """
    return _run(_call_with_chunks, (func, arrays, options), keep_report)


def map_short_items(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    keep_report: KeepReport,
) -> tuple[Any, Outcomes]:
    """Return the same of `map_items`."""
    return _run(_call_with_items, (func, arrays, options), keep_report, by_item=True)


def collect_short_chunks(
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    keep_report: KeepReport,
) -> tuple[Any, Outcomes]:
    """Return the same of `map_chunks`."""
    return _run(_collect_from_chunks, (func, arrays, options), keep_report)


def _run(
    run: Callable[[_ShortCall], Any],
    arguments: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]],
    keep_report: KeepReport,
    *,
    by_item: bool = False,
) -> tuple[Any, Outcomes]:
    func: Any
    func, arrays, options = arguments
    if not arrays or not callable(func) or (options and not _are_usual(options)):
        return NOT_SHORT, {}
    nbytes = _count_bytes(arrays)
    if nbytes is None or not is_short(func, len(arrays[0]), nbytes):
        return NOT_SHORT, {}
    n_items, chunksize = len(arrays[0]), options.get("chunksize")
    if by_item:
        grid = item_grid(n_items, chunksize)
    else:
        grid = chunk_grid(n_items, nbytes // n_items, chunksize)
    bound = func
    if args := options.get("args"):
        bound = partial(_call_with_constants, func, len(arrays), args)
    if kwargs := options.get("kwargs"):
        bound = partial(bound, **kwargs)
    call = _ShortCall(bound, arrays, grid, {}, Patience(func))
    result = run_short(func, partial(run, call), grid, nbytes, keep_report)
    return (NOT_SHORT if result is None else result), call.outcomes


def _call_with_constants(
    func: Callable[..., Any], n: int, args: tuple[Any, ...], *chunks: Any, **kwargs: Any
) -> Any:
    return func(*chunks[:n], *args, **kwargs)


def _are_usual(options: Mapping[str, Any]) -> bool:
    """Return whether options say nothing but how to run, and constants."""
    if not (
        options.keys() <= _RUN_OPTIONS | _CALL_OPTIONS
        and options.get("balance", "static") in ("static", "dynamic")
        and is_count(options.get("n_jobs"))
        and options.get("n_jobs") != 1
        and is_count(options.get("chunksize"), 1)
    ):
        return False
    args, kwargs = options.get("args", ()), options.get("kwargs")
    if type(args) is not tuple or (kwargs is not None and type(kwargs) is not dict):
        return False
    names, values = (kwargs.keys(), kwargs.values()) if kwargs else ((), ())
    return {*map(type, names)} <= {str} and {*map(type, args), *map(type, values)} <= _CONSTANTS


def _count_bytes(arrays: tuple[Any, ...]) -> int | None:
    """Return the bytes of arrays; None if one of them is not usual."""
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
    return nbytes


def _call_with_chunks(call: _ShortCall) -> np.ndarray | tuple[np.ndarray, ...] | None:
    """Return the result; None if something is unusual, and what func has given in `outcomes`."""
    func, arrays, outcomes = call.func, call.arrays, call.outcomes
    n_items, size = call.grid.n_items, call.grid.chunksize
    outputs: _Outputs | None = None
    # A result that is one array is put in place here, which takes 1 µs less.
    out: np.ndarray | None = None
    for start in range(0, n_items, size):
        stop = min(start + size, n_items)
        try:
            result = func(*_read(arrays, start, stop))
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            result = Raised(error)
        if (
            out is not None
            and type(result) is np.ndarray
            and result.dtype == out.dtype
            and result.shape == (stop - start, *out.shape[1:])
        ):
            out[start:stop] = result
            if call.patience.has_ended and stop < n_items:
                _recall(outcomes, outputs, stop, size)
                return None
            continue
        if outputs is None:
            outputs = _Outputs.make(result, n_items, stop)
            if outputs is not None and not outputs.is_tuple:
                (out,) = outputs.arrays
        if outputs is None or not outputs.put(result, start, stop):
            _recall(outcomes, outputs, start, size)
            outcomes[start] = result
            return None
        if call.patience.has_ended and stop < n_items:
            _recall(outcomes, outputs, stop, size)
            return None
    return None if outputs is None else outputs.get(0, n_items)


def _recall(outcomes: Outcomes, outputs: _Outputs | None, stop: int, size: int) -> None:
    """Keep the results of all chunks before `stop`."""
    if outputs is not None:
        outcomes.update((start, outputs.get(start, start + size)) for start in range(0, stop, size))


def _read(arrays: tuple[np.ndarray, ...], start: int, stop: int) -> list[np.ndarray]:
    chunks = [array[start:stop] for array in arrays]
    for chunk in chunks:
        chunk.flags.writeable = False
    return chunks


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


def _collect_from_chunks(call: _ShortCall) -> list[Any] | None:
    """Return a list of results; None if func has raised, and what it has given in `outcomes`."""
    n_items, size = call.grid.n_items, call.grid.chunksize
    for start in range(0, n_items, size):
        chunks = _read(call.arrays, start, min(start + size, n_items))
        try:
            call.outcomes[start] = own_memory(call.func(*chunks), chunks)
        except BaseException as error:  # noqa: BLE001  # the general way raises it
            call.outcomes[start] = Raised(error)
            return None
        if call.patience.has_ended and start + size < n_items:
            return None
    return list(call.outcomes.values())


def _call_with_items(call: _ShortCall) -> np.ndarray | tuple[np.ndarray, ...] | None:
    """Return the result; None if something is unusual, and what func has given in `outcomes`."""
    func, n_items = call.func, call.grid.n_items
    block_size = max(1, n_items // _N_BLOCKS)
    values: list[Any] = []
    try:
        for start in range(0, n_items, block_size):
            views = _read(call.arrays, start, start + block_size)
            if len(views) == 1:
                for item in views[0]:
                    values.append(func(item))  # noqa: PERF401  # those before an error count
            else:
                for items in zip(*views, strict=True):
                    values.append(func(*items))  # noqa: PERF401  # as above
            if call.patience.has_ended and len(values) < n_items:
                break
    except BaseException as error:  # noqa: BLE001  # the general way raises it
        values.append(Raised(error))
    if len(values) == n_items and type(values[-1]) is not Raised:
        try:
            result = stack_values(values, 0, 0, objects="refuse")
        except (TypeError, ValueError):  # the general way says in which items
            result = None
        if result is not None and not isinstance(result, MixedDtypes):
            return result  # type: ignore[no-any-return]  # arrays, as it is neither of the others
    call.outcomes.update(enumerate(values))
    return None

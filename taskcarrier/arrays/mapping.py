"""`map_array`, `map_items` and `map_chunks`: array maps with results in the order of items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Unpack, overload

from taskcarrier.arguments import check_on_error
from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.casting import (
    MakeFill,
    cast_scalar,
    find_missing_value,
    require_missing_value,
)
from taskcarrier.arrays.collected import run_collected
from taskcarrier.arrays.kernels.prepare import check_row
from taskcarrier.arrays.outputs.request import check_out_axis, check_output_request
from taskcarrier.arrays.placed import PlacedMap
from taskcarrier.arrays.short_maps import (
    NOT_SHORT,
    collect_short_chunks,
    map_short_chunks,
    map_short_items,
)
from taskcarrier.options import (
    UNSET,
    ChunksOptions,
    CollectOption,
    MapArrayOptions,
    MapItemsOptions,
    OnErrorOption,
)
from taskcarrier.run import Settings
from taskcarrier.verbs import Verb
from taskcarrier.workers.records import DeliveredFailure, list_failed_ranges

if TYPE_CHECKING:
    from datetime import date, timedelta

    import numpy as np
    from numpy.typing import NDArray

    from taskcarrier.errors import FailedRange

    class _Array(Protocol):
        def __array__(self) -> Any: ...

    # What functions return. `object` in place of the first would also mean tuples; then mypy takes
    # the result of a function that returns a tuple of arrays for Any.
    _Number = complex | np.generic | date | timedelta
    _Value = NDArray[Any] | _Array | _Number | str | bytes | list[Any] | dict[Any, Any] | None
    ArrayFunction = Callable[..., _Value]
    TupleFunction = Callable[..., tuple[Any, ...]]
    Array = NDArray[Any]
    Arrays = tuple[NDArray[Any], ...]

R = TypeVar("R")

MAP_ARRAY = Verb.from_groups("map_array", MapArrayOptions, OnErrorOption)
MAP_ITEMS = Verb.from_groups("map_items", MapItemsOptions, OnErrorOption)
MAP_CHUNKS = Verb.from_groups("map_chunks", ChunksOptions, CollectOption)


@overload
def map_array(
    func: ArrayFunction,
    *arrays: Any,
    on_error: Literal["raise", "fill"] = ...,
    **options: Unpack[MapArrayOptions],
) -> Array: ...
@overload
def map_array(
    func: TupleFunction,
    *arrays: Any,
    on_error: Literal["raise", "fill"] = ...,
    **options: Unpack[MapArrayOptions],
) -> Arrays: ...
@overload
def map_array(
    func: ArrayFunction,
    *arrays: Any,
    on_error: Literal["collect"],
    **options: Unpack[MapArrayOptions],
) -> tuple[Array | Any, list[FailedRange]]: ...
@overload
def map_array(
    func: TupleFunction,
    *arrays: Any,
    on_error: Literal["collect"],
    **options: Unpack[MapArrayOptions],
) -> tuple[Arrays | Any, list[FailedRange]]: ...
@MAP_ARRAY.document
def map_array(func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Map a function over chunks of arrays on every core, and put the results in place.

    The result equals ``func(*arrays, *args, **kwargs)`` for every function that treats the
    positions along `axis` independently; with `depth`, for every function that looks at most
    `depth` positions away.

    `func` must take one chunk of each array (the axis is kept, so a chunk has as many axes as its
    array) and return an array of the same length along the mapped axis; for every chunk it must
    return the same dtype and the same lengths of other axes. (For functions of one item there is
    `map_items`.) It is called once for each range, in any order, in other threads or processes, so
    it should not depend on earlier calls. Chunks and arrays in `args` and `kwargs` are read-only.
    For processes `func` must be picklable; functions of ``__main__``, lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``. If it returns a tuple
        of arrays, the result is a tuple too.
    *arrays : array_like
        One or several arrays of equal length along the mapped axis.
    **options
        See `taskcarrier.options`.

    Returns
    -------
    ndarray or tuple of ndarray
        `out` if it was given (for a path: the file, mapped), else ordinary writable arrays.
        After a map in processes these lie in shared memory: another map over them copies nothing.
        (Not after a short call, which gives a few KiB.)
        With ``on_error="collect"`` a tuple of this and a list of `FailedRange`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If arguments are bad, before anything is started; if results have a wrong length, or
        different dtypes or shapes (the message shows both).
    WorkerDiedError
        If a range has killed every worker process that ran it; the message says which range, which
        worker and how.
    TimeoutError
        If a range took longer than `timeout`.
    Exception
        Whatever `func` raises, with a note that names the range.

    Warns
    -----
    UserWarning
        With `resume`, if something can be compared with the earlier run only by its type or in
        samples.

    Notes
    -----
    An array without items is passed to `func` once, in the caller.
    A map that is called inside a worker is serial.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import map_array
    >>> X = np.arange(12.0).reshape(4, 3)
    >>> map_array(lambda chunk: chunk - chunk.mean(axis=1, keepdims=True), X, n_jobs=2)
    array([[-1.,  0.,  1.],
           [-1.,  0.,  1.],
           [-1.,  0.,  1.],
           [-1.,  0.,  1.]])
    """
    result, outcomes = map_short_chunks(func, arrays, options)
    if result is not NOT_SHORT:
        return result
    filled = MAP_ARRAY.fill(options)
    return prepare_chunks(Settings.from_options(filled), func, arrays, filled).run(outcomes)


@overload
def map_items(
    func: ArrayFunction,
    *arrays: Any,
    on_error: Literal["raise", "fill"] = ...,
    **options: Unpack[MapItemsOptions],
) -> Array: ...
@overload
def map_items(
    func: TupleFunction,
    *arrays: Any,
    on_error: Literal["raise", "fill"] = ...,
    **options: Unpack[MapItemsOptions],
) -> Arrays: ...
@overload
def map_items(
    func: ArrayFunction,
    *arrays: Any,
    on_error: Literal["collect"],
    **options: Unpack[MapItemsOptions],
) -> tuple[Array | Any, list[FailedRange]]: ...
@overload
def map_items(
    func: TupleFunction,
    *arrays: Any,
    on_error: Literal["collect"],
    **options: Unpack[MapItemsOptions],
) -> tuple[Arrays | Any, list[FailedRange]]: ...
@MAP_ITEMS.document
def map_items(func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Map a function over the items of arrays on every core, and stack the results.

    The result equals
    ``np.stack([func(x, ..., *args, **kwargs) for x, ... in zip(*arrays)], out_axis)``, with the
    items taken along `axis`.

    `func` must take one item of each array (the axis is removed: of a one-dimensional array, a
    NumPy scalar) and return a number or an array, of the same shape for every item. Values of
    different dtypes promote as in `numpy.stack`. `func` is called once for each item, in any
    order, in other threads or processes. Items and arrays in `args` and `kwargs` are read-only.
    For processes it must be picklable; functions of ``__main__``, lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(item, ..., *args, **kwargs)``. If it returns a tuple
        of values, the result is a tuple too.
    *arrays : array_like
        One or several arrays of equal length along the mapped axis.
    **options
        See `taskcarrier.options`.

    Returns
    -------
    ndarray or tuple of ndarray
        `out` if it was given (for a path: the file, mapped), else ordinary writable arrays.
        Without items `func` is not called, and the result has shape ``(0,)``.
        With ``on_error="collect"`` a tuple of this and a list of `FailedRange`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If arguments are bad, before anything is started; if values have different shapes, or are
        neither arrays nor numbers (``dtype=object`` collects other objects).
    WorkerDiedError
        If a range has killed every worker process that ran it; the message says which range, which
        worker and how.
    TimeoutError
        If a range took longer than `timeout`.
    Exception
        Whatever `func` raises, with a note that names the item.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import map_items
    >>> map_items(lambda row: row.max() - row.min(), np.arange(6).reshape(2, 3), n_jobs=2)
    array([2, 2])
    """
    result, outcomes = map_short_items(func, arrays, options)
    if result is not NOT_SHORT:
        return result
    filled = MAP_ITEMS.fill(options)
    return prepare_items(Settings.from_options(filled), func, arrays, filled).run(outcomes)


@overload
def map_chunks(
    func: Callable[..., R],
    *arrays: Any,
    on_error: Literal["raise"] = ...,
    **options: Unpack[ChunksOptions],
) -> list[R]: ...
@overload
def map_chunks(
    func: Callable[..., R],
    *arrays: Any,
    on_error: Literal["collect"],
    **options: Unpack[ChunksOptions],
) -> tuple[list[R | None], list[FailedRange]]: ...
@MAP_CHUNKS.document
def map_chunks(func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """Call a function with every chunk of arrays on every core, and return a list of the results.

    `func` must take one chunk of each array (the axis is kept). It may return anything; worker
    processes send it back pickled. `func` is called once for each range, in any order, in other
    threads or processes. Chunks and arrays in `args` and `kwargs` are read-only. For processes it
    must be picklable; functions of ``__main__``, lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``.
    *arrays : array_like
        One or several arrays of equal length along the mapped axis.
    **options
        See `taskcarrier.options`.

    Returns
    -------
    list
        What `func` returned, in the order of the ranges. An array without items has one range,
        which is empty. With ``on_error="collect"`` a tuple of this and a list of `FailedRange`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If arguments are bad, before anything is started.
    WorkerDiedError
        If a range has killed every worker process that ran it; the message says which range, which
        worker and how.
    TimeoutError
        If a range took longer than `timeout`.
    Exception
        Whatever `func` raises, with a note that names the range.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import map_chunks
    >>> map_chunks(np.ndarray.tolist, np.arange(5), chunksize=2, n_jobs=2)
    [[0, 1], [2, 3], [4]]
    """
    result, outcomes = collect_short_chunks(func, arrays, options)
    if result is not NOT_SHORT:
        return result
    filled = MAP_CHUNKS.fill(options)
    call = prepare_collecting(Settings.from_options(filled), func, arrays, filled)
    return list_results(call, *run_collected(call, outcomes))


def prepare_chunks(
    settings: Settings,
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
) -> PlacedMap:
    """Check the arguments of `map_array`, and return what it is to run."""
    on_error = check_on_error(options["on_error"])
    call = ArrayCall.from_options(
        settings, func, arrays, options, collect_errors=on_error != "raise"
    )
    request = check_output_request(
        options["out"],
        options["dtype"],
        check_out_axis(options["out_axis"], options["axis"]),
        call.inputs,
        call.extras,
        resume=options["resume"],
        make_fill=choose_fill(options["fill_value"], on_error),
    )
    return PlacedMap(call, request, on_error, options["resume"])


def prepare_items(
    settings: Settings,
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
) -> PlacedMap:
    """Check the arguments of `map_items`, and return what it is to run."""
    out, dtype, resume = options["out"], options["dtype"], options["resume"]
    on_error = check_on_error(options["on_error"])
    row = check_row(options["out_shape"], dtype, out)
    call = ArrayCall.from_options(
        settings, func, arrays, options, by_item=True, collect_errors=on_error != "raise", row=row
    )
    request = check_output_request(
        out,
        dtype,
        check_out_axis(options["out_axis"], 0),
        call.inputs,
        call.extras,
        promote_dtypes=True,
        resume=resume,
        make_fill=choose_fill(options["fill_value"], on_error),
    )
    if call.inputs.n_items == 0:
        if row is not None:
            empty_result = row.make_empty_result(request.out_axis)
        else:
            empty_result = request.make_empty_result()
            request = request if out is not None else replace(request, out_axis=0)
        call = call.with_function(lambda *_: empty_result)
    return PlacedMap(call, request, on_error, resume)


def choose_fill(fill_value: object, on_error: str) -> MakeFill:
    """Return what makes the values that stand for missing results."""
    if fill_value is UNSET:
        return require_missing_value if on_error == "fill" else find_missing_value
    if on_error == "raise":
        raise ValueError("fill_value has no meaning unless on_error is 'fill' or 'collect'")
    return partial(cast_scalar, fill_value, name="fill_value")


def prepare_collecting(
    settings: Settings,
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
) -> ArrayCall:
    """Check the arguments of `map_chunks`, and return the call that it makes."""
    rule = check_on_error(options["on_error"], ("raise", "collect"))
    return ArrayCall.from_options(settings, func, arrays, options, collect_errors=rule == "collect")


def list_results(call: ArrayCall, results: dict[int, Any], failures: list[DeliveredFailure]) -> Any:
    """Return what `map_chunks` returns: results in order, and failures if they are collected."""
    ordered = [results.get(call.grid.range_of(index)[0]) for index in range(len(call.grid))]
    return (ordered, list_failed_ranges(failures)) if call.collect_errors else ordered

"""`map_array`, `map_items` and `map_chunks`: array maps with results in the order of items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from taskcarrier.arguments import check_on_error
from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.casting import (
    MakeFill,
    cast_scalar,
    find_missing_value,
    require_missing_value,
)
from taskcarrier.arrays.kernels.prepare import check_row
from taskcarrier.arrays.outputs.request import (
    OutputRequest,
    check_out_axis,
    check_output_request,
)
from taskcarrier.arrays.resume.ledger_file import LedgerFile
from taskcarrier.notes import add_note
from taskcarrier.options import fill_docstring
from taskcarrier.run import Settings
from taskcarrier.scheduling.retries import RETRIES
from taskcarrier.workers.records import list_failed_ranges


class _Unset:
    """The type of `UNSET`, the default of options for which None would be a value."""

    def __repr__(self) -> str:
        return "<unset>"


UNSET = _Unset()


@fill_docstring
def map_array(
    func: Callable[..., Any],
    *arrays: Any,
    axis: int | tuple[int, ...] = 0,
    balance: str = "static",
    n_jobs: int | None = None,
    backend: str | None = None,
    chunksize: int | None = None,
    out: Any = None,
    dtype: Any = None,
    out_axis: int | tuple[int, ...] | None = None,
    depth: int = 0,
    boundary: str = "reflect",
    cval: Any = 0.0,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    writable: bool = False,
    rng: Any = None,
    timeout: float | None = None,
    retries: int = RETRIES,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    on_error: str = "raise",
    fill_value: Any = UNSET,
    resume: bool = False,
) -> Any:
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
    {arrays}
    {axis}
    {balance}
    {n_jobs}
    {backend}
    {chunksize}
    {out}
    {dtype}
    {out_axis}
    {depth}
    {boundary}
    {cval}
    {args}
    {kwargs}
    {writable}
    {rng}
    {timeout}
    {retries}
    {retry_on}
    {on_error}
    {fill_value}
    {resume}

    Returns
    -------
    ndarray or tuple of ndarray
        `out` if it was given (for a path: the file, mapped), else ordinary writable arrays.
        After a map in processes these lie in shared memory: another map over them copies nothing.

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
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
    rule = check_on_error(on_error)
    call = ArrayCall.from_arguments(
        settings,
        func,
        arrays,
        axis=axis,
        chunksize=chunksize,
        args=args,
        kwargs=kwargs,
        writable=writable,
        rng=rng,
        depth=depth,
        boundary=boundary,
        cval=cval,
        collect_errors=rule != "raise",
    )
    request = check_output_request(
        out,
        dtype,
        check_out_axis(out_axis, axis),
        call.inputs,
        call.extras,
        make_fill=choose_fill(fill_value, rule),
    )
    return _run_in_place(call, request, rule, resume=resume)


@fill_docstring
def map_items(
    func: Callable[..., Any],
    *arrays: Any,
    axis: int | tuple[int, ...] = 0,
    balance: str = "static",
    n_jobs: int | None = None,
    backend: str | None = None,
    chunksize: int | None = None,
    out: Any = None,
    dtype: Any = None,
    out_axis: int | tuple[int, ...] = 0,
    out_shape: int | tuple[int, ...] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    writable: bool = False,
    rng: Any = None,
    timeout: float | None = None,
    retries: int = RETRIES,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    on_error: str = "raise",
    fill_value: Any = UNSET,
    resume: bool = False,
) -> Any:
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
    {arrays}
    {axis}
    {balance}
    {n_jobs}
    {backend}
    {item_chunksize}
    {out}
    {dtype}
    out_axis : int or tuple of int, default 0
        The axis of the result along which items are stacked, as in `numpy.stack`. A tuple has
        one for each output.
    out_shape : int or tuple of int, optional
        The shape of one item's result. `func` then gets an array of this shape and of `dtype`
        (default: that of an `out` array, else float64) as its last positional argument, and
        must fill all of it; what it returns does not matter.
    {args}
    {kwargs}
    {writable}
    {item_rng}
    {timeout}
    {retries}
    {retry_on}
    {on_error}
    {fill_value}
    {resume}

    Returns
    -------
    ndarray or tuple of ndarray
        `out` if it was given (for a path: the file, mapped), else ordinary writable arrays.
        Without items `func` is not called, and the result has shape ``(0,)``.

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
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
    rule = check_on_error(on_error)
    row = check_row(out_shape, dtype, out)
    call = ArrayCall.from_arguments(
        settings,
        func,
        arrays,
        axis=axis,
        chunksize=chunksize,
        args=args,
        kwargs=kwargs,
        writable=writable,
        rng=rng,
        by_item=True,
        collect_errors=rule != "raise",
        row=row,
    )
    request = check_output_request(
        out,
        dtype,
        check_out_axis(out_axis, 0),
        call.inputs,
        call.extras,
        promote_dtypes=not resume,
        make_fill=choose_fill(fill_value, rule),
    )
    if call.inputs.n_items == 0:
        if row is not None:
            empty_result = row.make_empty_result(request.out_axis)
        else:
            empty_result = request.make_empty_result()
            request = request if out is not None else replace(request, out_axis=0)
        call = call.with_function(lambda *_: empty_result)
    return _run_in_place(call, request, rule, resume=resume)


@fill_docstring
def map_chunks(
    func: Callable[..., Any],
    *arrays: Any,
    axis: int | tuple[int, ...] = 0,
    balance: str = "static",
    n_jobs: int | None = None,
    backend: str | None = None,
    chunksize: int | None = None,
    depth: int = 0,
    boundary: str = "reflect",
    cval: Any = 0.0,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    writable: bool = False,
    rng: Any = None,
    timeout: float | None = None,
    retries: int = RETRIES,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    on_error: str = "raise",
) -> Any:
    """Call a function with every chunk of arrays on every core, and return a list of the results.

    `func` must take one chunk of each array (the axis is kept). It may return anything; worker
    processes send it back pickled. `func` is called once for each range, in any order, in other
    threads or processes. Chunks and arrays in `args` and `kwargs` are read-only. For processes it
    must be picklable; functions of ``__main__``, lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``.
    {arrays}
    {axis}
    {balance}
    {n_jobs}
    {backend}
    {chunksize}
    {depth_uncut}
    {boundary}
    {cval}
    {args}
    {kwargs}
    {writable}
    {rng}
    {timeout}
    {retries}
    {retry_on}
    {collect_on_error}

    Returns
    -------
    list
        What `func` returned, in the order of the ranges. An array without items has one range,
        which is empty.

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
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
    rule = check_on_error(on_error, ("raise", "collect"))
    call = ArrayCall.from_arguments(
        settings,
        func,
        arrays,
        axis=axis,
        chunksize=chunksize,
        args=args,
        kwargs=kwargs,
        writable=writable,
        rng=rng,
        depth=depth,
        boundary=boundary,
        cval=cval,
        collect_errors=rule == "collect",
    )
    results, faults = call.run_collect()
    ordered = [results.get(call.grid.range_of(index)[0]) for index in range(len(call.grid))]
    return (ordered, list_failed_ranges(faults)) if rule == "collect" else ordered


def choose_fill(fill_value: object, rule: str) -> MakeFill:
    """Return what makes the values that stand for missing results."""
    if fill_value is UNSET:
        return require_missing_value if rule == "fill" else find_missing_value
    if rule == "raise":
        raise ValueError("fill_value has no meaning unless on_error is 'fill' or 'collect'")
    return partial(cast_scalar, fill_value, name="fill_value")


def _run_in_place(call: ArrayCall, request: OutputRequest, rule: str, *, resume: bool) -> Any:
    ledger_file = _open_ledger_file(call, request) if resume else None
    try:
        result, faults = call.run_in_place(request, resumed=ledger_file)
        if ledger_file is not None and result is not None:
            ledger_file.remove()
    finally:
        if ledger_file is not None:
            ledger_file.close()
    if rule == "collect":
        return result, list_failed_ranges(faults)
    if result is None:
        error = faults[0][2]
        faults.clear()
        add_note(error, "every item failed, so the shape of the result is not known")
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame
    faults.clear()  # their tracebacks refer to it too
    return result


def _open_ledger_file(call: ArrayCall, request: OutputRequest) -> LedgerFile:
    """Open the ledger file beside the first output."""
    if not request.paths or len(request.paths) != len(request.entries):
        raise ValueError("resume=True needs out= as a path that ends in .npy (or several of them)")
    options = {
        "out_axis": request.out_axis,
        "outputs": (len(request.paths), request.is_tuple),
        "dtype": request.dtypes if any(one is not None for one in request.dtypes) else None,
    }
    return call.open_ledger_file(request.paths[0], options)

"""`map_array`, `map_items` and `map_chunks`: the verbs whose results stand item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from taskcarrier.arguments import check_on_error
from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.casting import Fill
from taskcarrier.arrays.kernels.prepare import check_row
from taskcarrier.arrays.outputs.request import OutputRequest, check_output_request
from taskcarrier.arrays.outputs.writer import check_out_axis
from taskcarrier.arrays.resume.ledger_file import LedgerFile
from taskcarrier.notes import add_note
from taskcarrier.options import fill_docstring
from taskcarrier.run import Settings
from taskcarrier.scheduling.retries import RETRIES
from taskcarrier.workers.records import list_failed_ranges


class _Unset:
    """Says in a signature that nothing was passed, where None would be a value."""

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
    """Map a function over chunks of arrays on every core, results in place.

    Equals ``func(*arrays, *args, **kwargs)`` for every function that treats the positions
    along `axis` independently; with `depth`, for every function that looks no further than so
    many positions.

    What is demanded of `func`: it takes one chunk of each array (the axis kept, so a chunk
    has as many axes as its array), it returns an array of the same length along the mapped
    axis, and for every chunk the same dtype and the same lengths of other axes. (A function of
    one item is for `map_items`.) It is called once for each range, in any order, in other threads
    or processes, so it should not depend on what it did before. Chunks and arrays in `args` and
    `kwargs` are read-only. For processes it must be picklable; functions of ``__main__``, lambdas
    and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``. It may return a tuple of arrays, which
        gives a tuple of results.
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
        `out` where it was given (for a path: the file, mapped), else ordinary writable arrays.
        After a map in processes they lie in shared memory: another map over them copies nothing.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Bad arguments, before anything is started; results of a wrong length, or of different
        dtypes or shapes, with both values.
    WorkerDiedError
        A range has killed every worker process that ran it; says which range, which worker and how.
    TimeoutError
        A range took longer than `timeout`.
    Exception
        Whatever `func` raises, with a note that names the range.

    Warns
    -----
    UserWarning
        With `resume`, of what can be compared with an earlier run by its type or in samples only.

    Notes
    -----
    An array without items is passed to `func` once, in the caller.
    Called inside a worker, a map is serial.

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
    where = check_out_axis(out_axis, axis)
    request = check_output_request(out, dtype, where, call.inputs, call.extras)
    return _run_in_place(
        call, where, request, rule, fill_value, promote_dtypes=False, resume=resume
    )


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
    """Map a function over the items of arrays on every core, results stacked.

    Equals ``np.stack([func(x, ..., *args, **kwargs) for x, ... in zip(*arrays)], out_axis)``,
    the items taken along `axis`.

    What is demanded of `func`: it takes one item of each array (the axis removed: a scalar of
    NumPy's for a one-dimensional array) and returns a number or an array, of the same shape for
    every item. Values of different dtypes promote as `numpy.stack` promotes them. It is called
    once for each item, in any order, in other threads or processes. Items and arrays in `args`
    and `kwargs` are read-only. For processes it must be picklable; functions of ``__main__``,
    lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(item, ..., *args, **kwargs)``. It may return a tuple of values, which
        gives a tuple of results.
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
        `out` where it was given (for a path: the file, mapped), else ordinary writable arrays.
        Without items `func` is not called, and the result has shape ``(0,)``.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Bad arguments, before anything is started; values of different shapes, or that are no
        arrays or numbers (``dtype=object`` collects objects that are neither).
    WorkerDiedError
        A range has killed every worker process that ran it; says which range, which worker and how.
    TimeoutError
        A range took longer than `timeout`.
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
    where = check_out_axis(out_axis, 0)
    request = check_output_request(out, dtype, where, call.inputs, call.extras)
    if call.inputs.n_items == 0:
        nothing = request.make_empty_result() if row is None else row.none(where)
        call = call.with_function(lambda *_: nothing)
        where = where if request.entries or row else 0
    promote_dtypes = not request.knows_dtypes and not resume
    return _run_in_place(
        call, where, request, rule, fill_value, promote_dtypes=promote_dtypes, resume=resume
    )


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
    """Call a function with every chunk of arrays, on every core; a list of what it returns.

    What is demanded of `func`: it takes one chunk of each array (the axis kept). It may return
    anything; from processes what it returns comes pickled. It is called once for each range, in
    any order, in other threads or processes. Chunks and arrays in `args` and `kwargs` are
    read-only. For processes it must be picklable; functions of ``__main__``, lambdas and closures
    are.

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
        the empty one.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Bad arguments, before anything is started.
    WorkerDiedError
        A range has killed every worker process that ran it; says which range, which worker and how.
    TimeoutError
        A range took longer than `timeout`.
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


def _run_in_place(
    call: ArrayCall,
    out_axis: int | tuple[int, ...],
    request: OutputRequest,
    rule: str,
    fill_value: object,
    *,
    promote_dtypes: bool,
    resume: bool,
) -> Any:
    fill = Fill(fill_value is not UNSET, fill_value, rule == "fill")
    if fill.is_given and rule == "raise":
        raise ValueError("fill_value has no meaning unless on_error is 'fill' or 'collect'")
    for dtype in request.known_dtypes:
        fill.of(dtype)
    resumed = _open_ledger_file(call, out_axis, request) if resume else None
    try:
        result, faults = call.run_in_place(
            out_axis, request, promote_dtypes=promote_dtypes, fill=fill, resumed=resumed
        )
        if resumed is not None and result is not None:
            resumed.remove()
    finally:
        if resumed is not None:
            resumed.close()
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
    faults.clear()  # likewise
    return result


def _open_ledger_file(
    call: ArrayCall, out_axis: int | tuple[int, ...], request: OutputRequest
) -> LedgerFile:
    """The ledger beside the first output; the targets know then what to go on with."""
    if not request.paths or len(request.paths) != len(request.entries or ()):
        raise ValueError("resume=True needs out= as a path that ends in .npy (or several of them)")
    options = {
        "out_axis": out_axis,
        "outputs": (len(request.paths), request.is_several),
        "dtype": request.dtypes,
    }
    resumed = call.open_ledger_file(request.paths[0], options)
    request.keeps, request.is_running = True, not resumed.is_new
    return resumed

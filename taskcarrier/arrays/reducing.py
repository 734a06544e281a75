"""`reduce_array`: partial results of chunks, combined in the order of the ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from taskcarrier.arguments import check_callable
from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.mapping import UNSET
from taskcarrier.notes import add_note
from taskcarrier.options import fill_docstring
from taskcarrier.run import Settings
from taskcarrier.scheduling.retries import RETRIES


@fill_docstring
def reduce_array(
    func: Callable[..., Any],
    *arrays: Any,
    combine: Callable[[Any, Any], Any],
    initial: Any = UNSET,
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
) -> Any:
    """Reduce arrays on every core: compute a partial result of each chunk, combine them in order.

    The result equals ``functools.reduce(combine, [func(chunk) for chunk in chunks])``. Partial
    results are combined from the first range to the last, whichever was ready first, so the same
    call gives the same bits with every number of workers, backend and balance. (Another
    `chunksize` may round differently.)

    `func` must take one chunk of each array (the axis is kept). It may return anything as a
    partial result, preferably something small. `combine` should be associative, else the result
    depends on `chunksize`. It is called in the caller, with two partial results, and may change
    the first in place unless that is `initial`. The partial results of all ranges are held until
    the last one has come.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``.
    {arrays}
    combine : callable
        Called as ``combine(left, right)``, for example `operator.add` or `numpy.maximum`.
    initial : object, optional
        The first `left`. Default: the first partial result.
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

    Returns
    -------
    object
        What the last call of `combine` returned. With one range and no `initial`, what `func`
        returned. For arrays without items, `initial`: neither function is called.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        If arguments are bad, before anything is started; if arrays have no items and `initial`
        is not given.
    WorkerDiedError
        If a range has killed every worker process that ran it; the message says which range, which
        worker and how.
    TimeoutError
        If a range took longer than `timeout`.
    Exception
        Whatever `func` or `combine` raises, with a note that names the range.

    Examples
    --------
    >>> import operator
    >>> import numpy as np
    >>> from taskcarrier import reduce_array
    >>> X = np.arange(6.0).reshape(3, 2)
    >>> reduce_array(lambda rows: (rows**2).sum(axis=0), X, combine=operator.add, n_jobs=2)
    array([20., 35.])
    """
    settings = Settings.from_arguments(
        balance, n_jobs, backend, timeout=timeout, retries=retries, retry_on=retry_on
    )
    check_callable(combine, "combine")
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
    )
    if call.inputs.n_items == 0:
        if initial is UNSET:
            raise ValueError(
                "reduce_array of arrays without items needs initial= (shape "
                f"{call.inputs.arrays[0].shape}, axis {call.inputs.axes[0]})"
            )
        return initial
    partials, _ = call.run_collect()
    starts = sorted(partials)

    def fold(left: Any, start: int) -> Any:
        partial = partials.pop(start)
        try:
            return combine(left, partial)
        except Exception as error:
            description = call.inputs.describe(
                start, min(start + call.grid.chunksize, call.inputs.n_items)
            )
            add_note(error, f"while combining the result of {description}")
            if partial is None:
                add_note(error, "func returned None for it: does it lack a return?")
            raise

    first = partials.pop(starts.pop(0)) if initial is UNSET else initial
    return reduce(fold, starts, first)

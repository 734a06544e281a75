"""`reduce_array`: partial results of chunks, folded in the order of the ranges."""

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
    """Reduce arrays on every core: a partial result for every chunk, folded in order.

    Equals ``functools.reduce(combine, [func(chunk) for chunk in chunks])``. The fold goes from
    the first range to the last, whoever was ready first, so the same call gives the same bits
    with every number of workers, backend and balance. (Another `chunksize` may round
    differently.)

    What is demanded of `func`: it takes one chunk of each array (the axis kept) and returns a
    partial result: anything, best something small. Of `combine`: it is associative, or the result
    depends on `chunksize`; it is called in the caller, with two partial results, and may change
    the first in place unless that is `initial`. The partial results of all ranges are held until
    the last has come.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``.
    {arrays}
    combine : callable
        Called as ``combine(left, right)``, for example `operator.add` or `numpy.maximum`.
    initial : object, optional
        What the fold begins with. Default: the first partial result.
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
        What the last call of `combine` returned; with one range and no `initial`, what `func`
        returned; for arrays without items `initial`, and neither is called.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Bad arguments, before anything is started; arrays without items and no `initial`.
    WorkerDiedError
        A range has killed every worker process that ran it; says which range, which worker and how.
    TimeoutError
        A range took longer than `timeout`.
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
        part = partials.pop(start)
        try:
            return combine(left, part)
        except Exception as error:
            where = call.inputs.describe(
                start, min(start + call.grid.chunksize, call.inputs.n_items)
            )
            add_note(error, f"while combining the result of {where}")
            if part is None:
                add_note(error, "func returned None for it: does it lack a return?")
            raise

    first = partials.pop(starts.pop(0)) if initial is UNSET else initial
    return reduce(fold, starts, first)

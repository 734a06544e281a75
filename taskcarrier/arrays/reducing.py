"""`reduce_array`: partial results of chunks, combined in the order of the ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, Unpack, overload

from taskcarrier.arguments import check_callable
from taskcarrier.arrays.call import ArrayCall, Outcomes
from taskcarrier.arrays.collected import run_collected
from taskcarrier.arrays.short_maps import NOT_SHORT, collect_short_chunks
from taskcarrier.notes import add_note
from taskcarrier.options import UNSET, ChunksOptions, ReductionOptions
from taskcarrier.run import Settings
from taskcarrier.verbs import Verb

R = TypeVar("R")
S = TypeVar("S")

REDUCE_ARRAY = Verb.from_groups("reduce_array", ReductionOptions, ChunksOptions)


@overload
def reduce_array(
    func: Callable[..., R],
    *arrays: Any,
    combine: Callable[[Any, Any], Any],
    **options: Unpack[ChunksOptions],
) -> R: ...
@overload
def reduce_array(
    func: Callable[..., Any],
    *arrays: Any,
    combine: Callable[[Any, Any], Any],
    initial: S,
    **options: Unpack[ChunksOptions],
) -> S: ...
@REDUCE_ARRAY.document
def reduce_array(func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
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
    *arrays : array_like
        One or several arrays of equal length along the mapped axis.
    **options
        See `taskcarrier.options`.

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

    def prepare() -> ArrayCall:
        filled = REDUCE_ARRAY.fill(options)
        return prepare_reduction(Settings.from_options(filled), func, arrays, filled)

    return run_reduction(options, partial(collect_short_chunks, func, arrays), prepare)


def prepare_reduction(
    settings: Settings,
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
) -> ArrayCall:
    """Check the arguments of `reduce_array`, and return the call that it makes."""
    check_callable(options["combine"], "combine")
    call = ArrayCall.from_options(settings, func, arrays, options)
    if call.inputs.n_items == 0 and options["initial"] is UNSET:
        raise ValueError(
            "reduce_array of arrays without items needs initial= (shape "
            f"{call.inputs.arrays[0].shape}, axis {call.inputs.axes[0]})"
        )
    return call


def run_reduction(
    options: Mapping[str, Any],
    collect_short: Callable[[Mapping[str, Any]], tuple[Any, Outcomes]],
    prepare: Callable[[], ArrayCall],
) -> Any:
    """Return what `reduce_array` returns.

    Parameters
    ----------
    options : mapping
        The user's options.
    collect_short : callable
        Runs `map_chunks` with the options that it has too, if that is short.
    prepare : callable
        Checks all arguments, and returns the call.
    """
    combine: Any = options.get("combine")
    initial = options.get("initial", UNSET)
    partials: Any = NOT_SHORT
    outcomes: Outcomes = {}
    if callable(combine):
        others = {name: options[name] for name in options.keys() - {"combine", "initial"}}
        partials, outcomes = collect_short(others)
    if partials is not NOT_SHORT:
        return _fold(partials, combine, initial, prepare)
    call = prepare()
    results = run_collected(call, outcomes)[0] if call.inputs.n_items else {}
    partials = [results.pop(start) for start in sorted(results)]
    return _fold(partials, combine, initial, lambda: call)


def _fold(
    partials: list[Any],
    combine: Callable[[Any, Any], Any],
    initial: Any,
    prepare: Callable[[], ArrayCall],
) -> Any:
    """Return the partial results of all ranges, combined in order."""
    n_ranges = len(partials)
    partials.reverse()
    left = partials.pop() if initial is UNSET else initial
    while partials:
        partial_result = partials.pop()
        try:
            left = combine(left, partial_result)
        except Exception as error:
            call = prepare()
            where = call.inputs.describe(*call.grid.range_of(n_ranges - len(partials) - 1))
            add_note(error, f"while combining the result of {where}")
            if partial_result is None:
                add_note(error, "func returned None for it: does it lack a return?")
            raise
    return left

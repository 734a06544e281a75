"""`map_array`: chunks in, chunks out, results in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

import numpy as np

from taskcarrier.arrays.inputs import (
    Inputs,
    check_callable,
    check_extras,
    check_inputs,
    read_only,
)
from taskcarrier.arrays.outputs import (
    DisagreementError,
    LocalAllocation,
    SharedAllocation,
    Sink,
    Spec,
    check_out_axis,
)
from taskcarrier.arrays.sources import Source, sources_for_processes, sources_here
from taskcarrier.backends.choice import Choice
from taskcarrier.backends.work import NOTHING, Call, Failure
from taskcarrier.partition import Grid, check_chunksize, chunk_grid
from taskcarrier.running import (
    Outcome,
    Settings,
    decide,
    died_error,
    execute,
    raise_failure,
)


def map_array(
    func: Callable[..., Any],
    *arrays: Any,
    axis: int | tuple[int, ...] = 0,
    balance: str = "static",
    n_jobs: int | None = None,
    backend: str | None = None,
    chunksize: int | None = None,
    out_axis: int | tuple[int, ...] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    writable: bool = False,
) -> Any:
    """Map a function over chunks of arrays on every core, results in place.

    Equals ``func(*arrays, *args, **kwargs)`` for every function that treats the positions
    along `axis` independently.

    What is demanded of `func`: it takes one chunk of each array (the axis kept, so a chunk
    has as many axes as its array), it returns an array of the same length along the mapped
    axis, and the same dtype and other lengths for every chunk. It is called once for each
    range, in any order, in other threads or processes, so it should not depend on what it did
    before. Chunks and arrays in `args` and `kwargs` are read-only. For processes it must be
    picklable; functions of ``__main__``, lambdas and closures are.

    Parameters
    ----------
    func : callable
        Called as ``func(chunk, ..., *args, **kwargs)``. It may return a tuple of arrays, which
        gives a tuple of results.
    *arrays : array_like
        One or several arrays of equal length along the mapped axis, of any layout and dtype.
        Threads see views of them. Processes see views of what is shared already (results of
        an earlier map in processes) and read other arrays range by range. Subclasses are taken
        as base-class arrays.
    axis : int or tuple of int, default 0
        The mapped axis; a tuple has one for each array.
    balance : {"static", "dynamic"}, default "static"
        How ranges are shared out. Static: each worker has one contiguous run of them, best
        when all take alike. Dynamic: the next range goes to whoever is free, best when times
        differ; taking one costs about a microsecond. Results are the same.
    n_jobs : int, optional
        Workers. Default: what an active `joblib.parallel_config` says, else all cores this
        process may use. Negative numbers count from all cores (-1) down, as in joblib. With 1
        the function runs in the caller.
    backend : {"sequential", "threading", "loky", "multiprocessing"}, optional
        Where workers run: in the caller, in threads, or in processes (the last two words).
        Default: what an active `joblib.parallel_config` says, else threads when `func` is
        known to release the GIL (a ufunc, a numba function compiled with ``nogil=True``) or
        the data cannot leave the process (Python objects), else processes.
    chunksize : int, optional
        Items for each range, the last may be shorter. It is part of the computation where an
        item's arithmetic depends on its neighbours in the call. Default: about 1 MiB of input,
        but at least 32 to 128 (by size) and at most 4096 ranges; it depends on shape and dtype
        only.
    out_axis : int or tuple of int, optional
        Where the mapped axis stands in what `func` returns, and so in the result. Default:
        `axis`. A tuple has one for each output.
    args : tuple, optional
        Further positional arguments, the same for every call; arrays in it are read-only.
    kwargs : dict, optional
        Keyword arguments, likewise.
    writable : bool, default False
        Whether `func` gets private copies of the chunks, which it may overwrite. The caller's
        arrays never change.

    Returns
    -------
    ndarray or tuple of ndarray
        Ordinary writable arrays. After a map in processes they lie in shared memory: another
        map over them copies nothing.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Bad arguments, before anything is started; results of a wrong length, or of different
        dtypes or shapes, with both values.
    WorkerDiedError
        A worker process died; says which, how and on which range.
    Exception
        Whatever `func` raises, with a note that names the range.

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
    return mapped(
        Settings.of_call(balance, n_jobs, backend),
        func,
        arrays,
        axis=axis,
        chunksize=chunksize,
        out_axis=out_axis,
        args=args,
        kwargs=kwargs,
        writable=writable,
    )


def mapped(
    settings: Settings,
    func: Callable[..., Any],
    arrays: tuple[Any, ...],
    *,
    axis: int | tuple[int, ...],
    chunksize: int | None,
    out_axis: int | tuple[int, ...] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    writable: bool,
) -> Any:
    """`map_array` with checked settings, for functions and mappers."""
    started_ns = monotonic_ns()
    check_callable(func)
    inputs = check_inputs(arrays, axis)
    extra_args, extra_kwargs = check_extras(args, kwargs)
    where_out = check_out_axis(out_axis, axis)
    grid = chunk_grid(inputs.n_items, inputs.item_nbytes, check_chunksize(chunksize))
    if inputs.n_items == 0:
        choice = Choice("sequential", 1, "there is nothing to map")
    else:
        choice = decide(settings, func, inputs.needs_threads)
    allocation: LocalAllocation | SharedAllocation
    if choice.backend == "loky":
        staging = settings.staging()
        sources = sources_for_processes(inputs, grid, staging)
        segment = settings.segment(inputs.nbytes)
        allocation = SharedAllocation(segment, inputs.n_items, inputs.order)
    else:
        staging = None
        sources = sources_here(inputs)
        allocation = LocalAllocation(inputs.n_items, inputs.order)
    task = _ChunkTask(
        Call(func, extra_args, extra_kwargs),
        sources,
        allocation,
        where_out,
        bool(writable),
    )
    outcome = execute(task, grid, choice, settings, started_ns=started_ns, staging=staging)
    spec = _agreed_spec(outcome, inputs, grid)
    raise_failure(outcome, grid, inputs.describe)
    results = None if spec is None else _unwrapped(allocation.collect(spec), spec)
    if outcome.deaths:
        results = _partial(outcome, spec, results, grid)
        if outcome.missing:
            raise died_error(outcome, grid, inputs.describe, outcome.missing, results)
    return results


@dataclass(frozen=True)
class _ChunkTask:
    """`func` on a chunk of every array, as a task."""

    call: Call
    sources: list[Source]
    allocation: LocalAllocation | SharedAllocation
    out_axis: int | tuple[int, ...]
    writable: bool

    def open(self) -> _Chunks:
        return _Chunks(self)


class _Chunks:
    """A `_ChunkTask` opened in one worker."""

    def __init__(self, task: _ChunkTask) -> None:
        call = task.call
        self._func = call.func
        if call.args or call.kwargs:
            args = tuple(read_only(value) for value in call.args)
            kwargs = {name: read_only(value) for name, value in call.kwargs.items()}
            self._func = lambda *chunks: call.func(*chunks, *args, **kwargs)
        self._readers = [source.open() for source in task.sources]
        self._writable = task.writable
        self._sink = Sink(task.allocation, task.out_axis)

    def __call__(self, start: int, stop: int) -> Any:
        chunks = [read(start, stop) for read in self._readers]
        if self._writable:
            chunks = [chunk.copy(order="K") for chunk in chunks]
        try:
            result = self._func(*chunks)
        except ValueError as error:
            if not self._writable and "read-only" in str(error):
                error.add_note("chunks are read-only; pass writable=True for private copies")
            raise
        self._sink.place(start, stop, result)
        return NOTHING

    def facts(self) -> tuple[int, Spec] | None:
        """Where this worker's first result came from, and what it was like."""
        return self._sink.first

    def signature(self) -> int:
        """Tells workers with different results apart."""
        return 0 if self._sink.first is None else self._sink.first[1].signature


def _partial(outcome: Outcome, spec: Spec | None, results: Any, grid: Grid) -> Any:
    """What is right in the results of a run with deaths; all else is missing.

    A dead worker cannot say any more what its results were like, but it has left a number.
    """
    signatures = {death.signature for death in outcome.deaths} - {0}
    if spec is None or signatures - {spec.signature}:
        outcome.missing = list(range(len(grid)))
        return None
    return results


def _agreed_spec(outcome: Outcome, inputs: Inputs, grid: Grid) -> Spec | None:
    """What all results are like; where they differ, a failure of the lowest cell that does.

    The reference is the lowest cell that has a result. Under dynamic balance and in the
    caller, both that cell and the lowest one that differs from it are the same on every run.
    """
    firsts = [
        (*account.facts, account.name) for account in outcome.accounts if account.facts is not None
    ]
    if not firsts:
        return None
    reference: Spec
    reference_start, reference, _ = min(firsts, key=lambda first: first[0])
    failures = [
        Failure(start // grid.chunksize, DisagreementError(spec), name)
        for start, spec, name in firsts
        if spec != reference
    ]
    failures += [
        failure
        for failure in outcome.failures
        if not (isinstance(failure.error, DisagreementError) and failure.error.spec == reference)
    ]
    outcome.failures = sorted(failures, key=lambda failure: failure.cell)
    for failure in outcome.failures:
        if isinstance(failure.error, DisagreementError):
            start, stop = grid.bounds(failure.cell)
            first_start, first_stop = grid.bounds(reference_start // grid.chunksize)
            failure.error = ValueError(
                f"func returned {failure.error.spec.describe(stop - start)} for axis "
                f"{inputs.axes[0]}, items {start}:{stop}, but "
                f"{reference.describe(first_stop - first_start)} for items "
                f"{first_start}:{first_stop}; it must return the same dtype and the same shape "
                "but for the mapped axis for every chunk (for example with .astype)"
            )
    return reference


def _unwrapped(arrays: list[np.ndarray], spec: Spec) -> Any:
    return tuple(arrays) if spec.several else arrays[0]

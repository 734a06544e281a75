"""Mappers: one interface, in serial and in parallel, chosen in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Self

from taskcarrier import sequences
from taskcarrier.arrays import mapping
from taskcarrier.backends.choice import check_backend, check_n_jobs
from taskcarrier.backends.crews import held_warm
from taskcarrier.balance import Balance, Dynamic, Static
from taskcarrier.partition import check_chunksize
from taskcarrier.report import Report, keep_report
from taskcarrier.running import Settings
from taskcarrier.segments import Recycler

# The options of `map_array` that a mapper does not decide itself, as that function says them.
_MAP_ARRAY_SIGNATURE = inspect.signature(mapping.map_array)
_MAP_ARRAY_DEFAULTS = {
    name: parameter.default
    for name, parameter in _MAP_ARRAY_SIGNATURE.parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in {"balance", "n_jobs", "backend"}
}


class _Mapper:
    """What all mappers share.

    Parameters
    ----------
    n_jobs : int, default -1
        Workers: negative numbers count from all cores (-1) down; 1 runs in the caller. None:
        what an active `joblib.parallel_config` says, else all cores.
    verbosity : int, default 0
        From 1 on, a bar on standard error counts items; from 2 on, each run's report is logged
        to the logger ``taskcarrier`` as well.
    temp_folder : str, optional
        An existing folder whose file system holds what is shared with worker processes (in
        files without a name). Default: the environment's ``JOBLIB_TEMP_FOLDER`` if set, else
        memory.
    backend : {"sequential", "threading", "loky", "multiprocessing"}, optional
        Where workers run, see `map_array`. Default: decided for each call.
    chunksize : int, optional
        Items for each range. Default: decided for each call, see `map_array`; for sequences
        about a thousand ranges in all.
    """

    _balance: Balance
    _sequential = False

    def __init__(
        self,
        n_jobs: int | None = -1,
        verbosity: int = 0,
        temp_folder: str | None = None,
        backend: str | None = None,
        *,
        chunksize: int | None = None,
    ) -> None:
        self.n_jobs = n_jobs
        self.verbosity = verbosity
        self.temp_folder = temp_folder
        self.backend = backend
        self.chunksize = check_chunksize(chunksize)
        self._n_jobs = 1 if self._sequential else check_n_jobs(n_jobs)
        self._backend = "sequential" if self._sequential else check_backend(backend)
        self._recycler: Recycler | None = None
        self._open: list[ExitStack] = []
        self._report: Report | None = None

    def __call__(
        self, func: Callable[..., Any], seq1: Iterable[Any], *seqs: Iterable[Any]
    ) -> list[Any]:
        """The same as `map`."""
        return self.map(func, seq1, *seqs)

    def map(self, func: Callable[..., Any], seq1: Iterable[Any], *seqs: Iterable[Any]) -> list[Any]:
        """Apply a function to the items of one or several sequences, like the built-in `map`.

        What is demanded of `func`: for processes, it and the items and results must be
        picklable (functions of ``__main__``, lambdas and closures are).

        Parameters
        ----------
        func : callable
            Called as ``func(item)``, with several sequences ``func(item1, item2, ...)``.
        seq1, *seqs : iterable
            The items. With several, the shortest wins. Generators are used up first.

        Returns
        -------
        list
            The results in the order of the items.

        Raises
        ------
        WorkerDiedError
            A worker process died; says which, how and on which items.
        Exception
            Whatever `func` raises, with a note that names the item.

        Examples
        --------
        >>> from taskcarrier import SerialMapper
        >>> SerialMapper()(pow, [2, 3, 4], [5, 2])
        [32, 9]
        """
        return sequences.mapped(self._settings(), func, (seq1, *seqs), self.chunksize)

    def map_array(self, func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Map a function over chunks of arrays, as `taskcarrier.map_array` does.

        Balance, workers and backend are the mapper's; every other option of that function
        (``axis``, ``chunksize``, ``out_axis``, ``args``, ``kwargs``, ``writable``) means the
        same here.

        Examples
        --------
        >>> import numpy as np
        >>> from taskcarrier import StaticParallelMapper
        >>> with StaticParallelMapper(n_jobs=2) as mapper:
        ...     mapper.map_array(np.cumsum, np.ones((3, 4)), kwargs={"axis": 1})
        array([[1., 2., 3., 4.],
               [1., 2., 3., 4.],
               [1., 2., 3., 4.]])
        """
        unknown = options.keys() - _MAP_ARRAY_DEFAULTS.keys()
        if unknown:
            allowed = ", ".join(_MAP_ARRAY_DEFAULTS)
            raise TypeError(f"map_array of a mapper has no option {unknown.pop()!r}; has {allowed}")
        chosen = {**_MAP_ARRAY_DEFAULTS, **options}
        if chosen["chunksize"] is None:
            chosen["chunksize"] = self.chunksize
        return mapping.mapped(self._settings(), func, arrays, **chosen)

    @property
    def report(self) -> Report:
        """What this mapper's last run did; a `LookupError` before the first."""
        if self._report is None:
            raise LookupError("this mapper has not run anything yet")
        return self._report

    def __enter__(self) -> Self:
        """Keep workers and freed shared memory for the next call, until the block ends."""
        stack = ExitStack()
        if not self._open:
            self._recycler = Recycler()
            stack.callback(self._let_go)
        stack.enter_context(held_warm())
        self._open.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open.pop().close()

    def _let_go(self) -> None:
        if self._recycler is not None:
            self._recycler.close()
            self._recycler = None

    def _settings(self) -> Settings:
        return Settings(
            self._balance,
            self._n_jobs,
            self._backend,
            self.verbosity,
            self.temp_folder,
            self._recycler,
            self._keep_report,
        )

    def _keep_report(self, report: Report) -> None:
        self._report = report
        keep_report(report)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_jobs={self.n_jobs}, verbosity={self.verbosity}, "
            f"temp_folder={self.temp_folder!r}, backend={self.backend!r}, "
            f"chunksize={self.chunksize})"
        )


class SerialMapper(_Mapper):
    """A mapper that runs everything in the caller.

    It takes the options of the parallel mappers and ignores those that say how to share out
    work, so that changing over is changing one word. What it computes, and cuts into ranges,
    is the same.

    Examples
    --------
    >>> from taskcarrier import SerialMapper
    >>> mapper = SerialMapper()
    >>> mapper(str.upper, ["a", "b"])
    ['A', 'B']
    """

    _balance = Static()
    _sequential = True


class StaticParallelMapper(_Mapper):
    """A mapper that gives each worker one contiguous run of ranges beforehand.

    The right one when all items take about the same time.

    Examples
    --------
    >>> from taskcarrier import StaticParallelMapper
    >>> mapper = StaticParallelMapper(n_jobs=2, backend="threading")
    >>> mapper(abs, [-1, 2, -3])
    [1, 2, 3]
    """

    _balance = Static()


class DynamicParallelMapper(_Mapper):
    """A mapper that gives the next range to whichever worker is free.

    The right one when items take different times, or nobody knows.

    Examples
    --------
    >>> from taskcarrier import DynamicParallelMapper
    >>> mapper = DynamicParallelMapper(n_jobs=2, backend="threading")
    >>> mapper(len, ["one", "three"])
    [3, 5]
    """

    _balance = Dynamic()


# The classes share one description of their parameters.
_parameters = inspect.cleandoc(_Mapper.__doc__ or "").partition("Parameters\n")[2]
for _kind in (SerialMapper, StaticParallelMapper, DynamicParallelMapper):
    _summary, _, _examples = inspect.cleandoc(_kind.__doc__ or "").partition("Examples\n")
    _kind.__doc__ = f"{_summary}Parameters\n{_parameters}\n\nExamples\n{_examples}"

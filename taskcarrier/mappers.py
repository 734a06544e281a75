"""Mappers: one interface to serial and parallel maps, so that a program chooses in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Never, Self, TypeVar, Unpack, overload

from taskcarrier.arguments import check_chunksize, check_folder, check_integer
from taskcarrier.arrays.methods import ArrayMethods
from taskcarrier.lists.imap import imap_lists
from taskcarrier.lists.map import map_lists
from taskcarrier.memory.segments import Recycler
from taskcarrier.options import CollectOption, ImapOptions, ListOptions, MapOptions
from taskcarrier.report import Report, ReportMaker, keep_report
from taskcarrier.run import Settings
from taskcarrier.scheduling.balance import Balance, Dynamic, Static
from taskcarrier.scheduling.retries import RetryPolicy
from taskcarrier.short_calls import ShortSettings
from taskcarrier.verbs import Verb
from taskcarrier.workers.choose import check_backend, check_n_jobs
from taskcarrier.workers.pools import keep_warm

if TYPE_CHECKING:
    from taskcarrier.errors import FailedRange

R = TypeVar("R")

# Methods of executors and pools that a mapper does not have, with what to write instead.
_CALLS = (
    "Gather the arguments in a list, and call mapper.map(func, items) for a list of results, "
    "mapper.imap(func, items, ordered=False) for each as soon as it is done"
)
_END = "Its workers end by themselves; `taskcarrier.shutdown()` ends those that are idle now"
_INSTEAD = {
    **dict.fromkeys(("submit", "apply", "apply_async", "map_async", "starmap_async"), _CALLS),
    "imap_unordered": "Call mapper.imap(func, items, ordered=False)",
    **dict.fromkeys(("shutdown", "close", "join", "terminate"), _END),
}

_MAPPER = Verb("a mapper", {})
_MAP = Verb.from_groups("map of a mapper", MapOptions, CollectOption)
_STARMAP = Verb.from_groups("starmap of a mapper", MapOptions, CollectOption)
_IMAP = Verb.from_groups("imap of a mapper", ImapOptions)


class Mapper(ArrayMethods):
    """The base class of all mappers.

    Parameters
    ----------
    n_jobs : int, default -1
        The number of workers. Negative numbers count down from all cores (-1); 1 runs in the
        calling thread. None: what an active `joblib.parallel_config` says, else all cores.
    verbosity : int, default 0
        From 1 on, a bar on standard error counts items; from 2 on, each run's report is also logged
        to the logger ``taskcarrier``.
    temp_folder : str, optional
        An existing folder whose file system holds the data that are shared with worker processes
        (in files without a name). Default: the environment variable ``JOBLIB_TEMP_FOLDER`` if set,
        else memory.
    backend : {"sequential", "threading", "loky", "threads", "processes", "multiprocessing"} or str
        Where workers run, see `map_array`. For lists also the name of any other backend that is
        registered with joblib, such as ``"dask"``, see `map`. Default None: decided for each call.
    chunksize : int, optional
        The number of items in each range. Default: decided for each call, see `map_array`; for
        lists about a hundred ranges in all.
    """

    _balance: Balance
    _sequential = False
    # Attributes that affect the values of a function that holds a mapper; read by
    # `taskcarrier.arrays.resume.fingerprint`.
    _taskcarrier_deciding_attributes = ("chunksize",)

    @_MAPPER.document
    def __init__(
        self,
        n_jobs: int | None = -1,
        verbosity: int = 0,
        temp_folder: str | None = None,
        backend: str | None = None,
        *,
        chunksize: int | None = None,
        **unknown: Never,
    ) -> None:
        _MAPPER.fill(unknown)
        self.n_jobs = n_jobs
        self.verbosity = check_integer(
            verbosity, "verbosity", "0, 1 or 2 (the backend has its name)"
        )
        check_folder(temp_folder, "temp_folder")
        self.temp_folder = temp_folder
        self.backend = backend
        self.chunksize = check_chunksize(chunksize)
        self._n_jobs = 1 if self._sequential else check_n_jobs(n_jobs)
        self._backend = "sequential" if self._sequential else check_backend(backend)
        self._recycler: Recycler | None = None
        self._open: list[ExitStack] = []
        self._report: Report | ReportMaker | None = None

    @overload
    def map(
        self,
        func: Callable[..., R],
        seq1: Iterable[Any],
        *seqs: Iterable[Any],
        on_error: Literal["raise"] = ...,
        **options: Unpack[MapOptions],
    ) -> list[R]: ...
    @overload
    def map(
        self,
        func: Callable[..., R],
        seq1: Iterable[Any],
        *seqs: Iterable[Any],
        on_error: Literal["collect"],
        **options: Unpack[MapOptions],
    ) -> tuple[list[R | None], list[FailedRange]]: ...
    @_MAP.document
    def map(
        self, func: Callable[..., Any], seq1: Iterable[Any], *seqs: Iterable[Any], **options: Any
    ) -> Any:
        """Apply a function to the items of one or several sequences, like the built-in `map`.

        For processes, `func`, the items and the results must be picklable (functions of
        ``__main__``, lambdas and closures are).

        Where the mapper's `backend` is one that was registered with joblib (by
        `joblib.register_parallel_backend`; ``"dask"``), or an active `joblib.parallel_config` asks
        for one, ranges go through `joblib.Parallel`; results are the same. `taskcarrier` must be
        installed where its workers are. When a worker dies, the backend reports it or tries again,
        whatever `retries` is. The workers' warnings are not passed on.

        Parameters
        ----------
        func : callable
            Called as ``func(item)``, with several sequences ``func(item1, item2, ...)``.
        seq1, *seqs : iterable
            The items. With several, the shortest ends the map. A generator is read to its end
            first, so one that fills the same buffer for each item must give copies.
        **options
            See `taskcarrier.options`.

        Returns
        -------
        list
            The results in the order of the items. With ``on_error="collect"`` a tuple of this list,
            with None for items that failed, and a list of `FailedRange`.

        Raises
        ------
        WorkerDiedError
            An item killed every worker process that ran it. The message says which item, which
            worker and how.
        TimeoutError
            A range of items took longer than `timeout`.
        ValueError
            The arguments are wrong, or there is a `timeout` on a registered backend; nothing was
            started.
        Exception
            Whatever `func` raises, with a note that names the item.

        Examples
        --------
        >>> from taskcarrier import SerialMapper
        >>> SerialMapper()(pow, [2, 3, 4], [5, 2])
        [32, 9]
        """
        settings, filled = self._split_options(_MAP, options)
        return map_lists(settings, func, (seq1, *seqs), **filled)

    __call__ = map  # noqa: A003  # the method above

    @overload
    def starmap(
        self,
        func: Callable[..., R],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = ...,
        *,
        on_error: Literal["raise"] = ...,
        **options: Unpack[ListOptions],
    ) -> list[R]: ...
    @overload
    def starmap(
        self,
        func: Callable[..., R],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = ...,
        *,
        on_error: Literal["collect"],
        **options: Unpack[ListOptions],
    ) -> tuple[list[R | None], list[FailedRange]]: ...
    @_STARMAP.document
    def starmap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        **options: Any,
    ) -> Any:
        """Apply a function to tuples of arguments, like `itertools.starmap`.

        Everything else is as for `map`: ``mapper.map(func, xs, ys)`` is
        ``mapper.starmap(func, zip(xs, ys))``.

        Parameters
        ----------
        func : callable
            Called as ``func(*arguments)``.
        iterable : iterable of tuple
            The arguments of every call. A generator is read to its end first.
        **options
            See `taskcarrier.options`.

        Returns
        -------
        list
            As for `map`.

        Raises
        ------
        TypeError
            An item is no tuple of arguments.
        Exception
            As for `map`.

        Examples
        --------
        >>> from taskcarrier import SerialMapper
        >>> SerialMapper().starmap(pow, [(2, 5), (3, 2)])
        [32, 9]
        """
        settings, filled = self._split_options(_STARMAP, {**options, "chunksize": chunksize})
        return map_lists(settings, func, (iterable,), **filled, are_arguments=True)

    @_IMAP.document
    def imap(
        self,
        func: Callable[..., R],
        iterable: Iterable[Any],
        *iterables: Iterable[Any],
        **options: Unpack[ImapOptions],
    ) -> Generator[R, None, None]:
        """Apply a function to the items of an input that may be endless; return an iterator.

        Like the built-in `map`, this returns an iterator over the results. Work begins when the
        first result is asked for. The input is read in the thread that asks, never further ahead
        than `buffersize`. Free workers take the next items, whatever the mapper's balance is; a
        `SerialMapper` reads one item at a time. Between two results, each worker finishes what it
        was given, so the caller may take its time. Closing or dropping the iterator ends the work
        within about a second. Warnings of worker processes are shown when it ends.

        What must be picklable is the same as for `map`.

        Parameters
        ----------
        func : callable
            Called as ``func(item)``, with several iterables ``func(item1, item2, ...)``.
        iterable, *iterables : iterable
            The items; an iterator may be endless. With several, the shortest ends the map. Some
            items are read before the first is used, and none is copied: an input that fills the
            same buffer for each item must give copies, ``(buffer.copy() for buffer in readings)``.
        **options
            See `taskcarrier.options`.

        Yields
        ------
        object
            The results.

        Raises
        ------
        WorkerDiedError, TimeoutError
            As for `map`.
        Exception
            Whatever `func` or the input raises, with a note that names the item or the input. It is
            raised when it is the item's turn, with ``ordered=True`` after the results of all items
            before it, and ends the iterator; to go on after errors of `func`, catch them in `func`.
            (A `StopIteration` of `func` is the cause of a `RuntimeError`, as in generators.)
            An item or a result that cannot be unpickled makes its whole batch fail.

        Examples
        --------
        >>> from itertools import count
        >>> from taskcarrier import DynamicParallelMapper
        >>> squares = DynamicParallelMapper(2, backend="threading").imap(lambda n: n**2, count())
        >>> next(squares), next(squares), next(squares)
        (0, 1, 4)
        >>> squares.close()

        An input that uses one buffer for all of its items:

        >>> import numpy as np
        >>> def readings():
        ...     buffer = np.empty(2)
        ...     for n in range(3):
        ...         buffer[:] = n
        ...         yield buffer
        >>> mapper = DynamicParallelMapper(2, backend="threading")
        >>> [float(total) for total in mapper.imap(np.sum, (each.copy() for each in readings()))]
        [0.0, 2.0, 4.0]
        """
        settings, filled = self._split_options(_IMAP, options)
        return imap_lists(settings, func, (iterable, *iterables), **filled)

    @property
    def report(self) -> Report:
        """The report of this mapper's last run; a `LookupError` before the first."""
        if self._report is None:
            raise LookupError("this mapper has not run anything yet")
        if not isinstance(self._report, Report):
            self._report = self._report()
        return self._report

    def __enter__(self) -> Self:
        """Keep workers and freed shared memory for later calls, until the block ends."""
        stack = ExitStack()
        if not self._open:
            self._recycler = Recycler()
            stack.callback(self._close_recycler)
        stack.enter_context(keep_warm())
        self._open.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, here or in a worker: no open blocks, nor what they keep."""
        return {**vars(self), "_recycler": None, "_open": []}

    def _close_recycler(self) -> None:
        if self._recycler is not None:
            self._recycler.close()
            self._recycler = None

    def _split_options(
        self, verb: Verb, options: Mapping[str, object]
    ) -> tuple[Settings, dict[str, Any]]:
        filled = verb.fill(options)
        filled["chunksize"] = check_chunksize(filled["chunksize"]) or self.chunksize
        settings = Settings(
            balance=self._balance,
            n_jobs=self._n_jobs,
            backend=self._backend,
            verbosity=self.verbosity,
            temp_folder=self.temp_folder,
            recycler=self._recycler,
            keep_report=self._keep_report,
            retry_policy=RetryPolicy.from_arguments(
                filled.pop("timeout"), filled.pop("retries"), filled.pop("retry_on")
            ),
        )
        return settings, filled

    def _fill_short(
        self, options: Mapping[str, object]
    ) -> tuple[ShortSettings, Mapping[str, object]] | None:
        if self.verbosity >= 1 or (self._backend == "loky" and self.temp_folder is not None):
            return None
        settings = ShortSettings(self._backend, self._n_jobs, self._balance.name, self._keep_report)
        if self.chunksize is not None and options.get("chunksize") is None:
            options = {**options, "chunksize": self.chunksize}
        return settings, options

    def _keep_report(self, report: Report | ReportMaker) -> None:
        self._report = report
        keep_report(report)

    if not TYPE_CHECKING:  # a type checker would take it to mean that any attribute exists

        def __getattr__(self, name: str) -> Any:
            """Raise an `AttributeError`, with advice for methods that executors and pools have."""
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _INSTEAD:
                text += f": a mapper maps. {_INSTEAD[name]}"
            raise AttributeError(text, name=name, obj=self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_jobs={self.n_jobs}, verbosity={self.verbosity}, "
            f"temp_folder={self.temp_folder!r}, backend={self.backend!r}, "
            f"chunksize={self.chunksize})"
        )


class SerialMapper(Mapper):
    """A mapper that runs everything in the calling thread.

    It takes the options of the parallel mappers and ignores those that say how to share out
    work, so a program changes between them by one word. The ranges and results are the same.

    Examples
    --------
    >>> from taskcarrier import SerialMapper
    >>> mapper = SerialMapper()
    >>> mapper(str.upper, ["a", "b"])
    ['A', 'B']
    """

    _balance = Static()
    _sequential = True


class StaticParallelMapper(Mapper):
    """A mapper that gives each worker one contiguous run of ranges beforehand.

    Use it when all items take about the same time. ``mapper(func, items)`` maps lists, as `map`
    does; `imap` takes a stream; `map_array`, `map_items`, `map_chunks` and `reduce_array` take
    arrays. In a ``with`` block workers and their memory are kept between calls.

    Examples
    --------
    >>> from taskcarrier import StaticParallelMapper
    >>> mapper = StaticParallelMapper(n_jobs=2, backend="threading")
    >>> mapper(abs, [-1, 2, -3])
    [1, 2, 3]
    """

    _balance = Static()


class DynamicParallelMapper(Mapper):
    """A mapper that gives each free worker the next range.

    Use it when items take different or unknown times. It is called as a `StaticParallelMapper`.

    Examples
    --------
    >>> from taskcarrier import DynamicParallelMapper
    >>> mapper = DynamicParallelMapper(n_jobs=2, backend="threading")
    >>> mapper(len, ["one", "three"])
    [3, 5]
    """

    _balance = Dynamic()


# The classes share the description of their parameters.
_parameters = inspect.cleandoc(Mapper.__doc__ or "").partition("Parameters\n")[2]
for _kind in (SerialMapper, StaticParallelMapper, DynamicParallelMapper):
    _summary, _, _examples = inspect.cleandoc(_kind.__doc__ or "").partition("Examples\n")
    _kind.__doc__ = f"{_summary}Parameters\n{_parameters}\n\nExamples\n{_examples}"

"""Mappers: one interface, in serial and in parallel, chosen in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from taskcarrier.arguments import check_chunksize, check_integer
from taskcarrier.arrays.mapping import map_array, map_chunks, map_items
from taskcarrier.arrays.reducing import reduce_array
from taskcarrier.lists.imap import imap_lists
from taskcarrier.lists.map import map_lists
from taskcarrier.memory.segments import Recycler
from taskcarrier.options import DESCRIPTIONS, fill_docstring
from taskcarrier.report import Report, keep_report
from taskcarrier.run import Settings
from taskcarrier.scheduling.balance import Balance, Dynamic, Static
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RETRIES, RetryPolicy
from taskcarrier.workers.choose import check_backend, check_n_jobs
from taskcarrier.workers.pools import keep_warm

# What executors and pools have, and a mapper has not: what to write instead.
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

# What a mapper decides itself, where functions are told.
_DECIDED = {"balance", "n_jobs", "backend"}


def _method(verb: Callable[..., Any]) -> Any:
    """A function over arrays as a method: balance, workers and backend are the mapper's."""
    signature = inspect.signature(verb)
    parameters = [one for one in signature.parameters.values() if one.name not in _DECIDED]
    options = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}

    @functools.wraps(verb)
    def method(self: Mapper, func: Callable[..., Any], *arrays: Any, **chosen: Any) -> Any:
        for name in chosen:
            if name not in options:
                allowed = ", ".join(one.name for one in parameters if one.name in options)
                raise TypeError(
                    f"{verb.__name__} of a mapper has no option {name!r}; it has {allowed}"
                )
        if chosen.get("chunksize") is None:
            chosen["chunksize"] = self.chunksize
        return verb(func, *arrays, balance=self._settings(), **chosen)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]  # functions may have one
    method.__qualname__ = f"Mapper.{verb.__name__}"
    method.__doc__ = _doc_of_method(verb)
    return method


def _doc_of_method(verb: Callable[..., Any]) -> str:
    """The function's docstring without what a mapper decides, and the function's example."""
    text = inspect.getdoc(verb) or ""
    for name in _DECIDED:
        text = text.replace(DESCRIPTIONS[name] + "\n", "")
    head, _, _ = text.partition("Examples\n--------")
    return f"{head}Examples\n--------\nSee `taskcarrier.{verb.__name__}`.\n"


class Mapper:
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
    backend : {"sequential", "threading", "loky", "threads", "processes"} or str, optional
        Where workers run, see `map_array`; for sequences also the name of any other backend that is
        registered with joblib, such as ``"dask"``, see `map`. Default: decided for each call.
    chunksize : int, optional
        Items for each range. Default: decided for each call, see `map_array`; for sequences
        about a hundred ranges in all.
    """

    _balance: Balance
    _sequential = False
    # What of a mapper that a function holds decides its values (`taskcarrier.arrays.resume.fingerprint`).
    _taskcarrier_deciding = ("chunksize",)

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
        self.verbosity = check_integer(
            verbosity, "verbosity", "0, 1 or 2 (the backend has its name)"
        )
        self.temp_folder = temp_folder
        self.backend = backend
        self.chunksize = check_chunksize(chunksize)
        self._n_jobs = 1 if self._sequential else check_n_jobs(n_jobs)
        self._backend = "sequential" if self._sequential else check_backend(backend)
        self._recycler: Recycler | None = None
        self._open: list[ExitStack] = []
        self._report: Report | None = None

    def __call__(
        self,
        func: Callable[..., Any],
        seq1: Iterable[Any],
        *seqs: Iterable[Any],
        **options: Any,
    ) -> Any:
        """The same as `map`."""
        return self.map(func, seq1, *seqs, **options)

    @fill_docstring
    def map(
        self,
        func: Callable[..., Any],
        seq1: Iterable[Any],
        *seqs: Iterable[Any],
        chunksize: int | None = None,
        shared: Mapping[str, Any] | None = None,
        rng: Any = None,
        timeout: float | None = None,
        retries: int = RETRIES,
        retry_on: type[Exception] | tuple[type[Exception], ...] = (),
        on_error: str = "raise",
    ) -> Any:
        """Apply a function to the items of one or several sequences, like the built-in `map`.

        What is demanded of `func`: for processes, it and the items and results must be
        picklable (functions of ``__main__``, lambdas and closures are).

        Where the mapper's `backend` is one that was registered with joblib (by
        `joblib.register_parallel_backend`; ``"dask"``), or an active `joblib.parallel_config` asks
        for one, ranges go through `joblib.Parallel`; results are the same. There must be a
        `taskcarrier` where its workers are. When one dies it is the backend that says so or tries
        again, whatever `retries` is; their warnings stay with them.

        Parameters
        ----------
        func : callable
            Called as ``func(item)``, with several sequences ``func(item1, item2, ...)``.
        seq1, *seqs : iterable
            The items. With several, the shortest wins. Generators are used up first, so one that
            fills one buffer again and again must give copies.
        chunksize : int, optional
            Items for each range that a worker takes. Default: the mapper's own. Results do not
            depend on it.
        shared : dict, optional
            What every call of `func` gets by name. Arrays in it are read-only; to processes they
            are sent once for each `map`, and not at all if they come from `share`, `empty`, `load`
            or an earlier map in processes.
        {item_rng}
        {timeout}
        {retries}
        {retry_on}
        {collect_on_error}

        Returns
        -------
        list
            The results in the order of the items; with ``on_error="collect"`` a tuple of that, with
            None for items that failed, and a list of `FailedRange`.

        Raises
        ------
        WorkerDiedError
            An item has killed every worker process that ran it; says which item, which worker and
            how.
        TimeoutError
            A range of items took longer than `timeout`.
        ValueError
            Bad arguments, before anything is started; `timeout` on a registered backend too.
        Exception
            Whatever `func` raises, with a note that names the item.

        Examples
        --------
        >>> from taskcarrier import SerialMapper
        >>> SerialMapper()(pow, [2, 3, 4], [5, 2])
        [32, 9]
        """
        settings = self._settings(RetryPolicy.from_arguments(timeout, retries, retry_on))
        return map_lists(
            settings,
            func,
            (seq1, *seqs),
            check_chunksize(chunksize) or self.chunksize,
            on_error=on_error,
            rng=rng,
            shared=shared,
        )

    @fill_docstring
    def starmap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        shared: Mapping[str, Any] | None = None,
        rng: Any = None,
        timeout: float | None = None,
        retries: int = RETRIES,
        retry_on: type[Exception] | tuple[type[Exception], ...] = (),
        on_error: str = "raise",
    ) -> Any:
        """Apply a function to tuples of arguments, like `itertools.starmap`.

        All else is as for `map`: ``mapper.map(func, xs, ys)`` is
        ``mapper.starmap(func, zip(xs, ys))``.

        Parameters
        ----------
        func : callable
            Called as ``func(*arguments)``.
        iterable : iterable of tuple
            The arguments of every call. A generator is used up first.
        chunksize : int, optional
            As for `map`.
        shared : dict, optional
            As for `map`.
        {item_rng}
        {timeout}
        {retries}
        {retry_on}
        {collect_on_error}

        Returns
        -------
        list
            As of `map`.

        Raises
        ------
        TypeError
            An item that holds no arguments.
        Exception
            As for `map`.

        Examples
        --------
        >>> from taskcarrier import SerialMapper
        >>> SerialMapper().starmap(pow, [(2, 5), (3, 2)])
        [32, 9]
        """
        settings = self._settings(RetryPolicy.from_arguments(timeout, retries, retry_on))
        return map_lists(
            settings,
            func,
            (iterable,),
            check_chunksize(chunksize) or self.chunksize,
            on_error=on_error,
            rng=rng,
            shared=shared,
            are_arguments=True,
        )

    @fill_docstring
    def imap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        *iterables: Iterable[Any],
        ordered: bool = True,
        buffersize: int | None = None,
        chunksize: int | None = None,
        shared: Mapping[str, Any] | None = None,
        rng: Any = None,
        timeout: float | None = None,
        retries: int = RETRIES,
        retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> Generator[Any, None, None]:
        """Apply a function to the items of an input that need not end; results as they come.

        Like the built-in `map`, this returns an iterator: work begins when the first result is
        asked for, and the input is read in the thread that asks, never further ahead than
        `buffersize`. Workers take the next items when they are free, whatever the mapper's balance;
        a `SerialMapper` reads one item at a time. Between two results each worker finishes what
        it was given, so the caller may take its time. Closing the iterator, or dropping it, ends
        the work within about a second. Warnings of worker processes come when it ends.

        What is demanded of `func` is the same as for `map`.

        Parameters
        ----------
        func : callable
            Called as ``func(item)``, with several iterables ``func(item1, item2, ...)``.
        iterable, *iterables : iterable
            The items; an iterator may be endless. With several, the shortest wins. Some are read
            before the first is used, and none is copied: an input that fills one buffer again and
            again must give copies, ``(buffer.copy() for buffer in readings)``.
        ordered : bool, default True
            Whether results come in the order of the items; if not, in the order in which they are
            done, so that a slow item does not hold up others.
        buffersize : int, optional
            Items that may have been read and whose results have not been handed out. Default: four
            blocks for each worker.
        chunksize : int, optional
            Items of a block, which is what a worker is handed at a time. Default: the mapper's own,
            else one with ``timeout=`` or ``retries=0``, and otherwise as many as take some
            milliseconds, a thousand at most.
        shared : dict, optional
            As for `map`.
        {item_rng}
        {timeout}
        {retries}
        {retry_on}

        Yields
        ------
        object
            The results.

        Raises
        ------
        WorkerDiedError, TimeoutError
            As for `map`.
        Exception
            Whatever `func` raises, with a note that names the item, or the input, when it is that
            item's turn: with ``ordered=True`` after the results of all items before it. It ends the
            iterator; to go on after errors of `func`, catch them in it. (Its `StopIteration` comes
            as a `RuntimeError`, as in generators.)
            What cannot be unpickled, an item or a result, takes its whole block with it.

        Examples
        --------
        >>> from itertools import count
        >>> from taskcarrier import DynamicParallelMapper
        >>> squares = DynamicParallelMapper(2, backend="threading").imap(lambda n: n**2, count())
        >>> next(squares), next(squares), next(squares)
        (0, 1, 4)
        >>> squares.close()

        An input that has one buffer for all of its items:

        >>> import numpy as np
        >>> def readings():
        ...     buffer = np.empty(2)
        ...     for n in range(3):
        ...         buffer[:] = n
        ...         yield buffer
        >>> mapper = DynamicParallelMapper(2, backend="threading")
        >>> [float(total) for total in mapper.imap(np.sum, (one.copy() for one in readings()))]
        [0.0, 2.0, 4.0]
        """
        settings = self._settings(RetryPolicy.from_arguments(timeout, retries, retry_on))
        return imap_lists(
            settings,
            func,
            (iterable, *iterables),
            check_chunksize(chunksize) or self.chunksize,
            ordered=ordered,
            buffersize=buffersize,
            rng=rng,
            shared=shared,
        )

    map_array = _method(map_array)
    map_items = _method(map_items)
    map_chunks = _method(map_chunks)
    reduce_array = _method(reduce_array)

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
        stack.enter_context(keep_warm())
        self._open.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets, here or in a worker: all but the open blocks and what they keep."""
        return {**vars(self), "_recycler": None, "_open": []}

    def _let_go(self) -> None:
        if self._recycler is not None:
            self._recycler.close()
            self._recycler = None

    def _settings(self, retry_policy: RetryPolicy = DEFAULT_POLICY) -> Settings:
        return Settings(
            self._balance,
            self._n_jobs,
            self._backend,
            self.verbosity,
            self.temp_folder,
            self._recycler,
            self._keep_report,
            retry_policy,
        )

    def _keep_report(self, report: Report) -> None:
        self._report = report
        keep_report(report)

    if not TYPE_CHECKING:  # which takes it for a word that there can be any attribute

        def __getattr__(self, name: str) -> Any:
            """An error for what is not there; for what executors and pools have, a remedy."""
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


class StaticParallelMapper(Mapper):
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


class DynamicParallelMapper(Mapper):
    """A mapper that gives each free worker the next range.

    The right one when items take different or unknown times.

    Examples
    --------
    >>> from taskcarrier import DynamicParallelMapper
    >>> mapper = DynamicParallelMapper(n_jobs=2, backend="threading")
    >>> mapper(len, ["one", "three"])
    [3, 5]
    """

    _balance = Dynamic()


# The classes share one description of their parameters.
_parameters = inspect.cleandoc(Mapper.__doc__ or "").partition("Parameters\n")[2]
for _kind in (SerialMapper, StaticParallelMapper, DynamicParallelMapper):
    _summary, _, _examples = inspect.cleandoc(_kind.__doc__ or "").partition("Examples\n")
    _kind.__doc__ = f"{_summary}Parameters\n{_parameters}\n\nExamples\n{_examples}"

"""The table of options: the type, the default and the description of each stand here, once.

Type checkers take these classes for the types of ``**options``; `taskcarrier.verbs` makes
signatures, docstrings and checks of them. An entry has a type, a default, and a text, which begins
with the type in words. The annotations are values here, so they must not be postponed.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np

from taskcarrier.scheduling.retries import RETRIES

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    Seed = int | np.random.SeedSequence | np.random.Generator
else:  # `numpy.random` is slow to import, and of use to type checkers only
    DTypeLike = Seed = Any

Backend = Literal[
    "auto", "sequential", "threading", "loky", "threads", "processes", "multiprocessing"
]
Out = np.ndarray[Any, Any] | str | PathLike[str]


class _Unset:
    """The type of `UNSET`, the default of options for which None would be a value."""

    def __repr__(self) -> str:
        return "<unset>"


UNSET = _Unset()
REQUIRED = Parameter.empty
"""In place of a default: the option must be given."""


class _SharingOptions(TypedDict, total=False):
    """How many workers there are, and who takes what."""

    balance: Annotated[
        Literal["static", "dynamic"],
        "static",
        """{"static", "dynamic"}
        How ranges are shared out. Static: each worker gets one contiguous run of them, which is
        best when all take equally long. Dynamic: each free worker takes the next range, which is
        best when times differ; taking one costs about a microsecond. Results are the same.""",
    ]
    n_jobs: Annotated[
        int | None,
        None,
        """int
        The number of workers. Default: what an active `joblib.parallel_config` says, else all cores
        that this process may use. Negative numbers count down from all cores (-1), as in joblib.
        With 1, the function runs in the calling thread.""",
    ]


class WorkerOptions(_SharingOptions, total=False):
    """Who does the work; a mapper decides that itself."""

    backend: Annotated[
        Backend | None,
        None,
        """{"auto", "sequential", "threading", "loky", "threads", "processes", "multiprocessing"}
        Where workers run: in the calling thread, in threads, or in processes. ``"threads"`` is
        another word for ``"threading"``, ``"processes"`` and ``"multiprocessing"`` for ``"loky"``.
        Default: what an active `joblib.parallel_config` says. Without one, the calling thread
        begins, measures, and hands over the rest if that saves time: to threads when the work is
        known to release the GIL (a ufunc, a function that numba has compiled, scikit-learn's trees
        and forests), else to processes. ``"auto"`` does the same, and allows threads for any
        function that is found to release the GIL: it may then run in several threads at once.""",
    ]


class _LimitOptions(TypedDict, total=False):
    """What a range may take, and what follows a worker's death."""

    timeout: Annotated[
        float | None,
        None,
        """float
        Seconds that one range may take; after that, a `TimeoutError` names the range. A worker
        process that takes longer is killed. Threads and the calling thread cannot be stopped:
        there, the range is run to its end first. Default: no limit; infinity means the same.""",
    ]
    retries: Annotated[
        int,
        RETRIES,
        """int
        How often a range is run again after the worker process that had it in hand has died. After
        that, it is cut into halves until the item that kills is found (a chunk with `depth` is not
        cut). So the function may be called several times for an item. 0: never again, for a
        function with side effects.""",
    ]


class RetryOptions(_LimitOptions, total=False):
    """What is run again."""

    retry_on: Annotated[
        type[Exception] | tuple[type[Exception], ...],
        (),
        """exception type or tuple of types
        Exceptions after which the function is called again with the same chunk or item, up to
        `retries` times. `TimeoutError` stands for a range that took too long. Default: none;
        exceptions are final.""",
    ]


class _InputOptions(TypedDict, total=False):
    """What the function gets besides the arrays, and how these are taken."""

    axis: Annotated[
        int | tuple[int, ...],
        0,
        """int or tuple of int
        The mapped axis; a tuple has one for each array. To map over several axes of an array,
        reshape it so that they are one.""",
    ]
    args: Annotated[
        tuple[Any, ...] | list[Any],
        (),
        """tuple
        Further positional arguments, the same for every call. Arrays in it are read-only; large
        ones are shared with processes, not sent to each.""",
    ]
    kwargs: Annotated[
        Mapping[str, Any] | None,
        None,
        """dict
        Keyword arguments, treated in the same way.""",
    ]
    writable: Annotated[
        bool,
        False,
        """bool
        Whether `func` gets private copies, which it may overwrite. The caller's arrays never
        change.""",
    ]


class _ChunkOptions(_InputOptions, total=False):
    """The chunks that a function gets."""

    chunksize: Annotated[
        int | None,
        None,
        """int
        The number of items in each range; the last may be shorter. It affects results where an
        item's arithmetic depends on its neighbours in the call. Default: ranges of about 1 MiB, but
        at least 16 (small arrays) to 128 and at most 4096 of them; with `depth`, at least
        ``8 * depth`` items each, as long as eight ranges remain. The default depends on shape,
        dtype and `depth` only.""",
    ]
    depth: Annotated[
        int,
        0,
        """int
        The number of neighbouring items on each side that come with every chunk, along the mapped
        axis. `map_array` cuts their results off, so each range computes ``chunksize + 2 * depth``
        items; with a depth of at least its reach, a local filter gives what it gives on the whole
        array.""",
    ]
    boundary: Annotated[
        Literal["reflect", "nearest", "mirror", "wrap", "constant", "none"],
        "reflect",
        """{"reflect", "nearest", "mirror", "wrap", "constant", "none"}
        What stands for neighbours beyond the ends of the array, in the words of `scipy.ndimage`;
        ``"none"`` gives the chunks at the ends fewer of them. Without effect if `depth` is 0.""",
    ]
    cval: Annotated[
        Any,
        0.0,
        """scalar
        The value beyond the ends where `boundary` is ``"constant"``; a value of the arrays'
        dtype.""",
    ]
    rng: Annotated[
        Seed | None,
        None,
        """int, SeedSequence or Generator
        Gives `func` a `numpy.random.Generator` of its own for every range, as ``rng=``. The numbers
        that it draws depend on the seed and the number of the range alone (so `chunksize` affects
        results), not on workers, backend or balance. A Generator is advanced by one draw, a
        SeedSequence stays as it is. Default: none.""",
    ]


class _OutputOptions(TypedDict, total=False):
    """Where results go."""

    out: Annotated[
        Out | tuple[Out, ...] | None,
        None,
        """ndarray, memmap, path or tuple
        Where results go: an array of the right shape (any strides; results are cast to its dtype),
        a memmap, or a path that ends in ``.npy``. A file is written next to its final place, under
        its name with ``.part`` added. When it is complete, it is renamed and replaces what was
        there, whose permissions and group it takes on. The result is then the mapped file: what you
        write into it goes to the file. A tuple has one entry for each result. It must not overlap
        with an input. After an error the contents of an array or memmap are arbitrary; a file at a
        path does not exist, or is as it was. Default: a new array.""",
    ]
    dtype: Annotated[
        DTypeLike | tuple[DTypeLike, ...] | None,
        None,
        """dtype or tuple
        The dtype that results are cast to. Floats are cast within their kind, integers when every
        value fits, strings and dates when it is safe; else an error names the value. Integers
        become floats as NumPy rounds them: 2**53 + 1 loses a unit in double precision. Of text
        without a length (``str``, ``"S"``) the longest decides, as in `numpy.stack`; with `resume`
        all must have one length. A tuple has one for each result. Default: what the function
        returns.""",
    ]


class _ContinuedOptions(TypedDict, total=False):
    """What stands for results that failed, and what is kept of a run that ended early."""

    fill_value: Annotated[
        Any,
        UNSET,
        """scalar
        The value in place of results that failed; must be a value of the result's dtype. Default:
        NaN, NaT or None. Integers, booleans and strings have no such value: with ``"collect"`` they
        get zeros, False and empty strings. With ``"fill"`` the value must be given for them, or the
        call raises a `TypeError` when the results' dtype is known, which may be at its end.""",
    ]
    resume: Annotated[
        bool,
        False,
        """bool
        Whether to go on where an earlier call ended, however it ended, and to save progress for a
        later one. Needs `out` as a path (or several). Beside ``Y.npy.part``, a file
        ``Y.npy.ledger`` says which ranges are done. Both stay when the call fails, and are removed
        when the output is complete. The earlier call must have computed the same, or this one is
        refused with what differs: the same function (with all that it encloses and reads by global
        names), arguments, arrays, `chunksize` and options; `n_jobs`, `backend` and `balance` may
        differ. A `UserWarning` names what can be compared only in part. A function that carries
        arrays to write to (see `empty`) is refused. Items must give one dtype.""",
    ]


class _ChunkOutputOptions(_OutputOptions, total=False):
    """Where the results of chunks go."""

    out_axis: Annotated[
        int | tuple[int, ...] | None,
        None,
        """int or tuple of int
        The position of the mapped axis in what `func` returns, and so in the result. Default:
        `axis`. A tuple has one for each output.""",
    ]


class _ItemOutputOptions(_OutputOptions, total=False):
    """Where the results of items go."""

    out_axis: Annotated[
        int | tuple[int, ...],
        0,
        """int or tuple of int
        The axis of the result along which items are stacked, as in `numpy.stack`. A tuple has one
        for each output.""",
    ]
    out_shape: Annotated[
        int | tuple[int, ...] | None,
        None,
        """int or tuple of int
        The shape of one item's result. `func` then gets an array of this shape and of `dtype`
        (default: that of an `out` array, else float64) as its last positional argument, and must
        fill all of it; what it returns does not matter.""",
    ]


class _ItemRngOption(TypedDict, total=False):
    """The random numbers of items."""

    rng: Annotated[
        Seed | None,
        None,
        """int, SeedSequence or Generator
        Gives `func` a `numpy.random.Generator` of its own for every item, as ``rng=``. The numbers
        that it draws depend on the seed and the number of the item alone, not on workers, backend,
        balance or `chunksize`. A Generator is advanced by one draw, a SeedSequence stays as it is.
        Default: none.""",
    ]


class _ItemOptions(_InputOptions, _ItemRngOption, total=False):
    """The items that a function gets."""

    chunksize: Annotated[
        int | None,
        None,
        """int
        The number of items in each range that a worker takes; the last may be shorter. Results do
        not depend on it. Default: about a thousand ranges in all.""",
    ]


class MapArrayMethodOptions(
    _ChunkOptions, _ChunkOutputOptions, RetryOptions, _ContinuedOptions, total=False
):
    """What `map_array` of a mapper takes besides ``on_error``."""


class MapArrayOptions(WorkerOptions, MapArrayMethodOptions, total=False):
    """What `map_array` takes besides ``on_error``."""


class MapItemsMethodOptions(
    _ItemOptions, _ItemOutputOptions, RetryOptions, _ContinuedOptions, total=False
):
    """What `map_items` of a mapper takes besides ``on_error``."""


class MapItemsOptions(WorkerOptions, MapItemsMethodOptions, total=False):
    """What `map_items` takes besides ``on_error``."""


class ChunksMethodOptions(_ChunkOptions, RetryOptions, total=False):
    """What `map_chunks` and `reduce_array` of a mapper take."""


class ChunksOptions(WorkerOptions, ChunksMethodOptions, total=False):
    """What `map_chunks` and `reduce_array` take."""


class ReductionOptions(TypedDict, total=False):
    """How `reduce_array` combines partial results."""

    combine: Annotated[
        Callable[[Any, Any], Any],
        REQUIRED,
        """callable
        Called as ``combine(left, right)``, for example `operator.add` or `numpy.maximum`.""",
    ]
    initial: Annotated[
        Any,
        UNSET,
        """object
        The first `left`. Default: the first partial result.""",
    ]


class ListOptions(_ItemRngOption, RetryOptions, total=False):
    """What every map over lists takes."""

    shared: Annotated[
        Mapping[str, Any] | None,
        None,
        """dict
        Keyword arguments for every call of `func`. Arrays in it are read-only. They are sent to
        processes once for each call, and not at all if they come from `share`, `empty`, `load` or
        an earlier map in processes.""",
    ]


class _ListChunkOption(TypedDict, total=False):
    """The chunks of a list."""

    chunksize: Annotated[
        int | None,
        None,
        """int
        The number of items in each range that a worker takes. Default: the mapper's own. Results do
        not depend on it.""",
    ]


class MapOptions(_ListChunkOption, ListOptions, total=False):
    """What `map` takes besides ``on_error``."""


class _StreamOptions(TypedDict, total=False):
    """How results come from a stream."""

    ordered: Annotated[
        bool,
        True,
        """bool
        Whether results come in the order of the items. If not, they come in the order in which they
        are ready, so that a slow item does not delay others.""",
    ]
    buffersize: Annotated[
        int | None,
        None,
        """int
        The number of items that may have been read before their results are returned. Default: four
        batches for each worker.""",
    ]
    chunksize: Annotated[
        int | None,
        None,
        """int
        The number of items in a batch, the items that a worker gets at a time. Default: the
        mapper's own; else one with ``timeout=`` or ``retries=0``, and otherwise as many as take
        some milliseconds, a thousand at most.""",
    ]


class ImapOptions(_StreamOptions, ListOptions, total=False):
    """What `imap` takes."""


class _DataOptions(TypedDict, total=False):
    """The data of each fit."""

    rows: Annotated[
        Any,
        None,
        """sequence, callable
        The rows of each fit: an array of indices or a boolean mask for each fit, or a callable that
        takes the fit's random stream and returns one of these (drawn in the worker, for example
        ``lambda rng: rng.integers(n, size=n)`` for a bootstrap; it needs `rng`). Default: all
        rows.""",
    ]
    columns: Annotated[
        Sequence[int] | None,
        None,
        """sequence of int
        The column of `y` that is the target, for each fit.""",
    ]
    sample_weight: Annotated[
        Any,
        None,
        """array_like of shape (n_samples,) or (n_fits, n_samples), or callable
        Weights of samples, the same for all fits or one row for each, or a callable as for `rows`.
        Where `rows` are given, the weights of these rows are passed.""",
    ]
    rng: Annotated[
        Seed | None,
        None,
        """int, SeedSequence or Generator
        Gives each fit a random stream of its own, which depends on the number of the fit alone. The
        stream is used for, in this order, every ``random_state`` parameter of the estimator (by
        name in sorted order, nested ones too, as scikit-learn sets them), what `rows` draws, and
        what `sample_weight` draws. Default: none; ``random_state`` stays as it is.""",
    ]


class FitOptions(_DataOptions, _SharingOptions, RetryOptions, total=False):
    """What `fit_many` takes besides ``on_error``."""

    backend: Annotated[
        str | None,
        None,
        """{"auto", "sequential", "threading", "loky", "threads", "processes"} or str
        Where workers run, see `map_array`; also any other backend that is registered with joblib,
        such as ``"dask"``, which cannot keep a `timeout`. Default: what an active
        `joblib.parallel_config` says. Without one, the calling thread begins, and hands over the
        rest if that saves time: to threads for scikit-learn's trees and forests, which release the
        GIL, else to processes.""",
    ]


class PredictOptions(WorkerOptions, _OutputOptions, _LimitOptions, total=False):
    """What `predict_array` takes."""

    chunksize: Annotated[
        int | None,
        None,
        """int
        The number of rows in each call. Default: a 16th of all, but at least a thousand.""",
    ]


class OnErrorOption(TypedDict, total=False):
    """What follows an error, for results that are put in place."""

    on_error: Annotated[
        Literal["raise", "collect", "fill"],
        "raise",
        """{"raise", "collect", "fill"}
        What happens when `func` raises an exception. Raise: the run ends with it. Collect: the run
        goes on, and ``(result, failures)`` is returned, where ``failures`` is a list of
        `FailedRange` ``(start, stop, error)`` in ascending order, and the result holds `fill_value`
        there. Fill: the result alone. A range that fails is narrowed down to its failing items (by
        calling `func` on halves of it, in `map_items` item by item), so what is missing does not
        depend on `chunksize`. Results of a wrong shape or dtype are still errors, and so is a call
        in which no item succeeds (with ``"collect"`` its result is None).""",
    ]


class CollectOption(TypedDict, total=False):
    """What follows an error, for results in a list."""

    on_error: Annotated[
        Literal["raise", "collect"],
        "raise",
        """{"raise", "collect"}
        What happens when `func` raises an exception. Raise: the run ends with it. Collect: the run
        goes on, and ``(results, failures)`` is returned, where ``failures`` is a list of
        `FailedRange` ``(start, stop, error)`` in ascending order, and ``results`` has None
        there.""",
    ]

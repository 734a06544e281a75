"""Descriptions of the options that several functions share, for their docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_DESCRIPTIONS = """
*arrays : array_like
    One or several arrays of equal length along the mapped axis, of any layout and dtype. Workers
    map paths that end in ``.npy`` and memmaps; these are never copied. Neither are arrays from
    `share`, `empty` and `load`, results of earlier maps in processes, and views of all of these.
    Threads see other arrays as views, and processes read them range by range. Where ranges are
    not contiguous in memory (columns of an array in C order), processes need one copy of the
    array. zarr arrays and the like (a ``dtype``, a ``shape``, slicing) are read by range in every
    worker. pandas and xarray objects become their values, and subclasses of ndarray become
    base-class arrays (a unit, for example, is lost). Arrays of Python objects are pickled by range
    for processes.
axis : int or tuple of int, default 0
    The mapped axis; a tuple has one for each array. To map over several axes of an array, reshape
    it so that they are one.
balance : {"static", "dynamic"}, default "static"
    How ranges are shared out. Static: each worker gets one contiguous run of them, which is best
    when all take equally long. Dynamic: each free worker takes the next range, which is best when
    times differ; taking one costs about a microsecond. Results are the same.
n_jobs : int, optional
    The number of workers. Default: what an active `joblib.parallel_config` says, else all cores
    that this process may use. Negative numbers count down from all cores (-1), as in joblib. With
    1, the function runs in the calling thread.
backend : {"sequential", "threading", "loky", "threads", "processes", "multiprocessing"}, optional
    Where workers run: in the calling thread, in threads, or in processes. ``"threads"`` is another
    word for ``"threading"``, ``"processes"`` and ``"multiprocessing"`` for ``"loky"``.
    Default: what an active `joblib.parallel_config` says, else threads when `func` is
    known to release the GIL (a ufunc, a function that numba has compiled), else processes.
chunksize : int, optional
    The number of items in each range; the last may be shorter. It affects results where an item's
    arithmetic depends on its neighbours in the call. Default: about 1 MiB of input, but at least 16
    to 128 items (by size) and at most 4096 ranges; with `depth` eight times that, if it leaves
    eight ranges. The default depends on shape, dtype and `depth` only.
item_chunksize : int, optional
    The number of items in each range that a worker takes; the last may be shorter. Results do not
    depend on it. Default: about a thousand ranges in all.
out : ndarray, memmap, path or tuple, optional
    Where results go: an array of the right shape (any strides; results are cast to its dtype),
    a memmap, or a path that ends in ``.npy``. A file is written next to its final place, under its
    name with ``.part`` added. When it is complete, it is renamed and replaces what was there, whose
    permissions and group it takes on. The result is then the mapped file: what you write into it
    goes to the file. A tuple has one entry for each result. It must not overlap with an input.
    After an error the contents of an array or memmap are arbitrary; a file at a path does not
    exist, or is as it was. Default: a new array.
dtype : dtype or tuple, optional
    The dtype that results are cast to. Floats are cast within their kind, integers when every value
    fits, strings and dates when it is safe; else an error names the value. Integers become floats
    as NumPy rounds them: 2**53 + 1 loses a unit in double precision. A tuple has one for each
    result. Default: what `func` returns.
out_axis : int or tuple of int, optional
    The position of the mapped axis in what `func` returns, and so in the result. Default:
    `axis`. A tuple has one for each output.
depth : int, default 0
    The number of neighbouring items on each side that come with every chunk, along the mapped
    axis. Their results are cut off, so each range computes ``chunksize + 2 * depth`` items. With a
    depth of at least its reach, a local filter gives what it gives on the whole array.
depth_uncut : int, default 0
    The number of neighbouring items on each side that come with every chunk, along the mapped axis.
boundary : {"reflect", "nearest", "mirror", "wrap", "constant", "none"}, default "reflect"
    What stands for neighbours beyond the ends of the array, in the words of `scipy.ndimage`;
    ``"none"`` gives the chunks at the ends fewer of them. Without effect if `depth` is 0.
cval : scalar, default 0.0
    The value beyond the ends where `boundary` is ``"constant"``; a value of the arrays' dtype.
args : tuple, optional
    Further positional arguments, the same for every call. Arrays in it are read-only; large ones
    are shared with processes, not sent to each.
kwargs : dict, optional
    Keyword arguments, treated in the same way.
writable : bool, default False
    Whether `func` gets private copies, which it may overwrite. The caller's arrays never
    change.
on_error : {"raise", "collect", "fill"}, default "raise"
    What happens when `func` raises an exception. Raise: the run ends with it. Collect: the run
    goes on, and ``(result, failures)`` is returned, where ``failures`` is a list of
    `FailedRange` ``(start, stop, error)`` in ascending order, and the result holds `fill_value`
    there. Fill: the result alone. A range that fails is narrowed down to its failing items (by
    calling `func` on halves of it, in `map_items` item by item), so what is missing does not
    depend on `chunksize`. Results of a wrong shape or dtype are still errors, and so is a call in
    which no item succeeds (with ``"collect"`` its result is None).
collect_on_error : {"raise", "collect"}, default "raise"
    What happens when `func` raises an exception. Raise: the run ends with it. Collect: the run
    goes on, and ``(results, failures)`` is returned, where ``failures`` is a list of
    `FailedRange` ``(start, stop, error)`` in ascending order, and ``results`` has None there.
rng : int, SeedSequence or Generator, optional
    Gives `func` a `numpy.random.Generator` of its own for every range, as ``rng=``. The numbers
    that it draws depend on the seed and the number of the range alone (so `chunksize` affects
    results), not on workers, backend or balance. A Generator is advanced by one draw, a
    SeedSequence stays as it is. Default: none.
item_rng : int, SeedSequence or Generator, optional
    Gives `func` a `numpy.random.Generator` of its own for every item, as ``rng=``. The numbers that
    it draws depend on the seed and the number of the item alone, not on workers, backend, balance
    or `chunksize`. A Generator is advanced by one draw, a SeedSequence stays as it is. Default:
    none.
timeout : float, optional
    Seconds that one range may take; after that, a `TimeoutError` names the range. A worker process
    that takes longer is killed. Threads and the calling thread cannot be stopped: there, the range
    is run to its end first. Default: no limit; infinity means the same.
retries : int, default 2
    How often a range is run again after the worker process that had it in hand has died. After
    that, it is cut into halves until the item that kills is found (a chunk with `depth` is not
    cut). So `func` may be called several times for an item. 0: never again, for a `func` with
    side effects.
retry_on : exception type or tuple of types, optional
    Exceptions after which `func` is called again with the same chunk or item, up to `retries`
    times. `TimeoutError` stands for a range that took too long. Default: none; exceptions are
    final.
fill_value : scalar, optional
    The value in place of results that failed; must be a value of the result's dtype. Default: NaN,
    NaT or None. Integers, booleans and strings have no such value: with ``"collect"`` they get
    zeros, False and empty strings. With ``"fill"`` the value must be given for them, or the call
    raises a `TypeError` when the results' dtype is known, which may be at its end.
resume : bool, default False
    Whether to go on where an earlier call ended, however it ended, and to save progress for a
    later one. Needs `out` as a path (or several). Beside ``Y.npy.part``, a file ``Y.npy.ledger``
    says which ranges are done. Both stay when the call fails, and are removed when the output is
    complete. The earlier call must have computed the same, or this one is refused with what
    differs: the same function (with all that it encloses and reads by global names), arguments,
    arrays, `chunksize` and options; `n_jobs`, `backend` and `balance` may differ. A `UserWarning`
    names what can be compared only in part. A function that carries arrays to write to (see
    `empty`) is refused. Items must give one dtype.
"""


def _parse_descriptions(text: str) -> dict[str, str]:
    """Return the paragraph of each parameter, by the first word of its heading in `text`."""
    paragraphs: dict[str, str] = {}
    name = ""
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            name = line.split(" ", 1)[0].lstrip("*")
            line = f"{_SHOWN_NAMES.get(name, name)} {line.split(' ', 1)[1]}"  # noqa: PLW2901  # as shown
        paragraphs[name] = f"{paragraphs[name]}\n{line}" if name in paragraphs else line
    return paragraphs


# The names that are shown where functions have different descriptions of one parameter.
_SHOWN_NAMES = {
    "arrays": "*arrays",
    "item_chunksize": "chunksize",
    "depth_uncut": "depth",
    "item_rng": "rng",
    "collect_on_error": "on_error",
}
DESCRIPTIONS = _parse_descriptions(_DESCRIPTIONS)


def fill_docstring(verb: F) -> F:
    """Put the shared descriptions into a docstring, in place of lines that say ``{name}``."""
    if verb.__doc__:
        lines = inspect.cleandoc(verb.__doc__).splitlines()
        verb.__doc__ = "\n".join(
            DESCRIPTIONS[line[1:-1]] if line.startswith("{") and line.endswith("}") else line
            for line in lines
        )
    return verb

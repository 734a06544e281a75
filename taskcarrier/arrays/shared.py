"""Arrays that workers see without a copy: `share` and `empty` (`load` is in `memory.npy`)."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsIndex

import numpy as np

from taskcarrier.arrays.inputs.check import check_inputs, to_plain_range
from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.memory.strides import contiguous_strides


def empty(
    shape: SupportsIndex | tuple[SupportsIndex, ...], dtype: Any = np.float64, order: str = "C"
) -> np.ndarray:
    """Make a new array in shared memory, like `numpy.empty`.

    It is an ordinary, writable array. Any view of it is sent to worker processes as a description
    of where it lies: nothing is copied, and the next call sees what is written into it.
    A function that carries it (in a closure, a partial, a bound object or a global name of
    ``__main__``) may write to it, and the caller sees what was written; this holds on every backend
    except those that others have registered with joblib. Different items should write to different
    places; an item that is run again after a worker has died writes again.
    The memory has no name and is freed when the last view dies, even if workers have seen it. Only
    if this process was forked in between, it is freed after that child and the workers have ended.

    Parameters
    ----------
    shape : int or tuple of int
        The shape of the array.
    dtype : dtype, default float64
        Any dtype that holds no Python objects.
    order : {"C", "F"}, default "C"
        The order of the axes in memory.

    Returns
    -------
    ndarray
        The array. Its contents are not defined.

    Raises
    ------
    TypeError
        If the dtype holds Python objects.
    MemoryError
        If there is not enough memory; the message has the sizes.

    Examples
    --------
    >>> from taskcarrier import empty
    >>> X = empty((2, 3), "f4")
    >>> X[...] = 1
    >>> X
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)

    A function that carries it may write to it:

    >>> from taskcarrier import StaticParallelMapper
    >>> squares = empty(4, "i8")
    >>> def square(i):
    ...     squares[i] = i**2
    >>> _ = StaticParallelMapper(n_jobs=2, backend="loky").map(square, range(4))
    >>> squares
    array([0, 1, 4, 9])
    """
    lengths = shape if isinstance(shape, tuple) else (shape,)
    dims = tuple(operator.index(length) for length in lengths)
    checked_dtype = np.dtype(dtype)
    if checked_dtype.hasobject:
        raise TypeError(f"an array of dtype {checked_dtype} cannot lie in shared memory")
    if order not in {"C", "F"}:
        raise ValueError(f"order must be 'C' or 'F', got {order!r}")
    if min(dims, default=0) < 0:
        raise ValueError(f"lengths must not be negative, got shape {dims}")
    nbytes = math.prod(dims) * checked_dtype.itemsize
    segment = None
    if nbytes:
        segment = Segment.create()
        segment.takes_writes = True
        segment.reserve(nbytes)
    strides = contiguous_strides(dims, checked_dtype.itemsize, order)
    return SharedView(segment, 0, dims, strides, checked_dtype).open("write")


def share(X: Any) -> np.ndarray:
    """Copy an array into shared memory, for several maps over it in processes.

    Worker processes read an ordinary array again in every call; they see a shared array where it
    lies. See `empty` for its lifetime.

    Parameters
    ----------
    X : array_like
        Anything that can be mapped over, of any dtype but Python objects.

    Returns
    -------
    ndarray
        An ordinary, writable array with the values of `X`; in the memory order of `X` if that is
        contiguous, else in C order.

    Raises
    ------
    TypeError
        If the dtype holds Python objects, or `X` cannot be mapped over.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import share, map_array, last_report
    >>> X = share(np.arange(6.0).reshape(2, 3))
    >>> _ = map_array(np.sqrt, X[:, ::-1], backend="loky", n_jobs=2)
    >>> last_report().bytes_copied
    0
    """
    (array,) = check_inputs((X,), 0).arrays
    flags = getattr(array, "flags", None)
    order = "F" if flags and flags.f_contiguous and not flags.c_contiguous else "C"
    shared = empty(array.shape, array.dtype, order)
    shared[...] = to_plain_range(array[...])
    return shared

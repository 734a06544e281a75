"""Arrays that workers see without a copy: `share` and `empty` (`load` is in `files`)."""

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
    """A new array in shared memory, like `numpy.empty`.

    It is an ordinary, writable array. Any view of it goes to worker processes as a description
    of where it lies: nothing is copied, and what is written into it is seen by the next call.
    A function that carries it (in a closure, a partial, a bound object or a global name of
    ``__main__``) may write to it on every backend but those that others have registered with
    joblib, and the caller sees what was written. Different items should write to different places;
    what is run again after a worker has died writes again.
    The memory has no name and is freed when the last view dies, whatever workers have seen of it;
    only if this process was forked meanwhile, not before that child and the workers have ended.

    Parameters
    ----------
    shape : int or tuple of int
        Its shape.
    dtype : dtype, default float64
        Anything but Python objects.
    order : {"C", "F"}, default "C"
        The order of its axes in memory.

    Returns
    -------
    ndarray
        Its contents are not defined.

    Raises
    ------
    TypeError
        For dtypes that hold Python objects.
    MemoryError
        If there is not so much memory, with sizes.

    Examples
    --------
    >>> from taskcarrier import empty
    >>> X = empty((2, 3), "f4")
    >>> X[...] = 1
    >>> X
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)

    Written to by a function that carries it:

    >>> from taskcarrier import StaticParallelMapper
    >>> squares = empty(4, "i8")
    >>> def square(i):
    ...     squares[i] = i**2
    >>> _ = StaticParallelMapper(n_jobs=2, backend="loky").map(square, range(4))
    >>> squares
    array([0, 1, 4, 9])
    """
    lengths = shape if isinstance(shape, tuple) else (shape,)
    dims = tuple(operator.index(n) for n in lengths)
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"an array of dtype {kind} cannot lie in shared memory")
    if order not in {"C", "F"}:
        raise ValueError(f"order must be 'C' or 'F', got {order!r}")
    if min(dims, default=0) < 0:
        raise ValueError(f"lengths must not be negative, got shape {dims}")
    nbytes = math.prod(dims) * kind.itemsize
    segment = None
    if nbytes:
        segment = Segment.create()
        segment.takes_writes = True
        segment.reserve(nbytes)
    strides = contiguous_strides(dims, kind.itemsize, order)
    return SharedView(segment, 0, dims, strides, kind).open("write")


def share(X: Any) -> np.ndarray:
    """A copy of an array in shared memory, for several maps in processes over it.

    An ordinary array is read by worker processes in every call; a shared one is seen by them where
    it is. See `empty` for how it lives.

    Parameters
    ----------
    X : array_like
        Anything that can be mapped over, of any dtype but Python objects.

    Returns
    -------
    ndarray
        An ordinary, writable array with the values of `X`, in its memory order as far as it is
        contiguous, else in C order.

    Raises
    ------
    TypeError
        For dtypes that hold Python objects, and what cannot be mapped over.

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

"""Tables of memory layouts, and what NumPy says about where an array lies."""

import hashlib
import zlib

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

byte_bounds = getattr(np.lib, "array_utils", np).byte_bounds

CACHE_LINE = 64


def address(array):
    """Return where the first item lies."""
    return array.ctypes.data


def extent(array):
    """Return the bytes from the lowest to the highest that belong to the array."""
    low, high = byte_bounds(array)
    return high - low


def unaligned(array):
    """Return a copy whose items lie one byte beside where they should."""
    raw = bytearray(array.nbytes + 1)
    raw[1:] = array.tobytes()
    return np.frombuffer(raw, array.dtype, offset=1).reshape(array.shape)


def cube():
    """Return an array of three axes of different lengths."""
    return np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4)


STRUCT = np.dtype([("a", "i1"), ("b", "<f8"), ("c", "S3")])


def struct():
    """Return an array of structures with a small and a large field."""
    made = np.zeros(10, STRUCT)
    made["a"] = np.arange(10)
    made["b"] = np.arange(10) / 7
    made["c"] = b"xyz"
    return made


# Extent at most twice the bytes: kept with their strides.
KEPT = {
    "C": cube,
    "F": lambda: np.asfortranarray(cube()),
    "transposed": lambda: cube().transpose(2, 0, 1),
    "reversed": lambda: cube()[::-1],
    "reversed everywhere": lambda: cube()[::-1, ::-1, ::-1],
    "every other": lambda: np.arange(40.0)[::2],
    "every other, backwards": lambda: np.arange(40.0)[::-2],
    "zero stride": lambda: np.broadcast_to(np.arange(4.0), (5, 4)),
    "one item many times": lambda: np.broadcast_to(np.float32(3), (6, 5)),
    "windows": lambda: sliding_window_view(np.arange(50.0), 7),
    "reversed windows": lambda: sliding_window_view(np.arange(50.0), 7)[::-1, ::-1],
    "struct": struct,
    "large field": lambda: struct()["b"],
    "unaligned": lambda: unaligned(np.arange(20.0)),
    "column of two": lambda: np.arange(20.0).reshape(10, 2)[:, 1],
    "one item": lambda: np.array([7.5]),
    "big endian": lambda: np.arange(10, dtype=">i4"),
    "NaT": lambda: np.array(["2020-01-01", "NaT"], "M8[D]"),
    "strings": lambda: np.array(["a", "", "\U0001f600x"]),
    "NaN payloads": lambda: np.array([0x7FF8000000000001, 0xFFF0000000000001], "u8").view("f8"),
    "lengths of one": lambda: cube()[:1, 1:2],
    "void": lambda: np.frombuffer(b"abcdef", "V3"),
}
# More gaps than bytes: gathered.
GATHERED = {
    "gaps and lengths of one": lambda: cube()[:1, ::2, :1],
    "every fifth": lambda: np.arange(100.0)[::5],
    "every fifth, backwards": lambda: np.arange(100.0)[::-5],
    "small field": lambda: struct()["a"],
    "column": lambda: np.arange(100.0).reshape(10, 10)[:, 3],
    "F block": lambda: np.asfortranarray(np.arange(400.0).reshape(20, 20))[::4, ::3],
    "reversed block": lambda: np.arange(400.0).reshape(20, 20)[::-4, ::3],
    "transposed block": lambda: np.arange(1000.0).reshape(10, 10, 10)[::3, 1:9:2, ::-2].T,
    "zero stride and gaps": lambda: np.broadcast_to(np.arange(100.0)[::10], (3, 10)),
    "windows over gaps": lambda: as_strided(np.arange(100.0), (5, 3), (80, 80)),
    "unaligned gaps": lambda: unaligned(np.arange(100.0))[::7],
}
LAYOUTS = {**KEPT, **GATHERED}
EMPTY = {
    "no items": lambda: np.empty((0, 3)),
    "no bytes in an item": lambda: np.empty((4, 0, 2), "i2"),
    "empty strings": lambda: np.empty(5, "V0"),
}


def facts(chunk, axis):
    """Return all that a function can see of a chunk, as numbers: the same row for each item."""
    digest = hashlib.sha256(chunk.tobytes()).digest()
    row = [
        zlib.crc32(repr((chunk.dtype, chunk.dtype.isalignedstruct)).encode()),
        *chunk.shape,
        *chunk.strides,
        address(chunk) % CACHE_LINE,
        chunk.flags.aligned,
        chunk.flags.writeable,
        *np.frombuffer(digest, np.int64),
    ]
    return np.tile(np.array(row, np.int64), (chunk.shape[axis], 1))


def facts_of_slices(array, axis, chunksize):
    """Return the `facts` of the slices of an array itself, seen read-only."""
    view = array.view()
    view.flags.writeable = False
    before = (slice(None),) * axis
    starts = range(0, array.shape[axis], chunksize)
    return np.concatenate(
        [facts(view[(*before, slice(start, start + chunksize))], axis) for start in starts]
    )

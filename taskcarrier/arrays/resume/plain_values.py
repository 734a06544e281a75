"""Digests of values without parts to visit: numbers, strings, arrays, what a name stands for."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, ModuleType
from typing import Any

import numpy as np

from taskcarrier.arrays.resume.attributes import get_attributes, get_module_name
from taskcarrier.arrays.resume.installed import is_installed, is_reachable, qualify
from taskcarrier.workers.introspect import is_made_at_run_time

_DIGEST_NBYTES = 16
# An array that is not contiguous is digested in pieces of about this many bytes.
_PIECE_NBYTES = 1 << 24

# `repr` gives the whole value of these types. Quotes distinguish strings from numbers.
_SIMPLE_TYPES = {bool, bytes, complex, float, int, str, type(None), type(...)}


def digest_if_plain(value: Any) -> bytes | None:
    """Return the digest of a value without parts to visit, or None for other values."""
    kind = type(value)
    if kind is int:  # Python refuses to print long integers in decimal
        return digest_parts("int", b"%x" % value)
    if kind in _SIMPLE_TYPES or kind is range:
        return digest_parts(kind.__name__, _encode(repr(value)))
    if kind is bytearray:
        return digest_parts("bytearray", bytes(value))
    if isinstance(value, np.generic) and kind.__module__ == "numpy" and not value.dtype.hasobject:
        return digest_parts("scalar", digest_array(np.asarray(value)))
    name = _find_name(value, kind)
    return None if name is None else digest_parts(kind.__name__, name.encode())


def print_if_simple(value: Any, items: Iterable[Any]) -> bytes | None:
    """Return the `repr` of a container if it shows all items completely, else None."""
    if not _SIMPLE_TYPES.issuperset(map(type, items)):
        return None
    try:
        return _encode(repr(value))
    except ValueError:  # an integer is too long to be printed
        return None


def _find_name(value: Any, kind: type) -> str | None:
    """Return a name that stands for the same value in every process; None if there is none."""
    if issubclass(kind, np.dtype):
        return repr(value)
    if kind is np.ufunc:
        name = str(value.__name__)
        return qualify("numpy", name) if getattr(np, name, None) is value else None
    if issubclass(kind, ModuleType):
        module = str(get_attributes(value).get("__name__"))
        return qualify(module) if is_installed(module) else None
    if issubclass(kind, type):
        return _find_class_name(value)
    if kind is BuiltinFunctionType and issubclass(type(value.__self__), (type, ModuleType)):
        module = value.__module__
        return qualify(module, value.__qualname__) if is_installed(module) else None
    return _find_stream_name(value) if kind.__name__ in {"Random", "RandomState"} else None


def _find_class_name(kind: type) -> str | None:
    module = get_module_name(kind)
    if not is_made_at_run_time(kind):  # written in C, so made with its module
        return qualify(module, kind.__qualname__)
    if is_installed(module) and is_reachable(kind, module, kind.__qualname__):
        return qualify(module, kind.__qualname__)
    return None


def _find_stream_name(value: Any) -> str | None:
    """Return the name of a generator behind the functions of `random` or `numpy.random`."""
    for module, name in (("random", "_inst"), ("numpy.random.mtrand", "_rand")):
        if get_attributes(sys.modules.get(module)).get(name) is value:
            return f"the stream of {module}"
    return None


def digest_array(array: np.ndarray) -> bytes:
    """Return a digest of an array's dtype, shape and values, whatever its strides."""
    if array.dtype.names is not None:  # field by field: the padding between them does not count
        fields = [name.encode() for name in array.dtype.names]
        values = [digest_array(array[name]) for name in array.dtype.names]
        return digest_parts("records", repr((array.dtype, array.shape)).encode(), *fields, *values)
    content = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    for piece in _split(array):
        raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        if array.dtype.char in "gG" and _HAS_X87_FORMAT:  # the rest of 16 bytes is padding
            raw = np.ascontiguousarray(raw.reshape(-1, 16)[:, :10])
        content.update(raw.data)
    facts = repr((array.dtype, array.shape)).encode()
    return digest_parts("array", facts, content.digest())


# Whether long doubles have 80 bits of value in 128 bits of memory.
_HAS_X87_FORMAT = np.finfo(np.longdouble).nmant == 63  # noqa: PLR2004  # x87's format
_HAS_X87_FORMAT &= np.dtype(np.longdouble).itemsize == 16  # noqa: PLR2004  # as above


def _split(array: np.ndarray) -> Iterable[np.ndarray]:
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous or array.ndim == 0 or array.nbytes <= _PIECE_NBYTES:
        yield array
        return
    step = max(1, _PIECE_NBYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield from _split(array[start]) if step == 1 else (array[start : start + step],)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def digest_parts(kind: str, *parts: bytes) -> bytes:
    """Return a digest of parts that also depends on where each part ends."""
    content = hashlib.blake2b(kind.encode(), digest_size=_DIGEST_NBYTES)
    for part in parts:
        content.update(struct.pack("<Q", len(part)))
        content.update(part)
    return content.digest()

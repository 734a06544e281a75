"""Results that the caller keeps own their memory: nothing in them is a view of a chunk.

Workers that are processes send pickles, which are copies. In threads and in the caller a result may
hold its chunk, or a view of it, in any object: the input would show through, and could be neither
written to nor freed. Chunks are read-only, and so is every view of one, so these are looked for.
"""

from __future__ import annotations

import copy
import gc
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from taskcarrier.notes import add_note

# What holds no array, and is not worth a look.
_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type,
    ModuleType,
    CodeType,
    BuiltinFunctionType,
    np.generic,
    np.dtype,
)


def owned(result: Any) -> Any:
    """The result, with copies of what is read-only memory in it.

    Plain containers are put together again around the copies; other objects that hold such memory
    are copied as a whole, as `copy.deepcopy` does it.
    """
    kind = type(result)
    if kind is np.ndarray and not result.dtype.hasobject:
        return result if result.flags.writeable else result.copy(order="K")
    if kind in {tuple, list}:
        return kind(map(owned, result))
    if kind is dict:
        return {key: owned(value) for key, value in result.items()}
    return _copied(result) if _holds_read_only(result) else result


def _copied(result: Any) -> Any:
    kind = type(result)
    if kind is np.ndarray and result.dtype == object:
        made = np.empty_like(result)
        for place, value in np.ndenumerate(result):
            made[place] = owned(value)
        return made
    try:
        copied = copy.deepcopy(result)
        return _by_pickle(result) if _holds_read_only(copied) else copied
    except Exception as error:
        add_note(
            error,
            f"func returned an object ({kind.__module__}.{kind.__qualname__}) that holds its chunk "
            "and cannot be copied; have it hold chunk.copy() instead",
        )
        raise


def owned_objects(result: Any) -> Any:
    """The same for results that are arrays, where they are of Python objects."""
    if isinstance(result, np.ndarray):
        return owned(result) if result.dtype.hasobject else result
    return tuple(map(owned_objects, result)) if type(result) is tuple else result


def _by_pickle(result: object) -> object:
    """A copy as processes would send it, of what `copy` leaves as it is: functions."""
    from taskcarrier.backends.parcels import pack_items, unpack_items  # noqa: PLC0415  # loads joblib

    return unpack_items(pack_items(result))


def _holds_read_only(result: object) -> bool:
    """Whether an object refers to read-only memory, at whatever distance."""
    seen: set[int] = set()
    found = [result]
    while found:
        one = found.pop()
        if isinstance(one, _ATOMS) or id(one) in seen:
            continue
        if _is_read_only(one):
            return True
        seen.add(id(one))
        found += _referents(one)
    return False


def _is_read_only(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return not value.flags.writeable
    return isinstance(value, memoryview) and value.readonly and not isinstance(value.obj, bytes)


def _referents(value: object) -> list[Any]:
    """What an object refers to, but not the modules that functions are of."""
    if isinstance(value, FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, np.ndarray):
        elements = value.ravel().tolist() if value.dtype.hasobject else []
        return [*elements, *getattr(value, "__dict__", {}).values()]
    return gc.get_referents(value)

"""Results that own their memory: nothing in what the caller keeps is a view of a chunk.

Worker processes send pickles, which are copies. In threads and in the caller a result may hold its
chunk, or a view of it, in any object. Changes of the input would then show in the result, which
could not be written to, and the input could not be freed. Chunks are read-only, and so is every
view of one, so results are searched for read-only arrays over the memory of the given arrays.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from taskcarrier.notes import add_note

# Types whose objects hold no array, and need no search.
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
    np.generic,
    np.dtype,
)

Given = Sequence[np.ndarray]
"""The arrays that the function was given."""


def own_memory(result: Any, given: Given) -> Any:
    """Return the result, with copies in place of arrays over the memory of `given`.

    Plain containers are rebuilt around the copies. Other objects that hold such memory are copied
    as a whole, as by `copy.deepcopy`.
    """
    kind = type(result)
    if kind is np.ndarray and not result.dtype.hasobject:
        return result.copy(order="K") if _is_view(result, given) else result
    if kind in {tuple, list}:
        return kind(own_memory(value, given) for value in result)
    if kind is dict:
        return {key: own_memory(value, given) for key, value in result.items()}
    return _copy(result, given) if _holds_view(result, given) else result


def _copy(result: Any, given: Given) -> Any:
    kind = type(result)
    if kind is np.ndarray and result.dtype == object:
        copied_array = np.empty_like(result)
        for index, value in np.ndenumerate(result):
            copied_array[index] = own_memory(value, given)
        return copied_array
    try:
        copied = copy.deepcopy(result)
        return _copy_by_pickle(result) if _holds_view(copied, given) else copied
    except Exception as error:
        add_note(
            error,
            f"func returned an object ({kind.__module__}.{kind.__qualname__}) that holds its chunk "
            "and cannot be copied; have it hold chunk.copy() instead",
        )
        raise


def own_objects(result: Any, given: Given) -> Any:
    """Return an array or a tuple of arrays, with `own_memory` applied to arrays of objects."""
    if isinstance(result, np.ndarray):
        return own_memory(result, given) if result.dtype.hasobject else result
    if type(result) is tuple:
        return tuple(own_objects(value, given) for value in result)
    return result


def _copy_by_pickle(result: object) -> object:
    """Return a copy as processes would send it: `copy` does not copy functions."""
    # Imported late, as it loads joblib.
    from taskcarrier.workers.pickling import pickle_items, unpickle_items  # noqa: PLC0415

    return unpickle_items(pickle_items(result))


def _holds_view(result: object, given: Given) -> bool:
    """Return whether an object refers to memory of `given`, directly or through other objects."""
    seen_ids: set[int] = set()
    pending = [result]
    while pending:
        value = pending.pop()
        if isinstance(value, _ATOMS) or id(value) in seen_ids:
            continue
        if isinstance(value, np.ndarray) and _is_view(value, given):
            return True
        seen_ids.add(id(value))
        pending += _get_referents(value)
    return False


def _is_view(array: np.ndarray, given: Given) -> bool:
    return not array.flags.writeable and any(np.may_share_memory(array, other) for other in given)


def _get_referents(value: object) -> list[Any]:
    """Return the objects that `value` refers to, without the modules that define functions."""
    for kind, get_referents in _REFERENTS.items():
        if isinstance(value, kind):
            return get_referents(value)
    return gc.get_referents(value)


def _get_array_referents(array: np.ndarray) -> list[Any]:
    elements = array.ravel().tolist() if array.dtype.hasobject else []
    return [*elements, *getattr(array, "__dict__", {}).values()]


def _get_iterator_referents(iterator: np.nditer) -> list[Any]:
    try:
        return list(iterator.operands)
    except ValueError:  # the iterator is closed
        return []


# Types for which the garbage collector names too many objects, or, for NumPy's, none.
_REFERENTS: dict[type, Callable[[Any], list[Any]]] = {
    FunctionType: lambda f: [f.__closure__, f.__defaults__, f.__kwdefaults__, f.__dict__],
    MethodType: lambda method: [method.__func__, method.__self__],
    BuiltinFunctionType: lambda method: [method.__self__],
    memoryview: lambda view: [view.obj],
    np.ndarray: _get_array_referents,
    np.flatiter: lambda iterator: [iterator.base],
    np.broadcast: lambda broadcast: list(broadcast.iters),
    np.nditer: _get_iterator_referents,
}

"""Results that the caller keeps own their memory: nothing in them is a view of a chunk.

Workers that are processes send pickles, which are copies. In threads and in the caller a result may
hold its chunk, or a view of it, in any object: the input would show through, and could be neither
written to nor freed. Chunks are read-only, and so is every view of one. So results are searched for
read-only arrays over the memory of what the function was given.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
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
    np.generic,
    np.dtype,
)

Given = Sequence[np.ndarray]
"""Arrays that the function was given."""


def own_memory(result: Any, given: Given) -> Any:
    """The result, with copies of what is memory of `given` in it.

    Plain containers are put together again around the copies; other objects that hold such memory
    are copied as a whole, as `copy.deepcopy` does it.
    """
    kind = type(result)
    if kind is np.ndarray and not result.dtype.hasobject:
        return result.copy(order="K") if _is_a_view(result, given) else result
    if kind in {tuple, list}:
        return kind(own_memory(value, given) for value in result)
    if kind is dict:
        return {key: own_memory(value, given) for key, value in result.items()}
    return _copy(result, given) if _holds_a_view(result, given) else result


def _copy(result: Any, given: Given) -> Any:
    kind = type(result)
    if kind is np.ndarray and result.dtype == object:
        made = np.empty_like(result)
        for place, value in np.ndenumerate(result):
            made[place] = own_memory(value, given)
        return made
    try:
        copied = copy.deepcopy(result)
        return _copy_by_pickle(result) if _holds_a_view(copied, given) else copied
    except Exception as error:
        add_note(
            error,
            f"func returned an object ({kind.__module__}.{kind.__qualname__}) that holds its chunk "
            "and cannot be copied; have it hold chunk.copy() instead",
        )
        raise


def own_objects(result: Any, given: Given) -> Any:
    """The same for results that are arrays, where they are of Python objects."""
    if isinstance(result, np.ndarray):
        return own_memory(result, given) if result.dtype.hasobject else result
    if type(result) is tuple:
        return tuple(own_objects(value, given) for value in result)
    return result


def _copy_by_pickle(result: object) -> object:
    """A copy as processes would send it, of what `copy` leaves as it is: functions."""
    from taskcarrier.workers.pickling import pickle_items, unpickle_items  # noqa: PLC0415  # loads joblib

    return unpickle_items(pickle_items(result))


def _holds_a_view(result: object, given: Given) -> bool:
    """Whether an object refers to memory of `given`, at any distance."""
    seen: set[int] = set()
    found = [result]
    while found:
        one = found.pop()
        if isinstance(one, _ATOMS) or id(one) in seen:
            continue
        if isinstance(one, np.ndarray) and _is_a_view(one, given):
            return True
        seen.add(id(one))
        found += _referents(one)
    return False


def _is_a_view(array: np.ndarray, given: Given) -> bool:
    return not array.flags.writeable and any(np.may_share_memory(array, one) for one in given)


def _referents(value: object) -> list[Any]:
    """What an object refers to, but not the modules that functions are of."""
    for kind, refers_to in _REFERENTS.items():
        if isinstance(value, kind):
            return refers_to(value)
    return gc.get_referents(value)


def _array_referents(array: np.ndarray) -> list[Any]:
    elements = array.ravel().tolist() if array.dtype.hasobject else []
    return [*elements, *getattr(array, "__dict__", {}).values()]


def _iterator_referents(iterator: np.nditer) -> list[Any]:
    try:
        return list(iterator.operands)
    except ValueError:  # it is closed
        return []


# Kinds of which the garbage collector says too much, or, of NumPy's, nothing.
_REFERENTS: dict[type, Callable[[Any], list[Any]]] = {
    FunctionType: lambda f: [f.__closure__, f.__defaults__, f.__kwdefaults__, f.__dict__],
    MethodType: lambda method: [method.__func__, method.__self__],
    BuiltinFunctionType: lambda method: [method.__self__],
    memoryview: lambda view: [view.obj],
    np.ndarray: _array_referents,
    np.flatiter: lambda iterator: [iterator.base],
    np.broadcast: lambda broadcast: list(broadcast.iters),
    np.nditer: _iterator_referents,
}

"""The user's function as it was before the caller called it.

A function may change what it carries: a closure counts its calls, or draws from a generator. The
caller begins a run itself; workers that go on with the rest must not see what its calls have
changed, or the result would depend on how far the caller came. So a function that may carry such
state is pickled before it is called. Its large arrays are not copied: what a function writes to
them is seen by workers.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from taskcarrier.workers.call import Call
from taskcarrier.workers.introspect import is_jitted, is_numba_ufunc

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis)),
    *(np.dtype, np.generic, np.ufunc),
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, type),
)
_COLLECTIONS = (tuple, frozenset)


def may_carry_state(func: Callable[..., Any]) -> bool:
    """Return whether calls of a function may change what would be pickled with it.

    They cannot for functions that are pickled by name, and for others if all values that they refer
    to are constants.
    """
    seen: set[int] = set()
    candidates: list[Any] = [func]
    while candidates:
        value = candidates.pop()
        if id(value) in seen or isinstance(value, _CONSTANTS) or is_jitted(value):
            continue
        seen.add(id(value))
        if isinstance(value, _COLLECTIONS):
            candidates += value
        elif isinstance(value, functools.partial):
            candidates += [value.func, *value.args, *value.keywords.values()]
            if vars(value):
                return True
        elif isinstance(value, types.FunctionType):
            if not _is_pickled_by_name(value):
                if vars(value):
                    return True
                candidates += _list_referents(value)
        elif not is_numba_ufunc(value):
            return True
    return False


def _is_pickled_by_name(func: types.FunctionType) -> bool:
    """Return whether a worker imports the function."""
    module = sys.modules.get(func.__module__ or "")
    if module is None or func.__module__ in {"__main__", "__mp_main__"}:
        return False
    found: Any = module
    for name in func.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is func


def _list_referents(func: types.FunctionType) -> list[Any]:
    """Return what is pickled with a function that is pickled by value."""
    values: list[Any] = [*(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values()]
    codes = [func.__code__]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        values += [func.__globals__[name] for name in code.co_names if name in func.__globals__]
    for cell in func.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # it is not bound yet: the function binds it
            values.append(cell)
    return values


class Snapshot:
    """A call as it was when this was made, if its function may carry state.

    If it cannot be pickled, `restore` raises the error.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._packed: tuple[bytes, list[memoryview]] | None = None
        self._error: Exception | None = None
        if may_carry_state(call.func):
            from taskcarrier.workers.pickling import pickle_items  # noqa: PLC0415  # slow to import

            beside: list[memoryview] = []
            try:
                self._packed = pickle_items(call.func, beside), beside
            except Exception as error:  # noqa: BLE001  # raised where the pickle is needed
                self._error = error

    def restore(self) -> Call:
        """Return the call as it was."""
        if self._error is not None:
            raise self._error
        if self._packed is None:
            return self._call
        from taskcarrier.workers.pickling import unpickle_items  # noqa: PLC0415  # slow to import

        return Call(unpickle_items(*self._packed), self._call.args, self._call.kwargs)

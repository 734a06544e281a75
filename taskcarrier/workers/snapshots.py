"""The user's function as it was before the caller called it.

A function may change what it carries: a closure counts its calls, or draws from a generator. The
caller begins a run itself; workers that go on with the rest must not see what its calls have
changed, or the result would depend on how far the caller came. So a function that may carry such
state is pickled before it is called. Numeric arrays in it are only copied, which is a hundred times
faster. Large arrays, and those in shared memory, are not: what a function writes to them is seen by
workers.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from opcode import opmap
from typing import TYPE_CHECKING, Any

import numpy as np

from taskcarrier.memory.memmaps import find_writable
from taskcarrier.memory.staging import SHARED_NBYTES, Staging
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call
from taskcarrier.workers.introspect import is_jitted, is_numba_ufunc

if TYPE_CHECKING:
    from taskcarrier.workers.pickling import TaskPickler  # slow to import

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis)),
    *(np.dtype, np.generic, np.ufunc),
    types.MethodDescriptorType,
)
_COLLECTIONS = (tuple, frozenset)
# Instructions by which a function changes names and attributes that outlast its call.
_REBINDING = {
    opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR")
}
_REBINDING_ENCLOSED = {opmap[name] for name in ("STORE_DEREF", "DELETE_DEREF")}
# Each worker has a cache of its own (`taskcarrier.workers.pickled_functions`).
_CACHED = type(functools.lru_cache(len))
# Types of functions that are pickled by name if they can be: NumPy has one of its own, and so has
# what Cython compiles.
_NAMED = (types.FunctionType, _CACHED, type(np.copy))
_COMPILED = {"cython_function_or_method", "fused_cython_function"}


def find_state(call: Call) -> list[np.ndarray] | None:
    """Return the small arrays that calls of a function may change; None if it carries other state.

    A function carries no state if it is pickled by name, or if all values that it refers to are
    constants. Arrays among the arguments are not listed: functions cannot change them.
    """
    arguments = (*call.args, *call.kwargs.values())
    candidates = [call.func, *(value for value in arguments if not _is_plain_array(value))]
    seen: set[int] = set()
    arrays: list[np.ndarray] = []
    while candidates:
        value = candidates.pop()
        if id(value) in seen or isinstance(value, _CONSTANTS):
            continue
        seen.add(id(value))
        if _is_plain_array(value):
            if value.nbytes < SHARED_NBYTES and find_writable(value) is None:
                arrays.append(value)
            continue
        referents = _list_referents(value)
        if referents is None:
            return None
        candidates += referents
    return arrays


def _is_plain_array(value: Any) -> bool:
    return type(value) is np.ndarray and not value.dtype.hasobject


def _list_referents(value: Any) -> Iterable[Any] | None:
    """Return what is pickled with a value; None if it can itself be changed."""
    referents: Iterable[Any] | None = None
    is_by_name = isinstance(value, _NAMED) or type(value).__name__ in _COMPILED
    if isinstance(value, _COLLECTIONS):
        referents = value
    elif isinstance(value, types.BuiltinFunctionType):
        referents = (value.__self__,)  # a module, or the object whose method it is
    elif isinstance(value, functools.partial):
        if not vars(value):
            referents = value.func, *value.args, *value.keywords.values()
    elif is_jitted(value) or is_numba_ufunc(value) or (is_by_name and _is_pickled_by_name(value)):
        referents = ()
    elif isinstance(value, _CACHED):
        referents = (value.__wrapped__,)
    elif isinstance(value, types.FunctionType) and not vars(value):
        referents = _list_values_of(value)
    elif isinstance(value, types.ModuleType):
        referents = () if sys.modules.get(value.__name__) is value else None
    elif isinstance(value, type) and _is_pickled_by_name(value):
        referents = ()
    return referents


def _is_pickled_by_name(func: Any) -> bool:
    """Return whether a worker imports the function."""
    module = sys.modules.get(func.__module__ or "")
    if module is None or func.__module__ in {"__main__", "__mp_main__"}:
        return False
    found: Any = module
    for name in func.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is func


def _list_values_of(func: types.FunctionType) -> list[Any] | None:
    """Return what is pickled with a function that is pickled by value.

    None if its code gives names or attributes beyond the call other values.
    """
    values: list[Any] = [*(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values()]
    codes = [func.__code__]
    while codes:
        code = codes.pop()
        # The instructions without their arguments. The second set only rebinds names of this call,
        # unless there are enclosing ones.
        instructions = code.co_code[::2]
        if not _REBINDING.isdisjoint(instructions) or (
            code.co_freevars and not _REBINDING_ENCLOSED.isdisjoint(instructions)
        ):
            return None
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        values += [func.__globals__[name] for name in code.co_names if name in func.__globals__]
    for cell in func.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # it is not bound yet: the function binds it
            values.append(cell)
    return values


class Snapshot:
    """What calls of a function may change, as it was before.

    Parameters
    ----------
    call : Call
        The call of the user's function.
    make_sent : callable
        Returns the call as it is sent to workers.
    staging : Staging
        Where copies for the workers go; likewise an attribute.
    """

    def __init__(self, call: Call, make_sent: Callable[[], Call], staging: Staging) -> None:
        self.staging = staging
        self._pickler: TaskPickler | None = None
        self._error: Exception | None = None
        state = find_state(call)
        self._copies = {}
        if state is None:
            self._pickle(make_sent)
        else:
            self._copies = {id(array): (array, array.copy(order="K")) for array in state}

    def _pickle(self, make_sent: Callable[[], Call]) -> None:
        from taskcarrier.workers.pickling import TaskPickler  # noqa: PLC0415  # slow to import

        self._pickler = TaskPickler(self.staging)
        try:
            self._pickler.pickle_early(make_sent())
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self._error = error

    def get_pickler(self) -> TaskPickler:
        """Return a pickler for the task that pickles the call as it was.

        If the call cannot be pickled, raise the error.
        """
        from taskcarrier.workers.pickling import TaskPickler  # noqa: PLC0415  # slow to import

        if self._error is not None:
            raise self._error
        copies = {key: copy for key, (_, copy) in self._copies.items()}
        return self._pickler or TaskPickler(self.staging, copies)

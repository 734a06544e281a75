"""What is known of a user's function without calling it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any


def is_jitted(func: Callable[..., Any]) -> bool:
    """Whether a function is one that numba compiles for the CPU, not in object mode."""
    registry: Any = sys.modules.get("numba.core.registry")  # no kernel without it
    return (
        registry is not None
        and isinstance(func, registry.CPUDispatcher)
        and not func.targetoptions.get("forceobj", False)
    )


def has_own_threads(func: Callable[..., Any], extras: Iterable[Any] = ()) -> bool:
    """Whether a function is known to start threads of numba's own (``parallel=True``).

    It, a jitted function that it refers to (by name, in a tuple, in a module, as a default), or
    one among its arguments. What a Python function calls inside, and ufuncs compiled with
    ``target="parallel"``, cannot be seen.
    """
    seen: list[Any] = []
    found = [func, *extras]
    while found:
        one = found.pop()
        if isinstance(one, tuple):
            found += one
        elif is_jitted(one) and not any(one is other for other in seen):
            if one.targetoptions.get("parallel", False):
                return True
            seen.append(one)
            found += _list_referents(one.py_func)
    return False


def _list_referents(function: Any) -> Iterator[Any]:
    """Values of global and enclosing names in a Python function, of modules there; defaults."""
    yield from function.__defaults__ or ()
    names = function.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        yield value
        if isinstance(value, ModuleType):
            yield from (vars(value).get(attribute) for attribute in names)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not bound yet
            yield cell.cell_contents


def is_numba_ufunc(func: Callable[..., Any]) -> bool:
    """Whether a function of numba's ``vectorize`` or ``guvectorize`` is compiled when called."""
    for module, name in (
        ("numba.np.ufunc.dufunc", "DUFunc"),
        ("numba.np.ufunc.gufunc", "GUFunc"),
    ):
        found: Any = sys.modules.get(module)
        if found is not None and isinstance(func, getattr(found, name)):
            return True
    return False


def releases_gil(func: Callable[..., Any]) -> bool:
    """Whether a function is known to run without the interpreter's lock.

    True for ufuncs with loops over something else than Python objects, and for whatever numba
    has compiled but in object mode: what was compiled without ``nogil`` is called from a function
    of ours that was (`taskcarrier.arrays.kernels.compiler`). What a Python function calls inside cannot be
    seen.
    """
    numpy: Any = sys.modules.get("numpy")
    if isinstance(func, numpy.ufunc):
        return any("O" not in loop for loop in func.types)
    return is_jitted(func) or is_numba_ufunc(func)

"""What can be known of a user's function or class without calling it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any


def is_jitted(func: Callable[..., Any]) -> bool:
    """Return whether numba compiles a function for the CPU, and not in object mode."""
    registry: Any = sys.modules.get("numba.core.registry")  # without it there is no kernel
    return (
        registry is not None
        and isinstance(func, registry.CPUDispatcher)
        and not func.targetoptions.get("forceobj", False)
    )


def has_own_threads(func: Callable[..., Any], extras: Iterable[Any] = ()) -> bool:
    """Return whether a function is known to start threads of numba's own (``parallel=True``).

    That is so if the function itself, a jitted function that it refers to (by name, in a tuple, in
    a module, as a default), or one among its arguments `extras` does so. What a Python function
    calls inside cannot be seen, nor can ufuncs compiled with ``target="parallel"``.
    """
    seen: list[Any] = []
    candidates = [func, *extras]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, tuple):
            candidates += candidate
        elif is_jitted(candidate) and not any(candidate is other for other in seen):
            if candidate.targetoptions.get("parallel", False):
                return True
            seen.append(candidate)
            candidates += _iterate_referents(candidate.py_func)
    return False


def _iterate_referents(function: Any) -> Iterator[Any]:
    """Yield a Python function's defaults, and its global and enclosing values, also in modules."""
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
    """Return whether numba's ``vectorize`` or ``guvectorize`` compiles a function when called."""
    for module, name in (
        ("numba.np.ufunc.dufunc", "DUFunc"),
        ("numba.np.ufunc.gufunc", "GUFunc"),
    ):
        ufunc_module: Any = sys.modules.get(module)
        if ufunc_module is not None and isinstance(func, getattr(ufunc_module, name)):
            return True
    return False


def releases_gil(func: Callable[..., Any]) -> bool:
    """Return whether a function is known to run without the interpreter's lock.

    This is true for ufuncs with a loop over something other than Python objects, and for functions
    that numba compiles, except in object mode: those compiled without ``nogil`` are called from a
    function of ours that has it (`taskcarrier.arrays.kernels.compiler`), but for rare kinds, which
    the report names. What a Python function calls inside cannot be seen.
    """
    numpy: Any = sys.modules.get("numpy")
    if isinstance(func, numpy.ufunc):
        return any("O" not in loop for loop in func.types)
    return is_jitted(func) or is_numba_ufunc(func)


def is_made_at_run_time(kind: type) -> bool:
    """Return whether a class was made by a running program, and not in C with its module."""
    return bool(kind.__flags__ & _HEAP_TYPE)


_HEAP_TYPE = 1 << 9  # the interpreter's flag for such classes

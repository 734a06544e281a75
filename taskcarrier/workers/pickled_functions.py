"""Pickling by value of what `functools` makes of functions, where cloudpickle fails.

Python pickles a cached function by its name, which a worker cannot find if the function is one of
``__main__`` or is defined in another function or class. A generic function holds weak references,
and in Python 3.11 a cached property holds a lock. Here each is sent as the parts that it was made
of. Cached values are not sent: each worker has its own cache.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

_CACHED_TYPE = type(functools.lru_cache(lambda: None))
_sample: Any = functools.singledispatch(lambda value: value)
_GENERIC_CODE, _DISPATCH_CODE = _sample.__code__, _sample.dispatch.__code__
# Attributes that `functools` itself sets on them.
_OWN_ATTRIBUTES = {
    "__wrapped__",
    "cache_parameters",
    "registry",
    "dispatch",
    "register",
    "_clear_cache",
}


def reduce_cached(obj: Any) -> Any:
    """Reduce a cached function or property, or a generic method.

    Return `NotImplemented` for anything else.
    """
    kind = type(obj)
    if kind is functools.cached_property:
        return (
            kind,
            (obj.func,),
            {name: value for name, value in vars(obj).items() if name != "lock"},
        )
    if kind is functools.singledispatchmethod:
        return kind, (obj.func,), (dict(obj.dispatcher.registry), {}), None, None, _register
    if kind is not _CACHED_TYPE or _is_importable(obj) or not hasattr(obj, "cache_parameters"):
        return NotImplemented
    return _make_cached, (obj.__wrapped__, obj.cache_parameters()), _get_extras(obj)


def reduce_dispatching(obj: Any) -> tuple[Any, ...] | None:
    """Reduce a generic function that a worker cannot find by name; return None for anything else.

    A bound generic method holds only `dispatch`, the part that finds the implementation.
    """
    if type(obj) is not FunctionType:
        return None
    func: Any = obj
    if func.__code__ is _GENERIC_CODE:
        # Implementations may call the function, so they are registered once it is there.
        state = (dict(func.registry), _get_extras(func))
        return functools.singledispatch, (func.__wrapped__,), state, None, None, _register
    if func.__code__ is _DISPATCH_CODE:
        place = _DISPATCH_CODE.co_freevars.index("registry")
        return _make_dispatch, (dict(func.__closure__[place].cell_contents),)
    return None


def _make_cached(func: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(func)


def _make_dispatch(implementations: dict[type, Any]) -> Any:
    func = functools.singledispatch(implementations[object])
    _register(func, (implementations, {}))
    return func.dispatch


def _register(func: Any, state: tuple[dict[type, Any], dict[str, Any]]) -> None:
    implementations, extras = state
    for kind, implementation in implementations.items():
        func.register(kind, implementation)
    vars(func).update(extras)


def _get_extras(func: Any) -> dict[str, Any]:
    """Return the attributes that the user has set on a function."""
    return {name: value for name, value in vars(func).items() if name not in _OWN_ATTRIBUTES}


def _is_importable(obj: Any) -> bool:
    """Return whether a worker can find the object by its name."""
    named: Any = sys.modules.get(obj.__module__)
    if named is None or obj.__module__ in {"__main__", "__mp_main__"}:
        return False
    for name in obj.__qualname__.split("."):
        named = getattr(named, name, None)
    return named is obj

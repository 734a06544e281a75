"""What `functools` makes of functions, pickled by value where cloudpickle would not.

Python pickles a cached function by its name, which is no name in a worker if the function is one of
``__main__`` or stands in another function or class; a generic function holds weak references, and
in Python 3.11 a cached property holds a lock. Here each goes as what it was made of. What was
cached stays behind: each worker has a cache of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

_CACHED = type(functools.lru_cache(lambda: None))
_sample: Any = functools.singledispatch(lambda one: one)
_GENERIC, _DISPATCH = _sample.__code__, _sample.dispatch.__code__
# What `functools` itself sets on them.
_OWN = {"__wrapped__", "cache_parameters", "registry", "dispatch", "register", "_clear_cache"}


def reduce_cached(obj: Any) -> Any:
    """How a cached function or property, or a generic method, is pickled.

    `NotImplemented` for all else.
    """
    kind = type(obj)
    if kind is functools.cached_property:
        return kind, (obj.func,), {name: one for name, one in vars(obj).items() if name != "lock"}
    if kind is functools.singledispatchmethod:
        return kind, (obj.func,), (dict(obj.dispatcher.registry), {}), None, None, _register
    if kind is not _CACHED or _is_importable(obj) or not hasattr(obj, "cache_parameters"):
        return NotImplemented
    return _make_cached, (obj.__wrapped__, obj.cache_parameters()), _extras(obj)


def reduce_dispatching(obj: Any) -> tuple[Any, ...] | None:
    """How a generic function is pickled that has no name in a worker; None for all else.

    A generic method that is bound holds the part of one that finds the implementation.
    """
    if type(obj) is not FunctionType:
        return None
    func: Any = obj
    if func.__code__ is _GENERIC:
        # Implementations may call it: so they come when it is there.
        state = (dict(func.registry), _extras(func))
        return functools.singledispatch, (func.__wrapped__,), state, None, None, _register
    if func.__code__ is _DISPATCH:
        place = _DISPATCH.co_freevars.index("registry")
        return _dispatch, (dict(func.__closure__[place].cell_contents),)
    return None


def _make_cached(func: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(func)


def _dispatch(implementations: dict[type, Any]) -> Any:
    func = functools.singledispatch(implementations[object])
    _register(func, (implementations, {}))
    return func.dispatch


def _register(func: Any, state: tuple[dict[type, Any], dict[str, Any]]) -> None:
    implementations, extras = state
    for kind, implementation in implementations.items():
        func.register(kind, implementation)
    vars(func).update(extras)


def _extras(func: Any) -> dict[str, Any]:
    """What the user has set on it."""
    return {name: one for name, one in vars(func).items() if name not in _OWN}


def _is_importable(obj: Any) -> bool:
    """Whether a worker finds it by its name."""
    found: Any = sys.modules.get(obj.__module__)
    if found is None or obj.__module__ in {"__main__", "__mp_main__"}:
        return False
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj

"""What decides what an object or a class does: attributes, members, and what pickle would send.

What Python and some packages add by themselves, or keep as a cache, is left out.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import pickle
import re
import sys
from types import FunctionType, MethodType
from typing import Any

import numpy as np

from taskcarrier.arrays.resume.attributes import get_attributes, get_package
from taskcarrier.arrays.resume.installed import is_installed, is_reachable, qualify

# The attributes that decide what an object does, for types of which pickle sends less or nothing.
DECIDING_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    functools.singledispatchmethod: ("dispatcher", "func"),
    type(functools.cache(len)): ("__wrapped__",),
    np.vectorize: ("pyfunc", "otypes", "excluded", "signature"),  # it also caches results
    MethodType: ("__func__", "__self__"),
    property: ("fget", "fset", "fdel"),
    slice: ("start", "stop", "step"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}


def get_deciding_attributes(value: Any) -> dict[str, Any]:
    """Return those of an object of a type in `DECIDING_ATTRIBUTES`, and its other attributes."""
    parts = next(
        names for kind, names in DECIDING_ATTRIBUTES.items() if issubclass(type(value), kind)
    )
    others = {k: v for k, v in get_attributes(value).items() if k not in {"lock", "_ufunc"}}
    return {**others, **{part: getattr(value, part) for part in parts}}


# Members that Python gives to every class; some of them differ from one process to the next.
_STANDARD_CLASS_MEMBERS = {
    "__abstractmethods__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__classdictcell__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__static_attributes__",
    "__type_params__",
    "__weakref__",
    "_abc_impl",
}
# Members of enumeration classes that Python adds to those in the source.
_ENUM_INTERNALS = re.compile("_[^_].*_$")


def get_class_members(kind: type) -> dict[str, Any]:
    """Return the members of a class that decide what it does; of enumerations, with their order."""
    members = {
        key: value for key, value in vars(kind).items() if key not in _STANDARD_CLASS_MEMBERS
    }
    if issubclass(kind, enum.Enum):
        own_names = {*kind.__members__, *(k for k in members if _ENUM_INTERNALS.match(k))}
        callables = (FunctionType, classmethod, staticmethod)
        members = {
            key: value
            for key, value in members.items()
            if key not in own_names or isinstance(value, callables)
        }
        members["members in order"] = [
            (key, get_member_attributes(member)) for key, member in kind.__members__.items()
        ]
    return members


def get_member_attributes(member: enum.Enum) -> dict[str, Any]:
    """Return the attributes of an enumeration member, except its class and position."""
    members = {**get_attributes(member), "_name_": member.name, "_value_": member.value}
    members = {k: v for k, v in members.items() if k not in {"__objclass__", "_sort_order_"}}
    return {k: v for k, v in members.items() if not is_cached(type(member), k, v)}


def is_cached(kind: type, name: str, value: object) -> bool:
    """Return whether an attribute is a cache of what its object has computed about itself."""
    pattern = _CACHE_NAMES.get(get_package(kind))
    if pattern is not None and pattern.fullmatch(name):
        return get_package(kind) != "xarray" or not value
    return any(type(vars(base).get(name)) is functools.cached_property for base in kind.__mro__)


# Attributes that objects of a package set on first use. Those of xarray are None at first, then an
# empty dict.
_CACHE_NAMES = {
    "pandas": re.compile("_cache"),
    "scipy": re.compile("_has_.*|has_.*"),
    "xarray": re.compile("_attrs|_encoding|_cache"),
}


def is_pandas_cache(value: object) -> bool:
    """Return whether a part of the state of a pandas array holds its cache alone."""
    return isinstance(value, dict) and value.keys() <= {"_cache"}


def reduce_object(value: Any) -> Any:
    """Return what pickle would make of an object: a name, or a tuple that says how to make it."""
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
    if not isinstance(reduced, str):
        return reduced
    module = getattr(value, "__module__", None)
    if module is None:  # ufuncs of packages give only their name
        modules = list(sys.modules.values())
        if not any(get_attributes(candidate).get(reduced) is value for candidate in modules):
            raise pickle.PicklingError(f"{reduced} is the name of nothing")
        return reduced
    if not is_installed(module) or not is_reachable(value, module, reduced):
        raise pickle.PicklingError(f"{module}.{reduced} may be another one in another program")
    return qualify(module, reduced)

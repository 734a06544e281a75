"""Attributes of any object, read without running code of its class."""

from __future__ import annotations

from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any


def get_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes in an object's ``__dict__``, even if its class overrides access."""
    try:
        return dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def get_nested(value: Any, path: str) -> Any:
    """Return an attribute at a dotted path, or None; no ``__getattr__`` is called."""
    for name in path.split("."):
        attribute = get_attributes(value).get(name)
        if attribute is None:
            attribute = getattr(type(value), name, None)
            if isinstance(attribute, (property, MemberDescriptorType, GetSetDescriptorType)):
                attribute = attribute.__get__(value)
        value = attribute
    return value


def get_module_name(kind: type) -> str:
    """Return the module of a class; for some classes in C it is not a string."""
    module: object = kind.__module__
    return module if isinstance(module, str) else "builtins"


def get_package(kind: type) -> str:
    """Return the package that a class belongs to."""
    return get_module_name(kind).partition(".")[0]

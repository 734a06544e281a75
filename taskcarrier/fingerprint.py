"""What decides the values of a run, as a few words that can be kept and compared.

A run that goes on where an earlier one has ended must compute the same. Fingerprints tell whether
it does, as far as that can be told from outside:

- functions by their code (all of it, nested functions too), their defaults, what they have
  enclosed, and the numbers, texts, arrays, containers and functions of the same module among the
  global names that they use;
- numbers, texts, arrays and containers of these by content;
- objects of classes written in Python by their attributes, and by the class's own attributes and
  methods, those of its bases too;
- anything else by its type alone, under its name: it is listed among what was `not looked into`.

Functions of other modules, and classes that are called, are not covered. Bytecode differs between
versions of Python, so another version is another function. Nothing depends on hash randomisation
or on addresses.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

_DIGEST_NBYTES = 16
# An array that is no single piece of memory is looked at in pieces of about this many bytes.
_PIECE_NBYTES = 1 << 24


_CONTAINERS = (tuple, list, dict, set, frozenset)
_MADE_OF: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    MethodType: ("__func__", "__self__"),
}


class Fingerprint:
    """Digests of values, and the names of what could only be told by its type."""

    def __init__(self) -> None:
        self.not_looked_into: list[str] = []
        self._within: list[int] = []  # what is being looked at, for what refers to itself

    def of(self, value: Any, name: str) -> str:
        """The digest of a value, in hexadecimal digits; `name` is what to call it."""
        return self._digest(value, name).hex()

    def _digest(self, value: Any, name: str) -> bytes:
        if id(value) in self._within:
            return _joined("again", str(self._within.index(id(value))).encode())
        self._within.append(id(value))
        try:
            return (
                self._plain(value)
                or self._container(value, name)
                or self._callable(value, name)
                or self._instance(value, name)
                or self._by_type(value, name)
            )
        finally:
            self._within.pop()

    def _plain(self, value: Any) -> bytes | None:
        """Of a value that is its own content."""
        kind = type(value)
        if value is None or value is ... or kind in {bool, int, str, range, slice}:
            return _joined(kind.__name__, repr(value).encode("utf-8", "surrogatepass"))
        if kind in {float, complex}:
            return _joined(kind.__name__, struct.pack("<dd", value.real, value.imag))
        if kind in {bytes, bytearray}:
            return _joined(kind.__name__, bytes(value))
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return _joined("scalar", repr(value.dtype).encode(), value.tobytes())
        named = _name_of(value)
        return None if named is None else _joined(kind.__name__, named.encode())

    def _container(self, value: Any, name: str) -> bytes | None:
        kind = type(value)
        if isinstance(value, np.ndarray):
            return self._array(value, name)
        if kind in {tuple, list}:
            return _joined(kind.__name__, *self._all(value, name))
        if kind in {set, frozenset}:  # in an order that does not depend on hashes
            return _joined(kind.__name__, *sorted(self._digest(one, name) for one in value))
        if kind is dict:
            pairs = (
                self._digest(key, name) + self._digest(one, f"{name}{self._place(key)}")
                for key, one in value.items()
            )
            return _joined("dict", *sorted(pairs))
        return None

    def _place(self, key: Any) -> str:
        """What to call the value of a key; the same whatever the addresses of keys are."""
        return f"[{key!r}]" if self._plain(key) is not None else "[...]"

    def _array(self, value: np.ndarray, name: str) -> bytes:
        plain = np.asarray(value)
        if plain.dtype.hasobject:
            own = _joined("objects", repr(value.shape).encode(), *self._all(plain.flat, name))
        else:
            own = array_digest(plain)
        if type(value) in {np.ndarray, np.memmap}:
            return own
        # A subclass may have a mask or a unit beside its values.
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return _joined(kind, own, *self._members(_state_of(value), name))

    def _all(self, values: Iterable[Any], name: str) -> list[bytes]:
        return [self._digest(one, f"{name}[{at}]") for at, one in enumerate(values)]

    def _callable(self, value: Any, name: str) -> bytes | None:
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, FunctionType):
            return self._function(value, name)
        for kind, parts in _MADE_OF.items():
            if isinstance(value, kind):
                members = {part: getattr(value, part) for part in parts}
                return _joined(kind.__name__, *self._members(members, name))
        if isinstance(getattr(value, "py_func", None), FunctionType):  # compiled by numba
            options = vars(value).get("targetoptions", {})
            return _joined("compiled", *self._members({"func": value.py_func, "": options}, name))
        if isinstance(value, BuiltinFunctionType):
            own = self._members({"__self__": value.__self__}, name)
            return _joined("builtin", value.__qualname__.encode(), *own)
        return None

    def _members(self, parts: Mapping[str, Any], name: str) -> list[bytes]:
        return [self._digest(value, f"{name}.{part}") for part, value in parts.items()]

    def _function(self, function: FunctionType, name: str) -> bytes:
        own = self._code(function.__code__)
        enclosed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        values: dict[str, Any] = {
            "defaults": function.__defaults__,
            "kwdefaults": function.__kwdefaults__,
        }
        for variable, cell in enclosed:
            try:
                values[variable] = cell.cell_contents
            except ValueError:  # not bound yet
                values[variable] = None
        used = _global_names(function.__code__) & function.__globals__.keys()
        found = []
        for variable in sorted(used):
            value = function.__globals__[variable]
            of_this_file = getattr(value, "__module__", None) == function.__module__
            if (
                isinstance(value, (np.ndarray, *_CONTAINERS))
                or self._plain(value) is not None
                or (of_this_file and isinstance(getattr(value, "py_func", value), FunctionType))
            ):
                found.append(variable.encode())
                found.append(self._digest(value, f"{name}: global {variable}"))
        return _joined("function", own, *self._members(values, name), *found)

    def _code(self, code: CodeType) -> bytes:
        facts = (
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            code.co_flags,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_cellvars,
        )
        constants = [self._digest(one, "constant") for one in code.co_consts]
        bytecode = (code.co_code, code.co_exceptiontable)
        return _joined("code", repr(facts).encode(), *bytecode, *constants)

    def _instance(self, value: Any, name: str) -> bytes | None:
        """Of an object whose class, and whose state, can be looked into."""
        kind = type(value)
        if isinstance(value, os.PathLike):
            return _joined("path", os.fsencode(value))
        if not _is_pure(kind):
            return None
        own = self._members(_state_of(value), name)
        behaviour = []
        for base in kind.__mro__[:-1]:  # without `object`
            behaviour.append(f"{base.__module__}.{base.__qualname__}".encode())
            for attribute in sorted(vars(base).keys() - _OF_EVERY_CLASS):
                member = vars(base)[attribute]
                member = getattr(member, "__func__", member)  # of static and class methods
                if isinstance(member, FunctionType) or self._plain(member) is not None:
                    behaviour.append(attribute.encode())
                    behaviour.append(self._digest(member, f"{name}.{attribute}"))
        return _joined("object", *own, *behaviour)

    def _by_type(self, value: Any, name: str) -> bytes:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        self.not_looked_into.append(f"{name} ({kind})")
        return _joined("type", kind.encode())


# What Python gives to every class; some of it differs from one program to the next.
_OF_EVERY_CLASS = {
    "__annotations__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__static_attributes__",
    "__weakref__",
}


_HEAP_TYPE = 1 << 9  # the interpreter's mark of classes that are made when a program runs


def _is_pure(kind: type) -> bool:
    """Whether a class and its bases, `object` apart, can be taken to be written in Python.

    Such classes are made when a program runs, their attributes have a dict or named places, and
    their objects have room for these and nothing else.
    """
    bases = kind.__mro__[:-1]
    n_places = sum(len(_slots_of(base)) for base in bases) + 2  # a dict, and weak references
    return (
        all(base.__flags__ & _HEAP_TYPE for base in bases)
        and any({"__dict__", "__slots__"} & vars(base).keys() for base in bases)
        and kind.__basicsize__ <= object.__basicsize__ + n_places * struct.calcsize("P")
    )


def _slots_of(kind: type) -> list[str]:
    named = vars(kind).get("__slots__", ())
    return [named] if isinstance(named, str) else list(named)


def _state_of(value: Any) -> dict[str, Any]:
    """Attributes of an object, also those that have places of their own; in a fixed order."""
    slots: set[str] = set()
    for base in type(value).__mro__:
        slots.update(_slots_of(base))
    state = {name: getattr(value, name) for name in slots - {"__dict__"} if hasattr(value, name)}
    return dict(sorted({**state, **getattr(value, "__dict__", {})}.items()))


def _name_of(value: Any) -> str | None:
    """What a value is called that is the same wherever it has that name; None for others."""
    if isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, np.ufunc):
        name = str(value.__name__)
        return name if getattr(np, name, None) is value else None
    if isinstance(value, type) or (
        isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, (type, ModuleType))
    ):
        return f"{value.__module__}.{value.__qualname__}"
    return None


def array_digest(array: np.ndarray) -> bytes:
    """Of an array's dtype, shape and values, however they lie."""
    if array.dtype.names is not None:  # field by field: what lies between them is no value
        fields = [name.encode() for name in array.dtype.names]
        values = [array_digest(array[name]) for name in array.dtype.names]
        return _joined("records", repr((array.dtype, array.shape)).encode(), *fields, *values)
    content = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    for piece in _pieces(array):
        content.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    facts = repr((array.dtype, array.shape)).encode()
    return _joined("array", facts, content.digest())


def _pieces(array: np.ndarray) -> Iterable[np.ndarray]:
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous or array.ndim == 0 or array.nbytes <= _PIECE_NBYTES:
        yield array
        return
    step = max(1, _PIECE_NBYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield from _pieces(array[start]) if step == 1 else (array[start : start + step],)


def _joined(kind: str, *parts: bytes) -> bytes:
    """A digest of parts that tells where one ends and the next begins."""
    content = hashlib.blake2b(kind.encode(), digest_size=_DIGEST_NBYTES)
    for part in parts:
        content.update(struct.pack("<Q", len(part)))
        content.update(part)
    return content.digest()


def _global_names(code: CodeType) -> set[str]:
    """Global names that a function, or one within it, reads."""
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names

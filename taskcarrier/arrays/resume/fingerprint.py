"""Digests of what decides the values of a run, to be stored and compared.

A run that continues an earlier one must compute the same. Fingerprints show whether it does, as far
as that can be seen from outside. They cover:

- numbers, strings, arrays and containers by content; dicts with their order, sets without;
- functions by their code (nested functions included), their defaults and attributes, the values in
  their closures, and every global name that they read (for a module of the program: the
  attributes that they read from it);
- classes of the program by their attributes and methods, including those of their bases;
- objects by their class and by what pickle would send of them (a mapper by its chunksize alone: the
  rest of it decides no values, and its report changes with each run);
- functions, classes and modules of installed packages by name, with the version of the package;
- anything else by its type alone; its name is added to `Fingerprint.not_looked_into`.

Modules of the program that a function imports are imported here if they are not imported yet.

What a function finds in other ways is not covered: attributes that were set on installed packages,
``globals()["name"]``, annotations and docstrings, a value that was set in place of the one that a
`functools.cached_property` has computed, and what was registered elsewhere (`numba.extending`).

Bytecode differs between versions of Python, so in another version a function has another digest.
Nothing depends on hash randomisation, on addresses or on the depth of the caller's stack.

Each object is visited once. When it is met again, its stored digest is used if that covers all of
the object. Otherwise (within a cycle) it is identified by how many objects ago it was first met. So
the work is proportional to the number of objects.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import os
import pathlib
import pickle
import re
import struct
import sys
import sysconfig
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np

from taskcarrier.memory.memmaps import find_writable
from taskcarrier.system.interrupts import is_raised_by_handler

_DIGEST_NBYTES = 16
# An array that is not contiguous is digested in pieces of about this many bytes.
_PIECE_NBYTES = 1 << 24

_Steps = Generator[tuple[Any, str], bytes, bytes]
"""The visit of a value: yields each part with its name, is sent its digest, returns a digest."""

# `repr` gives the whole value of these types. Quotes distinguish strings from numbers.
_SIMPLE_TYPES = {bool, bytes, complex, float, int, str, type(None), type(...)}

# The attributes that decide what an object does, for types of which pickle sends less or nothing.
_DECIDING_ATTRIBUTES: dict[type, tuple[str, ...]] = {
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
_SINGLEDISPATCH_CODE = functools.singledispatch(len).__code__  # type: ignore[attr-defined]  # a function
# Where objects of numba keep the Python function that they were made from.
_PATHS_TO_PY_FUNC = ("py_func", "_pyfunc", "_dispatcher.py_func", "gufunc_builder.py_func")
_DESCRIPTORS = (
    ClassMethodDescriptorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)
# Packages whose arrays lie elsewhere: pickle sends only the place.
_STORAGE_PACKAGES = {"h5py", "netCDF4", "tensorstore", "zarr"}


@dataclass(eq=False)
class _Visit:
    """The visit of one object, not finished yet.

    Attributes
    ----------
    steps : generator
        The generator that visits the object.
    value : object
        The object.
    number : int
        The number of objects that were met before this one.
    lowest : int
        The lowest `number` of an object that is referred to from within this one.
    """

    steps: _Steps
    value: object
    number: int
    lowest: int


class Fingerprint:
    """Digests of values, with a memory of the objects that were met.

    Attributes
    ----------
    not_looked_into : dict of str to None
        Names of values that are compared by type alone, in the order in which they were met.
    takes_writes : list of str
        Names of arrays to which a function may write so that the caller sees it.
    """

    def __init__(self) -> None:
        self.not_looked_into: dict[str, None] = {}
        self.takes_writes: list[str] = []
        self._is_at_function = False
        # By the address of each object that was met: its number, and, if the digest covers all of
        # the object, the digest and the number of objects met within. The objects are kept alive,
        # so that no other object gets the same address.
        self._numbers: dict[int, int] = {}
        self._digests: dict[int, tuple[bytes, int]] = {}
        self._kept: list[object] = []
        self._n_met = 0

    def of(self, value: Any, name: str) -> str:
        """Return the digest of a value in hexadecimal; `name` stands for the value in messages."""
        return self._walk(value, name).hex()

    def of_function(self, value: Any, name: str) -> dict[str, str]:
        """Return the digests of the parts of a function, by name; of other values, one digest."""
        self._is_at_function = True
        try:
            if type(value) is not FunctionType or is_installed(_get_function_module(value)):
                return {name: self.of(value, name)}
            digests = {name: self._walk(value.__code__, name).hex()}
            for label, part in _get_parts(value).items():
                # Digest each part separately: a part that differs must not change the others.
                self._n_met, self._numbers = 1, {id(value): 0}
                digests[_name_member(name, label)] = self.of(part, _name_member(name, label))
            return digests
        finally:
            self._is_at_function = False

    # Walking through values

    def _walk(self, value: Any, name: str) -> bytes:
        """Return the digest of a value, with a list as stack: values may nest deeper than calls."""
        visits: list[_Visit] = []
        answer = self._digest_if_known(value, name, visits)
        while visits:
            visit = visits[-1]
            try:
                part, part_name = visit.steps.send(answer)  # type: ignore[arg-type]  # None begins it
            except StopIteration as done:
                visits.pop()
                answer = done.value
                self._finish_visit(visit, done.value, visits[-1] if visits else None)
            else:
                answer = self._digest_if_known(part, part_name, visits)
        assert answer is not None  # for the type checker
        return answer

    def _digest_if_known(self, value: Any, name: str, visits: list[_Visit]) -> bytes | None:
        """Return the digest of a plain or known value; else begin a visit and return None."""
        plain = _digest_if_plain(value)
        if plain is not None:
            return plain
        if id(value) in self._digests:
            digest, n_within = self._digests[id(value)]
            self._n_met += n_within
            return digest
        number = self._numbers.get(id(value))
        if number is not None:
            if visits:
                visits[-1].lowest = min(visits[-1].lowest, number)
            return _join("met before", str(self._n_met - number).encode())
        visits.append(_Visit(self._start_visit(value, name), value, self._n_met, self._n_met))
        self._numbers[id(value)] = self._n_met
        self._kept.append(value)
        self._n_met += 1
        return None

    def _finish_visit(self, visit: _Visit, digest: bytes, parent: _Visit | None) -> None:
        """Store the digest of a finished visit, if it covers all of the object."""
        if visit.lowest >= visit.number:
            self._digests[id(visit.value)] = digest, self._n_met - visit.number
        elif parent is not None:
            parent.lowest = min(parent.lowest, visit.lowest)

    def _start_visit(self, value: Any, name: str) -> _Steps:
        kind = type(value)
        visitor = _VISITORS_BY_TYPE.get(kind)
        if visitor is None:
            fitting = (method for bases, method in _VISITORS_BY_BASE if issubclass(kind, bases))
            visitor = next(fitting, Fingerprint._visit_object)
        return visitor(self, value, name)

    # Visits of each kind of value

    def _visit_items(self, values: Iterable[Any], name: str) -> Generator[Any, bytes, list[bytes]]:
        digests = []
        for index, value in enumerate(values):
            plain = _digest_if_plain(value)
            digests.append(plain or (yield value, _name_part(name, f"[{index}]")))
        return digests

    def _visit_members(
        self, parts: Mapping[str, Any], name: str
    ) -> Generator[Any, bytes, list[bytes]]:
        """Visit attributes in the order of their names."""
        digests = []
        for part, value in sorted(parts.items()):
            digest = yield value, _name_member(name, part)
            digests.append(_join(part, digest))
        return digests

    def _visit_parts(self, parts: Mapping[str, Any], value: Any, name: str) -> _Steps:
        """Visit an object that consists of its class and these attributes."""
        members = yield from self._visit_members(parts, name)
        class_digest = yield type(value), f"the class of {name}"
        return _join("object", class_digest, *members)

    def _visit_sequence(self, value: Any, name: str) -> _Steps:
        kind = type(value).__name__
        if (text := _print_if_simple(value, value)) is not None:
            return _join(f"plain {kind}", text)
        return _join(kind, *(yield from self._visit_items(value, name)))

    def _visit_dict(self, value: Any, name: str) -> _Steps:
        if (text := _print_if_simple([*value.items()], [*value, *value.values()])) is not None:
            return _join("plain dict", text)
        return _join("dict", *(yield from self._visit_pairs(value.items(), name)))

    def _visit_pairs(
        self, pairs: Iterable[tuple[Any, Any]], name: str
    ) -> Generator[Any, bytes, list[bytes]]:
        digests = []
        for key, value in pairs:
            key_digest = yield key, name
            text = None if _digest_if_plain(key) is None else _print_if_simple(key, ())
            place = "[...]" if text is None else f"[{text.decode('utf-8', 'replace')}]"
            digests.append(_join("pair", key_digest, (yield value, _name_part(name, place))))
        return digests

    def _visit_set(self, value: Any, name: str) -> _Steps:
        """Visit a set without regard to order: hashes differ from one process to the next."""
        digests = []
        for item in value:
            digest = _digest_if_plain(item)
            if digest is None:  # visit each item as if it were the first
                n_met, numbers = self._n_met, self._numbers
                self._numbers = numbers.copy()
                digest = yield item, name
                self._n_met, self._numbers = n_met, numbers
            digests.append(digest)
        if type(value) in {set, frozenset, weakref.WeakSet}:
            return _join(type(value).__name__, *sorted(digests))
        state = yield value.__getstate__(), name
        class_digest = yield type(value), f"the class of {name}"
        return _join("set", class_digest, state, *sorted(digests))

    def _visit_array(self, value: np.ndarray, name: str) -> _Steps:
        if self._is_at_function and find_writable(value) is not None:
            self.takes_writes.append(name)
        plain = np.asarray(value)
        if plain.dtype.hasobject:
            if plain.dtype.names is None:
                items = yield from self._visit_items(plain.flat, name)
            else:
                fields = {field: plain[field] for field in plain.dtype.names}
                items = yield from self._visit_members(fields, name)
            digest = _join("objects", repr((plain.dtype, plain.shape)).encode(), *items)
        else:
            digest = digest_array(plain)
        if type(value) in {np.ndarray, np.memmap}:
            return digest
        # A subclass may have a mask or a unit beside its values.
        return _join(
            "subclass", digest, (yield from self._visit_parts(_get_attributes(value), value, name))
        )

    def _visit_function(self, function: FunctionType, name: str) -> _Steps:
        module = function.__module__
        if is_installed(module) and _is_reachable(function, module, function.__qualname__):
            return _join("function", _qualify(module, function.__qualname__).encode())
        # A function of the program, or one that a decorator has wrapped around such a function.
        code = yield function.__code__, name
        members = yield from self._visit_members(_get_parts(function), name)
        return _join("function", code, *members)

    def _visit_code(self, code: CodeType, name: str) -> _Steps:
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
        constants = yield from self._visit_items(code.co_consts, name)
        bytecode = (code.co_code, code.co_exceptiontable)
        return _join("code", repr(facts).encode(), *bytecode, *constants)

    def _visit_class(self, kind: type, name: str) -> _Steps:
        """Visit a class of the program."""
        if _get_package(type(kind)) == "numba":  # of `jitclass`, say: its name changes each time
            return (yield from self._visit_type_only(kind, name))
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
                (key, _get_member_attributes(member)) for key, member in kind.__members__.items()
            ]
        metaclass = yield type(kind), f"the class of {name}"
        bases = yield from self._visit_items(kind.__bases__, name)
        digests = yield from self._visit_members(members, name)
        full_name = f"{kind.__module__}.{kind.__qualname__}".encode()
        return _join("class", full_name, metaclass, *bases, *digests)

    def _visit_numba(self, value: Any, name: str) -> _Steps:
        """Visit an object of numba: one made from a Python function, a type, or any other."""
        n_before = len(self.takes_writes)
        for path in _PATHS_TO_PY_FUNC:
            func = _get_nested(value, path)
            if type(func) is FunctionType:
                target = value if path == "py_func" else _get_nested(value, "_dispatcher")
                options = {key: _get_nested(target, key) for key in ("targetoptions", "locals")}
                parts: dict[str, Any] = {"func": func, "options": options}
                if _get_nested(value, "_can_compile") is False:  # the user gave its signatures
                    parts["signatures"] = str(_get_nested(value, "signatures"))
                if _get_nested(value, "_frozen"):  # likewise
                    parts["types"] = str(_get_nested(value, "types"))
                digest = yield from self._visit_parts(parts, value, name)
                del self.takes_writes[n_before:]  # arrays in closures of kernels are constants
                return digest
        if type(value).__module__.startswith("numba.core.types"):
            return _join("type of numba", repr(value).encode())
        return (yield from self._visit_type_only(value, name))

    def _visit_holder(self, value: Any, name: str) -> _Steps:
        """Visit an object of a type in `_DECIDING_ATTRIBUTES`: these, and its other attributes."""
        parts = next(
            names for kind, names in _DECIDING_ATTRIBUTES.items() if issubclass(type(value), kind)
        )
        others = {k: v for k, v in _get_attributes(value).items() if k not in {"lock", "_ufunc"}}
        members = {part: getattr(value, part) for part in parts}
        return self._visit_parts({**others, **members}, value, name)

    def _visit_scalar(self, value: np.generic, name: str) -> _Steps:
        """Visit a NumPy scalar, which may be of a class of the program."""
        parts = {**_get_attributes(value), "value as array": np.asarray(value)}
        return self._visit_parts(parts, value, name)

    def _visit_path(self, value: Any, name: str) -> _Steps:
        class_digest = yield type(value), f"the class of {name}"
        return _join("path", class_digest, os.fsencode(value))

    def _visit_enum_member(self, value: enum.Enum, name: str) -> _Steps:
        return self._visit_parts(_get_member_attributes(value), value, name)

    def _visit_builtin(self, value: Any, name: str) -> _Steps:
        parts = {"object": value.__self__, "named": value.__qualname__}
        return self._visit_parts(parts, value, name)

    def _visit_descriptor(self, value: Any, name: str) -> _Steps:
        class_digest = yield type(value), f"the class of {name}"
        return _join("descriptor", class_digest, value.__qualname__.encode())

    def _visit_object(self, value: Any, name: str) -> _Steps:
        """Visit any other object: its class, and what decides what it does."""
        kind = type(value)
        package = _get_package(kind)
        if package == "numba":
            return (yield from self._visit_numba(value, name))
        deciding = getattr(kind, "_taskcarrier_deciding_attributes", None)
        if deciding is not None:
            state = {attribute: getattr(value, attribute) for attribute in deciding}
            return (yield from self._visit_parts(state, value, name))
        if value is os.environ or package in _STORAGE_PACKAGES:
            return (yield from self._visit_type_only(value, name))
        try:
            reduced = _reduce(value)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            return (yield from self._visit_type_only(value, name))
        if isinstance(reduced, str):
            return _join("named", reduced.encode())
        return (yield from self._visit_reduced(reduced, value, name))

    def _visit_reduced(self, reduced: tuple[Any, ...], value: Any, name: str) -> _Steps:
        """Visit what pickle would send: how to make the object, and what to put into it."""
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        digests = [(yield type(value), f"the class of {name}"), (yield make, name)]
        digests += yield from self._visit_items(args, name)
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # noqa: PLR2004  # a dict or None, and values of slots
            state = {**(state[0] or {}), **state[1]}
        state = {} if state is None else state
        if isinstance(state, tuple) and _get_package(type(value)) == "pandas":  # pandas' own arrays
            state = tuple(part for part in state if not _is_pandas_cache(part))
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            kind = type(value)
            members = {k: v for k, v in state.items() if not _is_cached(kind, k, v)}
            digests += yield from self._visit_members(members, name)
        else:
            digests.append((yield state, name))
        digests.append(_join("items", *(yield from self._visit_items(items or (), name))))
        digests += yield from self._visit_pairs(pairs or (), name)
        return _join("object", *digests)

    def _visit_type_only(self, value: Any, name: str) -> _Steps:
        # `joblib.hash` knows no more of such objects ("Tried and dropped" in `docs/design.md`).
        kind = type(value)
        self.not_looked_into[f"{name} ({_get_module(kind)}.{kind.__qualname__})"] = None
        return _join("type", (yield kind, f"the class of {name}"))


_Visitor = Callable[[Fingerprint, Any, str], _Steps]
_VISITORS_BY_TYPE: dict[type, _Visitor] = {
    FunctionType: Fingerprint._visit_function,
    CodeType: Fingerprint._visit_code,
    tuple: Fingerprint._visit_sequence,
    list: Fingerprint._visit_sequence,
    dict: Fingerprint._visit_dict,
    MappingProxyType: Fingerprint._visit_dict,
}
# The first entry whose bases fit is used.
_VISITORS_BY_BASE: list[tuple[type | tuple[type, ...], _Visitor]] = [
    (type, Fingerprint._visit_class),
    (np.ndarray, Fingerprint._visit_array),
    (np.generic, Fingerprint._visit_scalar),
    (enum.Enum, Fingerprint._visit_enum_member),
    ((set, frozenset, weakref.WeakSet), Fingerprint._visit_set),
    (tuple(_DECIDING_ATTRIBUTES), Fingerprint._visit_holder),
    (pathlib.PurePath, Fingerprint._visit_path),
    (BuiltinFunctionType, Fingerprint._visit_builtin),
    (_DESCRIPTORS, Fingerprint._visit_descriptor),
]


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


def _get_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes in an object's ``__dict__``, even if its class overrides access."""
    try:
        return dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def _get_member_attributes(member: enum.Enum) -> dict[str, Any]:
    """Return the attributes of an enumeration member, except its class and position."""
    members = {**_get_attributes(member), "_name_": member.name, "_value_": member.value}
    members = {k: v for k, v in members.items() if k not in {"__objclass__", "_sort_order_"}}
    return {k: v for k, v in members.items() if not _is_cached(type(member), k, v)}


def _is_cached(kind: type, name: str, value: object) -> bool:
    """Return whether an attribute is a cache of what its object has computed about itself."""
    pattern = _CACHE_NAMES.get(_get_package(kind))
    if pattern is not None and pattern.fullmatch(name):
        return _get_package(kind) != "xarray" or not value
    return any(type(vars(base).get(name)) is functools.cached_property for base in kind.__mro__)


# Attributes that objects of a package set on first use. Those of xarray are None at first, then an
# empty dict.
_CACHE_NAMES = {
    "pandas": re.compile("_cache"),
    "scipy": re.compile("_has_.*|has_.*"),
    "xarray": re.compile("_attrs|_encoding|_cache"),
}


def _is_pandas_cache(value: object) -> bool:
    return isinstance(value, dict) and value.keys() <= {"_cache"}


def _get_nested(value: Any, path: str) -> Any:
    """Return an attribute at a dotted path, or None; no ``__getattr__`` is called."""
    for name in path.split("."):
        attribute = _get_attributes(value).get(name)
        if attribute is None:
            attribute = getattr(type(value), name, None)
            if isinstance(attribute, (property, MemberDescriptorType, GetSetDescriptorType)):
                attribute = attribute.__get__(value)
        value = attribute
    return value


def _get_parts(function: FunctionType) -> dict[str, Any]:
    """Return what a function consists of besides its code, under names that cannot clash."""
    parts: dict[str, Any] = {
        "default values": function.__defaults__,
        "keyword defaults": function.__kwdefaults__,
    }
    attributes = _get_attributes(function)
    if function.__code__ is _SINGLEDISPATCH_CODE:  # its closure holds a cache
        standard = _get_attributes(functools.singledispatch(len)).keys() - {"registry"}
        attributes = {name: v for name, v in attributes.items() if name not in standard}
        return {**parts, **attributes}
    if not is_installed(_get_function_module(function)):
        parts |= _get_globals_read(function)
    return {
        **parts,
        **{f"attribute {name}": value for name, value in attributes.items()},
        **_get_closure_values(function),
    }


def _get_globals_read(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads, and the attributes that it reads from modules."""
    values = {}
    for names in _find_names_read(function.__code__, function.__globals__):
        value, n_used = _resolve(names, function.__globals__)
        if value is not _MISSING:
            label = "" if names[0].startswith(_IMPORT) else "global "
            values[label + ".".join(names[:n_used])] = value
    return values


def _reduce(value: Any) -> Any:
    """Return what pickle would make of an object: a name, or a tuple that says how to make it."""
    reducer = copyreg.dispatch_table.get(type(value))
    reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
    if not isinstance(reduced, str):
        return reduced
    module = getattr(value, "__module__", None)
    if module is None:  # ufuncs of packages give only their name
        modules = list(sys.modules.values())
        if not any(_get_attributes(candidate).get(reduced) is value for candidate in modules):
            raise pickle.PicklingError(f"{reduced} is the name of nothing")
        return reduced
    if not is_installed(module) or not _is_reachable(value, module, reduced):
        raise pickle.PicklingError(f"{module}.{reduced} may be another one in another program")
    return _qualify(module, reduced)


def _digest_if_plain(value: Any) -> bytes | None:
    """Return the digest of a value without parts to visit, or None for other values."""
    kind = type(value)
    if kind is int:  # Python refuses to print long integers in decimal
        return _join("int", b"%x" % value)
    if kind in _SIMPLE_TYPES or kind is range:
        return _join(kind.__name__, _encode(repr(value)))
    if kind is bytearray:
        return _join("bytearray", bytes(value))
    if isinstance(value, np.generic) and kind.__module__ == "numpy" and not value.dtype.hasobject:
        return _join("scalar", digest_array(np.asarray(value)))
    name = _find_name(value, kind)
    return None if name is None else _join(kind.__name__, name.encode())


def _print_if_simple(value: Any, items: Iterable[Any]) -> bytes | None:
    """Return the `repr` of a container if it shows all items completely, else None."""
    if not _SIMPLE_TYPES.issuperset(map(type, items)):
        return None
    try:
        return _encode(repr(value))
    except ValueError:  # an integer is too long to be printed
        return None


def _find_name(value: Any, kind: type) -> str | None:
    """Return a name that stands for the same value in every process; None if there is none."""
    if issubclass(kind, np.dtype):
        return repr(value)
    if kind is np.ufunc:
        name = str(value.__name__)
        return _qualify("numpy", name) if getattr(np, name, None) is value else None
    if issubclass(kind, ModuleType):
        module = str(_get_attributes(value).get("__name__"))
        return _qualify(module) if is_installed(module) else None
    if issubclass(kind, type):
        return _find_class_name(value)
    if kind is BuiltinFunctionType and issubclass(type(value.__self__), (type, ModuleType)):
        module = value.__module__
        return _qualify(module, value.__qualname__) if is_installed(module) else None
    return _find_stream_name(value) if kind.__name__ in {"Random", "RandomState"} else None


def _find_class_name(kind: type) -> str | None:
    module = _get_module(kind)
    if not kind.__flags__ & _HEAP_TYPE:  # written in C, so made with its module
        return _qualify(module, kind.__qualname__)
    if is_installed(module) and _is_reachable(kind, module, kind.__qualname__):
        return _qualify(module, kind.__qualname__)
    return None


_HEAP_TYPE = 1 << 9  # set by the interpreter on classes that are created at run time


def _find_stream_name(value: Any) -> str | None:
    """Return the name of a generator behind the functions of `random` or `numpy.random`."""
    for module, name in (("random", "_inst"), ("numpy.random.mtrand", "_rand")):
        if _get_attributes(sys.modules.get(module)).get(name) is value:
            return f"the stream of {module}"
    return None


def _get_module(kind: type) -> str:
    """Return the module of a class; for some classes in C it is not a string."""
    module: object = kind.__module__
    return module if isinstance(module, str) else "builtins"


def _get_package(kind: type) -> str:
    return _get_module(kind).partition(".")[0]


def _is_reachable(value: Any, module: str, name: str) -> bool:
    """Return whether a dotted name in a module refers to this value."""
    target: Any = sys.modules.get(module)
    for part in name.split("."):
        target = vars(target).get(part) if hasattr(target, "__dict__") else None
    return target is value


def _qualify(module: str, *name: str) -> str:
    """Return a name in an installed module, with the version of its package."""
    version = _get_attributes(sys.modules.get(module.partition(".")[0])).get("__version__", "")
    return f"{'.'.join([module, *name])} {version}"


def is_installed(module: str | None) -> bool:
    """Return whether a module belongs to Python or an installed package, not to the program."""
    if module is None or module == "__main__":
        return False
    package = module.partition(".")[0]
    if package in {*sys.builtin_module_names, __name__.partition(".")[0]}:
        return True
    origin = _find_origin(module) or _find_origin(package)
    if origin is None:
        return package in sys.stdlib_module_names
    return origin.startswith(_STDLIB_FOLDER) or not _SITE_FOLDERS.isdisjoint(origin.split(os.sep))


_SITE_FOLDERS = {"site-packages", "dist-packages"}
_STDLIB_FOLDER = sysconfig.get_path("stdlib") + os.sep


def _find_origin(module: str) -> str | None:
    """Return the file or folder of a module, or None if it has none or cannot be imported."""
    loaded = sys.modules.get(module)
    if loaded is None:
        try:
            spec = None if "." in module else importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        return None if spec is None else spec.origin
    names = _get_attributes(loaded)
    return names.get("__file__") or next(iter(names.get("__path__", ())), None)


def _name_member(name: str, part: str) -> str:
    return _name_part(name, f": {part}" if " " in part else f".{part}")


def _name_part(name: str, place: str) -> str:
    """Return the name of a part. Names stop growing at a length that no message needs."""
    return name + place if len(name) < _MAX_NAME else name


_MAX_NAME = 200


def _get_function_module(function: FunctionType) -> str:
    """Return the module that a function was defined in, whatever its ``__module__`` says."""
    return str(function.__globals__.get("__name__"))


def _get_closure_values(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {}
    for variable, cell in cells:
        try:
            values[variable] = cell.cell_contents
        except ValueError:  # not bound yet
            values[variable] = None
    return values


_IMPORT = "import "
_MISSING = object()
# Stands for a name that a module of the program may get later, but does not have now.
_NOT_YET = ModuleType("not there yet")


def _resolve(names: tuple[str, ...], namespace: Mapping[str, Any]) -> tuple[Any, int]:
    """Follow names through modules of the program; return the value and how many were used."""
    if names[0].startswith(_IMPORT):
        module = names[0].removeprefix(_IMPORT)
        value = _describe_installed(module) if is_installed(module) else _import_module(module)
    else:
        value = namespace.get(names[0], vars(builtins).get(names[0], _MISSING))
    n_used = 1
    while (
        n_used < len(names)
        and isinstance(value, ModuleType)
        and not is_installed(_get_attributes(value).get("__name__"))
    ):
        value = _get_attributes(value).get(names[n_used], _NOT_YET)
        n_used += 1
    return value, n_used


def _describe_installed(module: str) -> str:
    """Return name and version of an installed module, which need not be imported yet."""
    from importlib import metadata  # noqa: PLC0415  # slow, and rarely needed

    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return module
    names = _load_distributions().get(package, ())
    return " ".join([module, *map(metadata.version, sorted({*names}))])


@functools.cache
def _load_distributions() -> Mapping[str, list[str]]:
    from importlib import metadata  # noqa: PLC0415  # as above

    return metadata.packages_distributions()


def _import_module(module: str) -> Any:
    """Return a module of the program. It is imported if needed: digests must not depend on that."""
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # the function will meet the same exception
            if is_raised_by_handler(error):
                raise
            return _NOT_YET
    return sys.modules.get(module, _NOT_YET)


def _find_names_read(code: CodeType, namespace: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the globals and imports that code reads, each with the attributes read from it.

    The first name of each tuple is a global name, or `import` and the full name of a module. Code
    of nested functions is included.
    """
    names: tuple[str, ...] = ()
    source = ""  # the module of an import
    last_arguments: tuple[Any, Any] = (None, None)  # of the two instructions before
    for instruction in dis.get_instructions(code):
        opname, argument = instruction.opname, instruction.argval
        if opname == "EXTENDED_ARG":
            continue
        if opname in {"LOAD_ATTR", "LOAD_METHOD"} and names:
            names = (*names, argument)
            continue
        if names:
            yield names
        names = (argument,) if opname in {"LOAD_GLOBAL", "LOAD_NAME"} else ()
        if opname == "IMPORT_NAME":
            level, members = last_arguments
            source = _IMPORT + _resolve_module(argument, level or 0, namespace)
            if not members:
                yield (source,)
        elif opname == "IMPORT_FROM":
            yield (source, argument)
        last_arguments = (last_arguments[1], argument)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _find_names_read(constant, namespace)


def _resolve_module(module: str, level: int, namespace: Mapping[str, Any]) -> str:
    """Return the full name of an imported module; `level` is the number of dots before it."""
    package = namespace.get("__package__")
    return importlib.util.resolve_name("." * level + module, package) if package else module


def digest_array(array: np.ndarray) -> bytes:
    """Return a digest of an array's dtype, shape and values, whatever its strides."""
    if array.dtype.names is not None:  # field by field: the padding between them does not count
        fields = [name.encode() for name in array.dtype.names]
        values = [digest_array(array[name]) for name in array.dtype.names]
        return _join("records", repr((array.dtype, array.shape)).encode(), *fields, *values)
    content = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    for piece in _split(array):
        raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        if array.dtype.char in "gG" and _HAS_X87_FORMAT:  # the rest of 16 bytes is padding
            raw = np.ascontiguousarray(raw.reshape(-1, 16)[:, :10])
        content.update(raw.data)
    facts = repr((array.dtype, array.shape)).encode()
    return _join("array", facts, content.digest())


# Whether long doubles have 80 bits of value in 128 bits of memory.
_HAS_X87_FORMAT = np.finfo(np.longdouble).nmant == 63  # noqa: PLR2004  # x87's format
_HAS_X87_FORMAT &= np.dtype(np.longdouble).itemsize == 16  # noqa: PLR2004  # as above


def _split(array: np.ndarray) -> Iterable[np.ndarray]:
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous or array.ndim == 0 or array.nbytes <= _PIECE_NBYTES:
        yield array
        return
    step = max(1, _PIECE_NBYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield from _split(array[start]) if step == 1 else (array[start : start + step],)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _join(kind: str, *parts: bytes) -> bytes:
    """Return a digest of parts that also depends on where each part ends."""
    content = hashlib.blake2b(kind.encode(), digest_size=_DIGEST_NBYTES)
    for part in parts:
        content.update(struct.pack("<Q", len(part)))
        content.update(part)
    return content.digest()

"""What decides the values of a run, as a few words that can be kept and compared.

A run that goes on where an earlier one has ended must compute the same. Fingerprints tell whether
it does, as far as that can be told from outside:

- numbers, strings, arrays and containers by content; dicts with their order, sets without;
- functions by their code (all of it, nested functions too), their defaults and attributes, what
  they have enclosed, and every global name that they read. Of a module of the program, the
  attributes that they read;
- classes of the program by their attributes and methods, those of their bases too;
- objects by their class and by what pickle would send of them (of a mapper only its chunksize: the
  rest of it decides no values, and its report changes with each run);
- functions, classes and modules of installed packages by name, with the version of the package;
- anything else by its type alone, under its name: it is listed among what was `not looked into`.

Modules of the program that a function imports are imported here, unless they are already.

What a function finds in another way is not covered: attributes that were set on installed packages,
``globals()["name"]``, annotations and docstrings, a value that was set in place of what a
`functools.cached_property` has found, and what was registered elsewhere (`numba.extending`).

Bytecode differs between versions of Python, so another version is another function. Nothing depends
on hash randomisation, on addresses or on the depth of the caller's stack.

Everything is looked at once. An object that is met again is known by its digest if that says all of
it, else (within a circle) by how many objects ago it was met first; so the work is proportional to
what there is.
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
from taskcarrier.system.interrupts import is_of_the_program

_DIGEST_NBYTES = 16
# An array that is no single piece of memory is looked at in pieces of about this many bytes.
_PIECE_NBYTES = 1 << 24

_Steps = Generator[tuple[Any, str], bytes, bytes]
"""Looks at a value: gives out each part of it with its name, and gets the part's digest."""

# `repr` gives the whole value of these types. Quotes distinguish strings from numbers.
_SIMPLE = {bool, bytes, complex, float, int, str, type(None), type(...)}

# Objects by what they are made of, where pickle would send less, or nothing.
_MADE_OF: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    functools.singledispatchmethod: ("dispatcher", "func"),
    type(functools.cache(len)): ("__wrapped__",),
    np.vectorize: ("pyfunc", "otypes", "excluded", "signature"),  # it keeps what it has found out
    MethodType: ("__func__", "__self__"),
    property: ("fget", "fset", "fdel"),
    slice: ("start", "stop", "step"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}
_DISPATCHING = functools.singledispatch(len).__code__  # type: ignore[attr-defined]  # a function
# Where objects of numba have the function that they were made from.
_COMPILED_FROM = ("py_func", "_pyfunc", "_dispatcher.py_func", "gufunc_builder.py_func")
_DESCRIPTORS = (
    ClassMethodDescriptorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)
# Their arrays lie elsewhere, and pickle sends the place alone.
_STORED = {"h5py", "netCDF4", "tensorstore", "zarr"}


@dataclass(eq=False)
class _Visit:
    """One object that is being looked at.

    Attributes
    ----------
    steps : generator
        What looks at it.
    value : object
        It.
    number : int
        How many were met before it.
    lowest : int
        The lowest number that was referred to from within.
    """

    steps: _Steps
    value: object
    number: int
    lowest: int


class Fingerprint:
    """Digests of values.

    Attributes
    ----------
    not_looked_into : dict of str to None
        Names of what could only be told by its type, in the order in which they were met.
    takes_writes : list of str
        Names of arrays that a function may write to, so that the caller sees it.
    """

    def __init__(self) -> None:
        self.not_looked_into: dict[str, None] = {}
        self.takes_writes: list[str] = []
        self._is_at_function = False
        # Of what was met, by address: its number; or, where that says all, its digest and how many
        # objects were met within. Objects are kept, so that no other comes to have the address.
        self._numbers: dict[int, int] = {}
        self._digests: dict[int, tuple[bytes, int]] = {}
        self._kept: list[object] = []
        self._n_met = 0

    def of(self, value: Any, name: str) -> str:
        """The digest of a value, in hexadecimal digits; `name` is what to call it."""
        return self._walk(value, name).hex()

    def of_function(self, value: Any, name: str) -> dict[str, str]:
        """The digests of what a function is made of, by name; of other values, the one digest."""
        self._is_at_function = True
        try:
            if type(value) is not FunctionType or is_installed(_module_of_function(value)):
                return {name: self.of(value, name)}
            found = {name: self._walk(value.__code__, name).hex()}
            for part, one in _parts(value).items():
                # Each by itself, so that one that differs does not make others differ.
                self._n_met, self._numbers = 1, {id(value): 0}
                found[_member(name, part)] = self.of(one, _member(name, part))
            return found
        finally:
            self._is_at_function = False

    # How values are come to

    def _walk(self, value: Any, name: str) -> bytes:
        """The digest of a value. The stack is a list: values may be nested deeper than calls."""
        visits: list[_Visit] = []
        answer = self._digest_if_known(value, name, visits)
        while visits:
            visit = visits[-1]
            try:
                part, part_name = visit.steps.send(answer)  # type: ignore[arg-type]  # None begins it
            except StopIteration as done:
                visits.pop()
                answer = done.value
                self._leave(visit, done.value, visits[-1] if visits else None)
            else:
                answer = self._digest_if_known(part, part_name, visits)
        assert answer is not None  # for the type checker
        return answer

    def _digest_if_known(self, value: Any, name: str, visits: list[_Visit]) -> bytes | None:
        """The digest of what need not be looked at (again); else None, and the visit begins."""
        plain = _plain(value)
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

    def _leave(self, visit: _Visit, digest: bytes, parent: _Visit | None) -> None:
        """Keep what was found, if it says all of the object."""
        if visit.lowest >= visit.number:
            self._digests[id(visit.value)] = digest, self._n_met - visit.number
        elif parent is not None:
            parent.lowest = min(parent.lowest, visit.lowest)

    def _start_visit(self, value: Any, name: str) -> _Steps:
        kind = type(value)
        look = _OF_EXACTLY.get(kind)
        if look is None:
            fitting = (one for kinds, one in _OF_KINDS if issubclass(kind, kinds))
            look = next(fitting, Fingerprint._object)
        return look(self, value, name)

    # What each kind of value is looked at by

    def _all(self, values: Iterable[Any], name: str) -> Generator[Any, bytes, list[bytes]]:
        found = []
        for at, one in enumerate(values):
            plain = _plain(one)
            found.append(plain or (yield one, _place(name, f"[{at}]")))
        return found

    def _members(self, parts: Mapping[str, Any], name: str) -> Generator[Any, bytes, list[bytes]]:
        """Of attributes, in the order of their names."""
        found = []
        for part, value in sorted(parts.items()):
            own = yield value, _member(name, part)
            found.append(_join(part, own))
        return found

    def _visit_parts(self, parts: Mapping[str, Any], value: Any, name: str) -> _Steps:
        """Of an object that is its class and these attributes."""
        members = yield from self._members(parts, name)
        own = yield type(value), f"the class of {name}"
        return _join("object", own, *members)

    def _sequence(self, value: Any, name: str) -> _Steps:
        kind = type(value).__name__
        if (text := _text_of(value, value)) is not None:
            return _join(f"plain {kind}", text)
        return _join(kind, *(yield from self._all(value, name)))

    def _dict(self, value: Any, name: str) -> _Steps:
        if (text := _text_of([*value.items()], [*value, *value.values()])) is not None:
            return _join("plain dict", text)
        return _join("dict", *(yield from self._pairs(value.items(), name)))

    def _pairs(
        self, pairs: Iterable[tuple[Any, Any]], name: str
    ) -> Generator[Any, bytes, list[bytes]]:
        found = []
        for key, one in pairs:
            own = yield key, name
            text = None if _plain(key) is None else _text_of(key, ())
            place = "[...]" if text is None else f"[{text.decode('utf-8', 'replace')}]"
            found.append(_join("pair", own, (yield one, _place(name, place))))
        return found

    def _set(self, value: Any, name: str) -> _Steps:
        """Of what has no order: that of hashes differs from one program to the next."""
        found = []
        for one in value:
            plain = _plain(one)
            if plain is None:  # as if each were the first
                n_met, numbers = self._n_met, self._numbers
                self._numbers = numbers.copy()
                plain = yield one, name
                self._n_met, self._numbers = n_met, numbers
            found.append(plain)
        if type(value) in {set, frozenset, weakref.WeakSet}:
            return _join(type(value).__name__, *sorted(found))
        state = yield value.__getstate__(), name
        own = yield type(value), f"the class of {name}"
        return _join("set", own, state, *sorted(found))

    def _array(self, value: np.ndarray, name: str) -> _Steps:
        if self._is_at_function and find_writable(value) is not None:
            self.takes_writes.append(name)
        plain = np.asarray(value)
        if plain.dtype.hasobject:
            if plain.dtype.names is None:
                items = yield from self._all(plain.flat, name)
            else:
                fields = {field: plain[field] for field in plain.dtype.names}
                items = yield from self._members(fields, name)
            own = _join("objects", repr((plain.dtype, plain.shape)).encode(), *items)
        else:
            own = array_digest(plain)
        if type(value) in {np.ndarray, np.memmap}:
            return own
        # A subclass may have a mask or a unit beside its values.
        return _join(
            "subclass", own, (yield from self._visit_parts(_attributes(value), value, name))
        )

    def _function(self, function: FunctionType, name: str) -> _Steps:
        module = function.__module__
        if is_installed(module) and _is_found(function, module, function.__qualname__):
            return _join("function", _qualify(module, function.__qualname__).encode())
        # A function of the program, or one that a decorator made around such a function.
        code = yield function.__code__, name
        members = yield from self._members(_parts(function), name)
        return _join("function", code, *members)

    def _code(self, code: CodeType, name: str) -> _Steps:
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
        constants = yield from self._all(code.co_consts, name)
        bytecode = (code.co_code, code.co_exceptiontable)
        return _join("code", repr(facts).encode(), *bytecode, *constants)

    def _class(self, kind: type, name: str) -> _Steps:
        """Of a class of the program."""
        if _package(type(kind)) == "numba":  # such as of `jitclass`: its name is never the same
            return (yield from self._visit_type(kind, name))
        members = {key: one for key, one in vars(kind).items() if key not in _OF_EVERY_CLASS}
        if issubclass(kind, enum.Enum):
            own_names = {*kind.__members__, *(k for k in members if _IN_ENUMS.match(k))}
            callables = (FunctionType, classmethod, staticmethod)
            members = {
                key: one
                for key, one in members.items()
                if key not in own_names or isinstance(one, callables)
            }
            members["members in order"] = [
                (key, _attributes_of_member(one)) for key, one in kind.__members__.items()
            ]
        own = yield type(kind), f"the class of {name}"
        bases = yield from self._all(kind.__bases__, name)
        found = yield from self._members(members, name)
        named = f"{kind.__module__}.{kind.__qualname__}".encode()
        return _join("class", named, own, *bases, *found)

    def _numba(self, value: Any, name: str) -> _Steps:
        """Of what numba has compiled from a function of Python, or knows about types."""
        n_before = len(self.takes_writes)
        for path in _COMPILED_FROM:
            func = _get_nested(value, path)
            if type(func) is FunctionType:
                target = value if path == "py_func" else _get_nested(value, "_dispatcher")
                options = {key: _get_nested(target, key) for key in ("targetoptions", "locals")}
                parts: dict[str, Any] = {"func": func, "options": options}
                if _get_nested(value, "_can_compile") is False:  # its signatures were given
                    parts["signatures"] = str(_get_nested(value, "signatures"))
                if _get_nested(value, "_frozen"):  # likewise
                    parts["types"] = str(_get_nested(value, "types"))
                own = yield from self._visit_parts(parts, value, name)
                del self.takes_writes[n_before:]  # arrays that kernels enclose are constants
                return own
        if type(value).__module__.startswith("numba.core.types"):
            return _join("type of numba", repr(value).encode())
        return (yield from self._visit_type(value, name))

    def _holder(self, value: Any, name: str) -> _Steps:
        """Of what holds functions, and says by attributes of its own which."""
        parts = next(parts for kind, parts in _MADE_OF.items() if issubclass(type(value), kind))
        beside = {k: one for k, one in _attributes(value).items() if k not in {"lock", "_ufunc"}}
        members = {part: getattr(value, part) for part in parts}
        return self._visit_parts({**beside, **members}, value, name)

    def _scalar(self, value: np.generic, name: str) -> _Steps:
        """Of a class of the program that is a number of NumPy's as well."""
        parts = {**_attributes(value), "value as array": np.asarray(value)}
        return self._visit_parts(parts, value, name)

    def _path(self, value: Any, name: str) -> _Steps:
        own = yield type(value), f"the class of {name}"
        return _join("path", own, os.fsencode(value))

    def _enum_member(self, value: enum.Enum, name: str) -> _Steps:
        return self._visit_parts(_attributes_of_member(value), value, name)

    def _builtin(self, value: Any, name: str) -> _Steps:
        parts = {"object": value.__self__, "named": value.__qualname__}
        return self._visit_parts(parts, value, name)

    def _descriptor(self, value: Any, name: str) -> _Steps:
        own = yield type(value), f"the class of {name}"
        return _join("descriptor", own, value.__qualname__.encode())

    def _object(self, value: Any, name: str) -> _Steps:
        """Of an object: its class, and what decides what it does."""
        kind = type(value)
        package = _package(kind)
        if package == "numba":
            return (yield from self._numba(value, name))
        deciding = getattr(kind, "_taskcarrier_deciding", None)
        if deciding is not None:
            state = {one: getattr(value, one) for one in deciding}
            return (yield from self._visit_parts(state, value, name))
        if value is os.environ or package in _STORED:
            return (yield from self._visit_type(value, name))
        try:
            sent = _reduce(value)
        except Exception as error:
            if is_of_the_program(error):
                raise
            return (yield from self._visit_type(value, name))
        if isinstance(sent, str):
            return _join("named", sent.encode())
        return (yield from self._visit_reduced(sent, value, name))

    def _visit_reduced(self, sent: tuple[Any, ...], value: Any, name: str) -> _Steps:
        """Of what pickle would send: how to make the object, and what to put into it."""
        make, args, state, items, pairs = (*sent, None, None, None)[:5]
        found = [(yield type(value), f"the class of {name}"), (yield make, name)]
        found += yield from self._all(args, name)
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # noqa: PLR2004  # a dict or None, and values of slots
            state = {**(state[0] or {}), **state[1]}
        state = {} if state is None else state
        if isinstance(state, tuple) and _package(type(value)) == "pandas":  # arrays of its own
            state = tuple(one for one in state if not _is_pandas_cache(one))
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            kind = type(value)
            kept = {k: v for k, v in state.items() if not _is_found_out(kind, k, v)}
            found += yield from self._members(kept, name)
        else:
            found.append((yield state, name))
        found.append(_join("items", *(yield from self._all(items or (), name))))
        found += yield from self._pairs(pairs or (), name)
        return _join("object", *found)

    def _visit_type(self, value: Any, name: str) -> _Steps:
        kind = type(value)
        self.not_looked_into[f"{name} ({_module_of(kind)}.{kind.__qualname__})"] = None
        return _join("type", (yield kind, f"the class of {name}"))


_Look = Callable[[Fingerprint, Any, str], _Steps]
_OF_EXACTLY: dict[type, _Look] = {
    FunctionType: Fingerprint._function,
    CodeType: Fingerprint._code,
    tuple: Fingerprint._sequence,
    list: Fingerprint._sequence,
    dict: Fingerprint._dict,
    MappingProxyType: Fingerprint._dict,
}
# The first entry that fits is used.
_OF_KINDS: list[tuple[type | tuple[type, ...], _Look]] = [
    (type, Fingerprint._class),
    (np.ndarray, Fingerprint._array),
    (np.generic, Fingerprint._scalar),
    (enum.Enum, Fingerprint._enum_member),
    ((set, frozenset, weakref.WeakSet), Fingerprint._set),
    (tuple(_MADE_OF), Fingerprint._holder),
    (pathlib.PurePath, Fingerprint._path),
    (BuiltinFunctionType, Fingerprint._builtin),
    (_DESCRIPTORS, Fingerprint._descriptor),
]


# What Python gives to every class; some of it differs from one program to the next.
_OF_EVERY_CLASS = {
    "__abstractmethods__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
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
# What the class of an enumeration holds besides what was written in it.
_IN_ENUMS = re.compile("_[^_].*_$")


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object that lie in a dict, whatever its class says of attributes."""
    try:
        return dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def _attributes_of_member(member: enum.Enum) -> dict[str, Any]:
    """Those of a member of an enumeration, but for its class and its place in it."""
    found = {**_attributes(member), "_name_": member.name, "_value_": member.value}
    found = {k: v for k, v in found.items() if k not in {"__objclass__", "_sort_order_"}}
    return {k: v for k, v in found.items() if not _is_found_out(type(member), k, v)}


def _is_found_out(kind: type, name: str, value: object) -> bool:
    """Whether an attribute only keeps what its object has found out about itself."""
    is_lazy = _LAZY.get(_package(kind))
    if is_lazy is not None and is_lazy.fullmatch(name):
        return _package(kind) != "xarray" or not value
    return any(type(vars(base).get(name)) is functools.cached_property for base in kind.__mro__)


# Attributes that objects of a package set when they are first asked. Those of xarray are None at
# first, and an empty dict then.
_LAZY = {
    "pandas": re.compile("_cache"),
    "scipy": re.compile("_has_.*|has_.*"),
    "xarray": re.compile("_attrs|_encoding|_cache"),
}


def _is_pandas_cache(value: object) -> bool:
    return isinstance(value, dict) and value.keys() <= {"_cache"}


def _get_nested(value: Any, path: str) -> Any:
    """An attribute of an attribute, as far as there is one; no ``__getattr__`` is asked."""
    for name in path.split("."):
        found = _attributes(value).get(name)
        if found is None:
            found = getattr(type(value), name, None)
            if isinstance(found, (property, MemberDescriptorType, GetSetDescriptorType)):
                found = found.__get__(value)
        value = found
    return value


def _parts(function: FunctionType) -> dict[str, Any]:
    """What a function is made of besides its code, by names of which none is another's."""
    found: dict[str, Any] = {
        "default values": function.__defaults__,
        "keyword defaults": function.__kwdefaults__,
    }
    attributes = _attributes(function)
    if function.__code__ is _DISPATCHING:  # it encloses what it remembers
        own = _attributes(functools.singledispatch(len)).keys() - {"registry"}
        attributes = {name: one for name, one in attributes.items() if name not in own}
        return {**found, **attributes}
    if not is_installed(_module_of_function(function)):
        found |= _read_by(function)
    return {
        **found,
        **{f"attribute {name}": one for name, one in attributes.items()},
        **_closure_values(function),
    }


def _read_by(function: FunctionType) -> dict[str, Any]:
    """The global names that a function reads, and the attributes that it reads of modules."""
    found = {}
    for names in _names_read(function.__code__, function.__globals__):
        value, n_used = _resolve(names, function.__globals__)
        if value is not _MISSING:
            label = "" if names[0].startswith(_IMPORT) else "global "
            found[label + ".".join(names[:n_used])] = value
    return found


def _reduce(value: Any) -> Any:
    """What pickle would make of an object: a name, or how to make it."""
    registered = copyreg.dispatch_table.get(type(value))
    sent = value.__reduce_ex__(4) if registered is None else registered(value)
    if not isinstance(sent, str):
        return sent
    module = getattr(value, "__module__", None)
    if module is None:  # ufuncs of packages tell their name alone
        modules = list(sys.modules.values())
        if not any(_attributes(one).get(sent) is value for one in modules):
            raise pickle.PicklingError(f"{sent} is the name of nothing")
        return sent
    if not is_installed(module) or not _is_found(value, module, sent):
        raise pickle.PicklingError(f"{module}.{sent} may be another one in another program")
    return _qualify(module, sent)


def _plain(value: Any) -> bytes | None:
    """The digest of a value that is its own content."""
    kind = type(value)
    if kind is int:  # Python refuses to print long ones in decimals
        return _join("int", b"%x" % value)
    if kind in _SIMPLE or kind is range:
        return _join(kind.__name__, _bytes_of(repr(value)))
    if kind is bytearray:
        return _join("bytearray", bytes(value))
    if isinstance(value, np.generic) and kind.__module__ == "numpy" and not value.dtype.hasobject:
        return _join("scalar", array_digest(np.asarray(value)))
    named = _name_of(value, kind)
    return None if named is None else _join(kind.__name__, named.encode())


def _text_of(value: Any, items: Iterable[Any]) -> bytes | None:
    """What Python prints of a container, if that says all of its items."""
    if not _SIMPLE.issuperset(map(type, items)):
        return None
    try:
        return _bytes_of(repr(value))
    except ValueError:  # of an integer that is too long to be printed
        return None


def _name_of(value: Any, kind: type) -> str | None:
    """What a value is called that is the same wherever it has that name; None for others."""
    if issubclass(kind, np.dtype):
        return repr(value)
    if kind is np.ufunc:
        name = str(value.__name__)
        return _qualify("numpy", name) if getattr(np, name, None) is value else None
    if issubclass(kind, ModuleType):
        module = str(_attributes(value).get("__name__"))
        return _qualify(module) if is_installed(module) else None
    if issubclass(kind, type):
        return _name_of_class(value)
    if kind is BuiltinFunctionType and issubclass(type(value.__self__), (type, ModuleType)):
        module = value.__module__
        return _qualify(module, value.__qualname__) if is_installed(module) else None
    return _name_of_stream(value) if kind.__name__ in {"Random", "RandomState"} else None


def _name_of_class(kind: type) -> str | None:
    module = _module_of(kind)
    if not kind.__flags__ & _HEAP_TYPE:  # written in C, and as old as its module
        return _qualify(module, kind.__qualname__)
    if is_installed(module) and _is_found(kind, module, kind.__qualname__):
        return _qualify(module, kind.__qualname__)
    return None


_HEAP_TYPE = 1 << 9  # the interpreter's mark of classes that are made when a program runs


def _name_of_stream(value: Any) -> str | None:
    """That of the generators behind the functions of `random` and `numpy.random`."""
    for module, name in (("random", "_inst"), ("numpy.random.mtrand", "_rand")):
        if _attributes(sys.modules.get(module)).get(name) is value:
            return f"the stream of {module}"
    return None


def _module_of(kind: type) -> str:
    """Where a class was made; some in C tell no text."""
    module: object = kind.__module__
    return module if isinstance(module, str) else "builtins"


def _package(kind: type) -> str:
    return _module_of(kind).partition(".")[0]


def _is_found(value: Any, module: str, name: str) -> bool:
    """Whether a name in a module is that of a value."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found is value


def _qualify(module: str, *name: str) -> str:
    """A name in an installed module, with the version of its package."""
    version = _attributes(sys.modules.get(module.partition(".")[0])).get("__version__", "")
    return f"{'.'.join([module, *name])} {version}"


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or an installed package, and not to the program."""
    if module is None or module == "__main__":
        return False
    package = module.partition(".")[0]
    if package in {*sys.builtin_module_names, __name__.partition(".")[0]}:
        return True
    origin = _origin(module) or _origin(package)
    if origin is None:
        return package in sys.stdlib_module_names
    return origin.startswith(_OF_PYTHON) or not _SITES.isdisjoint(origin.split(os.sep))


_SITES = {"site-packages", "dist-packages"}
_OF_PYTHON = sysconfig.get_path("stdlib") + os.sep


def _origin(module: str) -> str | None:
    """The file or folder of a module that can be imported; None if there is none such."""
    found = sys.modules.get(module)
    if found is None:
        try:
            spec = None if "." in module else importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        return None if spec is None else spec.origin
    names = _attributes(found)
    return names.get("__file__") or next(iter(names.get("__path__", ())), None)


def _member(name: str, part: str) -> str:
    return _place(name, f": {part}" if " " in part else f".{part}")


def _place(name: str, place: str) -> str:
    """What to call a part. What is nested deeper than is ever read has the name of the whole."""
    return name + place if len(name) < _MAX_NAME else name


_MAX_NAME = 200


def _module_of_function(function: FunctionType) -> str:
    """Where a function was written, whatever its ``__module__`` says of it."""
    return str(function.__globals__.get("__name__"))


def _closure_values(function: FunctionType) -> dict[str, Any]:
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
# Stands for what a function may find in a module of the program, and is not there now.
_NOT_YET = ModuleType("not there yet")


def _resolve(names: tuple[str, ...], names_of: Mapping[str, Any]) -> tuple[Any, int]:
    """What the first of some names refer to, and how many; attributes of modules alone count."""
    if names[0].startswith(_IMPORT):
        module = names[0].removeprefix(_IMPORT)
        value = _describe_installed(module) if is_installed(module) else _import(module)
    else:
        value = names_of.get(names[0], vars(builtins).get(names[0], _MISSING))
    n_used = 1
    while (
        n_used < len(names)
        and isinstance(value, ModuleType)
        and not is_installed(_attributes(value).get("__name__"))
    ):
        value = _attributes(value).get(names[n_used], _NOT_YET)
        n_used += 1
    return value, n_used


def _describe_installed(module: str) -> str:
    """An installed module that a function imports, which need not be imported yet."""
    from importlib import metadata  # noqa: PLC0415  # slow, and rarely needed

    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return module
    names = _distributions().get(package, ())
    return " ".join([module, *map(metadata.version, sorted({*names}))])


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    from importlib import metadata  # noqa: PLC0415  # likewise

    return metadata.packages_distributions()


def _import(module: str) -> Any:
    """A module of the program that a function imports: the same before and after it has."""
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever it raises, the function will see it too
            if is_of_the_program(error):
                raise
            return _NOT_YET
    return sys.modules.get(module, _NOT_YET)


def _names_read(code: CodeType, names_of: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Global names and imports of a function, or one within it, with the attributes read of them.

    The first one of each is a global name, or `import` and the full name of a module.
    """
    names: tuple[str, ...] = ()
    source = ""  # what is imported from
    before: tuple[Any, Any] = (None, None)  # the last two arguments
    for instruction in dis.get_instructions(code):
        what, argument = instruction.opname, instruction.argval
        if what == "EXTENDED_ARG":
            continue
        if what in {"LOAD_ATTR", "LOAD_METHOD"} and names:
            names = (*names, argument)
            continue
        if names:
            yield names
        names = (argument,) if what in {"LOAD_GLOBAL", "LOAD_NAME"} else ()
        if what == "IMPORT_NAME":
            level, members = before
            source = _IMPORT + _full_name(argument, level or 0, names_of)
            if not members:
                yield (source,)
        elif what == "IMPORT_FROM":
            yield (source, argument)
        before = (before[1], argument)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_read(constant, names_of)


def _full_name(module: str, level: int, names_of: Mapping[str, Any]) -> str:
    """The name of an imported module; `level` is the number of dots before it."""
    package = names_of.get("__package__")
    return importlib.util.resolve_name("." * level + module, package) if package else module


def array_digest(array: np.ndarray) -> bytes:
    """Of an array's dtype, shape and values, however they lie."""
    if array.dtype.names is not None:  # field by field: what lies between them is no value
        fields = [name.encode() for name in array.dtype.names]
        values = [array_digest(array[name]) for name in array.dtype.names]
        return _join("records", repr((array.dtype, array.shape)).encode(), *fields, *values)
    content = hashlib.blake2b(digest_size=_DIGEST_NBYTES)
    for piece in _pieces(array):
        raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        if array.dtype.char in "gG" and _EXTENDED:  # the rest of 16 bytes is no value
            raw = np.ascontiguousarray(raw.reshape(-1, 16)[:, :10])
        content.update(raw.data)
    facts = repr((array.dtype, array.shape)).encode()
    return _join("array", facts, content.digest())


# Whether long doubles have 80 bits that count in 128.
_EXTENDED = np.finfo(np.longdouble).nmant == 63  # noqa: PLR2004  # x87's format
_EXTENDED &= np.dtype(np.longdouble).itemsize == 16  # noqa: PLR2004  # likewise


def _pieces(array: np.ndarray) -> Iterable[np.ndarray]:
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous or array.ndim == 0 or array.nbytes <= _PIECE_NBYTES:
        yield array
        return
    step = max(1, _PIECE_NBYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield from _pieces(array[start]) if step == 1 else (array[start : start + step],)


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _join(kind: str, *parts: bytes) -> bytes:
    """A digest of parts that tells where one ends and the next begins."""
    content = hashlib.blake2b(kind.encode(), digest_size=_DIGEST_NBYTES)
    for part in parts:
        content.update(struct.pack("<Q", len(part)))
        content.update(part)
    return content.digest()

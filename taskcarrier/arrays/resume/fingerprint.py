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

Modules of the program that a function imports are imported if they are not imported yet.

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

import enum
import os
import pathlib
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
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
    WrapperDescriptorType,
)
from typing import Any

import numpy as np

from taskcarrier.arrays.resume.attributes import (
    get_attributes,
    get_module_name,
    get_nested,
    get_package,
)
from taskcarrier.arrays.resume.functions import get_function_module, get_function_parts
from taskcarrier.arrays.resume.installed import is_installed, is_reachable, qualify
from taskcarrier.arrays.resume.objects import (
    DECIDING_ATTRIBUTES,
    get_class_members,
    get_deciding_attributes,
    get_member_attributes,
    is_cached,
    is_pandas_cache,
    reduce_object,
)
from taskcarrier.arrays.resume.plain_values import (
    digest_array,
    digest_if_plain,
    digest_parts,
    print_if_simple,
)
from taskcarrier.memory.memmaps import find_writable
from taskcarrier.system.interrupts import is_raised_by_handler

_Steps = Generator[tuple[Any, str], bytes, bytes]
"""The visit of a value: yields each part with its name, is sent its digest, returns a digest."""
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

    def digest(self, value: Any, name: str) -> str:
        """Return the digest of a value in hexadecimal; `name` stands for the value in messages."""
        return self._walk(value, name).hex()

    def digest_function(self, value: Any, name: str) -> dict[str, str]:
        """Return the digests of the parts of a function, by name; of other values, one digest."""
        self._is_at_function = True
        try:
            if type(value) is not FunctionType or is_installed(get_function_module(value)):
                return {name: self.digest(value, name)}
            digests = {name: self._walk(value.__code__, name).hex()}
            for label, part in get_function_parts(value).items():
                # Digest each part separately: a part that differs must not change the others.
                self._n_met, self._numbers = 1, {id(value): 0}
                digests[_name_member(name, label)] = self.digest(part, _name_member(name, label))
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
        plain = digest_if_plain(value)
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
            return digest_parts("met before", str(self._n_met - number).encode())
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
            plain = digest_if_plain(value)
            digests.append(plain or (yield value, _name_part(name, f"[{index}]")))
        return digests

    def _visit_members(
        self, parts: Mapping[str, Any], name: str
    ) -> Generator[Any, bytes, list[bytes]]:
        """Visit attributes in the order of their names."""
        digests = []
        for part, value in sorted(parts.items()):
            digest = yield value, _name_member(name, part)
            digests.append(digest_parts(part, digest))
        return digests

    def _visit_parts(self, parts: Mapping[str, Any], value: Any, name: str) -> _Steps:
        """Visit an object that consists of its class and these attributes."""
        members = yield from self._visit_members(parts, name)
        class_digest = yield type(value), f"the class of {name}"
        return digest_parts("object", class_digest, *members)

    def _visit_sequence(self, value: Any, name: str) -> _Steps:
        kind = type(value).__name__
        if (text := print_if_simple(value, value)) is not None:
            return digest_parts(f"plain {kind}", text)
        return digest_parts(kind, *(yield from self._visit_items(value, name)))

    def _visit_dict(self, value: Any, name: str) -> _Steps:
        if (text := print_if_simple([*value.items()], [*value, *value.values()])) is not None:
            return digest_parts("plain dict", text)
        return digest_parts("dict", *(yield from self._visit_pairs(value.items(), name)))

    def _visit_pairs(
        self, pairs: Iterable[tuple[Any, Any]], name: str
    ) -> Generator[Any, bytes, list[bytes]]:
        digests = []
        for key, value in pairs:
            key_digest = yield key, name
            text = None if digest_if_plain(key) is None else print_if_simple(key, ())
            place = "[...]" if text is None else f"[{text.decode('utf-8', 'replace')}]"
            digests.append(digest_parts("pair", key_digest, (yield value, _name_part(name, place))))
        return digests

    def _visit_set(self, value: Any, name: str) -> _Steps:
        """Visit a set without regard to order: hashes differ from one process to the next."""
        digests = []
        for item in value:
            digest = digest_if_plain(item)
            if digest is None:  # visit each item as if it were the first
                n_met, numbers = self._n_met, self._numbers
                self._numbers = numbers.copy()
                digest = yield item, name
                self._n_met, self._numbers = n_met, numbers
            digests.append(digest)
        if type(value) in {set, frozenset, weakref.WeakSet}:
            return digest_parts(type(value).__name__, *sorted(digests))
        state = yield value.__getstate__(), name
        class_digest = yield type(value), f"the class of {name}"
        return digest_parts("set", class_digest, state, *sorted(digests))

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
            digest = digest_parts("objects", repr((plain.dtype, plain.shape)).encode(), *items)
        else:
            digest = digest_array(plain)
        if type(value) in {np.ndarray, np.memmap}:
            return digest
        # A subclass may have a mask or a unit beside its values.
        return digest_parts(
            "subclass", digest, (yield from self._visit_parts(get_attributes(value), value, name))
        )

    def _visit_function(self, function: FunctionType, name: str) -> _Steps:
        module = function.__module__
        if is_installed(module) and is_reachable(function, module, function.__qualname__):
            return digest_parts("function", qualify(module, function.__qualname__).encode())
        # A function of the program, or one that a decorator has wrapped around such a function.
        code = yield function.__code__, name
        members = yield from self._visit_members(get_function_parts(function), name)
        return digest_parts("function", code, *members)

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
        return digest_parts("code", repr(facts).encode(), *bytecode, *constants)

    def _visit_class(self, kind: type, name: str) -> _Steps:
        """Visit a class of the program."""
        if get_package(type(kind)) == "numba":  # of `jitclass`, say: its name changes each time
            return (yield from self._visit_type_only(kind, name))
        metaclass = yield type(kind), f"the class of {name}"
        bases = yield from self._visit_items(kind.__bases__, name)
        digests = yield from self._visit_members(get_class_members(kind), name)
        full_name = f"{kind.__module__}.{kind.__qualname__}".encode()
        return digest_parts("class", full_name, metaclass, *bases, *digests)

    def _visit_numba(self, value: Any, name: str) -> _Steps:
        """Visit an object of numba: one made from a Python function, a type, or any other."""
        n_before = len(self.takes_writes)
        for path in _PATHS_TO_PY_FUNC:
            func = get_nested(value, path)
            if type(func) is FunctionType:
                target = value if path == "py_func" else get_nested(value, "_dispatcher")
                options = {key: get_nested(target, key) for key in ("targetoptions", "locals")}
                parts: dict[str, Any] = {"func": func, "options": options}
                if get_nested(value, "_can_compile") is False:  # the user gave its signatures
                    parts["signatures"] = str(get_nested(value, "signatures"))
                if get_nested(value, "_frozen"):  # likewise
                    parts["types"] = str(get_nested(value, "types"))
                digest = yield from self._visit_parts(parts, value, name)
                del self.takes_writes[n_before:]  # arrays in closures of kernels are constants
                return digest
        if type(value).__module__.startswith("numba.core.types"):
            return digest_parts("type of numba", repr(value).encode())
        return (yield from self._visit_type_only(value, name))

    def _visit_holder(self, value: Any, name: str) -> _Steps:
        """Visit an object of a type in `DECIDING_ATTRIBUTES`: these, and its other attributes."""
        return self._visit_parts(get_deciding_attributes(value), value, name)

    def _visit_scalar(self, value: np.generic, name: str) -> _Steps:
        """Visit a NumPy scalar, which may be of a class of the program."""
        parts = {**get_attributes(value), "value as array": np.asarray(value)}
        return self._visit_parts(parts, value, name)

    def _visit_path(self, value: Any, name: str) -> _Steps:
        class_digest = yield type(value), f"the class of {name}"
        return digest_parts("path", class_digest, os.fsencode(value))

    def _visit_enum_member(self, value: enum.Enum, name: str) -> _Steps:
        return self._visit_parts(get_member_attributes(value), value, name)

    def _visit_builtin(self, value: Any, name: str) -> _Steps:
        parts = {"object": value.__self__, "named": value.__qualname__}
        return self._visit_parts(parts, value, name)

    def _visit_descriptor(self, value: Any, name: str) -> _Steps:
        class_digest = yield type(value), f"the class of {name}"
        return digest_parts("descriptor", class_digest, value.__qualname__.encode())

    def _visit_object(self, value: Any, name: str) -> _Steps:
        """Visit any other object: its class, and what decides what it does."""
        kind = type(value)
        package = get_package(kind)
        if package == "numba":
            return (yield from self._visit_numba(value, name))
        deciding = getattr(kind, "_taskcarrier_deciding_attributes", None)
        if deciding is not None:
            state = {attribute: getattr(value, attribute) for attribute in deciding}
            return (yield from self._visit_parts(state, value, name))
        if value is os.environ or package in _STORAGE_PACKAGES:
            return (yield from self._visit_type_only(value, name))
        try:
            reduced = reduce_object(value)
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            return (yield from self._visit_type_only(value, name))
        if isinstance(reduced, str):
            return digest_parts("named", reduced.encode())
        return (yield from self._visit_reduced(reduced, value, name))

    def _visit_reduced(self, reduced: tuple[Any, ...], value: Any, name: str) -> _Steps:
        """Visit what pickle would send: how to make the object, and what to put into it."""
        make, args, state, items, pairs = (*reduced, None, None, None)[:5]
        digests = [(yield type(value), f"the class of {name}"), (yield make, name)]
        digests += yield from self._visit_items(args, name)
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # noqa: PLR2004  # a dict or None, and values of slots
            state = {**(state[0] or {}), **state[1]}
        state = {} if state is None else state
        if isinstance(state, tuple) and get_package(type(value)) == "pandas":  # pandas' own arrays
            state = tuple(part for part in state if not is_pandas_cache(part))
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            kind = type(value)
            members = {k: v for k, v in state.items() if not is_cached(kind, k, v)}
            digests += yield from self._visit_members(members, name)
        else:
            digests.append((yield state, name))
        digests.append(digest_parts("items", *(yield from self._visit_items(items or (), name))))
        digests += yield from self._visit_pairs(pairs or (), name)
        return digest_parts("object", *digests)

    def _visit_type_only(self, value: Any, name: str) -> _Steps:
        # `joblib.hash` knows no more of such objects ("Tried and dropped" in `docs/design.md`).
        kind = type(value)
        self.not_looked_into[f"{name} ({get_module_name(kind)}.{kind.__qualname__})"] = None
        return digest_parts("type", (yield kind, f"the class of {name}"))


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
    (tuple(DECIDING_ATTRIBUTES), Fingerprint._visit_holder),
    (pathlib.PurePath, Fingerprint._visit_path),
    (BuiltinFunctionType, Fingerprint._visit_builtin),
    (_DESCRIPTORS, Fingerprint._visit_descriptor),
]


def _name_member(name: str, part: str) -> str:
    return _name_part(name, f": {part}" if " " in part else f".{part}")


def _name_part(name: str, place: str) -> str:
    """Return the name of a part. Names stop growing at a length that no message needs."""
    return name + place if len(name) < _MAX_NAME else name


_MAX_NAME = 200

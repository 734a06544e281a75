"""What decides the values of a run, as a few words that can be kept and compared.

A run that goes on where an earlier one has ended must compute the same. Fingerprints tell whether
it does, as far as that can be told from outside:

- numbers, texts, arrays and containers of these by content;
- functions by their code (all of it, nested functions too), their defaults, what they have
  enclosed, and every global name that they read. Of a module of the program, the attributes that
  they read;
- classes of the program by their attributes and methods, those of their bases too;
- objects by their class and by what pickle would send of them (of a mapper only its chunksize: the
  rest of it decides no values, and its report changes with each run);
- functions, classes and modules of installed packages by name, with the version of the package;
- anything else by its type alone, under its name: it is listed among what was `not looked into`.

Bytecode differs between versions of Python, so another version is another function. Nothing depends
on hash randomisation or on addresses.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import operator
import os
import pickle
import re
import struct
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np

from taskcarrier.interrupts import is_of_the_program
from taskcarrier.mapped_files import written_through

_DIGEST_NBYTES = 16
# An array that is no single piece of memory is looked at in pieces of about this many bytes.
_PIECE_NBYTES = 1 << 24

# Objects by what they are made of, where pickle would send less, or nothing.
_MADE_OF: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    functools.singledispatchmethod: ("dispatcher", "func"),
    type(functools.cache(len)): ("__wrapped__",),
    MethodType: ("__func__", "__self__"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}


class Fingerprint:
    """Digests of values.

    Attributes
    ----------
    not_looked_into : list of str
        Names of what could only be told by its type.
    takes_writes : list of str
        Names of arrays that a function may write to, so that the caller sees it.
    """

    def __init__(self) -> None:
        self.not_looked_into: list[str] = []
        self.takes_writes: list[str] = []
        self._within: list[int] = []  # what is being looked at, for what refers to itself
        # Functions and classes that were looked at, by address: their numbers, and themselves, so
        # that no other object comes to have the address.
        self._numbers: dict[int, tuple[int, object]] = {}

    def of(self, value: Any, name: str) -> str:
        """The digest of a value, in hexadecimal digits; `name` is what to call it."""
        try:
            return self._digest(value, name).hex()
        except RecursionError:  # deeper than can be followed
            return self._by_type(value, name).hex()

    def of_parts(self, value: Any, name: str) -> dict[str, str]:
        """The digests of what a function is made of, by name; of other values, the one digest."""
        if not isinstance(value, FunctionType) or is_installed(_module_of(value)):
            return {name: self.of(value, name)}
        found = {name: self._code(value.__code__).hex()}
        for part, one in self._parts(value).items():
            # Each by itself, so that one that differs does not make others differ.
            self._numbers = {id(value): (0, value)}
            found[_member(name, part)] = self.of(one, _member(name, part))
        return found

    def _digest(self, value: Any, name: str) -> bytes:
        plain = self._plain(value)
        if plain is not None:
            return plain
        if isinstance(value, (FunctionType, type)):
            return self._numbered(value, name)
        if id(value) in self._within:
            return _joined("again", str(self._within.index(id(value))).encode())
        self._within.append(id(value))
        try:
            return (
                self._container(value, name)
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
        if isinstance(value, (set, frozenset)):
            own = self._members(getattr(value, "__dict__", {}), name)
            return _joined("set", *self._class_of(value, name), *self._sorted(value, name), *own)
        if kind in {dict, MappingProxyType}:
            return _joined("dict", *self._pairs(value.items(), name))
        return None

    def _all(self, values: Iterable[Any], name: str) -> list[bytes]:
        return [self._digest(one, f"{name}[{at}]") for at, one in enumerate(values)]

    def _sorted(self, values: Iterable[Any], name: str) -> list[bytes]:
        """In an order that does not depend on hashes."""
        return sorted(self._apart(one, name) for one in values)

    def _pairs(self, items: Iterable[tuple[Any, Any]], name: str) -> list[bytes]:
        """Of keys and values; their order does not count."""
        keyed = [(self._apart(key, name), key, one) for key, one in items]
        keyed.sort(key=operator.itemgetter(0))
        return [own + self._digest(one, name + self._place(key)) for own, key, one in keyed]

    def _apart(self, value: Any, name: str) -> bytes:
        """Of a value that is met at a moment that is not the same in every program."""
        numbers = self._numbers
        self._numbers = numbers.copy()
        try:
            return self._digest(value, name)
        finally:
            self._numbers = numbers

    def _place(self, key: Any) -> str:
        """What to call the value of a key; the same whatever the addresses of keys are."""
        return f"[{key!r}]" if self._plain(key) is not None else "[...]"

    def _array(self, value: np.ndarray, name: str) -> bytes:
        if written_through(value) is not None:
            self.takes_writes.append(name)
        plain = np.asarray(value)
        if plain.dtype.hasobject:
            own = _joined("objects", repr(value.shape).encode(), *self._all(plain.flat, name))
        else:
            own = array_digest(plain)
        if type(value) in {np.ndarray, np.memmap}:
            return own
        # A subclass may have a mask or a unit beside its values.
        beside = self._members(getattr(value, "__dict__", {}), name)
        return _joined("subclass", own, *self._class_of(value, name), *beside)

    def _class_of(self, value: Any, name: str) -> tuple[bytes]:
        return (self._digest(type(value), f"the class of {name}"),)

    def _members(self, parts: Mapping[str, Any], name: str) -> list[bytes]:
        """Of attributes, in the order of their names."""
        return [
            _joined(part, self._digest(value, _member(name, part)))
            for part, value in sorted(parts.items())
        ]

    def _callable(self, value: Any, name: str) -> bytes | None:
        if isinstance(value, CodeType):
            return self._code(value)
        for kind, parts in _MADE_OF.items():
            if isinstance(value, kind):
                members = {part: getattr(value, part) for part in parts}
                of = self._class_of(value, name)
                return _joined(kind.__name__, *of, *self._members(members, name))
        if _is_kernel(value):
            options = vars(value).get("targetoptions", {})
            return _joined("compiled", *self._members({"func": value.py_func, "": options}, name))
        if isinstance(value, BuiltinFunctionType):
            own = self._members({"__self__": value.__self__}, name)
            return _joined("builtin", value.__qualname__.encode(), *own)
        if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)):  # places in objects
            return _joined("place", value.__qualname__.encode())
        return None

    def _numbered(self, value: Any, name: str) -> bytes:
        """Of a function or a class: looked at once, for many refer to each other."""
        if id(value) in self._numbers:
            return _joined("number", str(self._numbers[id(value)][0]).encode())
        self._numbers[id(value)] = len(self._numbers), value
        if isinstance(value, FunctionType):
            return self._function(value, name)
        return self._class(value, name)

    def _function(self, function: FunctionType, name: str) -> bytes:
        members = self._members(self._parts(function), name)
        module = _module_of(function)
        if is_installed(module):
            own = _named(module, function.__code__.co_qualname).encode()
            return _joined("installed", own, *members)
        return _joined("function", self._code(function.__code__), *members)

    def _parts(self, function: FunctionType) -> dict[str, Any]:
        """What a function is made of besides its code, by names of which none is another's."""
        found: dict[str, Any] = {
            "default values": function.__defaults__,
            "keyword defaults": function.__kwdefaults__,
        }
        overloads = getattr(function, "registry", None)
        if isinstance(overloads, Mapping):  # of a `singledispatch`; it encloses what it remembers
            found["overloads for types"] = dict(overloads)
        else:
            found |= _enclosed(function)
        return found if is_installed(_module_of(function)) else found | self._read_by(function)

    def _read_by(self, function: FunctionType) -> dict[str, Any]:
        """The global names that a function reads, and the attributes that it reads of modules."""
        found = {}
        for names in _names_read(function.__code__, function.__globals__):
            value, n_used = _resolved(names, function.__globals__)
            if value is not _MISSING:
                label = "" if names[0].startswith(_IMPORT) else "global "
                found[label + ".".join(names[:n_used])] = value
        return found

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

    def _class(self, kind: type, name: str) -> bytes:
        """Of a class of the program."""
        bases = [self._digest(base, f"{name}.{base.__name__}") for base in kind.__bases__]
        members = {key: one for key, one in vars(kind).items() if key not in _OF_EVERY_CLASS}
        if issubclass(kind, enum.Enum):  # members refer to their class: by name and value
            members = {key: one for key, one in members.items() if not _IN_ENUMS.match(key)}
            members |= {name: member.value for name, member in kind.__members__.items()}
        named = f"{kind.__module__}.{kind.__qualname__}".encode()
        of = self._class_of(kind, name)
        return _joined("class", named, *of, *bases, *self._members(members, name))

    def _instance(self, value: Any, name: str) -> bytes | None:
        """Of an object: its class, and what decides what it does."""
        if isinstance(value, os.PathLike):
            return _joined("path", os.fsencode(value))
        if isinstance(value, enum.Enum):
            members = {"name": value.name, "value": value.value}
            return _joined("member", *self._class_of(value, name), *self._members(members, name))
        deciding = getattr(type(value), "_taskcarrier_deciding", None)
        if deciding is not None:
            state = {one: getattr(value, one) for one in deciding}
            kind = type(value).__qualname__.encode()
            return _joined("of ours", kind, *self._members(state, name))
        return self._sent(value, name)

    def _sent(self, value: Any, name: str) -> bytes | None:
        """Of what pickle would send of an object; None if it cannot be pickled."""
        try:
            sent = _reduced(value)
        except RecursionError:
            raise
        except Exception as error:
            if is_of_the_program(error):
                raise
            return None
        if isinstance(sent, str):
            return _joined("named", sent.encode())
        make, args, state, items, pairs = (*sent, None, None, None)[:5]
        own = [*self._class_of(value, name), self._digest(make, name), *self._all(args, name)]
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # noqa: PLR2004  # a dict or None, and values of slots
            state = {**(state[0] or {}), **state[1]}
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            own += self._members(state, name)
        else:
            own.append(self._digest(state, name))
        own.append(_joined("items", *self._all(items or (), name)))
        if isinstance(value, OrderedDict):
            own += self._all(map(list, pairs or ()), name)
        else:
            own += self._pairs(pairs or (), name)
        return _joined("object", *own)

    def _by_type(self, value: Any, name: str) -> bytes:
        self._note(name, value)
        return _joined("type", *self._class_of(value, name))

    def _note(self, name: str, value: Any) -> None:
        what = f"{name} ({type(value).__module__}.{type(value).__qualname__})"
        if what not in self.not_looked_into:
            self.not_looked_into.append(what)


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
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}


# What the class of an enumeration holds besides what was written in it.
_IN_ENUMS = re.compile("_[^_].*_$")


def _reduced(value: Any) -> Any:
    """What pickle would make of an object: a name, or how to make it."""
    registered = copyreg.dispatch_table.get(type(value))
    sent = value.__reduce_ex__(4) if registered is None else registered(value)
    if not isinstance(sent, str):
        return sent
    module = getattr(value, "__module__", None)
    if module is None:  # ufuncs of packages tell their name alone
        modules = list(sys.modules.values())
        if not any(getattr(one, "__dict__", {}).get(sent) is value for one in modules):
            raise pickle.PicklingError(f"{sent} is the name of nothing")
        return sent
    if operator.attrgetter(sent)(sys.modules[module]) is not value or not is_installed(module):
        raise pickle.PicklingError(f"{module}.{sent} may be another one in another program")
    return _named(module, sent)


def _is_kernel(value: Any) -> bool:
    """Whether it was compiled by numba from a function of Python."""
    of_numba = type(value).__module__.partition(".")[0] == "numba"
    return of_numba and isinstance(getattr(value, "py_func", None), FunctionType)


def _name_of(value: Any) -> str | None:
    """What a value is called that is the same wherever it has that name; None for others."""
    if isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, np.ufunc):
        name = str(value.__name__)
        return _named("numpy", name) if getattr(np, name, None) is value else None
    if isinstance(value, ModuleType):
        return _named(value.__name__) if is_installed(value.__name__) else None
    if isinstance(value, type) or (
        isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, (type, ModuleType))
    ):
        module = value.__module__
        return _named(module, value.__qualname__) if is_installed(module) else None
    return None


def _named(module: str, *name: str) -> str:
    """A name in an installed module, with the version of its package."""
    package = sys.modules.get(module.partition(".")[0])
    return f"{'.'.join([module, *name])} {getattr(package, '__version__', '')}"


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or an installed package, and not to the program."""
    if module is None or module == "__main__":
        return False
    package = module.partition(".")[0]
    if package in {*sys.builtin_module_names, __name__.partition(".")[0]}:
        return True
    origin = _origin(package)
    if origin is None:
        return package in sys.stdlib_module_names
    return origin.startswith(_OF_PYTHON) or not _SITES.isdisjoint(origin.split(os.sep))


_SITES = {"site-packages", "dist-packages"}
_OF_PYTHON = sysconfig.get_path("stdlib") + os.sep


def _origin(package: str) -> str | None:
    """The file or folder of a module that can be imported; None if there is none such."""
    found = sys.modules.get(package)
    if found is None:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            return None
        return None if spec is None else spec.origin
    return getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)


def _member(name: str, part: str) -> str:
    return f"{name}: {part}" if " " in part else f"{name}.{part}"


def _module_of(function: FunctionType) -> str:
    """Where a function was written, whatever its ``__module__`` says of it."""
    return str(function.__globals__.get("__name__"))


def _enclosed(function: FunctionType) -> dict[str, Any]:
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
# Stands for what a function is going to import from a module of the program.
_UNIMPORTED = ModuleType("not imported yet")


def _resolved(names: tuple[str, ...], names_of: Mapping[str, Any]) -> tuple[Any, int]:
    """What the first of some names refer to, and how many; attributes of modules alone count."""
    if names[0].startswith(_IMPORT):
        module = names[0].removeprefix(_IMPORT)
        value = sys.modules.get(module, _MISSING if is_installed(module) else _UNIMPORTED)
    else:
        value = names_of.get(names[0], _MISSING)
    n_used = 1
    while (
        n_used < len(names) and isinstance(value, ModuleType) and not is_installed(value.__name__)
    ):
        value = getattr(value, names[n_used], _UNIMPORTED)
        n_used += 1
    return value, n_used


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

"""What a Python function consists of, besides its code.

That is its defaults and attributes, the values in its closure, and every global name that it reads
(for a module of the program: the attributes that it reads from it). Modules of the program that it
imports are imported here if they are not imported yet.
"""

from __future__ import annotations

import builtins
import dis
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from taskcarrier.arrays.resume.attributes import get_attributes
from taskcarrier.arrays.resume.installed import describe_installed, is_installed
from taskcarrier.system.interrupts import is_raised_by_handler

_SINGLEDISPATCH_CODE = functools.singledispatch(len).__code__  # type: ignore[attr-defined]  # a function


def get_function_parts(function: FunctionType) -> dict[str, Any]:
    """Return what a function consists of besides its code, under names that cannot clash."""
    parts: dict[str, Any] = {
        "default values": function.__defaults__,
        "keyword defaults": function.__kwdefaults__,
    }
    attributes = get_attributes(function)
    if function.__code__ is _SINGLEDISPATCH_CODE:  # its closure holds a cache
        standard = get_attributes(functools.singledispatch(len)).keys() - {"registry"}
        attributes = {name: v for name, v in attributes.items() if name not in standard}
        return {**parts, **attributes}
    if not is_installed(get_function_module(function)):
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


def get_function_module(function: FunctionType) -> str:
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
        value = describe_installed(module) if is_installed(module) else _import_module(module)
    else:
        value = namespace.get(names[0], vars(builtins).get(names[0], _MISSING))
    n_used = 1
    while (
        n_used < len(names)
        and isinstance(value, ModuleType)
        and not is_installed(get_attributes(value).get("__name__"))
    ):
        value = get_attributes(value).get(names[n_used], _NOT_YET)
        n_used += 1
    return value, n_used


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

"""Verbs: functions and methods that take options, with what `taskcarrier.options` says of these.

A verb is defined with ``**options``. Its signature, its docstring, its defaults and the check for
options that it does not have are made from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, Signature, cleandoc, signature
from typing import Any, NamedTuple, TypeVar

from taskcarrier.options import REQUIRED, UNSET, WorkerOptions

F = TypeVar("F", bound=Callable[..., Any])

# What docstrings say in the source, and what is shown in its place.
_OPTIONS = "**options\n    See `taskcarrier.options`."
_ARRAYS = "*arrays : array_like\n    One or several arrays of equal length along the mapped axis."
_ALL_OF_ARRAYS = """*arrays : array_like
    One or several arrays of equal length along the mapped axis, of any layout and dtype. Workers
    map paths that end in ``.npy`` and memmaps; these are never copied. Neither are arrays from
    `share`, `empty` and `load`, results of earlier maps in processes, and views of all of these.
    Threads see other arrays as views, and processes read them range by range. Where ranges are
    not contiguous in memory (columns of an array in C order), processes need one copy of the
    array. zarr arrays and the like (a ``dtype``, a ``shape``, slicing) are read by range in every
    worker. pandas and xarray objects become their values, and subclasses of ndarray become
    base-class arrays (a unit, for example, is lost). Arrays of Python objects are pickled by range
    for processes."""
_EXAMPLES = "Examples\n--------\n"

# What other libraries call our options.
_OTHER_WORDS = {
    **dict.fromkeys(("chunk_size", "chunks"), "chunksize"),
    **dict.fromkeys(("n_workers", "workers", "max_workers", "processes"), "n_jobs"),
    "verbose": "verbosity",
}
# Options of mappers, which verbs do not have, with where they are given.
_OF_MAPPERS = {
    **dict.fromkeys(("n_jobs", "backend", "verbosity", "temp_folder"), "is given to the mapper"),
    "balance": "is the mapper's: StaticParallelMapper or DynamicParallelMapper",
}


class Option(NamedTuple):
    """One option, as signatures and docstrings show it."""

    default: object
    parameter: Parameter
    description: str

    @classmethod
    def from_entry(cls, name: str, entry: Any, defaults: Mapping[str, object]) -> Option:
        """Make an option of an entry of the table; `defaults` may have another default for it."""
        default = defaults.get(name, entry.__metadata__[0])
        if default is REQUIRED:
            ending = "\n"
        elif default is None or default is UNSET or default == ():
            ending = ", optional\n"
        else:
            ending = (
                f', default "{default}"\n' if isinstance(default, str) else f", default {default}\n"
            )
        text = entry.__metadata__[1].replace("\n", ending, 1).replace("\n        ", "\n    ")
        kind = Parameter.KEYWORD_ONLY
        parameter = Parameter(name, kind, default=default, annotation=entry.__origin__)
        return cls(default, parameter, f"{name} : {text}")


class Verb:
    """A function that takes options, as its callers see it.

    Parameters
    ----------
    name : str
        What errors call it.
    options : dict of Option
        Its options by name.
    docstring : str
        Its docstring as in the source; by default, it is that of the function.
    """

    def __init__(self, name: str, options: Mapping[str, Option], docstring: str = "") -> None:
        self._name = name
        self._options = options
        self._docstring = docstring
        self._defaults = {each: option.default for each, option in options.items()}
        self._required = [name for name, each in options.items() if each.default is REQUIRED]
        self._known: list[str] = []

    @classmethod
    def from_groups(cls, name: str, *groups: Any, **defaults: object) -> Verb:
        """Make a verb that has the options of classes in `taskcarrier.options`.

        `defaults` are those that differ from the table.
        """
        return cls(
            name,
            {
                option: Option.from_entry(option, entry, defaults)
                for group in groups
                for option, entry in group.__annotations__.items()
            },
        )

    def for_mapper(self) -> Verb:
        """Return the same verb as a method of mappers, which decide themselves where work is done.

        Its docstring is that of the function, without the examples.
        """
        decided = WorkerOptions.__annotations__
        options = {name: each for name, each in self._options.items() if name not in decided}
        text = self._docstring.partition(_EXAMPLES)[0]
        docstring = f"{text}{_EXAMPLES}See `taskcarrier.{self._name}`.\n"
        return Verb(f"{self._name} of a mapper", options, docstring)

    def document(self, function: F) -> F:
        """Give a function the signature and the docstring that its options make."""
        own = [
            each
            for each in signature(function).parameters.values()
            if each.kind is not Parameter.VAR_KEYWORD
        ]
        names = {each.name for each in own}
        parameters = own + [
            each.parameter for name, each in self._options.items() if name not in names
        ]
        self._known = [
            each.name
            for each in parameters
            if each.kind is Parameter.KEYWORD_ONLY or each.default is not REQUIRED
        ]
        if not self._docstring:
            self._docstring = cleandoc(function.__doc__ or "").replace(_ARRAYS, _ALL_OF_ARRAYS)
        descriptions = "\n".join(option.description for option in self._options.values())
        function.__doc__ = self._docstring.replace(_OPTIONS, descriptions) or None
        shown: Any = function
        shown.__signature__ = Signature(parameters, __validate_parameters__=False)
        return function

    def fill(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Return the options of a call and the other defaults.

        Raise a `TypeError` if an option does not exist, or if one is missing.
        """
        filled: dict[str, Any] = {**self._defaults, **options}
        if len(filled) > len(self._defaults):
            unknown = next(name for name in options if name not in self._defaults)
            raise make_unknown_error(self._name, unknown, self._known)
        for name in self._required:
            if name not in options:
                function = self._name.partition(" ")[0]
                raise TypeError(f"{function}() missing 1 required keyword-only argument: {name!r}")
        return filled


def make_unknown_error(verb: str, name: str, known: Collection[str]) -> TypeError:
    """Return the error for an option that does not exist, with the one that may be meant."""
    meant = _OTHER_WORDS.get(name, name)
    if meant in known:
        advice = f" (did you mean {meant!r}?)"
    elif meant in _OF_MAPPERS:
        advice = f" ({meant} {_OF_MAPPERS[meant]})"
    else:
        from difflib import get_close_matches  # noqa: PLC0415  # rarely needed

        advice = "".join(f" (did you mean {one!r}?)" for one in get_close_matches(name, known, 1))
    return TypeError(f"{verb} has no option {name!r}{advice}; it has {', '.join(known)}")

"""How an exception travels from a worker to the caller.

Pickle leaves out what an exception leads to (its cause and its context) and calls the class again,
with arguments that may not be those of the class. Here the exception goes with all that it leads
to, and each is made again by what Python's own class for it does, without calling the user's
``__init__`` or ``__setattr__``. An exception that defines how it is pickled is pickled so. One that
cannot be sent is replaced by a `TaskError`, alone: what leads to it, or is led to, comes as it is.

Tracebacks stay behind. Their text is the cause of the last exception that Python would show.
"""

from __future__ import annotations

import copyreg
import operator
import pickle
import traceback
from collections.abc import Iterator
from types import MemberDescriptorType
from typing import Any

from taskcarrier.errors import TaskError, WorkerTracebackError
from taskcarrier.notes import text_of
from taskcarrier.system.exceptions import collect_related, get_plainly, set_plainly
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.pickling import Pickler, dumps, unpickle_items

_Link = tuple[int | None, int | None, bool]
"""Cause and context of an exception by their numbers, and whether the context is not shown."""


def pickle_error(error: BaseException) -> bytes:
    """An exception, what it leads to, and the text of its traceback."""
    errors = collect_related(error)
    numbers = {id(one): number for number, one in enumerate(errors)}

    def number(one: BaseException | None) -> int | None:
        return None if one is None else numbers[id(one)]

    links = [
        (
            number(get_plainly(one, "__cause__")),
            number(get_plainly(one, "__context__")),
            get_plainly(one, "__suppress_context__"),
        )
        for one in errors
    ]
    try:
        packed = _pickle_all(errors, links)
    except Exception:  # noqa: BLE001  # whatever pickling a user's object raises; see below
        stand_ins: dict[int, BaseException] = {}
        try:
            packed = _pickle_all([_sendable(one, stand_ins) for one in errors], links)
        except Exception as trouble:  # noqa: BLE001  # groups in groups, or it is not always the same
            packed = _pickle_all([_stand_in(error, trouble)], [(None, None, True)])
    return pickle.dumps((packed, _traceback_of(error), _name_of(error)))


def unpickle_error(packed: bytes) -> BaseException:
    """The exception of a worker, in the caller."""
    packed_errors, text, type_name = pickle.loads(packed)
    error: BaseException
    try:
        errors, links = unpickle_items(packed_errors)
    except Exception as trouble:
        if is_of_the_program(trouble):
            raise
        # It survived in the worker, not here.
        error = TaskError(
            "an exception arrived from the worker that cannot be read here "
            f"({type(trouble).__name__}: {text_of(trouble)})",
            type_name,
        )
    else:
        for one, (cause, context, is_suppressed) in zip(errors, links, strict=True):
            set_plainly(one, "__cause__", None if cause is None else errors[cause])
            set_plainly(one, "__context__", None if context is None else errors[context])
            set_plainly(one, "__suppress_context__", is_suppressed)
        error = errors[0]
    set_plainly(_last_shown(error), "__cause__", WorkerTracebackError(text))
    return error


def pickle_warning(worker_warning: object) -> bytes:
    """A warning, which is an exception too, and where it was given."""
    packed = dumps(worker_warning, pickler=_ErrorPickler)
    unpickle_items(packed)
    return packed


def _pickle_all(errors: list[BaseException], links: list[_Link]) -> bytes:
    """The pickle, which has been read once."""
    packed = dumps((errors, links), pickler=_ErrorPickler)
    for one in unpickle_items(packed)[0]:
        if not isinstance(one, BaseException):
            raise TypeError("it unpickles as something else")
    return packed


def _sendable(error: BaseException, known: dict[int, BaseException]) -> BaseException:
    """The exception if it can be sent alone, else what is sent instead."""
    if id(error) not in known:
        known[id(error)] = _replace_unsendable(error, known)
    return known[id(error)]


def _replace_unsendable(error: BaseException, known: dict[int, BaseException]) -> BaseException:
    try:
        _pickle_all([error], [])
    except Exception as trouble:  # noqa: BLE001  # whatever pickling a user's object raises
        if isinstance(error, BaseExceptionGroup):
            members = [_sendable(one, known) for one in error.exceptions]
            if any(map(operator.is_not, members, error.exceptions)):
                group = BaseExceptionGroup(error.message, members)
                for note in getattr(error, "__notes__", ()):
                    group.add_note(note)
                return group
        return _stand_in(error, trouble)
    return error


def _stand_in(error: BaseException, trouble: Exception) -> TaskError:
    """What is sent instead of an exception that cannot be."""
    return TaskError(
        f"{type(error).__qualname__}: {text_of(error)} (the exception itself could not be sent "
        f"from the worker: {type(trouble).__name__}: {text_of(trouble)})",
        _name_of(error),
    )


def _name_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _traceback_of(error: BaseException) -> str:
    """What Python would print of it."""
    try:
        lines = traceback.format_exception(error)
    except Exception:  # noqa: BLE001  # attributes of a user's class may raise anything
        lines = traceback.format_tb(get_plainly(error, "__traceback__"))
        lines.append(f"{_name_of(error)}: {text_of(error)}")
    return "".join(lines).rstrip()


def _last_shown(error: BaseException) -> BaseException:
    """The last exception of the chain that Python prints, which may be a ring."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        cause, context = get_plainly(error, "__cause__"), get_plainly(error, "__context__")
        if cause is None and get_plainly(error, "__suppress_context__"):
            break
        following = context if cause is None else cause
        if following is None or id(following) in seen:
            break
        error = following
    return error


class _ErrorPickler(Pickler):
    """Pickles exceptions by what they hold."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            reduced = _reduce(obj)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def _reduce(error: BaseException) -> tuple[Any, ...] | None:
    """How an exception is pickled whose class leaves that to Python; None for others."""
    kind = type(error)
    own = _own_class(kind)
    if (
        kind in copyreg.dispatch_table
        or kind.__reduce__ is not own.__reduce__
        or kind.__reduce_ex__ is not object.__reduce_ex__
    ):
        return None
    reduced: Any = error.__reduce__()
    _, args, *state = reduced
    if kind.__setstate__ is not own.__setstate__:
        return _recreate, (kind, args), *state
    held = {**(state[0] if state else {}), **dict(_list_slots(error))}
    return _recreate, (kind, args), held, None, None, _fill


_HEAP_TYPE = 1 << 9  # the interpreter's mark of classes that are made when a program runs


def _own_class(kind: type) -> Any:
    """Python's own class that decides how its instances lie in memory."""
    # Not told by the module: a class of the program may say that it is one of the builtins.
    while kind.__flags__ & _HEAP_TYPE:
        assert kind.__base__ is not None  # for the type checker: `object` is a builtin
        kind = kind.__base__
    return kind


def _list_slots(error: BaseException) -> Iterator[tuple[str, Any]]:
    """What ``__slots__`` of its classes hold, by name."""
    for kind in type(error).__mro__:
        if "__slots__" in vars(kind):
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType) and hasattr(error, name):
                    yield name, getattr(error, name)


def _recreate(kind: type, args: tuple[Any, ...]) -> BaseException:
    own = _own_class(kind)
    error: BaseException = own.__new__(kind, *args)
    own.__init__(error, *args)
    return error


def _fill(error: BaseException, held: dict[str, Any]) -> None:
    for name, value in held.items():
        set_plainly(error, name, value)

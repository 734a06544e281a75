"""How an exception travels from a worker to the caller.

Pickle leaves out the exceptions that an exception refers to (its cause and its context), and it
calls the class again, with arguments that may not fit. Here an exception is sent with all those
that it refers to. Each is made again by the methods of its built-in base class, without a call of
the user's ``__init__`` or ``__setattr__``. If the user's class defines how it is pickled, that is
done instead. An exception that cannot be sent is replaced by a `TaskError`; those that refer to it,
and those that it refers to, arrive as they are.

Tracebacks are not sent. Their text becomes the cause of the last exception that Python would show.
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
from taskcarrier.notes import get_text
from taskcarrier.system.exceptions import collect_related, get_base_attribute, set_base_attribute
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.introspect import is_made_at_run_time
from taskcarrier.workers.pickling import Pickler, dumps, unpickle_items

_Link = tuple[int | None, int | None, bool]
"""The numbers of an exception's cause and context, and whether the context is not shown."""


def pickle_error(error: BaseException) -> bytes:
    """Pickle an exception, those that it refers to, and the text of its traceback."""
    errors = collect_related(error)
    numbers = {id(related): number for number, related in enumerate(errors)}

    def get_number(related: BaseException | None) -> int | None:
        return None if related is None else numbers[id(related)]

    links = [
        (
            get_number(get_base_attribute(related, "__cause__")),
            get_number(get_base_attribute(related, "__context__")),
            get_base_attribute(related, "__suppress_context__"),
        )
        for related in errors
    ]
    try:
        packed = _pickle_all(errors, links)
    except Exception:  # noqa: BLE001  # a user's object may raise anything when it is pickled
        replacements: dict[int, BaseException] = {}
        try:
            packed = _pickle_all([_make_sendable(each, replacements) for each in errors], links)
        except Exception as trouble:  # noqa: BLE001  # groups in groups, or pickling is not repeatable
            packed = _pickle_all([_make_stand_in(error, trouble)], [(None, None, True)])
    return pickle.dumps((packed, _traceback_of(error), _name_of(error)))


def unpickle_error(packed: bytes) -> BaseException:
    """Return the exception that a worker has pickled by `pickle_error`."""
    packed_errors, text, type_name = pickle.loads(packed)
    error: BaseException
    try:
        errors, links = unpickle_items(packed_errors)
    except Exception as trouble:
        if is_raised_by_handler(trouble):
            raise
        # The worker could read it, but this process cannot.
        error = TaskError(
            "an exception arrived from the worker that cannot be read here "
            f"({type(trouble).__name__}: {get_text(trouble)})",
            type_name,
        )
    else:
        for related, (cause, context, is_suppressed) in zip(errors, links, strict=True):
            set_base_attribute(related, "__cause__", None if cause is None else errors[cause])
            set_base_attribute(related, "__context__", None if context is None else errors[context])
            set_base_attribute(related, "__suppress_context__", is_suppressed)
        error = errors[0]
    set_base_attribute(_find_last_shown(error), "__cause__", WorkerTracebackError(text))
    return error


def pickle_warning(worker_warning: object) -> bytes:
    """Pickle a warning (which is an exception too) with the place where it was given.

    Raise if it cannot be pickled, or cannot be read again.
    """
    packed = dumps(worker_warning, pickler=_ErrorPickler)
    unpickle_items(packed)
    return packed


def _pickle_all(errors: list[BaseException], links: list[_Link]) -> bytes:
    """Return the pickle of these exceptions, after a trial that it can be read."""
    packed = dumps((errors, links), pickler=_ErrorPickler)
    for error in unpickle_items(packed)[0]:
        if not isinstance(error, BaseException):
            raise TypeError("it unpickles as something else")
    return packed


def _make_sendable(error: BaseException, known: dict[int, BaseException]) -> BaseException:
    """Return the exception if it can be sent on its own, else a replacement.

    Each is tried once: `known` holds what was returned, by the `id` of the exception.
    """
    if id(error) not in known:
        known[id(error)] = _replace_unsendable(error, known)
    return known[id(error)]


def _replace_unsendable(error: BaseException, known: dict[int, BaseException]) -> BaseException:
    try:
        _pickle_all([error], [])
    except Exception as trouble:  # noqa: BLE001  # a user's object may raise anything when it is pickled
        if isinstance(error, BaseExceptionGroup):
            members = [_make_sendable(member, known) for member in error.exceptions]
            if any(map(operator.is_not, members, error.exceptions)):
                group = BaseExceptionGroup(error.message, members)
                for note in getattr(error, "__notes__", ()):
                    group.add_note(note)
                return group
        return _make_stand_in(error, trouble)
    return error


def _make_stand_in(error: BaseException, trouble: Exception) -> TaskError:
    """Return the `TaskError` that is sent instead of an exception that cannot be sent."""
    return TaskError(
        f"{type(error).__qualname__}: {get_text(error)} (the exception itself could not be sent "
        f"from the worker: {type(trouble).__name__}: {get_text(trouble)})",
        _name_of(error),
    )


def _name_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _traceback_of(error: BaseException) -> str:
    """Return the text that Python would print for the exception."""
    try:
        lines = traceback.format_exception(error)
    except Exception:  # noqa: BLE001  # attributes of a user's class may raise anything
        lines = traceback.format_tb(get_base_attribute(error, "__traceback__"))
        lines.append(f"{_name_of(error)}: {get_text(error)}")
    return "".join(lines).rstrip()


def _find_last_shown(error: BaseException) -> BaseException:
    """Return the last exception of the chain that Python prints; the chain may be a ring."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        cause, context = (
            get_base_attribute(error, "__cause__"),
            get_base_attribute(error, "__context__"),
        )
        if cause is None and get_base_attribute(error, "__suppress_context__"):
            break
        following = context if cause is None else cause
        if following is None or id(following) in seen:
            break
        error = following
    return error


class _ErrorPickler(Pickler):
    """A pickler that sends exceptions as their arguments and attributes."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            reduced = _reduce(obj)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def _reduce(error: BaseException) -> tuple[Any, ...] | None:
    """Reduce an exception to its contents; return None if its class defines how it is pickled."""
    kind = type(error)
    builtin = _find_builtin_base(kind)
    if (
        kind in copyreg.dispatch_table
        or kind.__reduce__ is not builtin.__reduce__
        or kind.__reduce_ex__ is not object.__reduce_ex__
    ):
        return None
    reduced: Any = error.__reduce__()
    _, args, *state = reduced
    if kind.__setstate__ is not builtin.__setstate__:
        return _recreate, (kind, args), *state
    attributes = {**(state[0] if state else {}), **dict(_list_slots(error))}
    return _recreate, (kind, args), attributes, None, None, _set_attributes


def _find_builtin_base(kind: type) -> Any:
    """Return the built-in class that decides how instances of `kind` lie in memory."""
    # `__module__` is no proof: a class of the program may claim to be one of the builtins.
    while is_made_at_run_time(kind):
        assert kind.__base__ is not None  # for the type checker: `object` is a builtin
        kind = kind.__base__
    return kind


def _list_slots(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Yield names and values of all ``__slots__`` that are set, of all classes of the exception."""
    for kind in type(error).__mro__:
        if "__slots__" in vars(kind):
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType) and hasattr(error, name):
                    yield name, getattr(error, name)


def _recreate(kind: type, args: tuple[Any, ...]) -> BaseException:
    builtin = _find_builtin_base(kind)
    error: BaseException = builtin.__new__(kind, *args)
    builtin.__init__(error, *args)
    return error


def _set_attributes(error: BaseException, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        set_base_attribute(error, name, value)

"""What is added to the user's exceptions, which may refuse it.

A frozen dataclass can be an exception, and so can a class whose ``__setattr__`` raises. Python
itself reads and sets their cause, context and traceback without asking the class; so do `plainly`
and `set_plainly`.
"""

from __future__ import annotations

from typing import Any, NoReturn

from taskcarrier.interrupts import is_of_the_program


def plainly(error: BaseException, name: str) -> Any:
    """An attribute that every exception has, as if its class had no ``__getattribute__``."""
    return BaseException.__getattribute__(error, name)


def set_plainly(error: BaseException, name: str, value: object) -> None:
    """Set an attribute as if the exception's class had no ``__setattr__``."""
    BaseException.__setattr__(error, name, value)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to a user's exception, whatever its class does about attributes.

    One that wants no notes (it has an `add_note` that raises, or ``__notes__`` of its own) stays
    what it is.
    """
    try:
        try:
            error.add_note(note)
        except Exception as trouble:
            if is_of_the_program(trouble):
                raise
            if type(error).add_note is BaseException.add_note:
                set_plainly(error, "__notes__", [*getattr(error, "__notes__", []), note])
    except Exception as trouble:
        if is_of_the_program(trouble):
            raise


def text_of(error: BaseException) -> str:
    """The exception's text, whatever its ``__str__`` does."""
    try:
        return str(error)
    except Exception as trouble:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<str() raised {type(trouble).__name__}>"


def related(error: BaseException) -> list[BaseException]:
    """The exception, and all that it leads to once: causes, contexts, members of groups."""
    found = {id(error): error}
    errors = [error]
    for one in errors:  # grows meanwhile
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for following in (plainly(one, "__cause__"), plainly(one, "__context__"), *members):
            if following is not None and id(following) not in found:
                found[id(following)] = following
                errors.append(following)
    return errors


def raise_again(error: BaseException) -> NoReturn:
    """Raise an exception that was raised before, with the context that it had there.

    Python would put in its place what the caller is handling just now.
    """
    context = plainly(error, "__context__")
    try:
        raise error
    finally:
        if context is not None:
            set_plainly(error, "__context__", context)
        # The traceback refers to this frame, which must not refer to the error.
        del error, context


# What errors say of read-only arrays: numba's, which are TypeErrors, then NumPy's ValueErrors.
_OF_READ_ONLY = (("Cannot modify readonly", "No matching definition"), ("read-only",))


CARRIED = (
    "what every call is to write to must be made by taskcarrier.empty or share (or be a memmap) "
    "and be carried by func: enclosed by it, or functools.partial(func, array)"
)
"""What to do instead of writing to read-only arrays."""


def is_of_read_only(error: BaseException) -> bool:
    """Whether an error says that an array is read-only."""
    if not isinstance(error, (ValueError, TypeError)):
        return False
    text = text_of(error)
    return any(words in text for words in _OF_READ_ONLY[isinstance(error, ValueError)])

"""Attributes of the user's exceptions, whatever their classes do about attributes."""

from __future__ import annotations

from typing import Any, NoReturn


def get_plainly(error: BaseException, name: str) -> Any:
    """An attribute that every exception has, as if its class had no ``__getattribute__``."""
    return BaseException.__getattribute__(error, name)


def set_plainly(error: BaseException, name: str, value: object) -> None:
    """Set an attribute as if the exception's class had no ``__setattr__``."""
    BaseException.__setattr__(error, name, value)


def collect_related(error: BaseException) -> list[BaseException]:
    """The exception, and all that it leads to once: causes, contexts, members of groups."""
    found = {id(error): error}
    errors = [error]
    for one in errors:  # grows meanwhile
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for following in (get_plainly(one, "__cause__"), get_plainly(one, "__context__"), *members):
            if following is not None and id(following) not in found:
                found[id(following)] = following
                errors.append(following)
    return errors


def raise_again(error: BaseException) -> NoReturn:
    """Raise an exception that was raised before, with the context that it had there.

    Python would put in its place what the caller is handling just now.
    """
    context = get_plainly(error, "__context__")
    try:
        raise error
    finally:
        if context is not None:
            set_plainly(error, "__context__", context)
        # The traceback refers to this frame, which must not refer to the error.
        del error, context

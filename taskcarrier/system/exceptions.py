"""Access to attributes of the user's exceptions, even if their classes override it."""

from __future__ import annotations

from typing import Any, NoReturn


def get_base_attribute(error: BaseException, name: str) -> Any:
    """Return an attribute that every exception has, without a ``__getattribute__`` of its class."""
    return BaseException.__getattribute__(error, name)


def set_base_attribute(error: BaseException, name: str, value: object) -> None:
    """Set an attribute of an exception, without a ``__setattr__`` of its class."""
    BaseException.__setattr__(error, name, value)


def collect_related(error: BaseException) -> list[BaseException]:
    """Return an exception and, once each, all its causes, contexts and members of groups."""
    seen = {id(error): error}
    errors = [error]
    for each in errors:  # the list grows in the loop
        members = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        for inner in (
            get_base_attribute(each, "__cause__"),
            get_base_attribute(each, "__context__"),
            *members,
        ):
            if inner is not None and id(inner) not in seen:
                seen[id(inner)] = inner
                errors.append(inner)
    return errors


def raise_again(error: BaseException) -> NoReturn:
    """Raise an exception that was raised before, with the context that it had then.

    Python would replace this context by the exception that the caller is handling now.
    """
    context = get_base_attribute(error, "__context__")
    try:
        raise error
    finally:
        if context is not None:
            set_base_attribute(error, "__context__", context)
        # The traceback refers to this frame, which must not refer to the error.
        del error, context

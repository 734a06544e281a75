"""Odd exceptions, values that raise them, and what exceptions say."""

import dataclasses
import threading


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Takes no attributes after its making."""

    code: int
    text: str = dataclasses.field(kw_only=True)


class SlottedError(Exception):
    """Takes attributes at its making only, in slots and elsewhere."""

    __slots__ = ("__code", "left_empty")

    def __init__(self, code):
        object.__setattr__(self, "_SlottedError__code", code)
        object.__setattr__(self, "elsewhere", [code])

    def __setattr__(self, name, value):
        raise TypeError("no attributes")

    @property
    def code(self):
        return self.__code


class HoldingError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class StubbornError(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("I stay")


class SpeechlessError(StubbornError):
    """Cannot be pickled, and has no text."""

    def __str__(self):
        raise ZeroDivisionError


class Unreadable:
    """A value that is an error where its pickle is read."""

    def __init__(self, kind=ValueError, text="cannot be read"):
        self.kind, self.text = kind, text

    def __reduce__(self):
        return _fail, (self.kind, self.text)


def _fail(kind, text):
    """Raise an error of a kind."""
    raise kind(text)


def throw(error, *cause):
    """Raise an error, maybe from a cause."""
    if cause:
        raise error from cause[0]
    raise error


def said(error):
    """Return all that an error says: its text and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])

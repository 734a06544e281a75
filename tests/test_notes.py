"""Notes on exceptions that refuse them, and exceptions that are raised again."""

import pytest

from taskcarrier.notes import add_note, get_text
from taskcarrier.system.exceptions import collect_related, raise_again
from tests.errors import FrozenError, SlottedError, SpeechlessError


class NotelessError(Exception):
    def add_note(self, note):
        raise RuntimeError("no notes")


class OwnNotesError(Exception):
    @property
    def __notes__(self):
        raise RuntimeError("mine")


@pytest.mark.parametrize("error", [ValueError(3), FrozenError(3, text="x"), SlottedError(3)])
def test_notes_reach_exceptions_that_refuse_attributes(error):
    add_note(error, "one")
    add_note(error, "two")
    assert error.__notes__ == ["one", "two"]


@pytest.mark.parametrize("error", [NotelessError("no"), OwnNotesError("no")])
def test_exceptions_that_refuse_notes_get_none(error):
    add_note(error, "one")
    assert "__notes__" not in vars(error)


def test_an_exception_without_a_text_is_described():
    assert get_text(SpeechlessError()) == "<str() raised ZeroDivisionError>"


def test_related_exceptions_are_found_once():
    cause, context, member = KeyError(), LookupError(), ValueError()
    group = ExceptionGroup("g", [member])
    group.__cause__, group.__context__, member.__context__ = cause, context, cause
    cause.__context__ = group
    assert collect_related(group) == [group, cause, context, member]


def raised_again_while_handling(error, handled):
    try:
        raise handled
    except LookupError:
        raise_again(error)


@pytest.mark.parametrize("error", [ValueError(3), FrozenError(3, text="x")])
def test_an_exception_that_is_raised_again_keeps_its_context(error):
    context = KeyError("there")
    BaseException.__setattr__(error, "__context__", context)
    with pytest.raises(type(error)) as caught:
        raised_again_while_handling(error, LookupError("here"))
    assert caught.value is error
    assert error.__context__ is context
    assert not error.__suppress_context__


def test_an_exception_without_context_gets_that_of_the_caller():
    error, handled = ValueError(3), LookupError("here")
    with pytest.raises(ValueError, match="3"):
        raised_again_while_handling(error, handled)
    assert error.__context__ is handled

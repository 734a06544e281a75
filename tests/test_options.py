"""Each option stands in the table once; every verb that has it shows and describes it."""

import inspect
from typing import TypedDict, is_typeddict

import pytest

from taskcarrier import (
    SerialMapper,
    fit_many,
    map_array,
    map_chunks,
    map_items,
    options,
    predict_array,
    reduce_array,
)

FUNCTIONS = [map_array, map_items, map_chunks, reduce_array, fit_many, predict_array]
METHODS = [
    getattr(SerialMapper, name)
    for name in ("map", "starmap", "imap", "map_array", "map_items", "map_chunks", "reduce_array")
]
VERBS = pytest.mark.parametrize("verb", [*FUNCTIONS, *METHODS], ids=lambda verb: verb.__qualname__)
GROUPS = [one for one in vars(options).values() if is_typeddict(one) and one is not TypedDict]


def described(verb):
    """The names of the parameters in a docstring, in order."""
    section = inspect.getdoc(verb).partition("Parameters\n----------\n")[2]
    lines = section.partition("\nReturns\n")[0].partition("\nYields\n")[0].splitlines()
    heads = [line.split(" : ")[0] for line in lines if line and line[0] != " "]
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


@VERBS
def test_every_parameter_is_described_once_and_in_order(verb):
    names = [name for name in inspect.signature(verb).parameters if name != "self"]
    assert described(verb) == names


@VERBS
def test_docstrings_name_no_table_in_place_of_options(verb):
    assert "**options" not in inspect.getdoc(verb)
    assert "taskcarrier.options" not in inspect.getdoc(verb)


@VERBS
def test_described_defaults_equal_those_of_the_signature(verb):
    text = inspect.getdoc(verb)
    for one in inspect.signature(verb).parameters.values():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{one.name} : ")] or [""]
        if ", default " in line:
            assert line.endswith(f", default {str(one.default).join(quotes(one.default))}")
        elif line.endswith("optional"):
            assert one.default in (None, (), options.UNSET)
        elif line:
            assert one.default is one.empty


def quotes(value):
    return ('"', '"') if isinstance(value, str) else ("", "")


@VERBS
def test_every_option_is_keyword_only_and_has_a_type(verb):
    parameters = inspect.signature(verb).parameters.values()
    assert all(one.kind is not one.VAR_KEYWORD for one in parameters)
    assert all(one.annotation is not one.empty for one in parameters if one.name != "self")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_entry_of_the_table_has_a_default_and_a_description(group):
    for entry in group.__annotations__.values():
        _default, text = entry.__metadata__
        first, *lines = text.splitlines()
        assert first.strip() == first != ""
        assert all(line.startswith(" " * 8) and line[8] != " " for line in lines)
        assert text.endswith(".")


def test_no_option_is_described_twice_in_the_same_words():
    texts = {}
    for group in GROUPS:
        for name, entry in group.__annotations__.items():
            assert texts.setdefault(entry.__metadata__[1], name) == name

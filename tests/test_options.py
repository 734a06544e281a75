"""Each option is described once, and stands in the docstring of every verb that has it."""

import inspect

import pytest

from taskcarrier import map_array, map_chunks, map_items, reduce_array
from taskcarrier.options import DESCRIPTIONS, fill_docstring

VERBS = [map_array, map_items, map_chunks, reduce_array]


def described(verb):
    """The names of the parameters in a docstring, in order."""
    section = inspect.getdoc(verb).partition("Parameters\n----------\n")[2]
    lines = section.partition("\nReturns\n")[0].splitlines()
    return [line.split(" : ")[0].lstrip("*") for line in lines if line and line[0] != " "]


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_is_described_once_and_in_order(verb):
    assert described(verb) == list(inspect.signature(verb).parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_no_placeholder_is_left_in_a_docstring(verb):
    assert not [line for line in verb.__doc__.splitlines() if line.strip().startswith("{")]


@pytest.mark.parametrize("verb", VERBS)
def test_described_defaults_equal_those_of_the_signature(verb):
    text = inspect.getdoc(verb)
    for one in inspect.signature(verb).parameters.values():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{one.name} : ")] or [""]
        if ", default " in line:
            assert line.endswith(f", default {str(one.default).join(quotes(one.default))}")
        elif line:
            assert line.endswith(("optional", "callable"))


def quotes(value):
    return ('"', '"') if isinstance(value, str) else ("", "")


def test_verbs_describe_the_same_option_alike():
    for name in ("axis", "balance", "n_jobs", "backend", "args", "kwargs", "writable"):
        for verb in VERBS:
            assert DESCRIPTIONS[name] in inspect.getdoc(verb)


def test_every_description_is_used():
    texts = [inspect.getdoc(verb) for verb in VERBS]
    for name, description in DESCRIPTIONS.items():
        assert any(description in text for text in texts), name


def test_a_function_without_a_docstring_stays_as_it_is():
    def verb():
        pass

    assert fill_docstring(verb) is verb
    assert verb.__doc__ is None

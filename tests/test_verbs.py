"""What the table of options makes of a function, and the options that it refuses."""

import inspect
import operator

import numpy as np
import pytest

from taskcarrier import (
    SerialMapper,
    StaticParallelMapper,
    fit_many,
    map_array,
    map_chunks,
    map_items,
    predict_array,
    reduce_array,
)
from taskcarrier.options import ChunksOptions, CollectOption, ReductionOptions, WorkerOptions
from taskcarrier.verbs import Verb, make_unknown_error

X = np.arange(4.0)
CALLS = {
    "map_array": lambda **o: map_array(np.sqrt, X, **o),
    "map_items": lambda **o: map_items(np.sqrt, X, **o),
    "map_chunks": lambda **o: map_chunks(len, X, **o),
    "reduce_array": lambda **o: reduce_array(np.sum, X, combine=operator.add, **o),
    "fit_many": lambda **o: fit_many([], X, **o),
    "predict_array": lambda **o: predict_array(None, X, **o),
    "map of a mapper": lambda **o: SerialMapper().map(len, ["a"], **o),
    "starmap of a mapper": lambda **o: SerialMapper().starmap(len, [("a",)], **o),
    "imap of a mapper": lambda **o: SerialMapper().imap(len, ["a"], **o),
    "map_array of a mapper": lambda **o: SerialMapper().map_array(np.sqrt, X, **o),
    "map_items of a mapper": lambda **o: SerialMapper().map_items(np.sqrt, X, **o),
    "map_chunks of a mapper": lambda **o: SerialMapper().map_chunks(len, X, **o),
    "reduce_array of a mapper": lambda **o: SerialMapper().reduce_array(np.sum, X, **o),
    "a mapper": StaticParallelMapper,
}


@pytest.fixture
def verb():
    return Verb.from_groups(
        "verb", ReductionOptions, WorkerOptions, CollectOption, balance="dynamic"
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("option", ["chunk_size", "chunks", "colour"])
def test_an_unknown_option_is_refused_by_the_name_of_the_verb(name, option):
    with pytest.raises(TypeError) as caught:
        CALLS[name](**{option: 1})
    text = str(caught.value)
    assert text.startswith(f"{name} has no option {option!r}")
    assert "; it has " in text
    if name != "fit_many":  # it has no chunks
        assert ("(did you mean 'chunksize'?)" in text) == (option != "colour")


@pytest.mark.parametrize(
    ("name", "option", "advice"),
    [
        ("map_array", "n_workers", "(did you mean 'n_jobs'?)"),
        ("map_array", "max_workers", "(did you mean 'n_jobs'?)"),
        ("fit_many", "workers", "(did you mean 'n_jobs'?)"),
        ("a mapper", "processes", "(did you mean 'n_jobs'?)"),
        ("a mapper", "verbose", "(did you mean 'verbosity'?)"),
        ("a mapper", "balance", "(balance is the mapper's: StaticParallelMapper or"),
        ("map_array", "verbose", "(verbosity is given to the mapper)"),
        ("map of a mapper", "n_workers", "(n_jobs is given to the mapper)"),
        ("map_array of a mapper", "backend", "(backend is given to the mapper)"),
        ("map_items", "on_eror", "(did you mean 'on_error'?)"),
        ("reduce_array of a mapper", "combin", "(did you mean 'combine'?)"),
        ("imap of a mapper", "buffer_size", "(did you mean 'buffersize'?)"),
        ("predict_array", "methods", "(did you mean 'method'?)"),
        ("fit_many", "column", "(did you mean 'columns'?)"),
    ],
)
def test_the_option_that_may_be_meant_is_named(name, option, advice):
    with pytest.raises(TypeError) as caught:
        CALLS[name](**{option: 1})
    assert f"has no option {option!r} {advice}" in str(caught.value)


def test_an_unknown_name_like_no_other_gets_no_advice():
    error = make_unknown_error("verb", "colour", ["axis", "chunksize"])
    assert str(error) == "verb has no option 'colour'; it has axis, chunksize"


def test_options_that_are_not_given_have_their_defaults(verb):
    filled = verb.fill({"combine": max, "n_jobs": 2})
    assert (filled["combine"], filled["n_jobs"]) == (max, 2)
    assert (filled["balance"], filled["on_error"]) == ("dynamic", "raise")


def test_an_option_without_a_default_is_asked_for(verb):
    with pytest.raises(TypeError, match=r"verb\(\) missing 1 required keyword-only .*'combine'"):
        verb.fill({})


def test_a_function_gets_the_signature_and_the_docstring_of_its_options(verb):
    @verb.document
    def function(func, **options):
        """Do it.

        Parameters
        ----------
        func : callable
            What is done.
        **options
            See `taskcarrier.options`.

        Examples
        --------
        None.
        """

    parameters = inspect.signature(function).parameters
    assert list(parameters)[:3] == ["func", "combine", "initial"]
    assert parameters["balance"].default == "dynamic"
    assert parameters["combine"].default is inspect.Parameter.empty
    assert 'balance : {"static", "dynamic"}, default "dynamic"\n    How' in function.__doc__
    assert "combine : callable\n    Called" in function.__doc__


def test_the_method_of_a_mapper_leaves_out_what_the_mapper_decides():
    verb = Verb.from_groups("verb", WorkerOptions, ChunksOptions)

    @verb.document
    def function(**options):
        """Do it.

        **options
            See `taskcarrier.options`.

        Examples
        --------
        Secret.
        """

    @verb.for_mapper().document
    def method(self, **options):
        """Call `function`."""

    decided = set(WorkerOptions.__annotations__)
    assert decided < set(inspect.signature(function).parameters)
    assert decided.isdisjoint(inspect.signature(method).parameters)
    assert method.__doc__.startswith("Do it.")
    assert method.__doc__.endswith("Examples\n--------\nSee `taskcarrier.verb`.\n")
    assert "n_jobs : int" not in method.__doc__

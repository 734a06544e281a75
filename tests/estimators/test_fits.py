"""Parts of one fit: rows and templates as workers see them, random states, clones."""

import pickle

import numpy as np
import pytest

from taskcarrier.estimators.fits import CallerContext, Rows, Template, clone


class Model:
    def __init__(self, inner=None, random_state=None):
        self.inner = inner
        self.random_state = random_state

    def get_params(self, deep=True):
        return vars(self).copy()


def repickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    "entries",
    [
        [[0, 1], [2], []],
        [np.arange(3, dtype=np.uint8), [-1, -2]],
        [np.arange(6) < 2, np.arange(6) > 3],
        [np.arange(6) < 2, [5, 5], []],
    ],
    ids=["lists", "dtypes", "masks", "mixed"],
)
def test_rows_take_the_same_samples_in_a_worker(entries):
    samples = np.arange(6) * 10
    rows = Rows.from_arguments(entries, 6)
    sent = repickled(rows)
    for number, entry in enumerate(entries):
        expected = samples[np.asarray(entry, None if len(entry) else int)]
        assert np.array_equal(samples[rows.get_rows(number)], expected)
        assert np.array_equal(samples[sent.get_rows(number)], expected)


@pytest.mark.parametrize("entry", [[0, 6], [-7]])
def test_rows_of_no_sample_are_an_error(entry):
    with pytest.raises(IndexError, match="there are 6 samples"):
        Rows.from_arguments([[0], entry], 6)


def test_a_template_makes_a_new_estimator_for_each_fit():
    template = Template(Model(inner=[1]))
    for made in (template, repickled(template)):
        one, other = made.make_estimator(), made.make_estimator()
        assert one.inner == other.inner == [1]
        assert one.inner is not other.inner
        assert one is not other


def test_nested_estimators_are_cloned():
    given = Model(inner=Model(inner=3))
    copied = clone(given)
    assert copied.inner is not given.inner
    assert copied.inner.inner == 3


def test_the_context_leaves_the_filters_of_this_process_alone():
    with CallerContext([], None).apply():
        assert CallerContext.capture().filters != []

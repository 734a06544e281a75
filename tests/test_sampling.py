"""`make test` runs few combinations of parameters, in which every value occurs."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sampling import sample


@given(st.lists(st.integers(1, 5), max_size=4))
def test_every_value_of_every_parameter_occurs_in_few_combinations(lengths):
    values = [[(name, value) for value in range(n)] for name, n in enumerate(lengths)]
    product = [set(combination) for combination in itertools.product(*values)]
    kept = sample(product)
    assert 0 in kept
    assert set().union(*(product[index] for index in kept)) == {c for v in values for c in v}
    assert len(kept) == max(lengths, default=1)


@pytest.mark.parametrize(
    ("combinations", "expected"),
    [([set()], {0}), ([{"a"}, {"a"}], {0}), ([{"a"}, {"a", "b"}, {"a", "b", "c"}], {0, 2})],
)
def test_combinations_that_show_nothing_new_are_left_out(combinations, expected):
    assert sample(combinations) == expected


TESTS = """
import pytest

@pytest.fixture(params=["x", "y"])
def letter(request):
    return request.param

@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.thorough), 3])
@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_all(one, other, number, letter):
    print(f"<{one}{other}{number}{letter}>", end="")

@pytest.mark.thorough
def test_long():
    print("<long>", end="")
"""


def test_marked_values_and_products_are_left_to_the_thorough_run(pytester):
    pytester.makeini("[pytest]\nmarkers = thorough")
    pytester.makepyfile(TESTS)
    arguments = ("-p", "tests.sampling", "-p", "no:cacheprovider", "-s", "-q")
    quick = pytester.runpytest_inprocess(*arguments, "-m", "not thorough").stdout.str()
    ran = [part.partition(">")[0] for part in quick.split("<")[1:]]
    assert {cases[:2] for cases in ran} == {"00", "01", "10", "11"}
    assert {number for _, _, number, _ in ran} == {"1", "3"}
    assert {letter for *_, letter in ran} == {"x", "y"}
    assert len(ran) == 4
    pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=25)

"""A pytest plugin: it marks as thorough what `make test` leaves to `make test-all`.

Many tests have several parameters: a backend, a dtype, an axis. `make test-all` runs the product of
their values. `make test` runs as few combinations as show every value of every parameter once. In
the literature this is each-choice coverage (Grindal, Offutt and Andler, Combination testing
strategies: a survey, Software Testing, Verification and Reliability 15(3), 2005).

A combination that `make test` must run stands in a test of its own, or in a list of cases that is
one parameter. The mark `thorough` leaves a test or a value to `make test-all`. The mark `one_case`
leaves all but the last of a test's combinations to it: it is for tests that start programs, kill
workers or compile.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import pytest

Choice = tuple[object, ...]
"""A parameter, or those that one list of cases gives values, and the identities of the values."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    open_items = (item for item in items if item.get_closest_marker("thorough") is None)
    for _, group in groupby(open_items, key=lambda item: item.nodeid.partition("[")[0]):
        combinations = list(group)
        kept = sample([choices_of(item) for item in combinations])
        if combinations[0].get_closest_marker("one_case") is not None:
            kept = {len(combinations) - 1}
        for index, item in enumerate(combinations):
            if index not in kept:
                item.add_marker(pytest.mark.thorough)


def choices_of(item: pytest.Item) -> set[Choice]:
    callspec = getattr(item, "callspec", None)  # doctests and tests without parameters have none
    values = {} if callspec is None else callspec.params
    lists = [names_of(mark) for mark in item.iter_markers("parametrize")]
    lists += [(name,) for name in values.keys() - {name for names in lists for name in names}]
    return {(names, *(id(values[name]) for name in names)) for names in lists}


def names_of(mark: pytest.Mark) -> tuple[str, ...]:
    names = mark.args[0]
    return tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else (*names,)


def sample(combinations: Sequence[Iterable[Choice]]) -> set[int]:
    """Return the indices of a few combinations in which every choice occurs, the first among them.

    The next one is always the first of those with the most choices that have not occurred yet.
    """
    left = {index: set(choices) for index, choices in enumerate(combinations)}
    kept = {0}
    latest = 0
    while True:
        seen = left.pop(latest)
        for choices in left.values():
            choices.difference_update(seen)
        if not any(left.values()):
            return kept
        latest = max(left, key=lambda index: (len(left[index]), -index))
        kept.add(latest)

"""What is remembered of the last call of a function."""

import functools

import numpy as np
import pytest

from taskcarrier.scheduling import history
from taskcarrier.scheduling.history import (
    find_alone_seconds,
    find_known,
    forget,
    predict,
    remember,
    remember_shared,
)


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(history, "_last_alone", {})
    monkeypatch.setattr(history, "_last_shared", {})
    monkeypatch.setattr(history, "_unaided", set())


def make():
    return lambda x: x


def enclosing(value):
    return lambda x, y=value: (x, y, value)


THING = object()


def uses_global(x):
    return THING, x


class Thing:
    def method(self, x):
        return x


def test_a_function_is_known_by_its_code():
    assert find_known(make()) == find_known(make())
    assert find_known(make()) != find_known(lambda x: x)
    assert find_known(np.sin) != find_known(np.cos)


def test_what_is_known_stands_for_the_function():
    known = find_known(double_all)
    assert find_known(known) is known
    remember(double_all, 2.0, 5, 0)
    assert predict(known, 5, 0) == 2.0


def test_what_threads_took_says_nothing_of_the_caller_alone():
    known = history.find_known_in_threads(double_all)
    assert known == history.find_known_in_threads(double_all) != find_known(double_all)
    remember(known, 2.0, 5, 0)
    assert predict(known, 5, 0) == 2.0
    assert predict(double_all, 5, 0) is None


def double_all(x):
    return 2 * x


def test_a_function_that_is_made_again_is_known_by_facts():
    remember(history.Known(("fit", 3)), 1.0, 5, 0)
    assert predict(history.Known(("fit", 3)), 5, 0) == 1.0
    assert predict(history.Known(("fit", 4)), 5, 0) is None


def test_what_a_function_refers_to_counts(monkeypatch):
    one, other = Thing(), Thing()
    assert find_known(one.method) == find_known(one.method)
    assert find_known(one.method) != find_known(other.method)
    assert find_known(functools.partial(make(), one)) == find_known(functools.partial(make(), one))
    assert find_known(functools.partial(make(), one)) != find_known(
        functools.partial(make(), other)
    )
    assert find_known(functools.partial(make(), a=one)) != find_known(
        functools.partial(make(), b=one)
    )
    assert find_known(enclosing(one)) == find_known(enclosing(one))
    assert find_known(enclosing(one)) != find_known(enclosing(other))
    assert find_known(lambda: unbound) is not None  # noqa: F821  # the test is of an unbound name
    key = find_known(uses_global)
    monkeypatch.setitem(globals(), "THING", other)
    assert find_known(uses_global) != key


def test_a_call_takes_as_long_as_the_last_one_or_longer_in_proportion():
    assert predict(make(), 10, 80) is None
    remember(make(), 0.5, 10, 80)
    assert predict(make(), 10, 80) == 0.5
    assert predict(make(), 1, 1) == 0.5
    assert predict(make(), 20, 80) == 1.0
    assert predict(make(), 10, 160) == 1.0


def test_calls_of_another_size_are_not_predicted():
    remember(make(), 0.5, 10, 80)
    assert predict(make(), 90, 80) is None
    assert predict(make(), 10, 800) is None


def test_empty_calls_can_be_remembered():
    remember(make(), 0.5, 0, 0)
    assert predict(make(), 0, 0) == 0.5


def test_forgotten_functions_are_not_predicted():
    forget(make())
    remember(make(), 0.5, 10, 80)
    forget(make())
    assert predict(make(), 10, 80) is None


def test_only_so_many_functions_are_remembered(monkeypatch):
    monkeypatch.setattr(history, "_MOST", 3)
    funcs = [np.sin, np.cos, np.tan, np.exp]
    for func in funcs:
        remember(func, 0.5, 1, 1)
    assert [predict(func, 1, 1) for func in funcs] == [None, None, None, 0.5]


class TestAlone:
    def test_at_first_workers_may_help(self):
        assert find_alone_seconds(make(), 10, 80) == 0.0
        remember(make(), 1.0, 10, 80)
        assert find_alone_seconds(make(), 10, 80) == 0.0

    def test_a_hand_over_that_has_paid_is_repeated(self):
        remember_shared(make(), 2.0, 10, 80, has_paid=True)
        assert find_alone_seconds(make(), 10, 80) == 0.0

    def test_after_one_that_has_not_the_caller_tries_it_alone(self):
        remember_shared(make(), 2.0, 10, 80, has_paid=False)
        assert find_alone_seconds(make(), 10, 80) == 4.0

    @pytest.mark.parametrize("has_paid", [True, False])
    @pytest.mark.parametrize(("alone", "seconds"), [(1.5, 4.0), (2.5, 0.0)])
    def test_what_was_faster_is_repeated(self, has_paid, alone, seconds):
        remember_shared(make(), 2.0, 10, 80, has_paid=has_paid)
        remember(make(), alone, 10, 80)
        assert find_alone_seconds(make(), 10, 80) == seconds

    @pytest.mark.parametrize("size", [(21, 80), (10, 161), (4, 80), (10, 39)])
    def test_calls_of_another_size_are_not_compared(self, size):
        remember_shared(make(), 2.0, 10, 80, has_paid=False)
        assert find_alone_seconds(make(), *size) == 0.0

    def test_workers_are_tried_again_after_some_calls(self):
        remember_shared(make(), 2.0, 10, 80, has_paid=False)
        remember(make(), 1.0, 10, 80)
        answers = [find_alone_seconds(make(), 10, 80) for _ in range(history._CALLS_ALONE + 2)]
        assert answers == [4.0] * history._CALLS_ALONE + [0.0] * 2


def test_the_last_call_in_threads_says_whether_the_caller_did_it_alone():
    assert not history.was_unaided(make())
    for was_unaided in (True, True, False, False, True):
        history.remember_help(make(), was_unaided=was_unaided)
        assert history.was_unaided(make()) is was_unaided
    history.forget(make())
    assert not history.was_unaided(make())


def test_a_thousand_functions_are_kept_that_are_unaided():
    for _ in range(history._MOST + 1):
        history.remember_help(object(), was_unaided=True)
    assert len(history._unaided) <= history._MOST


def test_what_workers_were_busy_with_is_remembered_apart(monkeypatch):
    monkeypatch.setattr(history, "_last_busy", {})
    assert history.predict_busy(len, 10, 80) is None
    history.remember_busy(len, 0.5, 10, 80)
    assert history.predict_busy(len, 20, 80) == 1.0
    assert history.predict_busy(len, 10_000, 80) is None
    history.forget_busy(len)
    assert history.predict_busy(len, 10, 80) is None
    for number in range(history._MOST + 1):
        history.remember_busy(history.Known((number,)), 0.5, 1, 1)
    assert len(history._last_busy) == 1

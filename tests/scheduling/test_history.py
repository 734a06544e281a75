"""What is remembered of the last call of a function."""

import functools

import numpy as np
import pytest

from taskcarrier.scheduling import history
from taskcarrier.scheduling.history import find_key, forget, predict, remember


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(history, "_last", {})


def make():
    return lambda x: x


class Thing:
    def method(self, x):
        return x


def test_a_function_is_known_by_its_code():
    assert find_key(make()) == find_key(make())
    assert find_key(make()) != find_key(lambda x: x)
    assert find_key(functools.partial(make(), 1)) == find_key(make())
    assert find_key(Thing().method) == find_key(Thing().method)
    assert find_key(np.sin) != find_key(np.cos)


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

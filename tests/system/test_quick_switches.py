"""A shorter switch interval for a moment."""

import multiprocessing
import sys

import pytest

from taskcarrier.system.quick_switches import are_switches_quick, quick_switches


@pytest.fixture(autouse=True)
def interval():
    before = sys.getswitchinterval()
    yield before
    sys.setswitchinterval(before)


def test_the_interval_is_shorter_meanwhile(interval):
    assert not are_switches_quick()
    with quick_switches():
        assert sys.getswitchinterval() < interval / 10
        assert are_switches_quick()
    assert sys.getswitchinterval() == interval
    assert not are_switches_quick()


def test_many_moments_leave_the_interval_as_it_was():
    for usual in (0.003, 0.0007, 0.1):
        sys.setswitchinterval(usual)
        before = sys.getswitchinterval()
        for _ in range(5):
            with quick_switches():
                pass
        assert sys.getswitchinterval() == before


def test_the_last_to_end_sets_the_usual_interval(interval):
    first, second = quick_switches(), quick_switches()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() < interval / 10
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("other", [0.01, 1e-5])
def test_what_the_program_sets_meanwhile_stays(other):
    with quick_switches():
        sys.setswitchinterval(other)
    assert sys.getswitchinterval() == pytest.approx(other)


def test_an_interval_that_is_shorter_stays():
    sys.setswitchinterval(1e-5)
    with quick_switches():
        assert sys.getswitchinterval() == pytest.approx(1e-5)
    assert sys.getswitchinterval() == pytest.approx(1e-5)


def read_interval(answers):
    answers.put((sys.getswitchinterval(), are_switches_quick()))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_has_the_usual_interval(interval):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with quick_switches():
        child = context.Process(target=read_interval, args=(answers,))
        child.start()
        assert answers.get() == (interval, False)
        child.join()
    answers.close()
    child.close()

"""Whether a function lets go of the interpreter's lock."""

import sys

import pytest

from taskcarrier.scheduling.gil import GilWaits, judge_shares

FREE, HELD = 1e-4, 5e-3


def waits_of(*seconds):
    waits = GilWaits()
    for each in seconds:
        waits.add(each)
    return waits


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], None),
        ([FREE] * 3, None),
        ([FREE] * 4, True),
        ([HELD], None),
        ([HELD] * 2, False),
        ([FREE, HELD], None),
        ([FREE, HELD, HELD], False),
        ([HELD, FREE, FREE, FREE], True),
        ([HELD, HELD, *[FREE] * 4], False),
        ([HELD, HELD, *[FREE] * 8], True),
    ],
)
def test_few_waits_decide(seconds, expected):
    assert waits_of(*seconds).is_released is expected


def test_the_switch_interval_counts():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.1)
    try:
        assert waits_of(*[HELD] * 4).is_released
    finally:
        sys.setswitchinterval(before)
    assert waits_of(*[HELD] * 4).is_released is False


def test_old_waits_count_less():
    waits = waits_of(*[HELD] * 1000)
    for _ in range(600):
        waits.add(FREE)
    assert waits.is_released
    assert waits.n_free + waits.n_held <= 256


def test_threads_that_were_of_no_use_are_not_tried_again():
    waits = waits_of(*[FREE] * 30)
    assert waits.is_fit_for_threads
    assert waits.is_worth_telling
    assert waits.describe() == "the function had released the GIL at 30 of 30 looks"
    waits.has_failed = True
    assert waits.is_fit_for_threads is False
    assert not waits.is_worth_telling
    assert "waited for each other" in waits.describe()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([FREE] * 19, False), ([FREE] * 20, True), ([*[FREE] * 18, HELD, HELD], True)],
)
def test_users_are_told_of_what_is_certain(seconds, expected):
    assert waits_of(*seconds).is_worth_telling is expected
    assert not waits_of(*seconds, HELD, HELD, HELD).is_worth_telling


@pytest.mark.parametrize(
    ("shares", "queued", "alone", "expected"),
    [
        ([1.0, 0.9], 0.0, 1.0, True),
        ([1.0, 0.5], 0.0, 1.0, False),
        ([0.6, 0.6], 0.0, 0.7, True),
        ([0.5, 0.5], 0.0, 0.7, False),
        ([0.1, 0.0], 0.0, 0.4, True),  # one core has room for both
        ([0.9, 0.9], 0.5, 1.0, True),
        ([0.5, 0.5], 0.5, 1.0, None),
    ],
)
def test_threads_are_judged_by_their_shares_of_the_cores(shares, queued, alone, expected):
    assert judge_shares(shares, queued, alone) is expected

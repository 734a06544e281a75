"""Whether it pays to hand over the rest of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.scheduling.hand_over import (
    MARGIN,
    ItemCost,
    MeasuredSeconds,
    Offer,
    estimate_saving,
)

SECONDS = st.floats(0, 1e3)
OFFERS = st.builds(
    Offer,
    n_workers=st.integers(2, 200),
    busy_seconds=SECONDS,
    wait_seconds=SECONDS,
    item_seconds=st.floats(0, 1),
)


def cost_of(*chunks):
    cost = ItemCost()
    for n_items, seconds in chunks:
        cost.add(n_items, seconds)
    return cost


class TestItemCost:
    def test_nothing_is_known_at_first(self):
        assert cost_of().item_seconds == 0.0

    def test_it_is_the_mean_over_items(self):
        assert cost_of((2, 3.0)).item_seconds == 1.5
        assert cost_of((2, 3.0), (4, 3.0)).item_seconds == 1.0

    def test_the_first_chunk_is_left_out_as_soon_as_there_are_two_others(self):
        assert cost_of((2, 100.0), (4, 3.0), (1, 2.0)).item_seconds == 1.0

    def test_chunks_without_items_cost_nothing(self):
        assert cost_of((0, 1.0)).item_seconds == 0.0

    def test_it_is_believed_after_three_chunks_or_twice_the_cost(self):
        offer = Offer(n_workers=2, busy_seconds=1.0)
        assert not cost_of((1, 1.9)).is_believed(offer)
        assert cost_of((1, 2.0)).is_believed(offer)
        assert not cost_of((1, 0.1), (1, 0.1)).is_believed(offer)
        assert cost_of((1, 0.1), (1, 0.1), (1, 0.1)).is_believed(offer)


class TestSaving:
    def test_two_workers_save_half_less_what_they_cost(self):
        offer = Offer(n_workers=2, busy_seconds=0.1, item_seconds=0.01)
        saved = estimate_saving(100, 10, 0.05, offer)
        assert saved == pytest.approx(5.0 - 2.5 - 1.0 - MARGIN * 0.1)

    def test_the_caller_works_while_it_waits_for_workers(self):
        offer = Offer(n_workers=2, busy_seconds=0.0, wait_seconds=1.0)
        assert estimate_saving(100, 10, 0.05, offer) == pytest.approx((5.0 - 1.0) / 2)
        assert estimate_saving(100, 10, 0.01, offer) == 0.0

    def test_a_chunk_is_never_shared(self):
        offer = Offer(n_workers=2, busy_seconds=0.0)
        assert estimate_saving(30, 3, 1.0, offer) == pytest.approx(10.0)
        assert estimate_saving(30, 1, 1.0, offer) == 0.0

    @given(st.integers(0, 10**6), st.integers(0, 10**4), SECONDS, OFFERS)
    def test_it_is_never_more_than_all_that_is_left(self, n_items, n_chunks, seconds, offer):
        assert estimate_saving(n_items, n_chunks, seconds, offer) <= n_items * seconds

    @given(st.integers(1, 10**6), st.integers(1, 10**4), OFFERS)
    def test_items_that_cost_nothing_are_kept(self, n_items, n_chunks, offer):
        assert estimate_saving(n_items, n_chunks, 0.0, offer) <= 0.0


class TestMeasuredSeconds:
    def test_it_begins_with_the_guess(self):
        assert MeasuredSeconds(0.5).seconds == 0.5

    def test_it_comes_close_to_what_is_measured(self):
        cost = MeasuredSeconds(1.0)
        for _ in range(50):
            cost.add(2.0)
        assert cost.seconds == pytest.approx(2.0, rel=1e-3)

    @given(st.lists(st.floats(0, 1e9), max_size=20))
    def test_it_stays_within_a_factor_of_four(self, measured):
        cost = MeasuredSeconds(1.0)
        for seconds in measured:
            cost.add(seconds)
        assert 0.25 <= cost.seconds <= 4.0

"""The rules of balance: which worker takes which chunk."""

import sys
import threading
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.scheduling.balance import Dynamic, Static, get_balance
from taskcarrier.scheduling.ledger import DONE, PENDING, RECLAIMED, SENT, Ledger

RULES = [Static(), Dynamic()]


@pytest.fixture
def eager_switching():
    """Threads take turns as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestStatic:
    @given(st.integers(1, 40), st.integers(0, 200))
    def test_planned_chunks_cover_all_chunks_once(self, n_workers, n_chunks):
        plan = [Static().plan(worker, n_workers, n_chunks) for worker in range(n_workers)]
        assert [index for chunks in plan for index in chunks] == list(range(n_chunks))

    @given(st.integers(1, 40), st.integers(0, 200))
    def test_chunks_are_planned_evenly(self, n_workers, n_chunks):
        found = [len(Static().plan(worker, n_workers, n_chunks)) for worker in range(n_workers)]
        assert max(found) - min(found) <= 1

    def test_a_worker_runs_its_planned_chunks(self):
        ledger = Ledger.local(3)
        assert list(Static().chunks(ledger, 1, 3, 10)) == [4, 5, 6]

    def test_a_static_chunk_is_in_hand_when_yielded(self):
        ledger = Ledger.local(2)
        seen = []
        for index in Static().chunks(ledger, 1, 2, 6):
            seen.append((index, ledger.chunk_in_hand(1, 6), ledger.chunk_in_hand(0, 6)))
            ledger.finish(1, 1)
        assert seen == [(3, 3, None), (4, 4, None), (5, 5, None)]

    def test_static_balance_takes_nothing_from_the_counter(self):
        ledger = Ledger.local(2)
        assert len(list(Static().chunks(ledger, 0, 2, 6))) == 3
        assert ledger.n_claimed() == 0


class TestDynamic:
    def test_dynamic_balance_plans_nothing(self):
        assert list(Dynamic().plan(0, 2, 10)) == []

    def test_the_next_chunk_goes_to_the_worker_that_asks(self):
        ledger = Ledger.local(2)
        one, other = (Dynamic().chunks(ledger, worker, 2, 5) for worker in range(2))
        taken = [next(one), next(one), next(other), next(one), next(other)]
        assert taken == [0, 1, 2, 3, 4]
        assert next(one, None) is None
        assert next(other, None) is None

    def test_a_dynamic_chunk_is_in_hand_when_yielded(self):
        ledger = Ledger.local(2)
        for index in Dynamic().chunks(ledger, 1, 2, 3):
            assert ledger.chunk_in_hand(1, 3) == index
        assert ledger.chunk_in_hand(1, 3) is None

    @pytest.mark.usefixtures("eager_switching")
    def test_many_threads_take_each_chunk_exactly_once(self):
        n_workers, n_chunks = 12, 20_000
        ledger = Ledger.local(n_workers)
        taken = [[] for _ in range(n_workers)]
        begin = threading.Barrier(n_workers)

        def run(worker):
            begin.wait()
            for index in Dynamic().chunks(ledger, worker, n_workers, n_chunks):
                taken[worker].append(index)
                ledger.finish(worker, 1)

        threads = [threading.Thread(target=run, args=(worker,)) for worker in range(n_workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(index for chunks in taken for index in chunks) == list(range(n_chunks))
        assert all(chunks == sorted(chunks) for chunks in taken)
        assert ledger.n_items_done(n_workers) == n_chunks


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
class TestEveryBalance:
    def test_a_halted_run_yields_no_chunk(self, rule):
        ledger = Ledger.local(1)
        ledger.halt()
        assert list(rule.chunks(ledger, 0, 1, 5)) == []
        assert ledger.n_claimed() == 0

    def test_a_halt_takes_effect_before_the_next_chunk(self, rule):
        ledger = Ledger.local(1)
        chunks = rule.chunks(ledger, 0, 1, 5)
        assert [next(chunks), next(chunks)] == [0, 1]
        ledger.halt()
        assert next(chunks, None) is None

    def test_there_may_be_more_workers_than_chunks(self, rule):
        ledger = Ledger.local(5)
        taken = [list(rule.chunks(ledger, worker, 5, 2)) for worker in range(5)]
        assert sorted(chain(*taken)) == [0, 1]

    def test_marked_chunks_are_left_out(self, rule):
        ledger = Ledger.local(2)
        ledger.marks = memoryview(bytes([PENDING, DONE, PENDING, SENT, RECLAIMED, PENDING, DONE]))
        seen = []
        for worker in range(2):
            for index in rule.chunks(ledger, worker, 2, 7):
                seen.append(index)
                assert ledger.chunk_in_hand(worker, 7) == index
                ledger.finish(worker, 1)
        assert seen == [0, 2, 5]

    def test_marks_made_during_the_run_count(self, rule):
        ledger = Ledger.local(1)
        ledger.marks = memoryview(bytearray(5))
        chunks = rule.chunks(ledger, 0, 1, 5)
        assert next(chunks) == 0
        ledger.marks[1] = ledger.marks[2] = RECLAIMED
        assert list(chunks) == [3, 4]

    def test_no_chunk_is_yielded_if_all_are_marked(self, rule):
        ledger = Ledger.local(1)
        ledger.marks = memoryview(bytes([DONE] * 5))
        assert list(rule.chunks(ledger, 0, 1, 5)) == []

    def test_a_balance_is_found_by_name(self, rule):
        assert get_balance(rule.name) == rule

    def test_balances_are_equal_by_value(self, rule):
        assert type(rule)() == rule
        assert hash(type(rule)()) == hash(rule)


@pytest.mark.parametrize(
    "name", ["auto", "guided", "Static", "", b"static", None, 1, ["static"], Static()]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="balance must be one of 'static', 'dynamic', got") as info:
        get_balance(name)
    assert repr(name) in str(info.value)

"""The worker's loop, over scripted tasks."""

import threading

import numpy as np
import pytest

from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.grid import Grid
from taskcarrier.scheduling.ledger import DONE, FREE, SENT, TAKEN_BACK, Ledger
from taskcarrier.scheduling.retries import Again, Recovery
from taskcarrier.workers import loop as module
from taskcarrier.workers.loop import (
    in_worker,
    mark_worker_process,
    outlet_here,
    this_thread,
    timeout_error,
    work,
)
from taskcarrier.workers.records import Failure, Parts, Ran
from taskcarrier.workers.task import NOTHING, Job
from tests.clocks import stopped_clock

BALANCES = [Static(), Dynamic()]


class Script:
    """A task whose cells do as they are told.

    Parameters
    ----------
    steps : dict, optional
        For the start of a cell, an exception to raise or a function to call.
    """

    def __init__(self, steps=None, *, result=lambda start, stop: (start, stop)):
        self.steps = steps or {}
        self.result = result
        self.calls = []
        self.opened = 0

    def open(self, agree):
        self.opened += 1
        return self

    def __call__(self, start, stop):
        self.calls.append((start, stop))
        step = self.steps.get(start)
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            step()
        return self.result(start, stop)

    def facts(self):
        return list(self.calls)


class Unopenable(Script):
    def open(self, agree):
        raise self.steps["open"]


def marked(n_workers=1, n_cells=4):
    ledger = Ledger.local(n_workers)
    ledger.marks = memoryview(bytearray(n_cells))
    return ledger


def run(
    task,
    *,
    balance=None,
    grid=None,
    n_workers=1,
    worker=0,
    ledger=None,
    deliver=None,
    flush=None,
    again=(),
    **others,
):
    job = Job(task, balance or Dynamic(), grid or Grid(10, 3), n_workers, **others)
    ledger = ledger or Ledger.local(n_workers)
    delivered = []
    outlet = (
        deliver or (lambda start, result: delivered.append((start, result))),
        flush or (lambda: None),
    )
    account = work(job, ledger, worker, outlet, again)
    return account, ledger, delivered


ALL_CELLS = [(0, 3), (3, 6), (6, 9), (9, 10)]


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestEveryBalance:
    def test_every_cell_is_run_and_delivered(self, balance):
        task = Script()
        account, ledger, delivered = run(task, balance=balance)
        assert task.opened == 1
        assert task.calls == ALL_CELLS
        assert delivered == [(start, (start, stop)) for start, stop in ALL_CELLS]
        assert (account.worker, account.ranges, account.items) == (0, 4, 10)
        assert account.failure is None
        assert account.facts == ALL_CELLS
        assert account.busy_ns > 0
        assert (account.at, account.attempt) == ((9, 10), 1)
        assert ledger.items_done(1) == 10
        assert ledger.in_hand(0, 4) is None

    def test_no_items_are_one_empty_cell(self, balance):
        task = Script()
        account, _, delivered = run(task, balance=balance, grid=Grid(0, 5))
        assert task.calls == [(0, 0)]
        assert delivered == [(0, (0, 0))]
        assert (account.ranges, account.items) == (1, 0)

    def test_results_in_place_are_not_delivered(self, balance):
        account, _, delivered = run(Script(result=lambda *_: NOTHING), balance=balance)
        assert delivered == []
        assert account.items == 10

    def test_none_is_a_result(self, balance):
        _, _, delivered = run(Script(result=lambda *_: None), balance=balance)
        assert delivered == [(start, None) for start, _ in ALL_CELLS]

    @pytest.mark.parametrize(
        "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopIteration(), EOFError()]
    )
    def test_a_failure_ends_the_run(self, balance, error):
        task = Script({6: error})
        account, ledger, delivered = run(task, balance=balance, ledger=marked())
        assert account.failure.error is error
        assert (account.failure.range, account.failure.attempt) == ((6, 9), 1)
        assert (account.ranges, account.items) == (2, 6)
        assert account.facts == task.calls == ALL_CELLS[:3]
        assert [start for start, _ in delivered] == [0, 3]
        assert ledger.halted
        assert ledger.items_done(1) == 6
        assert list(ledger.marks) == [SENT, SENT, FREE, FREE]

    def test_a_halted_run_stops_at_the_next_cell(self, balance):
        ledger = Ledger.local(1)
        account, _, delivered = run(Script({3: ledger.halt}), balance=balance, ledger=ledger)
        assert [start for start, _ in delivered] == [0, 3]
        assert account.failure is None
        assert (account.ranges, account.items) == (2, 6)

    def test_nothing_is_run_once_halted(self, balance):
        ledger = Ledger.local(1)
        ledger.halt()
        account, _, delivered = run(Script(), balance=balance, ledger=ledger, again=[Again(0, 3)])
        assert delivered == []
        assert (account.ranges, account.items, account.facts) == (0, 0, [])
        assert account.at is None

    def test_a_task_that_cannot_be_opened(self, balance):
        error = OSError("no")
        account, ledger, _ = run(Unopenable({"open": error}), balance=balance)
        assert account.failure.error is error
        assert account.failure.range is None
        assert account.facts is None
        assert ledger.halted

    def test_a_result_that_cannot_be_delivered(self, balance):
        def deliver(start, result):
            raise TypeError("no")

        account, ledger, _ = run(Script(), balance=balance, deliver=deliver, ledger=marked())
        assert str(account.failure.error) == "no"
        assert account.failure.range == (0, 3)
        assert account.items == ledger.items_done(1) == 0
        assert ledger.marks[0] == FREE

    def test_a_cell_is_in_hand_until_it_is_delivered_and_marked(self, balance):
        ledger = marked()
        seen = []

        def deliver(start, result):
            mark = ledger.marks[start // 3]
            seen.append((ledger.in_hand(0, 4), mark, ledger.items_done(1)))

        run(Script(), balance=balance, ledger=ledger, deliver=deliver)
        assert seen == [(0, FREE, 0), (1, FREE, 3), (2, FREE, 6), (3, FREE, 9)]
        assert ledger.in_hand(0, 4) is None

    def test_marks_say_where_results_are(self, balance):
        ledger = marked()
        run(
            Script(result=lambda start, _: NOTHING if start < 6 else start),
            balance=balance,
            ledger=ledger,
        )
        assert list(ledger.marks) == [DONE, DONE, SENT, SENT]

    def test_cells_that_are_marked_are_left_out(self, balance):
        ledger = marked()
        ledger.marks[1] = DONE
        ledger.marks[3] = TAKEN_BACK
        task = Script()
        account, _, _ = run(task, balance=balance, ledger=ledger)
        assert task.calls == [(0, 3), (6, 9)]
        assert (account.ranges, account.items) == (2, 6)
        assert list(ledger.marks) == [SENT, DONE, SENT, TAKEN_BACK]


def test_workers_of_one_run_take_different_cells():
    task = Script()
    for worker in range(3):
        account, _, _ = run(task, balance=Static(), n_workers=3, worker=worker)
        assert account.worker == worker
    assert sorted(task.calls) == ALL_CELLS


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestAgain:
    def taken_back(self, *cells):
        ledger = marked()
        for cell in cells:
            ledger.marks[cell] = TAKEN_BACK
        return ledger

    def test_ranges_given_out_again_come_first(self, balance):
        ledger = self.taken_back(1, 3)
        task = Script()
        again = [Again(9, 10, 2), Again(3, 6, 3)]
        account, _, delivered = run(task, balance=balance, ledger=ledger, again=again)
        assert task.calls == [(9, 10), (3, 6), (0, 3), (6, 9)]
        assert [start for start, _ in delivered] == [9, 3, 0, 6]
        assert (account.ranges, account.items) == (4, 10)
        assert ledger.again_done(0) == 2
        assert list(ledger.marks) == [SENT] * 4

    def test_parts_of_a_cell_do_not_mark_it(self, balance):
        ledger = self.taken_back(0)
        task = Script(result=lambda *_: NOTHING)
        again = [Again(0, 2, 4), Again(2, 3, 4)]
        run(task, balance=balance, ledger=ledger, again=again)
        assert task.calls == [(0, 2), (2, 3), *ALL_CELLS[1:]]
        assert list(ledger.marks) == [TAKEN_BACK, DONE, DONE, DONE]

    def test_each_is_in_hand_by_its_number(self, balance):
        ledger = self.taken_back(0, 1)
        seen = []

        def deliver(start, result):
            seen.append((start, ledger.again_in_hand(0), ledger.again_done(0)))

        again = [Again(0, 3, 2), Again(3, 6, 2)]
        run(Script(), balance=balance, ledger=ledger, deliver=deliver, again=again)
        assert seen == [(0, 0, 0), (3, 1, 1), (6, None, 2), (9, None, 2)]

    def test_each_result_has_left_before_the_range_is_finished(self, balance):
        ledger = self.taken_back(0, 1)
        seen = []
        again = [Again(0, 3, 2), Again(3, 6, 2)]
        run(
            Script(),
            balance=balance,
            ledger=ledger,
            again=again,
            flush=lambda: seen.append((ledger.again_in_hand(0), ledger.again_done(0))),
        )
        assert seen == [(0, 0), (1, 1)]  # cells that were not given out before go in batches

    def test_a_failure_tells_the_attempt(self, balance):
        error = ValueError("no")
        again = [Again(0, 3, 2), Again(3, 6, 5)]
        account, ledger, _ = run(
            Script({3: error}), balance=balance, ledger=self.taken_back(0, 1), again=again
        )
        assert account.failure.error is error
        assert (account.failure.range, account.failure.attempt) == ((3, 6), 5)
        assert ledger.again_in_hand(0) == 1
        assert list(ledger.marks) == [SENT, TAKEN_BACK, FREE, FREE]

    def test_stops_before_the_next_once_halted(self, balance):
        ledger = self.taken_back(0, 1)
        task = Script({0: ledger.halt})
        account, _, _ = run(
            task, balance=balance, ledger=ledger, again=[Again(0, 3, 2), Again(3, 6, 2)]
        )
        assert task.calls == [(0, 3)]
        assert account.failure is None

    def test_without_items(self, balance):
        ledger = self.taken_back(0)
        task = Script()
        run(task, balance=balance, grid=Grid(0, 5), ledger=ledger, again=[Again(0, 0, 2)])
        assert task.calls == [(0, 0)]
        assert ledger.marks[0] == SENT


class TestTimeout:
    SHORT = Recovery(timeout=2.5)

    @pytest.fixture
    def clock(self, monkeypatch):
        return stopped_clock(monkeypatch)

    @pytest.fixture
    def slow(self, clock):
        return Script({3: lambda: clock.sleep(4)})

    @pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
    def test_a_range_that_was_late_ends_the_run(self, balance, slow):
        account, ledger, delivered = run(slow, balance=balance, recovery=self.SHORT)
        error = account.failure.error
        assert isinstance(error, TimeoutError)
        assert str(error) == "a range took 4 s, longer than timeout=2.5 seconds"
        assert any("run to its end" in note for note in error.__notes__)
        assert account.failure.range == (3, 6)
        assert [start for start, _ in delivered] == [0]
        assert ledger.halted

    def test_only_ranges_that_were_late_are_collected(self, slow):
        account, ledger, delivered = run(slow, recovery=self.SHORT, collects=True, ledger=marked())
        assert account.failure is None
        assert not ledger.halted
        assert [start for start, _ in delivered] == [0, 3, 6, 9]
        late = delivered[1][1]
        assert isinstance(late, Parts)
        ((start, stop, error),) = late.faults
        assert (late.results, start, stop) == ([], 3, 6)
        assert isinstance(error, TimeoutError)
        assert list(ledger.marks) == [SENT] * 4

    def test_processes_are_not_told_what_only_threads_do(self, slow, monkeypatch):
        monkeypatch.setattr(module, "_in_worker_process", True)
        account, _, _ = run(slow, recovery=self.SHORT)
        assert not hasattr(account.failure.error, "__notes__")

    @pytest.mark.parametrize("timeout", [4, 60, None])
    def test_a_range_in_time_is_no_error(self, slow, timeout):
        account, _, delivered = run(slow, recovery=Recovery(timeout=timeout))
        assert account.failure is None
        assert [result for _, result in delivered] == ALL_CELLS

    def test_an_error_of_its_own_counts_more(self, clock):
        def slow_and_wrong():
            clock.sleep(4)
            raise LookupError

        account, _, _ = run(Script({3: slow_and_wrong}), recovery=self.SHORT)
        assert isinstance(account.failure.error, LookupError)

    def test_a_late_range_is_run_again_where_that_was_asked_for(self, clock):
        naps = [4, 4, 0]
        task = Script({3: lambda: clock.sleep(naps.pop(0))})
        recovery = Recovery(timeout=2.5, retries=2, retry_on=(TimeoutError,))
        account, _, delivered = run(task, recovery=recovery)
        assert account.failure is None
        assert [start for start, _ in delivered] == [0, 3, 6, 9]
        assert task.calls.count((3, 6)) == 3

    def test_the_caller_learns_since_when_a_range_is_run(self, clock):
        ledger = Ledger.local(1)
        seen = []

        def look():
            clock.sleep(1)
            seen.append(ledger.since(0))

        run(Script({0: look, 3: look}), ledger=ledger, recovery=Recovery(timeout=60))
        assert seen == [10**9, 2 * 10**9]

    def test_busy_is_the_time_inside_of_ranges(self, slow):
        account, _, _ = run(slow)
        assert account.busy_ns == 4 * 10**9

    def test_the_clock_is_not_noted_for_nothing(self):
        ledger = Ledger.local(1)
        run(Script(), ledger=ledger)
        assert ledger.since(0) == 0

    def test_words(self):
        error = timeout_error(Recovery(timeout=2.5))
        assert str(error) == "a range took longer than timeout=2.5 seconds"


class TestJob:
    def test_marks_are_where_it_says(self):
        segment = Segment.create()
        segment.reserve(7)
        view = SharedView(segment, 0, (7,), (1,), np.dtype(np.uint8))
        job = Job(Script(), Dynamic(), Grid(7, 1), 1, marks=view)
        job.marks_here()[5] = DONE
        assert view.open("read").tolist() == [FREE] * 5 + [DONE, FREE]

    def test_no_place_of_its_own(self):
        assert Job(Script(), Dynamic(), Grid(7, 1), 1).marks_here() is None


def test_failures_are_put_in_order_by_their_range():
    failures = [Failure((8, 9), OSError()), Failure(None, OSError()), Failure((0, 8), OSError())]
    assert [failure.place for failure in failures] == [8, -1, 0]


def test_the_outlet_of_a_thread_is_the_caller_s_own():
    seen = []
    deliver, flush = outlet_here(lambda *one: seen.append(one))
    deliver(3, "result")
    flush()
    assert seen == [(3, "result")]


def test_how_a_run_ended_is_read_off_its_ledger():
    ledger = Ledger.local(1)
    ledger.claim(0)
    ledger.agree("settled")
    ledger.halt()
    ran = Ran.read([], ledger)
    assert (ran.given_out, ran.agreed, ran.halted) == (1, "settled", True)
    assert (ran.failures, ran.deaths, ran.fatal, ran.missing) == ([], [], [], [])


class TestInWorker:
    @pytest.mark.parametrize("error", [None, ValueError("no"), SystemExit(3)])
    def test_inside_only(self, error):
        seen = []

        def look():
            seen.append(in_worker())
            if error is not None:
                raise error

        assert not in_worker()
        account, _, _ = run(Script({0: look}))
        assert seen == [True]
        assert not in_worker()
        assert (account.failure is None) is (error is None)

    def test_also_while_opening(self):
        seen = []

        class Looking(Script):
            def open(self, agree):
                seen.append(in_worker())
                return super().open(agree)

        account, _, _ = run(Looking())
        assert account.failure is None
        assert seen == [True]

    def test_not_after_a_task_that_cannot_be_opened(self):
        run(Unopenable({"open": OSError("no")}))
        assert not in_worker()

    def test_a_run_inside_a_run_does_not_end_it(self):
        seen = []

        def inner():
            run(Script())
            seen.append(in_worker())

        run(Script({3: inner}))
        assert seen == [True]
        assert not in_worker()

    def test_of_this_thread_only(self):
        seen = []

        def look():
            thread = threading.Thread(target=lambda: seen.append(in_worker()))
            thread.start()
            thread.join()

        run(Script({0: look}))
        assert seen == [False]

    def test_whoever_says_so(self):
        this_thread.is_worker = True
        try:
            assert in_worker()
            run(Script())
            assert in_worker()
        finally:
            this_thread.is_worker = False
        assert not in_worker()

    def test_a_whole_process(self, monkeypatch):
        monkeypatch.setattr(module, "_in_worker_process", False)
        mark_worker_process()
        assert in_worker()
        run(Script())
        assert in_worker()

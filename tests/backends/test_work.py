"""The worker's loop, over scripted tasks."""

import threading

import pytest

from taskcarrier.backends import work as module
from taskcarrier.backends.work import NOTHING, Job, in_worker, mark_worker_process, work
from taskcarrier.balance import Dynamic, Static
from taskcarrier.ledger import Ledger
from taskcarrier.partition import Grid


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


def run(task, *, balance=None, grid=None, n_workers=1, worker=0, ledger=None, deliver=None):
    job = Job(task, balance or Dynamic(), grid or Grid(10, 3), n_workers)
    ledger = ledger or Ledger.local(n_workers)
    delivered = []
    account = work(
        job, ledger, worker, deliver or (lambda cell, result: delivered.append((cell, result)))
    )
    return account, ledger, delivered


ALL_CELLS = [(0, 3), (3, 6), (6, 9), (9, 10)]


@pytest.mark.parametrize("balance", [Static(), Dynamic()], ids=lambda rule: rule.name)
class TestEveryBalance:
    def test_every_cell_is_run_and_delivered(self, balance):
        task = Script()
        account, ledger, delivered = run(task, balance=balance)
        assert task.opened == 1
        assert task.calls == ALL_CELLS
        assert delivered == list(enumerate(ALL_CELLS))
        assert (account.worker, account.ranges, account.items) == (0, 4, 10)
        assert account.failure is None
        assert account.facts == ALL_CELLS
        assert account.busy_ns > 0
        assert ledger.items_done(1) == 10
        assert ledger.in_hand(0, 1, 4) is None

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
        assert delivered == [(cell, None) for cell in range(4)]

    @pytest.mark.parametrize(
        "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopIteration(), EOFError()]
    )
    def test_a_failure_ends_the_run(self, balance, error):
        task = Script({6: error})
        account, ledger, delivered = run(task, balance=balance)
        assert account.failure.error is error
        assert account.failure.cell == 2
        assert (account.ranges, account.items) == (2, 6)
        assert account.facts == task.calls == ALL_CELLS[:3]
        assert [cell for cell, _ in delivered] == [0, 1]
        assert ledger.halted
        assert ledger.items_done(1) == 6

    def test_a_halted_run_stops_at_the_next_cell(self, balance):
        ledger = Ledger.local(1)
        account, _, delivered = run(Script({3: ledger.halt}), balance=balance, ledger=ledger)
        assert [cell for cell, _ in delivered] == [0, 1]
        assert account.failure is None
        assert (account.ranges, account.items) == (2, 6)

    def test_nothing_is_run_once_halted(self, balance):
        ledger = Ledger.local(1)
        ledger.halt()
        account, _, delivered = run(Script(), balance=balance, ledger=ledger)
        assert delivered == []
        assert (account.ranges, account.items, account.facts) == (0, 0, [])

    def test_a_task_that_cannot_be_opened(self, balance):
        error = OSError("no")
        account, ledger, _ = run(Unopenable({"open": error}), balance=balance)
        assert account.failure.error is error
        assert account.failure.cell == -1
        assert account.facts is None
        assert ledger.halted

    def test_a_result_that_cannot_be_delivered(self, balance):
        def deliver(cell, result):
            raise TypeError("no")

        account, ledger, _ = run(Script(), balance=balance, deliver=deliver)
        assert str(account.failure.error) == "no"
        assert account.failure.cell == 0
        assert account.items == ledger.items_done(1) == 0

    def test_a_cell_is_in_hand_until_it_is_delivered(self, balance):
        ledger = Ledger.local(1)
        seen = []

        def deliver(cell, result):
            seen.append((ledger.in_hand(0, 1, 4), ledger.items_done(1)))

        run(Script(), balance=balance, ledger=ledger, deliver=deliver)
        assert seen == [(0, 0), (1, 3), (2, 6), (3, 9)]


def test_workers_of_one_run_take_different_cells():
    task = Script()
    for worker in range(3):
        account, _, _ = run(task, balance=Static(), n_workers=3, worker=worker)
        assert account.worker == worker
    assert sorted(task.calls) == ALL_CELLS


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
                return super().open()

        run(Looking())
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

    def test_a_whole_process(self, monkeypatch):
        monkeypatch.setattr(module, "_in_worker_process", False)
        mark_worker_process()
        assert in_worker()
        run(Script())
        assert in_worker()

"""Crews: the caller and threads of a pool, which run the units of a short call together."""

import contextvars
import decimal
import signal
import sys
import threading
import weakref

import numpy as np
import pytest

from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers import crew as module
from taskcarrier.workers.choose import load_joblib
from taskcarrier.workers.crew import list_units, run_crew, run_units
from taskcarrier.workers.loop import is_in_worker
from taskcarrier.workers.pools import thread_pool
from taskcarrier.workers.records import Raised, WorkerStats
from tests.clocks import LONG, wait_until
from tests.interrupted import interrupted_at

GRID = ChunkGrid(20, 3)


class Work:
    """Work that calls a function with each unit."""

    def __init__(self, func):
        self.func = func
        self.outcomes = {}
        self.done = []

    def run_unit(self, start, stop):
        try:
            self.func(start, stop)
        except BaseException as error:  # noqa: BLE001  # a work keeps whatever was raised
            self.outcomes[start] = Raised(error)
            return False
        self.done.append((start, stop))
        return True


def run(func, *, n_workers=2, grid=GRID, begins_alone=False):
    """Run a crew; return its work and what its workers did."""
    work = Work(func)
    sizes = n_workers, n_workers
    units = list_units(grid, 1)
    stats = run_crew(units, grid.chunksize, work, sizes, begins_alone=begins_alone)
    return work, stats


def is_caller():
    return threading.current_thread() is threading.main_thread()


def in_both(func=lambda: None):
    """Return a function of two units, each of which waits for the other: one in each worker."""
    barrier = threading.Barrier(2)

    def both(start, stop):
        barrier.wait(LONG)
        func()

    return both


TWO = ChunkGrid(2, 1)


@pytest.fixture
def blocked_thread():
    """Block the thread of the next pool of two that helps the caller; return what lets it go."""
    load_joblib()
    go_on, is_in = threading.Event(), threading.Event()

    def block():
        is_in.set()
        go_on.wait(LONG)

    with thread_pool(2) as pool:
        pool.ensure_free(range(2))
        pool._workers[1].inbox.put(block)
    is_in.wait(LONG)
    yield go_on
    go_on.set()


class TestUnits:
    def test_the_first_is_popped_first_and_all_are_whole_chunks(self):
        units = list_units(GRID, 2)
        assert units == [(18, 20), (12, 18), (6, 12), (0, 6)]
        assert list_units(GRID, 100) == [(0, 20)]

    def test_units_are_run_and_counted(self):
        stats, work = WorkerStats(0), Work(lambda *_: None)
        run_units(list_units(GRID, 2), 3, work.run_unit, stats)
        assert work.done == [(0, 6), (6, 12), (12, 18), (18, 20)]
        assert (stats.n_ranges, stats.n_items) == (7, 20)
        assert stats.busy_ns > 0

    def test_an_unusual_one_is_the_last(self):
        stats, units = WorkerStats(0), list_units(GRID, 2)
        run_units(units, 3, lambda start, stop: start < 6, stats)
        assert (stats.n_ranges, stats.n_items, units) == (4, 12, [])

    def test_when_the_time_is_over_the_others_are_left(self):
        stats, units = WorkerStats(0), list_units(GRID, 2)
        run_units(units, 3, lambda start, stop: True, stats, 0.0)
        assert (stats.n_ranges, units) == (2, [(18, 20), (12, 18), (6, 12)])
        run_units(units, 3, lambda start, stop: True, stats)
        assert (stats.n_ranges, stats.n_items) == (7, 20)


class TestRunCrew:
    @pytest.mark.parametrize("n_workers", [1, 2, 5])
    @pytest.mark.parametrize("begins_alone", [False, True])
    def test_every_unit_is_run_once(self, n_workers, begins_alone):
        work, stats = run(lambda *_: None, n_workers=n_workers, begins_alone=begins_alone)
        assert sorted(work.done) == sorted(list_units(GRID, 1))
        names = ["caller", "thread 1", "thread 2", "thread 3", "thread 4"]
        assert [each.name for each in stats] == names[:n_workers]
        assert sum(each.n_ranges for each in stats) == 7
        assert sum(each.n_items for each in stats) == 20

    def test_threads_work_at_the_same_time(self):
        inside = {}
        _, stats = run(in_both(lambda: inside.update({is_caller(): is_in_worker()})), grid=TWO)
        assert [each.n_ranges for each in stats] == [1, 1]
        assert inside[False]

    def test_a_call_that_is_longer_than_predicted_gets_threads_after_a_unit(self, monkeypatch):
        monkeypatch.setattr(module, "ALONE_SECONDS", 1e-9)
        barrier = threading.Barrier(2)

        def func(start, stop):
            if start:
                barrier.wait(LONG)

        _, stats = run(func, grid=ChunkGrid(3, 1), begins_alone=True)
        assert [each.n_ranges for each in stats] == [2, 1]

    def test_a_short_one_wakes_none(self, monkeypatch):
        monkeypatch.setattr(module, "ALONE_SECONDS", LONG)
        monkeypatch.setattr(module, "thread_pool", None)
        _, stats = run(lambda *_: None, begins_alone=True)
        assert [each.n_ranges for each in stats] == [7, 0]

    def test_a_thread_that_does_not_begin_is_not_waited_for(self, blocked_thread):
        held = np.zeros(3)
        dead = weakref.ref(held)
        work, stats = run(lambda *_, held=held: None)
        assert [each.n_ranges for each in stats] == [7, 0]
        del held, work
        assert dead() is None  # nor does it hold anything
        blocked_thread.set()
        _, stats = run(in_both(), grid=TWO)  # it takes part in the next call
        assert [each.n_ranges for each in stats] == [1, 1]

    def test_an_error_ends_the_crew_and_others_finish_their_unit(self):
        finished = []
        for where in (True, False):
            barrier = threading.Barrier(2)

            def func(start, stop, *, where=where, barrier=barrier):
                if start < 2:
                    barrier.wait(LONG)
                    if is_caller() is where:
                        raise ValueError(start)
                    finished.append(start)

            work, _ = run(func, grid=ChunkGrid(2, 1))
            (failed,) = work.outcomes
            assert work.outcomes[failed].error.args == (failed,)
            assert work.done == [(1 - failed, 2 - failed)]
        assert len(finished) == 2

    def test_an_error_of_ours_in_a_thread_leaves_its_unit_to_the_general_way(self):
        barrier = threading.Barrier(2)
        work = Work(None)

        def run_unit(start, stop):
            barrier.wait(LONG)
            if not is_caller():
                raise MemoryError
            work.done.append(start)
            return True

        work.run_unit = run_unit
        run_crew(list_units(TWO, 1), 1, work, (2, 2), begins_alone=False)
        assert len(work.done) == 1
        assert not work.outcomes
        _, stats = run(in_both(), grid=TWO)
        assert [each.n_ranges for each in stats] == [1, 1]

    def test_runs_of_two_threads_of_the_program_do_not_meet(self):
        barrier = threading.Barrier(4)
        got = []

        def call():
            got.append(run(lambda *_: barrier.wait(LONG), grid=TWO)[1])

        thread = threading.Thread(target=call)
        thread.start()
        call()
        thread.join()
        assert [[each.n_ranges for each in stats] for stats in got] == [[1, 1]] * 2


class TestContext:
    @pytest.mark.parametrize("begins_alone", [False, True])
    def test_the_function_sees_the_state_of_the_caller_and_changes_it_for_itself(
        self, begins_alone
    ):
        word = contextvars.ContextVar("word", default="before")
        seen = []

        def func(start, stop):
            seen.append((word.get(), np.geterr()["divide"], decimal.getcontext().prec))
            word.set("after")
            decimal.getcontext().prec = 5

        with np.errstate(divide="raise"), decimal.localcontext(prec=11):
            word.set("given")
            run(func, grid=ChunkGrid(1, 1), begins_alone=begins_alone)
            run(in_both(lambda: func(0, 1)), grid=TWO)
            assert word.get() == "given"
            assert decimal.getcontext().prec == 11
        assert seen == [("given", "raise", 11)] * 3


class TestInterrupts:
    @pytest.mark.fault(17)
    def test_one_while_a_thread_is_waited_for_leaves_the_thread_alone(self):
        barrier, go_on, is_over = threading.Barrier(2), threading.Event(), threading.Event()

        def func(start, stop):
            barrier.wait(LONG)
            if not is_caller():
                signal.raise_signal(signal.SIGINT)  # which is handled in the main thread
                go_on.wait(LONG)
                is_over.set()

        with pytest.raises(KeyboardInterrupt):
            run(func, grid=TWO)
        _, stats = run(in_both(), grid=TWO)  # another thread has taken its place
        assert [each.n_ranges for each in stats] == [1, 1]
        go_on.set()
        assert is_over.wait(LONG)

    def test_one_in_the_function_does_not_wait_for_threads(self):
        barrier, go_on = threading.Barrier(2), threading.Event()

        def func(start, stop):
            barrier.wait(LONG)
            if is_caller():
                raise KeyboardInterrupt
            go_on.wait(LONG)

        with pytest.raises(KeyboardInterrupt):
            run(func, grid=TWO)
        go_on.set()

    @pytest.mark.fault(44)
    @pytest.mark.parametrize("begins_alone", [False, True])
    def test_one_at_any_step_leaves_a_pool_that_works(self, begins_alone, monkeypatch):
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # in finalizers they are lost
        run(lambda *_: None)
        step = 0
        while interrupted_at(step, lambda: run(lambda *_: None, begins_alone=begins_alone)):
            step += 1
        assert step > 20
        _, stats = run(in_both(), grid=TWO)
        assert [each.n_ranges for each in stats] == [1, 1]
        wait_until(lambda: count_threads() <= 4)


def count_threads():
    return sum("ThreadPoolExecutor-taskcarrier" in each.name for each in threading.enumerate())

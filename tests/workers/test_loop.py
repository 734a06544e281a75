"""The worker's loop, over scripted tasks."""

import threading

import numpy as np
import pytest

from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import DONE, PENDING, RECLAIMED, SENT, Ledger
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.workers import loop as module
from taskcarrier.workers.loop import (
    is_in_worker,
    make_local_sink,
    make_timeout_error,
    mark_worker_process,
    run_worker,
    this_thread,
)
from taskcarrier.workers.records import PartialResult, RangeFailure, RunResult
from taskcarrier.workers.task import IN_PLACE, Job
from tests.clocks import stopped_clock
from tests.helpers import BALANCES


class Script:
    """A task whose chunks follow a script.

    Parameters
    ----------
    steps : dict, optional
        For the start of a chunk, an exception to raise or a function to call.
    """

    def __init__(self, steps=None, *, result=lambda start, stop: (start, stop)):
        self.steps = steps or {}
        self.result = result
        self.calls = []
        self.started = 0

    def start(self, worker):
        self.started += 1
        worker.facts = self.calls
        return self.run

    def run(self, start, stop):
        self.calls.append((start, stop))
        step = self.steps.get(start)
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            step()
        return self.result(start, stop)


class Unstartable(Script):
    def start(self, worker):
        raise self.steps["start"]


def find_marked(n_workers=1, n_chunks=4):
    ledger = Ledger.local(n_workers)
    ledger.marks = memoryview(bytearray(n_chunks))
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
    attempts=(),
    **others,
):
    job = Job(task, balance or Dynamic(), grid or ChunkGrid(10, 3), n_workers, **others)
    ledger = ledger or Ledger.local(n_workers)
    delivered = []
    sink = (
        deliver or (lambda start, result: delivered.append((start, result))),
        flush or (lambda: None),
    )
    stats = run_worker(job, ledger, worker, sink, attempts)
    return stats, ledger, delivered


ALL_CHUNKS = [(0, 3), (3, 6), (6, 9), (9, 10)]


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestEveryBalance:
    def test_every_chunk_is_run_and_delivered(self, balance):
        task = Script()
        stats, ledger, delivered = run(task, balance=balance)
        assert task.started == 1
        assert task.calls == ALL_CHUNKS
        assert delivered == [(start, (start, stop)) for start, stop in ALL_CHUNKS]
        assert (stats.worker, stats.n_ranges, stats.n_items) == (0, 4, 10)
        assert stats.failure is None
        assert stats.facts == ALL_CHUNKS
        assert stats.busy_ns > 0
        assert (stats.last_range, stats.attempt) == ((9, 10), 1)
        assert ledger.n_items_done(1) == 10
        assert ledger.chunk_in_hand(0, 4) is None

    def test_no_items_are_one_empty_chunk(self, balance):
        task = Script()
        stats, _, delivered = run(task, balance=balance, grid=ChunkGrid(0, 5))
        assert task.calls == [(0, 0)]
        assert delivered == [(0, (0, 0))]
        assert (stats.n_ranges, stats.n_items) == (1, 0)

    def test_results_in_place_are_not_delivered(self, balance):
        stats, _, delivered = run(Script(result=lambda *_: IN_PLACE), balance=balance)
        assert delivered == []
        assert stats.n_items == 10

    def test_none_is_delivered_as_a_result(self, balance):
        _, _, delivered = run(Script(result=lambda *_: None), balance=balance)
        assert delivered == [(start, None) for start, _ in ALL_CHUNKS]

    @pytest.mark.parametrize(
        "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopIteration(), EOFError()]
    )
    def test_a_failure_ends_the_run(self, balance, error):
        task = Script({6: error})
        stats, ledger, delivered = run(task, balance=balance, ledger=find_marked())
        assert stats.failure.error is error
        assert (stats.failure.range, stats.failure.attempt) == ((6, 9), 1)
        assert (stats.n_ranges, stats.n_items) == (2, 6)
        assert stats.facts == task.calls == ALL_CHUNKS[:3]
        assert [start for start, _ in delivered] == [0, 3]
        assert ledger.is_halted
        assert ledger.n_items_done(1) == 6
        assert list(ledger.marks) == [SENT, SENT, PENDING, PENDING]

    def test_a_halted_run_stops_at_the_next_chunk(self, balance):
        ledger = Ledger.local(1)
        stats, _, delivered = run(Script({3: ledger.halt}), balance=balance, ledger=ledger)
        assert [start for start, _ in delivered] == [0, 3]
        assert stats.failure is None
        assert (stats.n_ranges, stats.n_items) == (2, 6)

    def test_nothing_is_run_after_a_halt(self, balance):
        ledger = Ledger.local(1)
        ledger.halt()
        stats, _, delivered = run(
            Script(), balance=balance, ledger=ledger, attempts=[Attempt(0, 3)]
        )
        assert delivered == []
        assert (stats.n_ranges, stats.n_items, stats.facts) == (0, 0, [])
        assert stats.last_range is None

    def test_a_task_that_cannot_be_opened_is_a_failure(self, balance):
        error = OSError("no")
        stats, ledger, _ = run(Unstartable({"start": error}), balance=balance)
        assert stats.failure.error is error
        assert stats.failure.range is None
        assert stats.facts is None
        assert ledger.is_halted

    def test_a_result_that_cannot_be_delivered_is_a_failure(self, balance):
        def deliver(start, result):
            raise TypeError("no")

        stats, ledger, _ = run(Script(), balance=balance, deliver=deliver, ledger=find_marked())
        assert str(stats.failure.error) == "no"
        assert stats.failure.range == (0, 3)
        assert stats.n_items == ledger.n_items_done(1) == 0
        assert ledger.marks[0] == PENDING

    def test_a_chunk_is_in_hand_until_it_is_delivered_and_marked(self, balance):
        ledger = find_marked()
        seen = []

        def deliver(start, result):
            mark = ledger.marks[start // 3]
            seen.append((ledger.chunk_in_hand(0, 4), mark, ledger.n_items_done(1)))

        run(Script(), balance=balance, ledger=ledger, deliver=deliver)
        assert seen == [(0, PENDING, 0), (1, PENDING, 3), (2, PENDING, 6), (3, PENDING, 9)]
        assert ledger.chunk_in_hand(0, 4) is None

    def test_marks_say_where_results_are(self, balance):
        ledger = find_marked()
        run(
            Script(result=lambda start, _: IN_PLACE if start < 6 else start),
            balance=balance,
            ledger=ledger,
        )
        assert list(ledger.marks) == [DONE, DONE, SENT, SENT]

    def test_marked_chunks_are_left_out(self, balance):
        ledger = find_marked()
        ledger.marks[1] = DONE
        ledger.marks[3] = RECLAIMED
        task = Script()
        stats, _, _ = run(task, balance=balance, ledger=ledger)
        assert task.calls == [(0, 3), (6, 9)]
        assert (stats.n_ranges, stats.n_items) == (2, 6)
        assert list(ledger.marks) == [SENT, DONE, SENT, RECLAIMED]


def test_workers_of_one_run_take_different_chunks():
    task = Script()
    for worker in range(3):
        stats, _, _ = run(task, balance=Static(), n_workers=3, worker=worker)
        assert stats.worker == worker
    assert sorted(task.calls) == ALL_CHUNKS


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestAttempts:
    def taken_back(self, *chunks):
        ledger = find_marked()
        for index in chunks:
            ledger.marks[index] = RECLAIMED
        return ledger

    def test_attempts_come_before_chunks(self, balance):
        ledger = self.taken_back(1, 3)
        task = Script()
        attempts = [Attempt(9, 10, 2), Attempt(3, 6, 3)]
        stats, _, delivered = run(task, balance=balance, ledger=ledger, attempts=attempts)
        assert task.calls == [(9, 10), (3, 6), (0, 3), (6, 9)]
        assert [start for start, _ in delivered] == [9, 3, 0, 6]
        assert (stats.n_ranges, stats.n_items) == (4, 10)
        assert ledger.n_attempts_done(0) == 2
        assert list(ledger.marks) == [SENT] * 4

    def test_attempts_on_parts_of_a_chunk_do_not_mark_it(self, balance):
        ledger = self.taken_back(0)
        task = Script(result=lambda *_: IN_PLACE)
        attempts = [Attempt(0, 2, 4), Attempt(2, 3, 4)]
        run(task, balance=balance, ledger=ledger, attempts=attempts)
        assert task.calls == [(0, 2), (2, 3), *ALL_CHUNKS[1:]]
        assert list(ledger.marks) == [RECLAIMED, DONE, DONE, DONE]

    def test_each_attempt_is_in_hand_by_its_number(self, balance):
        ledger = self.taken_back(0, 1)
        seen = []

        def deliver(start, result):
            seen.append((start, ledger.attempt_in_hand(0), ledger.n_attempts_done(0)))

        attempts = [Attempt(0, 3, 2), Attempt(3, 6, 2)]
        run(Script(), balance=balance, ledger=ledger, deliver=deliver, attempts=attempts)
        assert seen == [(0, 0, 0), (3, 1, 1), (6, None, 2), (9, None, 2)]

    def test_each_result_is_sent_before_its_attempt_is_finished(self, balance):
        ledger = self.taken_back(0, 1)
        seen = []
        attempts = [Attempt(0, 3, 2), Attempt(3, 6, 2)]
        run(
            Script(),
            balance=balance,
            ledger=ledger,
            attempts=attempts,
            flush=lambda: seen.append((ledger.attempt_in_hand(0), ledger.n_attempts_done(0))),
        )
        assert seen == [(0, 0), (1, 1)]  # chunks that were not given out before go in batches

    def test_a_failure_names_the_attempt(self, balance):
        error = ValueError("no")
        attempts = [Attempt(0, 3, 2), Attempt(3, 6, 5)]
        stats, ledger, _ = run(
            Script({3: error}), balance=balance, ledger=self.taken_back(0, 1), attempts=attempts
        )
        assert stats.failure.error is error
        assert (stats.failure.range, stats.failure.attempt) == ((3, 6), 5)
        assert ledger.attempt_in_hand(0) == 1
        assert list(ledger.marks) == [SENT, RECLAIMED, PENDING, PENDING]

    def test_a_halt_takes_effect_before_the_next_attempt(self, balance):
        ledger = self.taken_back(0, 1)
        task = Script({0: ledger.halt})
        stats, _, _ = run(
            task, balance=balance, ledger=ledger, attempts=[Attempt(0, 3, 2), Attempt(3, 6, 2)]
        )
        assert task.calls == [(0, 3)]
        assert stats.failure is None

    def test_an_attempt_may_have_no_items(self, balance):
        ledger = self.taken_back(0)
        task = Script()
        run(task, balance=balance, grid=ChunkGrid(0, 5), ledger=ledger, attempts=[Attempt(0, 0, 2)])
        assert task.calls == [(0, 0)]
        assert ledger.marks[0] == SENT


class TestTimeout:
    SHORT = RetryPolicy(timeout=2.5)

    @pytest.fixture
    def clock(self, monkeypatch):
        return stopped_clock(monkeypatch)

    @pytest.fixture
    def slow(self, clock):
        return Script({3: lambda: clock.sleep(4)})

    @pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
    def test_a_late_range_ends_the_run(self, balance, slow):
        stats, ledger, delivered = run(slow, balance=balance, retry_policy=self.SHORT)
        error = stats.failure.error
        assert isinstance(error, TimeoutError)
        assert str(error) == "a range took 4 s, longer than timeout=2.5 seconds"
        assert any("run to its end" in note for note in error.__notes__)
        assert stats.failure.range == (3, 6)
        assert [start for start, _ in delivered] == [0]
        assert ledger.is_halted

    def test_only_late_ranges_are_collected(self, slow):
        stats, ledger, delivered = run(
            slow, retry_policy=self.SHORT, collect_errors=True, ledger=find_marked()
        )
        assert stats.failure is None
        assert not ledger.is_halted
        assert [start for start, _ in delivered] == [0, 3, 6, 9]
        late = delivered[1][1]
        assert isinstance(late, PartialResult)
        ((start, stop, error),) = late.failures
        assert (late.results, start, stop) == ([], 3, 6)
        assert isinstance(error, TimeoutError)
        assert list(ledger.marks) == [SENT] * 4

    def test_processes_get_no_note_about_threads(self, slow, monkeypatch):
        monkeypatch.setattr(module, "_in_worker_process", True)
        stats, _, _ = run(slow, retry_policy=self.SHORT)
        assert not hasattr(stats.failure.error, "__notes__")

    @pytest.mark.parametrize("timeout", [4, 60, None])
    def test_a_range_in_time_is_no_error(self, slow, timeout):
        stats, _, delivered = run(slow, retry_policy=RetryPolicy(timeout=timeout))
        assert stats.failure is None
        assert [result for _, result in delivered] == ALL_CHUNKS

    def test_an_error_of_a_late_range_takes_precedence(self, clock):
        def slow_and_wrong():
            clock.sleep(4)
            raise LookupError

        stats, _, _ = run(Script({3: slow_and_wrong}), retry_policy=self.SHORT)
        assert isinstance(stats.failure.error, LookupError)

    def test_a_late_range_is_run_again_if_retry_on_says_so(self, clock):
        naps = [4, 4, 0]
        task = Script({3: lambda: clock.sleep(naps.pop(0))})
        retry_policy = RetryPolicy(timeout=2.5, retries=2, retry_on=(TimeoutError,))
        stats, _, delivered = run(task, retry_policy=retry_policy)
        assert stats.failure is None
        assert [start for start, _ in delivered] == [0, 3, 6, 9]
        assert task.calls.count((3, 6)) == 3

    def test_the_start_time_of_a_range_is_in_the_ledger(self, clock):
        ledger = Ledger.local(1)
        seen = []

        def look():
            clock.sleep(1)
            seen.append(ledger.start_time_ns(0))

        run(Script({0: look, 3: look}), ledger=ledger, retry_policy=RetryPolicy(timeout=60))
        assert seen == [10**9, 2 * 10**9]

    def test_busy_time_is_the_time_inside_ranges(self, slow):
        stats, _, _ = run(slow)
        assert stats.busy_ns == 4 * 10**9

    def test_no_start_time_is_recorded_without_a_timeout(self):
        ledger = Ledger.local(1)
        run(Script(), ledger=ledger)
        assert ledger.start_time_ns(0) == 0

    def test_the_error_names_the_timeout(self):
        error = make_timeout_error(RetryPolicy(timeout=2.5))
        assert str(error) == "a range took longer than timeout=2.5 seconds"


class TestJob:
    def test_marks_are_opened_in_the_given_memory(self):
        segment = Segment.create()
        segment.reserve(7)
        view = SharedView(segment, 0, (7,), (1,), np.dtype(np.uint8))
        job = Job(Script(), Dynamic(), ChunkGrid(7, 1), 1, marks=view)
        job.open_marks()[5] = DONE
        assert view.open("read").tolist() == [PENDING] * 5 + [DONE, PENDING]

    def test_a_job_without_given_memory_has_no_marks(self):
        assert Job(Script(), Dynamic(), ChunkGrid(7, 1), 1).open_marks() is None


def test_failures_are_sorted_by_range():
    failures = [
        RangeFailure((8, 9), OSError()),
        RangeFailure(None, OSError()),
        RangeFailure((0, 8), OSError()),
    ]
    assert [failure.start for failure in failures] == [8, -1, 0]


def test_the_outlet_of_a_thread_delivers_directly():
    seen = []
    deliver, flush = make_local_sink(lambda *one: seen.append(one))
    deliver(3, "result")
    flush()
    assert seen == [(3, "result")]


def test_the_result_of_a_run_is_read_from_its_ledger():
    ledger = Ledger.local(1)
    ledger.claim(0)
    ledger.propose("settled")
    ledger.halt()
    ran = RunResult.read([], ledger)
    assert (ran.first_proposal, ran.is_halted) == ("settled", True)
    assert (ran.failures, ran.deaths, ran.unrecovered_deaths, ran.missing) == ([], [], [], [])


class TestInWorker:
    @pytest.mark.parametrize("error", [None, ValueError("no"), SystemExit(3)])
    def test_a_task_is_in_a_worker_only_while_it_runs(self, error):
        seen = []

        def look():
            seen.append(is_in_worker())
            if error is not None:
                raise error

        assert not is_in_worker()
        stats, _, _ = run(Script({0: look}))
        assert seen == [True]
        assert not is_in_worker()
        assert (stats.failure is None) is (error is None)

    def test_a_task_is_in_a_worker_while_it_is_opened(self):
        seen = []

        class Looking(Script):
            def start(self, worker):
                seen.append(is_in_worker())
                return super().start(worker)

        stats, _, _ = run(Looking())
        assert stats.failure is None
        assert seen == [True]

    def test_a_task_that_cannot_be_opened_leaves_the_worker(self):
        run(Unstartable({"start": OSError("no")}))
        assert not is_in_worker()

    def test_a_nested_run_does_not_leave_the_worker(self):
        seen = []

        def inner():
            run(Script())
            seen.append(is_in_worker())

        run(Script({3: inner}))
        assert seen == [True]
        assert not is_in_worker()

    def test_only_the_running_thread_is_in_a_worker(self):
        seen = []

        def look():
            thread = threading.Thread(target=lambda: seen.append(is_in_worker()))
            thread.start()
            thread.join()

        run(Script({0: look}))
        assert seen == [False]

    def test_a_thread_marked_as_a_worker_stays_one(self):
        this_thread.is_worker = True
        try:
            assert is_in_worker()
            run(Script())
            assert is_in_worker()
        finally:
            this_thread.is_worker = False
        assert not is_in_worker()

    def test_a_process_marked_as_a_worker_stays_one(self, monkeypatch):
        monkeypatch.setattr(module, "_in_worker_process", False)
        mark_worker_process()
        assert is_in_worker()
        run(Script())
        assert is_in_worker()

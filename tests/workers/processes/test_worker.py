"""A worker process: how it reads its orders, and what it sends back."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest

from taskcarrier.errors import TaskError
from taskcarrier.memory.segments import locate
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.system.descriptors import make_owner
from taskcarrier.workers.call import Call
from taskcarrier.workers.loop import is_in_worker
from taskcarrier.workers.pickling import pickle_task, unpickle_items
from taskcarrier.workers.processes import grid_run, supervisor
from taskcarrier.workers.processes import worker as module
from taskcarrier.workers.processes.pool import ProcessPool
from taskcarrier.workers.processes.worker import (
    RESULTS,
    Order,
    unpickle_results,
    unpickle_stats,
)
from taskcarrier.workers.records import PartialResult, RangeFailure, WorkerStats, WorkerWarning
from taskcarrier.workers.task import Job
from tests.clocks import LONG, wait_until
from tests.errors import Unreadable
from tests.helpers import BALANCES, Calls, both
from tests.workers.processes import helpers


class Unopenable(Calls):
    def start(self, worker):
        raise OSError("cannot be opened")


def run(pool, func, *args, **options):
    """Run a function with workers that live; return its failures too."""
    ran, delivered = helpers.run(pool, func, *args, **options)
    assert ran.deaths == []
    failures = [
        *ran.failures,
        *(one.failure for one in ran.worker_stats if one.failure is not None),
    ]
    return ran, dict(delivered), failures


class TestOrder:
    @pytest.mark.parametrize("payload", [b"", b"payload", bytes(range(256)) * 1000])
    @pytest.mark.parametrize(
        "attempts", [[], [Attempt(0, 8, 3)], [Attempt(2**40, 2**40 + 1, 2)] * 500]
    )
    @pytest.mark.parametrize("is_streamed", [True, False])
    def test_orders_arrive_with_attempts_and_payload(self, attempts, payload, is_streamed):
        order = Order(payload, attempts, 7, is_streamed)
        assert Order.unpack(order.pack()) == order

    def test_attempts_arrive_with_their_numbers(self):
        (attempt,) = Order.unpack(Order(b"payload", [Attempt(3, 5, 2)]).pack()).attempts
        assert type(attempt) is Attempt
        assert (attempt.start, attempt.stop, attempt.number) == (3, 5, 2)


class Sent:
    """Stands for a channel; keeps what is sent, as the caller reads it."""

    def __init__(self):
        self.messages = []
        self.n_fds = []

    def send(self, data, fds=None):
        assert data[:1] == RESULTS
        self.n_fds.append(len(fds))
        received = unpickle_results((data, [make_owner(os.dup(fd)) for fd in fds]), on_disk=False)
        self.messages.append([(start, unpickle_items(*packed)) for start, *packed in received])


class TestOutbox:
    @pytest.fixture
    def sent(self):
        sent = Sent()
        yield sent
        sent.messages.clear()

    @pytest.fixture
    def outbox(self, sent):
        return module._Outbox(sent, None, module._BATCH_SECONDS)

    def test_results_are_sent_together(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", LONG)
        for start in range(3):
            outbox.deliver(start, f"result {start}")
        assert sent.messages == []
        outbox.flush()
        assert sent.messages == [[(0, "result 0"), (1, "result 1"), (2, "result 2")]]

    def test_an_empty_batch_is_not_sent(self, outbox, sent):
        outbox.flush()
        outbox.deliver(0, "result")
        outbox.flush()
        outbox.flush()
        assert sent.messages == [[(0, "result")]]

    def test_the_time_between_batches_doubles(self, outbox, sent, monkeypatch):
        now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
        sizes = []
        for start in range(400):
            outbox.deliver(start, "result")
            now += 0.0005
            sizes = [len(message) for message in sent.messages]
        assert sizes[:6] == [2, 3, 5, 9, 17, 33]
        assert set(sizes[6:]) == {41}

    def test_a_batch_is_sent_after_its_time(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", 0)
        outbox.deliver(0, "result")
        assert sent.messages == [[(0, "result")]]

    def test_a_batch_is_sent_at_its_size(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", LONG)
        for start in range(5):
            outbox.deliver(start, b"." * (module._BATCH_NBYTES // 2))
        assert [[start for start, _ in message] for message in sent.messages] == [[0, 1], [2, 3]]

    def test_a_result_that_cannot_be_pickled_is_left_out_of_the_batch(self, outbox, sent):
        outbox.deliver(0, "good")
        with pytest.raises(TypeError) as caught:
            outbox.deliver(1, (n for n in range(3)))
        assert any("could not pickle the result" in note for note in caught.value.__notes__)
        outbox.flush()
        assert [start for message in sent.messages for start, _ in message] == [0]

    def test_large_arrays_of_a_batch_come_in_one_segment(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", LONG)
        arrays = [np.arange(5000.0), np.arange(10_000).reshape(100, 100).T]
        outbox.deliver(0, (arrays[0], "small", np.arange(3)))
        outbox.deliver(1, arrays[1])
        arrays[0][:] = 0  # the function uses its array again
        outbox.flush()
        ((_, (first, *rest)), (_, second)) = sent.messages[0]
        np.testing.assert_array_equal(first, np.arange(5000.0))
        np.testing.assert_array_equal(second, arrays[1])
        assert rest[0] == "small"
        assert sent.n_fds == [1]
        places = [locate(array) for array in (first, second, rest[1])]
        assert places[0].segment is places[1].segment
        assert places[2] is None  # small: it was pickled
        assert second.flags.f_contiguous
        first[:] = 1  # the caller's own
        np.testing.assert_array_equal(second, arrays[1])

    def test_each_batch_has_its_own_segment(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(module, "_BATCH_SECONDS", 0)
        monkeypatch.setattr(outbox, "_seconds", 0)
        for start in range(3):
            outbox.deliver(start, np.full(5000, start))
        outbox.deliver(3, np.arange(3))
        assert sent.n_fds == [1, 1, 1, 0]
        assert [int(array[-1]) for message in sent.messages for _, array in message] == [0, 1, 2, 2]

    def test_a_small_part_does_not_keep_the_memory_of_the_batch(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", LONG)
        for start in range(5):
            outbox.deliver(start, np.full(5000, start))
        outbox.flush()
        arrays = [array for _, array in sent.messages[0]]
        assert [int(array[-1]) for array in arrays] == list(range(5))
        assert all(array.flags.writeable and locate(array) is None for array in arrays)

    def test_large_arrays_count_towards_the_size_of_a_batch(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(outbox, "_seconds", LONG)
        outbox.deliver(0, np.zeros(module._BATCH_NBYTES, np.uint8))
        assert len(sent.messages) == 1

    def test_arrays_are_copied_if_descriptors_are_scarce(self, outbox, sent, monkeypatch):
        monkeypatch.setattr(module, "descriptors_are_scarce", lambda: True)
        outbox.deliver(0, np.arange(5000.0))
        outbox.flush()
        (((_, array),),) = sent.messages
        np.testing.assert_array_equal(array, np.arange(5000.0))
        assert locate(array) is None
        assert array.flags.writeable

    def test_arrays_pickled_by_cloudpickle_are_not_sent_twice(self, outbox, sent):
        class Local:
            def __init__(self, array):
                self.array = array

        outbox.deliver(0, [np.arange(5000.0), Local(np.arange(6000.0))])
        outbox.flush()
        (((_, (plain, local)),),) = sent.messages
        np.testing.assert_array_equal(plain, np.arange(5000.0))
        np.testing.assert_array_equal(local.array, np.arange(6000.0))


class LocalWarning(UserWarning):
    def __reduce__(self):
        raise TypeError("stays where it is")


class TestWorkerStats:
    def packed(self, stats):
        return unpickle_stats(module._pickle_stats(stats))

    def test_stats_arrive_in_the_parent(self):
        stats = WorkerStats(3, "", 4, 10, 99, facts=("some", 1))
        stats.warnings = [WorkerWarning(UserWarning("look"), UserWarning, "file.py", 7, "module")]
        arrived = self.packed(stats)
        assert (arrived.worker, arrived.busy_ns) == (3, 99)
        assert (arrived.n_ranges, arrived.n_items) == (4, 10)
        assert arrived.facts == ("some", 1)
        assert arrived.failure is None
        ((message, *where),) = arrived.warnings
        assert (str(message), *where) == ("look", UserWarning, "file.py", 7, "module")

    @pytest.mark.parametrize("where", [(2, 4), None])
    def test_stats_arrive_with_their_failure(self, where):
        failure = RangeFailure(where, ValueError("no"), attempt=3)
        arrived = self.packed(WorkerStats(0, failure=failure)).failure
        assert (arrived.range, arrived.attempt) == (where, 3)
        assert repr(arrived.error) == "ValueError('no')"

    def test_a_warning_that_cannot_be_pickled_is_replaced(self):
        stats = WorkerStats(0)
        stats.warnings = [WorkerWarning(LocalWarning("look"), LocalWarning, "file.py", 7, "module")]
        (arrived,) = self.packed(stats).warnings
        assert arrived == WorkerWarning("LocalWarning: look", UserWarning, "file.py", 7, "module")


class TestWarnings:
    def heard(self, warn):
        with module._record_warnings() as heard:
            warn()
        return [(str(one.message), one.category) for one in heard.values()]

    def test_each_warning_is_heard_once(self):
        def warn():
            for text in ("one", "other", "one"):
                warnings.warn(text, stacklevel=1)
            warnings.warn("one", RuntimeWarning, stacklevel=1)

        assert self.heard(warn) == [
            ("one", UserWarning),
            ("other", UserWarning),
            ("one", RuntimeWarning),
        ]

    def test_warnings_are_heard_in_every_run(self):
        def warn():
            warnings.warn("again", stacklevel=1)

        assert self.heard(warn) == self.heard(warn) == [("again", UserWarning)]

    def test_warnings_that_python_does_not_show_are_heard(self):
        def warn():
            warnings.warn("old", DeprecationWarning, stacklevel=1)

        assert self.heard(warn) == [("old", DeprecationWarning)]

    def test_the_number_of_warnings_is_limited(self):
        def warn():
            for number in range(10 * module._MAX_WARNINGS):
                warnings.warn(str(number), stacklevel=1)

        assert len(self.heard(warn)) == module._MAX_WARNINGS

    def test_filters_of_the_function_hold(self):
        def warn():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.warn("no", stacklevel=1)
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="no"):
                    warnings.warn("no", stacklevel=1)

        assert self.heard(warn) == []

    def test_filters_are_restored(self):
        before = warnings.filters, warnings.showwarning
        self.heard(lambda: None)
        assert (warnings.filters, warnings.showwarning) == before

    @pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
    def test_warnings_come_with_the_stats(self, warm, balance, capfd):
        for _ in range(2):
            ran, _, failures = run(warm, warns_at_four, balance=balance)
            assert failures == []
            heard = [one for stats in ran.worker_stats for one in stats.warnings]
            assert [(str(one.message), one.category) for one in heard] == [("four", FutureWarning)]
            assert Path(heard[0].filename) == Path(__file__)
        assert "four" not in capfd.readouterr().err


def warns_at_four(start, stop):
    if start == 4:
        warnings.warn("four", FutureWarning, stacklevel=1)
    return start


class TestResults:
    def test_results_of_many_megabytes_arrive(self, warm):
        _, delivered, _ = run(warm, large)
        assert sorted(delivered) == list(range(0, 20, 2))
        for start, result in delivered.items():
            assert result.shape == (300_000,)
            assert (result == start).all()

    def test_results_arrive_before_the_end_of_the_run(self, warm, monkeypatch, tmp_path):
        monkeypatch.setattr(grid_run, "TICK", 0.01)
        gate = tmp_path / "gate"
        delivered = []

        def tick(ledger):
            if 2 in delivered:  # the last chunk waits for this
                gate.touch()

        job = Job(Calls(Call(slow_then_wait, (str(gate),))), Dynamic(), ChunkGrid(6, 2), 1)
        ran = warm.run(
            job, pickle_task(job, Staging()), lambda start, _: delivered.append(start), tick
        )
        assert delivered == [0, 2, 4]
        assert ran.worker_stats[0].n_items == 6

    def test_results_that_cannot_be_pickled_are_failures(self, warm):
        _, _, (failure, *_) = run(warm, lambda *_: (n for n in range(3)))
        assert isinstance(failure.error, TypeError)
        assert any("could not pickle the result" in note for note in failure.error.__notes__)

    def test_results_that_cannot_be_unpickled_are_failures(self, warm):
        ran, delivered, (failure,) = run(warm, unreadable_at_four)
        assert (failure.range, failure.attempt) == ((4, 6), 1)
        assert failure.worker in {stats.name for stats in ran.worker_stats}
        assert isinstance(failure.error, EOFError)
        assert any("could not unpickle this result" in note for note in failure.error.__notes__)
        assert ran.is_halted
        assert set(delivered.values()) <= {"good"}
        assert 4 not in delivered


def large(start, stop):
    return np.full(300_000, float(start))


def slow_then_wait(start, stop, gate):
    if start < 4:
        time.sleep(2 * module._BATCH_SECONDS)
    else:
        wait_until(Path(gate).exists)
    return start


def unreadable_at_four(start, stop):
    return Unreadable(EOFError) if start == 4 else "good"


def fail_first(start, stop, error):
    if start == 0:
        raise error


def fail_late(start, stop):
    time.sleep(0.2)
    return start


class TestFailures:
    @pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
    @pytest.mark.parametrize("error", [ValueError("no", 3), SystemExit(3), KeyboardInterrupt()])
    def test_failures_arrive_with_their_range(self, warm, balance, error):
        ran, _, (failure,) = run(warm, fail_first, error, balance=balance)
        assert failure.range == (0, 2)
        assert repr(failure.error) == repr(error)
        assert "in fail_first" in str(failure.error.__cause__)
        assert ran.is_halted

    def test_late_ranges_that_have_ended_are_failures(self, warm, monkeypatch):
        # The caller is kept from looking at the clock, so that the worker sees it first.
        monkeypatch.setattr(supervisor.Supervisor, "_kill_overdue", lambda *_: LONG)
        _, _, failures = run(warm, fail_late, retry_policy=RetryPolicy(timeout=0.1), n_workers=1)
        (failure,) = failures
        assert isinstance(failure.error, TimeoutError)
        assert failure.range == (0, 2)
        assert not hasattr(failure.error, "__notes__")  # nothing about threads

    def test_failures_are_collected(self, warm):
        _, delivered, failures = run(warm, parts_at_four, collect_errors=True)
        assert failures == []
        ((start, stop, error),) = delivered.pop(4).failures
        assert (start, stop, repr(error)) == (4, 6, "ValueError('no')")
        assert set(delivered.values()) == {"good"}

    def test_a_task_that_cannot_be_opened_is_a_failure(self, warm):
        _, delivered, failures = run(warm, both, kind=Unopenable)
        assert delivered == {}
        assert {str(failure.error) for failure in failures} == {"cannot be opened"}
        assert {failure.range for failure in failures} == {None}

    def test_a_task_that_cannot_be_unpickled_is_a_failure(self, warm):
        _, _, failures = run(warm, both, Unreadable(EOFError))
        assert failures
        for failure in failures:
            assert failure.range is None
            assert str(failure.error) == "cannot be read"
            assert any("unpickled the function" in note for note in failure.error.__notes__)
        assert len(run(warm, both)[1]) == 10

    def test_an_error_that_cannot_be_pickled_becomes_a_task_error(self, warm):
        def fail(start, stop):
            raise ValueError(n for n in range(3))

        _, _, (failure, *_) = run(warm, fail)
        assert type(failure.error) is TaskError
        assert failure.error.type_name == "builtins.ValueError"


def parts_at_four(start, stop):
    return PartialResult([], [(start, stop, ValueError("no"))]) if start == 4 else "good"


class TestInside:
    def test_processes_know_that_they_are_workers(self, warm):
        _, delivered, _ = run(warm, lambda *_: is_in_worker())
        assert set(delivered.values()) == {True}
        assert not is_in_worker()

    def test_joblib_is_serial_inside_processes(self, warm):
        def look(start, stop):
            parallel = joblib.Parallel()
            return type(parallel._backend).__name__, parallel.n_jobs

        _, delivered, _ = run(warm, look)
        assert set(delivered.values()) == {("SequentialBackend", 1)}

    def test_ctrl_c_is_ignored_in_workers(self, warm):
        _, delivered, failures = run(warm, interrupt_myself)
        assert failures == []
        assert len(delivered) == 10

    def test_a_function_that_forks_continues_only_in_the_parent(self, warm):
        ran, delivered, failures = run(warm, fork_at_four)
        assert failures == []
        assert sum(stats.n_items for stats in ran.worker_stats) == 20
        assert sorted(delivered) == list(range(0, 20, 2))

    def test_output_of_tasks_is_shown_at_once(self, capfd):
        pool = ProcessPool(1)
        try:
            run(pool, say, n_items=2, n_workers=1)
            wait_until(lambda: "hello from a worker" in capfd.readouterr().out)
        finally:
            pool.close()


def say(start, stop):
    sys.stdout.write("hello from a worker\n")


def interrupt_myself(start, stop):
    os.kill(os.getpid(), signal.SIGINT)
    return start


def fork_at_four(start, stop):
    if start == 4 and (pid := os.fork()):
        os.waitpid(pid, 0)
    return start

"""Queues of the caller and of threads: each batch gives one result."""

import threading
import time

import pytest

from taskcarrier.scheduling.retries import RetryPolicy
from taskcarrier.workers import threads
from taskcarrier.workers.pools import thread_pool
from taskcarrier.workers.queues import (
    MAX_BATCHES_PER_WORKER,
    BatchResult,
    raise_and_forget,
    to_batch_result,
)
from taskcarrier.workers.records import PartialResult, RangeFailure, WorkerStats
from tests.clocks import LATE, LONG
from tests.helpers import stream_job


def all_of(queue, n_items):
    """Return the results of `n_items` items by their start."""
    came = {}
    while sum(one.stop - one.start for one in came.values()) < n_items:
        for one in queue.get(LONG):
            assert one.start not in came
            came[one.start] = one
    return came


class TestThreadQueue:
    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch):
        """Wait for threads that stop late, unless a test asks otherwise."""
        monkeypatch.setattr(threads, "_GRACE_SECONDS", LONG)

    def test_every_queued_batch_gives_its_result(self):
        with thread_pool(2) as pool:
            queue = pool.stream(stream_job(lambda item: item * 2))
            assert not queue.runs_in_caller
            came = {}
            for start in range(0, 40, 4):
                while not queue.has_room:
                    came |= {one.start: one for one in queue.get(LONG)}
                queue.put(start, range(start, start + 4))
            came |= all_of(queue, 40 - 4 * len(came))
            ran = queue.close()
        assert {start: one.result for start, one in came.items()} == {
            start: [2 * item for item in range(start, start + 4)] for start in range(0, 40, 4)
        }
        assert [stats.name for stats in ran.worker_stats] == ["thread 0", "thread 1"]
        assert sum(stats.n_items for stats in ran.worker_stats) == 40
        assert not ran.is_halted

    def test_a_queue_has_room_for_a_few_batches_per_worker(self):
        gate = threading.Event()
        with thread_pool(2) as pool:
            queue = pool.stream(stream_job(gate.wait))
            for start in range(2 * MAX_BATCHES_PER_WORKER):
                assert queue.has_room
                queue.put(start, [LONG])
            assert not queue.has_room
            assert queue.get(0.01) == []
            gate.set()
            assert len(all_of(queue, 2 * MAX_BATCHES_PER_WORKER)) == 2 * MAX_BATCHES_PER_WORKER
            assert queue.has_room
            queue.close()

    def test_waiting_batches_are_dropped_on_close(self):
        ran_items = []
        first = threading.Event()

        def func(item):
            ran_items.append(item)
            first.wait(LONG)

        with thread_pool(1) as pool:
            queue = pool.stream(stream_job(func, 1))
            queue.put(0, [0])
            queue.put(1, [1])
            while not ran_items:
                time.sleep(0.001)
            closing = threading.Thread(target=once_halted, args=(queue.ledger, first.set))
            closing.start()
            ran = queue.close()
            closing.join()
        assert ran_items == [0]
        assert ran.is_halted

    def test_a_stuck_thread_is_replaced(self, monkeypatch):
        monkeypatch.setattr(threads, "_GRACE_SECONDS", LATE)  # for the one that is not stuck
        begun, stuck = [], threading.Event()

        def func(item):
            if item == 0:
                begun.append(threading.current_thread())
                stuck.wait(LONG)

        with thread_pool(2) as pool:
            queue = pool.stream(stream_job(func))
            queue.put(0, [0])
            queue.put(1, [1])
            assert [came.start for came in queue.get(LONG)] == [1]
            ran = queue.close()
            assert sorted(stats.n_items for stats in ran.worker_stats) == [0, 1]
            assert [worker.thread for worker in pool._workers.values()] != begun
            assert len(pool._workers) == 1
            queue = pool.stream(stream_job(abs))
            queue.put(0, [0])
            queue.put(1, [-1])
            assert len(all_of(queue, 2)) == 2
            queue.close()
            stuck.set()
            for thread in begun:
                thread.join(LONG)

    def test_another_thread_starts_when_all_have_a_batch(self):
        gate = threading.Event()
        with thread_pool(500) as pool:
            queue = pool.stream(stream_job(gate.wait, 500))
            for start in range(3):
                assert len(pool._workers) == start
                queue.put(start, [LONG])
            assert len(pool._workers) == 3
            gate.set()
            all_of(queue, 3)
            for start in range(3, 20):
                queue.put(start, [LONG])
                all_of(queue, 1)
            assert len(pool._workers) == 3
            assert len(queue.close().worker_stats) == 3

    def test_an_exit_is_raised_where_results_are_taken(self):
        def leave(item):
            raise SystemExit(item)

        with thread_pool(2) as pool:
            queue = pool.stream(stream_job(leave))
            queue.put(0, [3])
            with pytest.raises(SystemExit) as caught:
                queue.get(LONG)
            assert caught.value.code == 3
            queue.close()

    def test_a_range_that_took_too_long_is_an_error(self):
        retry_policy = RetryPolicy(timeout=0.01)
        with thread_pool(1) as pool:
            queue = pool.stream(stream_job(time.sleep, 1, retry_policy=retry_policy))
            queue.put(3, [0.05])
            (came,) = all_of(queue, 1).values()
            queue.close()
        assert came[:2] == (3, 4)
        ((start, stop, error),) = came.result.failures
        assert (start, stop, type(error)) == (3, 4, TimeoutError)


def once_halted(ledger, then):
    deadline = time.monotonic() + LONG
    while not ledger.is_halted and time.monotonic() < deadline:
        time.sleep(0.001)
    then()


def test_a_partial_result_with_one_failure_becomes_a_batch_result():
    came = BatchResult(1, 2, [5])
    assert to_batch_result(came) is came
    parts = PartialResult([], [(4, 9, ValueError())])
    assert to_batch_result(parts) == BatchResult(4, 9, parts)


def test_an_error_that_was_raised_is_forgotten():
    stats = WorkerStats(0, failure=RangeFailure(None, ValueError("no")))
    failure = stats.failure
    with pytest.raises(ValueError, match="no"):
        raise_and_forget(stats)
    assert stats.failure is None
    assert "error" not in vars(failure)

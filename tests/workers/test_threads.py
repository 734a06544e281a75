"""Pools of threads."""

import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

import joblib
import numpy as np
import pytest

from taskcarrier import map_array, map_items
from taskcarrier.arrays.outputs import buffers, writer
from taskcarrier.arrays.outputs.buffers import CallIsOverError, LocalBuffer
from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import DONE
from taskcarrier.scheduling.retries import RetryPolicy
from taskcarrier.workers import threads as module
from taskcarrier.workers.call import Call
from taskcarrier.workers.loop import is_in_worker
from taskcarrier.workers.task import IN_PLACE, Job
from taskcarrier.workers.threads import ThreadPool
from tests.clocks import LONG, stopped_clock
from tests.helpers import BALANCES, Calls, both


@pytest.fixture
def pool():
    made = ThreadPool(3)
    yield made
    made.close()


def run(pool, func, *, balance=None, n_items=20, n_workers=3, tick=None, **others):
    delivered = []
    job = Job(Calls(Call(func)), balance or Dynamic(), ChunkGrid(n_items, 2), n_workers, **others)
    ran = pool.run(job, lambda *one: delivered.append(one), tick)
    assert ran.deaths == []
    return ran.worker_stats, sorted(delivered), ran


def started(pool):
    """Start the three threads of a pool."""
    run(pool, both)
    return pool


def threads_of(pool):
    return [pool._workers[number].thread for number in sorted(pool._workers)]


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestRun:
    def test_every_chunk_is_delivered_once(self, pool, balance):
        worker_stats, delivered, _ = run(pool, both, balance=balance)
        assert delivered == [(start, (start, start + 2)) for start in range(0, 20, 2)]
        assert sum(stats.n_items for stats in worker_stats) == 20
        assert sum(stats.n_ranges for stats in worker_stats) == 10
        assert all(stats.failure is None for stats in worker_stats)

    def test_stats_are_in_order_of_the_workers(self, pool, balance):
        gate = threading.Barrier(3)  # everybody takes part

        def meet(start, stop):
            if start < 2 * 3 or balance == Static():
                gate.wait(LONG)

        n_items = 6 if balance == Dynamic() else 18
        worker_stats, _, _ = run(pool, meet, balance=balance, n_items=n_items)
        assert [stats.worker for stats in worker_stats] == [0, 1, 2]
        assert [stats.name for stats in worker_stats] == ["thread 0", "thread 1", "thread 2"]
        names = [stats.facts[1] for stats in worker_stats]
        assert names == [f"ThreadPoolExecutor-taskcarrier-{n}" for n in range(3)]

    def test_a_run_may_use_fewer_workers_than_threads(self, pool, balance):
        worker_stats, delivered, _ = run(pool, both, balance=balance, n_workers=2)
        assert [stats.worker for stats in worker_stats] == [0, 1]
        assert len(delivered) == 10

    def test_the_same_threads_run_the_next_run(self, pool, balance):
        seen = set()

        def look(start, stop):
            seen.add(threading.current_thread())
            return IN_PLACE

        for _ in range(5):
            _, delivered, _ = run(pool, look, balance=balance)
            assert delivered == []
        assert seen <= {worker.thread for worker in pool._workers.values()}

    def test_a_failure_stops_the_other_threads(self, pool, balance):
        error = ValueError("no")

        def fail(start, stop):
            if start == 0:
                raise error
            while not failed.wait(0.01):
                pass

        failed = threading.Event()
        timer = threading.Timer(0.2, failed.set)
        timer.start()
        worker_stats, delivered, ran = run(pool, fail, balance=balance, n_items=2000)
        timer.join()
        failures = [stats.failure for stats in worker_stats if stats.failure is not None]
        assert [(failure.range, failure.error) for failure in failures] == [((0, 2), error)]
        assert ran.is_halted
        assert len(delivered) < 1000

    def test_the_pool_works_after_a_failure(self, pool, balance):
        for error in (SystemExit(3), KeyboardInterrupt(), ValueError("no")):

            def fail(start, stop, error=error):
                raise error

            worker_stats, _, _ = run(pool, fail, balance=balance)
            assert error in [stats.failure and stats.failure.error for stats in worker_stats]
        assert len(run(pool, both, balance=balance)[1]) == 10

    def test_chunks_marked_by_an_earlier_run_are_left_out(self, pool, balance):
        segment = Segment.create()
        segment.reserve(10)
        view = SharedView(segment, 0, (10,), (1,), np.dtype(np.uint8))
        marks = view.open("write")
        marks[[0, 3, 9]] = DONE
        worker_stats, delivered, _ = run(pool, both, balance=balance, marks=view)
        assert [start // 2 for start, _ in delivered] == [1, 2, 4, 5, 6, 7, 8]
        assert sum(stats.n_items for stats in worker_stats) == 14
        assert marks.all()

    def test_a_range_that_takes_too_long_is_run_to_its_end(self, pool, balance, monkeypatch):
        clock = stopped_clock(monkeypatch)
        finished = []

        def slow(start, stop):
            if start == 4:
                clock.sleep(0.3)
            finished.append(start)
            return start

        worker_stats, _, ran = run(
            pool, slow, balance=balance, retry_policy=RetryPolicy(timeout=0.2)
        )
        (failure,) = [stats.failure for stats in worker_stats if stats.failure is not None]
        assert failure.range == (4, 6)
        assert isinstance(failure.error, TimeoutError)
        assert 4 in finished
        assert ran.is_halted


class TestInside:
    def test_threads_know_that_they_are_workers(self, pool):
        _, delivered, _ = run(pool, lambda *_: is_in_worker())
        assert {found for _, found in delivered} == {True}
        assert not is_in_worker()

    def test_joblib_is_serial_inside_threads(self, pool):
        def look(start, stop):
            parallel = joblib.Parallel()
            return type(parallel._backend).__name__, parallel.n_jobs

        _, delivered, _ = run(pool, look)
        assert {found for _, found in delivered} == {("SequentialBackend", 1)}

    def test_inner_threads_are_limited_while_a_run_is_open(self, pool, monkeypatch):
        seen = []

        class Guard:
            def open(self):
                return self

            def __enter__(self):
                seen.append("in")

            def __exit__(self, *_):
                seen.append("out")

        monkeypatch.setattr(module, "thread_limit", Guard())
        run(pool, lambda *_: seen.append("index"), n_items=2)
        assert seen == ["in", "index", "out"]

    def test_threads_are_daemons_with_the_names_of_an_executor(self, pool):
        found = threads_of(started(pool))
        assert all(thread.daemon for thread in found)
        assert all(thread.name.startswith("ThreadPoolExecutor-") for thread in found)

    def test_nothing_of_a_run_is_kept_alive(self, pool):
        class Thing:
            def __del__(self):
                gone.set()

        gone = threading.Event()
        thing = Thing()
        run(pool, lambda *_, thing=thing: None)
        del thing
        assert gone.wait(LONG)


class TestWatching:
    def test_the_tick_is_called_while_a_run_is_going_on(self, pool, monkeypatch):
        monkeypatch.setattr(module, "TICK", 0.01)
        release = threading.Event()
        seen = []

        def tick(ledger):
            seen.append(ledger.n_items_done(3))
            if len(seen) == 3:
                release.set()

        run(pool, lambda *_: release.wait(LONG) and IN_PLACE, tick=tick)
        assert seen[0] == 0
        assert seen[-1] == 20
        assert seen == sorted(seen)

    def test_an_interrupted_run_does_not_wait_for_stuck_threads(self, pool, monkeypatch):
        monkeypatch.setattr(module, "TICK", 0.01)
        release = threading.Event()
        calls = []

        def stuck(start, stop):
            calls.append(start)
            assert release.wait(LONG)

        def interrupt(ledger):
            if len(calls) == 3:
                raise KeyboardInterrupt

        before = threads_of(started(pool))
        with pytest.raises(KeyboardInterrupt):
            run(pool, stuck, n_items=200, tick=interrupt)
        assert all(thread.is_alive() for thread in before)  # still in their chunks
        assert len(run(pool, both)[1]) == 10  # by others
        release.set()
        for thread in before:
            thread.join(LONG)
            assert not thread.is_alive()  # they do not come back,
        assert len(calls) == 3  # nor take another chunk

    def test_threads_that_have_reported_stay_in_the_pool(self, pool, monkeypatch):
        monkeypatch.setattr(module, "TICK", 0.01)
        release = threading.Event()
        reported = []
        before = threads_of(started(pool))
        begin = pool.begin

        def watched(number, job, work, record_end):
            def record_both(stats):
                record_end(stats)
                reported.append(number)

            begin(number, job, work, record_both)

        monkeypatch.setattr(pool, "begin", watched)

        def one_is_stuck(start, stop):
            if start == 0:
                assert release.wait(LONG)

        def interrupt(ledger):
            if len(reported) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pool, one_is_stuck, balance=Static(), n_items=6, tick=interrupt)
        assert threads_of(pool) == before[1:]
        run(pool, both)
        release.set()
        assert threads_of(pool)[1:] == before[1:]
        assert threads_of(pool)[0] not in before


@contextmanager
def left_behind(verb, func, *, n_before, **options):
    """Interrupt a call whose two threads are in a call of `func`, each after `n_before` calls.

    Inside, they are still there; what is yielded lets them go on, and waits for their end.
    """
    release, caught, calls, stuck = threading.Event(), threading.Event(), Counter(), []

    def waits(items):
        thread = threading.current_thread()
        calls[thread] += 1
        if calls[thread] > n_before:
            stuck.append(thread)
            assert release.wait(LONG)
        return func(items)

    def heard(*_):
        # Only once, wherever the caller is when further signals come.
        if not caught.is_set():
            caught.set()
            raise KeyboardInterrupt

    def interrupt():
        deadline = time.monotonic() + LONG
        while len(stuck) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        # Python misses a signal that comes just before it begins to wait for a lock.
        while not caught.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            caught.wait(1)

    def let_go():
        release.set()
        for thread in stuck:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in stuck)

    before = signal.signal(signal.SIGINT, heard)
    other = threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            verb(waits, ITEMS, n_jobs=2, backend="threading", chunksize=2, **options)
        assert len(stuck) == 2
        yield let_go
    finally:
        caught.set()
        other.join()
        signal.signal(signal.SIGINT, before)
        let_go()


ITEMS = np.arange(1.0, 41)


@pytest.mark.parametrize("balance", ["static", "dynamic"])
class TestAfterInterruptedCall:
    """Threads that an interrupted call has left behind get their results after it is over."""

    # The first result of a thread and further ones go different ways.
    @pytest.mark.parametrize("n_before", [0, 1, 2])
    def test_no_result_is_written_after_the_call(self, balance, n_before):
        out = np.zeros(40)
        with left_behind(
            map_array, lambda c: c, n_before=n_before, balance=balance, out=out
        ) as let_go:
            before = out.copy()
            # What was finished is there.
            assert (before > 0).sum() == 2 * 2 * n_before
            assert np.array_equal(before[before > 0], ITEMS[before > 0])
            let_go()
            assert np.array_equal(out, before)

    def test_none_of_several_results_is_written_after_the_call(self, balance):
        out = np.zeros(40), np.zeros(40)
        with left_behind(
            map_array, lambda c: (c, -c), n_before=1, balance=balance, out=out
        ) as let_go:
            before = [one.copy() for one in out]
            let_go()
            assert all(map(np.array_equal, out, before))

    def test_no_item_is_written_after_the_call(self, balance):
        out = np.zeros(40)
        with left_behind(map_items, float, n_before=4, balance=balance, out=out) as let_go:
            before = out.copy()
            assert before.any()
            let_go()
            assert np.array_equal(out, before)

    def test_nothing_is_written_to_a_mapped_file_after_the_call(self, balance, tmp_path):
        path = tmp_path / "Y.npy"
        out = np.lib.format.open_memmap(path, "w+", "f8", (40,))
        with left_behind(map_array, lambda c: c, n_before=1, balance=balance, out=out) as let_go:
            before = path.read_bytes()
            let_go()
            assert path.read_bytes() == before


class TestOutputLock:
    def test_outputs_are_closed_once_the_call_is_over(self):
        buffer = LocalBuffer(n_items=4, order="C")
        buffer.check_open()
        buffer.close()
        with pytest.raises(CallIsOverError):
            buffer.check_open()

    def test_closing_waits_for_a_thread_that_is_writing(self):
        buffer = LocalBuffer(n_items=4, order="C")
        events = []
        is_writing = threading.Event()

        def write():
            with buffer.make_write_lock():
                is_writing.set()
                while is_open(buffer):  # until closing has begun
                    time.sleep(0.001)
                events.append("written")

        thread = threading.Thread(target=write)
        thread.start()
        assert is_writing.wait(LONG)
        buffer.close()
        events.append("closed")
        thread.join(LONG)
        assert events == ["written", "closed"]

    def test_ctrl_c_at_any_step_of_writing_ends_the_call(self):
        n_steps = 0
        while (how := call_interrupted_at(n_steps)) == "interrupted":
            n_steps += 1
        assert how == "complete"
        assert n_steps > 10


def is_open(buffer):
    with suppress(CallIsOverError):
        buffer.check_open()
        return True
    return False


def call_interrupted_at(number):
    """Return how a map in the caller ends, with Ctrl-C at a step of the code that writes results.

    Python delivers it where a function begins, and where one of C has returned.
    """
    ended = []
    steps = iter(range(number))

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename not in {buffers.__file__, writer.__file__}:
            return
        if code.co_name == "close":  # the call is over then
            return
        if event in {"call", "c_return"} and next(steps, None) is None:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def call():
        sys.setprofile(trace)
        try:
            map_array(np.negative, np.arange(4.0), chunksize=2, n_jobs=1, out=np.zeros(4))
            ended.append("complete")
        except KeyboardInterrupt:
            ended.append("interrupted")
        finally:
            sys.setprofile(None)

    # In a thread of its own, so that this one does not wait at a door for ever.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(LONG)
    return ended[0] if ended else f"stuck after an interrupt at step {number}"


class TestEnd:
    def test_closing_ends_idle_threads(self):
        pool = ThreadPool(3)
        found = threads_of(started(pool))
        pool.close()
        assert not any(thread.is_alive() for thread in found)

    def test_closing_need_not_wait(self):
        pool = ThreadPool(3)
        found = threads_of(started(pool))
        began = time.monotonic()
        pool.close(wait=False)
        assert time.monotonic() - began < LONG
        for thread in found:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in found)

    def test_a_forgotten_pool_closes_nothing(self):
        pool = started(ThreadPool(3))
        workers = list(pool._workers.values())
        pool.drop_after_fork()
        pool.close()
        assert all(worker.thread.is_alive() for worker in workers)
        for worker in workers:
            worker.inbox.put(None)
            worker.thread.join(LONG)

"""Pools are lent, kept warm, and ended when they are not needed."""

import errno
import os
import threading
import time

import numba
import numpy as np
import psutil
import pytest

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
)
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers import pools as module
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_task
from taskcarrier.workers.pools import keep_warm, process_pool, shutdown, thread_pool
from taskcarrier.workers.processes import pool
from taskcarrier.workers.records import WorkerStats
from taskcarrier.workers.task import Job
from taskcarrier.workers.threads import ThreadPool
from tests.clocks import LONG, wait_until
from tests.helpers import Calls

pytestmark = pytest.mark.one_case  # each starts workers

LENDERS = {"threading": thread_pool, "loky": process_pool}


def where(start, stop):
    return os.getpid(), threading.current_thread().name


def run(pool, func=where, n_workers=2):
    delivered = []
    job = Job(Calls(Call(func)), Dynamic(), ChunkGrid(n_workers, 1), n_workers)
    payload = () if isinstance(pool, ThreadPool) else (pickle_task(job, Staging()),)
    pool.run(job, *payload, lambda _, result: delivered.append(result), None)
    return delivered


def workers(pool):
    """Return the living workers of a pool."""
    if isinstance(pool, ThreadPool):
        return [w.thread for w in pool._workers.values() if w.thread.is_alive()]
    return [w.pid for w in pool._workers.values() if psutil.pid_exists(w.pid)]


def pools():
    """Return all pools."""
    return [place.pool for place in module._pools._places]


def keepers():
    return [t for t in threading.enumerate() if t.name == "taskcarrier-keeper"]


def limit_starts(monkeypatch, backend, n):
    """Let only `n` more workers start, as if the system allowed no more."""
    left = iter(range(n))
    if backend == "threading":
        start = threading.Thread.start

        def started(thread):
            if thread.name.startswith("ThreadPoolExecutor-") and next(left, None) is None:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", started)
        return
    process = pool.WorkerProcess

    def made(*args):
        if next(left, None) is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return process(*args)

    monkeypatch.setattr(pool, "WorkerProcess", made)


CALLS = {
    "map_array": lambda run: map_array(np.negative, np.arange(40.0), chunksize=1, **run),
    "map_items": lambda run: map_items(np.negative, np.arange(40.0), chunksize=1, **run),
    "map_chunks": lambda run: map_chunks(len, np.arange(40.0), chunksize=1, **run),
    "map": lambda run: StaticParallelMapper(**run).map(abs, range(40)),
    "imap": lambda run: list(DynamicParallelMapper(**run).imap(time.sleep, [0.2] * 40)),
}


@pytest.mark.fault(43)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("general_way")  # a short call needs no workers
class TestTooManyWorkers:
    @pytest.mark.one_case
    @pytest.mark.parametrize("backend", ["loky", "threading"])
    def test_too_many_workers_are_one_error_and_none_stay(self, call, backend, monkeypatch):
        before = set(threading.enumerate()), set(psutil.Process().children(recursive=True))
        map_array(np.negative, np.arange(2.0), n_jobs=2, backend=backend)
        shutdown()
        limit_starts(monkeypatch, backend, 3)
        started = RuntimeError if backend == "threading" else BlockingIOError
        with pytest.raises(started) as info:
            CALLS[call]({"n_jobs": 30, "backend": backend})
        (note,) = [one for one in info.value.__notes__ if "could be started" in one]
        assert note.startswith("only 3 of 30 ")
        assert "pass a smaller n_jobs" in note
        wait_until(lambda: not pools())
        # Without `shutdown`.
        wait_until(lambda: not set(threading.enumerate()) - before[0] - set(keepers()))
        trackers = 2  # of multiprocessing and of loky
        wait_until(
            lambda: len(set(psutil.Process().children(recursive=True)) - before[1]) <= trackers
        )

    @pytest.mark.parametrize("backend", LENDERS)
    def test_a_call_with_fewer_workers_may_follow(self, call, backend, monkeypatch):
        limit_starts(monkeypatch, backend, 3)
        with pytest.raises((RuntimeError, BlockingIOError)):
            CALLS[call]({"n_jobs": 30, "backend": backend})
        monkeypatch.undo()
        limit_starts(monkeypatch, backend, 2)
        CALLS["map_array"]({"n_jobs": 2, "backend": backend})
        assert last_report().n_jobs == 2


@pytest.mark.fault(43)
def test_pools_are_not_kept_without_a_keeper(lend, monkeypatch):
    start = threading.Thread.start

    def started(thread):
        if thread.name == "taskcarrier-keeper":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    with lend(2) as pool:
        assert len(run(pool)) == 2
    wait_until(lambda: not workers(pool))
    assert not pools()


THREE_OF_FIVE_HUNDRED = {
    "map_array": lambda run: map_array(np.negative, np.arange(3.0), **run),
    "map_items": lambda run: map_items(np.negative, np.arange(3.0), **run),
    "fused": lambda run: map_items(numba.njit(lambda x: -x), np.arange(3.0), **run),
    "map_chunks": lambda run: map_chunks(len, np.arange(3.0), **run),
    "reduce_array": lambda run: reduce_array(np.sum, np.arange(3.0), combine=np.add, **run),
    "map": lambda run: StaticParallelMapper(**run).map(abs, range(3)),
    "imap": lambda run: list(DynamicParallelMapper(**run).imap(abs, range(3))),
}


@pytest.mark.fault(43)
@pytest.mark.usefixtures("general_way")  # a short call needs no workers
@pytest.mark.parametrize("call", THREE_OF_FIVE_HUNDRED)
@pytest.mark.parametrize("backend", LENDERS)
def test_no_more_workers_are_started_than_there_are_tasks(call, backend):
    THREE_OF_FIVE_HUNDRED[call]({"n_jobs": 500, "backend": backend})
    (pool,) = pools()
    assert 1 <= len(workers(pool)) <= 3
    assert last_report().n_jobs <= 3


@pytest.fixture(autouse=True)
def no_pools():
    """End all pools before and after a test."""
    shutdown()
    yield
    shutdown()


@pytest.fixture(params=LENDERS)
def lend(request):
    return LENDERS[request.param]


class TestLending:
    def test_pools_work_where_they_should(self):
        with thread_pool(2) as threads, process_pool(2) as pool:
            assert {pid for pid, _ in run(threads)} == {os.getpid()}
            assert os.getpid() not in {pid for pid, _ in run(pool)}

    def test_a_returned_pool_is_lent_again(self, lend):
        with lend(2) as pool:
            run(pool)
            before = workers(pool)
        with lend(2) as again:
            run(again)
            assert again is pool
            assert workers(again) == before
        assert len(before) == 2

    def test_a_pool_is_lent_again_after_an_error(self, lend):
        with pytest.raises(KeyError), lend(2) as pool:
            raise KeyError
        with lend(2) as again:
            assert again is pool

    @pytest.mark.parametrize("other", [1, 3])
    def test_another_number_of_workers_gets_another_pool(self, lend, other):
        with lend(2) as pool:
            pass
        with lend(other) as another:
            assert another is not pool

    def test_another_backend_gets_another_pool(self):
        with thread_pool(2) as threads:
            pass
        with process_pool(2) as pool:
            assert pool is not threads

    @pytest.mark.thorough
    def test_overlapping_runs_get_different_pools(self, lend):
        with lend(2) as one, lend(2) as other:
            assert one is not other
            run(one)
            run(other)
            assert not set(workers(one)) & set(workers(other))
        with lend(2) as again:
            assert again in (one, other)

    def test_the_pool_used_last_is_lent_first(self, lend):
        with lend(2) as one, lend(2) as other:
            assert one is not other
        with lend(2) as again:
            assert again is one  # it came back last

    def test_many_threads_may_borrow_pools(self):
        taken = []
        begin = threading.Barrier(6)

        def borrow():
            begin.wait(LONG)
            for _ in range(20):
                with thread_pool(1) as pool:
                    assert pool not in in_use
                    in_use.add(pool)
                    taken.append(pool)
                    run(pool, n_workers=1)
                    in_use.discard(pool)

        in_use = set()
        threads = [threading.Thread(target=borrow) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 120
        assert len(set(taken)) <= 6


@pytest.mark.fault(44)
class TestLostLeases:
    def test_a_lost_lease_returns_its_pool(self):
        lease = module._pools.take(("threading", 2, True, ()))
        pool = lease.place.pool
        del lease
        with thread_pool(2) as again:
            assert again is pool

    def test_a_lost_pool_is_ended_if_another_was_made_meanwhile(self):
        lost = module._pools.take(("threading", 2, True, ()))
        gone = workers(lost.place.pool)
        with thread_pool(2) as other:
            run(other)
        del lost
        wait_until(lambda: pools() == [other])
        wait_until(lambda: not any(thread.is_alive() for thread in gone))

    def test_a_pool_that_has_ended_is_not_lent(self):
        with thread_pool(2):
            (place,) = module._pools._places
        shutdown()
        assert place.lend(lambda _: None) is None

    def test_a_pool_whose_threads_are_still_at_work_is_filled_up(self):
        go_on = threading.Event()
        pool = ThreadPool(2)
        begun = []

        def waits():
            begun.append(threading.current_thread())
            go_on.wait(LONG)

        job = Job(Calls(Call(waits)), Dynamic(), ChunkGrid(2, 1), 2)
        pool._ensure_threads(range(2))
        for number in range(2):  # as if the caller had been stopped just after
            pool.begin(number, job, lambda: (waits(), WorkerStats(0))[1], lambda _: None)
        wait_until(lambda: len(begun) == 2)
        assert len(run(pool)) == 2
        go_on.set()
        for thread in begun:
            thread.join(LONG)
            assert not thread.is_alive()
        pool.close()


class TestIdle:
    @pytest.fixture
    def impatient(self, monkeypatch):
        monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)

    @pytest.mark.usefixtures("impatient")
    def test_idle_pools_end(self, lend):
        with lend(2) as pool:
            run(pool)
            found = workers(pool)
        wait_until(lambda: not workers(pool) and not keepers())
        assert len(found) == 2
        with lend(2) as another:
            assert another is not pool
            assert len(run(another)) == 2

    @pytest.mark.thorough
    @pytest.mark.usefixtures("impatient")
    def test_lent_pools_do_not_end(self, lend):
        with lend(2) as pool:
            with thread_pool(1):
                pass  # the keeper is at work
            wait_until(lambda: pools() == [pool])
            assert len(run(pool)) == 2

    @pytest.mark.thorough
    def test_idle_pools_end_only_after_their_time(self, lend):
        assert module.IDLE_SECONDS == 300
        with lend(2) as pool:
            run(pool)
        time.sleep(0.1)
        assert len(workers(pool)) == 2
        assert len(keepers()) == 1

    @pytest.mark.usefixtures("impatient")
    def test_pools_kept_warm_do_not_end(self):
        with keep_warm():
            with keep_warm(), thread_pool(2) as pool:
                run(pool)
            (keeper,) = keepers()
            time.sleep(1.3)  # the keeper looks every second at most
            assert len(workers(pool)) == 2
            assert keeper.is_alive()
            with thread_pool(2) as again:
                assert again is pool
        wait_until(lambda: not workers(pool))

    def test_keeping_warm_ends_with_an_error(self):
        with pytest.raises(KeyError), keep_warm():
            raise KeyError
        assert not module._pools._warm_holders


class TestShutdown:
    def test_shutdown_ends_idle_workers(self, lend):
        with lend(2) as pool:
            run(pool)
        assert len(workers(pool)) == 2
        shutdown()
        assert workers(pool) == []
        assert keepers() == []

    @pytest.mark.thorough
    def test_a_keeper_that_cannot_start_is_tried_again(self, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            lent = process_pool(2)
            with process_pool(1) as other:
                pass
            assert other not in pools()
            assert keepers() == []
        with lent as pool:
            assert len(run(pool)) == 2
        assert pools() == [pool]
        assert len(keepers()) == 1

    def test_shutdown_ends_a_keeper_that_has_only_just_started(self):
        with module._pools._keeper_lock:  # before the keeper comes to wait
            take = threading.Thread(target=module._pools.take, args=[("threading", 1, True, ())])
            take.start()
            wait_until(pools)
        take.join()
        shutdown()
        assert keepers() == []

    def test_shutdown_waits_for_a_pool_that_the_keeper_ends(self, monkeypatch):
        ending, go_on, is_over = threading.Event(), threading.Event(), threading.Event()
        with thread_pool(3):  # not idle, so that the keeper stays
            with thread_pool(2) as pool:
                close = pool.close

                def end_slowly(*, wait=True):
                    ending.set()
                    go_on.wait(LONG)
                    close(wait=wait)

                monkeypatch.setattr(pool, "close", end_slowly)
                monkeypatch.setattr(pool, "lacks_workers", True)
                monkeypatch.setattr(module._pools, "end_unless_kept", lambda _: None)
            module._pools._keeper_inbox.put(None)
            assert ending.wait(LONG)
            caller = threading.Thread(target=lambda: (shutdown(), is_over.set()))
            caller.start()
            assert not is_over.wait(0.2)
            go_on.set()
            caller.join(LONG)
            assert is_over.is_set()

    def test_shutdown_is_public(self):
        assert taskcarrier.shutdown is shutdown

    def test_shutdown_may_be_called_twice(self, lend):
        with lend(1):
            pass
        shutdown()
        shutdown()
        assert pools() == []

    def test_busy_workers_finish_and_stay_warm_after_shutdown(self, lend):
        with lend(2) as pool:
            run(pool)
            shutdown()
            assert len(run(pool)) == 2
        with lend(2) as again:
            assert again is pool

    def test_shutdown_ends_workers_that_are_kept_warm(self, lend):
        with keep_warm():
            with lend(1) as pool:
                run(pool, n_workers=1)
            shutdown()
            assert workers(pool) == []

    def test_workers_end_at_exit_only_in_the_process_that_owns_them(self, lend):
        with lend(1) as pool:
            run(pool, n_workers=1)
        module._shutdown_at_exit(owner=-1)
        assert len(workers(pool)) == 1
        module._shutdown_at_exit(owner=os.getpid())
        wait_until(lambda: not workers(pool))


# Python 3.12 warns of any fork beside threads; this is about what such a child finds.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestFork:
    @staticmethod
    def answer_in_child(check):
        """Return what a check says in a forked child."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                os.write(writing, repr(check()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            said = answer.read()
        os.waitpid(pid, 0)
        return said

    def test_a_forked_child_starts_without_pools(self, lend):
        with lend(2) as pool:
            run(pool)

        def check():
            return len(pools()), len(pool._workers)

        assert self.answer_in_child(check) == "(0, 0)"
        assert len(workers(pool)) == 2
        with lend(2) as again:
            assert again is pool
            assert len(run(again)) == 2

    @pytest.mark.thorough
    def test_a_forked_child_of_a_busy_parent_starts_without_pools(self, lend):
        def check():
            return len(pools()), bool(module._pools._warm_holders)

        with keep_warm(), lend(2) as pool:
            run(pool)
            assert self.answer_in_child(check) == "(0, False)"
            assert len(run(pool)) == 2

    def test_a_forked_child_has_its_own_pools(self):
        with thread_pool(2) as pool:
            run(pool)

        def check():
            with thread_pool(2) as own:
                return own is pool, {pid for pid, _ in run(own)} == {os.getpid()}

        assert self.answer_in_child(check) == "(False, True)"

    @pytest.mark.thorough
    def test_the_exit_of_a_forked_child_ends_no_worker(self, lend):
        with lend(2) as pool:
            run(pool)

        def check():
            module._shutdown_at_exit()
            shutdown()
            return "done"

        assert self.answer_in_child(check) == "'done'"
        assert len(workers(pool)) == 2
        assert len(run(pool)) == 2


def test_a_pool_that_cannot_be_prepared_fails_when_it_is_used(monkeypatch):
    def refuse(key):
        raise OSError(errno.EMFILE, "Too many open files")

    shutdown()
    monkeypatch.setattr(module, "_new_pool", refuse)
    module.prepare_processes(2)
    assert pools() == []
    with pytest.raises(OSError, match="Too many open files"), process_pool(2):
        pass

"""Pools of worker processes: what they deliver, how they end, which workers are replaced."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import joblib
import psutil
import pytest

from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.retries import RetryPolicy
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_task
from taskcarrier.workers.processes import grid_run, worker_starter
from taskcarrier.workers.processes import pool as module
from taskcarrier.workers.processes.pool import ProcessPool
from taskcarrier.workers.processes.worker_starter import WorkerStarter
from taskcarrier.workers.task import IN_PLACE, Job
from tests.clocks import LONG, wait_until
from tests.helpers import BALANCES, Calls, both, in_place
from tests.workers.processes.helpers import run

pytestmark = pytest.mark.one_case  # each starts workers


def pids(pool):
    return {worker.pid for worker in pool._workers.values() if worker.pidfd >= 0}


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def die(start, stop, at):
    """Die in the range that begins at `at`."""
    if start == at:
        os._exit(7)
    return start, stop


def stuck(start, stop, marks):
    Path(marks, str(start)).touch()
    time.sleep(LONG)


ALL = [(start, (start, start + 2)) for start in range(0, 20, 2)]


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestRun:
    def test_every_chunk_is_delivered_once(self, warm, balance):
        ran, delivered = run(warm, both, balance=balance)
        assert sorted(delivered) == ALL
        assert (ran.deaths, ran.unrecovered_deaths, ran.missing, ran.failures) == ([], [], [], [])
        assert sum(stats.n_items for stats in ran.worker_stats) == 20
        assert sum(stats.n_ranges for stats in ran.worker_stats) == 10
        assert all(stats.failure is None for stats in ran.worker_stats)

    def test_stats_are_in_order_of_the_workers(self, warm, balance):
        worker_stats = run(warm, both, balance=balance)[0].worker_stats
        assert [stats.worker for stats in worker_stats] == [0, 1]
        assert [stats.name for stats in worker_stats] == [
            f"process {a.facts[0]}" for a in worker_stats
        ]
        assert {stats.facts[0] for stats in worker_stats} == pids(warm)
        assert os.getpid() not in pids(warm)

    def test_the_same_processes_run_the_next_run(self, warm, balance):
        before = pids(warm)
        for _ in range(3):
            run(warm, both, balance=balance)
        assert pids(warm) == before

    def test_marks_of_the_last_run_are_forgotten(self, warm, balance):
        for n_items in (20, 12, 40):
            ran, _ = run(warm, in_place, balance=balance, n_items=n_items)
            assert sum(stats.n_items for stats in ran.worker_stats) == n_items

    def test_a_run_may_use_fewer_workers_than_the_pool_has(self, warm, balance):
        ran, delivered = run(warm, both, balance=balance, n_workers=1)
        assert [stats.worker for stats in ran.worker_stats] == [0]
        assert delivered == ALL

    def test_results_in_place_are_not_delivered(self, warm, balance):
        ran, delivered = run(warm, in_place, balance=balance)
        assert delivered == []
        assert sum(stats.n_items for stats in ran.worker_stats) == 20

    def test_no_items_are_one_empty_chunk(self, warm, balance):
        ran, delivered = run(warm, both, balance=balance, n_items=0)
        assert delivered == [(0, (0, 0))]
        assert sum(stats.n_ranges for stats in ran.worker_stats) == 1


class TestDeadWorkers:
    def test_dead_workers_are_replaced_within_the_run(self, pool):
        run(pool, both)
        before = pids(pool)
        ran, _ = run(pool, die, 6, retry_policy=RetryPolicy(retries=1))
        assert len(ran.deaths) == 2
        assert pids(pool) & before  # the other worker is the same
        assert {death.name for death in ran.deaths}.isdisjoint(
            f"process {pid}" for pid in pids(pool)
        )

    @pytest.mark.thorough
    def test_a_worker_that_was_given_up_is_replaced_by_the_next_run(self, pool):
        run(pool, both)
        before = pids(pool)
        run(pool, die, 6, retry_policy=RetryPolicy(retries=0))
        assert len(pids(pool)) == 1
        ran, delivered = run(pool, both)
        assert (len(ran.worker_stats), ran.deaths, sorted(delivered)) == (2, [], ALL)
        assert len(pids(pool) & before) == 1
        assert len(pids(pool)) == 2

    def test_a_worker_killed_while_idle_is_replaced(self, pool):
        run(pool, both)
        victim, other = pool._workers[0].pid, pool._workers[1].pid
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not running(victim))
        ran, delivered = run(pool, both)
        assert (len(ran.worker_stats), ran.deaths, sorted(delivered)) == (2, [], ALL)
        assert victim not in pids(pool)
        assert other in pids(pool)

    @pytest.mark.thorough
    def test_a_worker_killed_while_the_run_begins_is_replaced(self, pool):
        for _ in range(5):
            run(pool, both)
            os.kill(pool._workers[0].pid, signal.SIGKILL)
            ran, delivered = run(pool, both)
            assert ran.unrecovered_deaths == []
            assert sorted(set(delivered)) == ALL

    @pytest.fixture(params=["pidfd", "no pidfd"])
    def way(self, request, monkeypatch):
        if request.param == "no pidfd":
            monkeypatch.delattr(os, "pidfd_open")

    @pytest.mark.fault(50)
    def test_deaths_are_seen_without_a_pidfd(self, way, pool):
        ran, delivered = run(pool, die, 6, retry_policy=RetryPolicy(retries=1))
        assert [death.exitcode for death in ran.deaths] == [7, 7]
        ran, delivered = run(pool, both)
        assert (ran.deaths, sorted(delivered)) == ([], ALL)
        os.kill(pool._workers[0].pid, signal.SIGKILL)
        ran, delivered = run(pool, both)
        assert sorted(set(delivered)) == ALL

    @pytest.mark.fault(50)
    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_nothing_is_left_of_a_worker_that_could_not_be_started(self, pool, monkeypatch, error):
        def fails(pid, pidfd):
            started.append(pid)
            raise error("no")

        started = []
        with monkeypatch.context() as patch:
            patch.setattr(worker_starter, "ProcessExit", fails)
            with pytest.raises(error, match="no"):
                run(pool, both)
        (pid,) = started
        assert not psutil.pid_exists(pid)
        assert sorted(run(pool, both)[1]) == ALL

    @pytest.mark.fault(51)
    def test_a_python_that_cannot_be_run_is_an_error_that_says_so(
        self, pool, monkeypatch, tmp_path
    ):
        other = tmp_path / "python"
        other.touch(mode=0o600)
        monkeypatch.setattr(sys, "executable", str(other))
        with pytest.raises(PermissionError, match="pass backend='threading'") as caught:
            run(pool, both)
        assert caught.value.filename == str(other)
        monkeypatch.undo()
        assert sorted(run(pool, both)[1]) == ALL

    @pytest.mark.fault(51)
    def test_a_worker_of_another_user_is_killed_by_its_pipe(self, pool, monkeypatch):
        def refuse(*_):
            raise PermissionError

        run(pool, both)
        monkeypatch.setattr(os, "kill", refuse)
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
        for worker in pool._workers.values():
            worker.kill()
            worker.kill()
            assert worker.reap() == -signal.SIGKILL

    @pytest.mark.thorough
    def test_dead_workers_leave_no_descriptor(self, way, pool):
        run(pool, both)
        run(pool, both)
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are compared, as strings
        for _ in range(2):
            run(pool, die, 6)
            run(pool, both)
        after = os.listdir("/proc/self/fd")  # noqa: PTH208  # names are compared, as strings
        assert len(after) == len(before)


class TestWatching:
    def test_the_tick_is_called_while_a_run_is_going_on(self, warm, monkeypatch, tmp_path):
        monkeypatch.setattr(grid_run, "TICK", 0.01)
        gate = tmp_path / "gate"
        seen = []

        def tick(ledger):
            seen.append(ledger.n_items_done(2))
            if len(seen) == 3:
                gate.touch()

        run(warm, wait_for, str(gate), tick=tick)
        assert seen[0] == 0
        assert seen[-1] == 20
        assert seen == sorted(seen)

    def test_an_interrupted_run_kills_stuck_workers(self, pool, monkeypatch, tmp_path):
        monkeypatch.setattr(grid_run, "TICK", 0.01)
        monkeypatch.setattr(grid_run, "GRACE_SECONDS", 0.1)
        run(pool, both)
        before = pids(pool)

        def interrupt(ledger):
            if len(list(tmp_path.iterdir())) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pool, stuck, str(tmp_path), n_items=200, tick=interrupt)
        assert not any(running(pid) for pid in before)
        assert len(list(tmp_path.iterdir())) == 2
        assert sorted(run(pool, both)[1]) == ALL
        assert pids(pool).isdisjoint(before)

    def test_an_interrupted_run_lets_other_workers_finish_their_chunk(self, pool, monkeypatch):
        monkeypatch.setattr(grid_run, "TICK", 0.01)
        monkeypatch.setattr(grid_run, "GRACE_SECONDS", LONG)
        run(pool, both)
        before = pids(pool)

        def interrupt(ledger):
            if ledger.n_items_done(2) > 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pool, nap, n_items=8_000, tick=interrupt)
        ran, delivered = run(pool, both)
        assert (len(ran.worker_stats), sorted(delivered)) == (2, ALL)
        assert pids(pool) == before

    def test_an_interrupt_while_a_worker_is_started_is_raised_afterwards(self, pool, monkeypatch):
        # It reaches a thread that a library might have started: the mask of ours is no help.
        end = threading.Event()
        bystander = threading.Thread(target=end.wait)
        bystander.start()
        start = WorkerStarter.start
        started = []

        def interrupted_start(*args):
            worker = start(*args)
            started.append(worker.pid)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            return worker

        monkeypatch.setattr(WorkerStarter, "start", interrupted_start)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(pool, both)
        finally:
            end.set()
            bystander.join()
            monkeypatch.undo()
        assert sorted(run(pool, both)[1]) == ALL
        assert started[0] in pids(pool)  # it was started to the end

    def test_an_interrupt_while_a_worker_dies_is_raised(self, pool, monkeypatch):
        monkeypatch.setattr(grid_run, "TICK", 0.01)
        monkeypatch.setattr(grid_run, "GRACE_SECONDS", 0.1)
        run(pool, both)

        def interrupt(ledger):
            if ledger.n_items_done(2) > 2:
                os.kill(pool._workers[0].pid, signal.SIGKILL)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pool, nap, n_items=8_000, tick=interrupt)
        assert sorted(run(pool, both)[1]) == ALL

    def test_an_error_while_a_result_is_delivered_is_raised(self, pool):
        def refuse_result(start, result):
            raise ZeroDivisionError

        job = Job(Calls(Call(both)), Dynamic(), ChunkGrid(20, 2), 2)
        with pytest.raises(ZeroDivisionError):
            pool.run(job, pickle_task(job, Staging()), refuse_result, None)
        assert sorted(run(pool, both)[1]) == ALL


def wait_for(start, stop, gate):
    wait_until(Path(gate).exists)
    return IN_PLACE


def nap(start, stop):
    time.sleep(0.01)


@pytest.mark.thorough
@pytest.mark.fault(44)
def test_stuck_workers_that_end_late_take_no_others_with_them(pool, monkeypatch):
    def at_work(yes):
        for worker in pool._workers.values():
            worker.is_free = not yes

    def interrupted(what):
        late.append(what)
        raise KeyboardInterrupt

    late = []
    run(pool, both)
    before = pids(pool)
    at_work(True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_sheltered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pool, both)
    assert len(run(pool, both)[1]) == 10
    after = pids(pool)
    assert before.isdisjoint(after)
    at_work(True)
    late[0]()
    assert pids(pool) == after
    at_work(False)
    assert len(run(pool, both)[1]) == 10
    assert pids(pool) == after


class TestInside:
    def test_workers_have_one_thread_for_each_library(self, monkeypatch):
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
        pool = ProcessPool(1)
        try:
            _, ((_, found),) = run(pool, environment, names, n_items=2, n_workers=1)
        finally:
            pool.close()
        assert found == ["1", "1"]

    @pytest.mark.parametrize("own", [None, "1", "0"])
    def test_joblib_makes_no_semaphore_in_workers(self, monkeypatch, own):
        # A worker that is killed while joblib makes one, to see whether it can, leaves it behind.
        if own is None:
            monkeypatch.delenv("JOBLIB_MULTIPROCESSING", raising=False)
        else:
            monkeypatch.setenv("JOBLIB_MULTIPROCESSING", own)
        pool = ProcessPool(1)
        try:
            _, ((_, found),) = run(pool, of_joblib, n_items=2, n_workers=1)
        finally:
            pool.close()
        assert found == (None, own)

    def test_workers_are_no_children_of_multiprocessing(self, warm):
        # multiprocessing would wait for its children when the program ends.
        assert pids(warm).isdisjoint(child.pid for child in multiprocessing.active_children())


def of_joblib(start, stop):
    return joblib._multiprocessing_helpers.mp, os.environ.get("JOBLIB_MULTIPROCESSING")


def environment(start, stop, names):
    return [os.environ.get(name) for name in names]


class TestEnd:
    @pytest.mark.parametrize("wait", [True, False])
    def test_idle_workers_end_on_close(self, wait):
        pool = ProcessPool(2)
        run(pool, both)
        found = pids(pool)
        assert all(running(pid) for pid in found)
        pool.close(wait=wait)
        assert not any(psutil.pid_exists(pid) for pid in found)

    def test_a_pool_that_never_ran_has_no_workers(self):
        pool = ProcessPool(2)
        assert pids(pool) == set()
        pool.close()

    def test_a_worker_that_does_not_end_is_killed(self, monkeypatch):
        monkeypatch.setattr(module, "_EXIT_SECONDS", 0.1)
        pool = ProcessPool(2)
        run(pool, both)
        found = pids(pool)
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        pool.close()
        assert not any(psutil.pid_exists(pid) for pid in found)

    def test_exit_hooks_of_idle_workers_run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "_EXIT_SECONDS", LONG)
        pool = ProcessPool(1)
        run(pool, hook, str(tmp_path / "mark"), n_workers=1)
        pool.close()
        assert (tmp_path / "mark").exists()

    def test_a_forgotten_pool_ends_no_workers(self):
        pool = ProcessPool(1)
        run(pool, both, n_workers=1)
        # As in a forked child, which has descriptors of its own.
        (pid,) = pids(pool)
        channel, life = (
            os.dup(pool._workers[0].channel.fileno()),
            os.dup(pool._workers[0]._lifeline),
        )
        server = pool._starter._server._process.pid
        pool.drop_after_fork()
        os.waitpid(server, 0)  # it has no worker to reap any more: the system does so
        time.sleep(0.2)
        assert running(pid)
        os.close(channel)
        wait_until(lambda: not running(pid))
        os.close(life)

    def test_workers_end_with_their_parent(self):
        pool = ProcessPool(1)
        run(pool, both, n_workers=1)
        worker = pool._workers[0]
        os.close(worker._lifeline)  # what the kernel does when the caller is gone
        wait_until(lambda: not worker.is_alive)
        worker._lifeline = os.open("/dev/null", os.O_RDONLY)
        assert worker.reap() == -signal.SIGKILL
        pool.close()


def hook(start, stop, path):
    import atexit

    atexit.register(Path(path).touch)

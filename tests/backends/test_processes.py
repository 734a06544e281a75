"""Crews of worker processes: what they deliver, how they end, how deaths are seen."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest

from taskcarrier.backends import processes as module
from taskcarrier.backends.parcels import pack
from taskcarrier.backends.processes import ProcessCrew
from taskcarrier.backends.work import NOTHING, Call, Job, in_worker
from taskcarrier.balance import Dynamic, Static
from taskcarrier.errors import TaskError
from taskcarrier.partition import Grid
from taskcarrier.segments import Staging

BALANCES = [Static(), Dynamic()]
LONG = 60  # seconds that no test waits for


class Calls:
    """A task that calls a function of the range; open already."""

    def __init__(self, call):
        self.call = call

    def open(self, agree):
        return self

    def __call__(self, start, stop):
        return self.call.func(start, stop, *self.call.args)

    def facts(self):
        return os.getpid()


class Unopenable(Calls):
    def open(self, agree):
        raise OSError("cannot be opened")


@pytest.fixture(scope="module")
def warm():
    """One crew for the tests that leave it whole, started before the watch for leaks begins."""
    made = ProcessCrew(2)
    run(made, both)
    yield made
    made.close()


@pytest.fixture
def crew():
    made = ProcessCrew(2)
    yield made
    made.close()
    # pytest keeps it beyond the watch for leaks; its memory and processes go now.
    vars(made).clear()


def run(crew, func, *args, kind=Calls, balance=None, n_items=20, n_workers=2, tick=None):
    delivered = []
    job = Job(kind(Call(func, args)), balance or Dynamic(), Grid(n_items, 2), n_workers)
    parcel = pack(job, Staging())
    ran = crew.run(job, parcel, lambda *one: delivered.append(one), tick)
    return ran.accounts, ran.deaths, delivered, ran


def pids(crew):
    return {worker.pid for worker in crew._workers.values() if worker.pidfd >= 0}


def running(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def both(start, stop):
    return start, stop


def fail_first(start, stop, error):
    if start == 0:
        raise error


def die(start, stop, at, how):
    """Die in the cell that begins at `at`; the others give their range."""
    if start == at:
        if how < 0:
            os.kill(os.getpid(), -how)
        os._exit(how)
    return start, stop


def stuck(start, stop, marks):
    Path(marks, str(start)).touch()
    time.sleep(LONG)


@pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)
class TestRun:
    def test_every_cell_is_delivered_once(self, warm, balance):
        accounts, deaths, delivered, _ = run(warm, both, balance=balance)
        assert sorted(delivered) == [(cell, (2 * cell, 2 * cell + 2)) for cell in range(10)]
        assert deaths == []
        assert sum(account.items for account in accounts) == 20
        assert sum(account.ranges for account in accounts) == 10
        assert all(account.failure is None for account in accounts)

    def test_accounts_in_order_of_the_workers(self, warm, balance):
        accounts, _, _, _ = run(warm, both, balance=balance)
        assert [account.worker for account in accounts] == [0, 1]
        assert [account.name for account in accounts] == [f"process {a.facts}" for a in accounts]
        assert {account.facts for account in accounts} == pids(warm)
        assert os.getpid() not in pids(warm)

    def test_the_same_processes_again(self, warm, balance):
        before = pids(warm)
        for _ in range(3):
            run(warm, both, balance=balance)
        assert pids(warm) == before

    def test_fewer_workers_than_there_are(self, warm, balance):
        accounts, _, delivered, _ = run(warm, both, balance=balance, n_workers=1)
        assert [account.worker for account in accounts] == [0]
        assert [cell for cell, _ in delivered] == list(range(10))

    def test_results_in_place_are_not_delivered(self, warm, balance):
        accounts, _, delivered, _ = run(warm, in_place, balance=balance)
        assert delivered == []
        assert sum(account.items for account in accounts) == 20

    def test_results_of_many_megabytes(self, warm, balance):
        _, _, delivered, _ = run(warm, large, balance=balance)
        assert sorted(cell for cell, _ in delivered) == list(range(10))
        for cell, result in delivered:
            assert result.shape == (300_000,)
            assert (result == 2 * cell).all()

    @pytest.mark.parametrize("error", [ValueError("no", 3), SystemExit(3), KeyboardInterrupt()])
    def test_failures_arrive(self, warm, balance, error):
        before = pids(warm)
        accounts, deaths, _, ran = run(warm, fail_first, error, balance=balance)
        (failure,) = [account.failure for account in accounts if account.failure is not None]
        assert failure.cell == 0
        assert repr(failure.error) == repr(error)
        assert "in fail_first" in str(failure.error.__cause__)
        assert deaths == []
        assert ran.halted
        assert pids(warm) == before


def in_place(start, stop):
    return NOTHING


def large(start, stop):
    return np.full(300_000, float(start))


class Unreadable:
    """Arrives in the caller as an error."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise EOFError("cannot be read")


class TestTrouble:
    def test_a_task_that_cannot_be_opened(self, warm):
        accounts, _, delivered, _ = run(warm, both, kind=Unopenable)
        assert delivered == []
        failures = [account.failure for account in accounts]
        assert any(f is not None and str(f.error) == "cannot be opened" for f in failures)
        assert all(f is None or f.cell == -1 for f in failures)

    def test_a_task_that_cannot_be_unpickled(self, warm):
        accounts, _, _, _ = run(warm, both, Unreadable())
        failures = [account.failure for account in accounts if account.failure is not None]
        assert failures
        for failure in failures:
            assert failure.cell == -1
            assert str(failure.error) == "cannot be read"
            assert any("unpickled the function" in note for note in failure.error.__notes__)
        assert len(run(warm, both)[2]) == 10

    def test_a_result_that_cannot_be_pickled(self, warm):
        accounts, _, _, _ = run(warm, lambda *_: (n for n in range(3)))
        failure = next(account.failure for account in accounts if account.failure is not None)
        assert isinstance(failure.error, TypeError)
        assert any("could not pickle the result" in note for note in failure.error.__notes__)

    def test_a_result_that_cannot_be_unpickled(self, warm):
        accounts, _, delivered, ran = run(warm, unreadable_at_four)
        (failure,) = [account.failure for account in accounts if account.failure is not None]
        assert failure.cell == 2
        assert isinstance(failure.error, EOFError)
        assert any("could not unpickle this result" in note for note in failure.error.__notes__)
        assert ran.halted
        assert all(result == "good" for _, result in delivered)
        assert 2 not in [cell for cell, _ in delivered]

    def test_an_error_that_cannot_be_pickled(self, warm):
        def fail(start, stop):
            raise ValueError(n for n in range(3))

        accounts, _, _, _ = run(warm, fail)
        failure = next(account.failure for account in accounts if account.failure is not None)
        assert type(failure.error) is TaskError
        assert failure.error.type_name == "builtins.ValueError"

    def test_an_error_in_the_caller_s_own_part(self, crew):
        def refuse_result(cell, result):
            raise ZeroDivisionError

        job = Job(Calls(Call(both)), Dynamic(), Grid(20, 2), 2)
        with pytest.raises(ZeroDivisionError):
            crew.run(job, pack(job, Staging()), refuse_result, None)
        assert len(run(crew, both)[2]) == 10


def unreadable_at_four(start, stop):
    return Unreadable() if start == 4 else "good"


class TestDeaths:
    @pytest.mark.parametrize("how", [0, 7, -signal.SIGKILL, -signal.SIGSEGV])
    def test_exit_code_and_cell(self, crew, how):
        with quiet_crashes():
            accounts, deaths, delivered, _ = run(crew, die, 6, how)
        (death,) = deaths
        assert (death.exitcode, death.cell) == (how, 3)
        (account,) = accounts
        assert {account.worker, death.worker} == {0, 1}
        assert death.name != account.name
        assert account.failure is None
        got = [cell for cell, _ in delivered]
        assert len(set(got)) == len(got)
        assert 3 not in got

    def test_the_other_works_on(self, crew):
        accounts, (death,), delivered, ran = run(crew, die, 6, 7, n_items=200)
        assert ran.given_out >= 100
        assert not ran.halted
        mine = {cell for cell, _ in delivered}
        # What the dead one had not sent yet is lost with it; all else is there.
        assert len(mine) >= accounts[0].ranges
        assert max(mine) == 99
        assert len(death.unstarted) == 0

    @pytest.mark.parametrize("at", [0, 18, 22])
    def test_static_knows_what_was_not_begun(self, crew, at):
        accounts, (death,), _, _ = run(crew, die, at, 7, balance=Static(), n_items=38, n_workers=2)
        planned = Static().planned(death.worker, 2, 19)
        assert at // 2 in planned
        assert death.cell == at // 2
        assert list(death.unstarted) == [cell for cell in planned if cell > at // 2]
        assert accounts[0].ranges == 19 - len(planned)

    def test_all_at_once(self, crew):
        accounts, deaths, _, _ = run(crew, die_in_each, balance=Static(), n_items=4)
        assert accounts == []
        assert [(death.worker, death.exitcode, death.cell) for death in deaths] == [
            (0, 7, 0),
            (1, 8, 1),
        ]

    def test_revived_by_the_next_run(self, crew):
        run(crew, both)
        before = pids(crew)
        run(crew, die, 6, 7)
        assert len(pids(crew)) == 1
        accounts, deaths, delivered, _ = run(crew, both)
        assert (len(accounts), deaths, len(delivered)) == (2, [], 10)
        assert len(pids(crew) & before) == 1
        assert len(pids(crew)) == 2

    def test_killed_while_idle(self, crew):
        run(crew, both)
        victim, other = crew._workers[0].pid, crew._workers[1].pid
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not running(victim))
        accounts, deaths, delivered, _ = run(crew, both)
        assert (len(accounts), deaths, len(delivered)) == (2, [], 10)
        assert victim not in pids(crew)
        assert other in pids(crew)

    def test_seen_though_a_grandchild_holds_the_socket(self, crew):
        accounts, (death,), _, _ = run(crew, fork_and_die)
        assert death.exitcode == 7
        assert death.cell == 0
        assert len(accounts) == 1

    def test_no_descriptor_is_left(self, crew):
        run(crew, both)
        run(crew, both)
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are compared, as strings
        for _ in range(2):
            run(crew, die, 6, 7)
            run(crew, both)
        after = os.listdir("/proc/self/fd")  # noqa: PTH208  # names are compared, as strings
        assert len(after) == len(before)


@contextlib.contextmanager
def quiet_crashes():
    """No core files."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def die_in_each(start, stop):
    os._exit(7 + start // 2)


def fork_and_die(start, stop):
    if start == 0:
        if os.fork() == 0:
            # Outlives its parent for a moment, holding all that it has inherited.
            time.sleep(0.3)
            os._exit(0)
        os._exit(7)


class TestWatching:
    def test_ticks_while_a_run_goes_on(self, warm, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "TICK", 0.01)
        gate = tmp_path / "gate"
        seen = []

        def tick(ledger):
            seen.append(ledger.items_done(2))
            if len(seen) == 3:
                gate.touch()

        run(warm, wait_for, str(gate), tick=tick)
        assert seen[0] == 0
        assert seen[-1] == 20
        assert seen == sorted(seen)

    def test_results_come_before_the_end(self, warm, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "TICK", 0.01)
        gate = tmp_path / "gate"
        delivered = []

        def tick(ledger):
            if 1 in delivered:  # the last cell waits for this
                gate.touch()

        job = Job(Calls(Call(slow_then_wait, (str(gate),))), Dynamic(), Grid(6, 2), 1)
        crew_run = warm.run(job, pack(job, Staging()), lambda cell, _: delivered.append(cell), tick)
        assert delivered == [0, 1, 2]
        assert crew_run.accounts[0].items == 6

    def test_an_interrupted_run_kills_the_stuck(self, crew, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "TICK", 0.01)
        monkeypatch.setattr(module, "_GRACE_SECONDS", 0.1)
        run(crew, both)
        before = pids(crew)

        def interrupt(ledger):
            if len(list(tmp_path.iterdir())) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(crew, stuck, str(tmp_path), n_items=200, tick=interrupt)
        assert not any(running(pid) for pid in before)
        assert len(list(tmp_path.iterdir())) == 2
        assert len(run(crew, both)[2]) == 10
        assert pids(crew).isdisjoint(before)

    def test_an_interrupted_run_lets_the_others_finish_their_cell(self, crew, monkeypatch):
        monkeypatch.setattr(module, "TICK", 0.01)
        monkeypatch.setattr(module, "_GRACE_SECONDS", LONG)
        run(crew, both)
        before = pids(crew)

        def interrupt(ledger):
            if ledger.items_done(2) > 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(crew, nap, n_items=10_000, tick=interrupt)
        accounts, _, delivered, _ = run(crew, both)
        assert (len(accounts), len(delivered)) == (2, 10)
        assert pids(crew) == before


def wait_for(start, stop, gate):
    deadline = time.monotonic() + LONG
    while not Path(gate).exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return NOTHING


def slow_then_wait(start, stop, gate):
    if start < 4:
        time.sleep(2 * module._BATCH_SECONDS)
    else:
        wait_for(start, stop, gate)
    return start


def nap(start, stop):
    time.sleep(0.01)


class TestInside:
    def test_workers_know_that_they_are(self, warm):
        _, _, delivered, _ = run(warm, lambda *_: in_worker())
        assert {found for _, found in delivered} == {True}
        assert not in_worker()

    def test_joblib_is_serial(self, warm):
        def look(start, stop):
            parallel = joblib.Parallel()
            return type(parallel._backend).__name__, parallel.n_jobs

        _, _, delivered, _ = run(warm, look)
        assert {found for _, found in delivered} == {("SequentialBackend", 1)}

    def test_environment(self, monkeypatch):
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
        crew = ProcessCrew(1)
        try:
            _, _, ((_, found),), _ = run(crew, environment, names, n_items=2, n_workers=1)
        finally:
            crew.close()
        assert found == ["1", "1"]

    def test_what_tasks_print_is_seen_at_once(self, crew, capfd):
        run(crew, say, n_items=2, n_workers=1)
        wait_until(lambda: "hello from a worker" in capfd.readouterr().out)

    def test_ctrl_c_is_the_caller_s_decision(self, warm):
        before = pids(warm)
        _, deaths, delivered, _ = run(warm, interrupt_myself)
        assert deaths == []
        assert len(delivered) == 10
        assert pids(warm) == before

    def test_daemons_of_nobody(self, warm):
        # multiprocessing would wait for its children when the program ends.
        import multiprocessing

        assert pids(warm).isdisjoint(child.pid for child in multiprocessing.active_children())


def environment(start, stop, names):
    return [os.environ.get(name) for name in names]


def say(start, stop):
    sys.stdout.write("hello from a worker\n")


def interrupt_myself(start, stop):
    os.kill(os.getpid(), signal.SIGINT)
    return start


class TestEnd:
    @pytest.mark.parametrize("wait", [True, False])
    def test_idle_workers_end_on_close(self, wait):
        crew = ProcessCrew(2)
        run(crew, both)
        found = pids(crew)
        assert all(running(pid) for pid in found)
        crew.close(wait=wait)
        assert not any(psutil.pid_exists(pid) for pid in found)

    def test_a_crew_that_never_ran(self):
        crew = ProcessCrew(2)
        assert pids(crew) == set()
        crew.close()

    def test_a_worker_that_does_not_end_is_killed(self, monkeypatch):
        monkeypatch.setattr(module, "_EXIT_SECONDS", 0.1)
        crew = ProcessCrew(2)
        run(crew, both)
        found = pids(crew)
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        crew.close()
        assert not any(psutil.pid_exists(pid) for pid in found)

    def test_exit_hooks_of_idle_workers_run(self, tmp_path):
        crew = ProcessCrew(1)
        run(crew, hook, str(tmp_path / "mark"), n_workers=1)
        crew.close()
        assert (tmp_path / "mark").exists()

    def test_a_forgotten_crew_ends_nobody(self):
        crew = ProcessCrew(1)
        run(crew, both, n_workers=1)
        # As in a forked child, which has descriptors of its own.
        (pid,) = pids(crew)
        channel, life = os.dup(crew._workers[0].channel.fileno()), os.dup(crew._workers[0]._life)
        crew.forget()
        time.sleep(0.2)
        assert running(pid)
        os.close(channel)
        wait_until(lambda: not running(pid))
        os.close(life)
        os.waitpid(pid, 0)

    def test_workers_end_with_their_caller(self):
        crew = ProcessCrew(1)
        run(crew, both, n_workers=1)
        worker = crew._workers[0]
        os.close(worker._life)  # what the kernel does when the caller is gone
        wait_until(lambda: not worker.alive)
        worker._life = os.open("/dev/null", os.O_RDONLY)
        assert worker.reap() == -signal.SIGKILL
        crew.close()


def hook(start, stop, path):
    import atexit

    atexit.register(Path(path).touch)

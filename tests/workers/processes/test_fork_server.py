"""The fork server: what it imports, what a worker gets from it, how it ends."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from taskcarrier.scheduling.balance import Static
from taskcarrier.workers.processes import fork_server, worker_starter
from taskcarrier.workers.processes.pool import ProcessPool
from tests.clocks import wait_until
from tests.strategies import run_script
from tests.workers.processes.helpers import run

pytestmark = pytest.mark.one_case  # each starts workers


def ask(pool, func, *args, n_workers=1):
    """Return what a function of a range and `args` returns in each worker."""
    _, delivered = run(
        pool,
        func,
        *args,
        balance=Static(),
        n_items=n_workers,
        chunksize=1,
        n_workers=n_workers,
    )
    return [result for _, result in sorted(delivered)]


def renew(pool):
    """Kill the workers: the next run starts new ones."""
    for worker in pool._workers.values():
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda worker=worker: not worker.is_alive)


def server_pid(pool):
    return pool._starter._server._process.pid


@pytest.fixture
def one():
    """A pool of one worker."""
    pool = ProcessPool(1)
    yield pool
    pool.close()
    vars(pool).clear()


# What it imports.

MODULES = """
import importlib, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
known = set(sys.modules)
threads = len(os.listdir("/proc/self/task"))
import threadpoolctl
print(threads, "numba" in known, *{one["user_api"] for one in threadpoolctl.threadpool_info()})
print(*known)
"""

SEEN = """
import sys
import numpy as np
from taskcarrier import StaticParallelMapper

def ours(*_):
    return [name for name in sys.modules if name.split(".")[0] in ("taskcarrier", "numpy")]

mapper = StaticParallelMapper(2, backend="loky")
with mapper:
    if sys.argv[1] == "arrays and lists":
        found = mapper.map_array(lambda chunk: np.array([len(ours())] * len(chunk)), np.zeros(4))
        found = mapper.map_items(lambda _: 0, np.zeros(4))
        found = mapper.map(ours, range(2))
    else:
        found = list(mapper.imap(ours, range(2)))
print(*set(sum(found, [])))
"""


def import_all(*names):
    """Return, for a program that imports these: threads, libraries, and all its modules."""
    done = subprocess.run(
        [sys.executable, "-c", MODULES, *names],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = done.stdout.splitlines()
    return first.split(), set(second.split())


def test_the_server_imports_nothing_that_a_fork_would_break():
    names = (fork_server.__name__, *fork_server._NEEDED, *fork_server._OFTEN_NEEDED)
    (n_threads, has_numba, *libraries), _ = import_all(*names)
    assert (n_threads, has_numba) == ("1", "False")
    assert "openmp" not in libraries


@pytest.mark.parametrize("verbs", ["arrays and lists", "streams"])
def test_a_worker_imports_nothing_of_ours(verbs, tmp_path):
    _, known = import_all(fork_server.__name__, *fork_server._NEEDED, *fork_server._OFTEN_NEEDED)
    assert set(run_script(tmp_path, SEEN, verbs).split()) <= known


# What a worker gets from the caller, at the moment when it is started.


def get_surroundings(start, stop):
    return {
        "path": list(sys.path),
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "umask": os.umask(0),
        "hash": hash("text"),
        "method": multiprocessing.get_start_method(allow_none=True),
        "parent": multiprocessing.parent_process().pid,
        "name": multiprocessing.current_process().name,
        "authkey": bytes(multiprocessing.current_process().authkey),
    }


def test_a_worker_gets_what_the_caller_has_when_it_starts(one, monkeypatch, tmp_path):
    [before] = ask(one, get_surroundings)
    first = server_pid(one)
    renew(one)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["program", "--option"])
    monkeypatch.setenv("TASKCARRIER_TEST", "set")
    monkeypatch.delenv("HOME", raising=False)
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    [after] = ask(one, get_surroundings)
    assert server_pid(one) == first
    assert after["path"][0] == str(tmp_path)
    assert after["argv"] == ["program", "--option"]
    assert after["environment"]["TASKCARRIER_TEST"] == "set"
    assert "HOME" not in after["environment"]
    assert "TASKCARRIER_TEST" not in before["environment"]
    assert after["hash"] == before["hash"]
    assert after["method"] == "spawn"
    assert after["parent"] == os.getpid()
    assert after["name"] == "taskcarrier-0"
    assert after["authkey"] == bytes(multiprocessing.current_process().authkey)


def lower_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def set_umask():
    before = os.umask(0o57)
    return lambda: os.umask(before)


def set_variable():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return lambda: os.environ.pop("OMP_WAIT_POLICY")


@pytest.mark.parametrize("change", [lower_limit, set_umask, set_variable])
def test_a_change_of_what_processes_keep_makes_a_new_server(one, change):
    ask(one, get_surroundings)
    first = server_pid(one)
    renew(one)
    undo = change()
    try:
        [seen] = ask(one, get_surroundings)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        undo()
    assert server_pid(one) != first
    assert not psutil.pid_exists(first)  # its last worker was reaped
    if change is lower_limit:
        assert seen["files"] == limit
    elif change is set_umask:
        assert seen["umask"] == 0o57
    else:
        assert seen["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"


def draw(start, stop):
    return random.random(), np.random.random()  # noqa: NPY002  # the generators that all share


def test_each_worker_has_global_generators_of_its_own():
    pool = ProcessPool(2)
    try:
        drawn = ask(pool, draw, n_workers=2)
        renew(pool)
        drawn += ask(pool, draw, n_workers=2)
    finally:
        pool.close()
        vars(pool).clear()
    assert len({value for pair in drawn for value in pair}) == 8


def say(start, stop):
    sys.stdout.write("said by a worker\n")
    sys.stdout.flush()
    return [stream.fileno() for stream in (sys.stdout, sys.stderr)], sys.stdout.encoding


def test_workers_write_to_the_output_that_the_caller_has_when_they_start(one, tmp_path):
    ask(one, get_surroundings)
    renew(one)
    kept = os.dup(1)
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
    try:
        [(numbers, encoding)] = ask(one, say)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert (tmp_path / "out").read_text() == "said by a worker\n"
    assert numbers == [1, 2]
    assert encoding == sys.__stdout__.encoding


PARALLEL = """
import os
import taskcarrier

def f(_):
    import joblib
    from joblib.parallel import get_active_backend
    backend, n_jobs = get_active_backend()
    return type(backend).__name__, n_jobs, os.environ.get("JOBLIB_MULTIPROCESSING")

if __name__ == "__main__":
    print(taskcarrier.StaticParallelMapper(2, backend="loky").map(f, range(1)))
"""


def test_joblib_is_serial_as_soon_as_the_function_imports_it(tmp_path):
    assert run_script(tmp_path, PARALLEL) == "[('SequentialBackend', 1, None)]\n"


# How it ends.


def die(start, stop):
    os._exit(3)


def get_pid(start, stop):
    return os.getpid()


@pytest.mark.fault(52)
def test_a_server_that_was_killed_is_replaced(one):
    [pid] = ask(one, get_pid)
    first = server_pid(one)
    os.kill(first, signal.SIGKILL)
    assert ask(one, get_pid) == [pid]  # its workers live on
    ran, _ = run(one, die, n_workers=1)
    exitcodes = [death.exitcode for death in ran.deaths]
    assert exitcodes[0] is None  # only the fork server would have known
    assert set(exitcodes[1:]) == {3}
    assert server_pid(one) != first
    assert not psutil.pid_exists(first)


@pytest.mark.fault(52)
def test_a_server_that_does_not_answer_holds_up_no_end(monkeypatch):
    monkeypatch.setattr(worker_starter, "_END_SECONDS", 0.05)
    pool = ProcessPool(1)
    ask(pool, get_pid)
    first = server_pid(pool)
    os.kill(first, signal.SIGSTOP)
    pool.close()
    vars(pool).clear()
    assert not psutil.pid_exists(first)


def test_an_interrupt_from_the_terminal_does_not_end_the_server(one):
    ask(one, get_pid)
    os.kill(server_pid(one), signal.SIGINT)
    renew(one)
    before = server_pid(one)
    assert ask(one, get_pid)
    assert server_pid(one) == before


def test_nothing_is_left_of_a_pool():
    pool = ProcessPool(1)
    [pid] = ask(pool, get_pid)
    first = server_pid(pool)
    pool.close()
    vars(pool).clear()
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(first)


def test_a_python_that_cannot_import_the_package_is_an_error_that_says_so(one, monkeypatch, capfd):
    monkeypatch.setattr(worker_starter, "_PROGRAM", "raise ImportError('no such package')")
    with pytest.raises(RuntimeError, match="standard error has its reason") as caught:
        ask(one, get_pid)
    assert any("only 0 of 1 worker processes" in note for note in caught.value.__notes__)
    assert "no such package" in capfd.readouterr().err
    monkeypatch.undo()
    assert ask(one, get_pid)


def test_a_server_that_can_start_no_process_says_why(one, monkeypatch):
    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    ask(one, get_pid)
    renew(one)
    monkeypatch.setattr(worker_starter._ForkServer, "_ask", refuse)
    with pytest.raises(BlockingIOError):
        ask(one, get_pid)
    monkeypatch.undo()
    assert ask(one, get_pid)

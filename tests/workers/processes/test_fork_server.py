"""The fork server: what it imports, what a worker gets from it, how it ends."""

import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

from taskcarrier.scheduling.balance import Static
from taskcarrier.workers.processes import fork_server, worker_starter
from taskcarrier.workers.processes.messages import MessageSocket
from taskcarrier.workers.processes.pool import ProcessPool
from tests.clocks import wait_until
from tests.strategies import ROOT, run_script, start_script
from tests.workers.processes.helpers import open_pool, run

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
    with open_pool(1) as pool:
        yield pool


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


def test_the_first_workers_do_not_wait_for_what_only_the_caller_needs():
    _, known = import_all(fork_server.__name__, *fork_server._NEEDED)
    rooms = {f"taskcarrier.{name}" for name in ("run", "mappers", "lists.map", "arrays.mapping")}
    workers = {f"taskcarrier.workers.{name}" for name in ("choose", "executor", "pools", "threads")}
    assert known.isdisjoint(rooms | workers)
    # NumPy 1 imports its generators itself, and joblib's copy of cloudpickle comes with joblib.
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and find_spec("cloudpickle") is not None:
        assert known.isdisjoint({"concurrent.futures", "numpy.random", "tempfile"})


def list_modules(start, stop):
    return set(sys.modules), gc.isenabled()


def test_an_idle_server_imports_what_is_often_needed(one):
    [(_, collects)] = ask(one, list_modules)
    assert collects
    maps = Path(f"/proc/{server_pid(one)}/maps")
    wait_until(lambda: "mtrand" in maps.read_text(encoding="utf-8"))  # of numpy.random
    renew(one)
    [(names, collects)] = ask(one, list_modules)
    assert "numpy.random" in names
    assert collects


def test_a_prepared_server_starts_the_first_worker(one):
    one.start_server()
    before = server_pid(one)
    one.start_server()
    assert ask(one, get_pid)
    assert server_pid(one) == before


def test_what_keeps_a_server_from_being_prepared_is_told_by_the_first_worker(one, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_starter.subprocess, "Popen", refuse)
    one.start_server()
    with pytest.raises(BlockingIOError):
        ask(one, get_pid)
    monkeypatch.undo()
    assert ask(one, get_pid)


def test_a_pool_that_has_ended_prepares_no_server():
    pool = ProcessPool(1)
    pool.close()
    pool.start_server()
    assert pool._starter._server is None


# What a worker gets from the caller, at the moment when it is started.


def get_surroundings(start, stop):
    return {
        "path": list(sys.path),
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "umask": os.umask(0),
        "ignored": signal.getsignal(signal.SIGUSR1),
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


def test_a_worker_has_an_identity_of_its_own():
    with open_pool(2) as pool:
        assert ask(pool, get_identity, n_workers=2) == [(1,), (2,)]


def get_identity(start, stop):
    return multiprocessing.current_process()._identity


def test_entries_of_the_path_that_are_no_text_are_left_out(one, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, 7])
    [seen] = ask(one, get_surroundings)
    assert seen["path"] == sys.path[:-1]


def lower_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def set_umask():
    before = os.umask(0o57)
    return lambda: os.umask(before)


def ignore_signal():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return lambda: signal.signal(signal.SIGUSR1, before)


def set_variable():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return lambda: os.environ.pop("OMP_WAIT_POLICY")


@pytest.mark.parametrize("change", [lower_limit, set_umask, ignore_signal, set_variable])
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
    elif change is ignore_signal:
        assert seen["ignored"] == signal.SIG_IGN
    else:
        assert seen["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"


def draw(start, stop):
    return random.random(), np.random.random()  # noqa: NPY002  # the global generator is under test


def test_each_worker_has_global_generators_of_its_own():
    with open_pool(2) as pool:
        drawn = ask(pool, draw, n_workers=2)
        renew(pool)
        drawn += ask(pool, draw, n_workers=2)
    assert len({value for pair in drawn for value in pair}) == 8


def say(start, stop):
    sys.stdout.write("said by a worker\n")
    sys.stdout.flush()
    streams = sys.stdout, sys.stderr
    return [(stream.fileno(), stream.name) for stream in streams], sys.stdout.encoding


def test_workers_write_to_the_output_that_the_caller_has_when_they_start(one, tmp_path):
    ask(one, get_surroundings)
    renew(one)
    kept = os.dup(1)
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
    try:
        [(streams, encoding)] = ask(one, say)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert (tmp_path / "out").read_text() == "said by a worker\n"
    assert streams == [(1, "<stdout>"), (2, "<stderr>")]
    assert encoding == sys.__stdout__.encoding


PARALLEL = """
import importlib.util, os, sys, threading
import taskcarrier

def f(_):
    assert importlib.util.find_spec("joblib").name == "joblib"  # is it installed?
    import joblib
    from joblib.parallel import get_active_backend
    backend, n_jobs = get_active_backend()
    loader = type(joblib.__loader__).__name__, type(joblib.__spec__.loader).__name__
    return type(backend).__name__, n_jobs, os.environ.get("JOBLIB_MULTIPROCESSING"), *loader

def g(_):
    if "joblib" not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=("joblib",))
        thread.start()
        thread.join()
        return
    from joblib.parallel import get_active_backend
    return type(get_active_backend()[0]).__name__

if __name__ == "__main__":
    with taskcarrier.StaticParallelMapper(2, backend="loky") as mapper:
        print(*mapper.map(f, range(1))[0])
    taskcarrier.shutdown()
    with mapper:
        print(mapper.map(g, range(1)), mapper.map(g, range(1)))
"""


def test_joblib_is_serial_as_soon_as_the_function_imports_it(tmp_path):
    first, second = run_script(tmp_path, PARALLEL).splitlines()
    assert first == "SequentialBackend 1 None SourceFileLoader SourceFileLoader"
    # Where cloudpickle is taken from joblib, that is loaded from the start.
    assert second in {
        "[None] ['SequentialBackend']",
        "['SequentialBackend'] ['SequentialBackend']",
    }


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
    with open_pool(1) as pool:
        ask(pool, get_pid)
        first = server_pid(pool)
        os.kill(first, signal.SIGSTOP)
    assert not psutil.pid_exists(first)


def test_an_interrupt_from_the_terminal_does_not_end_the_server(one):
    ask(one, get_pid)
    os.kill(server_pid(one), signal.SIGINT)
    renew(one)
    before = server_pid(one)
    assert ask(one, get_pid)
    assert server_pid(one) == before


def test_nothing_is_left_of_a_pool():
    with open_pool(1) as pool:
        [pid] = ask(pool, get_pid)
        first = server_pid(pool)
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(first)


def test_a_python_that_cannot_import_the_package_is_an_error_that_says_so(one, monkeypatch, capfd):
    monkeypatch.setattr(worker_starter, "_PROGRAM", "raise ImportError('no such package')")
    with pytest.raises(RuntimeError, match="standard error has the reason") as caught:
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


def test_a_worker_is_started_with_new_sockets_when_the_server_dies_meanwhile(one, monkeypatch):
    # The dead server may have started a worker, which has the old ones.
    given = []
    start = worker_starter._ForkServer.start_worker

    def dies(self, setup, fds):
        given.append(fds[:2])
        started = start(self, setup, fds)
        if len(given) == 1:
            started.exit.close()
            self._kill()
            raise EOFError
        return started

    monkeypatch.setattr(worker_starter._ForkServer, "start_worker", dies)
    inodes = []
    make = worker_starter._make_setup

    def watch(number, environment, fds):
        inodes.append([os.fstat(fd).st_ino for fd in fds])
        return make(number, environment, fds)

    monkeypatch.setattr(worker_starter, "_make_setup", watch)
    assert ask(one, get_pid)
    first, second = inodes
    assert not set(first) & set(second)


def test_an_answer_that_is_not_received_whole_ends_the_server(one, monkeypatch):
    ask(one, get_pid)
    renew(one)
    first = server_pid(one)
    receive = MessageSocket.receive

    def torn(self):
        receive(self)
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(worker_starter.MessageSocket, "receive", torn)
        with pytest.raises(OSError, match="Too many open files"):
            ask(one, get_pid)
    assert not psutil.pid_exists(first)
    assert ask(one, get_pid)


PROGRAM = """
import os, signal, sys, time
import numpy as np
import psutil
import taskcarrier

def die(x):
    if x == 2 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os._exit(3)
    return x

if __name__ == "__main__":
    {begin}
    mapper = taskcarrier.StaticParallelMapper(2, backend="loky")
    with mapper:
        assert mapper.map(abs, range(4)) == [0, 1, 2, 3]
        {between}
        assert mapper.map(die, range(4)) == [0, 1, 2, 3]
    taskcarrier.shutdown()
    print(len([one for one in psutil.Process().children() if one.status() == "zombie"]))
"""

SUBREAPER = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)"
KILL = "[os.kill(one.pid, 9) for one in psutil.Process().children() if one.children()]"


@pytest.mark.parametrize(
    ("begin", "between"),
    [
        ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", ""),  # as daemons do
        (SUBREAPER, KILL),  # then the orphans are children of the caller
        ("", KILL),
    ],
    ids=["ignored", "adopted", "killed"],
)
@pytest.mark.fault(52)
def test_dead_workers_leave_no_zombies_and_no_words(begin, between, tmp_path):
    process = start_script(
        tmp_path, PROGRAM.format(begin=begin, between=between), str(tmp_path / "mark")
    )
    out, err = process.communicate(timeout=100)
    assert (out, err) == ("0\n", "")


THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


def test_a_server_with_other_threads_does_not_fork(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(THREAD)
    code = """
import os
import taskcarrier
if __name__ == "__main__":
    pids = taskcarrier.StaticParallelMapper(2, backend="loky").map(lambda _: os.getppid(), range(2))
    print(set(pids) == {os.getpid()})
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(ROOT)])
    assert run_script(tmp_path, code, PYTHONPATH=path) == "True\n"


CLOSED = """
import os, sys
import taskcarrier
def look(_):
    try:
        os.fstat(0)
    except OSError:
        return sys.stdin is None
    return False

if __name__ == "__main__":
    os.close(0)
    print(all(taskcarrier.StaticParallelMapper(2, backend="loky").map(look, range(2))))
"""


def test_standard_input_that_is_closed_is_closed_in_workers(tmp_path):
    assert run_script(tmp_path, CLOSED) == "True\n"


def test_a_worker_that_cannot_be_watched_is_ended(one, monkeypatch):
    started = []

    def fails(pid):
        started.append(pid)
        raise MemoryError("no")

    monkeypatch.setattr(worker_starter, "can_watch_any", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(worker_starter, "ProcessExit", fails)
        with pytest.raises(MemoryError):
            ask(one, get_pid)
    assert not psutil.pid_exists(started[0])
    assert ask(one, get_pid)

"""The life of a program: interrupts, kills, forks, maps in maps. Nothing lost, nothing left."""

import errno
import gc
import os
import signal
import sys
import textwrap
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    WorkerDiedError,
    map_array,
    map_items,
)
from tests.clocks import LONG, wait_until
from tests.descriptors import n_descriptors
from tests.faults.helpers import all_gone, gone, opened_up, output_of, running, unshared
from tests.strategies import EVERYWHERE, OF_BALANCE, assert_same, keep_pools_warm, run_script

pytestmark = pytest.mark.one_case  # each starts programs

pools = keep_pools_warm(2)


PROGRAM = """
import os, signal, sys, time
import numpy as np

# A shell's background jobs, and all they start, are born deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from taskcarrier import map_array, DynamicParallelMapper

where, what, mark = sys.argv[1:4]
n_jobs = 2
run = {"n_jobs": n_jobs, "backend": where}

def work(chunk):
    open(mark, "w").close()
    if chunk[0] >= 0:
        time.sleep(0.1 if where == "threading" else 30)
    return chunk

def warm(chunk):
    time.sleep(0.05)
    return chunk

if __name__ == "__main__":
    map_array(warm, np.arange(4), chunksize=1, **run)
    print("ready", flush=True)
    try:
        if what == "idle":
            time.sleep(60)
        elif what == "list":
            DynamicParallelMapper(n_jobs, backend=where)(lambda i: work([i]), range(1000))
        else:
            map_array(work, np.arange(1000), chunksize=1, balance=what, **run)
    except KeyboardInterrupt as error:
        print(type(error).__name__, flush=True)
        assert map_array(np.negative, np.arange(4), **run).tolist() == [0, -1, -2, -3]
        print("works again", flush=True)
"""


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("where", "what", "whole_group"),
    [
        ("loky", "static", True),
        ("loky", "list", False),
        ("threading", "dynamic", True),
        ("sequential", "static", False),
    ],
)
def test_ctrl_c_ends_the_map_soon_and_leaves_nothing(where, what, whole_group, tmp_path):
    folder, mark = tmp_path / "shared", tmp_path / "at work"
    folder.mkdir()
    words = (where, what, str(mark))
    with running(tmp_path, PROGRAM, *words, JOBLIB_TEMP_FOLDER=str(folder)) as (process, below):
        assert len([b for b in below if b.is_running()]) >= (2 if where == "loky" else 0)
        wait_until(mark.exists)
        time.sleep(0.1)
        began = time.monotonic()
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        else:
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "KeyboardInterrupt\n"
        assert time.monotonic() - began < 10  # a range takes half a minute, or all of it does
        assert process.stdout.readline() == "works again\n"
        out, err = process.communicate(timeout=LONG)
        assert (process.returncode, out, err) == (0, "", "")
        assert all_gone(below, LONG)
    assert list(folder.iterdir()) == []


@contextmanager
def interrupted_when(ready):
    """Ctrl-C for this process once `ready` is set."""

    def interrupt():
        assert ready.wait(LONG)
        time.sleep(0.1)  # the caller waits by now
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        ready.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.fault(17)
@pytest.mark.parametrize("balance", ["static", "dynamic"])
@pytest.mark.parametrize("verb", [map_array, map_items])
def test_a_thread_that_is_in_a_range_on_ctrl_c_writes_nothing_later(verb, balance):
    inside, go_on, threads = threading.Event(), threading.Event(), []

    def func(x):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            inside.set()
        assert go_on.wait(LONG)
        return x + 1

    X, out = np.arange(8.0), np.zeros(8)
    options = {"n_jobs": 2, "backend": "threading", "balance": balance, "chunksize": 2, "out": out}
    with interrupted_when(inside), pytest.raises(KeyboardInterrupt):
        verb(func, X, **options)
    assert not out.any()
    go_on.set()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert not out.any()
    assert_same(map_array(np.negative, X, n_jobs=2, backend="threading"), -X)


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("chunksize", "options"),
    [(1, {}), (40_000, {}), (40_000, {"timeout": 600.0}), (1, {"retry_on": OSError})],
    ids=["items", "one range each", "one range each, limited", "items tried again"],
)
def test_a_fused_loop_ends_on_ctrl_c_and_writes_nothing_later(chunksize, options):
    import numba

    @numba.njit
    def long(x):
        s = x
        for i in range(1_000_000):
            s += np.sqrt(x + i)
        return s

    X, out, started = np.ones(80_000), np.zeros(80_000), threading.Event()
    run = {"n_jobs": 2, "backend": "threading", "chunksize": chunksize, "out": out, **options}
    map_items(long, X[:2], **run | {"out": out[:2]})  # compiled
    out[:] = 0

    def watch():
        deadline = time.monotonic() + LONG
        while not (options or out.any() or started.is_set()) and time.monotonic() < deadline:
            time.sleep(0.01)
        started.set()

    watcher = threading.Timer(0.2, watch)

    def go():
        watcher.start()
        map_items(long, X, **run)

    began = time.monotonic()
    with interrupted_when(started), pytest.raises(KeyboardInterrupt):
        go()
    assert time.monotonic() - began < 20  # all of it takes more than that
    watcher.join()
    assert not out.all()
    then = out.copy()
    assert then.any() or options
    time.sleep(0.3)
    assert_same(out, then)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("how", "what"),
    [("SIGKILL", "idle"), ("SIGKILL", "static"), ("SIGTERM", "idle"), ("SIGTERM", "dynamic")],
)
def test_workers_end_when_their_parent_is_killed(how, what, tmp_path):
    folder, mark = tmp_path / "shared", tmp_path / "at work"
    folder.mkdir()
    words = ("loky", what, str(mark))
    with running(tmp_path, PROGRAM, *words, JOBLIB_TEMP_FOLDER=str(folder)) as (process, below):
        if what != "idle":
            wait_until(mark.exists)
        assert len(below) >= 2
        assert not any(gone(worker) for worker in below)
        process.send_signal(getattr(signal, how))
        assert process.wait(LONG) == -getattr(signal, how)
        assert all_gone(below, 20)  # before their ranges, or the program, would have ended
    assert list(folder.iterdir()) == []


def test_a_program_that_ends_does_not_wait_for_its_warm_workers(tmp_path):
    code = """
import numpy as np
from taskcarrier import map_array
if __name__ == "__main__":
    for backend in ("threading", "loky"):
        print(map_array(lambda c: c + 1, np.arange(3), n_jobs=2, backend=backend))
"""
    began = time.monotonic()
    assert run_script(tmp_path, code) == "[1 2 3]\n[1 2 3]\n"
    assert time.monotonic() - began < 20


FORK = """
import os, sys
import numpy as np
from taskcarrier import StaticParallelMapper, map_array

def pids(chunk): return np.full(len(chunk), os.getpid())
run = {"n_jobs": 2, "backend": "loky", "chunksize": 1}

if __name__ == "__main__":
    with StaticParallelMapper(2, backend="loky") as mapper:
        ours = set(map_array(pids, np.arange(4), **run).tolist())
        shared = map_array(np.negative, np.arange(1000.0), n_jobs=2, backend="loky")
        child = os.fork()
        if child == 0:
            theirs = set(map_array(pids, np.arange(4), **run).tolist())
            assert len(theirs) == 2 and not theirs & ours
            assert (mapper.map_array(lambda c: -c, shared) == np.arange(1000.0)).all()
            threads = map_array(np.sqrt, np.arange(4.0), n_jobs=2, backend="threading")
            assert threads.tolist() == np.sqrt(np.arange(4.0)).tolist()
            if sys.argv[1] == "hard":
                os._exit(0)
            sys.exit(0)  # with all hooks
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert set(map_array(pids, np.arange(4), **run).tolist()) == ours
        assert (mapper.map_array(lambda c: -c, shared) == np.arange(1000.0)).all()
    print("fine")
"""


@pytest.mark.parametrize("end", ["hard", "soft"])
def test_a_forked_child_maps_by_itself_and_harms_no_worker_of_its_parent(end, tmp_path):
    assert run_script(tmp_path, FORK, end) == "fine\n"


def deeper(chunk, depth, backend):
    """As many to each item as there are maps inside one another."""
    if depth == 0:
        return chunk + 1
    inner = map_array(deeper, chunk, args=(depth - 1, backend), n_jobs=2, backend=backend)
    report = taskcarrier.last_report()
    assert (report.n_jobs, report.backend) == (1, "sequential"), report
    assert report.reason == "called inside a worker"
    return inner + 1


@pytest.mark.fault(19)
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_three_nested_maps_inside_workers_are_serial(backend):
    X = np.arange(6)
    result = map_array(deeper, X, args=(2, backend), n_jobs=2, backend=backend, chunksize=2)
    assert_same(result, X + 3)
    assert taskcarrier.last_report().n_jobs == 2


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_three_nested_list_maps_are_right(backend):
    def lowest(i):
        return [i]

    def middle(i):
        return DynamicParallelMapper(2, backend="threading")(lowest, [i])

    def highest(i):
        return DynamicParallelMapper(2, backend="loky")(middle, [i, i + 1])

    result = StaticParallelMapper(2, backend=backend)(highest, range(3))
    assert result == [[[[i]], [[i + 1]]] for i in range(3)]


INSIDE = """
import sys, warnings
import numpy as np
from taskcarrier import DynamicParallelMapper, last_report, map_array

X = np.arange(3000.0).reshape(1000, 3)

def check(n):
    for options in ({}, {"n_jobs": 2, "backend": "loky"}, {"n_jobs": 2, "backend": "threading"}):
        Y = map_array(lambda c: c * n, X, **options)
        assert (Y == X * n).all(), options
        report = last_report()
        assert sum(worker.items for worker in report.workers) == 1000
        mapper = DynamicParallelMapper(**options)
        assert mapper(lambda i: i * n, range(30)) == [i * n for i in range(30)]
    return last_report().backend

if __name__ == "__main__":
    where = sys.argv[1]
    if where == "pool":
        import multiprocessing
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
            found = pool.map(check, [2, 3, 4])
    else:
        import joblib
        parallel = joblib.Parallel(n_jobs=2, backend=where)
        found = parallel(joblib.delayed(check)(n) for n in (2, 3, 4))
    assert len(found) == 3
    assert map_array(lambda c: c, np.arange(4), n_jobs=2, backend="loky").tolist() == [0, 1, 2, 3]
    print("fine")
"""


@pytest.mark.fault(19)
@pytest.mark.parametrize("where", [("loky", ""), ("threading", ""), ("pool", "fork")], ids="-".join)
def test_maps_inside_workers_of_other_libraries_are_right(where, tmp_path):
    assert run_script(tmp_path, INSIDE, *where, OMP_NUM_THREADS="1") == "fine\n"


@pytest.mark.fault(20)
def test_many_small_calls_leave_descriptors_and_threads_constant():
    def round_of_calls():
        for backend, balance in EVERYWHERE:
            run = {"n_jobs": 2, "backend": backend, "balance": balance}
            assert map_array(np.negative, X, **run)[-1] == -9
            OF_BALANCE[balance](2, backend=backend)(abs, range(4))
            with suppress(ZeroDivisionError):
                map_array(lambda c: 1 // 0, X, **run)

    def counted():
        gc.collect()
        children = psutil.Process().children()
        return (
            n_descriptors(),
            threading.active_count(),
            [(child.pid, child.num_fds(), child.num_threads()) for child in children],
        )

    X = np.arange(10.0)
    round_of_calls()
    before = counted()
    for _ in range(20):  # 300 calls
        round_of_calls()
    after = counted()
    assert after[:2] == before[:2]
    for (pid, fds, threads), (pid_before, fds_before, threads_before) in zip(
        after[2], before[2], strict=True
    ):
        assert (pid, threads) == (pid_before, threads_before)
        assert fds <= fds_before + 60  # what a failed run held goes with the next collection there


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("backend", "balance", "ending"),
    [(*run, ending) for run in EVERYWHERE for ending in ("well", "error")]
    + [("loky", "dynamic", "death")],
)
def test_a_run_leaves_the_state_of_the_program_as_before(backend, balance, ending):
    def state():
        return {
            "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "random": np.random.get_state(legacy=False)["state"]["key"].tobytes(),  # noqa: NPY002  # the one not to be changed
            "errors": np.geterr(),
            "hooks": (sys.excepthook, threading.excepthook, sys.getswitchinterval()),
            "folder": Path.cwd(),
            "path": list(sys.path),
        }

    def func(chunk):
        if chunk[0] == 2 and ending == "error":
            raise ZeroDivisionError
        if chunk[0] == 2 and ending == "death":
            os._exit(1)
        return chunk

    before = state()
    with suppress(ZeroDivisionError, WorkerDiedError):
        map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend=backend, balance=balance)
    assert state() == before


MODULE = """
import importlib, pathlib, sys
import numpy as np
import taskcarrier
from taskcarrier import map_array, map_items

folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
sys.dont_write_bytecode = True

def seen(backend):
    return map_array(outside.func, np.arange(3), n_jobs=2, backend=backend).tolist()

if __name__ == "__main__":
    for number in (2, 3):
        (folder / "outside.py").write_text(f"def func(c): return c * {number}")
        if number == 2:
            import outside
        else:
            importlib.reload(outside)
        print(seen("loky"), seen("threading"))
    taskcarrier.shutdown()
    print(seen("loky"), seen("threading"))
"""


@pytest.mark.thorough
@pytest.mark.fault(22)
def test_an_importable_module_is_seen_as_it_was_imported_until_shutdown(tmp_path):
    out = run_script(tmp_path, MODULE, str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert out == "[0, 2, 4] [0, 2, 4]\n[0, 2, 4] [0, 3, 6]\n[0, 3, 6] [0, 3, 6]\n"


@pytest.mark.fault(21)
def test_a_run_leaves_limits_on_the_threads_of_libraries_as_before():
    from threadpoolctl import threadpool_info

    def limits():
        return [(library["filepath"], library["num_threads"]) for library in threadpool_info()]

    np.ones((2, 2)) @ np.ones((2, 2))
    before = limits()
    assert before, "no library that can be limited was loaded"
    inside = map_array(
        lambda c: np.full(len(c), max(n["num_threads"] for n in threadpool_info())),
        np.arange(4),
        n_jobs=4,
        backend="threading",
    )
    assert inside.tolist() == [1] * 4
    assert limits() == before
    with pytest.raises(ZeroDivisionError):
        map_array(lambda c: 1 // 0, np.arange(4), n_jobs=4, backend="threading")
    assert limits() == before


class TestForks:
    """Forks by the caller and by the function: nobody's data change under anybody's eyes."""

    @pytest.mark.thorough
    def test_a_forked_child_keeps_its_values_when_memory_is_recycled(self):
        code = """
import multiprocessing as mp
import numpy as np
from taskcarrier import DynamicParallelMapper

def kid(end):
    end.recv()
    end.send((float(Y.min()), float(Y.max())))

X = np.ones(1_000_000)
context = mp.get_context("fork")
with DynamicParallelMapper(2, backend="loky") as mapper:
    Y = mapper.map_array(lambda chunk: chunk * 1, X)
    ours, theirs = context.Pipe()
    child = context.Process(target=kid, args=(theirs,))
    child.start()
    del Y
    for factor in (97, 98, 99):
        Z = mapper.map_array(lambda chunk: chunk * factor, X)
    ours.send(0)
    print(*ours.recv())
    child.join()
"""
        assert output_of(code) == "1.0 1.0"

    @pytest.mark.parametrize("how", ["returns", "raises"])
    def test_a_function_that_forks_continues_only_in_the_parent(self, how):
        code = f"""
import os
import numpy as np
from taskcarrier import map_array

def func(chunk):
    if chunk[0] == 0 and os.fork() == 0 and {how == "raises"}:
        raise KeyError("in the copy")
    return chunk + 1

X = np.arange(100.0)
Y = map_array(func, X, n_jobs=2, backend="loky", balance="dynamic", chunksize=1)
assert np.array_equal(Y, X + 1)
assert np.array_equal(map_array(np.sqrt, X, n_jobs=2, backend="loky"), np.sqrt(X))
print("right")
"""
        assert output_of(code) == "right"

    def test_a_fork_while_a_map_is_open_gives_the_child_its_blas_threads_back(self):
        code = """
import os, threading
import numpy as np
from threadpoolctl import threadpool_info
from taskcarrier import map_array

def counts():
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

before = counts()
inside, go_on = threading.Event(), threading.Event()

def func(chunk):
    inside.set()
    go_on.wait()
    return chunk

thread = threading.Thread(
    target=map_array, args=(func, np.zeros(2)), kwargs={"n_jobs": 2, "backend": "threading"}
)
thread.start()
inside.wait()
pid = os.fork()
if pid == 0:
    right = counts() == before
    right &= bool(np.array_equal(map_array(np.copy, np.ones(3), n_jobs=1), np.ones(3)))
    os._exit(0 if right and counts() == before else 1)
_, status = os.waitpid(pid, 0)
go_on.set()
thread.join()
print(os.waitstatus_to_exitcode(status), counts() == before)
"""
        assert output_of(code) == "0 True"


def test_relative_paths_are_resolved_as_in_the_caller(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
    mapper = taskcarrier.StaticParallelMapper(2, backend="loky")
    for name in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / name)
        assert mapper(lambda path: Path(path).read_text(), ["word"] * 2) == [name] * 2


@pytest.mark.parametrize("order", ["half", "transposed", "reversed", "broadcast", "gaps"])
def test_sums_over_an_argument_do_not_depend_on_the_backend(order):
    W = np.random.default_rng(0).normal(size=(600, 401)).astype("f4")
    W = {
        "half": lambda: np.asfortranarray(W)[::2],
        "transposed": lambda: W.reshape(200, 3, 401).transpose(2, 0, 1)[::2],
        "reversed": lambda: W[::-1, ::-1],
        "broadcast": lambda: np.broadcast_to(W[0], (300, 401)),
        "gaps": lambda: W[::7, ::5],
    }[order]()
    X = np.ones(4)
    results = [
        map_array(lambda c, W: c * W.sum(), X, args=(W,), n_jobs=n, backend=backend)
        for backend, n in (("sequential", 1), ("threading", 2), ("loky", 2))
    ]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_bits_do_not_depend_on_the_users_blas_threads():
    code = """
import numpy as np
from taskcarrier import map_array
X = np.random.default_rng(0).normal(size=(4, 1_000_000))
func = lambda chunk: np.array([row @ row for row in chunk])
runs = [("sequential", 1), ("threading", 2), ("loky", 2)]
results = [map_array(func, X, chunksize=1, n_jobs=n, backend=b).tobytes() for b, n in runs]
print(len(set(results)))
"""
    assert output_of(code, OPENBLAS_NUM_THREADS="2") == "1"


@pytest.mark.fault(19)
def test_a_run_reads_its_own_ledger_though_its_pool_is_lent_again(monkeypatch):
    X = np.arange(64.0)

    def halved(x):
        return x * 0.5

    def tripled(x):
        return int(x) * 3

    report, others = taskcarrier.run.make_report, []

    def interrupted(*args, **options):
        # Another thread's turn, when the pool of this run has been given back.
        if not others:
            others.append(
                threading.Thread(
                    target=map_items, args=(tripled, X), kwargs={"backend": "loky", "n_jobs": 2}
                )
            )
            others[0].start()
            others[0].join()
        return report(*args, **options)

    monkeypatch.setattr(taskcarrier.run, "make_report", interrupted)
    assert_same(map_items(halved, X, backend="loky", n_jobs=2), X * 0.5)
    assert others


@pytest.mark.fault(19)
@pytest.mark.parametrize("n_programs", [1, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_the_first_calls_may_come_from_several_threads(backend, n_programs, tmp_path):
    code = """
    import sys, threading
    import numpy as np
    from taskcarrier import map_array
    X, barrier, right = np.arange(64.0), threading.Barrier(3), []
    def go():
        barrier.wait()
        right.append(np.array_equal(map_array(np.sqrt, X, backend=sys.argv[1], n_jobs=2), X**0.5))
    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(right)
    """
    for _ in range(n_programs):
        assert run_script(tmp_path, textwrap.dedent(code), backend).strip() == "[True, True, True]"


# What a program sets for all of itself must not reach what is ours.

DEFAULTS = """
import os, signal, socket, sys, time
import numpy as np
from taskcarrier import StaticParallelMapper

socket.setdefaulttimeout(float(sys.argv[1]))
mapper = StaticParallelMapper(2, backend="loky", chunksize=1)

def large(i):
    time.sleep(0.05)
    return bytes([i]) * 3_000_000

def pids():
    return {*mapper.map(lambda _: os.getpid(), range(20))}

expected = [bytes([i]) * 3_000_000 for i in range(6)]
before = pids()
assert mapper.map(large, range(6)) == expected
assert list(mapper.imap(large, range(6))) == expected
assert mapper.map(len, expected) == [3_000_000] * 6
assert list(mapper.imap(len, expected)) == [3_000_000] * 6
time.sleep(float(sys.argv[2]))  # as long as a worker that waits would have waited
assert pids() == before
"""


@pytest.mark.thorough
@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("timeout", "idle"),
    [
        ("0.01", "0.1"),
        pytest.param("0", "0", marks=pytest.mark.thorough),
        pytest.param("1", "1.5", marks=pytest.mark.thorough),
    ],
)
def test_default_socket_timeouts_of_the_program_do_not_apply_to_ours(timeout, idle, tmp_path):
    run_script(tmp_path, DEFAULTS, timeout, idle)


PIPES = """
import os, signal, sys
from taskcarrier import StaticParallelMapper, WorkerDiedError

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
mapper = StaticParallelMapper(2, backend="loky", chunksize=1)

def dies(i):
    os._exit(3)

for _ in range(int(sys.argv[1])):
    try:
        mapper.map(dies, range(4), retries=1)
    except WorkerDiedError:
        pass
    # One that was just killed may not be known to be dead when it is sent something.
    for pid in mapper.map(lambda _: os.getpid(), range(4)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert list(mapper.imap(abs, range(200))) == list(range(200))
print("alive")
"""


@pytest.mark.fault(35)
@pytest.mark.parametrize("n_rounds", [1, pytest.param(5, marks=pytest.mark.thorough)])
def test_a_program_that_a_broken_pipe_would_kill_survives_dead_workers(n_rounds, tmp_path):
    assert run_script(tmp_path, PIPES, str(n_rounds)) == "alive\n"


HASHES = """
import os, sys, time
from taskcarrier import StaticParallelMapper, map_items, shutdown
import numpy as np

def hashed(_):
    return hash("a")

def inherited(_):
    return os.environ.get("PYTHONHASHSEED"), os.environ.get("JOBLIB_MULTIPROCESSING")

def found(n_jobs):
    mapper = StaticParallelMapper(n_jobs, backend="loky", chunksize=1)
    return set(mapper.map(hashed, range(8))) | set(mapper.imap(hashed, range(8)))

def dies_once(i):
    if i == 3 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os._exit(1)
    return hash("a")

if __name__ == "__main__":
    values = found(2) | found(3)
    shutdown()
    values |= found(2) | set(StaticParallelMapper(2, backend="loky").map(dies_once, range(8)))
    values |= set(map_items(hashed, np.arange(8), n_jobs=2, backend="loky").tolist())
    assert len(values) == 1, values
    # What the function starts finds the program's own environment.
    assert set(StaticParallelMapper(2, backend="loky").map(inherited, range(4))) == {inherited(0)}
    print(*values, hash("a"))
"""


@pytest.mark.fault(37)
def test_strings_have_the_same_hash_in_all_workers(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    run_script(tmp_path, HASHES, str(tmp_path / "mark"))


@pytest.mark.thorough
@pytest.mark.fault(37)
def test_strings_have_the_hash_that_the_environment_asks_for(tmp_path, monkeypatch):
    for name, value in {"PYTHONHASHSEED": "7", "JOBLIB_MULTIPROCESSING": "1"}.items():
        monkeypatch.setenv(name, value)
    there, here = run_script(tmp_path, HASHES, str(tmp_path / "mark")).split()
    assert there == here


# A child of multiprocessing knows the main module by another name.
CHILD = """
import functools, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
from taskcarrier import DynamicParallelMapper, last_report, map_array, map_items, reduce_array

OFFSET = 5

class Point:
    def __init__(self, x):
        self.x = x

    def plus(self, y):
        return self.x + y

class PointError(Exception):
    pass

def shifted(x):
    return x + OFFSET

def fails(x):
    raise PointError(x)

@functools.cache
def cached(x):
    return x + 1

def work(n):
    X = np.arange(n)
    mapper = DynamicParallelMapper(2, backend="loky")
    assert map_array(shifted, X, n_jobs=2, backend="loky").tolist() == (X + 5).tolist()
    assert last_report().backend == "loky"
    assert map_items(shifted, X, n_jobs=2, backend="loky").tolist() == (X + 5).tolist()
    total = reduce_array(np.sum, X, combine=np.add, chunksize=2, n_jobs=2, backend="loky")
    assert total == X.sum()
    assert mapper.map(cached, range(n)) == [*range(1, n + 1)]
    assert list(mapper.imap(Point(2).plus, range(n))) == [*range(2, n + 2)]
    points = mapper.map(lambda point: point, [Point(3), Point(4)])
    assert [type(point) for point in points] == [Point, Point]
    try:
        mapper.map(fails, range(n))
    except PointError as error:
        assert error.args == (0,)
    return mapper.map(Point, range(n))

def put(queue):
    queue.put(work(4))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    child = context.Process(target=put, args=(queue,))
    child.start()
    print([point.x for point in queue.get()])
    child.join()
    with ProcessPoolExecutor(1, context) as executor:
        print([point.x for point in executor.submit(work, 4).result()])
"""


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "method",
    ["spawn", *[pytest.param(way, marks=pytest.mark.thorough) for way in ("forkserver", "fork")]],
)
def test_children_of_multiprocessing_map_functions_of_the_main_module(method, tmp_path):
    assert run_script(tmp_path, CHILD, method).splitlines() == ["[0, 1, 2, 3]"] * 2


# The kernel refuses both calls with this error, as it does in old containers.
SANDBOX = """
import ctypes, os, struct, sys, time
number = int(sys.argv[1])

def instruction(code, if_true, if_false, operand):
    return struct.pack("HBBI", code, if_true, if_false, operand)

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

code = instruction(0x20, 0, 0, 0)  # the number of the call
for call in (434, 424):  # pidfd_open, pidfd_send_signal
    code += instruction(0x15, 0, 1, call) + instruction(0x06, 0, 0, 0x50000 | number)
code += instruction(0x06, 0, 0, 0x7FFF0000)
memory = ctypes.create_string_buffer(code)
program = Program(len(code) // 8, ctypes.addressof(memory))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)  # no new privileges
if libc.prctl(22, 2, ctypes.byref(program), 0, 0) != 0:  # a filter of calls
    sys.exit("no filters here")
try:
    os.pidfd_open(os.getpid())
except OSError as error:
    assert error.errno == number

from pathlib import Path
import numpy as np
import psutil
from taskcarrier import DynamicParallelMapper, WorkerDiedError, map_array, shutdown

folder = Path(sys.argv[2])

def exits_once(x):
    if x == 2 and not (folder / "exited").exists():
        (folder / "exited").touch()
        os._exit(3)
    return x

def hangs(x):
    if x == 2:
        time.sleep(60)
    return x

def forks_and_exits(x):
    if os.fork() == 0:
        time.sleep(60)  # holds whatever the worker held
    os._exit(5)

if __name__ == "__main__":
    mapper = DynamicParallelMapper(2, backend="loky")
    assert map_array(np.sqrt, np.arange(9.0), n_jobs=2, backend="loky")[4] == 2
    assert mapper.map(exits_once, range(4)) == [0, 1, 2, 3]
    results, (late,) = mapper.map(hangs, range(4), timeout=1, on_error="collect")
    assert (results, type(late.error)) == ([0, 1, None, 3], TimeoutError)
    assert list(mapper.imap(abs, range(4))) == [0, 1, 2, 3]
    try:
        mapper.map(forks_and_exits, range(4), retries=0)
    except WorkerDiedError as error:
        assert error.exitcode == 5
    assert mapper.map(abs, range(4)) == [0, 1, 2, 3]
    shutdown()
    print([one.pid for one in psutil.Process().children() if one.status() == "zombie"])
"""


@pytest.mark.thorough
@pytest.mark.fault(50)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_sandbox_may_refuse_pidfds(number, tmp_path):
    with running(tmp_path, SANDBOX, str(number), str(tmp_path), ready="[]"):
        pass


ANOTHER_USER = """
import os, time
import numpy as np
import psutil
from taskcarrier import DynamicParallelMapper, WorkerDiedError, map_array, share

def who(x):
    return os.getresuid()

def sleeps(x):
    if x > 0:
        time.sleep(60)
    return x

def exits(x):
    if x == 2:
        os._exit(3)
    return x

def workers(uid):
    servers = psutil.Process().children()
    found = [one for server in servers for one in server.children()]
    return [one for one in found if one.uids().real == uid]

if __name__ == "__main__":
    X, shared = np.arange(300_000.0), share(np.arange(9.0))
    mapper = DynamicParallelMapper(2, backend="loky")
    with mapper:
        stream = mapper.imap(sleeps, range(9))
        assert next(stream) == 0
        assert mapper.map(who, range(4)) == [(0, 0, 0)] * 4
        kept = mapper.map_array(np.negative, X)
        assert len(workers(0)) == 4
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        assert mapper.map(who, range(4)) == [(65534, 65534, 65534)] * 4
        assert len(workers(0)) == 2  # those of the stream
        stream.close()
        assert (len(workers(0)), len(workers(65534))) == (0, 2)
        for given in (X, kept, X.reshape(500, 600)[:, ::3]):
            assert np.array_equal(mapper.map_array(np.negative, given), -given)
        assert mapper.map_array(np.negative, shared).tolist() == (-shared).tolist()
        assert list(mapper.imap(abs, range(4))) == [0, 1, 2, 3]
        results, (dead,) = mapper.map(exits, range(4), on_error="collect")
        assert (results, type(dead.error)) == ([0, 1, None, 3], WorkerDiedError)
        results, late = mapper.map(sleeps, range(2), timeout=1, on_error="collect")
        assert (results, type(late[0].error)) == ([0, None], TimeoutError)
        assert map_array(np.negative, shared, n_jobs=2, backend="threading").sum() == -36
    print("fine", len(workers(0)))
"""


@pytest.mark.fault(51)
def test_a_program_may_give_up_root_after_its_first_map(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    prefix = unshared(*opened_up(aside))
    if prefix is None or os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    assert run_script(tmp_path, ANOTHER_USER, prefix=prefix) == "fine 0\n"

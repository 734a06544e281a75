"""Locks of modules: reentrant, and renewed in a forked child."""

import os
import threading
import time

import pytest

from taskcarrier.system import locks
from taskcarrier.system.locks import Lock, ModuleLock, ReentrantLock
from tests.interrupted import interrupted_at
from tests.strategies import run_script


@pytest.fixture
def lock():
    yield (made := ModuleLock())
    locks._locks.remove(made)


@pytest.fixture
def waited_for():
    yield (made := ModuleLock(forks_wait=True))
    locks._locks.remove(made)


def held_elsewhere(lock):
    """Start a thread that holds the lock; return it and the event that releases it."""
    inside, out = threading.Event(), threading.Event()

    def hold():
        with lock:
            inside.set()
            out.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    return thread, out


def can_be_taken(lock):
    taken = []

    def take():
        with lock:
            taken.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(60)
    return bool(taken)


def in_child(check):
    """Tell whether a check holds in a forked child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


# Python 3.12 and later warn of forks beside threads, which is what these tests are about.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("kind", [Lock, ReentrantLock])
def test_an_exception_from_outside_leaves_no_lock_taken(kind):
    lock = kind()

    def use():
        with lock:
            pass

    step = 0
    while interrupted_at(step, use):
        assert can_be_taken(lock)
        step += 1
    assert can_be_taken(lock)


def test_a_thread_may_take_a_lock_twice(lock):
    with lock, lock:
        pass
    assert can_be_taken(lock)


def test_other_threads_wait_for_a_lock(lock):
    thread, out = held_elsewhere(lock)
    taken = []

    def take():
        with lock:
            taken.append(out.is_set())

    other = threading.Thread(target=take)
    other.start()
    time.sleep(0.02)
    out.set()
    other.join()
    thread.join()
    assert taken == [True]


@forks
def test_a_child_does_not_wait_for_a_thread_of_its_parent(lock):
    thread, out = held_elsewhere(lock)
    try:
        assert in_child(lambda: can_be_taken(lock))
    finally:
        out.set()
        thread.join()
    assert can_be_taken(lock)


@forks
def test_a_thread_that_forks_inside_a_lock_holds_it_in_the_child_too(lock):
    def leaves():
        lock.__exit__(None, None, None)
        return can_be_taken(lock)

    with lock:
        assert in_child(leaves)
    assert can_be_taken(lock)


@forks
def test_a_fork_waits_for_a_thread_that_imports(waited_for):
    thread, out = held_elsewhere(waited_for)
    threading.Timer(0.1, out.set).start()
    assert in_child(lambda: out.is_set() and can_be_taken(waited_for))
    thread.join()
    assert can_be_taken(waited_for)


@forks
def test_a_thread_that_imports_may_fork(waited_for):
    def leaves():
        waited_for.__exit__(None, None, None)
        return can_be_taken(waited_for)

    with waited_for:
        assert in_child(leaves)
    assert can_be_taken(waited_for)


IMPORTS = """
import importlib.abc, os, sys, threading, time
import numpy as np
from taskcarrier import StaticParallelMapper, map_array

_, backend, module = sys.argv
entered = threading.Event()

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            entered.set()
            time.sleep(0.3)

sys.meta_path.insert(0, Slow())
X = np.arange(8.0)
options = {"n_jobs": 2, "backend": backend}
thread = threading.Thread(target=map_array, args=(np.sqrt, X), kwargs=options)
thread.start()
entered.wait()
pid = os.fork()
if pid == 0:
    ok = False
    try:
        ok = np.array_equal(map_array(np.sqrt, X, **options), np.sqrt(X))
        ok = ok and StaticParallelMapper(2, backend="loky").map(abs, [-1, -2]) == [1, 2]
    finally:
        os._exit(0 if ok else 1)
thread.join()
deadline = time.monotonic() + 50
while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
    if time.monotonic() > deadline:
        os.kill(pid, 9)
        sys.exit("the child waits for ever")
    time.sleep(0.01)
print(found[1])
"""


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("backend", "module"),
    [("threading", "joblib.parallel"), ("loky", "taskcarrier.workers.pickling")],
)
def test_a_process_may_fork_while_another_thread_begins_its_first_map(backend, module, tmp_path):
    assert run_script(tmp_path, IMPORTS, backend, module) == "0\n"


SIGNALS = """
import gc, random, signal, sys, time
import numpy as np
from numba import njit
from threadpoolctl import threadpool_info
from taskcarrier import StaticParallelMapper, map_array, map_items

kernel = njit(lambda v: v * 2.0)
X = np.arange(64.0)
way = sys.argv[1]
inside = [False, 0]

def maps(*_):
    if inside[0]:
        return
    inside[0] = True
    assert np.array_equal(map_array(np.sqrt, X, n_jobs=2, backend="threading"), np.sqrt(X))
    assert np.array_equal(map_items(kernel, X, n_jobs=2, backend="threading"), X * 2)
    assert StaticParallelMapper(2, backend="threading").map(abs, [-1, -2]) == [1, 2]
    inside[0] = False
    inside[1] += 1
    if way == "signal":
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 3e-3))

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        maps()

signal.signal(signal.SIGALRM, maps)
maps()
limits = [one["num_threads"] for one in threadpool_info()]
if way == "finalizer":
    gc.set_threshold(20)
end = time.monotonic() + 3
while time.monotonic() < end:
    for backend in ("sequential", "threading"):
        if way == "finalizer":
            Cycle()
        assert np.array_equal(map_array(np.sqrt, X, n_jobs=2, backend=backend), np.sqrt(X))
        assert np.array_equal(map_items(kernel, X, n_jobs=2, backend=backend), X * 2)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
gc.set_threshold(0)
assert [one["num_threads"] for one in threadpool_info()] == limits
assert inside[1] > 1
"""


@pytest.mark.one_case
@pytest.mark.fault(19)
@pytest.mark.parametrize("way", ["signal", "finalizer"])
def test_a_map_may_begin_at_any_moment_of_another_in_the_same_thread(way, tmp_path):
    run_script(tmp_path, SIGNALS, way)

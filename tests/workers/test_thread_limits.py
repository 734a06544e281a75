"""The threads that libraries use inside workers."""

import contextlib
import os
import threading
from queue import SimpleQueue
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import threadpoolctl
from threadpoolctl import ThreadpoolController

from taskcarrier.workers.thread_limits import (
    _VARIABLES,
    _CountedLimit,
    limit_this_thread,
    make_joblib_serial,
    make_worker_environment,
    thread_limit,
)
from tests.strategies import run_script


class TestEnvironment:
    @pytest.fixture(autouse=True)
    def nothing_set(self, monkeypatch):
        for name in _VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def test_all_libraries_are_limited(self):
        assert make_worker_environment() == dict.fromkeys(_VARIABLES, "1")
        assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"} <= set(_VARIABLES)

    def test_settings_of_the_user_do_not_count(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert make_worker_environment()["OMP_NUM_THREADS"] == "1"

    def test_the_environment_of_the_caller_is_unchanged(self):
        before = dict(os.environ)
        make_worker_environment()
        assert dict(os.environ) == before


def blas_threads():
    return [
        library["num_threads"]
        for library in ThreadpoolController().info()
        if library["user_api"] == "blas"
    ]


# Since 3.8, whichever thread first sets OpenBLAS's threads is the only one that can.
OWNED = hasattr(threadpoolctl.OpenBLASController, "clear_controlling_thread")


def free_for_all():
    if OWNED:
        threadpoolctl.OpenBLASController.clear_controlling_thread(force=True)


class User:
    """Another thread, which calls the functions that it gets until it is ended."""

    def __init__(self):
        self._orders = SimpleQueue()
        self._answers = SimpleQueue()
        self._thread = threading.Thread(target=self._live)

    def _live(self):
        while (order := self._orders.get()) is not None:
            try:
                self._answers.put(order())
            except Exception as error:  # noqa: BLE001  # whatever the user's object raises
                self._answers.put(error)

    def __call__(self, order):
        self._orders.put(order)
        answer = self._answers.get(timeout=30)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._orders.put(None)
        self._thread.join()


@pytest.mark.usefixtures("several_threads")
class TestCountedLimit:
    @pytest.fixture
    def several_threads(self):
        """Give BLAS several threads, and restore its limits even after a failed test."""
        np.ones((2, 2)) @ np.ones((2, 2))  # loads it
        free_for_all()
        before = ThreadpoolController().info()
        if min(blas_threads(), default=1) == 1:
            pytest.skip("one core, or no BLAS whose threads can be set")
        yield blas_threads()
        free_for_all()
        ThreadpoolController().limit(limits=before)
        free_for_all()

    @pytest.fixture
    def limit(self):
        return _CountedLimit()

    def test_the_process_has_one_limit(self, several_threads):
        assert isinstance(thread_limit, _CountedLimit)
        with thread_limit.open():
            assert set(blas_threads()) == {1}
        assert blas_threads() == several_threads

    def test_a_limit_is_set_and_restored(self, limit, several_threads):
        for _ in range(2):
            with limit.open():
                assert set(blas_threads()) == {1}
            assert blas_threads() == several_threads

    def test_a_limit_is_restored_after_an_error(self, limit, several_threads):
        with pytest.raises(KeyError), limit.open():
            raise KeyError
        assert blas_threads() == several_threads

    def test_limits_may_be_nested(self, limit, several_threads):
        with limit.open():
            with pytest.raises(KeyError), limit.open():
                raise KeyError
            assert set(blas_threads()) == {1}
        assert blas_threads() == several_threads

    @pytest.mark.parametrize("first_out", ["the first in", "the last in"])
    @pytest.mark.parametrize("error", [(None, None, None), (KeyError, KeyError("no"), None)])
    def test_limits_of_several_users_may_overlap(self, limit, several_threads, first_out, error):
        with User() as one, User() as other:
            users = [(one, limit.open()), (other, limit.open())]
            for user, guard in users:
                user(guard.__enter__)
            if first_out == "the last in":
                users.reverse()
            for user, guard in users:
                assert set(blas_threads()) == {1}
                with contextlib.suppress(KeyError):
                    user(lambda guard=guard: guard.__exit__(*error))
            assert blas_threads() == several_threads

    def test_a_limit_may_be_used_by_several_threads_in_turn(self, limit, several_threads):
        with User() as one, User() as other:
            for user in (one, other):
                guard = limit.open()
                user(guard.__enter__)
                assert set(blas_threads()) == {1}
                user(lambda guard=guard: guard.__exit__(None, None, None))
                assert blas_threads() == several_threads

    def test_limits_of_the_caller_work_afterwards(self, limit, several_threads):
        with limit.open():
            pass
        with User() as other:
            own = other(lambda: threadpoolctl.threadpool_limits(1))
            assert set(blas_threads()) == {1}
            other(own.restore_original_limits)
            assert blas_threads() == several_threads

    def test_a_failure_to_limit_leaves_nothing_behind(self, limit, several_threads, monkeypatch):
        def refuse():
            raise OSError("no")

        with monkeypatch.context() as patch:
            patch.setattr(limit, "find_libraries", refuse)
            with pytest.raises(OSError, match="no"), limit.open():
                pytest.fail("entered")
        with limit.open():
            assert set(blas_threads()) == {1}
        assert blas_threads() == several_threads


def test_joblib_is_serial_in_the_worker_thread_only():
    found = []

    def look():
        make_joblib_serial()
        parallel = joblib.Parallel()
        found.append((type(parallel._backend).__name__, parallel.n_jobs))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [("SequentialBackend", 1)]
    assert type(joblib.Parallel()._backend).__name__ != "SequentialBackend"


BUSY = """
import sys, time
from pathlib import Path
import numpy as np
from threadpoolctl import threadpool_info
from taskcarrier import map_array

def cpu_of_threads():
    spent = {}
    for task in Path("/proc/self/task").iterdir():
        fields = task.joinpath("stat").read_text().rpartition(")")[2].split()
        spent[task.name] = int(fields[11]) + int(fields[12])
    return spent

W = np.random.default_rng(0).random((700, 700))
X = np.random.default_rng(1).random((1400, 700))

def products(chunk):
    for _ in range(8):
        chunk = chunk @ W / 350
    return chunk

def n_busy(call):
    # By the time that all have had together, which does not depend on other programs.
    before, begin = cpu_of_threads(), time.process_time()
    while time.process_time() - begin < 3:
        call()
    after = cpu_of_threads()
    spent = [after[task] - before.get(task, 0) for task in after]
    return sum(one > 0.3 * sum(spent) / max(2, n_blas) for one in spent)

def of_blas():
    return max(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")

map_array(products, X, n_jobs=2, backend="threading")
n_blas = of_blas()
print(n_blas, n_busy(lambda: products(X)), n_busy(
    lambda: map_array(products, X, n_jobs=2, backend="threading", chunksize=100)
))
assert of_blas() == n_blas
"""


@pytest.mark.thorough
def test_matrix_products_keep_one_thread_busy_for_each_worker(tmp_path):
    n_blas, plain, mapped = map(int, run_script(tmp_path, BUSY).split())
    if n_blas == 1:
        pytest.skip("BLAS has one thread here, so there is nothing to limit")
    # Two workers with BLAS's threads each would be more than two.
    assert plain == n_blas
    assert mapped <= 2


OWN = """
import threading
import numba, numpy as np
from taskcarrier import map_array, map_chunks

@numba.njit(parallel=True)
def total(chunk):
    s = 0.0
    for i in numba.prange(len(chunk)):
        s += chunk[i]
    return s

X = np.ones(1000)
total(X)
assert numba.get_num_threads() == 2
threads = {"n_jobs": 2, "backend": "threading"}
seen = map_chunks(lambda c: numba.get_num_threads(), X, chunksize=100, **threads)
assert seen == [1] * 10, seen
assert numba.get_num_threads() == 2
print("done")
"""


def test_worker_threads_have_one_numba_thread(tmp_path):
    out = run_script(tmp_path, OWN, NUMBA_NUM_THREADS="2", NUMBA_THREADING_LAYER="workqueue")
    assert out.strip() == "done"


def test_openmp_is_limited_in_the_calling_thread(monkeypatch):
    class Library:
        def __init__(self, user_api):
            self.user_api = user_api
            self.calls = []

        def set_num_threads(self, n):
            self.calls.append((threading.get_ident(), n))

    openmp, blas = Library("openmp"), Library("blas")
    found = SimpleNamespace(lib_controllers=[openmp, blas])
    monkeypatch.setattr(thread_limit, "find_libraries", lambda: found)
    idents = []

    def worker():
        limit_this_thread()
        limit_this_thread()  # nothing was loaded since
        idents.append(threading.get_ident())

    threads = [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert openmp.calls == [(ident, 1) for ident in idents]
    assert blas.calls == []

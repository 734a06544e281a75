"""The choice of where a run takes place, by a table of facts."""

import importlib.util
import multiprocessing
import os
import sys
from dataclasses import replace

import joblib
import numpy as np
import pytest
from joblib.parallel import ParallelBackendBase, register_parallel_backend

from taskcarrier.workers import loop
from taskcarrier.workers.choose import (
    BACKENDS,
    Choice,
    Facts,
    check_backend,
    check_n_jobs,
    choose,
    count_cores,
    count_workers,
    read_facts,
)
from tests.strategies import run_script

KNOWN = "the function releases the GIL"
OWN = "parallel=True: one range at a time, on numba's own threads"


def facts(**others):
    return Facts(**{"cores": 4, **others})


def test_auto_is_the_default_with_threads_allowed():
    for known, active in (("", None), (KNOWN, None), ("", "threading")):
        found = facts(active_backend=active)
        auto = choose(None, "auto", found, releases_gil=known, can_begin=True)
        default = choose(None, None, facts(), releases_gil=known, can_begin=True)
        assert auto == replace(default, may_use_threads=True)
        assert auto.begins_in_caller
    assert choose(1, "auto", facts()).backend == "sequential"
    assert not choose(None, None, facts(), can_begin=True).may_use_threads


class TestChoose:
    @pytest.mark.parametrize(
        ("call", "found", "expected"),
        [
            # nothing said
            ({}, {}, ("loky", 4, "the default")),
            (
                {"releases_gil": KNOWN},
                {},
                ("threading", 4, KNOWN),
            ),
            ({}, {"has_gil": False}, ("threading", 4, "the interpreter has no GIL")),
            ({}, {"has_processes": False}, ("threading", 4, "worker processes need Linux")),
            (
                {"releases_gil": KNOWN},
                {"has_gil": False, "has_processes": False},
                ("threading", 4, KNOWN),
            ),
            (
                {"backend": "threading"},
                {"has_threads": False},
                ("sequential", 1, "the program is ending, and Python starts no more threads"),
            ),
            ({}, {"has_threads": False}, ("loky", 4, "the default")),
            # asked for
            ({"backend": "loky"}, {}, ("loky", 4, "asked for")),
            ({"backend": "threading"}, {}, ("threading", 4, "asked for")),
            ({"backend": "sequential"}, {}, ("sequential", 1, "asked for")),
            (
                {"backend": "loky", "releases_gil": KNOWN},
                {},
                ("loky", 4, "asked for"),
            ),
            ({"backend": "loky"}, {"has_gil": False}, ("loky", 4, "asked for")),
            ({"backend": "threading"}, {"has_processes": False}, ("threading", 4, "asked for")),
            ({"backend": "sequential", "n_jobs": 3}, {}, ("sequential", 1, "asked for")),
            # threads of its own
            (
                {"own_threads": True, "releases_gil": KNOWN},
                {},
                ("sequential", 1, OWN),
            ),
            ({"own_threads": True, "backend": "threading"}, {}, ("sequential", 1, OWN)),
            ({"own_threads": True, "n_jobs": 1}, {}, ("sequential", 1, OWN)),
            ({"own_threads": True, "backend": "loky"}, {}, ("loky", 4, "asked for")),
            ({"own_threads": True}, {"has_gil": False}, ("sequential", 1, OWN)),
            # one worker
            ({"n_jobs": 1}, {}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 1, "backend": "loky"}, {}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 1, "backend": "threading"}, {}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 1, "backend": "sequential"}, {}, ("sequential", 1, "asked for")),
            ({}, {"cores": 1}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 7}, {}, ("loky", 7, "the default")),
            # inside a worker
            ({}, {"is_in_worker": True}, ("sequential", 1, "called inside a worker")),
            (
                {"n_jobs": 3, "backend": "loky"},
                {"is_in_worker": True},
                ("sequential", 1, "called inside a worker"),
            ),
            # inside a task of joblib
            ({}, {"is_nested_in_joblib": True}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 3}, {"is_nested_in_joblib": True}, ("loky", 3, "the default")),
            # under parallel_config
            (
                {},
                {"active_backend": "threading"},
                ("threading", 4, "joblib's active configuration"),
            ),
            ({}, {"active_backend": "loky"}, ("loky", 4, "joblib's active configuration")),
            (
                {"releases_gil": KNOWN},
                {"active_backend": "multiprocessing"},
                ("loky", 4, "joblib's active configuration"),
            ),
            (
                {"n_jobs": 3},
                {"active_backend": "sequential"},
                ("sequential", 1, "joblib's active configuration"),
            ),
            ({"backend": "loky"}, {"active_backend": "threading"}, ("loky", 4, "asked for")),
            ({"backend": "loky"}, {"active_backend": "dask"}, ("loky", 4, "asked for")),
            ({}, {"active_n_jobs": 3}, ("loky", 3, "the default")),
            ({}, {"active_n_jobs": -2}, ("loky", 3, "the default")),
            ({}, {"active_n_jobs": 1}, ("sequential", 1, "n_jobs is 1")),
            ({"n_jobs": 2}, {"active_n_jobs": 3}, ("loky", 2, "the default")),
            # without children
            (
                {},
                {"is_daemonic": True},
                ("sequential", 1, "a daemonic process may not start worker processes"),
            ),
            (
                {"backend": "loky"},
                {"is_daemonic": True},
                ("sequential", 1, "a daemonic process may not start worker processes"),
            ),
            ({"backend": "threading"}, {"is_daemonic": True}, ("threading", 4, "asked for")),
            (
                {"releases_gil": KNOWN},
                {"is_daemonic": True},
                ("threading", 4, KNOWN),
            ),
        ],
    )
    def test_the_table_of_choices_holds(self, call, found, expected):
        wishes = {"n_jobs": None, "backend": None, **call}
        assert choose(facts=facts(**found), **wishes) == Choice(*expected)

    @pytest.mark.parametrize(("backend", "active"), [("loky", None), (None, "loky")])
    def test_processes_need_linux(self, backend, active):
        with pytest.raises(OSError, match="worker processes need Linux; pass backend='threading'"):
            choose(None, backend, facts(active_backend=active, has_processes=False))

    @pytest.mark.parametrize(
        ("call", "found", "expected"),
        [
            ({"backend": "dask"}, {}, ("dask", -1, "asked for")),
            ({"backend": "dask", "n_jobs": 7}, {}, ("dask", 7, "asked for")),
            ({"backend": "dask", "n_jobs": -2}, {"cores": 1}, ("dask", -2, "asked for")),
            ({"backend": "dask"}, {"active_n_jobs": 3}, ("dask", 3, "asked for")),
            ({"backend": "dask"}, {"active_backend": "loky"}, ("dask", -1, "asked for")),
            ({}, {"active_backend": "dask"}, ("dask", -1, "joblib's active configuration")),
            (
                {"releases_gil": KNOWN},
                {"active_backend": "dask", "active_n_jobs": 5, "is_daemonic": True},
                ("dask", 5, "joblib's active configuration"),
            ),
            ({"backend": "dask", "n_jobs": 1}, {}, ("sequential", 1, "n_jobs is 1")),
            ({"backend": "dask"}, {"is_nested_in_joblib": True}, ("sequential", 1, "n_jobs is 1")),
            (
                {"backend": "dask"},
                {"is_in_worker": True},
                ("sequential", 1, "called inside a worker"),
            ),
            ({"backend": "dask", "own_threads": True}, {}, ("sequential", 1, OWN)),
            ({"backend": "loky"}, {"active_backend": "dask"}, ("loky", 4, "asked for")),
        ],
    )
    def test_lists_run_on_other_backends_of_joblib(self, call, found, expected):
        wishes = {"n_jobs": None, "backend": None, **call}
        assert choose(facts=facts(**found), lists=True, **wishes) == Choice(*expected)

    def test_arrays_on_other_backends_of_joblib_are_refused(self):
        with pytest.raises(ValueError, match="configuration asks for backend='dask'") as info:
            choose(None, None, facts(active_backend="dask"))
        with pytest.raises(ValueError, match=r"^got backend='dask', which.*own workers") as own:
            choose(None, "dask", facts())
        for error in (info, own):
            assert all(repr(name) in str(error.value) for name in BACKENDS)
            assert "mapper.map" in str(error.value)


class TestWorkers:
    @pytest.mark.parametrize(
        ("n_jobs", "cores", "expected"),
        [
            (1, 4, 1),
            (3, 4, 3),
            (100, 4, 100),
            (-1, 4, 4),
            (-2, 4, 3),
            (-4, 4, 1),
            (-5, 4, 1),
            (-1000, 4, 1),
            (None, 4, 4),
            (-1, 1, 1),
        ],
    )
    def test_n_jobs_are_counted_by_the_rule_of_joblib(self, n_jobs, cores, expected):
        assert count_workers(n_jobs, facts(cores=cores)) == expected

    @pytest.mark.parametrize("n_jobs", [-1, -2, -1000, 1, 3])
    def test_the_number_of_workers_equals_that_of_joblib(self, n_jobs):
        cores = joblib.cpu_count()
        expected = joblib.effective_n_jobs(n_jobs)
        assert count_workers(n_jobs, facts(cores=cores)) == expected

    @pytest.mark.parametrize("n_jobs", [None, 1, -1, -1000, 5])
    def test_valid_n_jobs_are_kept(self, n_jobs):
        assert check_n_jobs(n_jobs) == n_jobs

    def test_numpy_integers_become_plain_ones(self):
        assert check_n_jobs(np.int64(3)) == 3
        assert type(check_n_jobs(np.int64(3))) is int

    def test_zero_n_jobs_are_refused(self):
        with pytest.raises(ValueError, match="n_jobs must not be 0"):
            check_n_jobs(0)

    @pytest.mark.parametrize("n_jobs", [2.0, "2", "all", [2], np.float64(2)])
    def test_n_jobs_that_are_no_integers_are_refused(self, n_jobs):
        with pytest.raises(TypeError, match="n_jobs must be a non-zero integer or None") as info:
            check_n_jobs(n_jobs)
        assert repr(n_jobs) in str(info.value)
        assert type(n_jobs).__name__ in str(info.value)


class TestCheckBackend:
    @pytest.mark.parametrize("backend", [None, "sequential", "threading", "loky"])
    def test_known_backends_are_kept(self, backend):
        assert check_backend(backend) == backend

    @pytest.mark.parametrize(
        ("word", "backend"),
        [("multiprocessing", "loky"), ("processes", "loky"), ("threads", "threading")],
    )
    def test_synonyms_of_backends_are_translated(self, word, backend):
        assert check_backend(word) == backend

    def test_a_backend_registered_under_one_of_our_synonyms_is_followed(self, monkeypatch):
        monkeypatch.setitem(joblib.parallel.BACKENDS, "threads", OtherBackend)
        with joblib.parallel_config(backend="threads"):
            found = read_facts()
        assert choose(None, None, found, lists=True).backend == "threads"

    def test_backends_registered_with_joblib_are_kept(self, monkeypatch):
        assert check_backend("dask") == "dask"  # joblib loads it when it is used
        monkeypatch.setitem(joblib.parallel.BACKENDS, "taskcarrier-test", OtherBackend)
        assert check_backend("taskcarrier-test") == "taskcarrier-test"

    @pytest.mark.parametrize(
        "backend", ["thread", "Threads", "Loky", "", "Dask", 1, b"loky", ["loky"]]
    )
    def test_unknown_backends_are_refused_with_the_known_ones(self, backend):
        with pytest.raises(ValueError, match="backend must be None or one of") as info:
            check_backend(backend)
        assert repr(backend) in str(info.value)
        assert all(repr(name) in str(info.value) for name in [*BACKENDS, "dask"])


class OtherBackend(ParallelBackendBase):
    supports_sharedmem = True

    def effective_n_jobs(self, n_jobs):
        return n_jobs

    def submit(self, func, callback=None):
        raise NotImplementedError

    def apply_async(self, func, callback=None):  # joblib before 1.5 asks for it
        raise AssertionError


class TestFactsNow:
    def test_without_a_configuration_nothing_special_is_found(self):
        found = read_facts()
        assert found == Facts(cores=joblib.cpu_count(), has_gil=found.has_gil)
        assert found.has_gil == getattr(sys, "_is_gil_enabled", lambda: True)()

    @pytest.mark.parametrize("prefer", [None, "threads", "processes"])
    @pytest.mark.parametrize(
        "backend", [None, "threading", "loky", "multiprocessing", "sequential"]
    )
    def test_the_active_configuration_equals_that_of_joblib(self, backend, prefer):
        for n_jobs in (None, 1, 3, -1, -2):
            wishes = {"backend": backend, "prefer": prefer, "n_jobs": n_jobs}
            with joblib.parallel_config(**{k: v for k, v in wishes.items() if v is not None}):
                found = read_facts()
                peer = joblib.Parallel()
            # What is only preferred is no wish, as in joblib, where a task can overrule it.
            assert found.active_backend == backend
            if backend is not None:
                assert backend in type(peer._backend).__name__.lower()
            # joblib's default is one worker, ours all cores.
            assert (1 if found.active_n_jobs is None else found.active_n_jobs) == peer.n_jobs
            assert found.is_nested_in_joblib is False

    @pytest.mark.parametrize("backend", [None, "threading", "loky"])
    def test_required_shared_memory_is_found(self, backend):
        wishes = {} if backend is None else {"backend": backend}
        with joblib.parallel_config(require="sharedmem", n_jobs=2, **wishes):
            found = read_facts()
            peer = joblib.Parallel()
        assert type(peer._backend).__name__ == "ThreadingBackend"
        assert found.active_backend == "threading"
        assert found.active_n_jobs == peer.n_jobs

    def test_a_default_of_joblib_is_no_wish(self, monkeypatch):
        """As on systems where joblib can make no semaphores, so that it has only threads."""
        for name in ("DEFAULT_BACKEND", "DEFAULT_PROCESS_BACKEND"):
            monkeypatch.setattr(joblib.parallel, name, "threading", raising=False)
        assert read_facts().active_backend is None
        with joblib.parallel_config(n_jobs=3):
            assert (read_facts().active_backend, read_facts().active_n_jobs) == (None, 3)
        with joblib.parallel_config(backend="threading"):
            assert read_facts().active_backend == "threading"
        with joblib.parallel_config(require="sharedmem"):
            assert read_facts().active_backend == "threading"

    def test_a_configuration_ends_with_its_block(self):
        with joblib.parallel_config(backend="threading", n_jobs=3):
            assert read_facts().active_backend == "threading"
        assert read_facts().active_backend is None
        assert read_facts().active_n_jobs is None

    def test_a_configuration_may_be_ignored(self):
        outside = read_facts()
        with joblib.parallel_config(backend="threading", n_jobs=3):
            assert read_facts(follows_joblib=False) == outside

    def test_the_innermost_configuration_counts(self):
        with (
            joblib.parallel_config(backend="loky", n_jobs=3),
            joblib.parallel_config(backend="threading"),
        ):
            assert read_facts().active_backend == "threading"
            assert read_facts().active_n_jobs == 3

    def test_registered_backends_have_their_name(self):
        register_parallel_backend("taskcarrier-test", OtherBackend)
        try:
            with joblib.parallel_config(backend="taskcarrier-test"):
                assert read_facts().active_backend == "taskcarrier-test"
        finally:
            del joblib.parallel.BACKENDS["taskcarrier-test"]

    def test_unregistered_backends_have_the_name_of_their_type(self):
        with joblib.parallel_config(backend=OtherBackend()):
            assert read_facts().active_backend == "OtherBackend"

    def test_a_task_of_joblib_is_recognised(self):
        with joblib.parallel_config(backend="threading"):
            inside = joblib.Parallel(n_jobs=2)(joblib.delayed(read_facts)() for _ in range(2))
        assert [found.is_nested_in_joblib for found in inside] == [True, True]
        assert choose(None, None, inside[0]).backend == "sequential"

    def test_a_worker_is_recognised(self, monkeypatch):
        monkeypatch.setattr(loop, "_in_worker_process", True)
        with joblib.parallel_config(backend="threading", n_jobs=2):
            assert read_facts() == Facts(cores=1, is_in_worker=True)

    def test_a_daemonic_process_is_recognised(self, monkeypatch):
        assert read_facts().is_daemonic is False
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
        assert read_facts().is_daemonic is True

    def test_a_missing_gil_is_recognised(self, monkeypatch):
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
        assert read_facts().has_gil is False

    def test_other_platforms_have_no_processes(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert read_facts().has_processes is False


JOBLIB = """
import sys
from taskcarrier.workers.choose import read_facts

if sys.argv[1] == "used":
    import joblib
if sys.argv[1] == "without cloudpickle":
    import importlib.util
    importlib.util.find_spec = lambda name: None
read_facts()
print("joblib" in sys.modules, "joblib.parallel" in sys.modules)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [("plain", "False False"), ("used", "True True"), ("without cloudpickle", "True True")],
)
def test_joblib_is_loaded_only_if_it_is_needed(program, expected, tmp_path):
    if program == "plain" and importlib.util.find_spec("cloudpickle") is None:
        expected = "True True"
    assert run_script(tmp_path, JOBLIB, program).strip() == expected


class TestCores:
    def test_cpu_affinity_counts_at_once(self):
        before = os.sched_getaffinity(0)
        cores = count_cores()
        os.sched_setaffinity(0, {min(before)})
        try:
            assert count_cores() == 1
        finally:
            os.sched_setaffinity(0, before)
        assert count_cores() == cores == joblib.cpu_count()

    def test_the_limit_of_joblib_counts_at_once(self, monkeypatch):
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
        assert count_cores() == 1
        monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
        assert count_cores() == joblib.cpu_count()


# Maps when the main thread has ended: in a thread, in a hook, and in a hook that comes after ours.
LATE = """
import atexit, os, sys, threading
_, backend, when, warm = sys.argv
if when == "late hook":
    atexit.register(lambda: late())
import numpy as np
from taskcarrier import DynamicParallelMapper, last_report, map_array

def twice(x):
    return 2 * x

def late():
    if when == "thread":
        threading.main_thread().join()
    for n in (2, 3):
        mapper = DynamicParallelMapper(n, backend=backend)
        expected = [*range(0, 12, 2)]
        found = map_array(twice, np.arange(6), n_jobs=n, backend=backend)
        assert found.tolist() == expected
        assert mapper.map(twice, range(6)) == expected
        assert list(mapper.imap(twice, range(6))) == expected
        print(last_report().backend)

if __name__ == "__main__":
    if warm == "warm":
        map_array(twice, np.arange(6), n_jobs=2, backend=backend)
    if when == "thread":
        threading.Thread(target=late).start()
    elif when == "hook":
        atexit.register(late)
"""


@pytest.mark.one_case
@pytest.mark.fault(47)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize(
    ("when", "warm"),
    [("thread", "cold"), ("thread", "warm"), ("hook", "cold"), ("late hook", "warm")],
)
def test_maps_run_after_the_end_of_the_main_thread(backend, when, warm, tmp_path):
    refused = (3, 12) <= sys.version_info < (3, 12, 2)  # Python itself: has_threads
    where = "sequential" if backend == "threading" and refused else backend
    assert run_script(tmp_path, LATE, backend, when, warm).split() == [where, where]


INTERRUPTED = """
import builtins, signal, sys, threading
import numpy as np
from taskcarrier import map_array

imported, whole = [], builtins.__import__

def interrupting(name, *rest):
    module = whole(name, *rest)
    if name.startswith(sys.argv[2]) and not imported:
        imported.append(threading.current_thread())
        signal.raise_signal(signal.SIGINT)  # which is handled in the main thread
    return module

builtins.__import__ = interrupting
try:
    map_array(abs, np.arange(3.0), n_jobs=2, backend=sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
assert imported != [threading.main_thread()]
print(map_array(np.sqrt, np.arange(3.0) ** 2, n_jobs=2, backend=sys.argv[1]))
"""


@pytest.mark.fault(44)
@pytest.mark.parametrize(("backend", "module"), [("threading", "asyncio"), ("loky", "cloudpickle")])
def test_an_interrupt_leaves_no_module_half_imported(backend, module, tmp_path):
    output = run_script(tmp_path, INTERRUPTED, backend, module)
    assert output.splitlines() == ["interrupted", "[0. 1. 2.]"]

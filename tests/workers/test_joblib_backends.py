"""Lists on backends that others have registered with joblib."""

import decimal
import operator
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import joblib
import numpy as np
import pytest
from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS, ParallelBackendBase, ThreadingBackend

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    SerialMapper,
    StaticParallelMapper,
    empty,
    fit_many,
    last_report,
    map_array,
    map_chunks,
    map_items,
    predict_array,
    reduce_array,
)
from taskcarrier.memory.staging import Staging
from taskcarrier.workers import joblib_backends
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executors import make_executor
from taskcarrier.workers.pickling import pickle_items
from taskcarrier.workers.serial import SerialExecutor
from tests.errors import FrozenError, HoldingError, Unreadable
from tests.strategies import run_script, same_bits


class Threads(ThreadingBackend):
    """A backend that shares memory with the caller."""

    n_calls = n_tasks = 0

    def start_call(self):
        type(self).n_calls += 1

    def batch_completed(self, batch_size, duration):
        type(self).n_tasks += batch_size
        super().batch_completed(batch_size, duration)


class Elsewhere(ParallelBackendBase):
    """Workers that get everything as bytes, as those on another machine do."""

    supports_retrieve_callback = True
    supports_sharedmem = False
    n_workers = 3
    n_calls = n_tasks = n_batches = 0

    def __init__(self, *, key=None, **others):
        super().__init__(**others)
        self.key = key

    def effective_n_jobs(self, n_jobs):
        return self.n_workers if n_jobs < 0 else min(n_jobs, self.n_workers)

    def configure(self, n_jobs=1, parallel=None, **others):
        self.parallel = parallel
        type(self).last_key = self.key
        self.executor = ThreadPoolExecutor(self.effective_n_jobs(n_jobs))
        return self.effective_n_jobs(n_jobs)

    def start_call(self):
        type(self).n_calls += 1

    def submit(self, func, callback=None):
        type(self).n_batches += 1
        type(self).n_tasks += len(func)
        future = self.executor.submit(remotely, pickle_items(func))
        future.add_done_callback(callback)
        return future

    apply_async = submit  # joblib before 1.5

    def retrieve_result_callback(self, out):
        return pickle.loads(out.result())

    def get_nested_backend(self):  # joblib's own would start threads in these threads
        return joblib.parallel.SequentialBackend(nesting_level=1), 1

    def abort_everything(self, ensure_ready=True):
        self.executor.shutdown(cancel_futures=True)

    def terminate(self):
        self.executor.shutdown()


def remotely(packed):
    return pickle.dumps(pickle.loads(packed)())


class AtTheEnd(Elsewhere):
    """A backend that cannot say when a result is there."""

    supports_retrieve_callback = False
    supports_return_generator = False
    supports_timeout = False

    def submit(self, func, callback=None):
        future = super().submit(func, callback)
        future.get = lambda: pickle.loads(future.result())
        return future

    apply_async = submit


KINDS = {"test-threads": Threads, "test-elsewhere": Elsewhere, "test-at-the-end": AtTheEnd}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    for name, kind in KINDS.items():
        kind.n_calls = kind.n_tasks = kind.n_batches = 0
        monkeypatch.setitem(BACKENDS, name, kind)


@pytest.fixture(params=sorted(KINDS))
def backend(request):
    return request.param


@pytest.mark.fault(40)
def test_writes_to_a_copied_array_are_noted(recwarn):
    array = empty(3)

    def put(i):
        array[i] = i

    StaticParallelMapper(n_jobs=2, backend="test-threads").map(put, range(3))
    assert array.tolist() == [0, 1, 2]
    assert not recwarn
    with pytest.warns(UserWarning, match="func carries 1 array made by empty") as caught:
        StaticParallelMapper(n_jobs=2, backend="test-elsewhere").map(put, range(3))
    assert caught[0].filename == __file__
    array.flags.writeable = False
    mapper = StaticParallelMapper(n_jobs=2, backend="test-elsewhere")
    assert mapper.map(lambda i: float(array[i]), range(3)) == [0, 1, 2]


@pytest.fixture(params=[StaticParallelMapper, DynamicParallelMapper])
def mapper(request, backend):
    return request.param(n_jobs=2, backend=backend, chunksize=3)


def test_a_map_equals_the_builtin_map(mapper, backend):
    n = 10
    for items in (range(20), [], [1], "abc", ({}, None)):
        assert mapper(lambda item: (item, n), items) == [(item, n) for item in items]
    assert mapper(pow, [2, 3, 4], [5, 2]) == [32, 9]
    assert KINDS[backend].n_calls >= 3


def test_the_report_names_backend_and_numbers(mapper, backend):
    mapper(operator.neg, range(20))
    report = mapper.report
    assert (report.backend, report.reason, report.balance) == (backend, "asked for", "dynamic")
    assert (report.items, report.ranges, report.chunksize, report.n_jobs) == (20, 7, 3, 2)
    assert KINDS[backend].n_calls == 1
    assert KINDS[backend].n_tasks == 7
    assert sum(worker.items for worker in report.workers) == 20
    assert sum(worker.ranges for worker in report.workers) == 7
    assert len({worker.name for worker in report.workers}) == len(report.workers) <= 2
    assert all(worker.name.startswith("thread ") for worker in report.workers)
    assert (report.bytes_copied > 0) == (backend != "test-threads")
    assert f"backend {backend} (asked for)" in str(report)


def test_the_backend_decides_the_number_of_workers():
    mapper = DynamicParallelMapper(backend="test-elsewhere")
    mapper(abs, range(10))
    assert mapper.report.n_jobs == 3
    DynamicParallelMapper(2, backend="test-elsewhere")(abs, range(10))
    assert last_report().n_jobs == 2
    DynamicParallelMapper(-2, backend="test-threads")(abs, range(10))
    assert last_report().n_jobs == max(1, joblib.cpu_count() - 1)


@pytest.mark.parametrize("found", [0, 1])
def test_a_backend_with_one_or_no_worker_is_not_used(found, monkeypatch):
    monkeypatch.setattr(Elsewhere, "n_workers", found)
    choice = Choice("test-elsewhere", -1, "asked for")
    if found:
        executor = make_executor(choice, "test-elsewhere", Staging, None)
        assert isinstance(executor, SerialExecutor)
        assert executor.choice == Choice("sequential", 1, "backend 'test-elsewhere' has one worker")
    else:
        with pytest.raises(RuntimeError, match="'test-elsewhere' has no worker"):
            make_executor(choice, "test-elsewhere", Staging, None)


def test_an_active_configuration_is_followed_with_all_its_options(backend):
    options = {} if backend == "test-threads" else {"key": "value"}
    with joblib.parallel_config(backend=backend, n_jobs=2, **options):
        mapper = DynamicParallelMapper(n_jobs=None)
        assert mapper(abs, [-1, 2]) == [1, 2]
        assert mapper.report.backend == backend
        assert mapper.report.reason == "joblib's active configuration"
        assert mapper.report.n_jobs == 2
        if options:
            assert KINDS[backend].last_key == "value"
            DynamicParallelMapper(backend=backend)(abs, [-1, 2])
            assert KINDS[backend].last_key is None  # as of joblib's Parallel
        DynamicParallelMapper(n_jobs=2, backend="threading")(abs, [-1, 2])
        assert last_report().backend == "threading"


def test_a_backend_without_a_name_is_followed():
    class Nameless(Threads):
        pass

    with joblib.parallel_config(backend=Nameless(), n_jobs=2):
        assert DynamicParallelMapper()(abs, [-1, 2]) == [1, 2]
    assert (last_report().backend, Nameless.n_calls) == ("Nameless", 1)


def test_a_backend_that_joblib_loads_on_use_is_followed(monkeypatch):
    def load():
        monkeypatch.setitem(BACKENDS, "test-later", Threads)

    monkeypatch.setitem(EXTERNAL_BACKENDS, "test-later", load)
    mapper = DynamicParallelMapper(2, backend="test-later")
    assert "test-later" not in BACKENDS
    assert mapper(abs, [-1, 2]) == [1, 2]
    assert mapper.report.backend == "test-later"


def test_a_backend_that_joblib_cannot_load_is_an_error(monkeypatch):
    def load():
        raise ImportError("install it")

    monkeypatch.setitem(EXTERNAL_BACKENDS, "test-missing", load)
    with pytest.raises(ImportError, match="install it"):
        DynamicParallelMapper(2, backend="test-missing")(abs, [-1, 2])


# The same as on our own workers


def test_random_numbers_and_shared_arrays_are_the_same_as_on_our_workers(mapper):
    table = np.random.default_rng(0).normal(size=(3000, 4)).T  # 96 kB, in order F
    shared = {"table": table, "small": np.arange(3), "words": ("a", "b")}

    def func(i, rng, table, small, words):
        assert not table.flags.writeable
        assert not small.flags.writeable
        return rng.normal(), table[i % 4].sum(), words[small[i % 2]]

    expected = SerialMapper().map(func, range(50), rng=7, shared=shared)
    assert mapper.map(func, range(50), rng=7, shared=shared) == expected
    assert mapper.map(func, range(50), rng=7, shared=shared, chunksize=50) == expected


def test_large_arrays_are_sent_once_and_closures_are_private():
    large, mine = np.zeros(100_000), np.zeros(4)

    def func(i, large):
        mine[:] = i
        return mine.sum() + large[i]

    mapper = DynamicParallelMapper(2, backend="test-elsewhere", chunksize=1)
    assert mapper.map(func, range(30), shared={"large": large}) == [4.0 * i for i in range(30)]
    assert large.nbytes < mapper.report.bytes_copied < 1.1 * large.nbytes
    assert not mine.any()


def test_large_items_and_results_are_sent(mapper):
    items = [np.full(30_000, number) for number in range(8)]
    for number, doubled in enumerate(mapper(lambda item: item * 2, items)):
        assert same_bits(doubled, np.full(30_000, 2 * number))


def fails_at_7_and_30(i):
    if i in {7, 30}:
        raise KeyError("no", i)
    return i


@pytest.mark.fault(1, 2)
def test_the_lowest_item_that_fails_is_raised_and_named(mapper):
    for _ in range(5):
        with pytest.raises(KeyError) as caught:
            mapper(fails_at_7_and_30, range(40))
        assert caught.value.args == ("no", 7)
        assert "func failed on item 7" in caught.value.__notes__
        assert any(note.startswith("while mapping items 6:9 (") for note in caught.value.__notes__)
    assert mapper(abs, [-1, 2]) == [1, 2]


def test_no_task_is_made_after_an_error():
    def func(i):
        time.sleep(0.02)  # joblib looks for results every 10 ms, and may be kept from it
        return fails_at_7_and_30(i)

    mapper = DynamicParallelMapper(2, backend="test-elsewhere", chunksize=1)
    with pytest.raises(KeyError):
        mapper(func, range(1000))
    assert 7 <= sum(worker.items for worker in mapper.report.workers) < 1000
    assert Elsewhere.n_tasks < 1000


def test_errors_are_collected(mapper):
    results, failures = mapper.map(fails_at_7_and_30, range(40), on_error="collect")
    assert [(one.start, one.stop, one.error.args) for one in failures] == [
        (7, 8, ("no", 7)),
        (30, 31, ("no", 30)),
    ]
    assert results == [None if i in {7, 30} else i for i in range(40)]


seen = []


def passes(i):
    seen.append(i)
    if seen.count(i) < 3:
        raise ConnectionError(i)
    return i


@pytest.mark.fault(15)
def test_exceptions_in_retry_on_are_tried_again(mapper):
    seen.clear()
    assert mapper.map(passes, range(8), retry_on=ConnectionError) == list(range(8))
    seen.clear()
    with pytest.raises(ConnectionError) as caught:
        mapper.map(passes, range(8), retry_on=ConnectionError, retries=1)
    assert "func was called 2 times" in caught.value.__notes__


@pytest.mark.fault(3, 8, 9)
@pytest.mark.parametrize("backend", ["test-elsewhere"])
def test_an_item_that_cannot_be_pickled_is_named(mapper):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="lock") as caught:
        mapper(str, [1, 2, 3, 4, lock])
    assert any("items 3:5" in note for note in caught.value.__notes__)
    assert any("pickle these items" in note for note in caught.value.__notes__)
    for func, shared in ((lambda i: lock, {}), (lambda i, lock: i, {"lock": lock})):
        with pytest.raises(TypeError, match="lock") as caught:
            mapper.map(func, range(4), shared=shared)
        assert any("pickle the function" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="lock") as caught:
        mapper(lambda i: threading.Lock() if i == 5 else i, range(9))
    assert any("items 3:6" in note for note in caught.value.__notes__)
    assert any("pickle the result" in note for note in caught.value.__notes__)

    def held(i):
        raise HoldingError("held")

    with pytest.raises(taskcarrier.TaskError, match="HoldingError: held"):
        mapper(held, range(4))


@pytest.mark.fault(45)
def test_errors_that_refuse_attributes_arrive_unchanged(mapper):
    def func(i):
        raise FrozenError(i, text="x") from KeyError("why")

    with pytest.raises(FrozenError) as caught:
        mapper(func, range(4))
    assert caught.value == FrozenError(0, text="x")
    assert type(caught.value.__cause__) is KeyError
    assert any("item 0" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("backend", ["test-elsewhere"])
def test_a_value_that_cannot_be_unpickled_raises_its_own_error(mapper):
    bad = Unreadable(ArithmeticError, "broken on purpose")
    for func, items, where in (
        (
            lambda i: Unreadable(ArithmeticError, "broken on purpose") if i == 5 else i,
            range(9),
            "unpickle this result",
        ),
        (str, [0, 1, 2, 3, bad], "unpickled these items"),
        (lambda i: bad, range(9), "unpickled the function"),
    ):
        with pytest.raises(ArithmeticError, match="broken on purpose") as caught:
            mapper(func, items)
        assert any(where in note for note in caught.value.__notes__)
        assert any(note.startswith("while mapping items ") for note in caught.value.__notes__)


@pytest.mark.fault(4)
def test_an_exit_in_a_worker_is_raised(mapper):
    def leave(i):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        mapper(leave, range(4))


def test_maps_inside_a_backend_of_joblib_are_serial(mapper):
    def inside(i):
        other = StaticParallelMapper(n_jobs=2, backend="test-elsewhere")
        assert other(abs, [-i]) == [i]
        return other.report.reason, taskcarrier.workers.loop.is_in_worker()

    assert mapper(inside, range(4)) == [("called inside a worker", True)] * 4
    assert not taskcarrier.workers.loop.is_in_worker()


def test_floating_point_errors_are_handled_as_in_the_caller(mapper):
    with np.errstate(divide="ignore"):
        assert mapper(lambda x: float(1 / x), [np.float64(0)] * 4) == [np.inf] * 4
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        mapper(lambda x: float(1 / x), [np.float64(0)] * 4)


def test_decimals_and_error_handlers_are_those_of_the_caller(mapper):
    def third(_):
        return str(Decimal(1) / 3), decimal.getcontext().flags[decimal.Inexact]

    with decimal.localcontext() as context:
        context.prec = 4
        context.clear_flags()
        assert {text for text, _ in mapper(third, range(4))} == {"0.3333"}
        assert not context.flags[decimal.Inexact]
    assert {text for text, _ in mapper(third, range(4))} == {third(0)[0]}

    class HandlerError(Exception):
        pass

    def handler(kind, flag):
        raise HandlerError(kind)

    before = np.seterrcall(handler)
    try:
        with np.errstate(divide="call"), pytest.raises(HandlerError, match="divide by zero"):
            mapper(lambda x: float(1 / x), [np.float64(0)] * 4)
    finally:
        np.seterrcall(before)


def test_a_bar_counts_items(backend, capsys):
    DynamicParallelMapper(2, 1, backend=backend)(abs, range(33))
    assert "33/33" in capsys.readouterr().err


class Broken(Elsewhere):
    def submit(self, func, callback=None):
        raise OSError("the cluster is gone")

    apply_async = submit


def test_an_error_of_the_backend_is_raised_unchanged(monkeypatch):
    monkeypatch.setitem(BACKENDS, "test-broken", Broken)
    with pytest.raises(OSError, match="the cluster is gone"):
        DynamicParallelMapper(2, backend="test-broken")(abs, range(9))


def test_an_interrupt_of_the_caller_ends_the_call(mapper, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(joblib_backends, "_deliver_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mapper(abs, range(1000))


# What cannot be had there


def test_a_timeout_is_refused_before_anything_runs(mapper, backend):
    called = []
    with pytest.raises(ValueError, match=f"timeout= cannot be kept on backend='{backend}'"):
        mapper.map(called.append, range(9), timeout=1)
    assert called == []
    assert KINDS[backend].n_calls == 0
    assert DynamicParallelMapper(1, backend=backend).map(abs, [-1], timeout=60) == [1]


@pytest.mark.parametrize("n_items", [0, 8])
def test_maps_over_arrays_are_refused(backend, n_items):
    X, message = (
        np.arange(float(n_items)),
        f"backend='{backend}', which maps over arrays cannot use",
    )

    class Estimator:
        predict = staticmethod(np.sqrt)

    mapper = DynamicParallelMapper(2, backend=backend)
    for verb in (map_array, map_items, map_chunks):
        with pytest.raises(ValueError, match=message):
            verb(np.sqrt, X, backend=backend)
        with pytest.raises(ValueError, match=message):
            getattr(mapper, verb.__name__)(np.sqrt, X)
    if n_items:
        with pytest.raises(ValueError, match=message):
            reduce_array(np.sum, X, combine=operator.add, backend=backend)
    with pytest.raises(ValueError, match=message):
        predict_array(Estimator(), X, backend=backend)


# Fit loops, whose fits are a list


class Mean:
    def __init__(self, shift=0):
        self.shift = shift

    def fit(self, X, y, sample_weight=None):
        self.mean_ = float(np.average(y, weights=sample_weight)) + self.shift
        return self


def test_fit_loops_run_on_backends_of_joblib(backend):
    X, y = np.zeros((5000, 2)), np.random.default_rng(3).normal(size=5000)

    def bootstrap(rng):
        return rng.integers(5000, size=5000)

    def means(**options):
        fitted = fit_many([Mean(i) for i in range(6)], X, y, rows=bootstrap, rng=0, **options)
        return [one.mean_ for one in fitted]

    expected = means(n_jobs=1)
    assert means(n_jobs=2, backend=backend) == expected
    assert (last_report().backend, last_report().items) == (backend, 6)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert means() == expected
    assert last_report().reason == "joblib's active configuration"


# Real processes


SCRIPT = """
import decimal
import os
import joblib
import numpy as np
from joblib.parallel import LokyBackend, register_parallel_backend
from taskcarrier import DynamicParallelMapper, SerialMapper

class Kin(LokyBackend):
    pass

class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return type(other) is Point and other.x == self.x

def moved(point, rng, table):
    assert not table.flags.writeable
    return Point(point.x + rng.normal() + table[::-1].sum())

if __name__ == "__main__":
    register_parallel_backend("kin", Kin)
    mapper = DynamicParallelMapper(2, backend="kin", chunksize=2)
    options = {"rng": 5, "shared": {"table": np.arange(400_000.0)}}
    points = [Point(i) for i in range(20)]
    assert mapper.map(moved, points, **options) == SerialMapper().map(moved, points, **options)
    assert mapper.report.backend == "kin", mapper.report
    pids = set(mapper(lambda _: os.getpid(), range(20)))
    assert os.getpid() not in pids
    assert {worker.name for worker in mapper.report.workers} == {f"process {p}" for p in pids}
    try:
        mapper(lambda i: 1 / (i - 5), range(20))
    except ZeroDivisionError as error:
        assert "func failed on item 5" in error.__notes__
    else:
        raise SystemExit("not raised")
    try:
        mapper(lambda i: os._exit(1) if i == 5 else i, range(20))
    except Exception as error:
        print(type(error).__name__)
"""


def test_backends_of_real_processes_work(tmp_path):
    assert run_script(tmp_path, SCRIPT) == "TerminatedWorkerError\n"

"""An exception of a signal handler ends the call, at whatever moment it comes."""

import functools
import gc
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import taskcarrier
import taskcarrier.run as run_module
from taskcarrier import StaticParallelMapper, map_array, map_chunks, map_items
from taskcarrier.system import interrupts
from taskcarrier.system.interrupts import Holder, Holders, is_raised_by_handler, run_sheltered
from taskcarrier.workers import thread_limits
from tests.clocks import LONG, wait_until
from tests.interrupted import interrupted_at
from tests.strategies import BACKENDS, ROOT, keep_pools_warm, warm_pools

pools = keep_pools_warm(2)


class TimeIsUpError(Exception):
    """What a usual time limit raises."""


class Limit:
    """Handlers of all kinds that raise it."""

    def method(self, number, frame):
        self.helper()

    def helper(self):
        raise TimeIsUpError

    def __call__(self, number, frame):
        raise TimeIsUpError


def function(number, frame):
    raise TimeIsUpError


HANDLERS = {
    "function": function,
    "method": Limit().method,
    "object": Limit(),
    "partial": functools.partial(function),
    "lambda": lambda *_: Limit().helper(),
}


@contextmanager
def time_limit(handler=function, seconds=0.3):
    """Raise in the main thread after some seconds; a block that is left too late has hung."""
    before = signal.signal(signal.SIGUSR1, handler)
    began = time.monotonic()
    main = threading.main_thread().ident
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(TimeIsUpError):
            yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < LONG / 4


def endless():
    yield from range(5)
    time.sleep(LONG)


class Slow:
    """An object that is slow to pickle, or to unpickle in the caller."""

    def __init__(self, here="", there=""):
        self.moments = here, there

    def __reduce__(self):
        if self.moments[0] == "pickled":
            time.sleep(LONG)
        return made_slowly, self.moments


def made_slowly(here, there):
    if there == "unpickled" and threading.current_thread() is threading.main_thread():
        from taskcarrier.workers import loop

        if not loop.is_worker_process():
            time.sleep(LONG)
    return Slow(here, there)


def waits(_):
    time.sleep(LONG)


def comes_slowly(_):
    return Slow("", "unpickled")


@pytest.mark.fault(39)
class TestStreams:
    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_interrupt_while_the_input_is_read_ends_a_stream(self, backend, ordered):
        mapper = StaticParallelMapper(2, backend=backend)
        came = []
        with time_limit():
            came.extend(mapper.imap(abs, endless(), ordered=ordered))
        assert set(came) <= set(range(5))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    @pytest.mark.parametrize("handler", HANDLERS)
    def test_every_kind_of_handler_ends_a_stream(self, handler):
        with time_limit(HANDLERS[handler]):
            list(StaticParallelMapper(2, backend="threading").imap(abs, endless()))

    @pytest.mark.parametrize("backend", ["sequential", "loky"])
    def test_an_interrupt_while_a_result_is_waited_for_ends_a_stream(self, backend):
        mapper = StaticParallelMapper(2, backend=backend)
        with time_limit():
            list(mapper.imap(waits, range(3)))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_an_interrupt_while_items_are_pickled_ends_a_stream(self):
        mapper = StaticParallelMapper(2, backend="loky", chunksize=4)
        with time_limit():
            list(mapper.imap(type, [1, 2, Slow("pickled"), 4]))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_an_interrupt_while_results_are_unpickled_ends_a_stream(self):
        mapper = StaticParallelMapper(2, backend="loky")
        with time_limit():
            list(mapper.imap(comes_slowly, range(3)))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_an_interrupt_ends_a_stream_whose_threads_are_still_at_work(self):
        go_on = threading.Event()
        mapper = StaticParallelMapper(2, backend="threading")
        with time_limit():
            list(mapper.imap(lambda _: go_on.wait(LONG), range(3)))
        go_on.set()
        assert list(mapper.imap(abs, range(5))) == list(range(5))


@pytest.mark.fault(39)
class TestMaps:
    def test_an_interrupt_is_no_error_to_collect(self):
        mapper = StaticParallelMapper(1)
        with time_limit():
            mapper.map(waits, range(3), on_error="collect")
        with time_limit():
            map_items(waits, np.zeros(3), on_error="collect", n_jobs=1)
        with time_limit():
            map_array(waits, np.zeros(3), on_error="fill", n_jobs=1)

    def test_an_interrupt_is_not_tried_again(self):
        options = {"retry_on": Exception, "retries": 5}
        with time_limit():
            StaticParallelMapper(1).map(waits, range(3), **options)
        with time_limit():
            map_chunks(waits, np.zeros(3), n_jobs=1, **options)

    def test_an_interrupt_while_items_are_pickled_ends_a_map(self):
        with time_limit():
            StaticParallelMapper(2, backend="loky").map(type, [1, Slow("pickled")])

    def test_an_interrupt_while_results_are_unpickled_ends_a_map(self):
        mapper = StaticParallelMapper(2, backend="loky")
        with time_limit():
            mapper.map(comes_slowly, range(3))
        assert mapper.map(abs, range(5)) == list(range(5))


def test_a_time_limit_inside_the_function_is_an_error_of_the_function():
    def func(x):
        with own_limit():
            time.sleep(LONG if x == 1 else 0)
        return x

    result, failed = map_items(func, np.arange(3.0), on_error="collect", n_jobs=1)
    assert [(one.start, type(one.error)) for one in failed] == [(1, TimeIsUpError)]
    assert np.array_equal(result, [0, np.nan, 2], equal_nan=True)
    mapper = StaticParallelMapper(1)
    with pytest.raises(TimeIsUpError) as caught:
        list(mapper.imap(func, range(3)))
    assert caught.value.__notes__ == ["while mapping item 1"]


@pytest.mark.fault(39)
@pytest.mark.parametrize("backend", ["sequential", "loky"])
def test_a_time_limit_inside_the_function_may_leave_its_handler(backend):
    def func(x):
        signal.signal(signal.SIGALRM, function)
        signal.setitimer(signal.ITIMER_REAL, 0.1 if x == 1 else 0)
        try:
            time.sleep(LONG if x == 1 else 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return x

    before = signal.getsignal(signal.SIGALRM)
    mapper = StaticParallelMapper(2, backend=backend)
    runs = {
        "map": lambda: mapper.map(func, range(3), on_error="collect"),
        "array": lambda: map_items(
            func, np.arange(3.0), on_error="collect", n_jobs=2, backend=backend
        ),
    }
    for run in runs.values():
        try:
            _, failed = run()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert [(one.start, type(one.error)) for one in failed] == [(1, TimeIsUpError)]
    results = mapper.imap(func, range(3), retry_on=TimeIsUpError, retries=1)
    assert next(results) == 0
    signal.signal(signal.SIGALRM, before)
    with pytest.raises(TimeIsUpError) as caught:
        next(results)
    signal.signal(signal.SIGALRM, before)
    assert caught.value.__notes__ == ["func was called 2 times", "while mapping item 1"]


@contextmanager
def own_limit():
    before = signal.signal(signal.SIGALRM, function)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_errors_without_a_signal_handler_are_not_taken_for_interrupts():
    error = None
    try:
        function(0, None)
    except TimeIsUpError as caught:
        error = caught
    assert not is_raised_by_handler(error)
    before = signal.signal(signal.SIGUSR1, function)
    try:
        assert is_raised_by_handler(error)
        found = []
        other = threading.Thread(target=lambda: found.append(is_raised_by_handler(error)))
        other.start()
        other.join()
        assert found == [False]
    finally:
        signal.signal(signal.SIGUSR1, before)


def in_lists(mapper):
    assert mapper.map(abs, range(-5, 0)) == [5, 4, 3, 2, 1]


def in_arrays(mapper):
    assert np.array_equal(mapper.map_array(np.negative, np.arange(12.0)), -np.arange(12.0))


def in_chunks(mapper):
    large = mapper.map_chunks(lambda chunk: np.full(3000, chunk[0]), np.arange(3.0), chunksize=1)
    assert [row[-1] for row in large] == [0, 1, 2]


def in_streams(mapper):
    assert list(mapper.imap(abs, range(-5, 0))) == [5, 4, 3, 2, 1]


def in_streams_that_are_left(mapper):
    assert next(mapper.imap(abs, range(-500, 0))) == 500


def within(mapper):
    with mapper:
        in_lists(mapper)
        in_arrays(mapper)


@pytest.mark.thorough
@pytest.mark.fault(44)
@pytest.mark.parametrize("seed", [4, 5])  # threads, processes
def test_exceptions_at_random_moments_leave_nothing_behind(seed):
    command = [sys.executable, "-m", "tests.stress", "--one", "exceptions", "--seed", str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["interrupted calls"] >= 200


class TestRunSheltered:
    def test_run_sheltered_returns_and_raises(self):
        assert run_sheltered(lambda: threading.current_thread().name) == "taskcarrier-sheltered"
        with pytest.raises(ZeroDivisionError):
            run_sheltered(lambda: 1 / 0)

    def test_sheltered_work_is_done_to_the_end_if_the_caller_is_interrupted_at_any_step(
        self, monkeypatch
    ):
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # in finalizers they are lost
        step, done, begun = 0, [], []

        def what():
            begun.append(True)
            time.sleep(0.001)
            done.append(True)

        while interrupted_at(step, lambda: run_sheltered(what)):
            step += 1
        wait_until(lambda: len(done) >= len(begun))
        assert step > 5
        assert run_sheltered(lambda: 7) == 7

    def test_sheltered_work_is_begun_again_if_its_starter_is_interrupted(self, monkeypatch):
        # A new thread is taken for the one that starts it, for a moment.
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
        start, hit = interrupts._start, []

        def is_hit_once(*args):
            if not hit:
                hit.append(True)
                raise KeyboardInterrupt
            start(*args)

        monkeypatch.setattr(interrupts, "_start", is_hit_once)
        assert run_sheltered(lambda: 7) == 7
        assert hit

    def test_sheltered_work_is_done_by_the_caller_if_no_thread_can_start(self, monkeypatch):
        def refuse(*_):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(interrupts, "start_new_thread", refuse)
        assert run_sheltered(threading.current_thread) is threading.current_thread()


def test_holders_that_are_gone_do_not_count():
    holders, one, other = Holders(), Holder(), Holder()
    assert not holders
    holders.add(one)
    holders.add(other)
    holders.discard(one)
    assert holders
    del other
    assert not holders


@pytest.mark.fault(44)
def test_a_limit_that_was_not_lifted_is_lifted_after_the_next_run(monkeypatch):
    class Library:
        user_api, threads = "blas", 4

        def get_num_threads(self):
            return self.threads

        def set_num_threads(self, n):
            self.threads = n

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # in finalizers they are lost
    library, guard = Library(), thread_limits._CountedLimit()
    monkeypatch.setattr(guard, "find_libraries", lambda: SimpleNamespace(lib_controllers=[library]))

    def run():
        with guard.open():
            assert library.threads == 1

    step = 0
    while interrupted_at(step, run):
        step += 1
        run()
        assert library.threads == 4
    assert step > 10


CALLS = [in_lists, in_arrays, in_chunks, in_streams, in_streams_that_are_left, within]


def n_threads_and_descriptors():
    return [len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd")]


def interrupt_at_every(stride, call, mapper):
    """Interrupt a call at these steps, and check that nothing is left behind."""
    call(mapper)
    before = n_threads_and_descriptors()
    step = 0
    while interrupted_at(step, lambda: call(mapper)):
        step += stride
    assert step > 5 * stride
    for _ in range(2):
        call(mapper)
    gc.collect()
    call(mapper)
    deadline = time.monotonic() + LONG  # threads may need a moment to end
    while any(map(int.__gt__, now := n_threads_and_descriptors(), (before[0] + 2, before[1] + 16))):
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.01)
    in_lists(mapper)


@pytest.mark.one_case
@pytest.mark.fault(44)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_at_any_step_of_a_call_leaves_nothing_behind(backend, call, monkeypatch):
    # What comes in a finalizer is lost; pytest would keep it, and all that it refers to.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    mapper = StaticParallelMapper(2, backend=backend)
    # As slow as they are.
    interrupt_at_every({"sequential": 7, "threading": 3, "loky": 101}[backend], call, mapper)
    assert mapper.report.backend == backend  # and not taken for a worker, where maps are serial
    taskcarrier.shutdown()
    warm_pools(2)


@pytest.mark.one_case
@pytest.mark.fault(44)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_nor_does_one_where_the_caller_begins_and_hands_over(
    backend, call, monkeypatch, hand_over_after
):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # as above
    monkeypatch.setattr(run_module, "releases_gil", lambda func: backend == "threading")
    hand_over_after(1)
    mapper = StaticParallelMapper(2)
    interrupt_at_every({"threading": 7, "loky": 41}[backend], call, mapper)
    assert mapper.report.backend == backend
    taskcarrier.shutdown()
    warm_pools(2)

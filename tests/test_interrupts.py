"""An exception of a signal handler ends the call, whatever it comes in between."""

import functools
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from taskcarrier import StaticParallelMapper, map_array, map_chunks, map_items
from taskcarrier.interrupts import is_of_the_program
from tests.strategies import BACKENDS, kept_crews

crews = kept_crews(2)

LONG = 30  # seconds that no test waits for


class TimeIsUpError(Exception):
    """What a usual time limit raises."""


class Limit:
    """Handlers of all sorts that raise it."""

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
    """Raises in the main thread, after so many seconds; a block that is left too late has hung."""
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
    assert time.monotonic() - began < LONG / 2


def endless():
    yield from range(5)
    time.sleep(LONG)


class Slow:
    """Takes its time to be pickled, or to be unpickled in the caller."""

    def __init__(self, here="", there=""):
        self.moments = here, there

    def __reduce__(self):
        if self.moments[0] == "pickled":
            time.sleep(LONG)
        return made_slowly, self.moments


def made_slowly(here, there):
    if there == "unpickled" and threading.current_thread() is threading.main_thread():
        from taskcarrier.backends import work

        if not work.in_worker_process():
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
    def test_while_the_input_is_read(self, backend, ordered):
        mapper = StaticParallelMapper(2, backend=backend)
        came = []
        with time_limit():
            came.extend(mapper.imap(abs, endless(), ordered=ordered))
        assert set(came) <= set(range(5))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    @pytest.mark.parametrize("handler", HANDLERS)
    def test_by_every_sort_of_handler(self, handler):
        with time_limit(HANDLERS[handler]):
            list(StaticParallelMapper(2, backend="threading").imap(abs, endless()))

    @pytest.mark.parametrize("backend", ["sequential", "loky"])
    def test_while_a_result_is_waited_for(self, backend):
        mapper = StaticParallelMapper(2, backend=backend)
        with time_limit():
            list(mapper.imap(waits, range(3)))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_while_items_are_pickled(self):
        mapper = StaticParallelMapper(2, backend="loky", chunksize=4)
        with time_limit():
            list(mapper.imap(type, [1, 2, Slow("pickled"), 4]))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_while_results_are_unpickled(self):
        mapper = StaticParallelMapper(2, backend="loky")
        with time_limit():
            list(mapper.imap(comes_slowly, range(3)))
        assert list(mapper.imap(abs, range(5))) == list(range(5))

    def test_of_threads_that_run_on(self):
        go_on = threading.Event()
        mapper = StaticParallelMapper(2, backend="threading")
        with time_limit():
            list(mapper.imap(lambda _: go_on.wait(LONG), range(3)))
        go_on.set()
        assert list(mapper.imap(abs, range(5))) == list(range(5))


@pytest.mark.fault(39)
class TestMaps:
    def test_it_is_no_error_to_collect(self):
        mapper = StaticParallelMapper(1)
        with time_limit():
            mapper.map(waits, range(3), on_error="collect")
        with time_limit():
            map_items(waits, np.zeros(3), on_error="collect", n_jobs=1)
        with time_limit():
            map_array(waits, np.zeros(3), on_error="fill", n_jobs=1)

    def test_it_is_no_reason_to_try_again(self):
        options = {"retry_on": Exception, "retries": 5}
        with time_limit():
            StaticParallelMapper(1).map(waits, range(3), **options)
        with time_limit():
            map_chunks(waits, np.zeros(3), n_jobs=1, **options)

    def test_while_items_are_pickled(self):
        with time_limit():
            StaticParallelMapper(2, backend="loky").map(type, [1, Slow("pickled")])

    def test_while_results_are_unpickled(self):
        mapper = StaticParallelMapper(2, backend="loky")
        with time_limit():
            mapper.map(comes_slowly, range(3))
        assert mapper.map(abs, range(5)) == list(range(5))


def test_a_time_limit_of_the_function_itself_is_its_own_error():
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


@contextmanager
def own_limit():
    before = signal.signal(signal.SIGALRM, function)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_errors_are_not_the_programs():
    error = None
    try:
        function(0, None)
    except TimeIsUpError as caught:
        error = caught
    assert not is_of_the_program(error)
    before = signal.signal(signal.SIGUSR1, function)
    try:
        assert is_of_the_program(error)
        found = []
        other = threading.Thread(target=lambda: found.append(is_of_the_program(error)))
        other.start()
        other.join()
        assert found == [False]
    finally:
        signal.signal(signal.SIGUSR1, before)

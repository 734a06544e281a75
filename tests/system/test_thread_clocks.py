"""How long a thread was on a core, and how long it waited for one."""

import gc
import signal
import threading
import time

import pytest

from taskcarrier.system.thread_clocks import ThreadClock, ThreadTimes
from tests.clocks import LONG
from tests.descriptors import n_descriptors


def work(seconds):
    begin = time.thread_time()
    while time.thread_time() - begin < seconds:
        pass


def test_it_reads_the_clocks_of_this_thread():
    clock = ThreadClock(threading.current_thread())
    before, on_core = clock.read(), time.thread_time()
    work(0.02)
    after = clock.read()
    assert after.on_core - before.on_core >= 0.02
    assert after.on_core - on_core <= time.thread_time() - on_core
    assert after.time - before.time >= 0.02
    assert after.queued >= before.queued >= 0


def test_it_reads_the_clocks_of_another_thread():
    begun, go_on = threading.Event(), threading.Event()

    def run():
        work(0.02)
        begun.set()
        assert go_on.wait(LONG)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(LONG)
    clock = ThreadClock(thread)
    before = clock.read()
    work(0.02)
    after = clock.read()
    go_on.set()
    thread.join()
    assert before.on_core >= 0.02
    assert after.on_core - before.on_core < 0.02  # it has slept


@pytest.mark.parametrize("text", [None, "", "12 34"])
def test_a_kernel_that_does_not_tell_leaves_zeros(tmp_path, text):
    clock = ThreadClock(threading.current_thread())
    path = tmp_path / "schedstat"
    clock._path = bytes(path)
    if text is not None:
        path.write_text(text)
    assert clock.read().queued == (34e-9 if text == "12 34" else 0)


def test_reading_leaves_no_descriptor():
    clock = ThreadClock(threading.current_thread())
    clock.read()
    before = n_descriptors()
    for _ in range(10):
        clock.read()
    assert n_descriptors() == before


@pytest.mark.fault(44)
def test_an_exception_from_outside_leaves_no_descriptor():
    class Stop(BaseException):
        """The exception from outside."""

    def stop(*_):
        raise Stop

    def read_until_stopped(seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while True:
            for _ in range(50):
                clock.read()
            # If another thread has got the signal, this one sees it when it takes the GIL again.
            time.sleep(0)

    clock = ThreadClock(threading.current_thread())
    clock.read()
    before = n_descriptors()
    handler = signal.signal(signal.SIGALRM, stop)
    gc.disable()  # an exception in what it calls is lost
    try:
        for step in range(100):
            with pytest.raises(Stop):
                read_until_stopped(1e-4 + step * 1e-6)
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, handler)
    assert n_descriptors() == before


def test_shares_are_of_the_time_between_two_readings():
    before = ThreadTimes(1.0, 5.0, 0.5)
    assert ThreadTimes(3.0, 6.0, 0.5).shares_since(before) == (0.5, 0.0)
    assert ThreadTimes(3.0, 6.0, 1.5).shares_since(before) == (1.0, 0.5)
    share, queued = before.shares_since(before)
    assert (share, queued) == (0.0, 0.0)

"""Threads that look after the chunk that the caller is in."""

import os
import threading
import weakref

import pytest

from taskcarrier.workers import watcher as module
from taskcarrier.workers.watcher import Watcher, end_watchers
from tests.clocks import LONG, wait_until


@pytest.fixture(autouse=True)
def none_are_free():
    end_watchers()
    yield
    end_watchers()


class Looks:
    """A function that is looked after; it gives these answers, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.threads = []
        self.come = threading.Semaphore(0)

    def __call__(self):
        self.threads.append(threading.current_thread())
        answer = self.answers.pop(0)
        self.come.release()
        return answer

    def wait(self):
        assert self.come.acquire(timeout=LONG)


def test_it_calls_when_it_is_due_and_again_as_it_is_told():
    looks = Looks(0.0, 0.001, None)
    with Watcher.take() as watcher:
        watcher.watch(looks, 0.001)
        for _ in range(3):
            looks.wait()
    (thread,) = set(looks.threads)
    assert thread is not threading.current_thread()
    assert thread.name == "taskcarrier-watcher"


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_each_call_is_looked_after_by_the_same_thread(seconds):
    threads = set()
    for _ in range(100):
        looks = Looks(None)
        with Watcher.take() as watcher:
            watcher.watch(looks, seconds)
            looks.wait()
        threads.update(looks.threads)
        wait_until(lambda: module._free or threads)
    assert len(threads) <= 3  # one that was just looking is not used again


def test_what_is_due_later_does_not_hold_up_the_next_call():
    with Watcher.take() as watcher:
        slow = Looks(LONG)
        watcher.watch(slow, 0.0)
        slow.wait()
        looks = Looks(None)
        watcher.watch(looks, 0.0)
        looks.wait()


def test_a_call_may_begin_while_the_last_one_is_looked_after():
    with Watcher.take() as watcher:
        second = Looks(None)

        def look():
            watcher.watch(second, 0.0)
            return LONG

        watcher.watch(look, 0.0)
        second.wait()


def test_a_call_that_is_over_is_not_looked_after():
    looks = Looks()
    for _ in range(10):
        with Watcher.take() as watcher:
            watcher.watch(looks, LONG)
    other = Looks(None)
    with Watcher.take() as watcher:
        watcher.watch(other, 0.0)
        other.wait()
    assert looks.threads == []


def test_a_sleeping_thread_wakes_for_the_next_call(monkeypatch):
    monkeypatch.setattr(module, "_AWAKE_SECONDS", 0.0)
    with Watcher.take() as watcher:
        for _ in range(5):
            looks = Looks(None)
            watcher.watch(looks, 0.0)
            looks.wait()
            wait_until(lambda: watcher._is_asleep)


@pytest.mark.parametrize("is_used", [True, False])
def test_the_thread_ends_with_its_watcher(is_used):
    watcher = Watcher()
    gone = weakref.ref(watcher)
    looks = Looks(None)
    if is_used:
        watcher.watch(looks, 0.0)
        looks.wait()
    del watcher
    wait_until(lambda: gone() is None)
    wait_until(lambda: not any(thread.is_alive() for thread in looks.threads))


def test_one_that_is_looking_when_the_call_ends_is_not_given_to_another():
    begun, go_on = threading.Event(), threading.Event()

    def look():
        begun.set()
        assert go_on.wait(LONG)

    with Watcher.take() as watcher:
        watcher.watch(look, 0.0)
        assert begun.wait(LONG)
    assert watcher not in module._free
    go_on.set()


# Python 3.12 warns of any fork beside threads; this is about what such a child finds.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_none():
    with Watcher.take():
        pass
    assert module._free
    pid = os.fork()
    if pid == 0:
        os._exit(len(module._free))
    _, status = os.waitpid(pid, 0)
    assert status == 0

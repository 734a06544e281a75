"""Threads that look after the chunk that the caller is in.

The caller runs the user's code, and cannot do anything else until it comes back. If that takes
long, somebody must get help meanwhile. A watcher sleeps until something is due, and runs no code of
the user's. Watchers are kept for the next call: starting a thread takes longer than a short call.

Waking a thread takes longer than a short call, too (some 80 µs, most of them for the interpreter's
lock). So after a call the thread looks for the next one by itself, every few milliseconds for a
moment, before it falls asleep. A caller that begins meanwhile only writes down what is due when.

Each time the thread wakes, it measures how long it had to wait for the interpreter's lock. So it
knows whether the user's code releases the lock (`taskcarrier.scheduling.gil`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Self

from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.system.quick_switches import are_switches_quick
from taskcarrier.system.thread_clocks import ThreadClock
from taskcarrier.workers.pools import call_at_shutdown

Look = Callable[[], float | None]
"""A function that does what is due, and returns the seconds until it should be called again; None
if never."""

# The thread of a watcher looks for the next call so often, and for so long after the last one.
_POLL_SECONDS = 0.004
_AWAKE_SECONDS = 0.05
# A wait that is shorter does not always release the lock.
_LEAST_SLEEP = 1e-5

_free: list[Watcher] = []
_leaving: list[weakref.ref[Watcher]] = []  # not free, because they look


class Watcher:
    """A thread that calls a function when it is due: ``with Watcher.take() as watcher:``.

    Attributes
    ----------
    gil_seconds : float or None
        How long the thread had to wait for the interpreter's lock when it woke last; None if it was
        not woken by time.
    """

    def __init__(self) -> None:
        self.gil_seconds: float | None = None
        self._clock: ThreadClock | None = None
        self._look: Look | None = None
        self._inbox: SimpleQueue[object] = SimpleQueue()
        self._is_asleep = True
        self._is_looking = False
        self._due = 0.0  # when the function is to be called
        self._next_time = 0.0  # when the thread looks next, by itself
        thread = threading.Thread(
            target=_watcher_main,
            args=(weakref.ref(self, self._inbox.put), self._inbox),
            name="taskcarrier-watcher",
            daemon=True,
        )
        thread.start()

    @classmethod
    def take(cls) -> Watcher:
        """Return a watcher that watches nothing."""
        with suppress(IndexError):
            return _free.pop()
        return run_sheltered(cls)

    def watch(self, look: Look, seconds: float) -> None:
        """Call `look` in `seconds`, and again as it says."""
        self._due = time = monotonic() + seconds
        self._look = look
        if self._is_asleep or time + _POLL_SECONDS < self._next_time:
            self._is_asleep = False
            self._inbox.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._look = None
        if self._next_time > monotonic() + _AWAKE_SECONDS:
            self._inbox.put(None)
        if self._is_looking:  # its thread ends after that
            _leaving[:] = [*filter(_is_looking, _leaving), weakref.ref(self)]
        else:
            _free.append(self)

    def _work(self, inbox: SimpleQueue[object]) -> Look | None:
        """Call functions when they are due, until there was none for a while.

        Return a function that need not be called any more, if it is still there.
        """
        if self._clock is None:
            self._clock = ThreadClock(threading.current_thread())
        done: Look | None = None
        last_time = monotonic()
        while True:
            look, now = self._look, monotonic()
            if look is None or look is done:
                if now > last_time + _AWAKE_SECONDS:
                    return done
                seconds = _POLL_SECONDS
            elif (seconds := self._due - now) <= 0:
                last_time = now
                self._is_looking = True
                try:
                    answer = look()
                finally:
                    self._is_looking = False
                if answer is None:
                    done, seconds = look, _POLL_SECONDS
                elif self._look is look:
                    seconds = max(0.0, answer)
                    self._due = monotonic() + seconds
                else:  # another call has begun meanwhile
                    seconds = 0.0
            else:
                last_time = now + seconds
            del look
            self._next_time = monotonic() + seconds
            self._sleep(inbox, seconds, self._clock)

    def _sleep(self, inbox: SimpleQueue[object], seconds: float, clock: ThreadClock) -> None:
        """Sleep for so long, or until something is in the inbox."""
        self.gil_seconds = None
        queued, due = clock.read_queued(), monotonic() + seconds
        try:
            inbox.get(timeout=seconds)
        except Empty:
            if seconds > _LEAST_SLEEP and not are_switches_quick():
                late = monotonic() - due
                self.gil_seconds = late - (clock.read_queued() - queued)


def _watcher_main(reference: weakref.ref[Watcher], inbox: SimpleQueue[object]) -> None:
    # When the watcher is gone, the dead reference to it comes.
    while inbox.get() is not reference and (watcher := reference()) is not None:
        done = watcher._work(inbox)  # this is the watcher's own thread
        watcher._is_asleep = True  # likewise
        if watcher._look not in {None, done}:  # it was set just now
            inbox.put(None)
        del watcher, done


def _is_looking(reference: weakref.ref[Watcher]) -> bool:
    watcher = reference()
    return watcher is not None and watcher._is_looking  # the module's own


def finish_looks() -> None:
    """Wait until no watcher looks any more whose call is over; those may hold workers."""
    while any(map(_is_looking, _leaving)):
        sleep(_POLL_SECONDS)


def end_watchers() -> None:
    """End the threads of the watchers that are not in use."""
    _free.clear()


def _forget() -> None:
    _free.clear()
    _leaving.clear()


call_at_shutdown(end_watchers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

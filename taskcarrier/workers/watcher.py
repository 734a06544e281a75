"""Threads that look after the chunk that the caller is in.

The caller runs the user's code, and cannot do anything else until it comes back. If that takes
long, somebody must get help meanwhile. A watcher sleeps until something is due, and runs no code of
the user's. Watchers are kept for the next call: starting a thread takes longer than a short call.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Self

from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.workers.pools import call_at_shutdown

Look = Callable[[], float | None]
"""A function that does what is due, and returns the seconds until it should be called again; None
if never."""

# A thread that sleeps for more seconds when its watcher has nothing to watch is woken; arbitrary.
_LONG_SLEEP = 0.05

_free: list[Watcher] = []


class Watcher:
    """A thread that calls a function when it is due: ``with Watcher.take() as watcher:``."""

    def __init__(self) -> None:
        self._look: Look | None = None
        self._inbox: SimpleQueue[object] = SimpleQueue()
        self._is_asleep = True
        self._is_looking = False
        self._next_time = 0.0
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
        self._look = look
        if self._is_asleep or monotonic() + seconds < self._next_time:
            self.wake()

    def wake(self) -> None:
        """Have the function called soon."""
        self._is_asleep = False
        self._inbox.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._look = None
        # Without need it is not woken, which would take a short call longer than all the rest here.
        if not self._is_asleep and self._next_time > monotonic() + _LONG_SLEEP:
            self._inbox.put(None)
        if not self._is_looking:  # else its thread ends after that
            _free.append(self)

    def _work(self, inbox: SimpleQueue[object]) -> Look | None:
        """Call the function whenever it is due, until it need not be called any more; return it."""
        done = None
        while (look := self._look) is not None and look is not done:
            self._is_looking = True
            seconds = look()
            self._is_looking = False
            if seconds is None:
                done = look
                continue
            del look
            self._next_time = monotonic() + seconds
            with suppress(Empty):
                inbox.get(timeout=seconds)
        return done


def _watcher_main(reference: weakref.ref[Watcher], inbox: SimpleQueue[object]) -> None:
    # When the watcher is gone, the dead reference to it comes.
    while inbox.get() is not reference and (watcher := reference()) is not None:
        done = watcher._work(inbox)  # this is the watcher's own thread
        watcher._is_asleep = True  # likewise
        if watcher._look not in {None, done}:  # it was set just now
            inbox.put(None)
        del watcher, done


def end_watchers() -> None:
    """End the threads of the watchers that nobody uses."""
    _free.clear()


call_at_shutdown(end_watchers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free.clear)

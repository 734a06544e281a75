"""Time in tests: workers may pause now and then, because other programs use the machine too."""

import threading
import time

from taskcarrier.workers import loop

LATE = 2.5
"""Seconds, longer than any pause of a busy worker; pauses of two seconds have been seen."""
LONG = 60
"""Seconds that no test waits for, unless something hangs."""


class Clock(threading.local):
    """A clock for each thread, which advances only by `sleep`."""

    now_ns = 10**9

    def __call__(self):
        return self.now_ns

    def sleep(self, seconds):
        self.now_ns += round(seconds * 1e9)


def stopped_clock(monkeypatch):
    """Replace the clock by which threads and the caller measure the time of a range."""
    made = Clock()
    monkeypatch.setattr(loop, "monotonic_ns", made)
    return made


def wait_until(condition):
    """Wait until a condition holds, and fail after `LONG` seconds."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Time in tests: workers stand still now and then, where other programs have work to do too."""

import threading

from taskcarrier.workers import loop

LATE = 2.5
"""Seconds that a worker with something to do does not stand still; two have been seen."""


class Clock(threading.local):
    """Stands for the time, each thread having its own; it goes on only where it is told to."""

    now_ns = 10**9

    def __call__(self):
        return self.now_ns

    def sleep(self, seconds):
        self.now_ns += round(seconds * 1e9)


def stopped_clock(monkeypatch):
    """A clock by which workers that are threads, or the caller, see how long a range has taken."""
    made = Clock()
    monkeypatch.setattr(loop, "monotonic_ns", made)
    return made

"""What is closed after its call: hand-overs whose workers are still getting ready.

New workers start, and all import the modules of the function. A call that the caller has finished
meanwhile does not wait for that: a thread of its own does, and gives the workers back, so that the
next call finds them warm.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.workers.pools import call_before_shutdown
from taskcarrier.workers.watcher import finish_looks

_late: list[LateClose] = []


class LateClose:
    """Something that is closed in a thread of its own.

    Parameters
    ----------
    close : callable
        Closes it, which may take long.
    hurry : callable
        Makes `close` return soon; called from another thread.
    """

    def __init__(self, close: Callable[[], None], hurry: Callable[[], None]) -> None:
        self._close = close
        self._hurry = hurry
        self._thread = threading.Thread(target=self._run, name="taskcarrier-late", daemon=True)

    def start(self) -> None:
        """Start the thread; if there can be none, close it here."""
        try:
            run_sheltered(self._start)
        except (RuntimeError, MemoryError):
            self._close()

    def _start(self) -> None:
        _late.append(self)
        try:
            self._thread.start()
        except BaseException:
            _late.remove(self)
            raise

    def _run(self) -> None:
        try:
            self._close()
        finally:
            _late.remove(self)

    def hurry(self) -> None:
        """Have it closed soon."""
        self._hurry()

    def wait(self) -> None:
        """Wait until it is closed."""
        if self._thread is not threading.current_thread():
            self._thread.join()


def finish_late_closes() -> None:
    """Wait until everything is closed, which is soon."""
    finish_looks()  # a watcher may start more
    late_ones = _late.copy()
    for late in late_ones:
        late.hurry()
    for late in late_ones:
        late.wait()


call_before_shutdown(finish_late_closes)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_late.clear)

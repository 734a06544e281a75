"""Imports after the end of the main thread.

From then on Python refuses the hooks with which executors end their threads, so the modules of
executors, and whatever imports them, could not be imported.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator

from taskcarrier.system.contexts import contextmanager


def is_ending() -> bool:
    """Return whether the main thread has ended or is waiting for the others to end."""
    return bool(threading._SHUTTING_DOWN)  # type: ignore[attr-defined]  # no public way


@contextmanager
def late_hooks() -> Iterator[None]:
    """Let a thread import any module, even after the main thread has ended.

    Hooks that are registered then, while this context is open, are called when all threads of the
    program have ended.
    """
    register = threading._register_atexit  # type: ignore[attr-defined]  # no public way
    if not is_ending():
        yield
        return
    threading._register_atexit = atexit.register  # type: ignore[attr-defined]  # likewise
    try:
        yield
    finally:
        threading._register_atexit = register  # type: ignore[attr-defined]  # likewise

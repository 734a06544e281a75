"""Exceptions that come from outside, at any moment: between any two steps of Python code.

Signal handlers raise in the main thread, and `PyThreadState_SetAsyncExc` raises in any given
thread. They interrupt whatever runs there, `finally` blocks included. So work that must be complete
is protected in one of four ways:

- It runs in a thread of its own, where no such exceptions come (`run_sheltered`).
- It is one call into C, or a plain assignment: Python checks for such exceptions after a call, at
  the start of a function and at the end of each pass of a loop, and nowhere else.
- What it makes has an owner beforehand, so that it is released if it is dropped on the way
  (`taskcarrier.system.descriptors`).
- Nothing is recorded; the next call determines the state again: which holders are gone (`Holders`,
  `taskcarrier.workers.pools`), which workers are free.

`is_raised_by_handler` distinguishes these exceptions from those of the user's functions.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from _signal import getsignal  # type: ignore[import-not-found]  # the C module behind `signal`
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import CodeType
from typing import Any, TypeVar

_T = TypeVar("_T")


class Handlers:
    """The signal handlers that the program had set when this object was made (which takes 1 µs).

    They count as those of the program as long as this object lives. A handler that the function
    sets in that time, in the main thread of the caller or of a worker process, is the function's.
    """

    def __init__(self) -> None:
        self._handlers = [*map(getsignal, _SIGNALS)]
        if threading.current_thread() is threading.main_thread():  # handlers run only there
            _drop_dead_codes()
            _noted_handlers.append(weakref.ref(self))

    @property
    def codes(self) -> set[CodeType | None]:
        """The code objects of the handlers; None stands for signals without a handler in Python."""
        return {*map(_find_code, self._handlers)}


# For `_signal.getsignal`: the one in `signal` makes enum members, 0.1 ms for all signals.
_SIGNALS = range(1, signal.NSIG)
_noted_handlers: list[weakref.ref[Handlers]] = []


def _drop_dead_codes() -> None:
    while _noted_handlers and _noted_handlers[-1]() is None:
        _noted_handlers.pop()


def _get_handlers() -> Handlers:
    """Return the handlers noted by the innermost call, or the current ones if there is none."""
    _drop_dead_codes()
    handlers = _noted_handlers[-1]() if _noted_handlers else None
    return Handlers() if handlers is None else handlers


def is_raised_by_handler(error: BaseException) -> bool:
    """Return whether a signal handler of the program raised this, not the code that it interrupted.

    A handler may raise while any code of the user runs in the main thread; the usual time limits
    do so. This ends the call as Ctrl-C does, and is not an error of the function or the input.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # handlers run in the main thread alone
    handlers = _get_handlers().codes
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _find_code(handler: Any) -> CodeType | None:
    """Return the code of a function, method, partial or callable object; None if it has none."""
    while isinstance(handler, partial):
        handler = handler.func
    for function in (handler, vars(type(handler)).get("__call__")):
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def run_sheltered(func: Callable[[], _T]) -> _T:
    """Call a function in a thread of its own, and return its result.

    There it runs to its end, even if this thread is interrupted meanwhile. (If no thread can be
    started, it runs in this one.)
    """
    answers: SimpleQueue[Any] = SimpleQueue()
    thread = threading.Thread(
        target=_run_and_report, args=(func, answers), name="taskcarrier-sheltered", daemon=True
    )
    answer: Any = None
    while not isinstance(answer, tuple):
        if thread.ident is None:
            starter = Holder()
            gone = weakref.ref(starter, answers.put)
            try:
                # `thread.start` is not called here: it takes locks, and keeps them if it is
                # interrupted. For a moment, a new thread is taken for the one that starts it, and
                # may get an exception that is meant for that one. Then it ends before it begins.
                start_new_thread(_start, (thread, func, answers, starter))
            except (RuntimeError, MemoryError):
                _run_and_report(func, answers)
            del starter
        answer = _get(answers)
    del gone
    result, error = answer
    del answer
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback refers to this frame
    return result  # type: ignore[no-any-return]  # the result of `func`


# Without a GIL, an object that another thread drops last is freed only when the thread that made it
# runs Python again. The seconds are arbitrary.
_LONGEST_WAIT = None if getattr(sys, "_is_gil_enabled", lambda: True)() else 0.1


def _get(answers: SimpleQueue[Any]) -> Any:
    """Wait for an answer, or for the end of the thread that should give it."""
    while True:
        with suppress(Empty):
            return answers.get(timeout=_LONGEST_WAIT)


def _start(
    thread: threading.Thread,
    func: Callable[[], Any],
    answers: SimpleQueue[Any],
    _: Holder,  # lives until this returns
) -> None:
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # there are too many threads
        _run_and_report(func, answers)


def _run_and_report(func: Callable[[], Any], answers: SimpleQueue[Any]) -> None:
    try:
        answers.put((func(), None))
    except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
        answers.put((None, error))


class Holder:
    """A member of `Holders`, which counts until it is discarded or destroyed."""

    __slots__ = ("__weakref__",)


class Holders:
    """The holders of something; one that was destroyed without `discard` does not count."""

    def __init__(self) -> None:
        self._holders: set[weakref.ref[Holder]] = set()

    def add(self, holder: Holder) -> None:
        """Add a holder."""
        self._holders.add(weakref.ref(holder))

    def discard(self, holder: Holder) -> None:
        """Remove a holder, if it is there."""
        self._holders.discard(weakref.ref(holder))

    def __bool__(self) -> bool:
        if not self._holders:
            return False
        gone = {holder for holder in self._holders.copy() if holder() is None}
        self._holders -= gone
        return bool(self._holders)

"""Exceptions that come from outside, at any moment: between any two steps of Python code.

Signal handlers raise in the main thread, and `PyThreadState_SetAsyncExc` in any thread that it
names. What they come in between is cut short, `finally` blocks among it. So whatever must be whole
is done in one of four ways:

- in a thread of its own, where nothing of this kind comes (`run_sheltered`);
- by one call into C, or by a plain assignment: Python looks for such exceptions after a call, where
  a function begins and where a loop goes round, and nowhere else;
- owned before it is made, so that what is dropped on the way ends by itself
  (`taskcarrier.system.descriptors`);
- not written down at all, but found out again by the next call: who is gone (`Holders`,
  `taskcarrier.workers.pools`), which workers are free.

`is_of_the_program` distinguishes them from exceptions of the user's functions.
"""

from __future__ import annotations

import signal
import threading
import weakref
from _signal import getsignal  # type: ignore[import-not-found]  # `signal` is made of it
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import CodeType
from typing import Any, TypeVar

_T = TypeVar("_T")


class Handlers:
    """The signal handlers that the program had set when this was made (1 µs).

    They count as those of the program for as long as this lives. A handler that the function sets
    meanwhile, in the main thread of the caller or of a worker process, is its own.
    """

    def __init__(self) -> None:
        self._handlers = [*map(getsignal, _SIGNALS)]
        if threading.current_thread() is threading.main_thread():  # handlers run in no other
            _drop_dead_codes()
            _noted.append(weakref.ref(self))

    @property
    def codes(self) -> set[CodeType | None]:
        """The code of each; None stands for signals without a handler in Python."""
        return {*map(_code_of, self._handlers)}


# That of `signal` itself makes enumerations, which takes 0.1 ms for all signals.
_SIGNALS = range(1, signal.NSIG)
_noted: list[weakref.ref[Handlers]] = []


def _drop_dead_codes() -> None:
    while _noted and _noted[-1]() is None:
        _noted.pop()


def _handlers() -> Handlers:
    """Those that count: of the innermost call that has noted them, else those of now."""
    _drop_dead_codes()
    handlers = _noted[-1]() if _noted else None
    return Handlers() if handlers is None else handlers


def is_of_the_program(error: BaseException) -> bool:
    """Whether a signal handler of the program has raised it, and not what it came in between.

    A handler may raise while any code of the user's runs in the main thread; the usual time limit
    does. That ends the call as Ctrl-C does, and is no error of the function or the input.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # no handler runs there
    handlers = _handlers().codes
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    """The code of a function, method, partial or callable object; None where there is none."""
    while isinstance(handler, partial):
        handler = handler.func
    for found in (handler, vars(type(handler)).get("__call__")):
        code = getattr(found, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def run_sheltered(what: Callable[[], _T]) -> _T:
    """Have something done in a thread of its own, and wait for its result.

    There it is done to its end, even if this thread is interrupted meanwhile. (If no thread can be
    started, it is done in this one.)
    """
    done: SimpleQueue[Any] = SimpleQueue()
    thread = threading.Thread(
        target=_do, args=(what, done), name="taskcarrier-sheltered", daemon=True
    )
    answer: Any = None
    while not isinstance(answer, tuple):
        if thread.ident is None:
            starter = Holder()
            gone = weakref.ref(starter, done.put)
            try:
                # Not by `thread.start` here, which takes locks and, cut short, would keep them. A
                # new thread is taken for the one that starts it, for a moment, and may get an
                # exception that is meant for that. Then it ends before it has begun.
                start_new_thread(_start, (thread, what, done, starter))
            except (RuntimeError, MemoryError):
                _do(what, done)
            del starter
        answer = done.get()
    del gone
    result, error = answer
    del answer
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback refers to this frame
    return result  # type: ignore[no-any-return]  # that of `what`


def _start(
    thread: threading.Thread,
    what: Callable[[], Any],
    done: SimpleQueue[Any],
    _: Holder,  # ends with this
) -> None:
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # there are too many threads
        _do(what, done)


def _do(what: Callable[[], Any], done: SimpleQueue[Any]) -> None:
    try:
        done.put((what(), None))
    except BaseException as error:  # noqa: BLE001  # raised where it is waited for
        done.put((None, error))


class Holder:
    """Something that is held as long as this lives, or until it is given up."""

    __slots__ = ("__weakref__",)


class Holders:
    """Who holds something; one that is gone without a word does not count."""

    def __init__(self) -> None:
        self._holders: set[weakref.ref[Holder]] = set()

    def add(self, holder: Holder) -> None:
        """Count one in."""
        self._holders.add(weakref.ref(holder))

    def discard(self, holder: Holder) -> None:
        """Count one out."""
        self._holders.discard(weakref.ref(holder))

    def __bool__(self) -> bool:
        if not self._holders:
            return False
        gone = {holder for holder in self._holders.copy() if holder() is None}
        self._holders -= gone
        return bool(self._holders)

"""Exceptions that signal handlers of the program raise, told from those of the user's functions."""

from __future__ import annotations

import signal
import threading
from functools import partial
from types import CodeType
from typing import Any


def is_of_the_program(error: BaseException) -> bool:
    """Whether a signal handler of the program has raised it, and not what it came in between.

    A handler may raise while any code of the user's runs in the main thread; the usual time limit
    does. That ends the call as Ctrl-C does, and is no error of the function or the input. A handler
    that has been replaced since belongs to the code that replaced it.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # no handler runs there
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()}
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

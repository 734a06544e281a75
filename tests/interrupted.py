"""Exceptions from outside at a chosen step of a call, where Python could deliver one."""

import gc
import sys
from collections.abc import Callable
from typing import Any


class Stop(KeyboardInterrupt):  # it is no error
    """The exception from outside."""


def interrupted_at(step: int, call: Callable[[], Any]) -> bool:
    """Interrupt a call at a step, and tell whether it got that far.

    Python delivers exceptions of signal handlers and other threads where a function begins, and
    where a C function has returned. (And where a loop jumps back, which is left out here.) Some
    steps are in finalizers, whose exceptions are lost. The garbage collector, whose callbacks lose
    them too, is off meanwhile.
    """
    steps = iter(range(step))
    reached = []  # and no frame, which would refer to this one

    def trace(_: object, event: str, __: object) -> None:
        if event in {"call", "c_return"} and next(steps, None) is None and not reached:
            reached.append(True)
            raise Stop

    gc.disable()
    try:
        sys.setprofile(trace)
        call()
    except Stop:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return bool(reached)


def interrupted_between_items(function: str, error: Exception, call: Callable[[], Any]) -> None:
    """Have an error come from outside when a function has put two results into its list."""
    steps = iter(range(1))

    def trace(frame: Any, event: str, called: Any) -> None:
        is_appended = event == "c_return" and called.__name__ == "append"
        if is_appended and frame.f_code.co_name == function and next(steps, None) is None:
            raise error

    try:
        sys.setprofile(trace)
        call()
    finally:
        sys.setprofile(None)

"""The part of the caller's state that the function sees in every worker.

It is read where the call is made, and set in each worker before its first range: the current
folder, what NumPy and `decimal` do about rounding and floating-point errors, and how deep functions
may call each other. Other settings of a program do not travel; the README lists them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from taskcarrier.record import record
from taskcarrier.system.contexts import contextmanager
from taskcarrier.workers.call import Call

# Values of NumPy's error state that need the handler of `numpy.seterrcall`.
_HANDLED = {"call", "log"}


@record
class ParentState:
    """State of the caller that decides what a function does.

    Attributes
    ----------
    folder : str or None
        The current folder; None if it was removed.
    errstate : dict
        The result of `numpy.geterr`.
    errcall : Call or None
        The handler of `numpy.seterrcall`; None if `errstate` needs none.
    decimal_context : decimal.Context or None
        The context of `decimal`, without flags; None if `decimal` is not loaded.
    recursion_limit : int
        The result of `sys.getrecursionlimit`.
    """

    folder: str | None
    errstate: dict[str, Any]
    errcall: Call | None
    decimal_context: Any
    recursion_limit: int

    @classmethod
    def capture(cls) -> ParentState:
        """Return the state of this thread and its process."""
        errstate = dict(np.geterr())
        handler: Any = np.geterrcall() if _HANDLED & {*errstate.values()} else None
        return cls(
            _get_folder(),
            errstate,
            None if handler is None else Call(handler),
            _copy_decimal_context(),
            sys.getrecursionlimit(),
        )

    def apply(self, *, in_process: bool) -> None:
        """Set the state in this thread and, with `in_process`, in this process, for good."""
        if in_process:
            if self.folder is not None and _get_folder() != self.folder:
                os.chdir(self.folder)
            if sys.getrecursionlimit() != self.recursion_limit:
                sys.setrecursionlimit(self.recursion_limit)
        np.seterr(**self.errstate)
        if self.errcall is not None:
            np.seterrcall(self.errcall.func)
        if self.decimal_context is not None:
            # Each thread gets a copy: otherwise threads would share the caller's context and flags.
            import decimal  # noqa: PLC0415  # the caller has loaded it

            decimal.setcontext(self.decimal_context.copy())

    @contextmanager
    def apply_within(self) -> Iterator[None]:
        """Set the state in this thread while a `with` block runs; leave the process as it is."""
        handler = np.geterrcall()
        with np.errstate(**self.errstate), contextlib.ExitStack() as stack:
            if self.errcall is not None:
                np.seterrcall(self.errcall.func)
                stack.callback(np.seterrcall, handler)
            if self.decimal_context is not None:
                import decimal  # noqa: PLC0415  # as above

                stack.enter_context(decimal.localcontext(self.decimal_context))
            yield


def own_decimal_context() -> None:
    """Give this context a copy of its `decimal` context, if it has one: changes stay in it."""
    if (context := _copy_decimal_context()) is not None:
        sys.modules["decimal"].setcontext(context)


def _get_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _copy_decimal_context() -> Any:
    decimal: Any = sys.modules.get("decimal")
    if decimal is None or not hasattr(decimal, "getcontext"):  # another thread is importing it
        return None
    context = decimal.getcontext().copy()
    context.clear_flags()
    return context

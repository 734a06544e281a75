"""What of the caller's own state the function sees in every worker.

Each is read where the call is made, and set in each worker before its first range: the current
folder, what NumPy and `decimal` do about rounding and floating-point errors, and how deep functions
may call each other. What else a program can set for itself does not travel; the README lists it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskcarrier.system.contexts import contextmanager
from taskcarrier.workers.call import Call

# What NumPy can be told to do about an error that needs the handler of `numpy.seterrcall`.
_CALLING = {"call", "log"}


@dataclass(frozen=True, eq=False)
class ParentState:
    """State of the caller's that decides what a function does.

    Attributes
    ----------
    folder : str or None
        The current folder; None if it was removed.
    errstate : dict
        As `numpy.geterr` tells it.
    errcall : Call or None
        The handler that `errstate` asks for, if it does.
    decimals : decimal.Context or None
        That of `decimal`, without flags; None if `decimal` is not loaded.
    recursion_limit : int
        As `sys.getrecursionlimit` tells it.
    """

    folder: str | None
    errstate: dict[str, Any]
    errcall: Call | None
    decimals: Any
    recursion_limit: int

    @classmethod
    def capture(cls) -> ParentState:
        """Those of this thread."""
        errstate = dict(np.geterr())
        handler: Any = np.geterrcall() if _CALLING & {*errstate.values()} else None
        return cls(
            _folder(),
            errstate,
            None if handler is None else Call(handler),
            _decimals(),
            sys.getrecursionlimit(),
        )

    def apply(self, *, in_process: bool) -> None:
        """Make them those of this thread, and with `in_process` those of this process, for good."""
        if in_process:
            if self.folder is not None and _folder() != self.folder:
                os.chdir(self.folder)
            if sys.getrecursionlimit() != self.recursion_limit:
                sys.setrecursionlimit(self.recursion_limit)
        np.seterr(**self.errstate)
        if self.errcall is not None:
            np.seterrcall(self.errcall.func)
        if self.decimals is not None:
            # A copy for each: threads would share the caller's context, flags and all.
            import decimal  # noqa: PLC0415  # the caller has loaded it

            decimal.setcontext(self.decimals.copy())

    @contextmanager
    def apply_within(self) -> Iterator[None]:
        """Make them those of this thread for the length of a block, but for those of a process."""
        handler = np.geterrcall()
        with np.errstate(**self.errstate), contextlib.ExitStack() as stack:
            if self.errcall is not None:
                np.seterrcall(self.errcall.func)
                stack.callback(np.seterrcall, handler)
            if self.decimals is not None:
                import decimal  # noqa: PLC0415  # as above

                stack.enter_context(decimal.localcontext(self.decimals))
            yield


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _decimals() -> Any:
    decimal: Any = sys.modules.get("decimal")
    if decimal is None or not hasattr(decimal, "getcontext"):  # another thread is importing it
        return None
    context = decimal.getcontext().copy()
    context.clear_flags()
    return context

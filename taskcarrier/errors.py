"""Exceptions that carry facts: which range, which worker, what happened.

Imported when one is needed: the standard library's `BrokenProcessPool` alone takes a fifth of
the time that importing numpy does.
"""

from __future__ import annotations

import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Protocol


class WorkerDiedError(BrokenProcessPool):
    """A worker process died with a range in hand, as often as it was given out again.

    The other workers finished what was theirs to do, and later calls get a new worker.

    Attributes
    ----------
    worker : str
        Its name in the report.
    exitcode : int or None
        As in `multiprocessing.Process.exitcode`: negative for a signal.
    in_hand : tuple of int or None
        ``(start, stop)`` of the range it was working on; None if it had none.
    attempt : int
        How often that range (or a larger one around it) was run, this time included.
    missing : list of tuple of int
        Every range without a result, in ascending order.
    partial : object
        What the other workers finished: the array (or tuple of arrays) with arbitrary values
        in the missing ranges, or the list with None there; None if nothing was finished.
    """

    def __init__(
        self,
        message: str,
        worker: str = "",
        exitcode: int | None = None,
        in_hand: tuple[int, int] | None = None,
        attempt: int = 1,
    ) -> None:
        super().__init__(message)
        self.worker = worker
        self.exitcode = exitcode
        self.in_hand = in_hand
        self.attempt = attempt
        self.missing: list[tuple[int, int]] = []
        self.partial: Any = None


class FailedRange(NamedTuple):
    """A range whose results are missing, and why.

    Attributes
    ----------
    start, stop : int
        Its items along the mapped axis.
    error : Exception
        What the function raised.
    """

    start: int
    stop: int
    error: BaseException


class TaskError(RuntimeError):
    """Stands for an exception that could not travel from a worker process.

    Attributes
    ----------
    type_name : str
        The qualified name of the original type; its text and traceback are in the message
        and the cause.
    """

    def __init__(self, message: str, type_name: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name


class WorkerTracebackError(Exception):
    """The traceback in a worker process, as text: the cause of the exception raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


# Why a process may have died of a signal.
_HINTS = {
    "SIGKILL": "; the kernel kills so when memory runs out",
    **dict.fromkeys(
        ("SIGSEGV", "SIGFPE", "SIGILL", "SIGABRT"),
        "; some library or compiled function has crashed",
    ),
    "SIGBUS": (
        "; a file that it maps was cut off by another program, or some library or compiled "
        "function has crashed"
    ),
}


class _Ended(Protocol):
    """A worker that died (`taskcarrier.workers.records.Death`)."""

    worker: int
    name: str
    exitcode: int | None
    range: tuple[int, int] | None
    attempt: int
    was_late: bool


def describe_death(death: _Ended, where: str | None) -> str:
    """How a worker died, and while it did what."""
    at_work = "between two ranges" if where is None else f"while mapping {where}"
    if death.was_late:
        return f"worker {death.worker} ({death.name}) was stopped {at_work}: it took too long"
    tried = f", attempt {death.attempt}" if death.attempt > 1 else ""
    hint = _HINTS.get(_signal_name(death.exitcode), "")
    return (
        f"worker {death.worker} ({death.name}{tried}) {describe_exit(death.exitcode)} "
        f"{at_work}{hint}"
    )


def make_died_error(death: _Ended, where: str | None, more: str = "") -> WorkerDiedError:
    """The error for a death."""
    return WorkerDiedError(
        describe_death(death, where) + more, death.name, death.exitcode, death.range, death.attempt
    )


def describe_exit(exitcode: int | None) -> str:
    """An exit code in words.

    >>> describe_exit(-9), describe_exit(3)
    ('killed by signal 9 (SIGKILL)', 'exited with code 3')
    """
    if exitcode is None:
        return "gone"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    return f"killed by signal {-exitcode} ({_signal_name(exitcode)})"


def _signal_name(exitcode: int | None) -> str:
    try:
        return signal.Signals(-(exitcode or 0)).name
    except ValueError:
        return "no standard signal"

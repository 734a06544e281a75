"""Exceptions that carry facts: which range, which worker, what happened.

::

    RuntimeError
    ├── concurrent.futures.process.BrokenProcessPool
    │   └── WorkerDiedError    raised by a run that lost ranges to worker processes that died
    └── TaskError              raised in place of a worker's exception that cannot be sent
    Exception
    └── WorkerTracebackError   never raised: the cause of exceptions that were sent by workers

For a range that took too long, runs raise the built-in `TimeoutError`. With ``on_error="collect"``,
exceptions are not raised but listed, each in a `FailedRange`, which is no exception itself.

The first of them is loaded when it is first used: importing the standard library's
`BrokenProcessPool` alone takes a tenth of the time that importing numpy takes.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from taskcarrier.system.late_imports import late_hooks

if TYPE_CHECKING:
    from taskcarrier.worker_died import WorkerDiedError as WorkerDiedError  # noqa: PLC0414  # public


def __getattr__(name: str) -> Any:
    if name != "WorkerDiedError":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with late_hooks():
        from taskcarrier.worker_died import WorkerDiedError  # noqa: PLC0415  # slow, as said

    globals()[name] = WorkerDiedError
    return WorkerDiedError


class FailedRange(NamedTuple):
    """A range whose results are missing, and why.

    Attributes
    ----------
    start, stop : int
        The items of the range along the mapped axis.
    error : Exception
        What the function raised.
    """

    start: int
    stop: int
    error: BaseException


class TaskError(RuntimeError):
    """A stand-in for an exception that could not be sent from a worker process.

    Attributes
    ----------
    type_name : str
        The qualified name of the original type. The original text is in the message, the
        traceback in the cause.
    """

    def __init__(self, message: str, type_name: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name


class WorkerTracebackError(Exception):
    """A traceback in a worker process, as text; the cause of the exception raised in the parent."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


# What may have caused the signal that killed a process.
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


class _Death(Protocol):
    """A worker that died, as `taskcarrier.workers.records.WorkerDeath` describes it."""

    worker: int
    name: str
    exitcode: int | None
    range: tuple[int, int] | None
    attempt: int
    was_late: bool


def describe_death(death: _Death, where: str | None) -> str:
    """Describe how a worker died, and what it was doing; `where` names its range, if any."""
    activity = "between two ranges" if where is None else f"while mapping {where}"
    if death.was_late:
        return f"worker {death.worker} ({death.name}) was stopped {activity}: it took too long"
    attempt = f", attempt {death.attempt}" if death.attempt > 1 else ""
    hint = _HINTS.get(_signal_name(death.exitcode), "")
    return (
        f"worker {death.worker} ({death.name}{attempt}) {describe_exit(death.exitcode)} "
        f"{activity}{hint}"
    )


def make_died_error(death: _Death, where: str | None, more: str = "") -> WorkerDiedError:
    """Return the error for a death, with `more` at the end of its message."""
    from taskcarrier.worker_died import WorkerDiedError  # noqa: PLC0415  # slow, and loaded already

    return WorkerDiedError(
        describe_death(death, where) + more, death.name, death.exitcode, death.range, death.attempt
    )


def describe_exit(exitcode: int | None) -> str:
    """Return an exit code in words.

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

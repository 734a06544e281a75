"""The executor of a choice."""

from __future__ import annotations

from collections.abc import Callable

from taskcarrier.memory.staging import Staging
from taskcarrier.workers.caller_first import CallerFirstExecutor
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import Executor, ProcessExecutor, ThreadExecutor
from taskcarrier.workers.serial import SerialExecutor


def make_executor(
    choice: Choice, backend: str | None, staging: Callable[[], Staging], timeout: float | None
) -> Executor:
    """Return the executor of a choice, or raise an error if it cannot keep the user's wishes.

    Parameters
    ----------
    choice : Choice
        Where to run.
    backend : str or None
        The user's own word for it; None if it follows from an active `joblib.parallel_config`.
    staging : callable
        Makes a place for copies, if workers need one.
    timeout : float or None
        Seconds that one range may take.
    """
    if choice.begins_in_caller:
        return CallerFirstExecutor(choice)
    if choice.backend == "sequential":
        return SerialExecutor(choice)
    if choice.backend == "threading":
        return ThreadExecutor(choice)
    if choice.backend == "loky":
        return ProcessExecutor(choice, staging())
    if timeout is not None:
        raise ValueError(
            f"timeout= cannot be kept on backend={choice.backend!r}, whose workers are not ours to "
            "stop; leave it out, or pass backend='loky'"
        )
    from taskcarrier.workers import joblib_backends  # noqa: PLC0415  # loads joblib

    executor = joblib_backends.JoblibExecutor(choice, backend)
    if executor.choice.n_jobs == 1:  # joblib would run it here too
        return SerialExecutor(Choice("sequential", 1, f"backend {choice.backend!r} has one worker"))
    return executor

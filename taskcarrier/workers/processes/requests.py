"""What the parent asks of a fork server; both import this, and neither imports the other."""

from __future__ import annotations

from typing import Any, NamedTuple

from taskcarrier.record import record

JOBLIB_SWITCH = "JOBLIB_MULTIPROCESSING"
"""The variable without which joblib, while it is imported, makes a semaphore to see whether that
works. A worker that is killed at that moment would leave it in /dev/shm."""


@record(kw_only=True)
class WorkerSetup:
    """How a worker process begins.

    Attributes
    ----------
    number : int
        The worker's number in its pool.
    name : str
        The name of its `multiprocessing.Process`.
    identity : tuple of int
        The identity of that, by which programs tell their workers apart.
    parent : (str, int)
        The name and the number of the process that it works for.
    environment : dict
        Its environment variables.
    preparation : dict
        The argument of `multiprocessing.spawn.prepare`.
    standard : list of int
        The standard descriptors that are open in the parent. Duplicates of them come with the
        setup, after those of the worker's socket, its lifeline and the parent's resource tracker.
    """

    number: int
    name: str
    identity: tuple[int, ...]
    parent: tuple[str, int]
    environment: dict[str, str]
    preparation: dict[str, Any]
    standard: list[int]


class Fork(NamedTuple):
    """A request to start a worker.

    The answer is its number and its descriptor; None if the server has several threads, so that a
    fork is not safe; or an `OSError`.
    """

    setup: WorkerSetup


class Become(NamedTuple):
    """A request to become a worker, where a fork is not safe or not seen to end; no answer."""

    setup: WorkerSetup


class Reap(NamedTuple):
    """A request to reap a worker that has ended; the answer is its exit code."""

    pid: int


class End(NamedTuple):
    """A request to end; no answer."""

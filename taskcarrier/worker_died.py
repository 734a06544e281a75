"""The error for a worker process that died, in a module of its own: its base is slow to import.

Users know it as `taskcarrier.errors.WorkerDiedError`.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from typing import Any


class WorkerDiedError(BrokenProcessPool):
    """A worker process died with a range in hand, in every attempt at that range.

    The other workers finished their share of the work, and later calls get a new worker.

    Attributes
    ----------
    worker : str
        The worker's name in the report.
    exitcode : int or None
        As in `multiprocessing.Process.exitcode`: negative for a signal.
    in_hand : tuple of int or None
        ``(start, stop)`` of the range that it was working on; None if it had none.
    attempt : int
        How often that range (or a larger one around it) was run, including this time.
    missing : list of tuple of int
        Every range without a result, in ascending order.
    partial : object
        What the other workers finished: the array (or tuple of arrays) with arbitrary values
        in the missing ranges, or the list with None there; None if nothing was finished.
    """

    __module__ = "taskcarrier.errors"

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

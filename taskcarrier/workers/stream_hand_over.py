"""How workers come to the rest of a stream that the caller has begun itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from taskcarrier.scheduling.gil import SAMPLE_SECONDS
from taskcarrier.scheduling.hand_over import Offer
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.quick_switches import quick_switches
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import ProcessExecutor, ThreadExecutor
from taskcarrier.workers.hand_overs import make_process_offer, make_thread_offer
from taskcarrier.workers.pools import (
    has_warm_processes,
    prepare_processes,
    start_processes,
)
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.task import Job
from taskcarrier.workers.watcher import Watcher

# The longest time between two looks at a stream's function.
_LONGEST_SAMPLE_SECONDS = 0.01


class StreamHandOver:
    """The hand-over of a stream to workers, which have a work queue of their own.

    Parameters
    ----------
    choice : Choice
        Where the rest runs.
    job : Job
        The run; processes get the function of its snapshot.
    """

    def __init__(self, choice: Choice, job: Job) -> None:
        self.choice = choice
        self._is_decided = not choice.may_use_threads or choice.backend == "threading"
        self._job = job
        self._watcher: Watcher | None = None
        self._sample_seconds = SAMPLE_SECONDS
        self._is_in_function = False
        self._is_starting = False
        self._error: Exception | None = None

    @property
    def _are_processes(self) -> bool:
        return self.choice.backend == "loky"

    @contextmanager
    def look_at_function(self) -> Iterator[None]:
        """While the function runs, find out whether it may go on in threads, if that is open."""
        if self.decide():
            yield
            return
        if self._watcher is None:
            self._watcher = Watcher.take()
            self._watcher.watch(self._sample, self._sample_seconds)
        self._is_in_function = True
        try:
            yield
        finally:
            self._is_in_function = False

    def decide(self) -> bool:
        """Decide between threads and processes, if that is still open; return whether it is not."""
        is_fit = self.choice.gil_waits.is_fit_for_threads
        if not self._is_decided and is_fit is not None:
            self._is_decided = True
            if is_fit:
                reason = self.choice.gil_waits.describe()
                self.choice = replace(self.choice, backend="threading", reason=reason)
        return self._is_decided

    def _sample(self) -> float | None:
        assert self._watcher is not None  # for the type checker
        waits, seconds = self.choice.gil_waits, self._watcher.gil_seconds
        if self._is_in_function and seconds is not None:
            waits.add(seconds)
        if waits.is_fit_for_threads is not None:
            return None
        # Ever more seldom: the caller may spend its time on other things.
        self._sample_seconds = min(2 * self._sample_seconds, _LONGEST_SAMPLE_SECONDS)
        return self._sample_seconds

    @property
    def _is_slow(self) -> bool:
        return self._are_processes and not has_warm_processes(self.choice.n_jobs)

    def make_offer(self) -> Offer:
        """Return what it takes, as things are now."""
        n_workers = self.choice.n_jobs
        if not self._are_processes:
            return make_thread_offer(n_workers)
        return make_process_offer(n_workers, is_slow=self._is_slow)

    def is_ready(self) -> bool:
        """Return whether the workers can begin at once; if processes must start, let them.

        Raises the error if they could not.
        """
        if self._error is not None:
            raise self._error
        if not self.decide():
            return False
        if not self._is_slow:
            return True
        if not self._is_starting:
            self._is_starting = True
            self._watcher = self._watcher or Watcher.take()
            self._watcher.watch(self._start_processes, 0.0)
        return False

    def _start_processes(self) -> None:
        try:
            with quick_switches():
                prepare_processes(self.choice.n_jobs)
                start_processes(self.choice.n_jobs)
        except Exception as error:  # noqa: BLE001  # raised in the caller
            self._error = error

    def open_queue(self) -> AbstractContextManager[WorkQueue]:
        """Open the queue of the workers; raise an error if the job cannot be sent to them."""
        if not self._are_processes:
            return ThreadExecutor(self.choice).stream(self._job)
        snapshot = self._job.snapshot
        assert snapshot is not None  # for the type checker
        executor = ProcessExecutor(self.choice, snapshot.staging)
        return executor.stream(replace(self._job, snapshot=None), snapshot.get_pickler())

    def close(self) -> None:
        """Do without the thread that starts processes."""
        if self._watcher is not None:
            self._watcher.__exit__()

"""A run of a job with shares, as long as nothing unusual happens.

It does what a `GridRun` does of a run in which all workers report, and no more. When a worker dies,
or sends anything but its stats, a `GridRun` goes on with it; likewise when the caller is
interrupted.
"""

from __future__ import annotations

import select
from contextlib import suppress
from time import monotonic_ns

from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.workers.pickling import Payload
from taskcarrier.workers.processes.grid_run import GridRun
from taskcarrier.workers.processes.supervisor import LONGEST_WAIT, GetWorker, Worker
from taskcarrier.workers.processes.worker import STATS, Order, unpickle_stats
from taskcarrier.workers.records import WorkerStats
from taskcarrier.workers.task import Deliver, Job


class ShareRun:
    """A run whose workers are free, and get all that they need with their order.

    Attributes
    ----------
    stats : list of WorkerStats
        The stats of workers that have reported.
    """

    def __init__(
        self, job: Job, ledger: Ledger, payload: Payload, workers: dict[int, Worker]
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._payload = payload
        self._began_ns = monotonic_ns()
        self._workers = workers
        self._at_work: dict[int, Worker] = {}
        self._told: set[int] = set()
        self.stats: list[WorkerStats] = []
        ledger.reset_shares(job.n_workers, len(job.grid))

    def run_usual(self) -> bool:
        """Start the workers and wait until they have reported; return False if one does not."""
        poll = select.poll()
        for number, worker in self._workers.items():
            message = Order(self._payload.data, [], share=self._payload.get_share(number)).pack()
            self._at_work[number] = worker
            worker.is_free = False
            with suppress(BrokenPipeError, ConnectionResetError):  # its end will be seen below
                worker.channel.send(message)
            self._told.add(number)
            poll.register(worker.pidfd, select.POLLIN)
        # The last one is waited for first: then the others have most probably reported, and the
        # caller was woken only once.
        return all(self._wait_for(number, poll) for number in reversed(self._workers))

    def _wait_for(self, number: int, poll: select.poll) -> bool:
        """Wait until a worker has reported; return False if anything else happens."""
        fd = self._workers[number].channel.fileno()
        poll.register(fd, select.POLLIN)
        while number in self._at_work:
            ready = poll.poll(LONGEST_WAIT * 1e3)
            if any(ready_fd != fd for ready_fd, _ in ready):
                return False
            if ready and not self._take_stats(number):
                return False
        poll.unregister(fd)
        return True

    def _take_stats(self, number: int) -> bool:
        """Take the stats of a worker if they have come; return False if something else has."""
        worker = self._at_work[number]
        if not worker.channel.read() or worker.channel.next_kind() not in {b"", STATS}:
            return False
        for data, _ in worker.channel.messages():
            # First, with no call between: even if the rest is interrupted, the worker is free.
            worker.is_free = True
            del self._at_work[number]
            stats = unpickle_stats(data[2:])
            stats.name = worker.name
            self.stats.append(stats)
        return True

    def become_general(self, deliver: Deliver, get_worker: GetWorker) -> GridRun:
        """Return the same run with its workers as they are, for whatever happens."""
        run = GridRun(self._job, self._ledger, deliver, self._payload, get_worker, has_begun=True)
        run.adopt(self._at_work, self._told, self.stats, self._began_ns)
        return run

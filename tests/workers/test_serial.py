"""The executor of the calling thread, and its queue."""

import pytest

from taskcarrier.workers.loop import is_in_worker
from taskcarrier.workers.queues import BatchResult
from taskcarrier.workers.serial import SerialQueue
from tests.helpers import stream_job


class TestSerialQueue:
    def test_a_serial_queue_runs_a_batch_in_the_caller(self):
        queue = SerialQueue(stream_job(lambda item: (item, is_in_worker()), 1))
        assert queue.runs_in_caller
        assert queue.has_room
        queue.put(5, ["a", "b"])
        assert not queue.has_room
        assert queue.get(0) == [BatchResult(5, 7, [("a", True), ("b", True)], 7)]
        assert queue.has_room
        assert queue.get(0) == []
        assert not is_in_worker()

    def test_a_serial_queue_has_stats(self):
        queue = SerialQueue(stream_job(abs, 1))
        for start in range(0, 6, 2):
            queue.put(start, [start, start + 1])
            queue.get(0)
        (stats,) = queue.close().worker_stats
        assert (stats.name, stats.n_ranges, stats.n_items) == ("caller", 3, 6)
        assert stats.busy_ns == 21
        assert queue.ledger.n_items_done(1) == 6

    def test_a_serial_queue_raises_an_exit(self):
        def leave(item):
            raise SystemExit(item)

        queue = SerialQueue(stream_job(leave, 1))
        with pytest.raises(SystemExit):
            queue.put(0, [3])
        assert not is_in_worker()
        queue.close()

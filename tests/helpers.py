"""Tasks that several test modules run."""

import os
import threading

from taskcarrier.workers.queues import BatchResult


class Calls:
    """A task that calls a function with each range; facts are the process and thread name."""

    def __init__(self, call):
        self.call = call

    def start(self, worker):
        worker.facts = os.getpid(), threading.current_thread().name
        return lambda start, stop: self.call.func(start, stop, *self.call.args)


class StreamTask:
    """A task that calls a function with the items of batches."""

    def __init__(self, call):
        self.call = call

    def start(self, worker):
        def run(start, stop):
            first, read = worker.batch
            items = read()[start - first : stop - first]
            return BatchResult(start, stop, [self.call.func(item) for item in items], 7)

        return run

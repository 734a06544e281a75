"""Tasks that several test modules run, and what these are made of."""

import os
import threading

from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call
from taskcarrier.workers.queues import BatchResult
from taskcarrier.workers.task import IN_PLACE, Job

BALANCES = [Static(), Dynamic()]


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


def stream_job(func, n_workers=2, **options):
    """Return the job of a stream that calls a function with each item."""
    task = StreamTask(Call(func))
    return Job(task, Dynamic(), ChunkGrid(0, 1), n_workers, collect_errors=True, **options)


# Functions, which worker processes import


def both(start, stop):
    """Return a range as its own result."""
    return start, stop


def in_place(start, stop):
    """Return what says that the result of a range is in its place."""
    return IN_PLACE


def describe(start, stop):
    """Name a range in messages."""
    return f"<{start}:{stop}>"


def double(x):
    """Return the double of an item or a chunk."""
    return 2 * x


def never(*values):
    """Fail if called."""
    raise AssertionError("called")

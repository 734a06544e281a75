"""Runs with pools of worker processes."""

from contextlib import contextmanager

from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_task
from taskcarrier.workers.processes.pool import ProcessPool
from taskcarrier.workers.task import Job
from tests.helpers import Calls


@contextmanager
def open_pool(n_workers):
    """Make a pool, and end it."""
    made = ProcessPool(n_workers)
    try:
        yield made
    finally:
        made.close()
        # pytest keeps it beyond the watch for leaks; its memory and processes go now.
        vars(made).clear()


def run(
    pool,
    func,
    *args,
    kind=Calls,
    balance=None,
    n_items=20,
    chunksize=2,
    n_workers=2,
    tick=None,
    **others,
):
    """Run a function on each range; return the run, and pairs of a start and a result."""
    delivered = []
    grid = ChunkGrid(n_items, chunksize)
    job = Job(kind(Call(func, args)), balance or Dynamic(), grid, n_workers, **others)
    ran = pool.run(job, pickle_task(job, Staging()), lambda *one: delivered.append(one), tick)
    return ran, delivered

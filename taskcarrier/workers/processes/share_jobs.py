"""Jobs whose data travels with the orders: each worker gets its share of it.

A share is the chunks that static balance gives to one worker. So little is pickled for such a job
that it suits calls which take no longer than to pickle an ordinary one.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import get_balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.call import Call
from taskcarrier.workers.parent_state import ParentState
from taskcarrier.workers.pickling import Payload, TaskPickler, is_sent_by_name, load_call
from taskcarrier.workers.task import Job, ShareTask

STATIC = get_balance("static")


def pack_share_job(job: Job, task: ShareTask, shares: Sequence[bytes]) -> Payload | None:
    """Pickle a job, whose task this is, for workers that each get one of the shares.

    Return None if some of it must be put into shared memory, or is unusual. What pickling the call
    raises is raised as it is.
    """
    state, grid, call = job.parent_state, job.grid, task.call
    if state.errcall is not None:
        return None
    named, pickled = None, b""
    if is_sent_by_name(call.func) and not (call.args or call.kwargs):
        named = call.func
    else:
        pickler = TaskPickler(Staging(job.folder))
        pickled = pickler.pickle_call(call)
        if pickler.segments or pickler.large:
            return None
    numbers = grid.n_items, grid.chunksize, job.n_workers
    packed = type(task), named, pickled, task.arguments, vars(state), numbers, job.folder
    payload = Payload(pickle.dumps(packed, protocol=5), [])
    payload.shares = shares
    return payload


def unpack_share_job(data: bytes, share: bytes) -> Job:
    """Return the job of such a payload, in the worker that gets this share."""
    make_task, named, pickled, arguments, state, numbers, folder = pickle.loads(data)
    call = load_call(pickled, ()) if named is None else Call(named)
    n_items, chunksize, n_workers = numbers
    return Job(
        make_task(call, share, *arguments),
        STATIC,
        ChunkGrid(n_items, chunksize),
        n_workers,
        parent_state=ParentState(**state),
        folder=folder,
    )

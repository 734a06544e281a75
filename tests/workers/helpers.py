"""Tasks and messages on their way to a worker."""

import os

from taskcarrier.memory.staging import Staging
from taskcarrier.system.descriptors import make_owner
from taskcarrier.workers.pickling import pickle_task, unpickle_task

sent = []
"""Payloads of travelled tasks, whose memory goes with them."""


def travelled_task(task):
    """Return a task as it arrives, and the number of bytes copied beside the pickle."""
    staging = Staging()
    payload = pickle_task(task, staging)
    sent.append(payload)
    return unpickle_task(
        payload.data, [make_owner(os.dup(fd)) for fd in payload.fds]
    ), staging.nbytes


def ready(channel, **options):
    """Return the bytes of all whole messages that have come, and whether more may come."""
    open_ = channel.read(**options)
    return [data for data, _ in channel.messages()], open_

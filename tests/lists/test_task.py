"""The tasks of maps over lists, as workers start them."""

import operator

import pytest

from taskcarrier.lists.task import Calls, ListTask, PackedTask, StreamTask
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.grid import list_grid
from taskcarrier.scheduling.retries import DEFAULT_POLICY
from taskcarrier.workers.processes.packed_chunks import PackedChunks, pickle_chunks
from taskcarrier.workers.records import PartialResult
from taskcarrier.workers.task import WorkerContext

ITEMS = [3, 1, 0, 2, 5]


def calls(func, *, collect_errors=False):
    return Calls.from_arguments(
        func,
        DEFAULT_POLICY,
        is_tuple=False,
        collect_errors=collect_errors,
        rng=None,
        shared=None,
    )


def pack(items, chunksize):
    grid = list_grid(len(items), chunksize, 1)
    pickles = pickle_chunks(lambda start, stop: items[start:stop], grid, lambda *_: "items")
    return PackedChunks.from_pickles(pickles, Staging())


@pytest.fixture
def worker():
    return WorkerContext(0, lambda spec: spec)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_range_of_items_gives_a_list_of_results(is_packed, worker):
    negate = calls(operator.neg)
    task = PackedTask(negate, pack(ITEMS, 2), 2) if is_packed else ListTask(negate, ITEMS)
    run_range = task.start(worker)
    assert run_range(0, 2) == [-3, -1]
    assert run_range(3, 4) == [-2]  # a part of a chunk, as after a death


def test_failures_that_are_collected_come_with_the_other_results(worker):
    run_range = ListTask(calls(lambda item: 6 // item, collect_errors=True), ITEMS).start(worker)
    result = run_range(1, 4)
    assert isinstance(result, PartialResult)
    assert result.results == [(slice(1, 4), [6, None, 3])]
    [failure] = result.failures
    assert failure[:2] == (2, 3)
    assert isinstance(failure.error, ZeroDivisionError)


def test_a_batch_that_cannot_be_unpickled_is_a_failure_of_its_range(worker):
    def refuse():
        raise LookupError("no such class")

    worker.batch = 4, refuse
    result = StreamTask(calls(abs)).start(worker)(4, 6)
    [failure] = result.result.failures
    assert failure[:2] == (4, 6)
    assert isinstance(failure.error, LookupError)

"""Queues of worker processes: batches, results, and repaired deaths."""

import functools
import os
import signal
import time

import numpy as np
import pytest

from taskcarrier import WorkerDiedError
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.retries import RetryPolicy
from taskcarrier.workers.call import Call
from taskcarrier.workers.pickling import pickle_task
from taskcarrier.workers.processes import stream_run as module
from taskcarrier.workers.processes import supervisor, worker
from taskcarrier.workers.processes.pool import ProcessPool
from taskcarrier.workers.queues import MAX_BATCHES_PER_WORKER, UnsendableError
from taskcarrier.workers.task import Job
from tests.clocks import LATE, LONG, wait_until
from tests.descriptors import n_descriptors
from tests.helpers import StreamTask, double


@pytest.fixture(scope="module", autouse=True)
def patience():
    """Kill no worker that stops late, unless a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GRACE_SECONDS", LONG)
        yield


def open_queue(pool, func, n_workers=2, **options):
    job = Job(
        StreamTask(Call(func)),
        Dynamic(),
        ChunkGrid(0, 1),
        n_workers,
        collect_errors=True,
        can_split=True,
        **options,
    )
    return pool.stream(job, pickle_task(job, Staging()))


def results(queue, n_items):
    """Return the results of `n_items` items in order, with partial results unchanged."""
    came = []
    while sum(one.stop - one.start for one in came) < n_items:
        came += queue.get(LONG)
    return sorted((one.start, one.stop, one.result) for one in came)


def test_workers_that_have_left_get_no_batches(warm):
    """They leave when another fails, and its error may come after that."""
    queue = open_queue(warm, double)
    queue.ledger.halt()
    queue.put(0, [1])
    queue.put(1, [2])
    deadline = time.monotonic() + LONG
    while queue._supervisor.at_work and time.monotonic() < deadline:
        assert queue.get(0.01) == []
    assert not queue._supervisor.at_work
    assert not queue.has_room
    queue.put(2, [3])
    assert sum(stats.n_items for stats in queue.close().worker_stats) == 0
    queue = open_queue(warm, double)
    queue.put(0, [1])
    assert results(queue, 1) == [(0, 1, [2])]
    queue.close()


def test_results_that_come_too_late_are_not_unpickled(warm, monkeypatch):
    read = []
    monkeypatch.setattr(supervisor, "unpickle_items", lambda *packed: read.append(packed))
    queue = open_queue(warm, double)
    queue.put(0, [1])
    wait_until(lambda: queue.ledger.n_items_done(2) > 0)  # then it has been sent
    assert sum(stats.n_items for stats in queue.close().worker_stats) == 1
    assert read == []


def test_every_queued_batch_gives_its_result(warm):
    queue = open_queue(warm, double)
    for start in range(0, 2 * MAX_BATCHES_PER_WORKER * 3, 3):
        assert queue.has_room
        queue.put(start, range(start, start + 3))
    assert not queue.has_room
    assert results(queue, 12) == [(n, n + 3, [2 * n, 2 * n + 2, 2 * n + 4]) for n in (0, 3, 6, 9)]
    assert queue.has_room
    ran = queue.close()
    assert [stats.n_items for stats in ran.worker_stats] == [6, 6]
    assert not ran.is_halted


def test_the_same_workers_serve_the_next_run(warm):
    pids = []
    for _ in range(3):
        queue = open_queue(warm, lambda _: os.getpid())
        queue.put(0, [0])
        queue.put(1, [0])
        pids.append({result for _, _, (result,) in results(queue, 2)})
        queue.close()
    assert pids[0] == pids[1] == pids[2]
    assert len(pids[0]) == 2


@pytest.mark.parametrize("nbytes", [10, worker._SENT_NBYTES, 5 << 20])
@pytest.mark.parametrize("kind", [bytes, np.ndarray])
def test_items_of_every_size_are_sent(warm, kind, nbytes):
    items = [b"x" * nbytes] if kind is bytes else [np.ones(nbytes, np.uint8)]
    queue = open_queue(warm, lambda item: (len(item), int(item[-1])))
    queue.put(0, items)
    (came,) = queue.get(LONG)
    queue.close()
    assert came.result == [(nbytes, int(items[0][-1]))]
    assert nbytes < came.nbytes < nbytes + 1000


def test_large_items_and_results_are_sent_both_ways_at_once(warm):
    # Neither side may wait for the other to read.
    queue = open_queue(warm, lambda item: item)
    items = [os.urandom(3 << 20) for _ in range(2 * MAX_BATCHES_PER_WORKER)]
    for start, item in enumerate(items):
        queue.put(start, [item])
    assert [result for _, _, (result,) in results(queue, 2 * MAX_BATCHES_PER_WORKER)] == items
    queue.close()


def test_items_that_cannot_be_pickled_are_an_error(warm):
    queue = open_queue(warm, double)
    with pytest.raises(UnsendableError) as caught:
        queue.put(0, [(n for n in range(3))])
    assert isinstance(caught.value.error, TypeError)
    assert any("could not pickle item 0 for" in note for note in caught.value.error.__notes__)
    queue.put(0, [4])
    assert results(queue, 1) == [(0, 1, [8])]
    queue.close()


def wait_for(path):
    wait_until(path.exists)


def test_get_returns_nothing_if_no_result_comes_in_time(warm, tmp_path):
    gate = tmp_path / "gate"
    queue = open_queue(warm, wait_for)
    queue.put(0, [gate])
    assert queue.get(0.05) == []
    gate.touch()
    assert results(queue, 1) == [(0, 1, [None])]
    queue.close()


def once(path):
    """Die the first time."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        return "done"
    raise AssertionError("not dead")


def test_a_batch_whose_worker_died_is_run_again(pool, tmp_path):
    queue = open_queue(pool, once)
    queue.put(0, [str(tmp_path / "0")])
    queue.put(1, [str(tmp_path / "1")])
    assert results(queue, 2) == [(0, 1, ["done"]), (1, 2, ["done"])]
    ran = queue.close()
    assert sorted((death.exitcode, death.range) for death in ran.deaths) == [
        (-9, (0, 1)),
        (-9, (1, 2)),
    ]


def die_at(bad, item):
    if item == bad:
        os._exit(5)
    return item


def test_the_item_that_kills_is_found_in_a_batch(pool):
    queue = open_queue(pool, lambda item: die_at(5, item), retry_policy=RetryPolicy(retries=1))
    queue.put(0, range(8))
    queue.put(8, range(8, 12))
    came = results(queue, 12)
    deaths = queue.close().deaths
    (failure,) = [result for _, _, result in came if not isinstance(result, list)]
    ((start, stop, error),) = failure.failures
    assert (start, stop, error.exitcode) == (5, 6, 5)
    right = [item for _, _, result in came if isinstance(result, list) for item in result]
    assert sorted(right) == [n for n in range(12) if n != 5]
    # Twice as it was, then 4:6, then 5.
    assert [death.range for death in deaths] == [(0, 8), (0, 8), (4, 6), (5, 6)]


def test_batches_that_were_not_begun_are_not_to_blame(pool):
    queue = open_queue(pool, lambda item: die_at(0, item), 1, retry_policy=RetryPolicy(retries=0))
    queue.put(0, [0])
    queue.put(1, [1])
    came = results(queue, 2)
    queue.close()
    assert came[1] == (1, 2, [1])
    assert came[0][2].failures[0][2].in_hand == (0, 1)


def test_a_worker_that_dies_while_idle_is_replaced(pool):
    queue = open_queue(pool, lambda item: (item, os.getpid()))
    queue.put(0, [0])
    ((_, _, ((_, pid),)),) = results(queue, 1)
    os.kill(pid, signal.SIGKILL)
    queue.get(0.2)
    for start in range(1, 4):
        queue.put(start, [start])
    assert [result[0][0] for _, _, result in results(queue, 3)] == [1, 2, 3]
    assert len(queue.close().deaths) == 1


def dies_behind(gate, item):
    (gate / "begun").touch()
    wait_for(gate / "open")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_may_die_before_it_has_told_why_all_stop(pool, tmp_path):
    queue = open_queue(pool, functools.partial(dies_behind, tmp_path), 1)
    queue.put(0, [0])
    wait_for(tmp_path / "begun")
    queue.ledger.halt()  # as a worker does that ends by an exit
    (tmp_path / "open").touch()
    with pytest.raises(WorkerDiedError, match="item 0"):
        queue.get(LONG)
    queue.close()


def test_a_range_that_takes_too_long_is_an_error(pool):
    queue = open_queue(pool, time.sleep, 1, retry_policy=RetryPolicy(timeout=LATE))
    queue.put(0, [LONG])
    queue.put(1, [0])
    came = results(queue, 2)
    ran = queue.close()
    assert came[1] == (1, 2, [None])
    assert isinstance(came[0][2].failures[0][2], TimeoutError)
    assert [death.was_late for death in ran.deaths] == [True]


def called_with(item, log):
    path, is_long = item
    with log.open("a") as file:
        file.write(f"{path}\n")
    if is_long:
        time.sleep(LONG)


def test_a_range_is_late_though_earlier_results_are_not_taken(pool, tmp_path):
    log = tmp_path / "calls"
    retry_policy = RetryPolicy(timeout=LATE, retries=0)
    queue = open_queue(pool, lambda item: called_with(item, log), 1, retry_policy=retry_policy)
    queue.put(0, [("short", False)])
    queue.put(1, [("long", True)])
    wait_until(lambda: log.exists() and "long" in log.read_text())
    queue.ledger.set_start_time(0, time.monotonic_ns() - LONG * 10**9)
    came = results(queue, 2)
    assert came[0] == (0, 1, [None])
    assert isinstance(came[1][2].failures[0][2], TimeoutError)
    assert [(death.range, death.was_late) for death in queue.close().deaths] == [((1, 2), True)]
    assert log.read_text().split() == ["short", "long"]


def test_a_queue_may_be_closed_with_batches_in_hand(pool, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    queue = open_queue(pool, time.sleep)
    for start in range(4):
        queue.put(start, [LONG])
    began = time.monotonic()
    ran = queue.close()
    assert time.monotonic() - began < LONG / 2
    assert ran.is_halted
    queue = open_queue(pool, double)
    queue.put(0, [1])
    assert results(queue, 1) == [(0, 1, [2])]
    queue.close()


def test_workers_may_still_be_starting_when_all_is_done(pool, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0)
    queue = open_queue(pool, double)
    queue.put(0, [1])
    results(queue, 1)
    os.kill(dead := pool._workers[0].pid, signal.SIGKILL)
    while pool._workers[0].pid == dead:
        assert queue.get(0.1) == []
    ran = queue.close()  # another has taken its place
    assert [(stats.worker, stats.n_items) for stats in ran.worker_stats] == [(0, 1), (0, 0)]
    assert pool._workers[0].is_alive


def test_another_worker_starts_when_all_have_a_batch(tmp_path):
    pool = ProcessPool(500)
    try:
        queue = open_queue(pool, waits_for, 500)
        for start in range(2):
            assert len(pool._workers) == start
            queue.put(start, [str(tmp_path / "open")])
        assert len(pool._workers) == 2
        (tmp_path / "open").touch()
        results(queue, 2)
        for start in range(2, 6):
            queue.put(start, [str(tmp_path / "open")])
            results(queue, 1)
        assert len(pool._workers) == 2
        assert [stats.worker for stats in queue.close().worker_stats] == [0, 1]
    finally:
        pool.close()
        vars(pool).clear()


def waits_for(path):
    while not os.path.exists(path):  # noqa: PTH110  # the path is a plain string
        time.sleep(0.01)


def test_the_number_of_descriptors_stays_constant(warm):
    counts = []
    for _ in range(3):
        queue = open_queue(warm, lambda item: item)
        for start in range(4):
            queue.put(start, [np.zeros(100_000)])
        results(queue, 4)
        queue.close()
        counts.append(n_descriptors())
    assert counts[0] == counts[1] == counts[2]

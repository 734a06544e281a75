"""Executors: one contract for the caller, threads, processes and joblib's backends."""

import pytest

import taskcarrier
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic, Serial, Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import OWN_MARKS
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import ProcessExecutor, ThreadExecutor
from taskcarrier.workers.executors import make_executor
from taskcarrier.workers.joblib_backends import JoblibExecutor
from taskcarrier.workers.pools import _pools
from taskcarrier.workers.queues import UnsendableError
from taskcarrier.workers.serial import SerialExecutor
from taskcarrier.workers.task import Job
from tests.clocks import LONG
from tests.helpers import Calls, StreamTask, both, double
from tests.strategies import keep_pools_warm

pools = keep_pools_warm(2)

OURS = {"sequential": 1, "threading": 2, "loky": 2}


def executor_of(backend, timeout=None):
    return make_executor(Choice(backend, OURS.get(backend, 2), "a test"), None, Staging, timeout)


@pytest.mark.parametrize("backend", OURS)
class TestContract:
    def test_a_run_delivers_the_result_of_every_chunk(self, backend):
        executor = executor_of(backend)
        delivered = {}
        balance = executor.balance or Static()
        job = Job(Calls(Call(both)), balance, ChunkGrid(20, 3), OURS[backend])
        result = executor.run(job, delivered.__setitem__, None)
        assert delivered == {start: (start, min(start + 3, 20)) for start in range(0, 20, 3)}
        assert sum(stats.n_items for stats in result.worker_stats) == 20
        assert not result.failures
        assert not result.missing

    def test_the_progress_of_a_run_is_told_to_its_end(self, backend):
        executor = executor_of(backend)
        seen = []
        job = Job(Calls(Call(both)), executor.balance or Dynamic(), ChunkGrid(20, 3), OURS[backend])
        executor.run(
            job, lambda *_: None, lambda ledger: seen.append(ledger.n_items_done(OURS[backend]))
        )
        assert seen[-1] == 20
        assert seen == sorted(seen)

    def test_a_stream_gives_one_result_for_every_batch(self, backend):
        executor = executor_of(backend)
        job = Job(
            StreamTask(Call(double)),
            Dynamic(),
            ChunkGrid(0, 1),
            OURS[backend],
            collect_errors=True,
            can_split=True,
        )
        with executor.stream(job) as queue:
            results = []
            for start in range(0, 6, 2):
                assert queue.has_room
                queue.put(start, [start, start + 1])
                results += queue.get(LONG)
            while len(results) < 3:
                results += queue.get(LONG)
            result = queue.close()
        assert sorted((one.start, one.result) for one in results) == [
            (0, [0, 2]),
            (2, [4, 6]),
            (4, [8, 10]),
        ]
        assert sum(stats.n_items for stats in result.worker_stats) == 6

    def test_workers_need_copies_only_where_they_share_no_memory(self, backend):
        executor = executor_of(backend)
        assert (executor.staging is None) is (backend != "loky")
        assert executor.runs_in_caller is (backend == "sequential")
        assert executor.can_run_compiled is (backend == "threading")


def test_a_choice_gets_the_executor_of_its_backend():
    kinds = {"sequential": SerialExecutor, "threading": ThreadExecutor, "loky": ProcessExecutor}
    for backend, kind in kinds.items():
        assert type(executor_of(backend)) is kind


def test_a_run_in_the_caller_has_one_balance():
    assert executor_of("sequential").balance == Serial()
    assert list(Serial().plan(0, 1, 7)) == list(range(7))


def test_more_chunks_than_a_pool_has_marks_for_get_memory_of_their_own():
    executor = executor_of("loky")
    n_chunks = OWN_MARKS + 10
    job = Job(Calls(Call(count)), Static(), ChunkGrid(n_chunks, 1), 2)
    total = []
    result = executor.run(job, lambda _, n: total.append(n), None)
    assert sum(total) == n_chunks
    assert not result.missing


def count(start, stop):
    return stop - start


def test_the_notes_of_a_payload_are_the_executors():
    executor = executor_of("loky")
    job = Job(Calls(Call(both)), Static(), ChunkGrid(4, 1), 2)
    assert executor.notes == ()
    executor.run(job, lambda *_: None, None)
    assert isinstance(executor.notes, list)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_items_that_cannot_be_sent_are_refused_before_they_run(backend):
    executor = executor_of(backend)
    job = Job(
        StreamTask(Call(type)), Dynamic(), ChunkGrid(0, 1), 2, collect_errors=True, can_split=True
    )
    unsendable = (_ for _ in ())
    with executor.stream(job) as queue:
        if backend == "loky":
            with pytest.raises(UnsendableError):
                queue.put(0, [unsendable])
        else:
            queue.put(0, [unsendable])
            (result,) = queue.get(LONG)
            assert result.result == [type(unsendable)]
        queue.close()


class TestJoblib:
    def test_a_timeout_is_refused(self):
        with pytest.raises(
            ValueError, match="timeout= cannot be kept on backend='multiprocessing'"
        ):
            make_executor(Choice("multiprocessing", 2, "a test"), "multiprocessing", Staging, 1.0)

    def test_streams_are_refused(self):
        executor = make_executor(
            Choice("multiprocessing", 2, "a test"), "multiprocessing", Staging, None
        )
        assert type(executor) is JoblibExecutor
        job = Job(StreamTask(Call(double)), Dynamic(), ChunkGrid(0, 1), 2)
        with pytest.raises(ValueError, match="imap cannot use backend 'multiprocessing'"):
            executor.stream(job)


@pytest.mark.one_case
def test_the_fork_server_starts_as_soon_as_the_job_is_packed():
    taskcarrier.shutdown()
    executor = ProcessExecutor(Choice("loky", 2, "a test"), Staging())
    job = Job(Calls(Call(both)), Static(), ChunkGrid(2, 1), 2)
    for _ in range(2):  # no pool is made while another is free
        executor.pack(job)
    [place] = _pools._places
    server = place.pool._starter._server
    assert server.is_usable
    assert not place.pool._workers
    delivered = {}
    executor.run(job, delivered.__setitem__, None)
    assert delivered == {0: (0, 1), 1: (1, 2)}
    assert place.pool._starter._server is server

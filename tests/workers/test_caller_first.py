"""Runs that begin in the caller, and what becomes of the rest."""

import contextvars
import functools
import os
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import joblib
import numpy as np
import pytest

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
)
from taskcarrier.arrays.move import ArrayMove
from taskcarrier.errors import WorkerDiedError
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers import caller_chunks, hand_overs
from taskcarrier.workers.call import Call
from taskcarrier.workers.caller_chunks import CallerChunks
from taskcarrier.workers.caller_first import CallerFirstExecutor
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.hand_overs import ProcessHandOver
from taskcarrier.workers.task import Job
from tests.clocks import LONG, wait_until
from tests.helpers import Calls
from tests.interrupted import interrupted_at
from tests.strategies import keep_pools_warm

X = np.arange(24.0)
FIND_ALONE_SECONDS, PAYS = history.find_alone_seconds, CallerChunks._pays
pools = keep_pools_warm(2)


@pytest.fixture
def hand_over_in_chunk(monkeypatch):
    """Have the rest handed over while the caller is in a chunk."""
    monkeypatch.setattr(hand_overs, "has_warm_processes", lambda n: True)
    monkeypatch.setattr(history, "predict", lambda *_: None)
    monkeypatch.setattr(history, "find_alone_seconds", lambda *_: 0.0)
    monkeypatch.setattr(CallerChunks, "_pays", lambda self, first: False)
    monkeypatch.setattr(CallerChunks, "_find_seconds_to_wait", lambda self: 0.0)


@pytest.fixture(params=["static", "dynamic"])
def options(request):
    return {"n_jobs": 2, "balance": request.param}


def double(chunk):
    return 2 * chunk


def chunks_of_caller():
    report = last_report()
    (caller,) = [worker for worker in report.workers if worker.name == "caller"]
    return caller.ranges


class TestBetweenChunks:
    @pytest.mark.parametrize("k", [1, 2, 5, 11])
    def test_the_rest_goes_to_processes(self, hand_over_after, options, k):
        hand_over_after(k)
        assert (map_array(double, X, chunksize=2, **options) == 2 * X).all()
        report = last_report()
        assert (report.backend, report.n_jobs, report.balance) == ("loky", 2, options["balance"])
        assert [worker.name.split()[0] for worker in report.workers] == [
            "caller",
            "process",
            "process",
        ]
        assert chunks_of_caller() == k
        assert sum(worker.items for worker in report.workers) == 24
        assert "items were handed over to processes" in report.reason

    @pytest.mark.parametrize("k", [1, 5])
    def test_the_rest_goes_to_threads_of_which_the_caller_is_one(self, hand_over_after, options, k):
        hand_over_after(k)
        assert (map_array(np.negative, X, chunksize=2, **options) == -X).all()
        report = last_report()
        assert (report.backend, report.n_jobs) == ("threading", 2)
        assert [worker.name for worker in report.workers] == ["caller", "thread 1"]
        assert chunks_of_caller() >= k
        assert sum(worker.items for worker in report.workers) == 24

    def test_under_static_balance_each_has_an_equal_part_of_the_rest(self, hand_over_after):
        hand_over_after(4)
        map_array(np.negative, X, chunksize=2, n_jobs=2)
        assert [worker.ranges for worker in last_report().workers] == [8, 4]

    def test_a_run_that_is_not_handed_over_has_one_worker(self, hand_over_after, options):
        hand_over_after(100)
        map_array(double, X, chunksize=2, **options)
        report = last_report()
        assert (report.backend, report.n_jobs, report.balance) == ("sequential", 1, "serial")
        assert [worker.name for worker in report.workers] == ["caller"]
        assert "workers would have saved nothing" in report.reason

    @pytest.mark.parametrize("k", [1, 3])
    def test_results_go_where_they_are_asked_for(self, hand_over_after, options, k, tmp_path):
        hand_over_after(k)
        options["chunksize"] = 5
        ours, shared = np.zeros(24), taskcarrier.empty(24)
        for out in (ours, shared, ours[::-1]):
            assert map_array(double, X, out=out, **options) is out
            assert (out == 2 * X).all()
            out[:] = 0
        path = tmp_path / "out.npy"
        map_array(double, X, out=path, **options)
        assert (np.load(path) == 2 * X).all()
        two = map_array(lambda chunk: (chunk, chunk), X, out=(ours, shared), **options)
        assert two == (ours, shared)
        assert (ours == X).all()
        assert (shared == X).all()

    @pytest.mark.parametrize("k", [1, 3])
    def test_results_of_any_kind_are_those_of_the_caller_alone(self, hand_over_after, options, k):
        options["chunksize"] = 5
        table = np.arange(48.0).reshape(2, 24)
        cases = [
            (map_array, lambda chunk: chunk.T, table, {"axis": 1, "out_axis": 0}),
            (map_array, lambda chunk: (chunk, chunk.astype(int)), X, {}),
            (map_array, lambda chunk: chunk.astype(object), X, {}),
            (map_array, np.cumsum, X, {"depth": 2, "boundary": "reflect"}),
            (map_array, lambda chunk, rng: chunk + rng.random(len(chunk)), X, {"rng": 3}),
            (map_items, lambda item: int(item) if item < 9 else item, X, {}),
            (map_items, lambda item: str(int(item)), X, {}),
            (map_items, lambda item, rng: item + rng.random(), X, {"rng": 3}),
            (map_chunks, np.sum, X, {}),
            (reduce_array, np.sum, X, {"combine": np.add}),
        ]
        for verb, func, array, more in cases:
            hand_over_after(k)
            ours = verb(func, array, **options, **more)
            assert last_report().backend == "loky"
            expected = verb(func, array, **{**options, **more, "n_jobs": 1})
            np.testing.assert_equal(ours, expected)
            if isinstance(ours, np.ndarray):
                assert ours.dtype == expected.dtype

    def test_the_order_of_dtypes_makes_no_difference(self, hand_over_after):
        hand_over_after(1)
        result = map_items(lambda item: int(item) if item < 12 else item, X, n_jobs=2, chunksize=12)
        assert result.dtype == float
        assert (result == X).all()

    def test_errors_are_collected_on_both_sides(self, hand_over_after, options):
        def func(item):
            if item in {1, 20}:
                raise ZeroDivisionError(item)
            return item

        hand_over_after(2)
        result, failed = map_items(func, X, on_error="collect", chunksize=3, **options)
        assert [(one.start, one.stop) for one in failed] == [(1, 2), (20, 21)]
        assert np.flatnonzero(np.isnan(result)).tolist() == [1, 20]

    def test_resumed_maps_leave_out_what_was_done(self, hand_over_after, options, tmp_path):
        def func(chunk):
            if chunk[0] == 14 and not flag.exists():
                raise ZeroDivisionError
            return 2 * chunk

        path, flag = tmp_path / "out.npy", tmp_path / "flag"
        more = {"out": path, "resume": True, "chunksize": 2, **options}
        hand_over_after(2)
        with pytest.raises(ZeroDivisionError):
            map_array(func, X, **more)
        flag.touch()
        map_array(func, X, **more)
        assert (np.load(path) == 2 * X).all()
        assert any("done by an earlier run" in note for note in last_report().notes)

    def test_compiled_loops_are_handed_over_to_threads(self, hand_over_after, options):
        numba = pytest.importorskip("numba", reason="only tests of kernels need numba")
        kernel = numba.njit(nogil=True)(lambda item: item * 2)
        hand_over_after(2)
        assert (map_items(kernel, X, chunksize=3, **options) == 2 * X).all()
        assert [worker.name for worker in last_report().workers] == [
            "caller",
            "thread 0",
            "thread 1",
        ]
        assert sum(worker.items for worker in last_report().workers) == 24


class TestState:
    @pytest.mark.fault(55)
    def test_workers_get_the_function_as_it_was_before_the_first_chunk(self, hand_over_after):
        rng = np.random.default_rng(0)
        n_calls = [0]

        def func(chunk):
            n_calls[0] += 1
            return np.full(len(chunk), n_calls[0]), rng.random(len(chunk))

        expected = np.random.default_rng(0).random(8)
        hand_over_after(3)
        counts, numbers = map_array(func, X[:14], chunksize=2, n_jobs=2)
        assert counts[::2].tolist() == [1, 2, 3, 1, 2, 1, 2]
        assert n_calls == [3]
        np.testing.assert_equal(numbers[:6], expected[:6])
        np.testing.assert_equal(numbers[6:10], expected[:4])
        np.testing.assert_equal(numbers[10:], expected[:4])

    def test_what_it_writes_to_shared_arrays_is_seen_by_all(self, hand_over_after, options):
        seen = taskcarrier.empty(24)
        seen[:] = 0

        def func(chunk):
            seen[int(chunk[0])] = os.getpid()
            return chunk

        hand_over_after(3)
        map_array(func, X, chunksize=2, **options)
        pids = seen[::2].tolist()
        assert pids[:3] == [os.getpid()] * 3
        assert os.getpid() not in pids[3:]
        assert 0 not in pids

    @pytest.mark.fault(55)
    def test_arguments_arrive_as_they_were(self, hand_over_after):
        log = []

        def func(chunk, log):
            log.append(1)
            return np.full(len(chunk), len(log))

        hand_over_after(2)
        result = map_array(func, X[:8], args=(log,), chunksize=2, n_jobs=2)
        assert result[::2].tolist() == [1, 2, 1, 1]


class TestFailures:
    @pytest.mark.parametrize("bad", [0, 2, 4, 23])
    def test_an_error_names_its_range_on_both_sides(self, hand_over_after, options, bad):
        def func(chunk):
            return 1 // int((chunk - bad).all()) * chunk

        hand_over_after(2)
        with pytest.raises(ZeroDivisionError) as caught:
            map_array(func, X, chunksize=2, **options)
        first = bad // 2 * 2
        assert f"items {first}:{first + 2}" in caught.value.__notes__[0]
        where = "caller" if bad < 4 else "process"
        assert f"({where}" in caught.value.__notes__[0]

    @pytest.mark.fault(54)
    def test_a_function_that_cannot_be_pickled_is_finished_in_the_caller(self, hand_over_after):
        lock = threading.Lock()
        hand_over_after(2)
        with pytest.warns(UserWarning, match=r"cannot pickle '_thread.lock'.*caller") as caught:
            result = map_array(lambda chunk: chunk if lock else None, X, chunksize=2, n_jobs=2)
        assert len(caught) == 1
        assert (result == X).all()
        report = last_report()
        assert report.backend == "sequential"
        assert "could not be handed over" in report.reason
        assert "lock" in report.notes[0]

    @pytest.mark.fault(54)
    def test_a_function_that_workers_cannot_unpickle_is_finished_in_the_caller(
        self, hand_over_after, tmp_path, monkeypatch
    ):
        (tmp_path / "only_here.py").write_text(
            f"import os\nassert os.getpid() == {os.getpid()}\ndef func(chunk): return chunk\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import only_here  # just written

        taskcarrier.shutdown()  # new workers have this path
        hand_over_after(2)
        with pytest.warns(UserWarning, match=r"AssertionError.*caller"):
            assert (map_array(only_here.func, X, chunksize=2, n_jobs=2) == X).all()
        del sys.modules["only_here"]

    @pytest.mark.fault(54)
    def test_what_could_not_be_handed_over_is_left_alone_for_a_while(
        self, hand_over_after, monkeypatch
    ):
        lock = threading.Lock()

        def func(chunk):
            with lock:
                return 2 * chunk

        hand_over_after(1)
        with pytest.warns(UserWarning, match="could not be handed over"):
            map_array(func, X, chunksize=2, n_jobs=2)
        monkeypatch.setattr(history, "find_alone_seconds", FIND_ALONE_SECONDS)
        monkeypatch.setattr(CallerChunks, "_pays", PAYS)
        monkeypatch.setattr(CallerChunks, "_find_seconds_to_wait", lambda self: LONG)
        for _ in range(3):
            assert (map_array(func, X, chunksize=2, n_jobs=2) == 2 * X).all()
            assert "the rest of an earlier call could not be handed over" in last_report().reason

    def test_nobody_is_warned_of_what_need_not_be_sent(self, hand_over_after):
        lock = threading.Lock()
        hand_over_after(100)
        assert (map_array(lambda chunk: chunk if lock else None, X, n_jobs=2) == X).all()

    @pytest.mark.parametrize("k", [1, 5])
    def test_without_room_for_the_results_the_caller_goes_on(self, hand_over_after, monkeypatch, k):
        def refuse(self, items, proposal, agreed):
            raise OSError("no room")

        hand_over_after(k)
        monkeypatch.setattr(ArrayMove, "carry", refuse)
        with pytest.warns(UserWarning, match="no room"):
            assert (map_array(double, X, chunksize=2, n_jobs=2) == 2 * X).all()
        assert last_report().backend == "sequential"
        monkeypatch.undo()
        assert (map_array(double, X, chunksize=2, n_jobs=2, backend="loky") == 2 * X).all()

    def test_a_death_after_the_hand_over_is_made_good(self, hand_over_after, options, tmp_path):
        flag = tmp_path / "died"

        def func(chunk):
            if chunk[0] == 12 and not flag.exists():
                flag.touch()
                os._exit(3)
            return chunk

        hand_over_after(2)
        assert (map_array(func, X, chunksize=2, **options) == X).all()
        assert any("exit" in note for note in last_report().notes)

    def test_deaths_without_end_are_an_error_that_has_what_was_finished(self, hand_over_after):
        def func(chunk):
            if chunk[0] == 12:
                os._exit(3)
            return chunk

        hand_over_after(2)
        with pytest.raises(WorkerDiedError, match="items 12:14") as caught:
            map_array(func, X, chunksize=2, n_jobs=2, retries=0)
        assert (caught.value.partial[:4] == X[:4]).all()
        assert (12, 14) in caught.value.missing

    @pytest.mark.parametrize("func", [double, np.negative])
    def test_the_next_call_finds_everything_in_order_after_an_interrupt(
        self, hand_over_after, func, monkeypatch
    ):
        calls = []

        def interrupt(self, caller, own, tick):
            calls.append(1)
            raise KeyboardInterrupt

        hand_over_after(1)
        for kind in (hand_overs.ThreadHandOver, hand_overs.ProcessHandOver):
            monkeypatch.setattr(kind, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            map_array(func, X, chunksize=2, n_jobs=2)
        assert calls == [1]
        monkeypatch.undo()
        expected = func(X)
        assert (map_array(func, X, chunksize=2, n_jobs=2) == expected).all()
        for backend in ("threading", "loky"):
            assert (map_array(func, X, chunksize=2, n_jobs=2, backend=backend) == expected).all()

    def test_an_interrupt_does_not_wait_for_other_threads(self, hand_over_after):
        begun, go_on = threading.Event(), threading.Event()

        def func(start, stop):
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                assert go_on.wait(LONG)
            elif start >= 2:
                assert begun.wait(LONG)
                raise KeyboardInterrupt

        hand_over_after(1)
        executor = CallerFirstExecutor(Choice("threading", 2, "", begins_in_caller=True))
        job = Job(Calls(Call(func)), Dynamic(), ChunkGrid(8, 2), 2)
        result = executor.run(job, lambda *_: None, None)
        go_on.set()
        (caller,) = result.worker_stats
        assert isinstance(caller.failure.error, KeyboardInterrupt)
        assert caller.failure.range[0] >= 2


class Gate:
    """A function that stays in its first chunk until another thread or process runs a chunk."""

    def __init__(self, held=0.0):
        self.held = held
        self.seen = taskcarrier.empty(24)
        self.seen[:] = 0

    def __call__(self, chunk):
        self.seen[int(chunk[0])] = 1
        if chunk[0] == self.held:
            others = self.seen[int(self.held) + 1 :]
            wait_until(others.any)
        return 2 * chunk


@pytest.mark.usefixtures("hand_over_in_chunk")
class TestInChunk:
    @pytest.mark.fault(56)
    @pytest.mark.parametrize("held", [0.0, 4.0])
    def test_help_comes_while_the_caller_is_in_a_chunk(self, options, held):
        result = map_array(Gate(held), X, chunksize=2, **options)
        assert (result == 2 * X).all()
        assert last_report().backend == "loky"
        assert chunks_of_caller() <= held // 2 + 1

    @pytest.mark.parametrize("dtypes", [(int, int), (int, float), (float, int)])
    def test_the_first_result_of_the_caller_may_come_last(self, dtypes, options):
        gate = Gate()

        def func(chunk):
            gate(chunk)
            return chunk.astype(dtypes[int(chunk[0] > 0)])

        if dtypes[0] is dtypes[1]:
            result = map_array(func, X, chunksize=2, **options)
            assert result.dtype == dtypes[0]
            assert (result == X).all()
        else:
            with pytest.raises(ValueError, match="same dtype") as caught:
                map_array(func, X, chunksize=2, **options)
            assert "for items 0:2" in str(caught.value)

    def test_dtypes_promote_whoever_comes_first(self, options):
        gate = Gate()

        def func(item):
            gate(np.array([item]))
            return int(item) if item < 2 else float(item)

        result = map_items(func, X, chunksize=2, **options)
        assert result.dtype == float
        assert (result == X).all()

    def test_objects_and_chunks_come_from_both(self, options):
        gate = Gate()
        results = map_chunks(lambda chunk: str(gate(chunk)[0]), X, chunksize=2, **options)
        assert results == [str(2 * value) for value in X[::2]]
        gate.seen[:] = 0
        objects = map_array(lambda chunk: gate(chunk).astype(object), X, chunksize=2, **options)
        assert objects.tolist() == (2 * X).tolist()

    def test_an_error_of_the_caller_ends_the_run(self, options):
        gate = Gate()

        def func(chunk):
            gate(chunk)
            return 1 // int(chunk.sum() > 1) * chunk

        with pytest.raises(ZeroDivisionError) as caught:
            map_array(func, X, chunksize=2, **options)
        assert "(caller" in caught.value.__notes__[0]

    @pytest.mark.fault(27)
    def test_a_chunk_in_which_the_caller_fails_is_run_again_when_the_map_is_resumed(
        self, options, tmp_path
    ):
        def func(chunk):
            if os.getpid() != caller:
                helped.touch()
            elif chunk[0] >= 4 and not failed.exists():
                wait_until(helped.exists)
                failed.touch()
                raise ZeroDivisionError
            return 2 * chunk

        caller, helped, failed = os.getpid(), tmp_path / "helped", tmp_path / "failed"
        more = {"out": tmp_path / "out.npy", "resume": True, "chunksize": 2, **options}
        with pytest.raises(ZeroDivisionError):
            map_array(func, X, **more)
        map_array(func, X, **more)
        assert (np.load(tmp_path / "out.npy") == 2 * X).all()

    def test_results_come_while_the_caller_is_in_a_chunk_however_large(self):
        lengths = taskcarrier.empty(24)
        lengths[:] = 0

        def func(item):
            lengths[int(item[0])] = 1
            if item[0] == 0:  # until all others are done, and their results have been sent
                wait_until(lengths[1:].all)
            return b"." * 100_000

        results = DynamicParallelMapper(n_jobs=2).map(func, [np.array([v]) for v in X])
        assert [len(one) for one in results] == [100_000] * 24
        assert chunks_of_caller() == 1

    def test_a_worker_that_dies_meanwhile_is_replaced(self, tmp_path):
        seen = taskcarrier.empty(24)
        seen[:] = 0
        flag = tmp_path / "flag"

        def func(item):
            if item == 0:
                seen[0] = 1
                wait_until(seen.all)
            elif item == 3 and not flag.exists():
                flag.touch()
                os._exit(3)
            seen[int(item)] = 1
            return item

        results = DynamicParallelMapper(n_jobs=2).map(func, list(X))
        assert results == list(X)
        assert chunks_of_caller() == 1

    def test_an_interrupt_of_the_caller_leaves_nothing_behind(self, options):
        gate = Gate()

        def func(chunk):
            gate(chunk)
            if chunk[0] == 0:
                raise KeyboardInterrupt
            return chunk

        with pytest.raises(KeyboardInterrupt):
            map_array(func, X, chunksize=2, **options)
        assert (map_array(double, X, chunksize=2, backend="loky", n_jobs=2) == 2 * X).all()

    def test_items_of_lists_are_run_by_others_meanwhile(self):
        for kind in (StaticParallelMapper, DynamicParallelMapper):
            gate = Gate()
            items = [np.array([value]) for value in X]
            results = kind(n_jobs=2).map(gate, items)
            assert [float(value[0]) for value in results] == (2 * X).tolist()
            assert last_report().backend == "loky"
            assert chunks_of_caller() == 1

    @pytest.mark.fault(56)
    def test_a_few_objects_are_pickled_before_the_first_chunk(self):
        gate = Gate()
        boxes = [Box(value) for value in X[:8]]
        results = StaticParallelMapper(n_jobs=2).map(lambda box: box.open(gate), boxes)
        assert results == (2 * X[:8]).tolist()
        assert last_report().backend == "loky"
        assert {box.pickled_by for box in boxes[1:]} == {threading.get_ident()}

    def test_threads_that_the_watcher_starts_see_the_context_of_the_caller(
        self, options, monkeypatch
    ):
        monkeypatch.setattr("taskcarrier.run.releases_gil", lambda func: True)
        word = contextvars.ContextVar("word", default="before")
        gate, seen = Gate(), []

        def func(chunk):
            gate(chunk)
            seen.append((word.get(), threading.get_ident()))
            return chunk

        def call():
            word.set("mine")
            return map_array(func, X, chunksize=2, **options)

        contextvars.copy_context().run(call)
        assert last_report().backend == "threading"
        assert {text for text, _ in seen} == {"mine"}
        assert len({thread for _, thread in seen}) == 2


class Box:
    """An item that records which thread has pickled it."""

    pickled_by = None

    def __init__(self, value):
        self.value = value

    def __getstate__(self):
        self.pickled_by = threading.get_ident()
        return {"value": self.value}

    def open(self, gate):
        return float(gate(np.array([self.value]))[0])


class TestSlowStart:
    @pytest.mark.fault(57)
    @pytest.mark.fault(11)
    def test_a_worker_that_dies_before_it_begins_is_replaced(
        self, hand_over_after, tmp_path, monkeypatch
    ):
        flag = tmp_path / "flag"
        (tmp_path / "dies_once.py").write_text(
            "import os, pathlib\n"
            f"flag = pathlib.Path({str(flag)!r})\n"
            f"if os.getpid() != {os.getpid()} and not flag.exists():\n"
            "    flag.touch()\n"
            "    os._exit(3)\n"
            "def func(chunk): return 2 * chunk\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import dies_once  # just written

        taskcarrier.shutdown()  # as above
        hand_over_after(1)
        assert (map_array(dies_once.func, X, chunksize=2, n_jobs=2) == 2 * X).all()
        assert last_report().backend == "loky"
        assert any("exit" in note for note in last_report().notes)
        del sys.modules["dies_once"]

    def test_the_caller_goes_on_while_workers_import_the_function(
        self, hand_over_after, tmp_path, monkeypatch
    ):
        # The module waits, in workers, until the caller has come to its tenth chunk.
        flag = tmp_path / "flag"
        (tmp_path / "slow_to_import.py").write_text(
            "import os, pathlib, time\n"
            f"flag = pathlib.Path({str(flag)!r})\n"
            f"while os.getpid() != {os.getpid()} and not flag.exists(): time.sleep(0.01)\n"
            "def func(chunk):\n"
            f"    if os.getpid() == {os.getpid()} and chunk[0] == 18: flag.touch()\n"
            "    return 2 * chunk\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import slow_to_import  # just written

        taskcarrier.shutdown()  # as above
        hand_over_after(1)
        monkeypatch.setattr(caller_chunks, "_READY_SECONDS", 0.0)
        many = np.arange(400.0)
        result = map_array(slow_to_import.func, many, chunksize=2, n_jobs=2)
        assert (result == 2 * many).all()
        del sys.modules["slow_to_import"]
        report = last_report()
        assert report.backend == "sequential" or chunks_of_caller() >= 10

    def test_cold_processes_are_started_beside_the_caller(self, monkeypatch):
        taskcarrier.shutdown()
        monkeypatch.setattr(CallerChunks, "_pays", lambda self, first: True)
        threads, caller = [], os.getpid()

        def func(chunk):
            threads.append(threading.get_ident())
            if os.getpid() == caller:
                time.sleep(0.01)
            return chunk

        many = np.arange(LONG * 100.0)
        result = map_array(func, many, chunksize=1, n_jobs=2)
        assert (result == many).all()
        assert set(threads) == {threading.get_ident()}
        assert last_report().backend == "loky"


class TestWhoBegins:
    def test_explicit_backends_and_configurations_do_not_begin_in_the_caller(self):
        map_array(double, X, n_jobs=2, backend="loky")
        assert "caller" not in [worker.name for worker in last_report().workers]
        with joblib.parallel_config(backend="threading", n_jobs=2):
            map_array(double, X)
        assert [worker.name for worker in last_report().workers] == ["thread 0", "thread 1"]

    def test_with_a_timeout_workers_begin(self):
        map_array(double, X, n_jobs=2, timeout=LONG)
        report = last_report()
        assert report.backend == "loky"
        assert "caller" not in [worker.name for worker in report.workers]

    @pytest.mark.fault(53)
    @pytest.mark.parametrize("backend", [None, "loky"])
    def test_a_crash_in_the_first_chunks_ends_the_program_unless_processes_isolate_it(
        self, backend
    ):
        code = f"""
import os
import numpy as np
from taskcarrier import WorkerDiedError, map_array

try:
    map_array(lambda chunk: os._exit(3), np.arange(9.0), n_jobs=2, retries=0, backend={backend!r})
except WorkerDiedError as error:
    print(error.exitcode)
"""
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert (run.returncode, run.stdout) == ((3, "") if backend is None else (0, "3\n"))

    @pytest.mark.fault(10)
    def test_a_warning_is_shown_once_whoever_gives_it(self, hand_over_after):
        def func(chunk):
            warnings.warn("odd", RuntimeWarning, stacklevel=1)
            return chunk

        hand_over_after(2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            map_array(func, X, chunksize=2, n_jobs=2)
        assert [str(one.message) for one in caught] == ["odd"]

    def test_the_function_is_called_in_this_thread_first(self, options):
        threads = []

        def func(chunk):
            threads.append(threading.get_ident())
            return chunk

        map_array(func, X, **options)
        assert set(threads) == {threading.get_ident()}


class TestStreams:
    @pytest.fixture
    def eager(self, hand_over_after):
        hand_over_after(2)

    @pytest.mark.usefixtures("eager")
    @pytest.mark.parametrize("ordered", [True, False])
    def test_the_rest_of_a_stream_goes_to_processes(self, ordered):
        mapper = StaticParallelMapper(n_jobs=2)
        func = functools.partial(pow, 2)
        results = list(mapper.imap(func, range(40), chunksize=1, ordered=ordered))
        assert sorted(results) == [2**item for item in range(40)]
        report = last_report()
        assert report.backend == "loky"
        assert (report.workers[0].name, report.workers[0].items) == ("caller", 2)
        assert sum(worker.items for worker in report.workers) == 40

    @pytest.mark.usefixtures("eager")
    def test_the_rest_of_a_stream_goes_to_threads(self):
        arrays = [np.full(3, float(value)) for value in range(20)]
        results = list(StaticParallelMapper(n_jobs=2).imap(np.negative, arrays, chunksize=1))
        np.testing.assert_equal(results, [-array for array in arrays])
        assert last_report().backend == "threading"

    @pytest.mark.fault(54)
    @pytest.mark.usefixtures("eager")
    def test_what_cannot_be_pickled_runs_in_the_caller_with_one_warning(self):
        lock = threading.Lock()
        mapper = StaticParallelMapper(n_jobs=2)
        with pytest.warns(UserWarning, match="an item could not be sent") as caught:
            results = list(
                mapper.imap(lambda item: not isinstance(item, int), [1, 2, 3, lock, lock, 4])
            )
        assert results == [False, False, False, True, True, False]
        assert len(caught) == 1
        with pytest.warns(UserWarning, match="the function could not be sent") as caught:
            results = list(mapper.imap(lambda item: (item, lock)[0], range(9)))
        assert results == list(range(9))
        assert len(caught) == 1
        assert last_report().backend == "sequential"

    @pytest.mark.usefixtures("eager")
    def test_workers_get_the_function_as_it_was(self):
        n_calls = [0]

        def func(item):
            n_calls[0] += 1
            return n_calls[0]

        results = list(StaticParallelMapper(n_jobs=2).imap(func, range(3), chunksize=1))
        assert results == [1, 2, 1]

    def test_nothing_is_read_before_it_is_needed(self):
        read = []
        items = (read.append(item) or item for item in range(100))
        stream = StaticParallelMapper(n_jobs=2).imap(str, items)
        assert read == []
        assert next(stream) == "0"
        assert read == [0]
        stream.close()


@pytest.mark.fault(44)
@pytest.mark.parametrize("by_watcher", [False, True])
def test_an_exception_while_the_caller_leaves_a_chunk_does_not_make_it_wait_for_ever(by_watcher):
    is_reached, step = True, 0
    while is_reached:
        chunks = CallerChunks(None, None, None, Choice("loky", 2, ""))
        chunks._is_in_chunk = True
        if by_watcher:
            chunks._outcomes.put(True)
        else:
            chunks._chunk.append(3)
        is_reached = interrupted_at(step, chunks._leave_chunk)
        if chunks._is_in_chunk:
            assert chunks._leave_chunk() is by_watcher
        step += 1
    assert step > 3


@pytest.mark.fault(44)
def test_an_exception_while_the_watcher_is_recalled_does_not_make_the_caller_wait_for_ever():
    is_reached, step = True, 0
    while is_reached:
        move = SimpleNamespace(snapshot=SimpleNamespace(staging=None))
        hand_over = ProcessHandOver(Choice("loky", 2, ""), None, None, move)
        hand_over._run = SimpleNamespace(recall=lambda: None)
        hand_over._is_attended = True
        hand_over._ends.put(None)
        is_reached = interrupted_at(step, hand_over.recall)
        hand_over.recall()
        assert not hand_over._is_attended
        step += 1
    assert step > 3

"""Calls that are over before their workers are ready, or too short to start some."""

import functools
import os
import sys
import threading
import time

import numpy as np
import pytest

import taskcarrier
from taskcarrier import last_report, map_array, map_chunks
from taskcarrier.scheduling import history
from taskcarrier.scheduling.hand_over import MeasuredSeconds, MissedSeconds
from taskcarrier.workers import caller_chunks, hand_overs, late_closes, pools
from taskcarrier.workers.caller_chunks import CallerChunks
from taskcarrier.workers.late_closes import LateClose
from taskcarrier.workers.watcher import Watcher, finish_looks
from tests.clocks import LONG, wait_until
from tests.strategies import LOKY

X = np.arange(24.0)
PAYS = CallerChunks._pays


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Return a function that workers cannot import before a flag is there, and the flag.

    In its last chunk the caller waits until workers are on their way.
    """
    flag = tmp_path / "flag"
    (tmp_path / "late_to_import.py").write_text(
        "import os, pathlib, time\n"
        f"flag = pathlib.Path({str(flag)!r})\n"
        f"while os.getpid() != {os.getpid()} and not flag.exists(): time.sleep(0.01)\n"
        "def func(chunk):\n"
        f"    if os.getpid() == {os.getpid()} and chunk[-1] == 23: wait()\n"
        "    return 2 * chunk\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import late_to_import  # just written

    late_to_import.wait = lambda: wait_until(lambda: pools.has_processes(2))
    yield late_to_import.func, flag
    del sys.modules["late_to_import"]


@pytest.fixture
def starts_at_once(monkeypatch):
    """Have workers prepared after the first chunk, without waiting for them."""
    taskcarrier.shutdown()
    monkeypatch.setattr(history, "predict", lambda *_: None)
    monkeypatch.setattr(caller_chunks, "_READY_SECONDS", 0.0)
    monkeypatch.setattr(CallerChunks, "_pays", lambda self, first: True)


@pytest.mark.usefixtures("starts_at_once")
class TestLateWorkers:
    @pytest.mark.fault(57)
    def test_a_call_does_not_wait_for_workers_that_are_not_ready(self, slow):
        func, flag = slow
        assert (map_array(func, X, chunksize=2, n_jobs=2) == 2 * X).all()
        report = last_report()
        assert report.backend == "sequential"
        assert "the caller had done all before the workers were ready" in report.reason
        assert not pools.has_warm_processes(2)
        flag.touch()
        wait_until(lambda: pools.has_warm_processes(2))
        assert (map_array(func, X, chunksize=2, n_jobs=2, backend="loky") == 2 * X).all()
        assert last_report().backend == "loky"

    def test_meanwhile_no_call_starts_others(self, slow, monkeypatch):
        func, flag = slow
        map_array(func, X, chunksize=2, n_jobs=2)
        monkeypatch.setattr(CallerChunks, "_pays", PAYS)
        monkeypatch.setattr(hand_overs, "_cold_seconds", MeasuredSeconds(1e-4))
        monkeypatch.setattr(hand_overs, "_COLD_BUSY_SECONDS", 1e-4)

        def sleep(chunk):
            time.sleep(0.01)
            return 2 * chunk

        for _ in range(3):
            map_array(sleep, X, chunksize=2, n_jobs=2)
            report = last_report()
            assert report.backend == "sequential"
            assert "would have saved time if they had been ready" in report.reason
            assert len(pools._pools._places) == 1
        flag.touch()
        wait_until(lambda: pools.has_warm_processes(2))
        map_array(sleep, X, chunksize=2, n_jobs=2)
        assert last_report().backend == "loky"
        assert len(pools._pools._places) == 1

    def test_a_shutdown_does_not_wait_for_them(self, slow):
        func, _ = slow
        map_array(func, X, chunksize=2, n_jobs=2)
        taskcarrier.shutdown()
        assert not pools.has_processes(2)
        assert late_closes._late == []
        assert not any(thread.name == "taskcarrier-late" for thread in threading.enumerate())

    def test_workers_that_cannot_import_the_function_stay(self, tmp_path, monkeypatch, capfd):
        (tmp_path / "only_in_caller.py").write_text(
            "import os\n"
            f"if os.getpid() != {os.getpid()}: raise ImportError('not here')\n"
            "def func(chunk): return 2 * chunk\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        import only_in_caller  # just written

        get_pids = functools.partial(map_chunks, lambda _: os.getpid(), X, **LOKY, chunksize=12)
        before = {*get_pids()}
        monkeypatch.setattr(caller_chunks, "_READY_SECONDS", LONG)
        with pytest.warns(UserWarning, match="could not be handed over"):
            map_array(only_in_caller.func, X, chunksize=2, n_jobs=2)
        wait_until(lambda: not late_closes._late)  # the other may not have tried to import it yet
        assert {*get_pids()} <= before
        assert capfd.readouterr().err == ""
        del sys.modules["only_in_caller"]

    def test_workers_that_die_then_are_not_missed(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "dies.py").write_text(
            "import os\n"
            f"if os.getpid() != {os.getpid()}: os._exit(3)\n"
            "def func(chunk): return 2 * chunk\n"
        )
        import dies  # just written

        assert (map_array(dies.func, X, chunksize=2, n_jobs=2) == 2 * X).all()
        wait_until(lambda: not late_closes._late)
        finish_looks()
        assert (map_array(np.square, X, chunksize=2, n_jobs=2, backend="loky") == X * X).all()
        del sys.modules["dies"]


def test_it_is_closed_here_if_there_can_be_no_thread(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    closed = []
    late = LateClose(lambda: closed.append(threading.get_ident()), lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        late.start()
    assert closed == [threading.get_ident()]
    assert late_closes._late == []


def test_whoever_waits_hurries_it():
    hurried = threading.Event()
    closed = []

    def close():
        closed.append(hurried.wait(LONG))

    LateClose(close, hurried.set).start()
    late_closes.finish_late_closes()
    assert closed == [True]
    assert late_closes._late == []


def test_a_shutdown_waits_for_a_watcher_that_still_looks():
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def look():
        begun.set()
        assert go_on.wait(LONG)
        ended.append(True)

    with Watcher.take() as watcher:
        watcher.watch(look, 0.0)
        assert begun.wait(LONG)
    waiting = threading.Thread(target=finish_looks)
    waiting.start()
    assert not ended
    go_on.set()
    waiting.join()
    assert ended


class TestMissedWorkers:
    def test_what_calls_miss_adds_up(self):
        missed = MissedSeconds()
        for _ in range(4):
            assert not missed.are_enough(1.0)
            missed.add(0.25)
        assert missed.are_enough(1.0)

    def test_processes_are_started_once_enough_was_missed(self, monkeypatch):
        def func(chunk):
            time.sleep(0.01)  # 0.16 s a call, less than workers take to start
            return 2 * chunk

        def call_is_shared():
            assert (map_array(func, X[:16], chunksize=1, n_jobs=2) == 2 * X[:16]).all()
            return last_report().backend == "loky"

        taskcarrier.shutdown()
        hand_overs.missed_seconds.clear()
        monkeypatch.setattr(hand_overs, "_cold_seconds", MeasuredSeconds(LONG))
        assert not call_is_shared()
        assert "would have saved time if they had been ready" in last_report().reason
        assert not pools.has_processes(2)
        monkeypatch.setattr(hand_overs, "_cold_seconds", MeasuredSeconds(0.25))
        wait_until(call_is_shared)
        assert hand_overs.missed_seconds == {}

    def test_what_workers_would_not_save_is_not_missed(self):
        taskcarrier.shutdown()
        hand_overs.missed_seconds.clear()
        map_array(lambda chunk: 2 * chunk, X, chunksize=2, n_jobs=2)
        assert hand_overs.missed_seconds == {}
        assert "workers would have saved nothing" in last_report().reason

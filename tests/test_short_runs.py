"""Short calls in worker processes give what all calls there give, whatever happens to workers."""

import functools
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    WorkerDiedError,
    last_report,
    map_array,
    map_chunks,
    map_items,
    short_runs,
)
from taskcarrier.scheduling import history
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.partition import Partition
from taskcarrier.workers.processes.share_run import ShareRun
from tests.faults.functions import note, noted, times
from tests.interrupted import interrupted_at
from tests.odd_functions import ODD_FUNCTIONS, changing, fail_at
from tests.strategies import examples, same_bits, start_script

X = np.arange(48.0).reshape(24, 2)
OPTIONS = {"n_jobs": 2, "backend": "loky"}
VERBS = [map_array, map_items, map_chunks]


@pytest.fixture(autouse=True)
def every_call_is_short(monkeypatch):
    """Let all calls in processes be short, with two warm workers that both get a share."""
    taskcarrier.workers.pools.start_processes(2)
    monkeypatch.setattr(history, "predict_busy", lambda *_: 0.0)
    monkeypatch.setattr(short_runs, "_WAKE_SECONDS", 0)


@pytest.fixture
def share_runs(monkeypatch):
    """Return a list to which each short run is appended, and each that goes on as a general one."""
    runs = []
    run_usual, become_general = ShareRun.run_usual, ShareRun.become_general

    def run(self):
        runs.append("short")
        return run_usual(self)

    def become(self, *args):
        runs.append("general")
        return become_general(self, *args)

    monkeypatch.setattr(ShareRun, "run_usual", run)
    monkeypatch.setattr(ShareRun, "become_general", become)
    return runs


def outcome_of(call, *, is_short):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "predict_busy", lambda *_: 0.0 if is_short else None)
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  # errors of any type are compared
            result = error
    report = last_report()
    facts = report.backend, report.reason, report.balance, report.n_jobs, report.chunksize
    return result, (*facts, report.ranges, report.items, report.bytes_copied, report.notes)


def without_numbers(texts):
    """Return texts without numbers: who fails before all are halted is a matter of luck."""
    return [re.sub(r"0x[0-9a-f]+|[0-9]+", "0", text) for text in texts if "also failed" not in text]


def assert_alike(one, other):
    assert type(one) is type(other)
    if isinstance(one, BaseException):
        assert without_numbers([str(one)]) == without_numbers([str(other)])
        notes = [getattr(each, "__notes__", []) for each in (one, other)]
        assert without_numbers(notes[0]) == without_numbers(notes[1])
        assert type(one.__context__) is type(other.__context__)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_alike(*pair)
    elif isinstance(one, np.ndarray):
        assert one.flags.writeable == other.flags.writeable
        assert one.dtype == other.dtype
        if one.dtype.hasobject:
            assert one.tolist() == other.tolist()
        else:
            assert same_bits(one, other)
    else:
        assert repr(one) == repr(other)


def check(call, *, is_by_luck=False):
    """Check that a call gives the same on both ways; which error that is may be luck."""
    general, facts = outcome_of(call, is_short=False)
    short, facts_of_short = outcome_of(call, is_short=True)
    if is_by_luck:
        assert type(short) is type(general)
    else:
        assert_alike(short, general)
    if not isinstance(general, Exception):
        assert facts_of_short == facts


class Odd:
    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"Odd({self.value})"


class Unpicklable:
    def __reduce__(self):
        raise TypeError("this stays here")


class NotAgain:
    """An object that the caller cannot unpickle."""

    def __reduce__(self):
        return raise_in_caller, (os.getpid(),)


def raise_in_caller(pid):
    if pid != os.getpid():
        raise LookupError("not here")


FUNCTIONS = {
    **ODD_FUNCTIONS,
    "an object of ours": lambda c: Odd(c.sum()),
    "a lambda": lambda c: (lambda: 1).__name__,
    "raises everywhere": lambda c: c.undefined,
    "cannot be pickled": lambda c: Unpicklable(),
    "cannot be unpickled": lambda c: NotAgain(),
    "array later": changing(lambda c: (c,), np.copy),
    "large": lambda c: np.ones((len(c), 5000)) * c[:, :1] if c.ndim > 1 else np.ones(5000),
}


@pytest.mark.parametrize("verb", VERBS)
def test_short_maps_give_what_all_maps_give(verb, share_runs):
    for name, func in FUNCTIONS.items():
        for options in ({}, {"chunksize": 5}, {"balance": "dynamic"}):
            share_runs.clear()
            call = functools.partial(verb, func, X, **OPTIONS, **options)
            check(call, is_by_luck=verb is map_items and " later" in name)
            assert share_runs[0] == "short", name


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_that_exits_ends_the_program(verb, share_runs):
    with pytest.raises(SystemExit):
        verb(lambda chunk: sys.exit(3), X, **OPTIONS)
    assert share_runs == ["short"]


def test_constants_are_passed_on(share_runs):
    check(lambda: map_array(np.sort, X, kwargs={"axis": 1}, **OPTIONS))
    check(lambda: map_array(np.power, X, args=(2,), **OPTIONS))
    check(lambda: map_items(np.power, X, X, args=(), kwargs={"dtype": float}, **OPTIONS))
    check(lambda: map_array(lambda c, a, b=0: c + a * b, X, args=(2,), kwargs={"b": 3}, **OPTIONS))
    check(lambda: map_chunks(lambda a, b: (a.sum(), b.sum()), X, X[:, 0].copy(), **OPTIONS))
    assert len(share_runs) == 5


ARRAYS = [
    *(X.T, X[::2], X[:, :1], X[3:7], X[:1], np.zeros((0, 3)), np.zeros((3, 0))),
    *(np.zeros(4, "i4,f4"), np.ma.zeros(4), np.array(["a", "bcd"]), np.arange(5, dtype=object)),
    *(np.zeros(6, ">f4"), np.zeros(100_000), np.zeros((1, 1, 1, 1)), [1, 2, 3]),
]


def test_arrays_of_any_kind_give_the_same():
    for array in ARRAYS:
        for verb in VERBS:
            check(lambda verb=verb, array=array: verb(np.copy, array, **OPTIONS))
        check(lambda array=array: map_array(lambda a, b: b, array, array, **OPTIONS))


CALLS = [
    *({"axis": 1}, {"dtype": "f4"}, {"writable": True}, {"rng": 1}, {"depth": 1}),
    *({"chunksize": 0}, {"chunksize": 1}, {"balance": "odd"}, {"backend": "processes"}),
    *({"n_jobs": 0}, {"n_jobs": 1}, {"n_jobs": None}, {"n_jobs": -1}),
    *({"on_error": "collect"}, {"timeout": 60}, {"retries": 0}),
]


def test_options_mean_the_same():
    for options in CALLS:
        check(lambda options=options: map_array(lambda c, rng=None: c, X, **{**OPTIONS, **options}))


@examples(20)
@given(
    array=hnp.arrays(
        st.sampled_from(["f8", "i2", "?", "c8", "M8[s]", "U3", "S2", ">u4"]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=20),
    ),
    chunksize=st.one_of(st.none(), st.integers(1, 30)),
    func=st.sampled_from([np.copy, lambda c: (c, c[..., :0]), lambda c: c[..., :1]]),
    verb=st.sampled_from(VERBS),
)
def test_any_array_gives_the_same(array, chunksize, func, verb):
    check(lambda: verb(func, array, chunksize=chunksize, **OPTIONS))


@examples(20)
@given(n_items=st.integers(1, 60), chunksize=st.integers(1, 20), n_workers=st.integers(1, 9))
def test_shares_are_those_of_static_balance(n_items, chunksize, n_workers):
    grid = ChunkGrid(n_items, chunksize)
    n_workers = min(n_workers, len(grid))
    run = short_runs.ShortRun(None, grid, 0, n_workers, n_workers, None, 0)
    parts = Partition(n_workers, len(grid))
    assert run.list_starts() == [*(part.start * chunksize for part in parts), n_items]


def test_chunks_lie_as_in_the_caller_and_are_read_only():
    memory = np.zeros(1000, np.uint8)
    for offset in (0, 8, 24, 56):
        array = memory[offset : offset + 480].view("f8")

        def look(chunk):
            address = chunk.__array_interface__["data"][0]
            return np.full((len(chunk), 2), (address % 64, chunk.flags.writeable))

        short, _ = outcome_of(lambda a=array: map_array(look, a, **OPTIONS), is_short=True)
        first = array.__array_interface__["data"][0]
        assert short[0].tolist() == [first % 64, 0]
        assert short[-1].tolist() == [(first + 480 - 8 * 3) % 64, 0]


class TestFunctions:
    def test_closures_are_sent_as_they_are_now(self):
        factor = [1]

        def func(chunk):
            return chunk * factor[0]

        for factor[0] in (1, 2, 3):
            assert (map_array(func, X, **OPTIONS) == factor[0] * X).all()

    def test_functions_of_the_main_module_may_be_defined_again(self, tmp_path):
        code = (
            "import numpy as np, taskcarrier\n"
            "from taskcarrier import map_array, short_runs\n"
            "from taskcarrier.scheduling import history\n"
            "history.predict_busy = lambda *_: 0.0\n"
            "for factor in (1, 2, 3):\n"
            "    exec(f'def func(chunk): return chunk * {factor}')\n"
            "    print(int(map_array(func, np.ones(9), n_jobs=2, backend='loky').sum()))\n"
        )
        process = start_script(tmp_path, code)
        output, _ = process.communicate(timeout=60)
        assert output.split() == ["9", "18", "27"]

    def test_arrays_that_it_carries_go_the_general_way_and_are_written_to(self, share_runs):
        shared = taskcarrier.empty(24)

        def func(chunk):
            shared[int(chunk[0, 0]) // 2] = 1
            return chunk

        map_array(func, X, chunksize=1, **OPTIONS)
        assert shared.all()
        large = np.ones(100_000)
        assert (map_array(lambda c: c + large[0], X, **OPTIONS) == X + 1).all()
        assert share_runs == []

    def test_the_caller_is_seen_as_it_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert map_chunks(lambda c: Path.cwd(), X, **OPTIONS) == [tmp_path] * 24
        with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
            map_array(lambda c: 1 / (c - c), X, **OPTIONS)
        with np.errstate(divide="ignore"):
            assert np.isinf(map_array(lambda c: 1 / (c - c + 0.0), X, **OPTIONS)).all()

    def test_maps_inside_are_serial_and_warnings_arrive(self, share_runs):
        def func(chunk):
            warnings.warn("odd chunk", stacklevel=1)
            map_array(np.copy, chunk, **OPTIONS)
            return np.full(len(chunk), last_report().backend == "sequential")

        with pytest.warns(UserWarning, match="odd chunk") as heard:
            assert map_array(func, X, **OPTIONS).all()
        assert len(heard) == 1
        assert share_runs == ["short"]

    def test_one_that_forks_comes_back_once(self, tmp_path):
        path = tmp_path / "calls"

        def func(chunk):
            note(path, chunk[0, 0])
            os.fork()
            return chunk

        assert (map_array(func, X, chunksize=3, **OPTIONS) == X).all()
        assert len(noted(path)) == 8

    def test_one_that_keeps_its_chunks_sees_them_unchanged(self):
        def func(chunk):
            kept = func.__dict__.setdefault("kept", [])
            kept.append((chunk, chunk.copy()))
            return np.full(len(chunk), all((one == other).all() for one, other in kept))

        for number in range(5):
            assert map_array(func, X + number, **OPTIONS).all()


class TestDeaths:
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("number", [0, 20, 46])
    def test_a_dead_worker_is_made_good(self, verb, number, tmp_path, share_runs):
        path = tmp_path / "deaths"

        def func(chunk):
            if np.min(chunk) == number and times(path, "died") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        result = verb(func, X, **OPTIONS)
        assert np.array_equal(np.reshape(result, X.shape), X)
        assert share_runs == ["short", "general"]
        (text,) = last_report().notes
        assert "killed by signal 9" in text
        assert f"items {number // 2}:{number // 2 + 1}" in text

    def test_what_was_run_by_others_is_not_run_again(self, tmp_path):
        path = tmp_path / "calls"

        def func(chunk):
            note(path, int(chunk[0, 0]))
            if chunk[0, 0] == 4 and noted(path).count("4") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        assert (map_array(func, X, **OPTIONS) == X).all()
        calls = list(map(int, noted(path)))
        assert all(calls.count(number) == 1 for number in range(24, 48, 2))
        assert all(1 <= calls.count(number) <= 2 for number in range(0, 24, 2))

    @pytest.mark.parametrize("verb", VERBS)
    def test_a_range_that_kills_every_worker_is_named(self, verb):
        def func(chunk):
            if np.min(chunk) == 20:
                os._exit(3)
            return chunk

        short, general = (
            outcome_of(lambda: verb(func, X, **OPTIONS), is_short=is_short)[0]
            for is_short in (True, False)
        )
        assert isinstance(short, WorkerDiedError)
        assert_alike(short, general)
        # Of `map_chunks` the general way loses what the dead worker had not sent.
        assert set(short.missing) <= set(general.missing)
        assert short.missing == [(10, 11), (11, 12)]
        values = (
            [x for x in short.partial if x is not None] if verb is map_chunks else short.partial
        )
        assert np.array_equal(np.reshape(values, (-1, 2))[:10], X[:10])
        assert np.array_equal(np.reshape(values, (-1, 2))[-12:], X[12:])
        assert (map_array(np.copy, X, **OPTIONS) == X).all()

    def test_an_error_and_a_death_raise_the_error(self, tmp_path):
        path = tmp_path / "deaths"

        def func(chunk):
            if chunk[0, 0] == 0:
                raise ValueError("first")
            if chunk[0, 0] == 24 and times(path, "died") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        with pytest.raises(ValueError, match="first"):
            map_array(func, X, **OPTIONS)

    def test_a_worker_that_died_before_is_replaced_as_ever(self, share_runs):
        map_array(np.copy, X, **OPTIONS)
        pid = int(last_report().workers[0].name.split()[1])
        (place,) = [each for each in taskcarrier.workers.pools._pools._places if each.key[1] == 2]
        worker = place.pool._workers[0]
        assert worker.pid == pid
        os.kill(pid, signal.SIGKILL)
        worker._exit.wait()
        assert (map_array(np.copy, X, **OPTIONS) == X).all()
        assert last_report().notes == ()
        assert share_runs == ["short"]


class TestInterrupts:
    def test_an_interrupt_while_waiting_ends_the_call_and_the_next_one_is_right(
        self, tmp_path, monkeypatch
    ):
        path = tmp_path / "begun"
        os.mkfifo(path)

        def hang(chunk):
            Path(path).read_bytes()  # waits until the caller is in the handler
            return chunk

        wait_for = ShareRun._wait_for

        def interrupt(self, number, poll):
            monkeypatch.setattr(ShareRun, "_wait_for", wait_for)
            raise KeyboardInterrupt

        monkeypatch.setattr(ShareRun, "_wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            map_array(hang, X, **OPTIONS)
        assert "ended by KeyboardInterrupt" in last_report().notes[0]
        assert (map_array(np.negative, X, **OPTIONS) == -X).all()

    def test_replies_of_an_interrupted_call_are_not_taken_for_those_of_the_next(self, monkeypatch):
        monkeypatch.setattr(ShareRun, "become_general", lambda *_: raise_again())
        wait_for = ShareRun._wait_for

        def raise_again():
            raise KeyboardInterrupt

        monkeypatch.setattr(ShareRun, "_wait_for", lambda *_: raise_again())
        with pytest.raises(KeyboardInterrupt):
            map_array(np.copy, X, **OPTIONS)
        monkeypatch.setattr(ShareRun, "_wait_for", wait_for)
        for _ in range(3):
            assert (map_array(np.negative, X, **OPTIONS) == -X).all()

    @pytest.mark.fault(17)
    def test_an_interrupt_at_any_step_leaves_the_next_call_right(self):
        step = 0
        while interrupted_at(step, lambda: map_array(np.copy, X, **OPTIONS)):
            Y = X + step
            assert (map_array(np.negative, Y, **OPTIONS) == -Y).all()
            step += 1
        assert step > 100

    def test_a_worker_that_is_still_in_an_earlier_call_is_ended_before(self, monkeypatch):
        map_array(np.copy, X, **OPTIONS)
        (place,) = [each for each in taskcarrier.workers.pools._pools._places if each.key[1] == 2]
        workers = place.pool._workers
        before = [workers[number].pid for number in range(2)]
        workers[1].is_free = False  # as after an interrupt
        monkeypatch.setattr(short_runs, "_WAKE_SECONDS", 1.0)  # only one gets a share
        assert (map_array(np.negative, X, **OPTIONS) == -X).all()
        assert [workers[number].pid == before[number] for number in range(2)] == [True, False]

    def test_two_threads_have_workers_of_their_own(self):
        barrier = threading.Barrier(2)
        results = []

        def use(number):
            barrier.wait()
            Y = X + number
            results.extend((map_array(np.negative, Y, **OPTIONS) == -Y).all() for _ in range(20))

        threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 40
        assert all(results)


class TestWhenItIsShort:
    def test_a_call_is_short_if_the_last_one_was(self, monkeypatch, share_runs):
        monkeypatch.undo()
        taskcarrier.workers.pools.start_processes(2)
        monkeypatch.setattr(short_runs, "_MOST_SECONDS", 1e9)
        runs = []
        run_usual = ShareRun.run_usual
        monkeypatch.setattr(ShareRun, "run_usual", lambda self: runs.append(1) or run_usual(self))

        def func(chunk):
            return chunk + 1

        for n_short in range(3):
            map_array(func, X, **OPTIONS)
            assert len(runs) == n_short
        map_array(func, np.zeros((24 * 100, 2)), **OPTIONS)  # much larger
        assert len(runs) == 2

    def test_errors_and_deaths_are_forgotten(self, monkeypatch):
        def fail(chunk):
            raise ValueError("bad")

        history.remember_busy(fail, 0.001, 24, X.nbytes)
        with pytest.raises(ValueError, match="bad"):
            map_array(fail, X, **OPTIONS)
        assert history.find_known(fail) not in history._last_busy

    def test_a_worker_gets_a_share_if_that_takes_longer_than_to_wake_it(self, monkeypatch):
        monkeypatch.setattr(short_runs, "_WAKE_SECONDS", 0.0001)
        grid = ChunkGrid(24, 2)
        plans = []
        for seconds in (0.0, 0.00025, 0.01, 1.0):
            monkeypatch.setattr(history, "predict_busy", lambda *_, seconds=seconds: seconds)
            plans.append(short_runs.plan_workers(np.copy, grid, 100, 8))
        assert plans == [(8, 1), (8, 2), (8, 8), None]

    def test_workers_without_a_share_are_in_the_report(self, monkeypatch, share_runs):
        monkeypatch.setattr(short_runs, "_WAKE_SECONDS", 1.0)
        for func in (np.negative, fail_at(99), lambda chunk: chunk.astype(object)):
            map_array(func, X, **OPTIONS)
            assert [worker.ranges for worker in last_report().workers] == [24, 0]
            assert last_report().n_jobs == 2
        assert share_runs.count("short") == 3

    def test_workers_and_joblib_take_the_general_way(self, share_runs):
        with joblib.parallel_config(backend="threading", n_jobs=2):
            map_array(np.copy, X, **OPTIONS)
        assert share_runs == []

    def test_cold_processes_take_the_general_way(self, share_runs):
        taskcarrier.shutdown()
        assert (map_array(np.copy, X, **OPTIONS) == X).all()
        assert share_runs == []

    def test_mappers_give_the_same(self, share_runs):
        for kind in (StaticParallelMapper, DynamicParallelMapper):
            mapper = kind(n_jobs=2, backend="loky")
            check(lambda mapper=mapper: mapper.map_array(np.negative, X))
            check(lambda mapper=mapper: mapper.map_items(np.sum, X))
            check(lambda mapper=mapper: mapper.map_chunks(fail_at(5), X))
            assert mapper.report == last_report()
        assert share_runs.count("short") == 6

"""Streams of results: the same as the built-in `map`, lazily, in bounded memory."""

import functools
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
import warnings

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joblib import parallel_config, register_parallel_backend
from joblib.parallel import ThreadingBackend

from taskcarrier import (
    DynamicParallelMapper,
    SerialMapper,
    WorkerDiedError,
    share,
    shutdown,
)
from taskcarrier.lists import (
    imap,
)
from taskcarrier.lists.imap import Pace, StreamInput
from taskcarrier.workers import threads
from taskcarrier.workers.processes import stream_run
from taskcarrier.workers.processes.messages import MessageSocket
from tests.clocks import LATE, LONG, stopped_clock
from tests.errors import Unreadable
from tests.lists import makers
from tests.strategies import examples, keep_pools_warm, run_script

MAKERS = {name: make for name, make in makers.MAKERS.items() if name != "static processes"}
PARALLEL = ["dynamic threads", "dynamic processes"]


pools = keep_pools_warm(2)


@pytest.fixture(params=sorted(MAKERS))
def make(request):
    return MAKERS[request.param]


@pytest.fixture(params=PARALLEL)
def parallel(request):
    return MAKERS[request.param]


@pytest.fixture
def processes():
    return MAKERS["dynamic processes"]()


@pytest.fixture
def patience(monkeypatch):
    """Wait for workers that report late when a stream is closed, so that they are in its report."""
    monkeypatch.setattr(stream_run, "GRACE_SECONDS", LONG)
    monkeypatch.setattr(threads, "_GRACE_SECONDS", LONG)


@pytest.fixture
def quick_input(monkeypatch):
    """Let no batch count as slow to read, whatever else the machine does."""
    monkeypatch.setattr(imap, "_BATCH_NS", LONG * 10**9)


@examples(40)
@given(
    st.lists(st.none() | st.integers() | st.text() | st.binary(), max_size=40),
    st.none() | st.integers(1, 50),
    st.none() | st.integers(1, 50),
)
def test_imap_equals_the_builtin_map(items, chunksize, buffersize):
    for make in MAKERS.values():
        mapper = make(chunksize=chunksize)
        results = mapper.imap(lambda item: [item], iter(items), buffersize=buffersize)
        assert list(results) == [[item] for item in items]


@examples(20)
@given(st.lists(st.integers(), max_size=40), st.none() | st.integers(1, 50))
def test_unordered_results_are_the_same_in_any_order(items, chunksize):
    for make in MAKERS.values():
        results = make(chunksize=chunksize).imap(abs, items, ordered=False)
        assert sorted(results) == sorted(map(abs, items))


def test_the_shortest_of_several_inputs_wins(make):
    assert list(make().imap(pow, itertools.count(2), [3, 0, 1])) == [8, 1, 4]


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_an_input_that_fills_one_buffer_again_and_again_gives_copies(make, chunksize):
    """Copies are needed, as documented: items that are read ahead would be overwritten."""

    def readings():
        buffer = np.empty(4)
        for n in range(60):
            buffer[:] = n
            yield buffer

    mapper = make(chunksize=chunksize)
    totals = mapper.imap(np.sum, (buffer.copy() for buffer in readings()))
    assert list(totals) == [4 * n for n in range(60)]
    assert "must give copies" in " ".join(mapper.imap.__doc__.split())


def test_an_endless_input_is_not_read_far_ahead(make):
    read = itertools.count()
    results = make().imap(lambda n: n * n, read, buffersize=10)
    assert [next(results) for _ in range(100)] == [n * n for n in range(100)]
    results.close()
    assert 100 <= next(read) <= 110


def test_nothing_is_read_before_the_first_result_is_asked_for(make):
    read = itertools.count()
    results = make().imap(abs, read)
    results.close()
    assert next(read) == 0


@pytest.mark.parametrize("buffersize", [1, 2, 7])
def test_never_more_items_are_under_way_than_the_buffer_holds(make, buffersize):
    handed_out = 0

    def items():
        for n in range(60):
            assert n - handed_out < buffersize
            yield n

    for n, result in enumerate(make().imap(lambda n: -n, items(), buffersize=buffersize)):
        assert result == -n
        handed_out += 1
    assert handed_out == 60


def test_by_default_a_few_batches_are_under_way_for_each_worker(parallel):
    # Batches grow up to 1024 items, four for each of two workers.
    read = itertools.count()
    results = parallel().imap(abs, read)
    for _ in range(20_000):
        next(results)
    results.close()
    assert next(read) <= 20_000 + 8 * 1024


def test_slow_items_are_sent_one_by_one(parallel):
    mapper = parallel()
    list(mapper.imap(lambda _: time.sleep(0.02), range(8)))
    assert mapper.report.chunksize == 1
    assert mapper.report.ranges == 8


def test_fast_items_are_sent_in_batches(parallel):
    mapper = parallel()
    list(mapper.imap(abs, range(3000)))
    assert mapper.report.ranges < 300
    assert mapper.report.items == 3000


@pytest.mark.usefixtures("quick_input")
def test_batches_have_the_chunksize_of_the_mapper(parallel):
    mapper = parallel(chunksize=7)
    assert list(mapper.imap(abs, range(30))) == list(range(30))
    assert (mapper.report.chunksize, mapper.report.ranges) == (7, 5)
    assert list(mapper.imap(abs, range(30), chunksize=10)) == list(range(30))
    assert (mapper.report.chunksize, mapper.report.ranges) == (10, 3)


def test_a_slow_item_delays_others_only_if_results_are_ordered(parallel, tmp_path):
    gate = tmp_path / "gate"

    def func(n):
        while n == 0 and not gate.exists():
            time.sleep(0.005)
        return n

    results = parallel(chunksize=1).imap(func, range(20), ordered=False)
    assert 0 not in [next(results) for _ in range(15)]
    gate.touch()
    assert len(list(results)) == 5


def test_results_come_before_the_input_ends(make):
    seen = []

    def items():
        for n in range(5):
            yield n
            if n == 3:
                assert len(seen) >= 1

    seen.extend(make().imap(lambda n: n, items(), buffersize=2))
    assert seen == list(range(5))


def test_a_slow_input_is_not_waited_for_to_fill_a_batch(parallel):
    def items():
        yield from range(500)  # batches have grown
        for n in range(500, 505):
            time.sleep(0.02)
            yield n

    mapper = parallel()
    assert list(mapper.imap(abs, items())) == list(range(505))
    read = []

    def watched():
        for n in items():
            read.append(n)
            yield n

    for n in mapper.imap(abs, watched(), buffersize=1):
        assert read[-1] == n


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_is_raised_in_its_place_among_the_results(make, ordered):
    results = make(chunksize=4).imap(lambda n: 1 / (50 - n), range(100), ordered=ordered)
    came = []
    with pytest.raises(ZeroDivisionError) as caught:
        came.extend(results)
    assert "while mapping item 50" in caught.value.__notes__
    if ordered:
        assert came == [1 / (50 - n) for n in range(50)]
    assert list(results) == []


def test_the_traceback_of_a_process_is_the_cause(processes):
    def fails(n):
        raise LookupError(n)

    with pytest.raises(LookupError) as caught:
        list(processes.imap(fails, [7]))
    assert "in fails" in str(caught.value.__cause__)


def test_an_error_of_the_input_comes_after_all_results(make):
    def items():
        yield from range(30)
        raise OSError("the disk is gone")

    came = []
    with pytest.raises(OSError, match="the disk is gone"):
        came.extend(make().imap(abs, items()))
    assert came == list(range(30))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_ends_the_stream(make, error):
    def leaves(n):
        if n == 5:
            raise error(n)
        return n

    mapper = make()
    with pytest.raises(error):
        list(mapper.imap(leaves, itertools.count()))
    assert list(mapper.imap(abs, range(10))) == list(range(10))


def test_an_item_that_cannot_be_sent_is_an_error(processes):
    items = [*range(5), threading.Lock(), 6]
    results = processes.imap(lambda item: item, items, buffersize=1)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(TypeError) as caught:
        next(results)
    assert any("could not pickle item 5 for" in note for note in caught.value.__notes__)


def test_an_item_that_cannot_be_unpickled_is_an_error(processes):
    results = processes.imap(lambda item: 1, [1, 2, Unreadable(text="not a number")], buffersize=1)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ValueError, match="not a number") as caught:
        next(results)
    assert any("could not unpickle these items" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("make_result", [threading.Lock, Unreadable])
def test_a_result_that_cannot_be_sent_is_an_error(processes, make_result):
    results = processes.imap(lambda n: n if n < 3 else make_result(), range(5), buffersize=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises((TypeError, ValueError)) as caught:
        next(results)
    assert "while mapping item 3" in caught.value.__notes__
    assert list(processes.imap(abs, range(3))) == [0, 1, 2]


def test_a_function_that_cannot_be_unpickled_is_an_error(processes):
    func = functools.partial(lambda _, n: n, Unreadable(text="not a number"))
    with pytest.raises(ValueError, match="not a number") as caught:
        list(processes.imap(func, range(50)))
    assert any("unpickled the function" in note for note in caught.value.__notes__)
    assert list(processes.imap(abs, range(3))) == [0, 1, 2]


def test_a_function_that_cannot_be_pickled_is_an_error(processes):
    lock = threading.Lock()
    with pytest.raises(TypeError) as caught:
        next(processes.imap(lambda n: lock, range(3)))
    assert any("could not pickle the function" in note for note in caught.value.__notes__)


# Ends


@pytest.mark.parametrize("parallel", PARALLEL, indirect=True)
def test_work_of_late_workers_is_in_the_report(parallel, monkeypatch):
    monkeypatch.setattr(stream_run, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(threads, "_GRACE_SECONDS", 0.1)
    gate = threading.Event()
    mapper = parallel(chunksize=1)
    forever = gate.wait if mapper.backend == "threading" else time.sleep
    results = mapper.imap(lambda n: n if n < 8 else forever(LONG), range(20), buffersize=12)
    assert [next(results) for _ in range(8)] == list(range(8))
    results.close()
    gate.set()
    assert mapper.report.items == mapper.report.ranges == 8
    assert sum(worker.items for worker in mapper.report.workers) == 8
    shutdown()


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("how", ["close", "drop", "break"])
def test_a_stream_may_be_stopped_early(make, how):
    mapper = make()
    results = mapper.imap(lambda n: n + 1, itertools.count())
    if how == "break":
        for n in results:
            if n == 10:
                break
    else:
        assert [next(results) for _ in range(10)] == list(range(1, 11))
    if how == "close":
        results.close()
    del results
    gc.collect()
    assert mapper.report.items >= 10
    assert mapper(abs, [-1, 2]) == [1, 2]


def test_a_thread_may_close_its_own_stream_before_it_begins(monkeypatch):
    # The garbage collector may do so when all results have come.
    came, closed, numbers = threading.Event(), threading.Event(), itertools.count()

    def limit_this_thread():
        if next(numbers) == 1:
            came.wait(LONG)
            results.close()
            closed.set()

    monkeypatch.setattr(threads, "limit_this_thread", limit_this_thread)
    results = MAKERS["dynamic threads"](chunksize=1).imap(abs, [-1, -2])
    assert [next(results), next(results)] == [1, 2]  # of one thread
    came.set()
    assert closed.wait(LONG)


def test_stopping_early_kills_a_process_that_does_not_end():
    processes = MAKERS["dynamic processes"](chunksize=1)
    results = processes.imap(lambda n: n if n < 4 else time.sleep(LONG), itertools.count())
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < LONG / 2
    assert processes(abs, range(10)) == list(range(10))


def test_workers_are_reused_after_an_interrupt_that_has_cut_off_a_result(processes, monkeypatch):
    kept = MessageSocket._keep

    def interrupted(channel):
        data = kept(channel)
        if channel._descriptors:
            monkeypatch.setattr(MessageSocket, "_keep", kept)
            raise KeyboardInterrupt
        return data

    def rows(n):
        return np.full(1 << 14, n)

    monkeypatch.setattr(MessageSocket, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(processes.imap(rows, range(20), chunksize=1))
    for n, row in enumerate(processes.imap(rows, range(100, 140), chunksize=1)):
        assert row[0] == 100 + n
    assert [row[0] for row in processes.map(rows, range(7))] == list(range(7))


def test_stopping_early_does_not_wait_for_a_stuck_thread():
    stuck = threading.Event()
    mapper = MAKERS["dynamic threads"](chunksize=1)
    results = mapper.imap(lambda n: n if n < 4 else stuck.wait(LONG), itertools.count())
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    results.close()
    stuck.set()
    assert mapper(abs, range(10)) == list(range(10))
    shutdown()


def test_a_stream_that_never_began_runs_nothing(make):
    mapper = make()
    mapper.imap(abs, itertools.count())
    with pytest.raises(LookupError):
        _ = mapper.report


def test_two_streams_may_be_open_at_once(make):
    mapper = make()
    one, other = mapper.imap(abs, range(50)), mapper.imap(lambda n: -n, range(50))
    assert list(zip(one, other, strict=True)) == [(n, -n) for n in range(50)]


def test_maps_may_run_while_a_stream_is_open(make):
    mapper = make()
    for n in mapper.imap(abs, range(5)):
        assert mapper(abs, range(n)) == list(range(n))


def test_a_stream_inside_a_worker_is_serial(make):
    def inner(n):
        mapper = DynamicParallelMapper(2, backend="loky")
        total = sum(mapper.imap(abs, range(n)))
        return total, mapper.report.backend

    assert list(make().imap(inner, range(4))) == [(sum(range(n)), "sequential") for n in range(4)]


FORKED_AND_GONE_ON = """
import os, sys
from taskcarrier import DynamicParallelMapper

results = DynamicParallelMapper(2, backend=sys.argv[1]).imap(abs, range(10**5))
next(results)
if os.fork() == 0:
    try:
        list(results)
    except RuntimeError as error:
        assert "belongs to the process that began it" in str(error)
        os._exit(0)
    os._exit(1)
assert os.wait()[1] == 0
assert list(results) == list(range(1, 10**5))
"""


@pytest.mark.one_case
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_a_forked_child_cannot_continue_a_stream(tmp_path, backend):
    run_script(tmp_path, FORKED_AND_GONE_ON, backend)


FORKED = """
import os, sys
from taskcarrier import DynamicParallelMapper

mapper = DynamicParallelMapper(2, backend=sys.argv[1])
results = mapper.imap(abs, range(1000))
first = [next(results) for _ in range(3)]
child = os.fork()
if child == 0:
    results.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert first + list(results) == list(range(1000))
"""


@pytest.mark.one_case
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_a_forked_child_leaves_a_stream_alone(tmp_path, backend):
    run_script(tmp_path, FORKED, backend)


OPEN_AT_EXIT = """
import itertools, sys
from taskcarrier import DynamicParallelMapper

results = DynamicParallelMapper(2, backend=sys.argv[1]).imap(abs, itertools.count())
print(next(results))
"""


@pytest.mark.one_case
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_a_stream_may_be_open_at_the_end_of_the_program(tmp_path, backend):
    assert run_script(tmp_path, OPEN_AT_EXIT, backend) == "0\n"


# Options


@pytest.mark.parametrize("ordered", [True, False])
def test_imap_gives_items_the_same_random_streams_as_map(make, ordered):
    def draw(n, *, rng):
        return n, float(rng.random())

    expected = SerialMapper().map(draw, range(40), rng=5)
    results = make().imap(draw, range(40), rng=5, ordered=ordered)
    assert sorted(results) == expected


def test_shared_arrays_reach_imap_without_a_copy(make):
    X = share(np.arange(100_000.0))
    mapper = make()
    results = mapper.imap(lambda n, X: (float(X[n]), X.flags.writeable), range(10), shared={"X": X})
    assert list(results) == [(n, False) for n in range(10)]
    assert mapper.report.bytes_copied < 1000  # the items


def test_large_items_and_results_are_streamed(processes):
    items = (np.full(50_000, n) for n in range(20))
    results = list(processes.imap(lambda x: (x[:40_000] * 2, x.flags.writeable), items))
    for n, (result, writeable) in enumerate(results):
        np.testing.assert_array_equal(result, np.full(40_000, 2 * n))
        assert writeable


def test_large_pickles_without_arrays_are_streamed(processes):
    items = [bytes([n]) * 300_000 for n in range(10)]
    assert list(processes.imap(bytes, items)) == items


def test_items_are_tried_again_on_retry_on(make, tmp_path):
    def flaky(n):
        (tmp_path / f"{n}-{time.monotonic_ns()}").touch()
        if n == 3 and len(list(tmp_path.glob("3-*"))) < 3:
            raise ConnectionError
        return n

    assert list(make().imap(flaky, range(6), retry_on=ConnectionError)) == list(range(6))
    assert len(list(tmp_path.glob("3-*"))) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunksize": 0}, ValueError, "chunksize must be at least 1, got 0"),
        ({"buffersize": 0}, ValueError, "buffersize must be at least 1, got 0"),
        ({"buffersize": 2.5}, TypeError, "buffersize must be a positive integer or None"),
        ({"retries": -1}, ValueError, "retries must be 0 or more"),
        ({"timeout": 0}, ValueError, "timeout must be a positive number"),
        ({"shared": 3}, TypeError, "shared must be"),
        ({"rng": 1, "shared": {"rng": 2}}, TypeError, "rng is given twice"),
    ],
)
def test_bad_options_are_refused_at_once(make, options, error, message):
    with pytest.raises(error, match=message):
        make().imap(abs, [1], **options)


def test_backends_that_are_registered_with_joblib_are_refused():
    class Registered(ThreadingBackend):
        pass

    register_parallel_backend("streamless", Registered)
    try:
        with pytest.raises(ValueError, match=r"imap cannot use backend 'streamless' \(asked for\)"):
            DynamicParallelMapper(2, backend="streamless").imap(abs, [1])
        with (
            parallel_config(backend="streamless"),
            pytest.raises(ValueError, match=r"imap cannot use backend 'streamless' \(joblib's"),
        ):
            DynamicParallelMapper(2).imap(abs, [1])
    finally:
        joblib.parallel.BACKENDS.pop("streamless")


def test_bad_arguments_are_refused_at_once(make):
    with pytest.raises(TypeError, match="func must be callable, got an object of type range"):
        make().imap(range(3), abs)
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        make().imap(abs, 3)


def warn_of(n):
    if n % 2:
        warnings.warn("odd", UserWarning, stacklevel=2)
    return n


@pytest.mark.one_case
@pytest.mark.fault(10)
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("stop", [6, None])
def test_warnings_of_processes_come_when_the_stream_ends(processes, stop):
    results = processes.imap(warn_of, range(10), chunksize=1)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert list(itertools.islice(results, stop)) == list(range(stop or 10))
        results.close()
    assert [str(one.message) for one in heard] == ["odd"]


@pytest.mark.fault(10)
def test_a_warning_may_be_turned_into_an_error(processes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = processes.imap(warn_of, range(3))
        assert list(itertools.islice(results, 3)) == [0, 1, 2]
        with pytest.raises(UserWarning, match="odd"):
            next(results)
        with pytest.raises(ZeroDivisionError):
            list(processes.imap(lambda n: warn_of(n) / (2 - n), range(3)))
    assert processes.map(abs, range(3)) == [0, 1, 2]


def test_the_bar_counts_items(make, capsys):
    list(make(verbosity=1).imap(abs, iter(range(30))))
    assert "30item" in capsys.readouterr().err


class LengthRefused(list):
    """A data loader of a stream: it has a length, which raises."""

    def __len__(self):
        raise TypeError("it is a stream")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (([-1] * 30,), "30/30"),
        ((range(30), [1] * 20), "20/20"),
        ((itertools.count(), [1] * 20), "20/20"),
        ((np.arange(25.0),), "25/25"),
        (({"a": 1, "b": 2},), "2/2"),
        ((LengthRefused([1, 2, 3]),), "3item"),
    ],
)
def test_the_bar_shows_the_length_of_the_input_if_it_has_one(make, inputs, expected, capsys):
    found = list(make(verbosity=1).imap(lambda *items: len(items), *inputs))
    assert set(found) == {len(inputs)}
    assert expected in capsys.readouterr().err


def test_a_length_beyond_every_list_counts_as_unknown(make, capsys):
    results = make(verbosity=1).imap(abs, range(10**30))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert "item" in capsys.readouterr().err


def test_no_length_is_asked_for_where_no_bar_is_shown(make):
    class Asked(list):
        def __len__(self):
            raise AssertionError("it is not needed")

    assert list(make().imap(abs, Asked([-1]))) == [1]


def test_stop_iteration_of_the_function_is_an_error(make):
    def ends_early(n):
        if n == 5:
            raise StopIteration(n, "early")
        return n

    came = []
    with pytest.raises(RuntimeError, match="func raised StopIteration") as caught:
        came.extend(make().imap(ends_early, range(10)))
    assert came == list(range(5))
    assert type(caught.value.__cause__) is StopIteration
    assert caught.value.__cause__.args == (5, "early")
    assert "while mapping item 5" in caught.value.__notes__


@pytest.mark.parametrize("kind", ["item", "result"])
def test_a_value_that_cannot_be_sent_is_named(processes, kind):
    def items():
        yield from range(150)
        yield threading.Lock() if kind == "item" else 150
        yield from range(1000)

    results = processes.imap(lambda n: threading.Lock() if n == 150 else n, items())
    came = []
    with pytest.raises(TypeError) as caught:
        came.extend(results)
    assert came == list(range(150))
    where = "could not pickle item 150 for" if kind == "item" else "while mapping item 150"
    assert any(where in note for note in caught.value.__notes__)


def test_items_are_sent_one_by_one_without_retries_or_with_a_timeout(processes):
    for options in ({"retries": 0}, {"timeout": LONG}):
        assert list(processes.imap(abs, range(50), **options)) == list(range(50))
        assert processes.report.chunksize == 1


def test_the_time_that_the_caller_takes_does_not_count(make):
    # The results are larger than what a socket holds.
    results = make().imap(lambda n: b"x" * 10**6, range(6), timeout=LATE)
    for n, result in enumerate(results):
        assert len(result) == 10**6
        if n == 0:  # further ones are on their way
            time.sleep(LATE + 0.5)


def test_a_timeout_holds_in_the_caller(monkeypatch):
    clock = stopped_clock(monkeypatch)
    results = SerialMapper().imap(clock.sleep, [0, 0.2], timeout=0.05)
    assert next(results) is None
    with pytest.raises(TimeoutError):
        next(results)


def test_results_do_not_wait_for_a_slow_input(parallel):
    began = []

    def items():
        for n in range(4):
            began.append(n)
            yield n
            time.sleep(LATE if n == 0 else 0.05)  # so long the first result may take

    list(parallel().imap(abs, range(10)))  # replaces the workers that the last test has killed
    results = parallel().imap(abs, items())
    assert next(results) == 0
    assert len(began) <= 2
    assert list(results) == [1, 2, 3]


def test_finished_results_do_not_wait_for_an_input_that_has_become_slow(parallel):
    read = []

    def items():
        for n in range(2000):
            if n >= 1000:
                time.sleep(LATE if n == 1000 else 0.05)  # then all before it are there
            read.append(n)
            yield n

    mapper = parallel(chunksize=100)
    results = mapper.imap(abs, items(), buffersize=1100)
    for n in range(1000):
        assert next(results) == n
        if n % 10 == 0:
            time.sleep(0.003)  # a look is due
    assert len(read) <= 1002
    results.close()


@pytest.mark.thorough
def test_batches_of_very_many_arrays_are_sent(processes):
    # Their places alone need more bytes than a socket holds.
    a = np.zeros(2048)
    batches = ([a.view() for _ in range(20_000)] for _ in range(5))
    assert (
        list(processes.imap(lambda arrays: "y" * 10**6 * len(arrays[:1]), batches))
        == ["y" * 10**6] * 5
    )


# Workers that die


@pytest.mark.one_case
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("chunksize", [None, 1, 16])
def test_an_item_that_kills_is_named(ordered, chunksize):
    mapper = MAKERS["dynamic processes"](chunksize=chunksize)
    came = []
    with pytest.raises(WorkerDiedError, match="exited with code 3 while mapping item 37") as caught:
        came.extend(
            mapper.imap(lambda n: os._exit(3) if n == 37 else n, range(100), ordered=ordered)
        )
    assert caught.value.exitcode == 3
    assert caught.value.in_hand == (37, 38)
    if ordered:
        assert came == list(range(37))
    assert mapper(abs, range(10)) == list(range(10))


def test_an_item_whose_worker_dies_once_is_run_again(processes, tmp_path):
    def func(n):
        if n % 50 == 20 and not (tmp_path / str(n)).exists():
            (tmp_path / str(n)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    assert list(processes.imap(func, range(200))) == list(range(200))
    assert sum("SIGKILL" in note for note in processes.report.notes) == 4


def test_an_item_that_kills_is_not_run_again_without_retries(processes, tmp_path):
    def func(n):
        with (tmp_path / "calls").open("a") as log:
            log.write(f"{n}\n")
        return os._exit(1) if n == 5 else n

    with pytest.raises(WorkerDiedError):
        list(processes.imap(func, range(10), retries=0, buffersize=2))
    assert (tmp_path / "calls").read_text().split().count("5") == 1


@pytest.mark.thorough
def test_workers_killed_while_the_caller_is_busy_are_replaced(processes):
    pids = set()
    results = processes.imap(lambda n: (n, os.getpid()), range(300), buffersize=8)
    for due, (n, pid) in enumerate(results):
        assert n == due
        pids.add(pid)
        if n % 60 == 30:
            os.kill(pid, signal.SIGKILL)
    assert len(pids) > 2


def made_in_no_worker():
    if multiprocessing.current_process().name.startswith("taskcarrier-"):
        os._exit(3)
    return abs


class MadeThere:
    def __call__(self, item):
        return item

    def __reduce__(self):
        return made_in_no_worker, ()


@pytest.mark.thorough
def test_workers_that_die_whenever_they_begin_are_an_error(processes):
    with pytest.raises(WorkerDiedError, match="exited with code 3 between two ranges"):
        list(processes.imap(MadeThere(), range(10)))
    assert processes.map(str, range(10)) == [str(n) for n in range(10)]
    assert list(processes.imap(str, range(10))) == [str(n) for n in range(10)]


@pytest.mark.one_case
@pytest.mark.parametrize("chunksize", [1, 5])
def test_an_item_that_takes_too_long_is_named(processes, chunksize):
    mapper = MAKERS["dynamic processes"](chunksize=chunksize)
    results = mapper.imap(lambda n: time.sleep(LONG) if n == 12 else n, range(30), timeout=LATE)
    came = []
    with pytest.raises(TimeoutError, match=rf"longer than timeout={LATE} seconds") as caught:
        came.extend(results)
    assert came == list(range(12 // chunksize * chunksize))
    assert any("was killed" in note for note in caught.value.__notes__)


def test_an_item_that_took_too_long_in_a_thread_is_an_error(monkeypatch):
    clock = stopped_clock(monkeypatch)
    mapper = MAKERS["dynamic threads"](chunksize=1)
    results = mapper.imap(lambda n: clock.sleep(0.2) if n == 3 else n, range(6), timeout=0.05)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TimeoutError, match=r"longer than timeout=0\.05 seconds"):
        next(results)


# What a batch holds


class TestPace:
    def test_batches_grow_while_they_are_short(self):
        pace = Pace(2)
        sizes = []
        for _ in range(14):
            sizes.append(pace.size)
            pace.learn(pace.size, 1000 * pace.size, 0)
        assert sizes == [2**n for n in range(11)] + [1024] * 3
        assert pace.largest == 1024

    def test_batches_shrink_at_once_when_items_become_slow(self):
        pace = Pace(2)
        for _ in range(10):
            pace.learn(pace.size, 1000 * pace.size, 0)
        pace.learn(512, 512 * 2_000_000, 0)
        assert pace.size == 2
        pace.learn(2, 20_000_000, 0)
        assert pace.size == 1

    def test_batches_have_a_limit_in_bytes(self):
        pace = Pace(2)
        for _ in range(10):
            pace.learn(pace.size, 10 * pace.size, 100_000 * pace.size)
        assert pace.size == 10

    @pytest.mark.parametrize(("buffersize", "size"), [(1, 1), (3, 1), (8, 2), (100, 25)])
    def test_batches_take_at_most_a_part_of_the_buffer(self, buffersize, size):
        pace = Pace(2, buffersize)
        for _ in range(10):
            pace.learn(pace.size, 10 * pace.size, 0)
        assert (pace.size, pace.ahead) == (size, buffersize)

    def test_a_requested_batch_size_is_kept(self):
        pace = Pace(2, None, 7)
        pace.learn(7, 1, 1)
        assert (pace.size, pace.ahead) == (7, 56)


class TestSource:
    @pytest.mark.usefixtures("quick_input")
    def test_a_source_gives_batches_until_the_end(self):
        source = StreamInput(iter(range(7)))
        assert [source.batch(3) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
        assert source.has_ended
        source.raise_error()

    def test_slow_items_do_not_wait_for_each_other(self):
        def items():
            for n in range(3):
                time.sleep(0.02)
                yield n

        source = StreamInput(items())
        assert [source.batch(100) for _ in range(4)] == [[0], [1], [2], []]

    @pytest.mark.usefixtures("quick_input")
    def test_an_error_of_the_input_is_kept_for_later(self):
        def items():
            yield 1
            raise ValueError("broken")

        source = StreamInput(items())
        assert source.batch(5) == [1]
        assert source.has_ended
        with pytest.raises(ValueError, match="broken"):
            source.raise_error()
        source.raise_error()  # once

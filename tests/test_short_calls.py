"""Short calls take a short way, and nothing of them differs from the general way."""

import functools
import gc
import signal
import subprocess
import sys
import threading
import weakref
from itertools import islice

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from joblib.parallel import BACKENDS, ThreadingBackend

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    SerialMapper,
    StaticParallelMapper,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
    short_calls,
)
from taskcarrier.lists import short_maps
from taskcarrier.scheduling import history
from taskcarrier.scheduling.gil import GilWaits
from tests.clocks import LONG, wait_until
from tests.odd_functions import ODD_FUNCTIONS, fail_at
from tests.strategies import examples, same_bits

X = np.arange(48.0).reshape(24, 2)
SEEN = []


def double(chunk):
    return 2 * chunk


@pytest.fixture(autouse=True)
def everything_runs_in_the_caller(hand_over_after):
    hand_over_after(10**9)


PREDICT = history.predict


@pytest.fixture
def any_time_is_short(monkeypatch):
    """Let calls be short by what is remembered of the last, however long that took."""
    monkeypatch.setattr(history, "predict", PREDICT)
    for name in ("FOR_THREADS", "FOR_PROCESSES"):
        monkeypatch.setattr(short_calls, f"_MAX_SECONDS_{name}", LONG)
    for module in (short_calls, short_maps):
        monkeypatch.setattr(module, "MOST_SECONDS", LONG)


@pytest.fixture(params=["patient", "impatient"])
def patience(request, monkeypatch):
    """Let calls be short to their end, or go the general way as soon as they can."""
    monkeypatch.setattr(short_calls, "find_state", lambda call: [])
    is_patient = request.param == "patient"
    for module in (short_calls, short_maps):
        monkeypatch.setattr(module, "MOST_SECONDS", LONG if is_patient else -1.0)


def recorded(func):
    """Return a function that also records what it is called with."""

    @functools.wraps(func)
    def both(*args, **kwargs):
        SEEN.append([np.copy(arg) for arg in args if isinstance(arg, np.ndarray)] or args)
        return func(*args, **kwargs)

    return both


def outcome_of(call, *, is_short):
    """Return what a call gives, what it calls the function with, and its report."""
    SEEN.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "predict", lambda *_: 0.0)
        if not is_short:
            patch.setattr(short_calls.ShortSettings, "choose", lambda *_, **__: (None, None))
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  # errors of any type are compared
            result = error
    report = last_report()
    facts = report.backend, report.balance, report.n_jobs, report.chunksize, report.ranges
    reason = report.reason.partition(" an item took ")[0].partition(": ")[-1] or report.reason
    return result, list(SEEN), (*facts, report.items, report.notes, reason)


def assert_alike(one, other):
    assert type(one) is type(other)
    if isinstance(one, BaseException):
        assert one.args == other.args
        assert getattr(one, "__notes__", []) == getattr(other, "__notes__", [])
        assert type(one.__cause__) is type(other.__cause__)
        assert type(one.__context__) is type(other.__context__)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_alike(*pair)
    elif isinstance(one, np.ndarray):
        assert one.strides == other.strides
        assert one.flags.owndata == other.flags.owndata
        assert one.flags.writeable == other.flags.writeable
        if one.dtype.hasobject:
            assert one.tolist() == other.tolist()
        else:
            assert same_bits(one, other)
    else:
        assert repr(one) == repr(other)  # NaT does not equal itself


def check(call, *, in_threads=False):
    """Check that a call gives the same on both ways.

    The short way may call the function with items after one that ends the call. Threads call it in
    any order, and which error they meet first is a matter of luck.
    """
    general, calls, facts = outcome_of(call, is_short=False)
    short, calls_of_short, facts_of_short = outcome_of(call, is_short=True)
    if isinstance(general, Exception) and in_threads:
        assert type(short) is type(general)
        return
    assert_alike(short, general)
    if in_threads:
        calls, calls_of_short = sorted(calls, key=repr), sorted(calls_of_short, key=repr)
    assert_alike(calls_of_short[: len(calls)], calls)
    assert len(calls_of_short) == len(calls) or isinstance(general, Exception)
    if not isinstance(general, Exception):
        assert facts_of_short == facts


FUNCTIONS = {
    **ODD_FUNCTIONS,
    "matrix": lambda c: np.asarray(c).reshape(-1, 2).view(np.matrix),
}


def reduce_to_list(func, *arrays, **options):
    """Return what `map_chunks` returns, by a reduction."""
    return reduce_array(func, *arrays, combine=lambda a, b: [*a, b], initial=[], **options)


VERBS = [map_array, map_items, map_chunks, reduce_to_list]
VARIANTS = [{}, {"chunksize": 5}, {"balance": "dynamic"}]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_short_maps_give_what_all_maps_give(verb, name):
    func = recorded(FUNCTIONS[name])
    for options in VARIANTS:
        check(lambda options=options: verb(func, X, n_jobs=2, **options))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_caller_alone_gives_what_it_gives_on_the_general_way(verb, name):
    func = recorded(FUNCTIONS[name])
    for where in ({"backend": "sequential"}, {"n_jobs": 1}, {"backend": "threads", "n_jobs": 1}):
        for options in VARIANTS:
            check(lambda options=where | options: verb(func, X, **options))


@pytest.mark.parametrize("waking", ["wakes at once", "begins alone"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "later" not in name])
def test_threads_give_what_they_give_on_the_general_way(verb, name, waking, monkeypatch):
    monkeypatch.setattr(history, "was_unaided", lambda _: waking == "begins alone")
    func = recorded(FUNCTIONS[name])
    for options in VARIANTS:
        where = {"backend": "threading", "n_jobs": 2} | options
        check(lambda options=where: verb(func, X, **options), in_threads=True)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "later" in name])
def test_threads_say_of_results_that_differ_what_they_say_on_the_general_way(name):
    """Which chunk is named depends on which came first, so there is one unusual chunk here."""
    func = recorded(FUNCTIONS[name])
    for verb in (map_array, map_items, map_chunks):
        call = functools.partial(verb, func, X, backend="threading", n_jobs=2)
        general, short = (outcome_of(call, is_short=is_short)[0] for is_short in (False, True))
        assert type(short) is type(general)


def test_a_function_may_fill_the_same_array_for_each_item():
    buffer = np.zeros(2)

    def fill(row):
        buffer[:] = row
        return buffer

    def fill_two(row):
        return fill(row), row[0]

    for options in ({"n_jobs": 2}, {"backend": "sequential"}, {"chunksize": 5, "n_jobs": 1}):
        check(lambda options=options: map_items(fill, X, **options))
        check(lambda options=options: map_items(fill_two, X, **options))
        check(lambda options=options: map_items(lambda row: [fill(row)], X, **options))


def test_many_chunks_go_the_general_way():
    Y = map_array(np.negative, np.arange(20_000.0), chunksize=1, backend="sequential")
    assert (-np.arange(20_000.0) == Y).all()


def test_constants_are_passed_on():
    check(lambda: map_array(np.sort, X, kwargs={"axis": 1}, n_jobs=2))
    check(lambda: map_array(np.power, X, args=(2,), n_jobs=2))
    check(lambda: map_items(np.power, X, X, args=(), kwargs={"dtype": float}, n_jobs=2))
    check(lambda: map_array(lambda c, a, b=0: c + a * b, X, args=(2,), kwargs={"b": 3}, n_jobs=2))
    check(lambda: map_array(lambda c, a: c + a, X, args=(X[0],), n_jobs=2))
    check(lambda: map_array(lambda c, a: c + a, X, args=[2], n_jobs=2))
    check(lambda: map_array(lambda c: c, X, kwargs={1: 2}, n_jobs=2))


@pytest.mark.parametrize(
    "array",
    [
        X.T,
        X[::2],
        X[:, :1],
        np.float64(3),
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        np.asfortranarray(X),
        np.arange(5, dtype=object),
        np.zeros(4, "i4,f4"),
        np.ma.zeros(4),
        np.zeros((3, 3)).view(np.matrix),
        np.array(["a", "bcd"]),
        [1, 2, 3],
        range(4),
        np.zeros(6, ">f4"),
        X[3:7],
    ],
    ids=lambda array: f"{type(array).__name__}-{getattr(array, 'dtype', '')}",
)
def test_arrays_of_any_kind_give_the_same(array):
    for verb in (map_array, map_items, map_chunks):
        check(lambda verb=verb: verb(recorded(np.copy), array, n_jobs=2))
    check(lambda: map_array(lambda a, b: b, array, array, n_jobs=2))
    check(lambda: map_array(lambda a, b: b, X, array, n_jobs=2))


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"axis": 9},
        {"dtype": "f4"},
        {"writable": True},
        {"chunksize": 0},
        {"chunksize": "5"},
        {"chunksize": True},
        {"n_jobs": 0},
        {"n_jobs": 1},
        {"n_jobs": -2},
        {"balance": "odd"},
        {"balance": None},
        {"balance": np.array(["static", "dynamic"])},
        {"backend": "threading"},
        {"on_error": "collect"},
        {"rng": 1},
        {"unknown": 1},
        {"timeout": 60},
        {"depth": 1},
    ],
    ids=str,
)
def test_options_mean_the_same(options):
    check(lambda: map_array(lambda c, rng=None: c, X, **{"n_jobs": 2, **options}))


@examples(30)
@given(
    array=hnp.arrays(
        st.sampled_from(["f8", "i2", "?", "c8", "M8[s]", "U3", "S2", ">u4"]),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=40),
    ),
    chunksize=st.one_of(st.none(), st.integers(1, 50)),
    func=st.sampled_from([np.copy, lambda c: (c, c[..., :0]), lambda c: c[..., :1]]),
    verb=st.sampled_from(VERBS),
)
def test_any_array_gives_the_same(array, chunksize, func, verb):
    check(lambda: verb(recorded(func), array, chunksize=chunksize, n_jobs=2))


@pytest.mark.parametrize("combine", [np.add, None, lambda a, b: 1 // 0, lambda a, b: a.append(b)])
def test_reductions_say_the_same_of_what_combines(combine):
    for options in ({}, {"initial": 1.0}, {"backend": "sequential"}, {"shunksize": 5}):
        for array in (X, X[:1], X[:0]):
            check(lambda o=options, a=array: reduce_array(np.sum, a, combine=combine, **o))
    mapper = SerialMapper()
    check(lambda: mapper.reduce_array(np.sum, X, combine=combine))
    check(lambda: reduce_array(np.sum, X))


class TestLists:
    @pytest.mark.usefixtures("patience")
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_short_maps_give_what_all_maps_give(self, name):
        mapper = StaticParallelMapper(n_jobs=2)
        func = recorded(FUNCTIONS[name])
        alone, threads = SerialMapper(), StaticParallelMapper(n_jobs=2, backend="threading")
        for chunksize in (None, 5):
            check(lambda size=chunksize: mapper.map(func, list(X.copy()), chunksize=size))
            check(lambda size=chunksize: alone.map(func, list(X.copy()), chunksize=size))
            check(
                lambda size=chunksize: threads.map(func, list(X.copy()), chunksize=size),
                in_threads=True,
            )
        check(lambda: mapper.map(lambda a, b: (a, b), range(30), range(20)))
        check(lambda: mapper.starmap(lambda a, b: (a, b), [(1, 2), (3, 4)]))
        check(lambda: mapper.starmap(lambda a, b: a // b, [(1, 2), (3, 0)]))

    def test_options_mean_the_same(self):
        mapper = StaticParallelMapper(n_jobs=2)
        for options in ({"rng": 1}, {"shared": {"k": 2}}, {"on_error": "collect"}, {"retries": 0}):
            check(lambda options=options: mapper.map(lambda x, **_: x, range(9), **options))
        check(lambda: mapper.map(str, []))
        check(lambda: SerialMapper().map(str, range(5)))


MAPPERS = [
    lambda f, n: map_array(f, X[:n], chunksize=1, n_jobs=2, backend="threading"),
    lambda f, n: map_items(f, X[:n], chunksize=1, n_jobs=2, backend="threading"),
    lambda f, n: map_chunks(f, X[:n], chunksize=1, n_jobs=2, backend="threading"),
    lambda f, n: StaticParallelMapper(2, backend="threading").map(f, list(X[:n])),
    lambda f, n: StaticParallelMapper(2, backend="threading").starmap(
        lambda *row: f(np.array(row)), list(X[:n])
    ),
]


@pytest.mark.parametrize("call", MAPPERS, ids=["array", "items", "chunks", "map", "starmap"])
class TestThreads:
    """Calls in threads that are known to be short, on all verbs that take the short way."""

    @pytest.fixture(autouse=True)
    def threads_are_woken_at_once(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        monkeypatch.setattr(history, "was_unaided", lambda _: False)

    def test_two_units_are_run_at_the_same_time(self, call):
        barrier = threading.Barrier(2)

        def func(x):
            barrier.wait(LONG)
            return x + 1

        assert (np.array(call(func, 2)).reshape(2, 2) == X[:2] + 1).all()
        report = last_report()
        assert (report.backend, report.reason, report.n_jobs) == ("threading", "asked for", 2)
        workers = [(each.name, each.ranges, each.items) for each in report.workers]
        assert workers == [("caller", 1, 1), ("thread 1", 1, 1)]

    @pytest.mark.parametrize("in_caller", [True, False])
    def test_an_error_in_any_worker_is_raised_with_its_notes(self, call, in_caller):
        barrier, calls = threading.Barrier(2), []

        def func(x):
            calls.append(x)
            barrier.wait(LONG)
            if (threading.current_thread() is threading.main_thread()) is in_caller:
                raise ValueError(np.min(x))
            return x

        with pytest.raises(ValueError, match=r"\d") as caught:
            call(func, 2)
        number = int(caught.value.args[0]) // 2
        notes = "\n".join(caught.value.__notes__)
        assert f"items {number}:{number + 1}" in notes or f"item {number}" in notes
        assert "(thread " in notes
        assert len(calls) == 2  # none is called again

    def test_errors_in_both_workers_leave_nothing_behind(self, call):
        barrier = threading.Barrier(2)

        class Held:
            pass

        dead = []

        def func(x):
            held = Held()
            dead.append(weakref.ref(held))
            barrier.wait(LONG)
            raise ValueError(held is None)

        gc.collect()
        gc.disable()
        try:
            with pytest.raises(ValueError, match="False"):
                call(func, 2)
            wait_until(lambda: not any(ref() for ref in dead))
        finally:
            gc.enable()
        assert len(dead) == 2

    def test_nested_maps_are_serial(self, call):
        reasons = []

        def func(x):
            map_array(np.negative, X, n_jobs=2, backend="threading")
            reasons.append(last_report().reason)
            return x

        call(func, 3)
        assert reasons == ["called inside a worker"] * 3

    def test_an_interrupt_while_a_thread_is_in_the_function_is_raised_at_once(self, call):
        barrier, go_on = threading.Barrier(2), threading.Event()

        def func(x):
            barrier.wait(LONG)
            if threading.current_thread() is not threading.main_thread():
                signal.raise_signal(signal.SIGINT)  # which is handled in the main thread
                go_on.wait(LONG)
            return x

        with pytest.raises(KeyboardInterrupt):
            call(func, 2)
        assert not last_report().workers
        go_on.set()
        assert (np.array(call(lambda x: x, 5)).reshape(5, 2) == X[:5]).all()

    def test_two_threads_of_the_program_may_call_at_once(self, call):
        barrier, results = threading.Barrier(4), []

        def func(x):
            barrier.wait(LONG)
            return x

        thread = threading.Thread(target=lambda: results.append(call(func, 2)))
        thread.start()
        results.append(call(func, 2))
        thread.join()
        assert all((np.array(result).reshape(2, 2) == X[:2]).all() for result in results)


@pytest.mark.parametrize("options", [{"backend": "sequential"}, {"backend": "threading"}])
def test_a_function_that_forks_goes_on_in_the_parent_only(options):
    code = f"""
import os
import numpy as np
from taskcarrier import map_array, map_items, map_chunks, StaticParallelMapper
children = []

def func(x):
    child = os.fork() if np.min(x) == 0 else 1
    if child:
        children.append(child)
    return x + 1

X = np.arange(8.0)
options = {options!r}
for call in (
    lambda f: map_array(f, X, chunksize=1, n_jobs=2, **options),
    lambda f: map_items(f, X, n_jobs=2, **options),
    lambda f: np.ravel(map_chunks(f, X, chunksize=1, n_jobs=2, **options)),
    lambda f: np.array(StaticParallelMapper(2, **options).map(f, list(X))),
):
    call(lambda x: x + 1)
    for _ in range(2):
        children.clear()
        assert (call(func) == X + 1).all()
        statuses = [os.waitpid(child, 0)[1] for child in children if child > 1]
        assert [os.waitstatus_to_exitcode(status) for status in statuses] == [1], statuses
print("right")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONG,
    )
    assert done.stdout == "right\n", done.stderr


class TestMappers:
    def test_methods_give_the_same(self):
        for chunksize in (None, 7):
            mapper = StaticParallelMapper(n_jobs=2, chunksize=chunksize)
            check(lambda mapper=mapper: mapper.map_array(np.negative, X))
            check(lambda mapper=mapper: mapper.map_items(np.sum, X))
            check(lambda mapper=mapper: mapper.map_chunks(np.sum, X))
            check(lambda mapper=mapper: mapper.map_chunks(fail_at(5), X))
            assert mapper.report == last_report()

    @pytest.mark.parametrize("kind", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
    def test_methods_have_no_options_of_functions(self, kind, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        with pytest.raises(TypeError, match="n_jobs is given to the mapper"):
            kind().map_array(np.negative, X, n_jobs=2)

    @pytest.mark.parametrize("n_jobs", [1, None])
    def test_backends_of_joblib_take_the_general_way(self, monkeypatch, n_jobs):
        monkeypatch.setitem(BACKENDS, "elsewhere", ThreadingBackend)
        monkeypatch.setattr(short_calls, "count_cores", lambda: 1)
        mapper = StaticParallelMapper(n_jobs=n_jobs, backend="elsewhere")
        with pytest.raises(ValueError, match="maps over arrays cannot use"):
            mapper.map_array(np.negative, X)
        with pytest.raises(ValueError, match="maps over arrays cannot use"):
            mapper.reduce_array(np.sum, X, combine=np.add)
        assert mapper.map(len, ["a", "bc"]) == [1, 2]
        assert mapper.report.backend == ("elsewhere" if n_jobs is None else "sequential")


class TestPatience:
    def test_a_call_that_is_not_short_after_all_goes_the_general_way(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        monkeypatch.setattr(short_calls, "MOST_SECONDS", -1.0)
        for verb in (map_array, map_items, map_chunks):
            verb(np.negative, X, n_jobs=2)
            assert "caller" in [worker.name for worker in last_report().workers]
        mapper = StaticParallelMapper(n_jobs=2)
        assert mapper.map(str, range(50)) == list(map(str, range(50)))
        assert mapper.report.ranges == 50

    def test_one_that_may_have_changed_its_function_does_not(self, monkeypatch):
        monkeypatch.setattr(short_calls, "MOST_SECONDS", -1.0)
        assert short_calls.Patience(double).has_ended
        log = []
        assert not short_calls.Patience(lambda chunk: log).has_ended
        patience = short_calls.Patience(functools.partial(double, log))
        assert not patience.has_ended
        monkeypatch.setattr(short_calls, "MOST_SECONDS", LONG)
        assert not short_calls.Patience(double).has_ended


class TestWhenItIsShort:
    @pytest.mark.usefixtures("any_time_is_short")
    def test_a_call_is_short_if_the_last_one_was(self, monkeypatch):
        made = []
        make = short_calls._make_report
        monkeypatch.setattr(
            short_calls,
            "_make_report",
            lambda *args, **kwargs: made.append(1) or make(*args, **kwargs),
        )

        def func(chunk):
            return chunk + 1

        for n_short in range(4):
            map_array(func, X, n_jobs=2)
            last_report()
            assert len(made) == n_short
        map_array(func, np.zeros((24 * 100, 2)), n_jobs=2)  # much larger
        last_report()
        assert len(made) == 3

    @pytest.mark.usefixtures("any_time_is_short")
    def test_threads_are_woken_until_a_call_was_over_before_they_came(self, monkeypatch):
        monkeypatch.setattr(short_calls, "ALONE_SECONDS", LONG)
        begins_alone = []
        run = short_calls.run_crew

        def run_crew(*args, **kwargs):
            begins_alone.append(kwargs["begins_alone"])
            return run(*args, **kwargs)

        monkeypatch.setattr(short_calls, "run_crew", run_crew)

        barrier = threading.Barrier(2)

        def meet(chunk):
            barrier.wait(LONG)
            return chunk

        for _ in range(4):  # the first is the general way's
            map_array(meet, X, chunksize=12, n_jobs=2, backend="threading")
        assert begins_alone == [False] * 3
        history.remember_help(history.find_known_in_threads(meet), was_unaided=True)
        history.forget(meet)
        assert not history.was_unaided(meet)

    @pytest.mark.usefixtures("any_time_is_short")
    def test_explicit_threads_are_remembered_with_what_all_of_them_took(self):
        def func(chunk):
            return chunk + 1

        for _ in range(3):
            map_array(func, X, n_jobs=2, backend="threading")
            busy_seconds = sum(worker.busy for worker in last_report().workers)
            known = history.find_known_in_threads(func)
            seconds = history.predict(known, len(X), X.nbytes)
            assert seconds == pytest.approx(busy_seconds)
        assert last_report().workers[0].name == "caller"
        with pytest.raises(ZeroDivisionError):
            map_array(lambda chunk: 1 // 0, X, n_jobs=2, backend="threading")

    def test_a_slow_call_is_not_short_the_next_time(self, monkeypatch):
        monkeypatch.undo()
        key = history.find_known(double)
        history.remember(double, 10.0, 24, 1)
        assert history.predict(double, 24, 1) == 10.0
        settings = short_calls.ShortSettings.from_options({"n_jobs": 2})
        assert settings.choose(double, 24, 1)[0] is None
        history.forget(double)
        assert key not in history._last_alone

    def test_what_threads_may_run_is_handed_over_sooner(self):
        may_use_threads = short_calls.may_use_threads
        unknown, held = GilWaits(), GilWaits()
        held.n_held = 4
        for waits in (None, unknown, held):
            assert may_use_threads(np.sqrt, waits)
        assert not may_use_threads(double, None)
        assert may_use_threads(double, unknown)
        assert not may_use_threads(double, held)

    @pytest.mark.parametrize(
        ("func", "backend", "seconds", "is_short"),
        [
            (np.sqrt, None, 0.001, True),
            (np.sqrt, None, 0.003, False),
            (double, None, 0.003, True),
            (double, None, 0.01, False),
            (double, "auto", 0.001, True),
            (double, "auto", 0.003, False),
        ],
    )
    def test_what_decides_is_how_long_the_last_call_took(
        self, func, backend, seconds, is_short, monkeypatch
    ):
        monkeypatch.setattr(history, "predict", lambda *_: seconds)
        monkeypatch.setattr(history, "find_gil_waits", lambda *_: GilWaits())
        settings = short_calls.ShortSettings.from_options({"n_jobs": 2, "backend": backend})
        assert (settings.choose(func, 24, 1)[0] is not None) is is_short

    def test_a_call_that_workers_did_not_help_is_short_the_next_times(self, monkeypatch):
        def is_short(seconds):
            monkeypatch.setattr(history, "predict", lambda *_: seconds)
            return settings.choose(func, 24, 1)[0] is not None

        def func(chunk):
            return 2 * chunk

        settings = short_calls.ShortSettings.from_options({"n_jobs": 2, "backend": "auto"})
        assert not is_short(0.003)
        history.remember_left_alone(func, 0.003, 24, 1)
        assert is_short(0.003)
        assert not is_short(0.01)
        assert [is_short(0.003) for _ in range(history._CALLS_ALONE)].count(False) == 1

    def test_a_call_in_which_workers_did_not_help_is_remembered(self):
        def func(chunk):
            return 3 * chunk

        assert not history.is_left_alone(func, len(X), X.nbytes)
        map_array(func, X, n_jobs=2, backend="auto")
        assert history.is_left_alone(func, len(X), X.nbytes)
        assert not history.is_left_alone(func, 3 * len(X), X.nbytes)

    def test_workers_and_joblib_take_the_general_way(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)

        def is_short():
            options = [{}, {"n_jobs": 1}, {"backend": "sequential"}, {"backend": "threads"}]
            options.append({"backend": "auto"})
            settings = [short_calls.ShortSettings.from_options({"n_jobs": 2, **o}) for o in options]
            return [each.choose(double, 1, 1)[0] is not None for each in settings]

        assert all(is_short())
        with joblib.parallel_config(backend="threading", n_jobs=2):
            assert not any(is_short())
            map_array(double, X)
            assert last_report().backend == "threading"
        assert all(is_short())
        inner = []

        def nested(chunk):
            inner.extend(is_short())
            return map_array(double, chunk)

        map_array(nested, X, n_jobs=2)
        assert not any(inner)

    def test_an_interrupt_is_raised_and_the_next_call_is_as_usual(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)

        def interrupt(chunk):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            map_array(interrupt, X, n_jobs=2)
        assert not taskcarrier.workers.loop.this_thread.is_worker
        assert (map_array(double, X, n_jobs=2) == 2 * X).all()

    def test_threads_keep_their_own_reports(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        map_array(double, X, n_jobs=2)

        def other():
            map_array(double, X[:3], n_jobs=2)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert last_report().items == 24


@pytest.mark.parametrize("backend", [None, "sequential", "threading"])
def test_a_report_that_nobody_has_asked_for_keeps_nothing_of_its_call(backend, monkeypatch):
    monkeypatch.setattr(history, "predict", lambda *_: 0.0)
    mapper = StaticParallelMapper(2, backend=backend)
    for call in (mapper.map, mapper.map_array, lambda *args: list(mapper.imap(*args))):
        carried = np.zeros(3)
        dead = weakref.ref(carried)
        call(lambda x, carried=carried: x, X)
        del carried
        wait_until(lambda dead=dead: dead() is None)  # a thread may be on its way out


class TestStreams:
    @pytest.mark.usefixtures("patience")
    @pytest.mark.parametrize("name", FUNCTIONS)
    @pytest.mark.parametrize("n_taken", [3, 24, 100])
    def test_short_streams_give_what_all_streams_give(self, name, n_taken):
        mapper = StaticParallelMapper(n_jobs=2)
        func = recorded(FUNCTIONS[name])

        def take():
            results = []
            stream = mapper.imap(func, list(X.copy()))
            try:
                for result, _ in zip(stream, range(n_taken), strict=False):
                    results.append(result)  # those before an error count
            except Exception as error:  # noqa: BLE001  # compared
                return results, error
            finally:
                stream.close()
            return results, None

        general, _, _ = outcome_of(take, is_short=False)
        short, _, facts = outcome_of(take, is_short=True)
        assert_alike(short, general)
        assert facts[:2] == ("sequential", "serial")
        assert facts[5] <= 24

    @pytest.mark.parametrize("name", FUNCTIONS)
    @pytest.mark.parametrize("n_taken", [3, 24, 100])
    def test_streams_in_the_caller_give_what_they_give_on_the_general_way(self, name, n_taken):
        func = recorded(FUNCTIONS[name])

        def take():
            stream = SerialMapper().imap(func, list(X.copy()))
            try:
                return list(islice(stream, n_taken))
            finally:
                stream.close()

        check(take)

    def test_inputs_of_any_kind_give_the_same(self):
        mapper = StaticParallelMapper(n_jobs=2)
        for inputs in ([range(5)], [[1, 2], (3, 4, 5)], [iter("abc")], ["abc"], [{1: 2}], [[]]):
            kinds = [list(each) if type(each) is type(iter("")) else each for each in inputs]
            general, _, _ = outcome_of(
                lambda kinds=kinds: list(mapper.imap(lambda *a: a, *kinds)), is_short=False
            )
            short, _, _ = outcome_of(
                lambda kinds=kinds: list(mapper.imap(lambda *a: a, *kinds)), is_short=True
            )
            assert short == general

    def test_a_stream_that_is_not_short_after_all_goes_the_general_way(self, monkeypatch):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        monkeypatch.setattr(short_calls, "MOST_SECONDS", -1.0)
        monkeypatch.setattr(short_maps, "MOST_SECONDS", -1.0)
        calls = []
        mapper = StaticParallelMapper(n_jobs=2)
        for ordered in (True, False):
            stream = mapper.imap(lambda x: (calls.append(x), -x)[1], range(50), ordered=ordered)
            assert sorted(stream) == sorted(-x for x in range(50))
            del calls[:]
        failing = mapper.imap(lambda x: 1 // (x - 30), range(50))
        assert len(list(islice(failing, 30))) == 30
        with pytest.raises(ZeroDivisionError) as caught:
            next(failing)
        assert "item 30" in caught.value.__notes__[0]

    @pytest.mark.usefixtures("any_time_is_short")
    def test_a_stream_is_short_if_the_last_one_was(self):
        mapper = StaticParallelMapper(n_jobs=2)
        results = [list(mapper.imap(lambda x: -x, range(50))) for _ in range(3)]
        assert results == [[-x for x in range(50)]] * 3
        assert (mapper.report.items, mapper.report.chunksize) == (50, 3)

    def test_nested_maps_in_a_short_stream_are_serial_and_the_caller_is_free_between_items(
        self, monkeypatch
    ):
        monkeypatch.setattr(history, "predict", lambda *_: 0.0)
        inside = []
        stream = StaticParallelMapper(n_jobs=2).imap(
            lambda x: inside.append(taskcarrier.workers.loop.is_in_worker()), range(3)
        )
        for _ in stream:
            assert not taskcarrier.workers.loop.is_in_worker()
        assert inside == [True] * 3

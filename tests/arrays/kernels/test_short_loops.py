"""Short maps over kernels: what the general way gives, by a few calls of the compiled loop."""

import itertools
import signal
import threading

import numba
import numpy as np
import pytest

from taskcarrier import StaticParallelMapper, last_report, map_array, map_items
from taskcarrier.arrays.kernels import compiler, short_loops
from taskcarrier.arrays.kernels.compiler import FoundLoop
from taskcarrier.arrays.kernels.short_loops import LoopWork
from taskcarrier.arrays.kernels.signatures import KernelResult, WritableArgs
from taskcarrier.scheduling import history
from taskcarrier.short_calls import Patience, ShortSettings
from tests.clocks import LONG
from tests.strategies import assert_same, keep_pools_warm

pools = keep_pools_warm(2)
RUNS = [
    {"backend": "sequential"},
    {"n_jobs": 1},
    {"backend": "threading", "n_jobs": 2},
    {"backend": "threading", "n_jobs": 2, "balance": "dynamic"},
    {"n_jobs": 2},
    {"backend": "auto", "n_jobs": 2},
]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(map(str, run.values())))
def run(request):
    return request.param


@pytest.fixture
def loops(monkeypatch):
    """Record the ranges that loops of short calls are called with, and the threads that call."""
    ranges = []
    init = LoopWork.__init__

    def recording(self, *args):
        init(self, *args)
        loop = self._loop

        def run_loop(ledger, row, begin, end, *rest):
            ranges.append((begin, end, threading.current_thread()))
            loop(ledger, row, begin, end, *rest)

        self._loop = run_loop

    monkeypatch.setattr(LoopWork, "__init__", recording)
    monkeypatch.setattr(history, "predict", lambda *_: 0.0)
    return ranges


@numba.njit
def root(x):
    if x < 0:
        raise ValueError("negative")
    return x**0.5


@numba.njit
def parts(row, other):
    return row[0] + other, row.sum() > 0


@numba.njit
def scaled(row, factor, shift):
    return factor * row[-1] + shift


@numba.njit
def between(date, other):
    return date - other


@numba.njit
def total(item):
    return item.sum()


X = np.arange(300.0)
ROWS = np.arange(900).reshape(300, 3)
DATES = np.arange("2000-01-01", "2000-02-01", dtype="M8[D]")
CASES = {
    "numbers": (root, (X,), {}),
    "one item": (root, (X[:1],), {}),
    "view": (root, (np.arange(600.0)[100:300],), {}),
    "integers": (root, (np.arange(300),), {}),
    "rows, tuple": (parts, (ROWS, X), {}),
    "stacks": (total, (np.arange(240.0).reshape(40, 2, 3),), {}),
    "arguments": (scaled, (ROWS,), {"args": (2.5, True)}),
    "complex": (scaled, (ROWS,), {"args": (2.5j, 1.0)}),
    "chunksize": (root, (X,), {"chunksize": 7}),
    "dates": (between, (DATES, DATES[::-1].copy()), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_short_call_gives_what_the_general_way_gives(name, run, loops, monkeypatch):
    kernel, arrays, options = CASES[name]
    with monkeypatch.context() as patch:
        patch.setattr(ShortSettings, "choose", lambda *_, **__: (None, None))
        expected = map_items(kernel, *arrays, **options, **run)
    assert loops == []
    general = last_report()
    result = map_items(kernel, *arrays, **options, **run)
    report = last_report()
    assert_same(result, expected)
    bounds = sorted(pair[:2] for pair in loops)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == len(arrays[0])
    assert sum(worker.items for worker in report.workers) == report.items == len(arrays[0])
    assert (report.chunksize, report.ranges) == (general.chunksize, general.ranges)
    if run.get("backend") == "threading":
        assert (report.backend, report.n_jobs) == ("threading", min(2, len(arrays[0])))
    else:
        assert {thread for *_, thread in loops} == {threading.current_thread()}


def test_mappers_take_the_short_way_too(loops):
    mapper = StaticParallelMapper(n_jobs=1)
    for _ in range(2):
        assert (mapper.map_items(root, X) == X**0.5).all()
    assert len(loops) > 0


@numba.njit
def with_default(x, factor=2.0):
    return factor * x


@numba.njit("float64(float64[:])")
def may_write(row):
    return row[0]


@numba.njit(parallel=True)
def own_threads(x):
    total = 0.0
    for n in numba.prange(3):
        total += n * x
    return total


@numba.njit
def as_array(x):
    return np.array([x, x])


@pytest.mark.parametrize(
    ("kernel", "array", "options"),
    [
        (with_default, X, {"kwargs": {"factor": 3.0}}),
        (with_default, X, {"args": (3,)}),  # one type up to 2**63, and another from there on
        (with_default, X, {"args": (np.float32(3),)}),
        (may_write, ROWS.astype(float), {}),
        (own_threads, X, {}),
        (as_array, X, {}),
        (with_default, X[::2], {}),
        (with_default, X.astype(">f8"), {}),
        (with_default, X, {"timeout": LONG}),
    ],
)
def test_what_has_no_such_loop_goes_the_general_way(kernel, array, options, loops):
    results = [map_items(kernel, array, n_jobs=1, **options) for _ in range(2)]
    assert_same(results[0], results[1])
    more = *options.get("args", ()), *options.get("kwargs", {}).values()
    alone = [kernel.py_func(item, *more) for item in array]
    assert np.allclose(results[1], alone, rtol=1e-15)
    assert loops == []


def test_large_results_go_the_general_way(loops, monkeypatch):
    map_items(root, X, n_jobs=1)
    loops.clear()
    monkeypatch.setattr("taskcarrier.arrays.short_maps._MAX_NBYTES", X.nbytes - 1)
    assert (map_items(root, X, n_jobs=1) == X**0.5).all()
    assert loops == []
    monkeypatch.setattr("taskcarrier.arrays.short_maps._MAX_NBYTES", X.nbytes)
    assert (map_items(root, X, n_jobs=1) == X**0.5).all()
    assert len(loops) > 0


def test_chunks_go_the_general_way(loops):
    @numba.njit
    def double(chunk):
        return 2 * chunk

    for backend in (None, "sequential", "threading"):
        for _ in range(2):
            assert (map_array(double, X, backend=backend) == 2 * X).all()
    assert loops == []


def test_the_error_is_that_of_the_general_way(run, loops):
    items = X.copy()
    map_items(root, items, **run)
    items[[50, 200]] = -1
    with pytest.raises(ValueError, match="negative") as caught:
        map_items(root, items, **run)
    is_ordered = 1 in run.values() or "sequential" in run.values() or "dynamic" in run.values()
    numbers = (50,) if is_ordered else (50, 200)  # threads begin in both halves at once
    assert any(f"item {n}" in note for note in caught.value.__notes__ for n in numbers)
    assert len(loops) > 0
    assert (map_items(root, X, **run) == X**0.5).all()


def test_a_kernel_that_is_compiled_anew_is_another(loops):
    factor = 2.0

    @numba.njit
    def scale(x):
        return factor * x

    for _ in range(2):
        assert (map_items(scale, X, n_jobs=1) == 2 * X).all()
    n_calls = len(loops)
    assert n_calls > 0
    factor = 3.0
    scale.recompile()
    for n_more in (0, n_calls):
        assert (map_items(scale, X, n_jobs=1) == 3 * X).all()
        assert len(loops) == n_calls + n_more


def make_work(loop, n_items=1000, patience=None):
    result = KernelResult((np.dtype(float),), is_tuple=False, writable_args=WritableArgs(False))
    found = FoundLoop(loop, result, has_effects=False)
    return LoopWork(found, (np.zeros(n_items),), (), patience)


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [
        # Each call takes less, about as long, or more; then the items of each call follow.
        (LONG, [1, 4, 16, 64, 15]),
        (0.0, [1] * 100),
        (-1.0, [1] * 100),
    ],
)
def test_the_next_call_of_a_loop_has_more_items_if_the_last_was_quick(
    seconds, lengths, monkeypatch
):
    if seconds == 0:  # neither quick nor slow
        monkeypatch.setattr(short_loops, "_GROWTH", 1)
    else:
        monkeypatch.setattr(short_loops, "_CALL_SECONDS", seconds)
    called = []
    work = make_work(lambda *words: called.append(words[2:4]), n_items=100)
    assert work.run_unit(0, 100)
    assert [stop - start for start, stop in called] == lengths
    assert called[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(called))
    assert called[-1][1] == 100
    assert work.join_results() is not None


def test_the_next_call_of_a_loop_has_fewer_items_if_the_last_was_slow(monkeypatch):
    called = []

    def loop(*words):
        called.append(words[2:4])
        if len(called) == 3:
            monkeypatch.setattr(short_loops, "_CALL_SECONDS", -1.0)

    monkeypatch.setattr(short_loops, "_CALL_SECONDS", LONG)
    assert make_work(loop, n_items=27).run_unit(0, 27)
    assert [stop - start for start, stop in called] == [1, 4, 16, 4, 1, 1]


def test_a_call_whose_time_is_up_goes_the_general_way():
    class Impatient:
        has_ended = True

    called = []
    work = make_work(lambda *words: called.append(words[2:4]), patience=Impatient())
    assert not work.run_unit(0, 1000)
    assert called == [(0, 1)]
    assert work.join_results() is None
    assert work.outcomes == {}


@pytest.mark.parametrize("backend", [None, "threading"])
def test_a_kernel_that_takes_longer_than_the_last_time_goes_the_general_way(
    backend, loops, monkeypatch
):
    map_items(root, X, n_jobs=2, backend=backend)
    loops.clear()
    monkeypatch.setattr(Patience, "has_ended", True)
    assert (map_items(root, X, n_jobs=2, backend=backend) == X**0.5).all()
    assert {stop - start for start, stop, _ in loops} == {1}
    assert last_report().items == len(X)


def test_an_interrupt_ends_the_call():
    def interrupt(*_):
        raise KeyboardInterrupt

    work = make_work(interrupt)
    with pytest.raises(KeyboardInterrupt):
        work.run_unit(0, 1000)
    assert work.join_results() is None


class LateError(Exception):
    """What a signal handler raises."""


@pytest.mark.parametrize("run", [{"n_jobs": 1}, {"backend": "threading", "n_jobs": 2}])
def test_an_exception_of_a_signal_handler_ends_the_call(run, loops, monkeypatch):
    def handle(*_):
        raise LateError

    before = signal.signal(signal.SIGUSR1, handle)
    find = LoopWork.find.__func__

    def find_interrupted(cls, *args):
        work = find(cls, *args)
        loop = work._loop

        def run_loop(*words):
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGUSR1)
            loop(*words)

        work._loop = run_loop
        return work

    try:
        map_items(root, X, **run)
        monkeypatch.setattr(LoopWork, "find", classmethod(find_interrupted))
        with pytest.raises(LateError):
            map_items(root, X, **run)
    finally:
        signal.signal(signal.SIGUSR1, before)


SEEN = []


def see(x):
    SEEN.append(x)


@numba.njit
def seen(x):
    with numba.objmode():
        see(x)
    if x == 40:
        raise ValueError("forty")
    return x


def test_no_item_is_run_again_for_an_error(run, loops):
    map_items(seen, np.arange(30.0), **run)
    SEEN.clear()
    with pytest.raises(ValueError, match="forty"):
        map_items(seen, X, **run)
    assert len(loops) > 0
    assert max(SEEN.count(x) for x in X) == 1
    assert SEEN.count(40.0) == 1


def test_an_error_among_results_of_any_dtype_is_the_error(run, loops):
    @numba.njit
    def next_date(date, number):
        if number == 20:
            raise ValueError("twenty")
        return date, number

    numbers = np.arange(len(DATES)) % 20
    map_items(next_date, DATES, numbers, **run)
    numbers[[20, 30]] = 20
    with pytest.raises(ValueError, match="twenty"):
        map_items(next_date, DATES, numbers, **run)
    assert len(loops) > 0


def test_a_kernel_that_runs_python_is_not_begun_again(loops, monkeypatch):
    items = np.arange(30.0)
    map_items(seen, items, n_jobs=2)
    SEEN.clear()
    monkeypatch.setattr(Patience, "has_ended", True)
    assert (map_items(seen, items, n_jobs=2) == items).all()
    assert len(loops) > 0
    assert list(items) == SEEN


@numba.njit
def printing(x):
    print(x)  # noqa: T201  # what the test is about
    return x


@numba.njit
def drawing(x):
    return x + np.random.random()  # noqa: NPY002  # all that numba has without a generator


@numba.njit
def drawing_inside(x):
    return drawing(x)


@pytest.mark.parametrize("kernel", [root, seen, printing, drawing, drawing_inside])
def test_effects_of_kernels_are_seen(kernel, capfd):
    items = np.arange(3.0)
    map_items(kernel, items, n_jobs=1)
    assert compiler.find_loop(kernel, (items,), ()).has_effects == (kernel is not root)
    assert len(capfd.readouterr().out.splitlines()) == 3 * (kernel is printing)


def test_what_is_known_of_a_kernel_is_known_for_its_numbers():
    known = history.find_known_kernel(scaled, (2.5, True))
    assert known == history.find_known_kernel(scaled, (2.5, True))
    assert known != history.find_known_kernel(scaled, (3.5, True))
    assert history.find_known_kernel(scaled, (X,)) is None


def test_loops_at_work_at_once_have_ledgers_of_their_own():
    inner, outer = [], []

    def loop(ledger, *_):
        if not inner:
            inner.append(0)
            assert make_work(lambda other, *_: inner.append(other)).run_unit(0, 1)
        outer.append(ledger)

    assert make_work(loop).run_unit(0, 2)
    assert inner[1] != outer[0]

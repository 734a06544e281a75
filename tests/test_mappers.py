"""The mappers: one interface, and everything that `map_array` can."""

import copy
import inspect
import itertools
import operator
import os
import pickle
import re
import sys
import time

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    SerialMapper,
    StaticParallelMapper,
    fit_many,
    last_report,
    map_array,
    map_chunks,
    map_items,
    predict_array,
    reduce_array,
)
from tests.strategies import (
    OF_BALANCE,
    PARALLEL,
    REALS,
    assert_same,
    axes_of,
    chunksizes,
    each_parallel_run,
    each_run,
    examples,
    keep_pools_warm,
    samples,
)

KINDS = [SerialMapper, StaticParallelMapper, DynamicParallelMapper]


pools = keep_pools_warm(2)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_the_same_for_all(kind):
    mapper = kind(2, 0, None, "threading", chunksize=5)
    assert repr(mapper) == (
        f"{kind.__name__}(n_jobs=2, verbosity=0, temp_folder=None, "
        "backend='threading', chunksize=5)"
    )
    assert (kind().n_jobs, kind().verbosity, kind().temp_folder, kind().backend) == (
        -1,
        0,
        None,
        None,
    )
    with pytest.raises(TypeError):
        kind(2, 0, None, "threading", 5)
    with pytest.raises(TypeError, match="colour"):
        kind(colour="red")
    with pytest.raises(ValueError, match="chunksize"):
        kind(chunksize=0)
    for folder in (5, True, ["/tmp"]):
        with pytest.raises(TypeError, match="temp_folder must be the path of a folder or None"):
            kind(temp_folder=folder)


STARMAP_KINDS = [
    (SerialMapper, None),
    *itertools.product([StaticParallelMapper, DynamicParallelMapper], ["threading", "loky"]),
]


@pytest.mark.parametrize(("kind", "backend"), STARMAP_KINDS)
class TestStarmap:
    def test_starmap_equals_that_of_itertools(self, kind, backend):
        mapper = kind(2, backend=backend)
        for items in (
            [(2, 5), (3, 2), (10, 3)],
            [[2, 5], [3, 2, 5]],  # what pymoo gives are lists; lengths may differ
            zip([2, 3], [5, 2], strict=True),
            ((n, 2) for n in range(300)),
            np.arange(6).reshape(3, 2) + 1,
            [],
        ):
            calls = list(items)
            found = mapper.starmap(pow, iter(calls))
            assert found == list(itertools.starmap(pow, calls))
            assert type(found) is list
        assert mapper.starmap(dict, [(), ()]) == [{}, {}]

    def test_starmap_has_the_options_of_map(self, kind, backend):
        mapper = kind(2, backend=backend)
        calls = [(1, 2), (3, 0), (5, 4)]
        results, failures = mapper.starmap(operator.floordiv, calls, 1, on_error="collect")
        assert results == [0, None, 1]
        assert [(one.start, one.stop) for one in failures] == [(1, 2)]
        assert mapper.starmap(scaled, calls, shared={"factor": 10}) == [30, 30, 90]
        drawn = mapper.starmap(drawn_sum, [(1,), (1, 2), ()], rng=3, chunksize=2)
        assert drawn == SerialMapper().starmap(drawn_sum, [(1,), (1, 2), ()], rng=3)
        one_by_one = mapper.map(drawn_sum, [1], rng=3)
        assert drawn[:1] == one_by_one
        assert mapper.starmap(pow, calls, timeout=60, retries=1, retry_on=OSError) == [1, 1, 625]
        with pytest.raises(ZeroDivisionError) as info:
            mapper.starmap(operator.floordiv, calls)
        assert "func failed on item 1" in info.value.__notes__

    def test_an_item_of_starmap_that_is_no_tuple_is_named(self, kind, backend):
        with pytest.raises(TypeError, match=r"got 5 as item 1; .* there is map"):
            kind(2, backend=backend).starmap(abs, [(1,), 5])


def scaled(a, b, factor):
    return (a + b) * factor


def drawn_sum(*numbers, rng):
    return sum(numbers) + rng.random()


def test_starmap_has_all_that_map_has():
    options = dict(inspect.signature(SerialMapper.map).parameters)
    for name in ("seq1", "seqs"):
        del options[name]
    own = dict(inspect.signature(SerialMapper.starmap).parameters)
    del own["iterable"]
    assert set(own) == set(options)
    assert all(own[name].default == options[name].default for name in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("submit", ["mapper.map(func, items)", "mapper.imap(func, items, ordered=False)"]),
        ("apply_async", ["mapper.map(func, items)"]),
        ("imap_unordered", ["mapper.imap(func, items, ordered=False)"]),
        ("shutdown", ["taskcarrier.shutdown()"]),
        ("no_such_thing", []),
    ],
)
def test_missing_executor_attributes_name_the_replacement(kind, name, words):
    mapper = kind(2)
    assert not hasattr(mapper, name)
    with pytest.raises(AttributeError) as info:
        getattr(mapper, name)
    assert str(info.value).startswith(f"{kind.__name__!r} object has no attribute {name!r}")
    assert [word for word in words if word not in str(info.value)] == []
    assert (info.value.name, info.value.obj) == (name, mapper)
    assert copy.copy(mapper).n_jobs == 2


@pytest.mark.parametrize("kind", [StaticParallelMapper, DynamicParallelMapper])
def test_bad_arguments_fail_when_the_mapper_is_made(kind):
    with pytest.raises(ValueError, match=r"n_jobs.*0"):
        kind(0)
    with pytest.raises(TypeError, match=r"n_jobs.*'2'"):
        kind("2")
    with pytest.raises(ValueError, match=r"backend.*'mpi'"):
        kind(backend="mpi")


def test_the_serial_mapper_ignores_options_for_workers():
    mapper = SerialMapper(n_jobs=8, backend="loky", temp_folder="/nowhere", chunksize=2)
    assert mapper(abs, [-1]) == [1]
    assert_same(mapper.map_array(np.sqrt, np.arange(5.0)), np.sqrt(np.arange(5.0)))
    assert (mapper.report.backend, mapper.report.n_jobs, mapper.report.chunksize) == (
        "sequential",
        1,
        2,
    )


@examples(25)
@given(st.data())
def test_map_array_of_a_mapper_is_map_array(data):
    sample = data.draw(samples(REALS, min_dims=2))
    with sample.array() as X:
        axis = data.draw(axes_of(X))
        options = {
            "axis": axis,
            "chunksize": data.draw(chunksizes()),
            "args": (2,),
            "kwargs": {"c": 3},
            "writable": data.draw(st.booleans()),
        }

        def func(chunk, b, c):
            return chunk * chunk.dtype.type(b), np.isfinite(chunk) * c

        with np.errstate(all="ignore"):
            expected = map_array(func, X, n_jobs=1, **options)
        mappers = [SerialMapper()]
        mappers += [OF_BALANCE[balance](n_jobs=2, backend=backend) for backend, balance in PARALLEL]
        for mapper in mappers:
            quiet = _Quiet(func)
            assert_same(mapper.map_array(quiet, X, **options), expected, mapper)
            assert last_report() is mapper.report


class _Quiet:
    """A function without NumPy's warnings, whose settings do not reach other threads."""

    def __init__(self, func):
        self.func = func

    def __call__(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return self.func(*args, **kwargs)


VERBS = [map_array, map_items, map_chunks, reduce_array]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_have_the_signature_of_the_function_without_what_the_mapper_decides(kind, verb):
    decided = {"balance", "n_jobs", "backend"}
    expected = inspect.signature(verb).parameters
    assert decided < expected.keys()
    method = getattr(kind, verb.__name__)
    own, *found = inspect.signature(method).parameters.values()
    assert (own.name, own.kind) == ("self", own.POSITIONAL_OR_KEYWORD)
    assert found == [one for name, one in expected.items() if name not in decided]
    bound = inspect.signature(getattr(kind(), verb.__name__)).parameters.values()
    assert list(bound) == found
    # The description has a paragraph for each of them, and none for the others.
    described = {line.split(" : ")[0] for line in inspect.getdoc(method).splitlines()}
    for one in found:
        name = f"*{one.name}" if one.kind is one.VAR_POSITIONAL else one.name
        assert name in described
    assert not decided & described


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_of_a_method_is_refused_with_the_known_ones(kind, verb):
    with pytest.raises(TypeError, match="no option 'colour'") as caught:
        getattr(kind(), verb.__name__)(np.sum, np.arange(3), colour="red")
    assert "chunksize, " in str(caught.value)
    assert "balance" not in str(caught.value)


def test_a_method_needs_what_the_function_needs():
    with pytest.raises(TypeError, match="combine"):
        SerialMapper().reduce_array(np.sum, np.arange(3))
    with pytest.raises(TypeError, match="func"):
        SerialMapper().map_items()


def all_mappers():
    yield SerialMapper()
    for backend, balance in PARALLEL:
        yield OF_BALANCE[balance](n_jobs=2, backend=backend)


def test_map_items_of_a_mapper_is_map_items():
    X, Y = np.arange(24.0).reshape(4, 6), np.arange(12).reshape(6, 2)
    options = {"axis": (1, 0), "out_axis": -1, "dtype": "f4", "args": (2,), "kwargs": {"c": 3}}

    def func(x, y, b, c):
        return np.stack([x * b, x + y.sum() * c])

    expected = map_items(func, X, Y, n_jobs=1, **options)
    assert expected.shape == (2, 4, 6)
    for mapper in all_mappers():
        assert_same(mapper.map_items(func, X, Y, **options), expected, mapper)
        assert last_report() is mapper.report


def test_map_chunks_of_a_mapper_is_map_chunks():
    X = np.arange(20)
    options = {"chunksize": 6, "depth": 1, "boundary": "constant", "cval": -1, "args": ("x",)}

    def func(chunk, word):
        return [word, *chunk.tolist()]

    expected = map_chunks(func, X, n_jobs=1, **options)
    assert expected[0] == ["x", -1, *range(7)]
    for mapper in all_mappers():
        assert mapper.map_chunks(func, X, **options) == expected, mapper
        assert last_report() is mapper.report


def test_reduce_array_of_a_mapper_is_reduce_array():
    X = np.random.default_rng(5).standard_normal(1000)
    options = {"combine": lambda a, b: a / 3 + b, "initial": 0.1, "chunksize": 7}
    expected = reduce_array(np.sum, X, n_jobs=1, **options)
    for mapper in all_mappers():
        assert mapper.reduce_array(np.sum, X, **options) == expected, mapper
        assert last_report() is mapper.report


@pytest.mark.parametrize("verb", ["map_items", "map_chunks", "reduce_array"])
def test_the_chunksize_of_a_mapper_holds_for_every_verb(verb):
    mapper = SerialMapper(chunksize=4)
    options = {"combine": operator.add} if verb == "reduce_array" else {}
    getattr(mapper, verb)(np.sum, np.arange(10), **options)
    assert (mapper.report.chunksize, mapper.report.ranges) == (4, 3)
    getattr(mapper, verb)(np.sum, np.arange(10), chunksize=None, **options)
    assert mapper.report.chunksize == 4
    getattr(mapper, verb)(np.sum, np.arange(10), chunksize=1, **options)
    assert mapper.report.ranges == 10


def test_a_chunksize_of_the_call_overrides_that_of_the_mapper():
    mapper = SerialMapper(chunksize=4)
    mapper.map_array(np.sqrt, np.arange(8.0))
    assert mapper.report.ranges == 2
    mapper.map_array(np.sqrt, np.arange(8.0), chunksize=1)
    assert mapper.report.ranges == 8


@pytest.mark.usefixtures("general_way")  # in a short call the caller is a worker, too
@each_parallel_run
def test_a_block_keeps_workers_and_can_be_nested_and_used_again(backend, balance):
    mapper, X = OF_BALANCE[balance](n_jobs=2, backend=backend), np.arange(200_000.0)
    workers = set()
    for _ in range(2):
        with mapper as inside:
            assert inside is mapper
            for number in range(3):
                result = mapper.map_array(np.add, X, args=(number,))
                workers.update(worker.name for worker in mapper.report.workers)
                with mapper:
                    assert mapper(operator.neg, [number]) == [-number]
                assert_same(result, X + number)
    assert len(workers) == 2
    assert_same(mapper.map_array(np.negative, X), -X)


class _Holder:
    """Maps its own methods."""

    def __init__(self, mapper):
        self.mapper = mapper

    def twice(self, x):
        return 2 * x

    def both(self, x):
        with self.mapper:
            return self.mapper.map(self.twice, [x, -x])


@pytest.mark.fault(46)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize("kind", [StaticParallelMapper, DynamicParallelMapper])
def test_an_object_that_holds_its_mapper_maps_its_own_methods(backend, kind):
    holder = _Holder(kind(2, backend=backend))
    X = np.arange(6)
    with holder.mapper as mapper:
        for _ in range(2):
            assert mapper.map(holder.twice, range(3)) == [0, 2, 4]
            assert mapper.map(holder.both, range(3)) == [[0, 0], [2, -2], [4, -4]]
            assert list(mapper.imap(holder.twice, range(3))) == [0, 2, 4]
            assert mapper.map(lambda one: one.twice(2), [holder, holder]) == [4, 4]
            assert mapper.map_array(holder.twice, X).tolist() == (2 * X).tolist()
            assert mapper.map_items(holder.twice, X).tolist() == (2 * X).tolist()
            assert mapper.map_chunks(holder.twice, X, chunksize=6)[0].tolist() == (2 * X).tolist()
            assert mapper.reduce_array(holder.twice, X[:1], combine=np.add) == [0]
            assert map_array(holder.twice, X, n_jobs=2, backend="loky").tolist() == (2 * X).tolist()


@pytest.mark.fault(46)
@pytest.mark.parametrize("kind", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_a_copy_of_an_open_mapper_is_closed_and_of_its_own(kind, copied):
    mapper = kind(2, backend="threading", chunksize=3)
    mapper.named = "mine"
    with mapper:
        mapper.map(abs, [-1])
        there = copied(mapper)
        assert there._recycler is None
        with there:
            assert there.map(abs, [-1, 2]) == [1, 2]
            assert there._recycler is not mapper._recycler
        assert mapper._recycler is not None
        assert mapper.map(abs, [-1]) == [1]
    assert mapper._recycler is None
    assert (type(there), repr(there), there.named) == (kind, repr(mapper), "mine")


@pytest.mark.fault(27, 46)
def test_the_mapper_that_a_function_holds_does_not_prevent_resuming(tmp_path):
    holder = _Holder(DynamicParallelMapper(2, backend="threading"))
    flag = tmp_path / "fails"
    flag.touch()

    def func(chunk, holder):
        if chunk[0] == 5 and flag.exists():
            raise LookupError
        return holder.twice(chunk)

    def run(mapper):
        return mapper.map_array(
            func, np.arange(10), args=(holder,), chunksize=1, out=tmp_path / "Y.npy", resume=True
        )

    with pytest.raises(LookupError):
        run(holder.mapper)
    flag.unlink()
    holder.mapper.n_jobs = 3
    with holder.mapper as mapper:
        assert run(mapper).tolist() == [*range(0, 20, 2)]


@pytest.mark.parametrize("balance", ["static", "dynamic"])
def test_results_kept_from_a_warm_block_do_not_change(balance):
    with OF_BALANCE[balance](n_jobs=2, backend="loky") as mapper:
        X, kept = np.arange(30_000.0), []
        for number in range(12):
            result = mapper.map_array(lambda c, n: c * n, X, args=(number,))
            if number % 3:
                kept.append((number, result[::-1] if number % 2 else result))
            else:
                del result  # its memory is free for the next
            mapper.map_array(lambda c: c + 1, kept[-1][1] if kept else X)
    for number, result in kept:
        assert_same(np.array(result), (X * number)[::-1] if number % 2 else X * number, number)


def test_leaving_a_block_twice_is_no_error():
    mapper = StaticParallelMapper(n_jobs=2, backend="loky")
    with mapper:
        pass
    mapper.__exit__(None, None, None)
    assert mapper(abs, [-1]) == [1]


def test_there_is_no_report_before_the_first_run():
    with pytest.raises(LookupError, match="not run anything"):
        SerialMapper().report  # noqa: B018  # the property raises


# Reports


@each_run
def test_the_numbers_in_a_report_add_up(backend, balance):
    def func(chunk):
        time.sleep(0.005)
        return chunk

    X = np.arange(203.0)
    map_array(func, X, chunksize=10, n_jobs=2, backend=backend, balance=balance)
    report = last_report()
    assert report.backend == backend
    assert report.balance == ("serial" if backend == "sequential" else balance)
    assert (report.items, report.ranges, report.chunksize) == (203, 21, 10)
    assert report.n_jobs == len(report.workers) == (1 if backend == "sequential" else 2)
    assert sum(worker.items for worker in report.workers) == 203
    assert sum(worker.ranges for worker in report.workers) == 21
    assert sum(worker.busy for worker in report.workers) >= 21 * 0.005
    for worker in report.workers:
        assert worker.busy + worker.idle == pytest.approx(report.seconds, rel=0.05)
    assert report.bytes_copied == (X.nbytes if backend == "loky" else 0)
    assert report.reason == "asked for"
    lines = str(report).splitlines()
    for worker in report.workers:
        assert sum(line.startswith(f"{worker.name} ") for line in lines) == 1
    assert "203 items in 21 ranges of up to 10" in lines[0]
    assert report.to_dict()["workers"][0]["items"] == report.workers[0].items
    assert pickle.loads(pickle.dumps(report)) == report


def test_names_in_a_report_are_those_of_the_workers():
    map_array(lambda c: c, np.arange(4), n_jobs=2, backend="loky", balance="static")
    pids = map_array(lambda c: np.full(len(c), os.getpid()), np.arange(4), n_jobs=2, backend="loky")
    names = [worker.name for worker in last_report().workers]
    assert names == [f"process {pid}" for pid in dict.fromkeys(pids.tolist())]


def test_a_failed_run_has_a_report():
    with pytest.raises(ZeroDivisionError):
        map_array(lambda c: 1 // 0, np.arange(10), chunksize=5, n_jobs=1)
    assert (last_report().items, last_report().workers[0].items) == (10, 0)


# Progress


@each_run
@pytest.mark.parametrize("verbosity", [0, 1, 2])
def test_a_bar_counts_items(backend, balance, verbosity, capsys):
    mapper = OF_BALANCE[balance](n_jobs=2, backend=backend, verbosity=verbosity, chunksize=10)
    mapper.map_array(lambda c: c, np.arange(205))
    mapper(abs, range(33))
    captured = capsys.readouterr()
    assert captured.out == ""
    if verbosity == 0:
        assert captured.err == ""
    else:
        assert re.search(r"100%.*205/205.*item", captured.err)
        assert re.search(r"100%.*33/33.*item", captured.err)


def test_the_bar_of_a_failed_run_stops_where_the_run_did(capsys):
    mapper = SerialMapper(verbosity=1, chunksize=1)
    with pytest.raises(ZeroDivisionError):
        mapper(lambda i: 1 // (3 - i), range(10))
    assert "3/10" in capsys.readouterr().err


def test_the_report_is_logged_at_verbosity_two(caplog):
    with caplog.at_level("INFO", logger="taskcarrier"):
        SerialMapper(verbosity=1)(abs, [1])
        assert caplog.text == ""
        SerialMapper(verbosity=2)(abs, [1])
    assert "1 item in 1 range of" in caplog.text


# joblib's configuration


CONFIGURED = [
    ("threading", 2, "threading"),
    ("loky", 2, "loky"),
    ("multiprocessing", 2, "loky"),
    ("sequential", None, "sequential"),
    ("threading", 1, "sequential"),
]


@pytest.mark.parametrize(("active", "n_jobs", "backend"), CONFIGURED)
def test_an_active_configuration_of_joblib_is_followed(active, n_jobs, backend):
    options = {} if n_jobs is None else {"n_jobs": n_jobs}
    with joblib.parallel_config(backend=active, **options):
        assert_same(map_array(lambda c: c + 1, np.arange(8)), np.arange(1, 9))
        by_call = last_report()
        mapper = DynamicParallelMapper(n_jobs=None)
        assert mapper(abs, range(8)) == list(range(8))
    for report in (by_call, mapper.report):
        assert (report.backend, report.n_jobs) == (backend, n_jobs or 1)


class Mean:
    def fit(self, X):
        self.mean_ = float(X.mean())
        return self

    def predict(self, X):
        return X - self.mean_


X = np.arange(8.0)
OF_FUNCTIONS = {
    "map_array": lambda **o: map_array(lambda c: c + 1, X, **o),
    "map_items": lambda **o: map_items(lambda x: x + 1, X, **o),
    "map_chunks": lambda **o: map_chunks(len, X, **o),
    "reduce_array": lambda **o: reduce_array(np.sum, X, combine=operator.add, **o),
    "fit_many": lambda **o: fit_many([Mean()] * 8, X, **o),
    "predict_array": lambda **o: predict_array(Mean().fit(X), X, chunksize=1, **o),
}
OF_MAPPERS = {
    "map": lambda **o: DynamicParallelMapper(**o)(abs, range(8)),
    "map_array": lambda **o: StaticParallelMapper(**o).map_array(lambda c: c + 1, X),
    "map_items": lambda **o: DynamicParallelMapper(**o).map_items(lambda x: x + 1, X),
    "map_chunks": lambda **o: StaticParallelMapper(**o).map_chunks(len, X),
    "reduce_array": lambda **o: DynamicParallelMapper(**o).reduce_array(
        np.sum, X, combine=operator.add
    ),
}
UNSAID = [
    *(pytest.param(call, id=name) for name, call in OF_FUNCTIONS.items()),
    *(
        pytest.param(lambda call=call, **o: call(**{"n_jobs": None, **o}), id=f"mapper.{name}")
        for name, call in OF_MAPPERS.items()
    ),
]


@pytest.mark.one_case
@pytest.mark.parametrize("call", UNSAID)
def test_n_jobs_come_from_the_call_then_the_configuration_then_all_cores(call):
    # One more than there are cores, so that they are told apart.
    cores, configured = joblib.cpu_count(), joblib.cpu_count() + 1
    with joblib.parallel_config(n_jobs=configured, backend="threading"):
        call()
        assert (last_report().n_jobs, last_report().backend) == (configured, "threading")
        assert last_report().reason == "joblib's active configuration"
        call(n_jobs=2, backend="threading")
        assert (last_report().n_jobs, last_report().reason) == (2, "asked for")
        call(n_jobs=1)
        assert (last_report().n_jobs, last_report().backend) == (1, "sequential")
    for configuration in ({"n_jobs": configured}, {"n_jobs": configured, "backend": "loky"}):
        with joblib.parallel_config(**configuration):
            call(backend="threading")
        assert (last_report().n_jobs, last_report().reason) == (configured, "asked for")
    with joblib.parallel_config(backend="threading"):
        call()
    assert last_report().n_jobs == cores  # where joblib's default is 1
    call(backend="threading")
    assert last_report().n_jobs == cores


@pytest.mark.parametrize("call", OF_MAPPERS.values(), ids=OF_MAPPERS)
def test_mappers_without_n_jobs_take_all_cores(call):
    with joblib.parallel_config(n_jobs=joblib.cpu_count() + 1, backend="threading"):
        call()
        assert last_report().n_jobs == joblib.cpu_count()
        assert last_report().backend == "threading"


def test_arguments_override_the_configuration_of_joblib():
    with joblib.parallel_config(backend="loky", n_jobs=1):
        map_array(lambda c: c, np.arange(8), n_jobs=2, backend="threading")
        assert (last_report().backend, last_report().n_jobs) == ("threading", 2)
        map_array(lambda c: c, np.arange(8), n_jobs=2)
        assert (last_report().backend, last_report().n_jobs) == ("loky", 2)
        StaticParallelMapper(backend="threading", n_jobs=2)(abs, range(8))
        assert (last_report().backend, last_report().n_jobs) == ("threading", 2)
    with joblib.parallel_config(backend="threading"):
        map_array(lambda c: c, np.arange(8), n_jobs=2, backend="loky")
        assert last_report().backend == "loky"


def test_a_backend_of_joblib_that_cannot_be_followed_is_refused(monkeypatch):
    from joblib.parallel import BACKENDS, ThreadingBackend, register_parallel_backend

    class Elsewhere(ThreadingBackend):
        pass

    monkeypatch.setitem(BACKENDS, "elsewhere", Elsewhere)
    register_parallel_backend("elsewhere", Elsewhere)
    with (
        joblib.parallel_config(backend="elsewhere", n_jobs=2),
        pytest.raises(ValueError, match="elsewhere") as caught,
    ):
        map_array(lambda c: c, np.arange(8))
    assert "'threading'" in str(caught.value)


def test_functions_known_to_release_the_gil_are_handed_over_to_threads(hand_over_after):
    hand_over_after(1)
    map_array(np.isnan, np.arange(8.0), n_jobs=2)
    assert last_report().backend == "threading"
    map_array(lambda c: c, np.arange(8.0), n_jobs=2)
    assert last_report().backend == "loky"


@pytest.mark.parametrize(
    "run",
    [
        lambda mapper: mapper.map_array(lambda c: c, np.arange(8.0)),
        lambda mapper: mapper.map_items(lambda x: x, np.arange(8.0)),
        lambda mapper: mapper.map_chunks(lambda c: c, np.arange(8.0)),
        lambda mapper: mapper.map(lambda x: x, range(8)),
        lambda mapper: list(mapper.imap(lambda x: x, range(8))),
        lambda mapper: mapper.map_array(np.isnan, np.arange(8.0)),
    ],
    ids=["map_array", "map_items", "map_chunks", "map", "imap", "ufunc"],
)
def test_every_function_runs_in_threads_where_there_is_no_gil(run, monkeypatch, hand_over_after):
    hand_over_after(1)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    run(DynamicParallelMapper(2))
    assert last_report().backend == "threading"


def test_a_map_may_follow_two_shutdowns():
    taskcarrier.shutdown()
    taskcarrier.shutdown()
    assert_same(map_array(lambda c: c, np.arange(4), n_jobs=2, backend="loky"), np.arange(4))


def test_a_chunk_that_the_function_keeps_is_never_overwritten():
    def keep(chunk):
        import builtins

        builtins.kept_chunk = chunk
        return chunk

    def look(chunk):
        import builtins

        return np.full(len(chunk), builtins.kept_chunk[0])

    def forget(chunk):
        import builtins

        del builtins.kept_chunk
        return chunk

    X = np.zeros(1000)
    with StaticParallelMapper(2, backend="loky", chunksize=500) as mapper:
        mapper.map_array(keep, X)
        found = [mapper.map_array(look, X + number) for number in range(1, 4)]
        assert all((one == 0).all() for one in found)
        mapper.map_array(forget, X)


def test_a_backend_in_the_place_of_verbosity_is_refused():
    with pytest.raises(TypeError, match="verbosity must be 0, 1 or 2"):
        DynamicParallelMapper(2, "threading")

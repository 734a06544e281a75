"""Inputs that are refused before anything starts, and values that count as arrays."""

import threading

import numpy as np
import psutil
import pytest

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
)
from taskcarrier.arrays.inputs.check import check_inputs
from taskcarrier.memory.views import make_read_only
from taskcarrier.workers.call import check_extras
from tests.clocks import wait_until
from tests.errors import said
from tests.strategies import BACKENDS, assert_same

X = np.arange(12.0).reshape(4, 3)


class Tagged(np.ndarray):
    """A subclass, as libraries of units make them."""


@pytest.fixture
def nothing_starts():
    """Check that the test starts no process and no thread."""
    taskcarrier.shutdown()
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    threads = set(threading.enumerate())
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= children
    # One that imported a module has answered, but may not have ended yet.
    wait_until(lambda: set(threading.enumerate()) <= threads)


def lossy(module, name):
    """Make an object whose type pretends to come from `module`."""
    return type(name, (), {"__module__": module, "shape": (4,), "__array__": lambda *_, **__: X})()


BAD = {
    "n_jobs 0": ({"n_jobs": 0}, ValueError, ["n_jobs", "0", "-1"]),
    "n_jobs float": ({"n_jobs": 2.0}, TypeError, ["n_jobs", "2.0"]),
    "n_jobs text": ({"n_jobs": "2"}, TypeError, ["n_jobs", "'2'"]),
    "backend unknown": (
        {"backend": "mpi"},
        ValueError,
        ["backend", "'mpi'", "'loky'", "'threading'"],
    ),
    "backend no text": ({"backend": 3}, ValueError, ["backend", "3"]),
    "backend best": ({"backend": "best"}, ValueError, ["backend", "'best'", "'auto'"]),
    "balance unknown": (
        {"balance": "fair"},
        ValueError,
        ["balance", "'fair'", "'static'", "'dynamic'"],
    ),
    "balance auto": (
        {"balance": "auto"},
        ValueError,
        ["balance", "'auto'", "'static'", "'dynamic'"],
    ),
    "balance guided": ({"balance": "guided"}, ValueError, ["balance", "'guided'"]),
    "balance None": ({"balance": None}, ValueError, ["balance", "None"]),
    "balance list": ({"balance": ["static"]}, ValueError, ["balance", "['static']"]),
    "chunksize 0": ({"chunksize": 0}, ValueError, ["chunksize", "0", "1"]),
    "chunksize -1": ({"chunksize": -1}, ValueError, ["chunksize", "-1"]),
    "chunksize float": ({"chunksize": 2.5}, TypeError, ["chunksize", "2.5"]),
    "chunksize text": ({"chunksize": "auto"}, TypeError, ["chunksize", "'auto'"]),
    "axis float": ({"axis": 1.0}, TypeError, ["axis", "1.0"]),
    "axis None": ({"axis": None}, TypeError, ["axis", "None", "reshape"]),
    "axis list": ({"axis": [0, 1]}, TypeError, ["axis", "[0, 1]", "tuple", "reshape"]),
    "axis 2": ({"axis": 2}, np.exceptions.AxisError, ["axis", "2"]),
    "axis -3": ({"axis": -3}, np.exceptions.AxisError, ["-3", "2"]),
    "axes too many": (
        {"axis": (0, 1)},
        ValueError,
        ["2 entries", "1 arrays", "for each array", "X.reshape(-1, *X.shape[2:])"],
    ),
    "out_axis text": ({"out_axis": "0"}, TypeError, ["out_axis", "'0'"]),
    "args no tuple": ({"args": 3}, TypeError, ["args", "3"]),
    "kwargs no dict": ({"kwargs": [1]}, TypeError, ["kwargs", "[1]"]),
    "kwargs no names": ({"kwargs": {1: 2}}, TypeError, ["kwargs", "{1: 2}"]),
    "unknown": ({"colour": "red"}, TypeError, ["colour"]),
    "out no array": ({"out": [1, 2]}, TypeError, ["out", "[1, 2]", ".npy"]),
    "out too short": ({"out": np.zeros((3, 3))}, ValueError, ["out", "length 3", "4 items"]),
    "out of another dtype": (
        {"out": np.zeros((4, 3)), "dtype": "f4"},
        ValueError,
        ["float64", "float32"],
    ),
    "out another sort of file": ({"out": "Y.csv"}, ValueError, [".npy", "'Y.csv'"]),
    "out, the input": ({"out": X}, ValueError, ["out", "overlaps"]),
    "dtype unknown": ({"dtype": "colour"}, TypeError, ["dtype", "'colour'"]),
    "depth -1": ({"depth": -1}, ValueError, ["depth", "-1"]),
    "depth float": ({"depth": 1.5}, TypeError, ["depth", "1.5"]),
    "depth too much": ({"depth": 5}, ValueError, ["depth=5", "4 items"]),
    "boundary unknown": (
        {"depth": 1, "boundary": "edge"},
        ValueError,
        ["boundary", "'edge'", "'nearest'"],
    ),
    "cval no number": (
        {"depth": 1, "boundary": "constant", "cval": "a"},
        TypeError,
        ["cval", "'a'", "float64"],
    ),
    "on_error unknown": ({"on_error": "ignore"}, ValueError, ["on_error", "'ignore'", "'fill'"]),
    "fill_value alone": ({"fill_value": 0}, ValueError, ["fill_value", "on_error"]),
    "fill_value of another dtype": (
        {"fill_value": 1.5, "on_error": "fill", "dtype": "i4"},
        TypeError,
        ["fill_value=1.5", "int32"],
    ),
    "rng for a function without": ({"rng": 0}, TypeError, ["rng=", "append", "def func(x, rng)"]),
    "rng of text": ({"rng": "0"}, TypeError, ["rng", "'0'"]),
    "no time": ({"timeout": 0}, ValueError, ["timeout", "0"]),
    "negative retries": ({"retries": -1}, ValueError, ["retries", "-1"]),
    "retry_on no exception": ({"retry_on": int}, TypeError, ["retry_on", "int"]),
    "resume without a file": ({"resume": True}, ValueError, ["resume", "out="]),
}


@pytest.mark.fault(34)
@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_option_is_an_error_before_anything_starts(case, nothing_starts):
    options, kind, words = BAD[case]
    calls = []
    with pytest.raises(kind) as caught:
        map_array(calls.append, X, **{"n_jobs": 2, **options})
    assert [word for word in words if word not in str(caught.value)] == []
    assert calls == []


@pytest.mark.parametrize("mapper", [SerialMapper, StaticParallelMapper, DynamicParallelMapper])
@pytest.mark.parametrize("option", ["balance", "n_jobs", "backend", "weights", "colour"])
def test_mappers_refuse_options_that_they_decide_or_that_do_not_exist(
    mapper, option, nothing_starts
):
    for verb in ("map_array", "map_items", "map_chunks", "reduce_array"):
        with pytest.raises(TypeError, match=f"{verb} of a mapper has no option '{option}'"):
            getattr(mapper(n_jobs=2), verb)(np.sqrt, X, **{option: "static"})


# Options that one verb has, and another has not.
ELSEWHERE = [
    (map_array, "combine"),
    (map_items, "depth"),
    (map_chunks, "out"),
    (map_chunks, "dtype"),
    (map_chunks, "fill_value"),
    (map_chunks, "out_axis"),
    (reduce_array, "on_error"),
    (reduce_array, "out"),
]


@pytest.mark.parametrize(("verb", "option"), ELSEWHERE)
def test_options_without_a_meaning_are_refused(verb, option, nothing_starts):
    combine = {"combine": np.add} if verb is reduce_array else {}
    with pytest.raises(TypeError, match=option):
        verb(np.sqrt, X, n_jobs=2, **combine, **{option: 1})
    with pytest.raises(TypeError, match=option):
        getattr(SerialMapper(), verb.__name__)(np.sqrt, X, **combine, **{option: 1})


@pytest.mark.fault(34)
@pytest.mark.parametrize("func", [None, 3, "sqrt", X], ids=type)
def test_a_function_that_cannot_be_called_is_refused(func, nothing_starts):
    with pytest.raises(TypeError, match="func must be callable"):
        map_array(func, X, n_jobs=2)


def test_at_least_one_array_is_needed(nothing_starts):
    with pytest.raises(TypeError, match="at least one array"):
        map_array(np.sqrt, n_jobs=2)


REFUSED = {
    "masked": (np.ma.masked_array(X, X > 3), TypeError, ["masked", "filled"]),
    "sparse": (lossy("scipy.sparse._csr", "csr_array"), TypeError, ["sparse", "toarray"]),
    "dask": (lossy("dask.array.core", "Array"), TypeError, ["dask", "compute"]),
    "number": (3.5, TypeError, ["0-dimensional", "float"]),
    "0-d": (np.array(3.5), TypeError, ["0-dimensional"]),
    "None": (None, TypeError, ["0-dimensional", "NoneType"]),
    "generator": ((i for i in range(3)), TypeError, ["0-dimensional", "generator"]),
    "dict": ({"a": X}, TypeError, ["0-dimensional", "dict"]),
    "path": ("data/X.csv", TypeError, ["data/X.csv", ".npy"]),
    "bytes": (b"X.npy", TypeError, ["X.npy", "pass the array"]),
    "ragged": ([[1, 2], [3]], ValueError, ["inhomogeneous"]),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("case", sorted(REFUSED))
@pytest.mark.parametrize("place", [0, 1])
def test_inputs_that_would_lose_something_are_refused_by_name(case, place, nothing_starts):
    value, kind, words = REFUSED[case]
    arrays = [X, X]
    arrays[place] = value
    with pytest.raises(kind) as caught:
        map_array(lambda a, b: a, *arrays, n_jobs=2)
    text = said(caught.value)
    assert [word for word in words if word not in text] == []
    if kind is TypeError:
        assert f"array {place}" in text


def test_paths_of_npy_files_are_arrays(tmp_path):
    path = tmp_path / "X.npy"
    np.save(path, X)
    for backend in BACKENDS:
        for name in (path, str(path)):
            assert_same(map_array(np.sqrt, name, n_jobs=2, backend=backend), np.sqrt(X))
            assert last_report().bytes_copied == 0


def test_a_file_of_one_number_is_named(tmp_path, nothing_starts):
    path = tmp_path / "X.npy"
    np.save(path, 3.5)
    for name in (path, str(path)):
        with pytest.raises(TypeError, match="array 0 has no axis to map over: the file") as caught:
            map_array(np.sqrt, name, n_jobs=2)
        assert f"the file {path} holds a 0-dimensional array" in str(caught.value)


def test_a_path_without_a_file_is_its_own_error(tmp_path, nothing_starts):
    with pytest.raises(FileNotFoundError, match=r"X\.npy"):
        map_array(np.sqrt, tmp_path / "X.npy", n_jobs=2)


def test_real_sparse_matrices_are_refused():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy comes with scikit-learn only")
    for kind in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array):
        with pytest.raises(TypeError, match=r"sparse matrix.*toarray"):
            map_array(np.sqrt, kind(X))


def test_arrays_of_unequal_length_are_refused_with_all_lengths(nothing_starts):
    with pytest.raises(ValueError, match="equal lengths") as caught:
        map_array(np.add, np.zeros((5, 3)), np.zeros((4, 6)), axis=(0, 1), n_jobs=2)
    assert "5 (axis 0 of shape (5, 3))" in str(caught.value)
    assert "6 (axis 1 of shape (4, 6))" in str(caught.value)


@pytest.mark.fault(34)
@pytest.mark.parametrize(("n_jobs", "at_least"), [(-1, 1), (-1000, 1), (np.int64(2), 2), (20, 20)])
def test_n_jobs_follow_the_rule_of_joblib(n_jobs, at_least):
    import joblib

    n = 1000
    assert_same(
        map_array(np.sqrt, np.arange(float(n)), n_jobs=n_jobs, backend="threading", chunksize=9),
        np.sqrt(np.arange(float(n))),
    )
    assert taskcarrier.last_report().n_jobs == joblib.effective_n_jobs(int(n_jobs)) >= at_least


@pytest.mark.fault(31)
def test_everything_numpy_takes_is_mapped_as_a_base_class_array():
    def func(chunk):
        assert type(chunk) is np.ndarray
        return chunk

    for value in (
        [[1.5, 2], [3, 4]],
        ((1, 2), (3, 4)),
        range(4),
        X.view(Tagged),
        np.rec.array([(1, 2.0), (3, 4.0)], dtype=[("a", int), ("b", float)]),
        memoryview(b"abcd"),
    ):
        for backend in BACKENDS:
            result = map_array(func, value, n_jobs=2, backend=backend)
            assert_same(
                result, np.array(value, subok=False).view(result.dtype), (type(value), backend)
            )
            assert result.dtype.names == np.asarray(value).dtype.names


def test_objects_with_the_array_interface_are_mapped_as_their_values():
    frame = pytest.importorskip("pandas", reason="an optional package").DataFrame(
        {"a": [1, 2], "b": [3, 4]}
    )
    assert_same(map_array(lambda c: c * 2, frame, n_jobs=1), frame.to_numpy() * 2)


def test_an_object_that_cannot_be_pickled_is_named_before_anything_starts(nothing_starts):
    with pytest.raises(TypeError, match="lock") as caught:
        map_array(
            lambda c: c,
            np.array([{}, threading.Lock(), []], object),
            n_jobs=2,
            backend="loky",
            chunksize=1,
        )
    assert any("items 1:2" in note and "threading" in note for note in caught.value.__notes__)


# The parts


def test_inputs_count_bytes_and_items():
    inputs = check_inputs([X, np.zeros((2, 4), "i2")], (0, -1))
    assert (inputs.n_items, inputs.axes) == (4, [0, 1])
    assert inputs.nbytes == X.nbytes + 16
    assert inputs.item_nbytes == inputs.nbytes // 4
    assert inputs.describe(1, 3) == "axis 0, items 1:3 of an array of shape (4, 3)"


def test_inputs_without_items_have_items_of_no_bytes():
    assert check_inputs([np.zeros((0, 5))], 0).item_nbytes == 0


def test_read_only_makes_a_view_and_leaves_the_original_writable():
    Y = X.copy()
    view = make_read_only(Y)
    assert np.shares_memory(view, Y)
    assert (view.flags.writeable, Y.flags.writeable) == (False, True)
    assert make_read_only("text") == "text"
    assert make_read_only(view) is view


def test_extras_are_copied_shallowly():
    args, kwargs = [1, 2], {"a": 3}
    assert check_extras(args, kwargs) == ((1, 2), {"a": 3})
    assert check_extras((), None) == ((), {})
    assert check_extras(args, kwargs)[1] is not kwargs

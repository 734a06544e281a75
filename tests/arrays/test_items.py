"""`map_items` equals `numpy.stack` over the values of the items, on every backend and balance."""

import re
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taskcarrier import last_report, map_items
from tests.errors import said
from tests.interrupted import interrupted_between_items
from tests.strategies import (
    PAIRS,
    REALS,
    assert_same,
    axes_of,
    chunksizes,
    contract,
    examples,
    keep_pools_warm,
    same_bits,
    samples,
)

pools = keep_pools_warm(2)


def mapped(func, *arrays, **options):
    """Map items and check that every run gives the same."""
    return contract(func, *arrays, verb=map_items, runs=PAIRS, **options)


def plain(func, *arrays, axis=0, out_axis=0, args=(), kwargs=None):
    """Stack the results with NumPy."""
    axes = axis if isinstance(axis, tuple) else (axis,) * len(arrays)
    rows = [np.moveaxis(np.asarray(a), at, 0) for a, at in zip(arrays, axes, strict=True)]
    values = [func(*items, *args, **(kwargs or {})) for items in zip(*rows, strict=True)]
    if not values:
        return np.empty(0)
    if not isinstance(values[0], tuple):
        return np.stack(values, out_axis)
    axes = out_axis if isinstance(out_axis, tuple) else (out_axis,) * len(values[0])
    columns = zip(*values, strict=True)
    return tuple(np.stack(column, at) for column, at in zip(columns, axes, strict=True))


# Layouts, dtypes and axes


@pytest.mark.fault(29)
@examples(120)
@given(st.data())
def test_any_layout_dtype_axis_and_out_axis_is_stacked_bit_for_bit(data):
    sample = data.draw(samples())
    with sample.array() as X:
        axis, out_axis = data.draw(axes_of(X)), data.draw(axes_of(X))
        if X.shape[axis] == 0:
            out_axis = 0
        result = mapped(
            lambda item: item, X, axis=axis, out_axis=out_axis, chunksize=data.draw(chunksizes())
        )
        assert_same(result, plain(lambda x: x, X, axis=axis, out_axis=out_axis), sample)


@examples(40)
@given(st.data())
def test_several_arrays_and_tuples_of_results(data):
    first, second = data.draw(samples(REALS)), data.draw(samples(REALS))
    with first.array() as longer, second.array() as whole:
        axis = (data.draw(axes_of(longer)), data.draw(axes_of(whole)))
        n = min(longer.shape[axis[0]], whole.shape[axis[1]])
        X = np.moveaxis(np.moveaxis(longer, axis[0], 0)[:n], 0, axis[0])
        Y = np.moveaxis(np.moveaxis(whole, axis[1], 0)[:n], 0, axis[1])
        assume(n > 0)
        out_axis = data.draw(st.tuples(axes_of(X), axes_of(Y), st.sampled_from([0, -1])))

        def func(x, y, more, *, name):
            return x, y, len(name) + more

        options = {"axis": axis, "out_axis": out_axis, "args": (2,), "kwargs": {"name": "abc"}}
        result = mapped(func, X, Y, chunksize=data.draw(chunksizes()), **options)
        assert_same(result, plain(func, X, Y, **options), (first, second))


def test_ranges_are_about_a_thousand_and_change_nothing():
    X = np.arange(20_000.0)
    result = mapped(np.sqrt, X)
    assert last_report().ranges == 1000
    assert_same(result, np.sqrt(X))


# What the function gets


@pytest.mark.fault(6)
def test_items_are_read_only_arrays_or_scalars_of_numpy(run):
    kinds = map_items(
        lambda x, y: np.array([type(x).__name__, type(y).__name__, str(y.flags.writeable)]),
        np.arange(3.0),
        np.ones((3, 2)),
        **run,
    )
    assert kinds.tolist() == [["float64", "ndarray", "False"]] * 3

    def overwrite(row):
        row[0] = -1
        return row

    X = np.ones((6, 2))
    with pytest.raises(ValueError, match="read-only") as caught:
        map_items(overwrite, X, **run)
    assert "writable=True" in said(caught.value)
    assert_same(map_items(overwrite, X, writable=True, **run), np.array([[-1.0, 1.0]] * 6))
    assert_same(X, np.ones((6, 2)))


@pytest.mark.parametrize("n_extra", [3, 5000], ids=["small", "large"])
def test_arguments_come_whole_to_every_call(run, n_extra):
    extra, X = np.arange(float(n_extra)), np.arange(10.0)

    def func(x, offsets, *, scale):
        assert not offsets.flags.writeable
        assert not scale.flags.writeable
        return x * scale[1] + offsets.sum()

    result = map_items(func, X, args=(extra,), kwargs={"scale": extra.copy()}, chunksize=3, **run)
    assert_same(result, X + extra.sum())


# Dtypes


VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.complex_numbers(),
    st.floats(width=32).map(np.float32),
    st.integers(0, 255).map(np.uint8),
)


@pytest.mark.fault(5)
@examples(30)
@given(st.lists(VALUES, min_size=1, max_size=9))
def test_mixed_dtypes_promote_as_numpy_stack_promotes_them_whatever_the_cut(values):
    expected = np.stack([np.asarray(value) for value in values])
    for chunksize in range(1, len(values) + 1):
        runs = PAIRS if chunksize in {1, 3} else PAIRS[:1]
        result = contract(
            lambda i: values[i], np.arange(len(values)), verb=map_items, runs=runs,
            chunksize=chunksize,
        )  # fmt: skip
        assert_same(result, expected, chunksize)


@pytest.mark.parametrize("chunksize", range(1, 9))
def test_the_one_value_of_a_wider_dtype_may_stand_anywhere(chunksize):
    for place in range(8):
        result = mapped(
            lambda i: (i, np.full(2, i + 1j if i == place else i)),  # noqa: B023  # called at once
            np.arange(8),
            out_axis=(0, 1),
            chunksize=chunksize,
        )
        numbers, rows = np.arange(8), np.tile(np.arange(8).astype(complex), (2, 1))
        rows[:, place] += 1j
        assert_same(result, (numbers, rows), place)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "values",
    [
        ["a", "bcd", "", "ef"],
        [b"a", b"bcd", b"", b"ef"],
        [np.datetime64("2020"), np.datetime64("2020-01-01T00:00:01"), np.datetime64("NaT", "D")],
        [np.timedelta64(1, "s"), np.timedelta64(1, "ns"), np.timedelta64("NaT", "s")],
        [np.array((1, 2.5), "i1,>f8")[()], np.array((3, 4.5), "i1,>f8")[()]],
        [np.array((1, 2.5), "i1,f4")[()], np.array((300, 4.5), "i4,f8")[()]],
    ],
    ids=str,
)
def test_strings_dates_and_records_are_stacked(values):
    expected = np.stack([np.asarray(value) for value in values])
    for chunksize in (1, 2, 10):
        result = mapped(lambda i: values[i], np.arange(len(values)), chunksize=chunksize)
        assert_same(result, expected, chunksize)


SMALL = [np.int16(1), np.uint16(1), np.float32(1)]
LONG = [np.array([2**62 + 1]), np.array([1.0]), np.array([1], "g")]


@pytest.mark.parametrize(
    ("values", "chunksize"),
    [(SMALL, 2), (SMALL, 3), (LONG, 2), ([1, 2.5, "a"], 2)],
    ids=["small integers", "small integers in one", "long double", "text"],
)
def test_dtypes_that_promote_differently_in_steps_promote_at_once(values, chunksize):
    expected = np.stack([np.asarray(value) for value in values])
    assert_same(mapped(lambda i: values[i], np.arange(3), chunksize=chunksize), expected)


@pytest.mark.fault(5)
@pytest.mark.parametrize("chunksize", [1, 3])
def test_dates_and_durations_are_refused_as_numpy_stack_refuses_them(run, chunksize):
    values = [np.datetime64("2020-01-01"), np.timedelta64(5, "D"), np.datetime64("2020-01-02")]
    with pytest.raises(TypeError, match="Cannot cast"):
        np.stack(values)
    with pytest.raises(TypeError, match="Cannot cast") as caught:
        map_items(lambda i: values[i], np.arange(3), chunksize=chunksize, **run)
    assert "dtypes datetime64[D], timedelta64[D], which have none in common" in said(caught.value)


@pytest.mark.parametrize(("given_", "dtype"), [("f8", "f4"), ("i8", "u1"), ("f4", ">c16")])
def test_results_are_cast_to_the_dtype_that_is_asked_for(given_, dtype):
    X = np.arange(20).astype(given_)
    assert_same(mapped(lambda x: x, X, dtype=dtype, chunksize=3), X.astype(dtype))


def test_a_value_that_does_not_fit_is_an_error_with_its_range(run):
    with pytest.raises(ValueError, match="the result 256 does not fit into uint8") as caught:
        map_items(lambda x: x, np.arange(250, 260), dtype="u1", chunksize=3, **run)
    assert "items 6:9" in said(caught.value)
    with pytest.raises(TypeError, match="cannot become"):
        map_items(lambda x: x / 2, np.arange(10), dtype="i4", **run)


@pytest.mark.parametrize("order", ["C", "F", "stepped"])
def test_out_takes_the_results(run, order):
    X = np.arange(30.0).reshape(10, 3)
    whole = np.zeros((3, 20), ">f4", "F" if order == "F" else "C")
    out = whole[:, ::2] if order == "stepped" else whole[:, :10]
    result = map_items(lambda row: row * 2, X, out=out, out_axis=1, chunksize=3, **run)
    assert result is out
    assert same_bits(out.copy(), (X * 2).T.astype(">f4"))


def test_out_may_be_a_file_even_where_dtypes_promote(run, tmp_path):
    path = tmp_path / "Y.npy"
    result = map_items(
        lambda i: 2.5 if i == 7 else int(i), np.arange(9), out=path, chunksize=1, **run
    )
    expected = np.stack([2.5 if i == 7 else i for i in range(9)])
    assert same_bits(np.array(result), expected)
    assert same_bits(np.load(path), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["Y.npy"]


# No items


@pytest.mark.fault(28)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_without_items_the_function_is_not_called(run, shape):
    called = []
    axis = shape.index(0)
    options = {"axis": axis, **run}
    assert_same(map_items(called.append, np.zeros(shape), **options), np.empty(0))
    assert_same(
        map_items(called.append, np.zeros(shape), dtype=("f4", "U3"), **options),
        (np.empty(0, "f4"), np.empty(0, "U3")),
    )
    out = np.empty((4, 0), "i2")
    assert map_items(called.append, np.zeros(shape), out=out, out_axis=1, **options) is out
    assert called == []
    assert last_report().reason == "there is nothing to map"


@pytest.mark.parametrize("out_axis", [1, -2])
def test_without_items_any_out_axis_is_allowed(run, out_axis):
    result = map_items(np.copy, np.zeros((0, 3)), out_axis=out_axis, **run)
    assert_same(result, np.empty(0))


# Errors


@pytest.mark.fault(5)
@pytest.mark.parametrize("chunksize", [1, 2, 3, 100])
@pytest.mark.parametrize("shape", [(3,), (), (2, 1)])
def test_shapes_that_differ_name_the_item_or_its_range(run, chunksize, shape):
    with pytest.raises(ValueError, match="same shape") as caught:
        map_items(
            lambda i: np.ones(shape if i == 5 else 2), np.arange(12), chunksize=chunksize, **run
        )
    text = str(caught.value)
    ranges = [range(int(a), int(b)) for a, b in re.findall(r"items (\d+):(\d+)", text)]
    assert "item 5" in text or any(5 in found for found in ranges)
    assert "(2,)" in text  # that of items, without the mapped axis
    assert str(shape) in text


ODD = {
    "None": (lambda: None, "NoneType"),
    "generator": (lambda: (x for x in "ab"), "generator"),
    "future": (Future, "Future"),
    "dict": (lambda: {"a": 1}, "dict"),
}


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("case", sorted(ODD))
def test_a_value_that_is_no_number_or_array_is_refused_with_item_and_remedy(run, case, chunksize):
    make, name = ODD[case]
    with pytest.raises(TypeError, match="for item 6") as caught:
        map_items(lambda i: make() if i == 6 else 1.5, np.arange(9), chunksize=chunksize, **run)
    text = said(caught.value)
    assert [word for word in (name, "dtype=object", "mapper") if word not in text] == []


def test_objects_are_collected_where_they_are_asked_for(run):
    values = [None, {"a": 1}, "x", len, {3}, 2.5, int]
    result = map_items(lambda i: values[i], np.arange(7), dtype=object, chunksize=2, **run)
    assert (result.dtype, result.shape) == (np.dtype(object), (7,))
    assert result.tolist() == values
    out = np.empty(7, object)
    assert map_items(lambda i: values[i], np.arange(7), out=out, chunksize=2, **run) is out
    assert out.tolist() == values


@pytest.mark.parametrize("values", [["x", 2.5, 1], [True, 2, 1.5], ["a", b"b", 1]], ids=str)
def test_objects_stay_what_they_are_beside_others(run, values):
    result = map_items(lambda i: values[i], np.arange(3), dtype=object, chunksize=3, **run)
    assert [(type(one), one) for one in result] == [(type(one), one) for one in values]


def test_items_of_object_arrays_are_mapped(run):
    X = np.array([1, "two", None, (4,)], object)
    notes = 1 if run["backend"] == "loky" else 0
    assert_same(map_items(lambda x: len(str(x)), X, **run), np.array([1, 3, 4, 4]))
    assert len(last_report().notes) == notes
    result = map_items(lambda x: [x], X[:3], **run)
    assert (result.dtype, result.tolist()) == (np.dtype(object), [[1], ["two"], [None]])


@pytest.mark.fault(30)
def test_records_with_objects_are_stacked_where_they_are_asked_for(run):
    X = np.array([(n, {n}) for n in range(8)], [("number", "i4"), ("any", "O")])
    for func, items in [(lambda record: record, X), (lambda n: X[n], np.arange(8))]:
        result = map_items(func, items, dtype=X.dtype, chunksize=3, **run)
        assert (result.dtype, result.tolist()) == (X.dtype, X.tolist())
    with pytest.raises(TypeError, match="pass dtype=object to collect them"):
        map_items(lambda n: X[n], np.arange(8), **run)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyError, StopIteration])
@pytest.mark.parametrize("chunksize", [1, 3, 20])
def test_an_error_of_the_function_names_the_item(run, kind, chunksize):
    def func(x):
        if x == 7:
            raise kind("on purpose")
        return x

    with pytest.raises(kind) as caught:
        map_items(func, np.arange(11), chunksize=chunksize, **run)
    assert caught.value.args == ("on purpose",)
    with pytest.raises(kind, match="on purpose"):
        map_items(lambda x, _: func(x), np.arange(11), args=(1,), chunksize=chunksize, **run)
    assert "func failed on item 7" in caught.value.__notes__
    assert any(note.startswith("while mapping axis 0, items") for note in caught.value.__notes__)
    assert_same(map_items(func, np.arange(7), **run), np.arange(7))


def test_tuples_of_different_lengths_name_the_item(run):
    with pytest.raises(ValueError, match=r"for item 4, but .* for item 5"):
        map_items(lambda i: (1,) if i == 5 else (1, 2), np.arange(8), chunksize=4, **run)


@pytest.mark.parametrize("chunksize", [1, 4, 100])
def test_collected_errors_are_those_of_the_items_whatever_the_cut(run, chunksize):
    def func(x):
        if x % 5 == 3:
            raise StopIteration(x) if x == 8 else ValueError(x)
        return float(x)

    result, failures = map_items(
        func, np.arange(20), on_error="collect", chunksize=chunksize, **run
    )
    assert [(start, stop) for start, stop, _ in failures] == [(n, n + 1) for n in (3, 8, 13, 18)]
    assert [type(error) for *_, error in failures][:2] == [ValueError, StopIteration]
    assert [error.args for *_, error in failures] == [(3,), (8,), (13,), (18,)]
    assert_same(result, np.where(np.arange(20) % 5 == 3, np.nan, np.arange(20.0)))
    filled = map_items(
        func, np.arange(20), on_error="fill", fill_value=-1, chunksize=chunksize, **run
    )
    assert_same(filled, np.where(np.arange(20) % 5 == 3, -1, np.arange(20.0)))


@pytest.mark.fault(44)
@pytest.mark.parametrize("n_items", [2, 5])
def test_an_exception_from_outside_between_two_items_is_not_collected(n_items):
    with pytest.raises(ArithmeticError, match="outside"):
        interrupted_between_items(
            "_collect",
            ArithmeticError("outside"),
            lambda: map_items(np.copy, np.arange(n_items), on_error="collect", n_jobs=1),
        )


@pytest.mark.fault(30)
def test_failed_records_with_objects_are_filled_with_zeros_and_none(run):
    X = np.array([(n, {n}) for n in range(8)], [("number", "i4"), ("any", "O")])

    def func(record):
        if record["number"] % 4 == 1:
            raise ValueError(record["number"])
        return record

    expected = [(0, None) if n % 4 == 1 else (n, {n}) for n in range(8)]
    result, failures = map_items(func, X, on_error="collect", chunksize=3, **run)
    assert (result.dtype, result.tolist()) == (X.dtype, expected)
    assert [failure.start for failure in failures] == [1, 5]
    with pytest.raises(TypeError, match="have no NaN: pass fill_value="):
        map_items(func, X, on_error="fill", **run)
    result = map_items(func, X, on_error="fill", fill_value=(-1, "none"), chunksize=3, **run)
    assert result.tolist() == [(-1, "none") if n % 4 == 1 else (n, {n}) for n in range(8)]

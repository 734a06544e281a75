"""Values of items become what `numpy.stack` makes of them, or an error that names the item."""

from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.arrays.outputs.stacking import MixedDtypes, stack_values
from tests.strategies import DTYPES, assert_same, filled

NUMBERS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.complex_numbers()
    | st.floats().map(np.float64)
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
)


def put(values, start=0, out_axis=0, *, objects="refuse"):
    made = stack_values(values, start, out_axis, objects=objects)
    return joined(made, len(values), out_axis) if isinstance(made, MixedDtypes) else made


def joined(mixed, n, out_axis):
    """Join the groups to one array, promoted over all dtypes at once."""
    (_, first), *_ = mixed.groups
    if isinstance(first, tuple):
        columns = [[(where, made[k]) for where, made in mixed.groups] for k in range(len(first))]
        return tuple(joined(MixedDtypes(column), n, out_axis) for column in columns)
    whole = np.empty(
        (n, *np.moveaxis(first, out_axis, 0).shape[1:]),
        np.result_type(*(made.dtype for _, made in mixed.groups)),
    )
    for where, made in mixed.groups:
        whole[where] = np.moveaxis(made, out_axis, 0)
    return np.moveaxis(whole, 0, out_axis)


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_numbers_are_stacked_as_by_numpy(values):
    assert_same(put(values), np.stack(values))


@given(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=1), st.integers(1, 6), st.data())
def test_arrays_of_every_dtype_are_stacked_as_by_numpy(dtypes, n, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    rng = np.random.default_rng(n)
    values = [filled(dtypes[0], shape, rng) for _ in range(n)]
    axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
    assert_same(put(values, out_axis=axis).copy(), np.stack(values, axis))


MIXED = [
    [True, 1, 2.5, 1j],
    [1, 2.5],
    [np.float32(0.1), 1],
    [np.int8(1), np.uint8(2)],
    [np.uint64(2**64 - 1), 1],
    [2**64 - 1, -1],
    [np.float32(0.1), np.float64(0.1)],
    ["a", "bcd"],
    [b"a", b"bcd"],
    [np.datetime64("2020"), np.datetime64("2020-01-01T00:00:01")],
    [np.timedelta64(1, "s"), np.timedelta64(1, "ns")],
    [[1, 2], [3.5, 4]],
    [(np.float32(1),), (2,)],
    [np.array([1, 2]), [3.5, 4]],
    [np.zeros((2, 0)), np.ones((2, 0), "f4")],
    [np.zeros(2, ">f8"), np.zeros(2, "<f4")],
]


@pytest.mark.parametrize("values", MIXED, ids=str)
def test_mixed_dtypes_promote_as_numpy_stack_promotes_them(values):
    if isinstance(values[0], tuple):
        assert_same(put(values), tuple(np.stack(column) for column in zip(*values, strict=True)))
    else:
        assert_same(put(values), np.stack([np.asarray(value) for value in values]))


def test_nan_payloads_and_signs_of_zeros_are_kept():
    payload = np.uint64(0x7FF8_DEAD_BEEF_0001).view("f8")
    for values in ([payload, np.float64(-0.0)], [np.array(payload), -0.0]):
        assert put(values).tobytes() == np.array([payload, -0.0]).tobytes()


def test_tuples_give_several_results_each_along_its_axis():
    values = [(n, np.full((2, 3), n), np.full(4, n * 1.5)) for n in range(5)]
    expected = tuple(
        np.stack(column, axis)
        for column, axis in zip(zip(*values, strict=True), (0, 2, -1), strict=True)
    )
    found = put(values, out_axis=(0, 2, -1))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    assert isinstance(put([(1,), (2,)]), tuple)


def test_tuples_must_be_of_one_length_with_an_axis_for_each():
    with pytest.raises(ValueError, match=r"tuple of 2 for item 7, but \(3,\) for item 8"):
        put([(1, 2), (3,)], 7)
    with pytest.raises(ValueError, match="tuple of 2 for item 7, but 3 for item 9"):
        put([(1, 2), (1, 2), 3], 7)
    nested = r"a tuple within a tuple, \(2, 3\), for item 7; return one tuple of numbers"
    with pytest.raises(ValueError, match=nested):
        put([(1, (2, 3)), (4, (5, 6))], 7)
    with pytest.raises(ValueError, match="out_axis has 3 entries, func returned 2"):
        put([(1, 2), (3, 4)], out_axis=(0, 0, 0))


def test_an_empty_tuple_is_no_value():
    with pytest.raises(TypeError, match="an empty tuple for item 7; map_items needs a number"):
        put([(), ()], 7)


def test_an_out_axis_that_does_not_exist_is_an_error():
    for axis in (2, -3):
        with pytest.raises(np.exceptions.AxisError, match="out_axis"):
            put([np.zeros(3), np.zeros(3)], out_axis=axis)
    with pytest.raises(np.exceptions.AxisError):
        put([1, 2], out_axis=1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1, 2], [3, 4], [5]], ["(1,) for item 12", "(2,) for item 10"]),
        ([1, [2]], ["(1,) for item 11", "() for item 10"]),
        ([np.zeros((2, 3)), np.zeros((3, 2))], ["(3, 2) for item 11", "(2, 3) for item 10"]),
        ([np.zeros((2, 1)), np.zeros((2, 3))], ["(2, 3) for item 11", "(2, 1) for item 10"]),
    ],
    ids=str,
)
def test_shapes_that_differ_name_both_items(values, words):
    with pytest.raises(ValueError, match="all items must give the same shape") as caught:
        put(values, 10)
    assert [word for word in words if word not in str(caught.value)] == []


ODD = [None, (x for x in "ab"), Future(), {"a": 1}, {1}, object(), [None, 1], len, 2**70]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("place", [0, 2])
def test_a_value_that_is_no_number_or_array_is_named_with_the_remedy(value, place):
    values = [value if number == place else np.ones(np.shape(value)) for number in range(3)]
    with pytest.raises(TypeError, match=f"for item {5 + place}") as caught:
        put(values, 5)
    assert type(value).__name__ in str(caught.value)
    assert "dtype=object" in str(caught.value)
    assert "mapper" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_objects_are_stacked_where_they_are_asked_for():
    values = [None, {"a": 1}, "x"]
    made = put(values, objects="allow")
    assert (made.dtype, made.tolist()) == (np.dtype(object), values)


def test_masked_arrays_are_refused():
    masked = np.ma.masked_array([1, 2], [True, False])
    for values in ([masked, masked], [np.zeros(2), masked]):
        with pytest.raises(TypeError, match=r"masked array for item \d, .*filled"):
            put(values)


def test_dtypes_that_do_not_promote_give_numpy_s_own_error():
    with pytest.raises(np.exceptions.DTypePromotionError):
        put([np.datetime64("2020"), 1.5])

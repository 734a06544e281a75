"""Casts that are allowed: tables of dtypes, single values and fill values."""

import warnings

import numpy as np
import pytest

from taskcarrier.arrays.casting import (
    cast_checked,
    cast_scalar,
    check_dtype,
    find_missing_value,
    require_missing_value,
)
from tests.strategies import same_bits

PAYLOAD = np.uint64(0x7FF8_DEAD_BEEF_0001).view("f8")

# From, to; the values of the plain cast.
ALLOWED = [
    # floats within their kind, and from what is below them
    (np.array([0.1, -0.0, np.inf, np.nan, PAYLOAD]), "f4"),
    (np.array([0.1, -0.0, np.inf, np.nan, PAYLOAD]), ">f8"),
    (np.array([0.1, -0.0, PAYLOAD], ">f8"), "f8"),
    (np.array([0.1, -0.0], "f2"), "f8"),
    (np.array([0.1, -0.0]), "g"),
    (np.array([0.1, -0.0]), "f2"),
    (np.array([0.1, -0.0]), "c8"),
    (np.array([1j, -0.0 - 1j]), "c8"),
    (np.array([2**53 + 1, -1]), "f8"),
    (np.array([2**53 + 1, -1]), "f4"),
    (np.array([2**53 + 1, -1]), "c16"),
    (np.array([2**64 - 1], "u8"), "f4"),
    (np.array([True, False]), "f4"),
    (np.array([True, False]), "c16"),
    # integers that fit
    (np.array([-128, 0, 127]), "i1"),
    (np.array([0, 255]), "u1"),
    (np.array([0, 2**63 - 1]), "u8"),
    (np.array([0, 2**63 - 1], "u8"), "i8"),
    (np.array([0, 1], ">i4"), "<i2"),
    (np.array([-5], "i1"), ">i8"),
    (np.array([True, False]), "i1"),
    (np.array([], "i8"), "u1"),
    # strings, dates and structures that lose nothing
    (np.array(["ab", ""]), "U5"),
    (np.array([b"ab", b""]), "S5"),
    (np.array([b"ab"]), "U2"),
    (np.array(["ab"]), ">U2"),
    (np.array(["2020-01-01", "NaT"], "M8[D]"), "M8[s]"),
    (np.array(["2020-01-01"], ">M8[D]"), "<M8[D]"),
    (np.array([5, "NaT"], "m8[s]"), "m8[ns]"),
    (np.array([(1, 2.5)], "i1,f4"), "i4,f8"),
    # anything is an object
    (np.array([1.5, -0.0]), object),
    (np.array(["ab"]), object),
]

# From, to, the error and words of its text.
REFUSED = [
    (np.array([1.0]), "i8", TypeError, ["float64", "int64"]),
    (np.array([1.0]), "?", TypeError, ["float64", "bool"]),
    (np.array([1j]), "f8", TypeError, ["complex128", "float64"]),
    (np.array([0, 1]), "?", TypeError, ["int64", "bool"]),
    (np.array([128, 0]), "i1", ValueError, ["128", "int8", "-128 to 127"]),
    (np.array([0, -129]), "i1", ValueError, ["-129", "int8"]),
    (np.array([-1]), "u8", ValueError, ["-1", "uint64", "0 to 18446744073709551615"]),
    (np.array([-1], "i1"), "u1", ValueError, ["-1", "uint8"]),
    (np.array([2**63], "u8"), "i8", ValueError, [str(2**63), "int64"]),
    (np.array([256], ">u2"), "u1", ValueError, ["256", "uint8"]),
    (np.array(["abc"]), "U2", TypeError, ["<U3", "<U2"]),
    (np.array(["a"]), "S1", TypeError, ["<U1", "|S1"]),
    (np.array(["1.5"]), "f8", TypeError, ["<U3", "float64"]),
    (np.array(["2020-01-01"], "M8[s]"), "M8[D]", TypeError, ["[s]", "[D]"]),
    (np.array(["2020-01-01"], "M8[s]"), "i8", TypeError, ["datetime64[s]", "int64"]),
    (np.array([1.5]), "m8[s]", TypeError, ["float64", "timedelta64[s]"]),
    (np.array([5], "m8[ms]"), "f8", TypeError, ["timedelta64[ms]", "float64"]),
    (np.array([(1, 2.5)], "i4,f8"), "i1,f4", TypeError, ["i4", "i1"]),
    (np.array([1.5], object), "f8", TypeError, ["object", "float64"]),
    (np.array([1], object), "i8", TypeError, ["object", "int64"]),
]


@pytest.mark.parametrize(("values", "dtype"), ALLOWED, ids=str)
def test_casts_that_are_allowed_give_what_the_plain_cast_gives(values, dtype):
    made = cast_checked(values, np.dtype(dtype))
    expected = values.astype(dtype)
    assert made.dtype == np.dtype(dtype)
    if made.dtype.hasobject:
        assert made.tolist() == expected.tolist()
    else:
        assert same_bits(made, expected)


@pytest.mark.parametrize(("values", "dtype", "kind", "words"), REFUSED, ids=str)
def test_casts_that_could_lose_something_are_refused(values, dtype, kind, words):
    with pytest.raises(kind) as caught:
        cast_checked(values, np.dtype(dtype))
    text = str(caught.value)
    assert [word for word in [*words, "dtype=", "out="] if word not in text] == []


def test_the_same_dtype_is_no_cast():
    values = np.array([PAYLOAD, -0.0])
    assert cast_checked(values, np.dtype("f8")) is values


def test_payloads_and_signs_survive_another_byte_order():
    values = np.array([PAYLOAD, -0.0])
    made = cast_checked(values, np.dtype(">f8"))
    assert made.byteswap().tobytes() == values.tobytes()


def test_a_float_too_large_for_its_new_dtype_warns_as_numpy_does():
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert cast_checked(np.array([1e300]), np.dtype("f4"))[0] == np.inf


# Value, dtype.
KEPT = [
    (1, "i4"), (1.0, "i4"), (True, "i4"), (np.int64(-5), ">i2"), (255, "u1"), (2**63, "u8"),
    (1, "?"), (0.0, "?"), (True, "?"),
    (1.5, "f4"), (0.1, "f4"), (2**53 + 1, "f8"), (np.nan, "f4"), (-np.inf, "f2"), (True, "f8"),
    (1, "c8"), (1j, "c16"), (np.float32(0.1), "f8"),
    ("ab", "U2"), ("ab", ">U5"), ("", "U1"), (b"ab", "S3"),
    (np.datetime64("2020-01-01"), "M8[s]"), (np.datetime64("NaT", "D"), "M8[ns]"),
    (np.datetime64("2020-01-01T00:00:00"), "M8[D]"), (np.timedelta64(2, "s"), "m8[ms]"),
    (np.timedelta64("NaT", "s"), "m8[s]"), (np.array(3), "i1"),
]  # fmt: skip

LOST = [
    (1.5, "i4"), (np.nan, "i4"), (np.inf, "i8"), (300, "u1"), (-1, "u8"), (2**70, "i8"),
    (2, "?"), (0.5, "?"), (np.nan, "?"),
    (1e300, "f4"), (70_000, "f2"), ("1.5", "f8"), (None, "f8"), (None, "i4"),
    (np.datetime64("2020-01-01"), "f8"), (1e39j, "c8"),
    ("abc", "U2"), (1, "U2"), (b"ab", "U2"), ("ab", "S2"), (b"abc", "S2"),
    (np.datetime64("2020-01-01T00:00:01"), "M8[D]"), ("2020-01-01", "M8[D]"), (5, "M8[D]"),
    (np.timedelta64(1500, "ms"), "m8[s]"), (np.timedelta64(2, "s"), "M8[s]"),
    (np.datetime64("NaT", "D"), "m8[s]"), (np.nan, "m8[s]"),
    ([1, 2], "i4"), ([1], "i4"), ({}, "f8"), (object(), "f8"), ([[1], [2, 3]], "f8"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "dtype"), KEPT, ids=str)
def test_cast_scalar_keeps_a_value_that_the_dtype_has(value, dtype):
    made = cast_scalar(value, np.dtype(dtype), "cval")
    assert (made.shape, made.dtype) == ((), np.dtype(dtype))
    expected = np.array(value).astype(dtype)
    assert same_bits(made, expected)


@pytest.mark.parametrize(("value", "dtype"), LOST, ids=lambda case: str(case)[:30])
def test_cast_scalar_refuses_a_value_that_the_dtype_lacks_by_name(value, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="is no value of dtype") as caught:
            cast_scalar(value, np.dtype(dtype), "cval")
    assert str(caught.value) == f"cval={value!r} is no value of dtype {np.dtype(dtype)}"


@pytest.mark.parametrize("dtype", ["f8", "i4"])
@pytest.mark.parametrize("value", [1j, 1 + 0j])
def test_cast_scalar_refuses_complex_values_for_real_dtypes(value, dtype):
    with pytest.raises(TypeError, match="is no value of dtype"):
        cast_scalar(value, np.dtype(dtype), "cval")


def test_cast_scalar_keeps_signs_of_zeros_and_payloads_of_nans():
    assert np.signbit(cast_scalar(-0.0, np.dtype("f4"), "cval"))
    made = cast_scalar(PAYLOAD, np.dtype("f8"), "cval")
    assert made.tobytes() == PAYLOAD.tobytes()


@pytest.mark.parametrize("value", [None, "x", [1, 2], {}, 1.5])
def test_any_value_may_become_an_object(value):
    made = cast_scalar(value, np.dtype(object), "cval")
    assert made.shape == ()
    assert made[()] is value


def test_a_record_is_a_value_of_its_own_dtype():
    record = np.array((1, 2.5), "i1,f8")
    assert cast_scalar(record[()], record.dtype, "cval") == record
    with pytest.raises(TypeError, match="is no value"):
        cast_scalar((1, 2.5), record.dtype, "cval")


MISSING = [("f4", np.nan), ("f8", np.nan), ("c8", np.nan), ("g", np.nan), (object, None)]


@pytest.mark.parametrize("make_fill", [find_missing_value, require_missing_value])
@pytest.mark.parametrize(("dtype", "value"), MISSING)
def test_holes_are_filled_with_the_missing_value_of_the_dtype(dtype, value, make_fill):
    found = make_fill(np.dtype(dtype))
    assert found is value or np.isnan(found)


@pytest.mark.parametrize("make_fill", [find_missing_value, require_missing_value])
@pytest.mark.parametrize("dtype", ["M8[s]", "m8[ns]", ">M8[D]"])
def test_holes_among_dates_are_filled_with_nat(dtype, make_fill):
    found = make_fill(np.dtype(dtype))
    assert np.isnat(found)
    assert found.dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", ["i4", "?", "U3", "S2", "V5", "i4,f8"])
def test_dtypes_without_a_missing_value_get_zero_or_an_error(dtype):
    found = find_missing_value(np.dtype(dtype))
    assert found.tobytes() == bytes(np.dtype(dtype).itemsize)
    with pytest.raises(TypeError, match="have no NaN: pass fill_value="):
        require_missing_value(np.dtype(dtype))


INNER = [("text", "U3"), ("any", "O", (2,)), ("time", "M8[s]")]
RECORD = np.dtype([("number", "f8"), ("any", "O"), ("inner", INNER, (2,)), ("rows", "i4", (2, 3))])


def test_records_with_objects_are_filled_with_zeros_and_none():
    found = find_missing_value(RECORD)
    assert (found.shape, found.dtype) == ((), RECORD)
    assert found["number"] == 0
    assert found["any"][()] is None
    assert found["inner"]["text"].tolist() == ["", ""]
    assert found["inner"]["any"].tolist() == [[None, None]] * 2
    assert found["inner"]["time"].tolist() == np.zeros(2, "M8[s]").tolist()
    assert found["rows"].tolist() == [[0, 0, 0]] * 2
    with pytest.raises(TypeError, match="have no NaN: pass fill_value="):
        require_missing_value(RECORD)


def test_a_value_that_fields_refuse_is_no_value_of_a_record():
    assert cast_scalar((1, len), np.dtype("i4,O"), "cval").tolist() == (1, len)
    for bad in (("x", len), (1, len, 3), None):
        with pytest.raises(TypeError, match="is no value of dtype"):
            cast_scalar(bad, np.dtype("i4,O"), "cval")


# Strings of any length, which NumPy 1 does not have, and their missing values.
TEXTS = (
    [
        (np.dtypes.StringDType(), ""),
        (np.dtypes.StringDType(na_object=None), None),
        (np.dtypes.StringDType(na_object=np.nan), np.nan),
        (np.dtypes.StringDType(na_object="gone"), "gone"),
    ]
    if hasattr(np.dtypes, "StringDType")
    else [(np.dtype("U3"), "")]
)


@pytest.mark.parametrize(("dtype", "missing"), TEXTS, ids=str)
def test_strings_of_any_length_are_filled_with_their_missing_value(dtype, missing):
    found = np.array(["word"], dtype)
    found[0] = find_missing_value(dtype)
    assert found[0] is missing or found[0] == missing
    if hasattr(dtype, "na_object"):
        assert require_missing_value(dtype) is missing
        assert cast_scalar(missing, dtype, "cval")[()] is missing
    else:
        with pytest.raises(TypeError, match="have no NaN: pass fill_value="):
            require_missing_value(dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in TEXTS], ids=str)
def test_text_becomes_text_of_any_length_and_objects_do_not(dtype):
    assert cast_checked(np.array(["a", "bcd"]), dtype).tolist() == ["a", "bcd"]
    refused = [np.array(["a"], object), np.array([b"a"] if dtype.kind == "T" else ["long"])]
    for values in refused:
        with pytest.raises(TypeError, match="cannot become"):
            cast_checked(values, dtype)


@pytest.mark.parametrize(("dtype", "missing"), TEXTS, ids=str)
def test_only_text_is_a_value_of_strings_of_any_length(dtype, missing):
    for text in ("", "abc", np.str_("abc")):
        assert cast_scalar(text, dtype, "cval")[()] == text
    for bad in (3, 1.5, b"abc", ["abc"], ..., *{None} - {missing}):
        with pytest.raises(TypeError, match="is no value of dtype") as caught:
            cast_scalar(bad, dtype, "cval")
        assert str(caught.value) == f"cval={bad!r} is no value of dtype {dtype}"


@pytest.mark.parametrize("dtype", ["f4", ">i2", float, np.int8, "U3", [("a", "f4")]])
def test_check_dtype_takes_dtypes_in_any_form(dtype):
    assert check_dtype(dtype) == np.dtype(dtype)


def test_check_dtype_refuses_what_is_no_dtype():
    assert check_dtype(None) is None
    for bad in ("colour", 3, [1]):
        with pytest.raises(TypeError, match="out must be a NumPy dtype") as caught:
            check_dtype(bad, "out")
        assert repr(bad) in str(caught.value)

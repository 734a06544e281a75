"""Results that do not fit are errors with both values and the range, never truncated."""

import re

import numpy as np
import pytest

from taskcarrier import map_array
from taskcarrier.arrays.casting import require_missing_value
from taskcarrier.arrays.outputs.buffers import ANY, LocalBuffer, Output, open_place
from taskcarrier.arrays.outputs.specs import DisagreementError
from taskcarrier.arrays.outputs.stacking import MixedDtypes
from taskcarrier.arrays.outputs.writer import OutputWriter
from taskcarrier.workers.task import WorkerContext
from tests.arrays.outputs.examples import FLAT
from tests.errors import said
from tests.strategies import (
    EVERYWHERE,
    ORDERED,
    assert_same,
    each_ordered_run,
    keep_pools_warm,
)

pools = keep_pools_warm(2)


def mapped(func, n_items=12, *, backend, balance, **options):
    options = {"chunksize": 2, "n_jobs": 2, **options}
    return map_array(func, np.arange(n_items), backend=backend, balance=balance, **options)


# The chunk that starts at 6 gives another result; the words must be in the error.
ODD = {
    "int8 for int64": (lambda c: c, lambda c: c.astype("i1"), ["int64 (2,)", "int8 (2,)"]),
    "float32 for float64": (
        lambda c: c * 1.0,
        np.float32,
        ["float64 (2,)", "float32 (2,)"],
    ),
    "byte order": (
        lambda c: c.astype("<i4"),
        lambda c: c.astype(">i4"),
        ["int32 (2,)", ">i4 (2,)"],
    ),
    "longer strings": (
        lambda c: c.astype("U1"),
        lambda c: np.full(2, "abcde"),
        ["<U1 (2,)", "<U5 (2,)"],
    ),
    "longer bytes": (
        lambda c: c.astype("S1"),
        lambda c: np.full(2, b"abc"),
        ["|S1 (2,)", "|S3 (2,)"],
    ),
    "datetime units": (
        lambda c: c.astype("M8[D]"),
        lambda c: c.astype("M8[ns]"),
        ["datetime64[D] (2,)", "datetime64[ns] (2,)"],
    ),
    "timedelta units": (
        lambda c: c.astype("m8[s]"),
        lambda c: c.astype("m8[ms]"),
        ["timedelta64[s] (2,)", "timedelta64[ms] (2,)"],
    ),
    "trailing shape": (lambda c: np.ones((2, 3)), lambda c: np.ones((2, 4)), ["(2, 3)", "(2, 4)"]),
    "trailing shape of 1": (
        lambda c: np.ones((2, 3)),
        lambda c: np.ones((2, 1)),
        ["(2, 3)", "(2, 1)"],
    ),
    "rank": (lambda c: c, lambda c: c[:, None], ["int64 (2,)", "int64 (2, 1)"]),
    "fields": (
        lambda c: np.zeros(2, "i4,i4"),
        lambda c: np.zeros(2, "i4,f4"),
        ["('f1', '<i4')", "('f1', '<f4')"],
    ),
    "one array for a tuple": (lambda c: (c,), lambda c: c, ["a tuple of 1", "an array"]),
    "number of outputs": (lambda c: (c, c), lambda c: (c, c, c), ["a tuple of 2", "a tuple of 3"]),
    "dtype of the second": (lambda c: (c, c), lambda c: (c, c > 0), ["a tuple of 2", "bool"]),
}


@pytest.mark.fault(5)
@pytest.mark.parametrize("case", sorted(ODD))
def test_results_that_differ_are_an_error_with_both_and_the_ranges(case):
    usual, odd, words = ODD[case]
    for backend, balance in EVERYWHERE:
        with pytest.raises(ValueError, match="must return the same dtype") as caught:
            mapped(lambda c: odd(c) if c[0] == 6 else usual(c), backend=backend, balance=balance)
        text = str(caught.value)
        assert [word for word in words if word not in text] == []
        assert len(re.findall(r"items \d+:\d+", text)) == 2
        assert "items 6:8" in text
        # Static fails fast: which range of the usual sort it names depends on the moment.
        assert "items 0:2" in text or (backend, balance) not in ORDERED


@each_ordered_run
def test_the_lowest_range_that_differs_is_named_on_every_run(backend, balance):
    def func(chunk):
        return chunk.astype("f4") if chunk[0] in {14, 22, 30} else chunk

    texts = set()
    for _ in range(20):
        with pytest.raises(ValueError, match="items 14:16") as caught:
            mapped(func, 40, backend=backend, balance=balance)
        texts.add(str(caught.value))
    assert len(texts) == 1


@each_ordered_run
def test_the_second_range_differs_though_another_worker_begins_with_it(backend, balance):
    for _ in range(20):
        with pytest.raises(
            ValueError, match=r"float32 \(2,\).*items 2:4.*int64 \(2,\) for items 0:2"
        ):
            mapped(
                lambda c: c.astype("f4") if c[0] == 2 else c, 40, backend=backend, balance=balance
            )


WRONG = {
    "None": (lambda c: None, TypeError, ["None", "NoneType"]),
    "scalar": (lambda c: 3.5, TypeError, ["3.5", "float"]),
    "0-d array": (lambda c: np.array(4), (TypeError, ValueError), ["axis 0, items 6:8"]),
    "NumPy scalar": (lambda c: c.sum(), TypeError, ["int64"]),
    "generator": (lambda c: (x for x in c), TypeError, ["generator"]),
    "dict": (lambda c: {"a": c}, TypeError, ["dict"]),
    "text": (lambda c: "ab", TypeError, ["'ab'", "str"]),
    "masked": (lambda c: np.ma.masked_array(c, c > 2), TypeError, ["masked", "filled"]),
    "masked in a tuple": (lambda c: (c, np.ma.masked_array(c)), TypeError, ["masked", "filled"]),
    "None in a tuple": (lambda c: (c, None), TypeError, ["None"]),
    "too short": (lambda c: c[:-1], ValueError, ["length 1", "chunk of length 2"]),
    "too long": (lambda c: np.repeat(c, 2), ValueError, ["length 4", "chunk of length 2"]),
    "length 1 for all": (lambda c: c[:1], ValueError, ["length 1", "chunk of length 2"]),
    "empty": (lambda c: c[:0], ValueError, ["length 0", "chunk of length 2"]),
    "sum of the chunk": (
        lambda c: c.sum(keepdims=True),
        ValueError,
        ["length 1", "chunk of length 2"],
    ),
    "ragged": (lambda c: [[1], [2, 3]], ValueError, ["inhomogeneous"]),
}


@pytest.mark.fault(5)
@pytest.mark.parametrize("case", sorted(WRONG))
def test_results_that_are_no_arrays_of_the_right_length_are_errors_that_name_the_range(case):
    func, kind, words = WRONG[case]
    for backend, balance in EVERYWHERE:
        with pytest.raises(kind) as caught:
            mapped(lambda c: func(c) if c[0] == 6 else c, backend=backend, balance=balance)
        text = said(caught.value)
        assert [word for word in [*words, "axis 0, items 6:8"] if word not in text] == []


@each_ordered_run
def test_the_lowest_range_of_a_wrong_length_is_named_on_every_run(backend, balance):
    for _ in range(20):
        with pytest.raises(ValueError, match="for a chunk of length 2") as caught:
            mapped(
                lambda c: c[:1] if c[0] in {10, 12, 20} else c, 40, backend=backend, balance=balance
            )
        assert any("while mapping axis 0, items 10:12" in note for note in caught.value.__notes__)


def test_the_error_for_a_result_without_the_axis_mentions_out_axis():
    for backend, balance in EVERYWHERE:
        with pytest.raises(np.exceptions.AxisError) as caught:
            map_array(
                lambda c: c.sum(axis=0),
                np.ones((3, 4)),
                axis=1,
                backend=backend,
                balance=balance,
                n_jobs=2,
            )
        assert "out_axis" in said(caught.value)
        assert "shape (1,)" in said(caught.value)


def test_out_axis_must_have_an_entry_for_each_result():
    for backend, balance in EVERYWHERE:
        with pytest.raises(ValueError, match="out_axis has 2 entries, func returned 1"):
            mapped(lambda c: c, backend=backend, balance=balance, out_axis=(0, 0))


def test_workers_are_usable_after_wrong_results():
    for backend, balance in EVERYWHERE:
        with pytest.raises(TypeError):
            mapped(lambda c: None, backend=backend, balance=balance)
        assert_same(mapped(lambda c: c, backend=backend, balance=balance), np.arange(12))


def test_lists_become_arrays():
    for backend, balance in EVERYWHERE:
        result = mapped(lambda c: [[int(x), 1] for x in c], backend=backend, balance=balance)
        assert_same(result, np.stack([np.arange(12), np.ones(12, int)], axis=1))


# The parts


def writer_of(n_items=6, propose=lambda proposal: proposal, **options):
    buffer = LocalBuffer(n_items=n_items, order="C", **options)
    return OutputWriter(buffer, WorkerContext(0, propose)), buffer


def array_in(buffer):
    (place,) = buffer.make_places(FLAT)
    return open_place(place)


def test_a_writer_remembers_its_first_result_and_refuses_others():
    writer, buffer = writer_of()
    assert not writer.write(2, 4, np.array([2.0, 3.0]))
    assert writer._worker.facts == (2, FLAT)
    with pytest.raises(DisagreementError) as caught:
        writer.write(4, 6, np.array([4, 5]))
    assert caught.value.spec.parts == ((np.dtype(int), ()),)
    assert not writer.write(0, 2, [0.0, 1.0])
    assert array_in(buffer)[:4].tolist() == [0, 1, 2, 3]


def test_a_writer_keeps_to_the_spec_that_was_set_first():
    proposals = []

    def decided(proposal):
        proposals.append(proposal)
        return FLAT

    writer, _ = writer_of(propose=decided)
    with pytest.raises(DisagreementError):
        writer.write(0, 2, np.array([4, 5]))
    assert not writer.write(2, 4, np.array([4.0, 5.0]))
    assert proposals == [FLAT.with_dtypes([np.dtype(int)])]


def test_a_writer_whose_results_promote_defers_other_dtypes():
    writer, buffer = writer_of(promote_dtypes=True, propose=lambda proposal: FLAT)
    ((where, (left,)),) = writer.write(0, 2, np.array([4, 5]))
    assert where == slice(0, 2)
    assert_same(left, np.array([4, 5]))
    assert not writer.write(2, 4, np.array([4.0, 5.0]))
    with pytest.raises(DisagreementError):  # shapes do not promote
        writer.write(4, 6, np.ones((2, 1)))
    assert array_in(buffer)[2:4].tolist() == [4, 5]


def test_a_writer_trims_margins_and_casts():
    writer, buffer = writer_of(outputs=Output(np.dtype("f4")))
    writer.write(0, 2, np.arange(3.0), (0, 1))
    writer.write(2, 6, np.arange(1.0, 7.0), (1, 1))
    assert array_in(buffer).tolist() == [0, 1, 2, 3, 4, 5]
    assert writer._worker.facts == (0, FLAT.with_dtypes([np.dtype("f4")]))
    with pytest.raises(TypeError, match="complex128 cannot become float32"):
        writer.write(0, 2, np.ones(2, complex))


def test_a_requested_output_is_checked_against_the_first_result():
    asked = Output(np.dtype("f8"), (6, 1))
    with pytest.raises(ValueError, match=r"out has shape \(6, 1\), but the results need \(6,\)"):
        writer_of(outputs=asked)[0].write(0, 2, np.ones(2))
    with pytest.raises(ValueError, match="has 2 entries, but func returned 1"):
        writer_of(outputs=(ANY, ANY))[0].write(0, 2, np.ones(2))
    with pytest.raises(TypeError, match="int64 have no NaN: pass fill_value="):
        writer_of(make_fill=require_missing_value)[0].write(0, 2, np.ones(2, "i8"))


def test_values_of_mixed_dtypes_are_deferred_by_their_positions():
    writer, _ = writer_of(promote_dtypes=True, propose=lambda proposal: FLAT)
    groups = [(np.array([0, 2]), np.array([1, 3])), (np.array([1]), np.array([2.5]))]
    found = writer.write(3, 6, MixedDtypes(groups))
    assert [where.tolist() for where, _ in found] == [[3, 5], [4]]
    assert [[array.tolist() for array in arrays] for _, arrays in found] == [[[1, 3]], [[2.5]]]

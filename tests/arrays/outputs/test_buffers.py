"""The memory of outputs: where it lies, and what is written to it."""

import math
import threading

import numpy as np
import pytest

from taskcarrier import map_array
from taskcarrier.arrays.casting import require_missing_value
from taskcarrier.arrays.outputs.buffers import (
    LocalBuffer,
    Output,
    SharedBuffer,
    make_range_writer,
    open_place,
)
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.memory.segments import Segment
from tests.arrays.outputs.examples import FLAT, PAIR
from tests.strategies import assert_same, keep_pools_warm

pools = keep_pools_warm(2)


def arrays_of(buffer, spec):
    return [open_place(place) for place in buffer.make_places(spec)]


def shared_buffer(segment, n_items, order="C", **options):
    return SharedBuffer(segment=segment, n_items=n_items, order=order, **options)


def local_buffer(n_items, order="C", **options):
    return LocalBuffer(n_items=n_items, order=order, **options)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(12,), (12, 3), (1, 12, 3), (3, 12), (2, 3, 12), (12, 0)])
def test_writers_put_ranges_in_their_places(shape, axis, order):
    if axis >= len(shape):
        axis = len(shape) - 1
    n_items = shape[axis]
    values = np.arange(math.prod(shape), dtype=">i4").reshape(shape)
    spec = Spec(((values.dtype, shape[:axis] + shape[axis + 1 :]),), (axis,), is_tuple=False)
    for buffer in (
        local_buffer(n_items, order),
        shared_buffer(Segment.create(), n_items, order),
    ):
        (place,) = buffer.make_places(spec)
        write_range = make_range_writer(place, axis)
        for start in reversed(range(0, n_items, 5)):
            stop = min(start + 5, n_items)
            part = values[(slice(None),) * axis + (slice(start, stop),)]
            write_range(start, stop, part if start else np.asfortranarray(part))
        assert_same(open_place(place), values)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("spec", [FLAT, PAIR], ids=["flat", "pair"])
def test_shared_and_local_buffers_have_the_same_layout(order, spec):
    segment = Segment.create()
    shared, local = shared_buffer(segment, 7, order), local_buffer(7, order)
    for number, (one, other) in enumerate(
        zip(arrays_of(shared, spec), arrays_of(local, spec), strict=True)
    ):
        assert (one.shape, one.dtype, one.strides) == (other.shape, other.dtype, other.strides)
        one[...] = number
        assert one.flags.aligned
    assert segment.nbytes >= sum(
        math.prod(shape) * dtype.itemsize
        for (dtype, _), shape in zip(spec.parts, spec.shapes(7), strict=True)
    )
    # A later request gets the array that the first one has written to.
    for number, again in enumerate(arrays_of(shared_buffer(segment, 7, order), spec)):
        assert (again == np.array(number).astype(again.dtype)).all()


@pytest.mark.parametrize("kind", ["local", "shared"])
def test_a_given_output_is_used_in_place_and_takes_no_other_memory(kind):
    segment = Segment.create()
    mine = np.zeros(10)[::2]
    outputs = (Output(mine.dtype, mine.shape, mine),)
    if kind == "shared":
        buffer = shared_buffer(segment, 5, outputs=outputs)
    else:
        buffer = local_buffer(5, outputs=outputs)
    (array,) = arrays_of(buffer, FLAT)
    assert array is mine
    assert segment.nbytes == 0


def test_results_stay_shared_unless_their_segment_is_much_too_large():
    segment = Segment.create()
    shared = shared_buffer(segment, 1000)
    shared.make_places(FLAT)
    assert not shared.is_wasteful(FLAT)
    segment.reserve(1 << 20)
    assert shared.is_wasteful(FLAT)


def test_results_without_bytes_need_no_segment():
    segment = Segment.create()
    (array,) = arrays_of(shared_buffer(segment, 0), FLAT)
    assert array.shape == (0,)
    assert segment.nbytes == 0


def test_objects_cannot_be_placed_in_a_segment():
    segment = Segment.create()
    spec = FLAT.with_dtypes([np.dtype(object)])
    assert shared_buffer(segment, 3).make_places(spec) is None
    assert segment.nbytes == 0


def test_threads_get_the_same_output_arrays():
    local = local_buffer(5)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(local.make_places(FLAT)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(array) for array in found}) == 1


@pytest.mark.parametrize("kind", ["local", "shared"])
def test_completing_writes_deferred_results_and_fills_holes_along_the_mapped_axis(kind):
    spec = Spec(((np.dtype("i8"), (2,)),), (1,), is_tuple=False)
    buffer = shared_buffer(Segment.create(), 6) if kind == "shared" else local_buffer(6)
    (whole,) = arrays_of(buffer, spec)
    whole[:, :3] = 1
    deferred = [(np.array([3, 5]), [np.full((2, 2), 2.5)])]
    (array,) = buffer.complete(spec, deferred, [slice(4, 5)])
    expected = [1, 1, 1, 2.5, np.nan, 2.5]
    assert_same(array, np.array([expected, expected]))


def test_completing_makes_room_for_objects_in_the_memory_of_the_caller():
    spec = FLAT.with_dtypes([np.dtype(object)])
    buffer = shared_buffer(Segment.create(), 3)
    values = np.array(["a", {1}], object)
    (array,) = buffer.complete(spec, [(slice(0, 2), [values])], [slice(2, 3)])
    assert array.tolist() == ["a", {1}, None]


def test_completing_needs_a_value_for_holes_even_if_there_are_none():
    spec = FLAT.with_dtypes([np.dtype("i8")])
    with pytest.raises(TypeError, match="int64 have no NaN"):
        local_buffer(3, make_fill=require_missing_value).complete(spec, [], [])


def test_dtypes_that_have_none_in_common_are_named():
    with pytest.raises(TypeError) as caught:
        local_buffer(2).complete(FLAT, [(slice(0, 1), [np.zeros(1, "M8[s]")])], [])
    assert caught.value.__notes__ == [
        "func returned values of dtypes datetime64[s], float64, which have none in common"
    ]


STACKED = [
    np.dtype(dtype)
    for dtype in (
        *("?", "i1", "u1", ">i2", "u4", "i8", "u8", "f2", ">f4", "f8", "g", "F", "D", "O"),
        *("S3", "U2", ">U5", "V5", "i1,f4", "i4,f8"),
        *("M8[D]", ">M8[s]", "m8[D]", ">m8[ns]"),  # without a unit they are deprecated
    )
]


@pytest.mark.parametrize("agreed", STACKED, ids=str)
def test_any_two_dtypes_promote_or_fail_as_numpy_stack_has_it(agreed):
    for other in STACKED:
        zeros = [np.zeros((), agreed), np.zeros((), other)]
        deferred = [(slice(1, 2), [zeros[1].reshape(1)])]
        buffer = local_buffer(2)
        try:
            expected = np.stack(zeros).dtype if agreed != other else agreed
        except TypeError:
            with pytest.raises(TypeError) as caught:
                buffer.complete(FLAT.with_dtypes([agreed]), deferred, [])
            (note,) = caught.value.__notes__
            assert str(agreed) in note, other
            assert str(other) in note, agreed
        else:
            (made,) = buffer.complete(FLAT.with_dtypes([agreed]), deferred, [])
            assert made.dtype == expected, other


@pytest.mark.fault(26)
def test_results_are_copied_out_when_descriptors_are_scarce():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, hard))
        for number in range(60):
            kept.append(map_array(lambda c: c, np.full(300, number), n_jobs=2, backend="loky"))  # noqa: PERF401  # each is made after the last
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [result[0] for result in kept] == list(range(60))
    assert kept[-1].flags.owndata
    assert not kept[0].flags.owndata

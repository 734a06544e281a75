"""Arithmetic on addresses, shapes and strides, compared with NumPy."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taskcarrier.memory.strides import (
    ALIGNMENT,
    _dense_strides,
    address_of,
    align,
    byte_bounds,
    contiguous_strides,
    copy_without_gaps,
    count_copy_nbytes,
    has_internal_overlap,
    is_mostly_gaps,
    move_items_first,
    view_bytes,
)
from tests import layouts
from tests.layouts import CACHE_LINE, EMPTY, GATHERED, KEPT, LAYOUTS, address, extent
from tests.strategies import same_bits, samples


def assert_gathered(copy, array):
    """Assert that a copy has the same items without gaps, with order and signs of the strides."""
    assert same_bits(copy, array)
    assert not np.shares_memory(copy, array)
    assert copy.flags.writeable
    assert extent(copy) <= array.nbytes
    for before, after, n in zip(array.strides, copy.strides, array.shape, strict=True):
        assert n == 1 or np.sign(before) == np.sign(after)
    axes = [axis for axis in range(array.ndim) if array.shape[axis] > 1 and array.strides[axis]]
    for one, two in pairwise(sorted(axes, key=lambda axis: abs(array.strides[axis]))):
        if abs(array.strides[one]) < abs(array.strides[two]):
            assert abs(copy.strides[one]) < abs(copy.strides[two])


class TestItemsFirst:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_items_first_is_a_view_like_that_of_numpy(self, axis):
        array = np.arange(24).reshape(2, 3, 4)
        view, expected = move_items_first(array, axis), np.moveaxis(array, axis, 0)
        assert np.array_equal(view, expected)
        assert view.strides == expected.strides
        assert np.shares_memory(view, array)


class TestBounds:
    def test_the_alignment_is_a_cache_line(self):
        assert ALIGNMENT == CACHE_LINE

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_byte_bounds_of_layouts_equal_those_of_numpy(self, layout):
        array = LAYOUTS[layout]()
        assert byte_bounds(array) == layouts.byte_bounds(array)
        assert address_of(array) == address(array)

    @given(samples())
    def test_byte_bounds_of_any_array_equal_those_of_numpy(self, sample):
        with sample.array() as array:
            assume(array.nbytes)
            assert byte_bounds(array) == layouts.byte_bounds(array)
            assert address_of(array) == address(array)
            low, high = byte_bounds(array)
            assert count_copy_nbytes(array) >= high - low + 2 * (ALIGNMENT - 1)

    @pytest.mark.parametrize("layout", EMPTY)
    def test_arrays_without_bytes_have_no_footprint(self, layout):
        assert count_copy_nbytes(EMPTY[layout]()) == 0


class TestGaps:
    @pytest.mark.parametrize("layout", [*LAYOUTS, *EMPTY])
    def test_layouts_that_are_mostly_gaps_are_recognised(self, layout):
        array = {**LAYOUTS, **EMPTY}[layout]()
        assert is_mostly_gaps(array) is (layout in GATHERED)

    def test_twice_the_bytes_are_not_mostly_gaps(self):
        bytes_ = np.zeros(100, np.uint8)
        assert not is_mostly_gaps(bytes_[:4:3])  # 2 of 4
        assert is_mostly_gaps(bytes_[:5:4])  # 2 of 5

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gaps_are_removed_keeping_order_and_signs(self, layout):
        array = LAYOUTS[layout]()
        before = array.tobytes()
        assert_gathered(copy_without_gaps(array), array)
        assert array.tobytes() == before

    def test_zero_strides_are_kept(self):
        assert copy_without_gaps(GATHERED["zero stride and gaps"]()).strides == (0, 8)

    @given(samples())
    def test_gaps_are_removed_from_any_array(self, sample):
        with sample.array() as array:
            assume(array.nbytes)
            assert_gathered(copy_without_gaps(array), array)

    def test_dense_strides_keep_order_and_signs(self):
        array = np.zeros((4, 6, 8), np.int16)
        assert _dense_strides(array) == (96, 16, 2)
        assert _dense_strides(array.transpose(1, 2, 0)) == (16, 2, 96)
        assert _dense_strides(array[::2, ::-3, ::4]) == (8, -4, 2)
        assert _dense_strides(np.broadcast_to(array[0, 0, ::4], (3, 2))) == (0, 2)


class TestBytesAt:
    def test_bytes_at_an_address_are_the_memory_itself(self):
        array = np.arange(100, dtype=np.uint8)
        block = view_bytes(address(array) + 3, 40)
        assert bytes(block) == array[3:43].tobytes()
        array[3] = 77
        assert block[0] == 77

    def test_bytes_at_an_address_are_read_only(self):
        array = np.arange(100, dtype=np.uint8)
        block = view_bytes(address(array), 100)
        assert block.readonly
        with pytest.raises(TypeError, match="read-only"):
            block[0] = 1


@given(st.integers(0, 1 << 60))
def test_align_gives_the_next_multiple(nbytes):
    assert align(nbytes) % CACHE_LINE == 0
    assert nbytes <= align(nbytes) < nbytes + CACHE_LINE


@pytest.mark.parametrize("order", ["C", "F"])
@given(st.lists(st.integers(1, 4), max_size=5), st.integers(1, 20))
def test_contiguous_strides_equal_those_of_numpy(order, shape, itemsize):
    array = np.empty(shape, f"V{itemsize}", order)
    found = contiguous_strides(array.shape, itemsize, order)
    apart = [axis for axis, n in enumerate(shape) if n > 1]
    assert [found[axis] for axis in apart] == [array.strides[axis] for axis in apart]
    # Of axes of length one and empty arrays NumPy says the same or nothing: both are contiguous.
    made = np.ndarray(array.shape, array.dtype, bytearray(array.nbytes), 0, found)
    assert made.flags.c_contiguous if order == "C" else made.flags.f_contiguous


class TestInternalOverlap:
    @given(samples())
    def test_internal_overlap_of_any_array_is_found(self, sample):
        with sample.array() as array:
            repeats = array.size > 1 and any(
                n > 1 and stride == 0 for n, stride in zip(array.shape, array.strides, strict=True)
            )
            if repeats and array.itemsize:
                assert has_internal_overlap(array)
            if not {"repeated", "windows"} & set(sample.layouts):
                assert not has_internal_overlap(array)

    @given(
        st.lists(st.tuples(st.integers(1, 4), st.integers(-12, 12)), min_size=1, max_size=3),
        st.integers(1, 4),
    )
    def test_internal_overlap_is_never_missed(self, axes, itemsize):
        offsets = [0]
        for n, stride in axes:
            offsets = [start + i * stride for start in offsets for i in range(n)]
        touched = [byte for start in offsets for byte in range(start, start + itemsize)]
        shape, strides = zip(*axes, strict=True)
        memory = np.zeros(400, np.uint8)
        array = np.ndarray(shape, f"V{itemsize}", memory, 200, strides)
        if len(set(touched)) < len(touched):
            assert has_internal_overlap(array)

    @pytest.mark.parametrize("layout", ["windows", "reversed windows", "zero stride"])
    def test_layouts_that_repeat_items_overlap(self, layout):
        assert has_internal_overlap(KEPT[layout]())

    @pytest.mark.parametrize("layout", EMPTY)
    def test_arrays_without_bytes_do_not_overlap(self, layout):
        assert not has_internal_overlap(EMPTY[layout]())

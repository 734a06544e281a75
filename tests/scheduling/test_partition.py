"""Partition and Grid: ranges cut as promised, without anything materialised."""

import copy
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.arguments import check_chunksize
from taskcarrier.scheduling.grid import (
    CHUNK_NBYTES,
    LONG_LIST,
    LONG_LIST_CHUNKS,
    MAX_CHUNKS,
    MAX_LIST_CHUNKS,
    MIN_CHUNKS,
    MIN_CHUNKS_SMALL,
    SMALL_CHUNK_NBYTES,
    ChunkGrid,
    chunk_grid,
    item_grid,
    list_grid,
)
from taskcarrier.scheduling.partition import Partition

few_parts = st.integers(1, 60)
few_items = st.integers(0, 300)
range_of = st.none() | st.integers(-70, 70)
steps = st.none() | st.integers(-5, 5).filter(bool)


def lengths(parts):
    return [part.stop - part.start for part in parts]


class TestPartition:
    @pytest.mark.parametrize(
        ("n_parts", "size", "expected"),
        [
            (5, 333, [67, 67, 67, 66, 66]),
            (100, 5, [1, 1, 1, 1, 1]),
            (1, 7, [7]),
            (7, 7, [1] * 7),
            (2, 3, [2, 1]),
            (3, 0, []),
        ],
    )
    def test_slices_have_the_known_lengths(self, n_parts, size, expected):
        assert lengths(Partition(n_parts, size)) == expected

    @given(few_parts, few_items)
    def test_slices_cover_the_range_in_order(self, n_parts, size):
        items = range(size)
        assert [i for part in Partition(n_parts, size) for i in items[part]] == list(items)

    @given(few_parts, few_items)
    def test_slices_are_near_equal_and_the_longer_come_first(self, n_parts, size):
        found = lengths(Partition(n_parts, size))
        assert len(found) == min(n_parts, size)
        assert found == sorted(found, reverse=True)
        assert all(length >= 1 for length in found)
        assert max(found, default=0) - min(found, default=0) <= 1

    @given(few_parts, few_items)
    def test_indexing_agrees_with_iteration(self, n_parts, size):
        parts = Partition(n_parts, size)
        expected = list(parts)
        assert [parts[i] for i in range(len(parts))] == expected
        assert [parts[i - len(parts)] for i in range(len(parts))] == expected
        assert list(reversed(parts)) == expected[::-1]

    @pytest.mark.parametrize("index", [3, -4, 10**12])
    def test_an_index_out_of_range_is_an_error(self, index):
        with pytest.raises(IndexError):
            Partition(3, 10)[index]

    def test_no_slices_have_no_index(self):
        with pytest.raises(IndexError):
            Partition(3, 0)[0]

    @given(few_parts, few_items, range_of, range_of, steps)
    def test_slicing_agrees_with_a_list(self, n_parts, size, start, stop, step):
        parts = Partition(n_parts, size)
        cut = parts[start:stop:step]
        assert isinstance(cut, Partition)
        assert list(cut) == list(parts)[start:stop:step]
        assert len(cut) == len(list(cut))

    @given(few_items, range_of, range_of, steps)
    def test_slicing_of_a_slice_agrees_with_a_list(self, size, start, stop, step):
        parts = Partition(40, size)
        assert list(parts[start:stop][::step]) == list(parts)[start:stop][::step]
        assert list(parts[::step][start:stop]) == list(parts)[::step][start:stop]

    def test_memory_does_not_grow_with_the_number_of_slices(self):
        tracemalloc.start()
        try:
            parts = Partition(10**15, 10**18 + 1)
            found = len(parts), parts[0], parts[-1], parts[10**14 :: 3][1], next(iter(parts))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000
        assert found[0] == 10**15
        assert found[1] == found[4] == slice(0, 1001)
        assert found[2] == slice(10**18 + 1 - 1000, 10**18 + 1)
        assert found[3] == slice((10**14 + 3) * 1000 + 1, (10**14 + 4) * 1000 + 1)

    def test_repr_shows_the_arguments(self):
        assert repr(Partition(5, 333)) == "Partition(n_parts=5, size=333)"
        assert repr(Partition(5, 333)[1:3]) == "Partition(n_parts=5, size=333, 2 of 5 slices)"

    def test_partitions_with_equal_slices_are_equal(self):
        assert Partition(5, 333) == Partition(5, 333)
        assert Partition(9, 5) == Partition(5, 5)
        assert Partition(5, 333)[:] == Partition(5, 333)
        assert Partition(2, 4)[:1] == Partition(4, 8)[:1]
        assert Partition(3, 0) == Partition(4, 0)

    def test_partitions_with_different_slices_are_unequal(self):
        assert Partition(5, 333) != Partition(5, 334)
        assert Partition(5, 333) != Partition(4, 333)
        assert Partition(5, 333)[::-1] != Partition(5, 333)
        assert Partition(2, 2) != [slice(0, 1), slice(1, 2)]

    @given(few_parts, few_items, few_parts)
    def test_equal_partitions_have_equal_hashes(self, n_parts, size, other):
        assert hash(Partition(n_parts, size)) == hash(Partition(n_parts, size)[:])
        if Partition(n_parts, size) == Partition(other, size):
            assert hash(Partition(n_parts, size)) == hash(Partition(other, size))

    def test_copies_of_a_partition_are_equal(self):
        cut = Partition(5, 333)[1::2]
        assert pickle.loads(pickle.dumps(cut)) == cut
        assert copy.copy(cut) == cut

    def test_membership_and_position_of_a_slice_are_found(self):
        parts = Partition(5, 333)
        assert slice(67, 134) in parts
        assert slice(0, 66) not in parts
        assert parts.index(slice(67, 134)) == 1

    @pytest.mark.parametrize("arguments", [(2.0, 3), (2, 3.0), ("2", 3), (None, 3), (2, None)])
    def test_arguments_must_be_integers(self, arguments):
        with pytest.raises(TypeError):
            Partition(*arguments)

    @pytest.mark.parametrize("n_parts", [0, -1])
    def test_there_must_be_at_least_one_part(self, n_parts):
        with pytest.raises(ValueError, match=f"n_parts must be at least 1, got {n_parts}"):
            Partition(n_parts, 10)

    def test_the_size_must_not_be_negative(self):
        with pytest.raises(ValueError, match="size must be at least 0, got -1"):
            Partition(3, -1)

    def test_numpy_integers_become_plain_ones(self):
        np = pytest.importorskip("numpy")
        parts = Partition(np.int8(3), np.uint64(200))
        assert list(parts) == list(Partition(3, 200))
        assert type(parts[1].stop) is int

    def test_an_index_must_be_an_integer(self):
        with pytest.raises(TypeError):
            Partition(3, 10)[1.0]


def ranges_of_grid(grid):
    return [grid.range_of(index) for index in range(len(grid))]


class TestGrid:
    @given(st.integers(1, 500), st.integers(1, 600))
    def test_chunks_cover_the_range_in_order(self, n_items, chunksize):
        chunks = ranges_of_grid(ChunkGrid(n_items, chunksize))
        assert [i for start, stop in chunks for i in range(start, stop)] == list(range(n_items))
        assert all(stop - start == chunksize for start, stop in chunks[:-1])
        assert 1 <= chunks[-1][1] - chunks[-1][0] <= chunksize

    def test_no_items_are_one_empty_chunk(self):
        assert ranges_of_grid(ChunkGrid(0, 7)) == [(0, 0)]
        assert ranges_of_grid(chunk_grid(0, 8)) == [(0, 0)]
        assert ranges_of_grid(list_grid(0)) == [(0, 0)]

    def test_grids_are_equal_by_value(self):
        assert chunk_grid(1000, 8) == ChunkGrid(1000, 62)
        assert hash(chunk_grid(1000, 8)) == hash(ChunkGrid(1000, 62))


class TestChunkGrid:
    def test_chunks_have_a_mebibyte(self):
        # 2**20 items of 512 bytes: neither bound on the number of chunks is met.
        grid = chunk_grid(1 << 20, 512)
        assert grid.chunksize * 512 == CHUNK_NBYTES == 1 << 20
        assert MIN_CHUNKS < len(grid) < MAX_CHUNKS

    @pytest.mark.parametrize("item_nbytes", [CHUNK_NBYTES + 1, 10 * CHUNK_NBYTES, 1 << 40])
    def test_a_chunk_has_at_least_one_item(self, item_nbytes):
        assert chunk_grid(100, item_nbytes).chunksize == 1

    @given(st.integers(1, 10**12), st.integers(0, 1 << 24))
    def test_the_number_of_chunks_is_bounded(self, n_items, item_nbytes):
        grid = chunk_grid(n_items, item_nbytes)
        assert grid.chunksize >= 1
        assert len(grid) <= MAX_CHUNKS == 4096
        assert len(grid) >= min(n_items, MIN_CHUNKS_SMALL)
        if grid.chunksize * item_nbytes > 2 * SMALL_CHUNK_NBYTES:
            assert len(grid) >= min(n_items, MIN_CHUNKS)
        assert (MIN_CHUNKS_SMALL, MIN_CHUNKS) == (16, 128)

    @given(st.integers(1, 10**9), st.integers(1, 1 << 22))
    def test_no_chunk_above_a_mebibyte_unless_there_would_be_too_many(self, n_items, item_nbytes):
        grid = chunk_grid(n_items, item_nbytes)
        fewest = -(-n_items // MAX_CHUNKS)
        assert grid.chunksize * item_nbytes <= CHUNK_NBYTES or grid.chunksize in {1, fewest}

    def test_items_without_bytes_are_divided(self):
        assert chunk_grid(6400, 0).chunksize == 400

    @given(st.integers(0, 1000), st.integers(0, 1 << 22), st.integers(1, 2000))
    def test_a_given_chunksize_is_used(self, n_items, item_nbytes, chunksize):
        assert chunk_grid(n_items, item_nbytes, chunksize) == ChunkGrid(n_items, chunksize)


@pytest.mark.parametrize(("grid_of", "most"), [(item_grid, 1024), (list_grid, 128)])
class TestGridsOfItems:
    @given(n_items=st.integers(0, 10**9))
    def test_the_number_of_chunks_of_items_is_bounded(self, grid_of, most, n_items):
        grid = grid_of(n_items)
        assert len(grid) <= most
        assert grid.chunksize == 1 or len(grid) > most // 2

    def test_a_given_chunksize_of_items_is_used(self, grid_of, most):
        assert grid_of(most * 10, 3) == ChunkGrid(most * 10, 3)


class TestListsInProcesses:
    @given(n_items=st.integers(0, 10**6), n_processes=st.integers(1, 100))
    def test_long_lists_are_cut_by_the_number_of_workers(self, n_items, n_processes):
        grid = list_grid(n_items, None, n_processes)
        if n_items < LONG_LIST:
            assert grid == list_grid(n_items)
        else:
            most = min(MAX_LIST_CHUNKS, LONG_LIST_CHUNKS * n_processes)
            assert most // 2 < len(grid) <= most

    def test_a_hundred_items_are_a_hundred_chunks(self):
        assert len(list_grid(100, None, 2)) == 100

    def test_a_given_chunksize_of_lists_is_used(self):
        assert list_grid(10**6, 3, 2) == ChunkGrid(10**6, 3)


class TestCheckChunksize:
    def test_a_chunksize_of_none_stays_none(self):
        assert check_chunksize(None) is None

    def test_integer_chunksizes_become_plain_ints(self):
        np = pytest.importorskip("numpy")
        assert check_chunksize(3) == 3
        assert type(check_chunksize(np.int32(3))) is int

    @pytest.mark.parametrize("chunksize", [0, -1])
    def test_a_chunksize_below_one_is_refused(self, chunksize):
        with pytest.raises(ValueError, match=f"chunksize must be at least 1, got {chunksize}"):
            check_chunksize(chunksize)

    @pytest.mark.parametrize("chunksize", [2.0, "2", [2], float("nan")])
    def test_a_chunksize_that_is_no_integer_is_refused(self, chunksize):
        with pytest.raises(TypeError, match="chunksize must be a positive integer or None, got"):
            check_chunksize(chunksize)

"""Arrays that workers see where they are."""

import gc
import operator
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from taskcarrier import (
    StaticParallelMapper,
    empty,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
    share,
)
from taskcarrier.memory.segments import locate
from tests.descriptors import n_descriptors
from tests.layouts import EMPTY, GATHERED, KEPT
from tests.strategies import (
    LOKY,
    assert_same,
    each_parallel_run,
    keep_pools_warm,
    same_bits,
    warm_pools,
)

LAYOUTS = {**KEPT, **GATHERED, **EMPTY}


pools = keep_pools_warm(2)


def held():
    """Descriptors and shared maps of this process."""
    warm_pools(2)  # their descriptors count, so they must be there
    gc.collect()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return n_descriptors(), maps.count("memfd:taskcarrier ")


@contextmanager
def descriptor_of(array):
    """Open a descriptor of the memory of an array, which keeps no page of it."""
    fd = os.dup(locate(array).segment.fd)
    del array
    try:
        yield fd
    finally:
        os.close(fd)


class TestShare:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_share_gives_an_ordinary_copy(self, layout):
        X = LAYOUTS[layout]()
        shared = share(X)
        assert type(shared) is np.ndarray
        assert same_bits(shared, np.ascontiguousarray(X))
        assert shared.flags.writeable
        assert shared.flags.aligned
        assert not np.shares_memory(shared, X)
        assert shared.flags.forc
        if X.flags.forc and X.size:
            assert [s for s, n in zip(shared.strides, X.shape, strict=True) if n > 1] == [
                s for s, n in zip(X.strides, X.shape, strict=True) if n > 1
            ]

    @pytest.mark.parametrize("layout", sorted(KEPT.keys() | GATHERED.keys()))
    @pytest.mark.parametrize("balance", ["static", "dynamic"])
    def test_a_shared_array_is_read_without_a_copy(self, layout, balance):
        shared = share(LAYOUTS[layout]())
        views = [shared, shared.T, shared[::-1], shared[: max(1, len(shared) // 2) : 2]]
        for view in views:
            for axis in range(view.ndim):
                result = map_array(np.copy, view, axis=axis, balance=balance, **LOKY)
                assert last_report().bytes_copied == 0
                assert same_bits(result, np.ascontiguousarray(view))

    def test_files_lists_and_shared_arrays_can_be_shared(self, tmp_path):
        np.save(tmp_path / "X.npy", np.arange(6.0))
        for X in (tmp_path / "X.npy", [0.0, 1, 2, 3, 4, 5], share(np.arange(6.0))):
            shared = share(X)
            assert_same(shared, np.arange(6.0))
            map_array(np.copy, shared, **LOKY)
            assert last_report().bytes_copied == 0

    @pytest.mark.parametrize(
        "X", [np.array([{}], object), np.ma.zeros(3), np.float64(3), "X.dat"], ids=repr
    )
    def test_arrays_that_cannot_be_shared_are_refused(self, X):
        with pytest.raises(TypeError, match=r"object|masked|0-dimensional|must end in"):
            share(X)


class TestEmpty:
    @pytest.mark.parametrize("shape", [5, (5,), (3, 4), (), (0, 3), (2, 0), np.int64(4)])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["f8", ">i4", "U3", "M8[s]", "i1, f8"])
    def test_empty_equals_that_of_numpy(self, dtype, order, shape):
        made, expected = empty(shape, dtype, order), np.empty(shape, dtype, order)
        assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
        assert made.flags.writeable
        assert made.size == 0 or made.strides == expected.strides
        made[...] = np.zeros((), dtype)
        assert same_bits(made, np.zeros(shape, dtype))

    def test_empty_has_floats_in_c_order_by_default(self):
        made = empty((3, 4))
        assert made.dtype == np.float64
        assert made.flags.c_contiguous

    def test_an_empty_array_is_read_and_filled_without_a_copy(self):
        X, out = empty((100, 3)), empty((100, 3), order="F")
        X[...] = np.arange(300.0).reshape(100, 3)
        for _ in range(2):
            assert map_array(np.sqrt, X, out=out, **LOKY) is out
            assert last_report().bytes_copied == 0
            assert np.array_equal(out, np.sqrt(X))
            X += 1

    @pytest.mark.parametrize("dtype", [object, "O", [("a", "O")]])
    def test_empty_arrays_of_objects_are_refused(self, dtype):
        with pytest.raises(TypeError, match="cannot lie in shared memory"):
            empty(3, dtype)

    def test_empty_arrays_of_strings_of_any_length_are_refused(self):
        if not hasattr(np.dtypes, "StringDType"):
            pytest.skip("NumPy 1 has no StringDType")  # its oldest version runs in CI
        with pytest.raises(TypeError, match="cannot lie in shared memory"):
            empty(3, np.dtypes.StringDType())

    @pytest.mark.parametrize("shape", [-1, (3, -2), (-1, 0)])
    def test_negative_lengths_are_refused(self, shape):
        with pytest.raises(ValueError, match="must not be negative"):
            empty(shape)

    @pytest.mark.parametrize("shape", [2.0, "3", (2, 2.5), None])
    def test_lengths_that_are_no_integers_are_refused(self, shape):
        with pytest.raises(TypeError):
            empty(shape)

    @pytest.mark.parametrize("order", ["K", "A", None, "c"])
    def test_unknown_orders_are_refused(self, order):
        with pytest.raises(ValueError, match="order must be 'C' or 'F'"):
            empty(3, order=order)

    def test_more_memory_than_there_is_is_refused(self):
        before = held()
        with pytest.raises(MemoryError, match="bytes"):
            empty((1 << 50,))
        assert held() == before


class TestLife:
    @pytest.mark.parametrize(
        "make", [lambda: share(np.zeros((300, 300))), lambda: empty((300, 300))]
    )
    def test_shared_memory_is_freed_with_the_last_view(self, make):
        before = held()
        X = make()
        view = X.T[::2, 5:]
        assert held()[1] == before[1] + 1
        map_array(np.copy, X, **LOKY)
        del X
        gc.collect()
        assert held()[1] == before[1] + 1
        view[...] = 3
        assert_same(map_array(np.copy, view, **LOKY), np.full(view.shape, 3.0))
        del view
        assert held() == before

    def test_shared_memory_is_freed_though_workers_keep_it_mapped(self):
        X = share(np.ones((300, 300)))
        with descriptor_of(X) as fd:
            for _ in range(2):
                assert reduce_array(np.sum, X, combine=operator.add, **LOKY) == 90_000
            assert os.fstat(fd).st_blocks > 0
            del X
            assert os.fstat(fd).st_blocks == 0

    def test_memory_of_results_is_freed_though_workers_keep_it_mapped(self):
        result = map_array(np.copy, np.ones((300, 300)), **LOKY)
        with descriptor_of(result) as fd:
            map_array(np.copy, result, **LOKY)
            del result
            assert os.fstat(fd).st_blocks == 0

    def test_workers_keep_few_segments_mapped(self):
        def maps_of_workers():
            def n_maps(chunk):
                maps = Path("/proc/self/maps").read_text(encoding="utf-8")
                return maps.count("memfd:taskcarrier ")

            return map_chunks(n_maps, np.zeros(2), chunksize=1, **LOKY)

        for n in range(30):
            X = share(np.zeros((300, 300)))
            map_array(np.copy, X, **LOKY)
            map_items(np.sum, X, **LOKY)
            if n == 15:
                before = maps_of_workers()
        assert maps_of_workers() == before
        assert max(before) <= 10

    def test_an_array_that_a_function_keeps_stays_valid_in_the_worker(self):
        def keep(chunk):
            import operator as anything  # a module outlives the call

            anything.kept = chunk[1:]
            return chunk.sum()

        def kept(chunk):
            import operator as anything  # as above

            return anything.kept.tolist()

        def drop(chunk):
            import operator as anything  # as above

            del anything.kept

        X = share(np.arange(6.0))
        one = np.zeros(2)
        try:
            map_chunks(np.sum, X, chunksize=3, **LOKY)  # now it is kept mapped
            map_chunks(keep, X, chunksize=3, **LOKY)
            del X
            others = [share(np.full(6, -1.0)) for _ in range(3)]
            map_chunks(np.sum, others[0], chunksize=3, **LOKY)
            assert map_chunks(kept, one, chunksize=1, **LOKY) == [[1, 2], [4, 5]]
        finally:
            map_chunks(drop, one, chunksize=1, **LOKY)

    def test_a_hundred_shared_arrays_leave_nothing_behind(self):
        before = held()
        for _ in range(100):
            X = share(np.arange(100.0))
            map_array(np.copy, X, **LOKY)
        del X
        assert held() == before


@pytest.mark.fault(25)
class TestChanges:
    @pytest.mark.parametrize("in_a_block", [False, True])
    def test_changes_are_seen_by_the_next_call(self, in_a_block):
        X = share(np.zeros((50, 4)))
        mapper = StaticParallelMapper(**LOKY)
        if in_a_block:
            mapper.__enter__()
        try:
            for change in range(4):
                X[change::5, change] = change + 1
                result = mapper.map_array(np.copy, X)
                assert_same(result, X.copy())
                assert mapper.report.bytes_copied == 0
        finally:
            if in_a_block:
                mapper.__exit__(None, None, None)

    def test_workers_cannot_change_a_shared_array(self):
        def spoil(chunk):
            chunk.flags.writeable = True

        X = share(np.zeros(50))
        with pytest.raises(ValueError, match=r"WRITEABLE|writeable"):
            map_array(spoil, X, **LOKY)
        assert not X.any()


@each_parallel_run
def test_a_chain_of_maps_copies_nothing(backend, balance):
    run = {"backend": backend, "balance": balance, "n_jobs": 2}
    X = np.random.default_rng(0).normal(size=(200, 30))
    step = share(X)
    expected = X
    for axis in (0, 1, 0, 1):
        step = map_array(np.square, step[::-1].T, axis=axis, **run)
        expected = np.square(expected[::-1].T)
        assert last_report().bytes_copied == 0
    items = map_items(lambda x: x * 2, step, **run)
    assert last_report().bytes_copied == 0
    assert_same(items, expected * 2)
    both = map_array(lambda a, b: (a + b, a - b), items, step, **run)
    assert last_report().bytes_copied == 0
    total = map_chunks(np.sum, both[0][:, ::-1], **run)
    assert last_report().bytes_copied == 0
    assert np.isclose(sum(total), (expected * 3).sum())


class Endless:
    """Memory whose owner has an owner, and so on."""

    def __init__(self, values):
        self.values, self.__array_interface__ = values, values.__array_interface__

    @property
    def base(self):
        return Endless(self.values)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_arrays_over_objects_with_a_base_of_their_own_are_mapped(backend):
    X = np.asarray(Endless(np.arange(6.0)))
    assert isinstance(X.base, Endless)
    assert_same(map_array(np.sqrt, X, backend=backend, n_jobs=2), np.sqrt(np.arange(6.0)))
    mapper = StaticParallelMapper(n_jobs=2, backend=backend)
    assert mapper.map(lambda i: float(X[i]), range(6)) == list(range(6))

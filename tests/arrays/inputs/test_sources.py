"""Sources of inputs: which one is chosen, and that each gives the chunks of the original."""

import contextlib

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

import taskcarrier
from taskcarrier import StaticParallelMapper, last_report, map_array
from taskcarrier.arrays.inputs import sources
from taskcarrier.arrays.inputs.check import check_inputs
from taskcarrier.arrays.inputs.halos import Halo
from taskcarrier.arrays.inputs.sources import (
    ArrayLikeSource,
    HaloSource,
    LocalSource,
    ParentMemorySource,
    PickledSource,
    SharedSource,
    local_sources,
    sources_for_processes,
)
from taskcarrier.memory import parent_memory
from taskcarrier.memory.segments import locate
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid
from tests.layouts import (
    EMPTY,
    GATHERED,
    LAYOUTS,
    STRUCT,
    address,
    byte_bounds,
    extent,
    facts,
    facts_of_slices,
    unaligned,
)
from tests.strategies import LOKY, axes_of, examples, filled, keep_pools_warm, run_script, samples

CHUNKSIZES = [1, 2, 3, 1000]


pools = keep_pools_warm(2)


def set_whole_nbytes(chunk, nbytes):
    sources._WHOLE_NBYTES = nbytes
    return chunk


@pytest.fixture(params=["whole", "by chunk"])
def small_arrays(request, monkeypatch):
    """Have workers read small arrays as usual, or chunk by chunk like large ones."""
    if request.param == "whole":
        yield
        return
    default = sources._WHOLE_NBYTES
    monkeypatch.setattr(sources, "_WHOLE_NBYTES", 0)
    # Static balance gives each of the two workers one item.
    map_array(set_whole_nbytes, np.zeros(2), kwargs={"nbytes": 0}, **LOKY)
    yield
    map_array(set_whole_nbytes, np.zeros(2), kwargs={"nbytes": default}, **LOKY)


@contextlib.contextmanager
def as_worker(whole_nbytes=sources._WHOLE_NBYTES):
    """Let this process read its own memory as a worker would."""
    memory = parent_memory.open_own_memory()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parent_memory, "_fd", memory.fileno())
            patch.setattr(sources, "_WHOLE_NBYTES", whole_nbytes)
            yield
    finally:
        memory.close()


def sources_of(*arrays, axis=0, chunksize=None):
    """Return the sources of a call, and the staging with what was copied."""
    inputs = check_inputs(arrays, axis)
    grid = chunk_grid(inputs.n_items, inputs.item_nbytes, chunksize)
    staging = Staging()
    found, notes = sources_for_processes(inputs, grid, None, staging)
    assert notes == []
    return found, staging


def source_of(array, axis=0, chunksize=None):
    (source,), _ = sources_of(array, axis=axis, chunksize=chunksize)
    return source


def gathered(array):
    """Return an array as a call takes it: itself, or a copy without gaps."""
    return check_inputs([array], 0).arrays[0]


def shared(array):
    (view,) = Staging().share([array])
    return view.open("write")


def values(shape, dtype="f8"):
    return filled(np.dtype(dtype), shape, np.random.default_rng(0))


def square(dtype="f8"):
    return values((300, 300), dtype)


def lies_in_a_segment(chunk):
    return np.full(len(chunk), locate(chunk) is not None)


def len_of(chunk, axis):
    return np.full(chunk.shape[axis], chunk.shape[axis])


# Arrays too large to be read in one go: (array, axis).
READ = {
    "C": (square, 0),
    "C, from the end": (square, -2),
    "F, last axis": (lambda: np.asfortranarray(square()), 1),
    "transposed": (lambda: square().T, 1),
    "reversed": (lambda: square()[::-1], 0),
    "reversed everywhere": (lambda: square()[::-1, ::-1], 0),
    "some columns": (lambda: square()[:, 20:280], 0),
    "one axis": (lambda: values((100_000,)), 0),
    "every other": (lambda: values((100_000,))[::2], 0),
    "every fifth": (lambda: values((500_000,))[::5], 0),
    "unaligned": (lambda: unaligned(values((100_000,))), 0),
    "struct": (lambda: values((100_000,), STRUCT), 0),
    "large field": (lambda: values((100_000,), STRUCT)["b"], 0),
    "big endian": (lambda: square(">f8"), 0),
    "strings": (lambda: values((100_000,), "U3"), 0),
    "cubes": (lambda: values((50, 40, 30)), 0),
    "items that repeat inside": (lambda: np.broadcast_to(values((100_000, 1)), (100_000, 9)), 0),
    "narrow windows": (lambda: sliding_window_view(values((100_000,)), 9), 0),
}
STAGED = {
    "columns": (square, 1),
    "columns, from the end": (square, -1),
    "rows of F": (lambda: np.asfortranarray(square()), 0),
    "columns, reversed": (lambda: square()[:, ::-1], 1),
    "columns of big endian": (lambda: square(">f8"), 1),
    "columns of structs": (lambda: square(STRUCT), 1),
    "the middle axis": (lambda: values((50, 40, 30)), 1),
    "one item many times": (lambda: np.broadcast_to(values((100_000,)), (9, 100_000)), 0),
    "windows, across": (lambda: sliding_window_view(values((100_000,)), 9), 1),
    "wide windows": (lambda: sliding_window_view(values((100_000,)), 50_000)[:, ::500], 0),
}


class TestChoice:
    @pytest.mark.parametrize("case", READ)
    def test_arrays_whose_chunks_are_apart_are_read(self, case):
        make, axis = READ[case]
        array = make()
        assert isinstance(source_of(array, axis), ParentMemorySource)

    @pytest.mark.parametrize("case", STAGED)
    def test_arrays_whose_chunks_are_interleaved_are_staged(self, case):
        make, axis = STAGED[case]
        array = make()
        assert isinstance(source_of(array, axis), SharedSource)

    @pytest.mark.parametrize("case", STAGED)
    def test_an_array_of_one_chunk_is_read(self, case):
        make, axis = STAGED[case]
        array = make()
        assert isinstance(source_of(array, axis, chunksize=100_000), ParentMemorySource)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_small_arrays_are_always_read(self, layout):
        array = LAYOUTS[layout]()
        for axis in range(array.ndim):
            assert isinstance(source_of(array, axis, chunksize=1), ParentMemorySource)

    def test_the_length_of_the_chunks_decides_whether_an_array_is_staged(self):
        windows = sliding_window_view(np.zeros(100_000), 9)
        assert isinstance(source_of(windows, chunksize=8), SharedSource)
        assert isinstance(source_of(windows, chunksize=80), ParentMemorySource)

    @pytest.mark.parametrize("layout", EMPTY)
    def test_arrays_without_bytes_are_neither_read_nor_copied(self, layout):
        (source,), staging = sources_of(EMPTY[layout]())
        assert isinstance(source, SharedSource)
        assert source.view.segment is None
        assert staging.nbytes == 0

    @pytest.mark.parametrize(
        "view_of", [lambda X: X, lambda X: X.T, lambda X: X[::7, ::-50], lambda X: X[:1]]
    )
    def test_a_shared_array_stays_where_it_is(self, view_of):
        array = shared(square())
        (source,), staging = sources_of(view_of(array))
        assert isinstance(source, SharedSource)
        assert source.view.segment is array.base.segment
        assert staging.nbytes == 0

    def test_private_pages_of_a_segment_are_read(self):
        (view,) = Staging().share([square()])
        array = view.open("private")
        assert isinstance(source_of(array), ParentMemorySource)

    def test_each_array_has_its_own_source(self):
        read, columns, result = square(), square(), shared(square())
        found, staging = sources_of(columns, read, result, square(), axis=(1, 0, 0, 1))
        kinds = [SharedSource, ParentMemorySource, SharedSource, SharedSource]
        assert [type(source) for source in found] == kinds
        assert [source.axis for source in found] == [1, 0, 0, 1]
        assert found[1].address == address(read)
        assert found[2].view.segment is result.base.segment
        assert found[0].view.segment is found[3].view.segment
        assert staging.nbytes == 3 * read.nbytes

    @given(samples(), st.data())
    def test_few_bytes_are_read_twice(self, sample, data):
        with sample.array() as array:
            array = gathered(array)  # noqa: PLW2901  # as a call takes it
            assume(array.nbytes)
            axis = data.draw(axes_of(array)) % array.ndim
            grid = ChunkGrid(array.shape[axis], data.draw(st.integers(1, 25)))
            before = (slice(None),) * axis
            chunks = [array[(*before, slice(*grid.range_of(index)))] for index in range(len(grid))]
            whole = extent(array)
            by_chunk = sum(map(extent, chunks))
            source = ParentMemorySource.of(array, axis)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sources, "_WHOLE_NBYTES", whole)
                assert source.is_worth_it(grid, 0)
                patch.setattr(sources, "_WHOLE_NBYTES", whole - 1)
                assert source.is_worth_it(grid, 0) is (by_chunk <= whole + whole // 4)


class TestReaders:
    """Each reader against the slices of the array, in this process."""

    @staticmethod
    def assert_reads(source, array, axis, chunksize):
        reader = source.open()
        n_items = array.shape[axis]
        starts = range(0, n_items, chunksize)
        chunks = [reader(start, min(start + chunksize, n_items)) for start in starts]
        found = np.concatenate([facts(chunk, axis) for chunk in chunks])
        assert np.array_equal(found, facts_of_slices(array, axis, chunksize))

    @given(samples(), st.data(), st.integers(1, 25), st.sampled_from([0, 1 << 16]))
    def test_reading_the_memory_of_the_caller_gives_the_slices_of_the_array(
        self, sample, data, chunksize, whole_nbytes
    ):
        with sample.array() as array, as_worker(whole_nbytes):
            assume(array.nbytes)
            axis = data.draw(axes_of(array)) % array.ndim
            self.assert_reads(ParentMemorySource.of(array, axis), array, axis, chunksize)

    @given(samples(), st.data(), st.integers(1, 25))
    def test_reading_a_segment_gives_the_slices_of_the_array(self, sample, data, chunksize):
        with sample.array() as array:
            assume(array.nbytes)
            axis = data.draw(axes_of(array)) % array.ndim
            (view,) = Staging().share([array])
            self.assert_reads(SharedSource(view, axis), array, axis, chunksize)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_local_source_gives_the_slices_of_the_array(self, layout):
        array = LAYOUTS[layout]()
        flag = array.flags.writeable
        for axis in range(array.ndim):
            source = LocalSource(array, axis)
            self.assert_reads(source, array, axis, 2)
            assert np.shares_memory(source.open()(0, 1), array)
        assert array.flags.writeable is flag

    def test_local_sources_are_views_of_the_arrays(self):
        X, Y = square(), square()
        one, other = local_sources(check_inputs([X, Y], (0, 1)), None)
        assert (one.axis, other.axis) == (0, 1)
        assert address(one.open()(3, 5)) == address(X[3:5])
        assert address(other.open()(3, 5)) == address(Y[:, 3:5])

    @pytest.mark.parametrize(("n_items", "n_reads"), [(8192, 1), (8193, 5)])
    def test_small_arrays_are_read_in_one_go(self, n_items, n_reads, monkeypatch):
        array = np.arange(float(n_items))
        asked = []
        with as_worker():
            read = parent_memory.read
            monkeypatch.setattr(
                parent_memory, "read", lambda *where: asked.append(where) or read(*where)
            )
            self.assert_reads(ParentMemorySource.of(array, 0), array, 0, 2000)
        assert len(asked) == n_reads
        assert sum(nbytes for _, nbytes in asked) == array.nbytes

    def test_a_chunk_read_from_the_caller_is_a_copy(self):
        array = np.zeros(10_000)
        with as_worker():
            chunk = ParentMemorySource.of(array, 0).open()(0, 100)
        array[:] = 1
        assert not chunk.any()


@pytest.mark.fault(29)
class TestWorkers:
    """Chunks as worker processes see them, against the slices of the array."""

    @staticmethod
    def assert_seen(array, axis, chunksize, options=LOKY):
        found = map_array(
            facts,
            array,
            axis=axis,
            out_axis=0,
            chunksize=chunksize,
            kwargs={"axis": axis},
            **options,
        )
        assert last_report().backend == "loky"
        expected = facts_of_slices(array, axis, last_report().chunksize)
        assert np.array_equal(found, expected)

    @pytest.mark.usefixtures("small_arrays")
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_workers_see_every_layout_axis_and_chunksize_alike(self, layout):
        array = gathered(LAYOUTS[layout]())
        for axis in range(array.ndim):
            for chunksize in CHUNKSIZES:
                self.assert_seen(array, axis, chunksize)

    @pytest.mark.parametrize("layout", GATHERED)
    def test_gathered_chunks_hold_the_original_s_items(self, layout):
        array = GATHERED[layout]()
        for axis in range(array.ndim):
            result = map_array(np.copy, array, axis=axis, chunksize=2, **LOKY)
            assert result.tobytes() == array.tobytes()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_workers_see_every_layout_of_a_shared_array_alike(self, layout):
        container = shared(np.zeros(1 << 14, np.uint8))
        original = gathered(LAYOUTS[layout]())
        low, _ = byte_bounds(original)
        memory = np.frombuffer(
            container, np.uint8, extent(original), offset=low % 64 + 64 - address(container) % 64
        )
        array = np.ndarray(
            original.shape, original.dtype, memory, address(original) - low, original.strides
        )
        array[...] = original
        for axis in range(array.ndim):
            self.assert_seen(array, axis, 2)
            assert last_report().bytes_copied == 0

    @pytest.mark.parametrize("case", [*READ, *STAGED])
    def test_workers_see_large_arrays_alike(self, case):
        make, axis = {**READ, **STAGED}[case]
        array = gathered(make())
        self.assert_seen(array, axis % array.ndim, None)
        self.assert_seen(array, axis % array.ndim, 77, {**LOKY, "balance": "dynamic"})

    @pytest.mark.parametrize("n_bytes", [0, 1, 17, 63])
    def test_workers_see_every_start_in_a_cache_line_alike(self, n_bytes):
        array = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)[n_bytes:]
        for chunksize in (1000, 1001, 99_999):
            self.assert_seen(array, 0, chunksize)

    @examples(60)
    @given(samples(), st.data(), st.none() | st.integers(1, 25))
    def test_workers_see_any_array_alike(self, sample, data, chunksize):
        with sample.array() as array:
            array = gathered(array)  # noqa: PLW2901  # as a call takes it
            assume(array.nbytes)
            axis = data.draw(axes_of(array)) % array.ndim
            self.assert_seen(array, axis, chunksize)

    @pytest.mark.parametrize("layout", ["no bytes in an item", "empty strings"])
    def test_items_without_bytes_are_mapped_in_processes(self, layout):
        array = EMPTY[layout]()
        result = map_array(np.copy, array, **LOKY)
        assert last_report().backend == "loky"
        assert (result.dtype, result.shape) == (array.dtype, array.shape)

    def test_arrays_from_different_sources_are_mapped_together(self):
        rng = np.random.default_rng(0)
        A, B, C, D = (rng.normal(size=(300, 300)) for _ in range(4))
        result = map_array(
            lambda a, b, c, d: a + b.T * c - d,
            A,
            B,
            shared(C),
            np.asfortranarray(D),
            axis=(0, 1, 0, 0),
            **LOKY,
        )
        assert np.array_equal(result, A + B.T * C - D)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("side", [20, 300])
    def test_writable_chunks_leave_the_array_alone(self, side, axis):
        def spoil(chunk):
            chunk += 1
            return chunk

        array = np.random.default_rng(0).normal(size=(side, side))
        before = array.copy()
        result = map_array(spoil, array, axis=axis, writable=True, **LOKY)
        assert np.array_equal(result, before + 1)
        assert np.array_equal(array, before)

    def test_only_staged_or_shared_chunks_lie_in_a_segment(self):
        for array, expected in (
            (square(), False),
            (np.asfortranarray(square()), True),
            (shared(square()), True),
        ):
            found = map_array(lies_in_a_segment, array, out_axis=0, **LOKY)
            assert np.array_equal(found, np.full(300, expected))


@pytest.mark.fault(25)
class TestChanges:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("side", [20, 300])
    @pytest.mark.parametrize("in_a_block", [False, True])
    def test_changes_between_two_calls_are_seen(self, side, axis, in_a_block):
        array = np.random.default_rng(0).normal(size=(side, side))
        block = StaticParallelMapper(**LOKY)
        with block if in_a_block else contextlib.nullcontext():
            map_like = block.map_array if in_a_block else map_array
            options = {} if in_a_block else LOKY
            for change in range(3):
                array[change::7, change] = change
                assert np.array_equal(map_like(np.copy, array, axis=axis, **options), array)

    def test_another_array_at_the_same_place_is_seen(self):
        for value in range(5):
            array = np.full((300, 300), float(value))
            assert np.array_equal(map_array(np.copy, array, **LOKY), array)
            del array

    def test_a_forked_child_s_own_memory_is_read(self, tmp_path):
        code = (
            "import os\n"
            "import numpy as np\n"
            "from taskcarrier import map_array\n"
            "X = np.zeros((300, 300))\n"
            "def total():\n"
            "    return map_array(np.copy, X, backend='loky', n_jobs=2).sum()\n"
            "print(total(), flush=True)\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    X += 1\n"
            "    print(total(), flush=True)\n"
            "    os._exit(0)\n"
            "assert os.waitpid(pid, 0)[1] == 0\n"
            "print(total())\n"
        )
        assert run_script(tmp_path, code).split() == ["0.0", "90000.0", "0.0"]


class TestBytesCopied:
    @pytest.mark.parametrize("case", ["C", "reversed", "items that repeat inside", "columns"])
    def test_the_report_counts_bytes_that_are_read_or_staged(self, case):
        make, axis = {**READ, **STAGED}[case]
        array = make()
        map_array(len_of, array, axis=axis, out_axis=0, kwargs={"axis": axis}, **LOKY)
        assert last_report().bytes_copied == extent(array)

    def test_bytes_copied_of_several_arrays_add_up(self):
        X, row = square(), np.arange(300.0)
        map_array(lambda a, b, c: a, X, shared(X), row, **LOKY)
        assert last_report().bytes_copied == X.nbytes + row.nbytes

    @pytest.mark.usefixtures("general_way")  # results of short calls are in ordinary memory
    @pytest.mark.parametrize("side", [20, 300])
    def test_mapping_results_of_processes_copies_no_bytes(self, side):
        result = map_array(np.copy, np.random.default_rng(0).normal(size=(side, side)), **LOKY)
        assert last_report().bytes_copied == result.nbytes
        for view, axis in ((result, 0), (result, 1), (result.T[::-1], 0), (result[::9, ::9], 1)):
            again = map_array(np.copy, view, axis=axis, **LOKY)
            assert last_report().bytes_copied == 0
            assert np.array_equal(again, view)


class Sliced:
    """An array-like that is not in memory."""

    def __init__(self, values):
        self._values = values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, index):
        return self._values[index].copy()


class TestOtherSources:
    """Arrays that are not in memory or not of plain bytes, and chunks with neighbours."""

    @staticmethod
    def opened(array, axis=0, chunksize=3, halo=None):
        inputs = check_inputs([array], axis)
        grid = ChunkGrid(inputs.n_items, chunksize)
        (source,), notes = sources_for_processes(inputs, grid, halo, Staging())
        return source, notes

    @pytest.mark.parametrize("axis", [0, 1])
    def test_array_likes_are_sliced_in_the_worker(self, axis):
        X = np.arange(90_000.0).reshape(300, 300)
        source, notes = self.opened(Sliced(X), axis)
        assert isinstance(source, ArrayLikeSource)
        assert notes == ["array 0 is read by range in every worker"]
        chunk = source.open()(20, 50)
        assert np.array_equal(chunk, X[20:50] if axis == 0 else X[:, 20:50])
        assert not chunk.flags.writeable

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("chunksize", [1, 3, 10, 100])
    def test_objects_are_pickled_by_chunk(self, chunksize, axis):
        X = np.array([str(number) for number in range(99)], object).reshape(9, 11)
        source, notes = self.opened(X, axis, chunksize)
        assert isinstance(source, PickledSource)
        assert notes == ["array 0 has dtype object: it is pickled by range"]
        read = source.open()
        n_items = X.shape[axis]
        for start in range(n_items):
            for stop in range(start + 1, n_items + 1):
                chunk = read(start, stop)
                expected = X[start:stop] if axis == 0 else X[:, start:stop]
                assert chunk.tolist() == expected.tolist()
                assert not chunk.flags.writeable

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("boundary", ["reflect", "nearest", "mirror", "wrap", "none"])
    @pytest.mark.parametrize("kind", ["read", "shared", "sliced", "objects"])
    def test_neighbours_can_come_from_any_source(self, kind, boundary, axis):
        X = values((12, 9), "i4")
        array = {
            "read": lambda: X,
            "shared": lambda: shared(X),
            "sliced": lambda: Sliced(X),
            "objects": lambda: X.astype(object),
        }[kind]()
        n_items = X.shape[axis]
        halo = Halo(4, boundary, 0, n_items)
        source, _ = self.opened(array, axis, 3, halo)
        assert isinstance(source, HaloSource)
        with as_worker():
            read = source.open()
            chunks = [read(start, min(start + 3, n_items)) for start in range(0, n_items, 3)]
        local = LocalSource(X, axis).open()
        for start, chunk in zip(range(0, n_items, 3), chunks, strict=True):
            expected = halo.read(local, axis, start, min(start + 3, n_items))
            assert chunk.tolist() == expected.tolist()
            assert not chunk.flags.writeable

    def test_small_chunks_with_deep_neighbours_are_staged(self):
        array = square()
        assert isinstance(self.opened(array, 0, 3, None)[0], ParentMemorySource)
        deep, _ = self.opened(array, 0, 3, Halo(100, "none", 0, 300))
        assert isinstance(deep, HaloSource)
        assert isinstance(deep.inner, SharedSource)
        shallow, _ = self.opened(array, 0, 100, Halo(1, "none", 0, 300))
        assert isinstance(shallow.inner, ParentMemorySource)


class TestUnreadableParentMemory:
    """The workers of other tests read memory, so these have workers of their own."""

    @pytest.fixture
    def pools(self):
        """Start none."""

    @pytest.fixture(autouse=True)
    def no_memory(self, monkeypatch, tmp_path):
        taskcarrier.shutdown()
        monkeypatch.setattr(parent_memory, "_PATH", str(tmp_path / "missing"))
        yield
        taskcarrier.shutdown()  # those workers could never read

    @pytest.mark.parametrize("case", READ)
    def test_every_array_is_staged_if_memory_cannot_be_opened(self, case):
        make, axis = READ[case]
        array = gathered(make())
        (source,), staging = sources_of(array, axis=axis)
        assert isinstance(source, SharedSource)
        assert staging.nbytes == extent(array)

    def test_workers_see_the_same_chunks_if_memory_cannot_be_opened(self):
        for make in LAYOUTS.values():
            array = gathered(make())
            for axis in range(array.ndim):
                TestWorkers.assert_seen(array, axis, 2)
                assert last_report().bytes_copied == extent(array)
        assert map_array(lies_in_a_segment, square(), out_axis=0, **LOKY).all()

    def test_workers_started_before_memory_became_unreadable_are_sent_segments_too(
        self, monkeypatch
    ):
        with monkeypatch.context() as patch:
            patch.setattr(parent_memory, "_PATH", "/proc/self/mem")
            assert not map_array(lies_in_a_segment, square(), out_axis=0, **LOKY).any()
        assert map_array(lies_in_a_segment, square(), out_axis=0, **LOKY).all()

"""Shared memory: arrays arrive bit for bit, nothing has a name, nothing is left."""

import errno
import gc
import mmap
import os
import pickle
import resource
import stat
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from taskcarrier.memory import available, segments
from taskcarrier.memory.segments import (
    Mapping,
    Recycler,
    Segment,
    SharedView,
    descriptors_are_scarce,
    live_mappings,
    locate,
)
from taskcarrier.memory.staging import Staging
from taskcarrier.system.descriptors import make_owner
from tests.descriptors import n_descriptors_in_use
from tests.layouts import CACHE_LINE, EMPTY, GATHERED, KEPT, LAYOUTS, address, extent


def assert_same_bytes(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return None if request.param == "memory" else str(tmp_path)


def shared(array, **where):
    (view,) = Staging(**where).share([array])
    return view


class TestRoundTrip:
    @pytest.mark.parametrize("layout", [*LAYOUTS, *EMPTY])
    def test_arrays_are_shared_bit_for_bit(self, layout, folder):
        array = {**LAYOUTS, **EMPTY}[layout]()
        before = array.tobytes()
        view = shared(array, folder=folder)
        for mode in ("read", "write", "private"):
            assert_same_bytes(view.open(mode), array)
        assert array.tobytes() == before

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_and_alignment_are_kept(self, layout):
        array = LAYOUTS[layout]()
        opened = shared(array).open("read")
        assert opened.strides == array.strides
        assert address(opened) % CACHE_LINE == address(array) % CACHE_LINE
        assert opened.flags.aligned == array.flags.aligned

    def test_every_start_in_a_cache_line_is_kept(self):
        whole = np.arange(200, dtype=np.uint8)
        for array in (whole[skip:] for skip in range(70)):
            assert address(shared(array).open("read")) % CACHE_LINE == address(array) % CACHE_LINE

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_staged_bytes_are_counted(self, layout):
        array = LAYOUTS[layout]()
        staging = Staging()
        staging.share([array, array])
        assert staging.nbytes == 2 * extent(array)

    @pytest.mark.parametrize("layout", ["zero stride", "one item many times", "windows"])
    def test_repeated_items_are_not_expanded(self, layout):
        array = KEPT[layout]()
        staging = Staging()
        staging.share([array])
        assert staging.nbytes == extent(array) < array.nbytes

    @pytest.mark.parametrize("layout", EMPTY)
    def test_arrays_without_bytes_take_no_memory(self, layout):
        staging = Staging()
        (view,) = staging.share([EMPTY[layout]()])
        assert view.segment is None
        assert staging.nbytes == 0

    def test_many_arrays_lie_apart_in_one_segment(self):
        arrays = [make() for make in (*KEPT.values(), *GATHERED.values(), *EMPTY.values())]
        views = Staging().share(arrays)
        assert len({id(view.segment) for view in views} - {id(None)}) == 1
        for view in views:
            view.open("read")
        for array, view in zip(arrays, views, strict=True):
            assert_same_bytes(view.open("read"), array)

    def test_one_staging_may_share_twice(self):
        staging = Staging()
        (one,) = staging.share([np.arange(10.0)])
        (two,) = staging.share([np.arange(100_000.0)])
        assert_same_bytes(one.open("read"), np.arange(10.0))
        assert_same_bytes(two.open("read"), np.arange(100_000.0))

    def test_staged_bytes_are_read_back_by_range(self, folder):
        content = os.urandom(100_000)
        segment, begin = Staging(folder).add(memoryview(content))
        assert segment.read(begin + 10, begin + 99_000) == content[10:99_000]
        assert segment.read(begin, begin) == b""

    def test_bytes_staged_first_reserve_only_their_own_room(self, folder):
        segment, begin = Staging(folder).add(memoryview(bytes(1_000_000)))
        assert segment.nbytes == begin + 1_000_000

    @given(st.data())
    def test_any_view_is_shared_bit_for_bit(self, data):
        dtype = data.draw(hnp.scalar_dtypes())
        base = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=4, max_side=9, min_side=0)))
        # `newaxis` and integers included; a scalar is not a view.
        indices = hnp.basic_indices(base.shape, allow_newaxis=True, allow_ellipsis=True)
        array = np.asarray(base[data.draw(indices)])
        axes = data.draw(st.permutations(range(array.ndim)))
        array = array.transpose(axes)
        opened = shared(array).open("read")
        assert_same_bytes(opened, array)
        if array.nbytes:
            assert opened.strides == array.strides


class TestModes:
    def test_arrays_opened_for_reading_cannot_be_made_writable(self):
        opened = shared(np.arange(10.0)).open("read")
        assert not opened.flags.writeable
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
            opened.flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            opened[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
            opened[2:].view("u1").flags.writeable = True

    def test_writes_are_seen_by_all(self):
        view = shared(np.arange(10.0))
        reader = view.open("read")
        view.open("write")[3] = -1
        assert reader[3] == -1
        assert view.open("private")[3] == -1

    def test_private_arrays_are_copied_on_write(self):
        view = shared(np.arange(10.0))
        one, other = view.open("private"), view.open("private")
        one[3] = -1
        assert one[3] == -1
        assert other[3] == view.open("read")[3] == 3

    @pytest.mark.parametrize(("mode", "writable"), [("read", False), ("private", True)])
    def test_arrays_without_bytes_are_opened_in_every_mode(self, mode, writable):
        assert shared(np.empty((0, 3))).open(mode).flags.writeable is writable


class TestLocate:
    # Not a fixture: pytest would keep the array beyond the end of the test.
    @staticmethod
    def made():
        return shared(np.arange(60.0).reshape(6, 10)).open("write")

    @pytest.mark.parametrize(
        "view_of",
        [
            lambda X: X,
            lambda X: X[2:5],
            lambda X: X[::-1, ::-3],
            lambda X: X.T,
            lambda X: X[2:5][1:].T[::-1],
            lambda X: X.reshape(3, 20)[1:],
            lambda X: X.view("i8"),
            lambda X: X.view("u1")[:, 3:],
            lambda X: X[np.newaxis, 1],
            lambda X: np.broadcast_to(X[0], (4, 10)),
            lambda X: sliding_window_view(X.ravel(), 5),
            lambda X: as_strided(X[1:], (3, 2), (16, 8)),
            lambda X: np.asarray(memoryview(X)),
            lambda X: np.asarray(memoryview(X)[2:4]),
            lambda X: np.frombuffer(X.data.cast("B"), "f4", offset=8),
            lambda X: np.ndarray((3, 3), "f8", X, 16),
            lambda X: X.view(np.recarray).view(np.ndarray),
        ],
    )
    def test_sharing_a_view_of_a_segment_copies_nothing(self, view_of):
        array = self.made()
        found = view_of(array)
        staging = Staging()
        (view,) = staging.share([found])
        assert staging.nbytes == 0
        assert view.segment is array.base.segment
        opened = view.open("write")
        assert_same_bytes(opened, found)
        assert opened.strides == found.strides
        array[...] = -array  # the very same memory
        assert np.array_equal(opened, found, equal_nan=opened.dtype.kind == "f")

    @pytest.mark.parametrize(
        "make",
        [
            lambda X: X.copy(),
            lambda X: X[[1, 2]],
            lambda X: X + 1,
            lambda X: np.arange(3.0),
            lambda X: np.frombuffer(b"12345678"),
            lambda X: X[:0],
        ],
    )
    def test_arrays_outside_segments_are_not_located(self, make):
        assert locate(make(self.made())) is None

    def test_a_view_that_points_out_of_its_mapping_is_not_located(self):
        outside = as_strided(self.made()[-1:], (1000, 10), (80, 8))  # never read
        assert locate(outside) is None

    def test_other_mappings_of_files_are_not_located(self, tmp_path):
        path = tmp_path / "array"
        np.arange(10.0).tofile(path)
        assert locate(np.memmap(path, mode="r")[2:]) is None
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as block:
            array = np.frombuffer(block, "f8")
            assert locate(array) is None
            del array


class TestSegment:
    def test_plain_pickle_is_refused(self):
        segment = Segment.create()
        with pytest.raises(TypeError, match="can only be pickled as part of a run"):
            pickle.dumps(segment)

    def test_a_truncated_segment_cannot_be_read(self, tmp_path):
        segment = Segment.create(str(tmp_path))
        segment.reserve(100)
        os.ftruncate(segment.fd, 40)
        assert segment.read(10, 40) == bytes(30)
        with pytest.raises(EOFError, match=r"ends at byte 40, before byte 41 .*cut off"):
            segment.read(10, 41)

    def test_shrinking_is_refused_by_the_kernel(self):
        segment = Segment.create()
        segment.reserve(1 << 16)
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, 1)
        assert os.fstat(segment.fd).st_size == 1 << 16

    def test_reserving_less_changes_nothing(self, folder):
        segment = Segment.create(folder)
        segment.reserve(1 << 16)
        segment.reserve(10)
        assert segment.nbytes == os.fstat(segment.fd).st_size == 1 << 16

    def test_reserving_more_keeps_the_content(self, folder):
        segment = Segment.create(folder)
        segment.reserve(100)
        segment.write(0, memoryview(b"abc"))
        early = segment.map("read")
        segment.reserve(1 << 20)
        assert segment.nbytes >= 1 << 20
        assert early[:3] == segment.map("read")[:3] == b"abc"

    def test_disk_space_is_really_reserved(self, tmp_path):
        segment = Segment.create(str(tmp_path))
        segment.reserve(1 << 20)
        assert os.fstat(segment.fd).st_blocks * 512 >= 1 << 20

    def test_space_that_another_has_reserved_is_not_cut(self, folder):
        mine = Segment.create(folder)
        other = Segment(make_owner(os.dup(mine.fd)), mine.on_disk)
        other.reserve(1 << 20)
        mine.reserve(1 << 10)
        assert mine.nbytes == os.fstat(mine.fd).st_size == 1 << 20

    def test_another_may_reserve_more_in_between(self, monkeypatch):
        mine = Segment.create()
        other = Segment(make_owner(os.dup(mine.fd)), on_disk=False)
        ftruncate = os.ftruncate

        def late(fd, nbytes):
            monkeypatch.undo()
            other.reserve(1 << 20)
            ftruncate(fd, nbytes)

        monkeypatch.setattr(os, "ftruncate", late)
        mine.reserve(1 << 10)
        assert mine.nbytes == os.fstat(mine.fd).st_size == 1 << 20

    def test_two_processes_may_reserve_at_once(self, folder):
        code = (
            "import sys\n"
            "from taskcarrier.system.descriptors import make_owner\n"
            "from taskcarrier.memory.segments import Segment\n"
            "fd, on_disk, step = map(int, sys.argv[1:])\n"
            "segment = Segment(make_owner(fd), bool(on_disk))\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "for nbytes in range(4096, 4096 * 200, 4096 * step):\n"
            "    segment.reserve(nbytes)\n"
            "    assert segment.nbytes >= nbytes\n"
            "    segment.map('write')[nbytes - 1] = step\n"
        )
        segment = Segment.create(folder)
        programs = [
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, (segment.fd, int(segment.on_disk), step))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[segment.fd],
            )
            for step in (1, 3)
        ]
        for program in programs:
            assert program.stdout.readline() == "ready\n"
        for program in programs:
            program.stdin.write("\n")
            program.stdin.flush()
        for program in programs:
            program.communicate(timeout=60)
        assert [program.returncode for program in programs] == [0, 0]
        assert os.fstat(segment.fd).st_size == 4096 * 199
        segment.reserve(1)
        block = np.frombuffer(segment.map("read"), np.uint8)
        written = np.flatnonzero(block)
        assert np.array_equal(written, np.arange(4096, 4096 * 200, 4096) - 1)

    def test_large_arrays_are_written_in_pieces(self, monkeypatch):
        monkeypatch.setattr(segments, "_PWRITE_NBYTES", 1000)
        array = np.arange(5001, dtype=np.uint16)
        assert_same_bytes(shared(array).open("read"), array)

    def test_writing_continues_after_a_short_write(self, monkeypatch):
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, block, at: pwrite(fd, block[:777], at))
        array = np.arange(5001, dtype=np.uint16)
        assert_same_bytes(shared(array).open("read"), array)

    def test_a_mapping_keeps_its_segment(self):
        segment = Segment.create()
        segment.reserve(10)
        mapping = segment.map("write")
        assert isinstance(mapping, Mapping)
        assert mapping.segment is segment


class TestOwnership:
    def test_descriptors_are_closed_with_the_last_view(self):
        before = n_descriptors_in_use()
        view = shared(np.arange(1000.0))
        opened = [view.open(mode) for mode in ("read", "write", "private")]
        last = opened[1][5:].T
        assert n_descriptors_in_use() > before
        del view, opened
        assert n_descriptors_in_use() > before
        assert last[0] == 5
        del last
        assert n_descriptors_in_use() == before

    def test_descriptors_of_arrays_with_gaps_are_closed(self):
        before = n_descriptors_in_use()
        view = shared(np.arange(1000.0)[::10])
        assert n_descriptors_in_use() > before
        del view
        assert n_descriptors_in_use() == before

    def test_descriptors_are_closed_after_a_refusal(self, tmp_path):
        before = n_descriptors_in_use()
        with pytest.raises(FileNotFoundError):
            Segment.create(str(tmp_path / "missing"))
        assert n_descriptors_in_use() == before

    def test_descriptors_are_not_inherited(self, folder):
        assert not os.get_inheritable(Segment.create(folder).fd)


@pytest.mark.fault(24)
class TestFolder:
    @pytest.fixture(params=["O_TMPFILE", "named for a moment"])
    def way(self, request, monkeypatch):
        if request.param == "named for a moment":
            real = os.open

            def without_tmpfile(path, flags, *rest, **kwargs):
                if flags & os.O_TMPFILE == os.O_TMPFILE:
                    raise OSError(errno.EOPNOTSUPP, "not here")
                return real(path, flags, *rest, **kwargs)

            monkeypatch.setattr(os, "open", without_tmpfile)
        return request.param

    @pytest.mark.usefixtures("way")
    def test_a_file_in_a_folder_has_no_name(self, tmp_path):
        segment = Segment.create(str(tmp_path))
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(segment.fd).st_nlink == 0
        assert os.fstat(segment.fd).st_dev == tmp_path.stat().st_dev
        segment.reserve(100)
        segment.write(0, memoryview(b"abc"))
        assert segment.map("read")[:3] == b"abc"

    @pytest.mark.usefixtures("way")
    def test_a_file_in_a_folder_is_readable_only_by_its_owner(self, tmp_path):
        before = os.umask(0)
        try:
            segment = Segment.create(str(tmp_path))
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.fstat(segment.fd).st_mode) == 0o600

    def test_other_errors_are_not_hidden(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, "no")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(PermissionError):
            Segment.create(str(tmp_path))

    @pytest.mark.parametrize("is_file", [True, False])
    def test_the_folder_must_exist(self, tmp_path, is_file):
        path = tmp_path / "it"
        if is_file:
            path.touch()
        with pytest.raises(FileNotFoundError, match="temp_folder must be an existing folder"):
            Segment.create(str(path))

    def test_a_full_disk_is_an_error_with_sizes(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        segment = Segment.create(str(tmp_path))
        with pytest.raises(OSError, match="no room for a shared array of 12,345,678 bytes") as info:
            segment.reserve(12_345_678)
        assert info.value.errno == errno.ENOSPC
        assert "temp_folder" in str(info.value)
        assert segment.nbytes == 0

    def test_a_size_beyond_any_disk_is_an_error(self, tmp_path):
        # More than any file system takes for one file.
        with pytest.raises(OSError, match=r"no room|too large") as info:
            Segment.create(str(tmp_path)).reserve(1 << 62)
        assert info.value.errno in {errno.ENOSPC, errno.EFBIG}


@pytest.mark.fault(23)
class TestMemoryCheck:
    def test_missing_address_space_is_an_error(self, monkeypatch):
        def refuse(*_, **__):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        segment = Segment.create()
        segment.reserve(1 << 20)
        monkeypatch.setattr(segments, "Mapping", refuse)
        with pytest.raises(MemoryError, match="1,048,576 bytes of shared memory cannot be mapped"):
            segment.map("read")

    def test_too_much_memory_is_refused_with_sizes(self, monkeypatch):
        monkeypatch.setattr(available, "_available_memory", lambda: (100 << 20, "a test"))
        segment = Segment.create()
        with pytest.raises(MemoryError, match="needs 209,715,200 bytes more") as info:
            segment.reserve(200 << 20)
        assert "104,857,600 are available (a test)" in str(info.value)
        assert os.fstat(segment.fd).st_size == segment.nbytes == 0

    def test_only_additional_memory_counts(self, monkeypatch):
        segment = Segment.create()
        segment.reserve(200 << 20)  # not touched
        monkeypatch.setattr(available, "_available_memory", lambda: (100 << 20, "a test"))
        segment.reserve(290 << 20)
        assert segment.nbytes == 290 << 20

    def test_small_segments_are_not_checked(self, monkeypatch):
        monkeypatch.setattr(available, "_available_memory", lambda: (0, "a test"))
        segment = Segment.create()
        segment.reserve(1 << 20)
        assert segment.nbytes == 1 << 20

    def test_segments_on_disk_are_not_checked(self, monkeypatch, tmp_path):
        monkeypatch.setattr(available, "_available_memory", lambda: (0, "a test"))
        monkeypatch.setattr(available, "CHECKED_NBYTES", 1 << 10)
        segment = Segment.create(str(tmp_path))
        segment.reserve(1 << 20)
        assert segment.nbytes == 1 << 20


class TestRecycler:
    @pytest.fixture
    def recycler(self):
        made = Recycler(max_segments=2, max_nbytes=1 << 20)
        yield made
        made.close()

    @staticmethod
    def used(recycler, nbytes, folder=None):
        """Return the inode of a segment that was used and is free again."""
        segment = recycler.segment(nbytes, folder)
        segment.reserve(nbytes)
        return os.fstat(segment.fd).st_ino

    def test_a_freed_segment_is_used_again(self, recycler, folder):
        inode = self.used(recycler, 1000, folder)
        again = recycler.segment(900, folder)
        assert os.fstat(again.fd).st_ino == inode
        assert again.nbytes >= 1000
        assert again.on_disk is (folder is not None)

    def test_the_pages_of_a_recycled_segment_stay_in_place(self, recycler):
        segment = recycler.segment(1000, None)
        segment.reserve(1000)
        segment.write(0, memoryview(b"abc"))
        del segment
        assert recycler.segment(1000, None).map("read")[:3] == b"abc"

    def test_a_segment_in_use_is_not_recycled(self, recycler):
        view = shared(np.arange(1000.0), recycler=recycler)
        array = view.open("read")
        inode = os.fstat(view.segment.fd).st_ino
        del view
        other = recycler.segment(8000, None)
        assert os.fstat(other.fd).st_ino != inode
        del array
        assert os.fstat(recycler.segment(8000, None).fd).st_ino == inode

    def test_staging_takes_segments_from_the_recycler_and_returns_them(self, recycler):
        view = shared(np.arange(1000.0), recycler=recycler)
        inode = os.fstat(view.segment.fd).st_ino
        del view
        view = shared(np.arange(999.0), recycler=recycler)
        assert os.fstat(view.segment.fd).st_ino == inode
        assert_same_bytes(view.open("read"), np.arange(999.0))

    @pytest.mark.parametrize("nbytes", [(1 << 20) - 1, (2 << 20) + 1])
    def test_a_large_segment_is_used_only_for_a_similar_size(self, nbytes):
        recycler = Recycler()
        inode = self.used(recycler, 2 << 20)
        assert (os.fstat(recycler.segment(nbytes, None).fd).st_ino == inode) is False
        assert os.fstat(recycler.segment(1 << 20, None).fd).st_ino == inode
        recycler.close()

    def test_a_small_segment_is_used_for_every_smaller_size(self, recycler):
        inode = self.used(recycler, 100_000)
        assert os.fstat(recycler.segment(100_001, None).fd).st_ino != inode
        assert os.fstat(recycler.segment(1, None).fd).st_ino == inode

    def test_the_best_fitting_segment_is_used(self, recycler):
        one, two = recycler.segment(1500, None), recycler.segment(1200, None)
        one.reserve(1500)
        two.reserve(1200)
        inode = os.fstat(two.fd).st_ino
        del one, two
        assert os.fstat(recycler.segment(1000, None).fd).st_ino == inode

    def test_segments_in_memory_are_not_used_for_disk(self, recycler, tmp_path):
        inode = self.used(recycler, 1000)
        assert os.fstat(recycler.segment(1000, str(tmp_path)).fd).st_ino != inode

    def test_the_number_of_kept_segments_is_limited(self, recycler):
        before = n_descriptors_in_use()
        held = [recycler.segment(1000, None) for _ in range(5)]
        for segment in held:
            segment.reserve(1000)
        del held, segment
        assert n_descriptors_in_use() == before + 2

    def test_the_bytes_of_kept_segments_are_limited(self, recycler):
        before = n_descriptors_in_use()
        held = [recycler.segment(700_000, None) for _ in range(2)]
        for segment in held:
            segment.reserve(700_000)
        del held, segment
        assert n_descriptors_in_use() == before + 1

    def test_empty_segments_are_not_kept(self, recycler):
        before = n_descriptors_in_use()
        recycler.segment(1000, None)
        assert n_descriptors_in_use() == before

    def test_closing_frees_the_kept_segments(self, recycler):
        before = n_descriptors_in_use()
        self.used(recycler, 1000)
        lent = recycler.segment(5000, None)
        lent.reserve(5000)
        assert n_descriptors_in_use() == before + 2
        recycler.close()
        recycler.close()
        assert n_descriptors_in_use() == before + 1
        del lent
        assert n_descriptors_in_use() == before
        self.used(recycler, 1000)
        assert n_descriptors_in_use() == before

    def test_kept_segments_are_freed_with_the_recycler(self):
        before = n_descriptors_in_use()
        made = Recycler()
        self.used(made, 1000)
        assert n_descriptors_in_use() == before + 1
        del made
        assert n_descriptors_in_use() == before

    def test_segments_are_recycled_only_in_the_process_that_made_them(self, recycler, monkeypatch):
        inode = self.used(recycler, 1000)
        before = n_descriptors_in_use()
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked child
        segment = recycler.segment(1000, None)
        assert os.fstat(segment.fd).st_ino != inode
        segment.reserve(1000)
        del segment
        assert n_descriptors_in_use() == before


class TestPages:
    """Pages are freed when the caller drops a segment, even if a worker has it mapped."""

    @staticmethod
    def made(*, get_label=True, recycler=None):
        segment = Segment.create(recycler=recycler)
        segment.reserve(10_000)
        segment.write(0, memoryview(b"abc"))
        if get_label:
            assert segment.get_label() > 0
        # As a worker would have it.
        other = mmap.mmap(segment.fd, 10_000, access=mmap.ACCESS_READ)
        assert other[:3] == b"abc"
        return segment, other

    def test_pages_are_freed_with_the_segment(self):
        segment, other = self.made()
        fd = os.dup(segment.fd)
        assert os.fstat(fd).st_blocks > 0
        del segment
        assert os.fstat(fd).st_blocks == 0
        assert other[:3] == bytes(3)
        os.close(fd)

    def test_pages_stay_while_an_array_refers_to_them(self):
        segment, other = self.made()
        array = SharedView(segment, 0, (10_000,), (1,), np.dtype("u1")).open("read")[::2]
        del segment
        assert other[:3] == b"abc"
        del array
        assert other[:3] == bytes(3)

    def test_pages_stay_if_no_worker_has_the_label(self):
        segment, other = self.made(get_label=False)
        del segment
        assert other[:3] == b"abc"

    def test_pages_stay_once_the_segment_is_retired(self):
        segment, other = self.made()
        segment.retire()
        assert segment.get_label() == 0
        del segment
        assert other[:3] == b"abc"

    def test_pages_of_the_parent_stay_when_a_forked_child_drops_them(self):
        segment, other = self.made()
        pid = os.fork()
        if pid == 0:
            del segment
            os._exit(0 if other[:3] == b"abc" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert other[:3] == b"abc"
        assert segment.get_label() > 0

    def test_pages_stay_in_a_recycler_until_it_closes(self):
        recycler = Recycler()
        segment, other = self.made(recycler=recycler)
        label = segment.label
        del segment
        assert other[:3] == b"abc"
        again = recycler.segment(10_000, None)
        assert again.get_label() == label
        del again
        recycler.close()
        assert other[:3] == bytes(3)

    def test_pages_of_files_are_never_freed(self, tmp_path):
        assert Segment.create(str(tmp_path)).get_label() == 0

    def test_labels_of_segments_differ(self):
        labels = {self.made()[0].label for _ in range(5)}
        assert len(labels) == 5


class TestScarceDescriptors:
    @pytest.fixture
    def soft_limit(self):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)

        def lower(soft):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))

        yield lower
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_descriptors_are_scarce_from_a_quarter_of_the_limit(self, soft_limit):
        gc.collect()
        segment = Segment.create()
        segment.reserve(1)
        already = len(segments.live_mappings())
        soft_limit(8 * (already + 10))
        mappings = [segment.map("read") for _ in range(10)]
        assert descriptors_are_scarce() is False
        mappings.append(segment.map("read"))
        assert descriptors_are_scarce() is True
        del mappings[5:]
        gc.collect()
        assert descriptors_are_scarce() is False

    def test_descriptors_are_never_scarce_without_a_limit(self, monkeypatch):
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
        monkeypatch.setattr(segments, "live_mappings", lambda: range(10**6))
        assert descriptors_are_scarce() is False


class TestLiveMappings:
    def test_no_python_code_runs_when_a_mapping_is_freed(self):
        # Ctrl-C at that moment would be lost.
        mapping = shared(np.arange(10.0)).segment.map("read")
        assert [one.__callback__ for one in weakref.getweakrefs(mapping)] == [None]
        assert mapping in live_mappings()
        name = id(mapping)
        del mapping
        gc.collect()
        assert name not in map(id, live_mappings())

    def test_freed_mappings_are_not_kept_track_of(self):
        segment = Segment.create()
        segment.reserve(1)
        for _ in range(2000):
            segment.map("read")
        assert len(segments._live) <= len(live_mappings()) + 64


class TestSharedView:
    def test_a_shared_view_says_where_an_array_lies(self):
        view = shared(np.arange(10.0)[::-1])
        assert isinstance(view, SharedView)
        assert (view.shape, view.strides, view.dtype) == ((10,), (-8,), np.dtype("f8"))
        mapping = view.segment.map("read")
        assert np.frombuffer(mapping, "f8", 1, view.offset)[0] == 9
        assert np.array_equal(view.map_over(mapping), np.arange(10.0)[::-1])

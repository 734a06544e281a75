"""Arrays in files: mapped where possible, else read; files of other formats are refused."""

import os
from pathlib import Path

import numpy as np
import pytest

from taskcarrier import last_report, load, map_array, map_items, reduce_array
from taskcarrier.memory.npy import NpyWriter, find_order, open_own_file
from taskcarrier.system.descriptors import open_owned
from tests.descriptors import n_descriptors
from tests.strategies import EVERYWHERE, LOKY, assert_same, keep_pools_warm, same_bits

VIEWS = {
    "whole": lambda m: m,
    "transposed": lambda m: m.T,
    "reversed": lambda m: m[::-1],
    "reversed everywhere": lambda m: m[::-1, ::-1],
    "strided": lambda m: m[1::3, ::2],
    "offset": lambda m: m[5:, 3:],
    "column": lambda m: m[:, 2],
    "as an array": np.asarray,
    "through a buffer": lambda m: np.frombuffer(m, m.dtype, 50, offset=16),
}


pools = keep_pools_warm(2)


def values(shape=(40, 12), dtype="f8"):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def saved(path, X, version=None):
    with path.open("wb") as file:
        np.lib.format.write_array(file, X, version=version)
    return path


def assert_mapped(view, expected, *, copied=False):
    """Assert that workers see the right values, and whether bytes were copied to them."""
    for axis in range(view.ndim):
        for balance in ("static", "dynamic"):
            result = map_array(np.copy, view, axis=axis, chunksize=3, balance=balance, **LOKY)
            assert (last_report().bytes_copied > 0) is copied
            assert same_bits(result, np.ascontiguousarray(expected))


@pytest.mark.fault(29)
class TestMemmaps:
    @pytest.mark.parametrize("mode", ["r", "r+", "w+"])
    @pytest.mark.parametrize("view", VIEWS)
    def test_shared_memmaps_are_mapped_by_workers(self, view, mode, tmp_path):
        X = values()
        path = tmp_path / "X.dat"
        path.write_bytes(bytes(4096) + X.tobytes())
        if mode == "w+":
            mapped = np.memmap(path, X.dtype, mode, shape=X.shape)
            mapped[...] = X
        else:
            mapped = np.memmap(path, X.dtype, mode, offset=4096, shape=X.shape)
        assert_mapped(VIEWS[view](mapped), VIEWS[view](X))

    @pytest.mark.parametrize("view", VIEWS)
    def test_private_memmaps_are_read_with_their_changes(self, view, tmp_path):
        X = values()
        path = tmp_path / "X.dat"
        X.tofile(path)
        mapped = np.memmap(path, X.dtype, "c", shape=X.shape)
        for array in (mapped, X):
            array[::2, ::3] = -1
        assert_mapped(VIEWS[view](mapped), VIEWS[view](X), copied=True)

    @pytest.mark.parametrize("offset", [0, 1, 100, 4096, 5000])
    def test_memmaps_of_any_offset_are_mapped(self, offset, tmp_path):
        X = values((100,), "i4")
        path = tmp_path / "X.dat"
        path.write_bytes(bytes(offset) + X.tobytes() + b"more")
        mapped = np.memmap(path, X.dtype, "r", offset=offset, shape=X.shape)
        assert_mapped(mapped, X)
        assert_mapped(mapped[10:90:3], X[10:90:3])

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_memmaps_of_deleted_files_are_read(self, mode, tmp_path):
        X = values()
        path = tmp_path / "X.dat"
        X.tofile(path)
        mapped = np.memmap(path, X.dtype, mode, shape=X.shape)
        path.unlink()
        assert_mapped(mapped, X, copied=mode == "c")

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_memmaps_of_replaced_files_show_what_was_mapped(self, mode, tmp_path):
        X = values()
        path, other = tmp_path / "X.dat", tmp_path / "Y.dat"
        X.tofile(path)
        (-X).tofile(other)
        mapped = np.memmap(path, X.dtype, mode, shape=X.shape)
        other.rename(path)
        assert_mapped(mapped, X, copied=mode == "c")

    def test_memmaps_of_renamed_files_are_still_mapped(self, tmp_path):
        X = values()
        path = tmp_path / "X.dat"
        X.tofile(path)
        mapped = np.memmap(path, X.dtype, "r", shape=X.shape)
        path.rename(tmp_path / "Y.dat")
        path.write_bytes(bytes(X.nbytes))
        assert_mapped(mapped, X)

    def test_changes_of_a_memmap_between_calls_are_seen(self, run, tmp_path):
        mapped = np.memmap(tmp_path / "X.dat", "f8", "w+", shape=(50,))
        for value in range(3):
            mapped[value:] = value
            expected = np.array(mapped)
            assert_same(map_array(np.copy, mapped, **run), expected)

    def test_several_memmaps_of_one_and_of_several_files_are_mapped(self, run, tmp_path):
        X = values((60,))
        for name in ("X.dat", "Y.dat"):
            (X if name == "X.dat" else -X).tofile(tmp_path / name)
        one = np.memmap(tmp_path / "X.dat", "f8", "r", shape=(30,))
        two = np.memmap(tmp_path / "X.dat", "f8", "r", offset=240, shape=(30,))
        three = np.memmap(tmp_path / "Y.dat", "f8", "r", shape=(60,))[::2]
        result = map_array(lambda a, b, c: a * 1e4 + b * 100 + c, one, two, three, **run)
        assert_same(result, X[:30] * 1e4 + X[30:] * 100 - X[::2])

    @pytest.mark.parametrize(
        "name",
        ["two words", "  lead and trail  ", "line\nbreak", "\n", "cr\rr", "ü λ 長 \U0001f600",
         "back\\012slash", "tab\there", "x (deleted)", "\udcff raw", "0-ff r--s 0 0:0 0 /"],
    )  # fmt: skip
    def test_memmaps_of_files_of_any_name_are_read(self, name, tmp_path):
        X = values()
        folder = tmp_path / name.replace("/", "")
        folder.mkdir()
        path = folder / "X.npy"
        np.save(path, X)
        assert_mapped(load(path), X)
        for mapped in (np.load(path, mmap_mode="r"), np.load(path, mmap_mode="c")):
            for balance in ("static", "dynamic"):
                result = map_array(np.copy, mapped, balance=balance, **LOKY)
                assert_same(result, X)

    def test_a_memmap_beside_one_of_an_odd_name_is_mapped(self, tmp_path):
        np.save(tmp_path / "a\rb.npy", values())
        np.save(tmp_path / "X.npy", values())
        odd = np.load(tmp_path / "a\rb.npy", mmap_mode="r")
        assert_mapped(np.load(tmp_path / "X.npy", mmap_mode="r"), values())
        assert odd.shape == (40, 12)

    @pytest.mark.parametrize("name", ["two words", "line\nbreak", "ü λ 長", " lead"])
    def test_memmaps_of_usual_names_are_not_copied(self, name, tmp_path):
        np.save(tmp_path / f"{name}.npy", values())
        assert_mapped(np.load(tmp_path / f"{name}.npy", mmap_mode="r"), values())


LAYOUTS = {
    "C": values,
    "F": lambda: np.asfortranarray(values()),
    "one axis": lambda: values((50,)),
    "three axes": lambda: values((7, 3, 5)),
    "big endian": lambda: values(dtype=">i4"),
    "bools": lambda: values(dtype="?"),
    "strings": lambda: values(dtype="U4"),
    "dates": lambda: values(dtype="M8[s]"),
    "structures": lambda: values((30,), "i4").astype([("a", "i4"), ("b", ">f8"), ("c", "U3")]),
    "nested": lambda: np.ones(20, [("a", [("x", "f4"), ("y", "i2", (2, 3))])]),
    "longdouble": lambda: values(dtype="g"),
    "void": lambda: np.frombuffer(bytes(range(60)), "V3"),
}
EMPTY = {
    "no items": lambda: np.empty((0, 3)),
    "no bytes": lambda: np.empty((4, 0), "i2"),
    "F": lambda: np.empty((0, 3, 2), order="F"),
}


@pytest.mark.fault(29)
class TestLoad:
    @pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_load_gives_the_file_in_place(self, layout, version, tmp_path):
        X = LAYOUTS[layout]()
        path = saved(tmp_path / "X.npy", X, version)
        for mode in ("r", "r+"):
            loaded = load(path, mode)
            assert type(loaded) is np.ndarray
            assert loaded.dtype == X.dtype
            assert loaded.strides == X.strides
            assert same_bits(loaded, X)
            assert loaded.flags.writeable is (mode == "r+")
        assert_mapped(load(path), X)
        for backend, balance in EVERYWHERE:
            result = map_array(np.copy, path, backend=backend, balance=balance, n_jobs=2)
            assert_same(result, X)

    @pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
    @pytest.mark.parametrize("layout", EMPTY)
    def test_load_takes_files_without_bytes(self, layout, version, run, tmp_path):
        X = EMPTY[layout]()
        path = saved(tmp_path / "X.npy", X, version)
        for mode in ("r", "r+"):
            loaded = load(path, mode)
            assert (loaded.shape, loaded.dtype) == (X.shape, X.dtype)
            assert loaded.flags.writeable is (mode == "r+")
        assert_same(map_array(np.copy, str(path), **run), X)

    def test_load_takes_field_names_beyond_latin(self, run, tmp_path):
        X = np.ones((20, 2), [("λ", "f8"), ("長さ", "i4")])
        for array in (X, np.asfortranarray(X)):
            path = saved(tmp_path / "X.npy", array, (3, 0))
            assert load(path).strides == array.strides
            assert_same(map_array(np.copy, path, **run), X)

    def test_writes_to_a_loaded_array_go_to_the_file(self, tmp_path):
        path = saved(tmp_path / "X.npy", values())
        loaded = load(path, "r+")
        loaded[3] = -7
        assert (np.load(path)[3] == -7).all()
        with pytest.raises(ValueError, match="read-only"):
            load(path)[0] = 1
        with pytest.raises(ValueError, match=r"WRITEABLE|writeable"):
            load(path).flags.writeable = True

    def test_a_loaded_array_shows_what_others_write(self, tmp_path):
        path = saved(tmp_path / "X.npy", values())
        loaded = load(path)
        np.load(path, mmap_mode="r+")[0] = -7
        assert (loaded[0] == -7).all()
        result = map_array(np.copy, loaded, **LOKY)
        assert (result[0] == -7).all()

    def test_a_loaded_file_is_closed_with_the_last_view(self, tmp_path):
        path = saved(tmp_path / "X.npy", values())

        def held():
            maps = Path("/proc/self/maps").read_text(encoding="utf-8")
            return maps.count(str(path)), n_descriptors()

        before = held()
        loaded = load(path)
        view = loaded[3:, ::2]
        del loaded
        assert held()[0] == 1
        assert np.array_equal(view, values()[3:, ::2])
        del view
        assert held() == before

    def test_every_verb_takes_paths(self, run, tmp_path):
        X = values()
        path = saved(tmp_path / "X.npy", X)
        assert_same(map_items(np.copy, path, **run), X)
        assert reduce_array(np.sum, path, combine=lambda a, b: a + b, **run) == X.sum()
        assert_same(map_array(np.add, path, str(path), **run), X + X)


class TestRefusals:
    def test_truncated_files_are_refused(self, tmp_path):
        for version in ((1, 0), (2, 0)):
            path = saved(tmp_path / "X.npy", values(), version)
            whole = path.read_bytes()
            path.write_bytes(whole[:-1])
            with pytest.raises(ValueError, match="is cut off"):
                load(path)
            for n_bytes in (0, 3, 6, 8, 9, 20):
                path.write_bytes(whole[:n_bytes])
                words = "header that cannot be read: EOF" if n_bytes >= 8 else "no .npy file: EOF"
                for action in (load, lambda path: map_array(np.copy, path)):
                    with pytest.raises(ValueError, match=words) as caught:
                        action(path)
                    assert str(path) in str(caught.value)

    def test_truncated_files_of_the_third_version_are_refused(self, tmp_path):
        path = saved(tmp_path / "X.npy", np.ones(9, [("λ", "f8")]), (3, 0))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"cut off|file size|X\.npy"):
            load(path)

    @pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
    def test_files_of_python_objects_are_refused(self, version, tmp_path):
        path = saved(tmp_path / "X.npy", np.array([{}, 1], object), version)
        with pytest.raises(ValueError, match=r"[Oo]bject"):
            load(path)
        with pytest.raises(ValueError, match=r"[Oo]bject"):
            map_array(np.copy, path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"text",
            b"PK\x03\x04zip",
            b"\x93NUMPY",
            b"\x93NUMPY\x09\x00" + bytes(99),
            b"\x93NUMPY\x01\x00\x09\x00{'descr':",
        ],
    )
    def test_files_that_are_no_npy_files_are_refused(self, content, tmp_path):
        path = tmp_path / "X.npy"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no \.npy file|has a header that") as caught:
            load(path)
        assert str(path) in str(caught.value)

    def test_missing_files_are_refused(self, tmp_path):
        for action in (load, lambda path: map_array(np.copy, path)):
            with pytest.raises(FileNotFoundError, match=r"missing\.npy"):
                action(tmp_path / "missing.npy")
            (tmp_path / "folder.npy").mkdir(exist_ok=True)
            with pytest.raises(IsADirectoryError):
                action(tmp_path / "folder.npy")

    @pytest.mark.parametrize("name", ["X.npz", "X", "X.npy.part", "X.NPY"])
    def test_files_of_other_names_are_refused(self, name, tmp_path):
        with pytest.raises(ValueError, match=r"ends in \.npy"):
            load(tmp_path / name)
        with pytest.raises(TypeError, match=r"must end in \.npy"):
            map_array(np.copy, tmp_path / name)

    @pytest.mark.parametrize("mode", ["w+", "c", "rb", None, "w"])
    def test_unknown_modes_are_refused(self, mode, tmp_path):
        with pytest.raises(ValueError, match="mode must be 'r' or 'r"):
            load(saved(tmp_path / "X.npy", values()), mode)

    def test_refusals_leave_no_descriptor(self, tmp_path):
        path = saved(tmp_path / "X.npy", values())
        path.write_bytes(path.read_bytes()[:-1])
        before = n_descriptors()
        for _ in range(3):
            with pytest.raises(ValueError, match="cut off"):
                load(path)
        assert n_descriptors() == before


class TestOwnFiles:
    """Files that a run makes: one run at a time has each, and a stranger's is left alone."""

    @staticmethod
    def create(path):
        return open_owned(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def test_a_file_is_new_once(self, tmp_path):
        path = str(tmp_path / "own")
        first, is_new = open_own_file(path, self.create)
        assert is_new
        first.close()
        again, is_new = open_own_file(path, self.create)
        assert not is_new
        with pytest.raises(BlockingIOError, match="another run is at work on this output"):
            open_own_file(path, self.create)
        again.close()

    def test_a_file_that_another_run_makes_at_that_moment_is_its_own(self, tmp_path):
        path = str(tmp_path / "own")

        def come_late(name):
            self.create(name).close()
            return self.create(name)

        with pytest.raises(BlockingIOError, match="another run is at work on this output"):
            open_own_file(path, come_late)

    def test_links_and_folders_are_refused(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "target")
        for path in (tmp_path / "link", tmp_path):
            with pytest.raises(FileExistsError, match="no ordinary file of this user's"):
                open_own_file(str(path), self.create)
        assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_written_through_a_view_of_a_new_file_is_the_finished_array(order, tmp_path):
    writer = NpyWriter(str(tmp_path / "Y.npy"))
    assert writer.read_header() is None
    array = writer.make_view(np.dtype(">i2"), (3, 4), order).open("write")
    assert writer.read_header() == (np.dtype(">i2"), (3, 4))
    assert find_order(array) == order
    array[...] = np.arange(12).reshape(3, 4)
    finished = writer.finish(array)
    writer.discard()  # removes nothing any more
    assert_same(np.load(tmp_path / "Y.npy"), np.arange(12, dtype=">i2").reshape(3, 4))
    assert_same(finished, np.arange(12, dtype=">i2").reshape(3, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["Y.npy"]

"""Runs that continue where an earlier one has ended; the ledger file beside an output."""

import json
import os
import shutil
import stat
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path

import numba
import numpy as np
import pytest

from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    last_report,
    load,
    map_array,
    map_items,
    share,
)
from taskcarrier.arrays.resume import computation
from taskcarrier.arrays.resume.computation import Computation
from taskcarrier.arrays.resume.ledger_file import LedgerFile
from tests.faults.functions import note, noted
from tests.strategies import assert_same, each_run, keep_pools_warm, run_script

SERIAL = {"backend": "sequential", "n_jobs": 1}
X = np.arange(80.0).reshape(40, 2)


pools = keep_pools_warm(2)


class Stored:
    """An array-like that is read by range."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.ndim = values.ndim
        self.read = []

    def __getitem__(self, key):
        first = key if isinstance(key, slice) else key[0]
        self.read.append((first.start, first.stop))
        return self.values[key]


ZARR = """
import os, sys, warnings
import zarr
from taskcarrier import map_array

path, out, value, stop = sys.argv[1:]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of zarr
    stored = zarr.open(path, mode="w", shape=(4, 1), chunks=(2, 1), dtype="f8")
    stored[:] = 0
    stored[3] = float(value)

def func(chunk):
    if os.path.exists(stop):
        raise LookupError("stop")
    return chunk + 1

try:
    result = map_array(
        func, stored, out=out, resume=True, chunksize=1, n_jobs=1, backend="sequential"
    )
    print(result.ravel().tolist())
except (LookupError, ValueError) as error:
    print(error)
"""


class Halfway:
    """A run that is stopped after items 0 to 19 of 40, and attempts to continue it."""

    def __init__(self, folder):
        self.folder = folder
        self.out, self.ledger = folder / "Y.npy", folder / "Y.npy.ledger"
        self.log = log = folder / "log"
        self.stop = stop = folder / "stop"

        def check(first):
            note(log, int(first))
            if first >= 40 and stop.exists():
                raise LookupError("stop")

        self.check = check

    def tried(self, func, *arrays, verb=map_array, out=None, **options):
        """Continue the run."""
        options = {"chunksize": 4, **SERIAL, **options}
        return verb(func, *arrays, out=out or self.out, resume=True, **options)

    def stopped(self, func, *arrays, **options):
        """Make the first attempt, which is stopped by an error."""
        self.stop.touch()
        with pytest.raises(LookupError, match="stop"):
            self.tried(func, *arrays, **options)
        self.stop.unlink()
        self.log.unlink()

    def ran(self):
        """Return the first items of the ranges that were run since."""
        return [int(line) // 2 for line in noted(self.log)]

    def left(self):
        return sorted(path.name for path in self.folder.glob("*.npy*"))


@pytest.fixture
def halfway(tmp_path):
    return Halfway(tmp_path)


def doubling(halfway, factor=2):
    def func(chunk, *more, **options):
        halfway(chunk[0, 0])
        return chunk * factor

    return func


LATER = [20, 24, 28, 32, 36]


class TestContinuing:
    @each_run
    def test_a_run_continues_on_any_backend_with_any_number_of_workers(
        self, backend, balance, halfway
    ):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        result = halfway.tried(func, X, backend=backend, balance=balance, n_jobs=2)
        assert_same(np.array(result), X * 2)
        assert sorted(halfway.ran()) == LATER
        assert halfway.left() == ["Y.npy"]
        assert "5 of 10 ranges were done by an earlier run" in last_report().notes
        assert_same(np.load(halfway.out), X * 2)

    @each_run
    def test_a_run_on_any_backend_can_be_continued(self, backend, balance, halfway):
        func = doubling(halfway.check)
        halfway.stop.touch()
        with pytest.raises(LookupError, match="stop"):
            halfway.tried(func, X, backend=backend, balance=balance, n_jobs=2)
        halfway.stop.unlink()
        before = halfway.ran()
        assert halfway.left() == ["Y.npy.ledger", "Y.npy.part"]
        assert_same(np.array(halfway.tried(func, X)), X * 2)
        again = halfway.ran()[len(before) :]
        failed = [start for start in before if start >= 20]
        # Ranges that failed, and ranges that were not reached.
        assert sorted(again) == sorted({*range(0, 40, 4)} - {*before} | {*failed})

    def test_a_run_may_be_continued_several_times(self, halfway):
        def func(chunk):
            halfway.check(0)
            if len(noted(halfway.log)) % 3 == 0:
                raise LookupError("stop")
            return chunk * 2

        for _ in range(4):
            with pytest.raises(LookupError):
                halfway.tried(func, X)
        assert_same(np.array(halfway.tried(func, X)), X * 2)
        assert len(noted(halfway.log)) == 10 + 4

    def test_an_undisturbed_run_leaves_only_the_output(self, halfway):
        assert_same(np.array(halfway.tried(doubling(halfway.check), X)), X * 2)
        assert halfway.left() == ["Y.npy"]
        assert last_report().notes == ()

    def test_a_finished_run_starts_over(self, halfway):
        for _ in range(2):
            halfway.tried(doubling(halfway.check), X)
        assert halfway.ran() == [*range(0, 40, 4)] * 2

    def test_a_run_that_was_complete_but_for_its_name_runs_nothing_again(
        self, halfway, monkeypatch
    ):
        func = doubling(halfway.check)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(OSError, match="full"):
                halfway.tried(func, X)
        halfway.log.unlink()
        assert_same(np.array(halfway.tried(func, X)), X * 2)
        assert halfway.ran() == []
        assert halfway.left() == ["Y.npy"]

    @pytest.mark.parametrize("name", ["Z.npy", "Y.npy"])
    def test_an_older_file_of_that_name_stays_until_the_new_one_is_complete(self, name, halfway):
        older = halfway.folder / name
        np.save(older, np.arange(3))
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        assert_same(np.load(older), np.arange(3))
        halfway.tried(func, X)
        assert_same(np.load(halfway.out), X * 2)

    def test_mappers_can_continue_a_run(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        with StaticParallelMapper(2, backend="loky", chunksize=4) as mapper:
            result = mapper.map_array(func, X, out=halfway.out, resume=True, chunksize=4)
            assert_same(np.array(result), X * 2)
        assert sorted(halfway.ran()) == LATER
        with DynamicParallelMapper(2, backend="threading") as mapper:
            mapper.map_array(func, X, out=halfway.out, resume=True, chunksize=4)

    @pytest.mark.thorough
    def test_workers_that_die_do_not_prevent_continuing(self, halfway):
        def func(chunk):
            halfway.check(chunk[0, 0])
            if chunk[0, 0] == 56 and len(noted(halfway.log)) < 4:
                os._exit(3)
            return chunk * 2

        halfway.stopped(func, X)
        assert_same(np.array(halfway.tried(func, X, backend="loky", n_jobs=2)), X * 2)


class TestResults:
    @pytest.mark.parametrize(
        "dtype",
        [
            ">f8",
            "f2",
            "?",
            "c8",
            "S3",
            ">U2",
            "M8[s]",
            ">m8[ns]",
            [("a", "i1"), ("ä", ">f8")],
            np.dtype([("a", "i1"), ("b", "f8")], align=True),
            [("a", "f4", (2,)), ("b", [("x", "i2")])],
        ],
    )
    def test_results_of_any_dtype_are_continued(self, dtype, halfway):
        values = np.frombuffer(bytes(range(1, 128)) * 10, np.uint8)[: 40 * np.dtype(dtype).itemsize]
        values = (values % 2 if dtype == "?" else values % 100).astype(np.uint8)
        if dtype == ">U2":
            values = values.copy()
            values.reshape(-1, 4)[:, :3] = 0
        values = values.view(dtype)
        plain = np.array(values)

        def func(index):
            halfway.check(index[0] * 2)
            return plain[index]

        halfway.stopped(func, np.arange(40))
        result = np.array(halfway.tried(func, np.arange(40)))
        assert result.dtype == plain.dtype
        assert (result == plain).all()
        assert halfway.ran() == LATER

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_results_in_any_memory_order_are_continued(self, order, halfway):
        Z = np.asarray(X, order=order)
        func = doubling(halfway.check)
        halfway.stopped(func, Z)
        result = halfway.tried(func, Z, backend="loky", n_jobs=2)
        assert_same(np.array(result), X * 2)
        assert np.load(halfway.out).flags.f_contiguous == (order == "F")

    @pytest.mark.parametrize(("first", "second"), ["CF", "FC"])
    def test_the_same_values_in_another_memory_order_give_no_wrong_results(
        self, first, second, halfway
    ):
        func = doubling(halfway.check)
        halfway.stopped(func, np.asarray(X, order=first))
        try:
            result = halfway.tried(func, np.asarray(X, order=second))
        except ValueError as error:
            assert "what differs: order." in str(error)  # noqa: PT017  # one of two right ends
        else:
            assert_same(np.array(result), X * 2)

    def test_results_along_other_axes_are_continued(self, halfway):
        def func(chunk):
            halfway.check(chunk[0, 0] * 2)
            return chunk.sum(axis=0)

        Z = np.arange(120).reshape(3, 40)
        halfway.stopped(func, Z, axis=1, out_axis=0)
        assert_same(np.array(halfway.tried(func, Z, axis=-1, out_axis=0)), Z.sum(axis=0))
        assert halfway.ran() == LATER

    @pytest.mark.parametrize("axes", [(0, 1), (1, 0), (-1, 0)])
    def test_several_results_of_different_axes_are_continued(self, axes, halfway):
        def func(chunk):
            halfway.check(chunk[0, 0])
            doubled, text = chunk * 2, (chunk % 7).astype("U1")
            return np.moveaxis(doubled, 0, axes[0]), np.moveaxis(text, 0, axes[1])

        out = (halfway.out, halfway.folder / "Z.npy")
        halfway.stopped(func, X, out=out, out_axis=axes)
        assert halfway.left() == ["Y.npy.ledger", "Y.npy.part", "Z.npy.part"]
        results = halfway.tried(func, X, out=out, out_axis=axes, backend="threading", n_jobs=2)
        expected = (X * 2, (X % 7).astype("U1"))
        for result, one, axis in zip(results, expected, axes, strict=True):
            assert_same(np.array(result), np.moveaxis(one, 0, axis).copy())
        assert sorted(halfway.ran()) == LATER
        assert halfway.left() == ["Y.npy", "Z.npy"]

    def test_a_run_starts_over_if_one_of_several_files_is_gone(self, halfway):
        def func(chunk):
            halfway.check(chunk[0, 0])
            return chunk * 2, chunk * 3

        out = (halfway.out, halfway.folder / "Z.npy")
        halfway.stopped(func, X, out=out)
        (halfway.folder / "Z.npy.part").unlink()
        results = halfway.tried(func, X, out=out)
        assert_same(tuple(map(np.array, results)), (X * 2, X * 3))
        assert halfway.ran() == [*range(0, 40, 4)]

    @pytest.mark.parametrize("returns", ["an array", "a tuple"])
    def test_a_single_result_may_stand_in_a_tuple_or_not(self, returns, halfway):
        def func(chunk):
            halfway.check(chunk[0, 0])
            return chunk * 2 if returns == "an array" else (chunk * 2,)

        for out in (halfway.out, (halfway.folder / "Z.npy",)):
            halfway.stopped(func, X, out=out)
            result = halfway.tried(func, X, out=out)
            assert_same(np.array(result).reshape(X.shape), X * 2)
            assert halfway.ran() == LATER
            halfway.log.unlink()

    def test_results_cast_to_a_dtype_are_continued(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X, dtype="f4")
        assert_same(np.array(halfway.tried(func, X, dtype="f4")), (X * 2).astype("f4"))
        assert halfway.ran() == LATER

    @pytest.mark.parametrize("boundary", ["wrap", "nearest"])
    def test_chunks_with_neighbours_are_continued(self, boundary, halfway):
        def func(chunk):
            halfway.check(chunk[3, 0])
            return (np.roll(chunk, 1, 0) + chunk + np.roll(chunk, -1, 0)) * 1.0

        options = {"depth": 3, "boundary": boundary}
        expected = map_array(func, X, chunksize=4, **options, **SERIAL)
        halfway.log.unlink()
        halfway.stopped(func, X, **options)
        assert_same(np.array(halfway.tried(func, X, **options)), expected)


MAY_HAVE_CHANGED = r"resume compared samples of array 0 \(.*\), which may have changed\. The sam"


class TestInputs:
    def test_an_untouched_file_counts_as_the_same_input(self, halfway):
        path = halfway.folder / "in.npy"
        np.save(path, X)
        func = doubling(halfway.check)
        halfway.stopped(func, path)
        assert_same(np.array(halfway.tried(func, load(path))), X * 2)
        assert halfway.ran() == LATER
        assert len(last_report().notes) == 1

    @pytest.mark.fault(27)
    @pytest.mark.parametrize("how", ["other time", "other name", "copied with its times"])
    def test_a_file_that_may_have_changed_is_named(self, how, halfway):
        path, other = halfway.folder / "in.npy", halfway.folder / "other.npy"
        np.save(path, X)
        func = doubling(halfway.check)
        halfway.stopped(func, path)
        if how == "other time":
            os.utime(path, ns=(0, 0))
        elif how == "other name":
            path = path.rename(other)
        else:
            shutil.copy2(path, other)
            other.replace(path)
        with pytest.warns(UserWarning, match=MAY_HAVE_CHANGED) as caught:
            result = halfway.tried(func, load(path))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert str(path) in str(caught[0].message)
        assert any(str(path) in note for note in last_report().notes)
        assert_same(np.array(result), X * 2)
        assert halfway.ran() == LATER

    @pytest.mark.fault(27)
    @pytest.mark.parametrize("keeps_inode", [True, False])
    @pytest.mark.parametrize("item", [0, 39])
    def test_a_file_of_the_same_size_and_time_with_other_values_is_refused(
        self, item, keeps_inode, halfway
    ):
        path, other = halfway.folder / "in.npy", halfway.folder / "other.npy"
        np.save(path, X)
        func = doubling(halfway.check)
        halfway.stopped(func, path)
        before = path.stat()
        changed = X.copy()
        changed[item, 1] = -5
        np.save(other, changed)
        if keeps_inode:
            path.write_bytes(other.read_bytes())
        else:
            other.replace(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (
            before.st_size,
            before.st_mtime_ns,
        )
        with pytest.raises(ValueError, match=r"what differs: array 0\."):
            halfway.tried(func, path)

    @pytest.mark.fault(27)
    def test_a_change_in_any_of_64_pages_is_noticed(self, halfway):
        path = halfway.folder / "in.npy"
        raw = np.repeat(np.arange(40.0) * 2, 816).reshape(40, 816)
        np.save(path, raw)
        assert 63 * 4096 + 2000 < path.stat().st_size < 64 * 4096
        func = doubling(halfway.check)
        for page in range(64):
            halfway.stop.touch()
            np.save(path, raw)
            with pytest.raises(LookupError, match="stop"):
                map_array(func, path, out=halfway.out, resume=True, chunksize=20, **SERIAL)
            stored = np.memmap(path, "u1", "r+")
            stored[page * 4096 + 2000] ^= 1
            stored.flush()
            os.utime(path, ns=(0, 0))
            with pytest.raises(ValueError, match=r"what differs: array 0\."):
                map_array(func, path, out=halfway.out, resume=True, chunksize=20, **SERIAL)
            halfway.ledger.unlink()

    @pytest.mark.fault(27)
    @pytest.mark.parametrize("folder", [None, "/dev/shm"])
    def test_writes_to_a_file_through_memory_are_noticed(self, folder, halfway):
        """The kernel does not note each such write at once, and in memory none at all."""
        with tempfile.TemporaryDirectory(dir=folder) as own:
            path = Path(own) / "in.npy"
            written = np.lib.format.open_memmap(path, "w+", "f8", (40, 8192))
            written[:] = 2 * np.arange(40.0)[:, None]
            halfway.stop.touch()
            func = doubling(halfway.check)
            with pytest.raises(LookupError, match="stop"):
                halfway.tried(func, path)
            halfway.stop.unlink()
            written[3, 500:600] = -5  # in no page that is sampled
            if folder is None:
                with pytest.warns(UserWarning, match=MAY_HAVE_CHANGED):
                    halfway.tried(func, path)
            else:
                with pytest.raises(ValueError, match=r"what differs: array 0\."):
                    halfway.tried(func, path)

    def test_another_part_of_a_file_is_another_array(self, halfway):
        path = halfway.folder / "in.npy"
        np.save(path, np.concatenate([X, X]))
        func = doubling(halfway.check)
        halfway.stopped(func, load(path)[:40])
        with pytest.raises(ValueError, match=r"what differs: array 0\."):
            halfway.tried(func, load(path)[40:])
        with pytest.raises(ValueError, match=r"what differs: array 0\."):
            halfway.tried(func, load(path)[:40][::-1])

    @pytest.mark.parametrize("shape", [(40,), (40, 2), (40, 3, 5)])
    @pytest.mark.parametrize("stored", [True, False])
    def test_inputs_of_any_shape_are_continued(self, stored, shape, halfway):
        raw = np.arange(float(np.prod(shape))).reshape(shape)
        array = Stored(raw)
        if stored:
            array = halfway.folder / "in.npy"
            np.save(array, raw)
        calls = halfway.folder / "calls"

        def func(chunk):
            note(calls, "called")
            if len(noted(calls)) == 6:
                raise LookupError("stop")
            return chunk * 2

        with pytest.raises(LookupError, match="stop"):
            halfway.tried(func, array)
        with nullcontext() if stored else pytest.warns(UserWarning, match=MAY_HAVE_CHANGED):
            result = halfway.tried(func, array)
        assert_same(np.array(result), raw * 2)
        assert len(noted(calls)) == 6 + 5

    @pytest.mark.fault(27)
    def test_array_likes_are_compared_in_samples(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, Stored(X))
        for item in (0, 17, 39):
            changed = X.copy()
            changed[item, 0] = -5
            with pytest.raises(ValueError, match=r"what differs: array 0\."):
                halfway.tried(func, Stored(changed))
        with pytest.warns(UserWarning, match=MAY_HAVE_CHANGED) as caught:
            result = halfway.tried(func, Stored(X.copy()))
        assert "array 0 (tests.arrays.resume.test_ledger_file.Stored)" in str(caught[0].message)
        assert_same(np.array(result), X * 2)
        assert halfway.ran() == LATER

    def test_few_samples_are_taken_of_large_items(self, halfway, monkeypatch):
        monkeypatch.setattr(computation, "_SAMPLED_NBYTES", 3 * 16)
        array = Stored(X)
        func = doubling(halfway.check)
        halfway.stopped(func, array)
        assert array.read[1:4] == [(0, 1), (19, 20), (39, 40)]
        with pytest.warns(UserWarning, match=MAY_HAVE_CHANGED):
            halfway.tried(func, array)

    @pytest.mark.fault(27)
    def test_a_zarr_array_that_was_rewritten_is_refused(self, tmp_path):
        pytest.importorskip("zarr", reason="zarr arrays are what this is about")
        path, stop = tmp_path / "X.zarr", tmp_path / "stop"

        def said(value):  # in a program of its own: zarr leaves threads behind
            words = map(str, (path, tmp_path / "Y.npy", value, stop))
            return run_script(tmp_path, ZARR, *words)

        stop.touch()
        assert said(0) == "stop\n"
        stop.unlink()
        assert "what differs: array 0." in said(1)
        assert said(0) == "[1.0, 1.0, 1.0, 1.0]\n"

    @pytest.mark.fault(27)
    def test_values_that_cannot_be_compared_are_named_at_the_start_and_in_the_report(self, halfway):
        lock = threading.Lock()

        def func(chunk):
            with lock:
                halfway.check(chunk[0, 0])
            return chunk * 2

        halfway.stop.touch()
        named = r"resume compares the type alone of func\.lock \(_thread\.lock\)"
        with (
            pytest.raises(LookupError, match="stop"),
            pytest.warns(UserWarning, match=named) as caught,
        ):
            halfway.tried(func, X)
        assert caught[0].filename == __file__
        halfway.stop.unlink()
        with pytest.warns(UserWarning, match=named):
            halfway.tried(func, X)
        assert any("func.lock" in note for note in last_report().notes)

    @pytest.mark.fault(27)
    def test_a_warning_that_is_an_error_leaves_nothing_behind(self, halfway):
        lock = threading.Lock()
        with pytest.raises(UserWarning, match=r"func\.lock"):
            halfway.tried(lambda chunk: (lock, chunk)[1], X)
        assert halfway.left() == []

    def test_arrays_in_memory_are_compared_by_content(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        wide = np.repeat(X, 2, axis=1)[:, ::2]
        assert_same(np.array(halfway.tried(func, wide)), X * 2)
        assert halfway.ran() == LATER
        halfway.log.unlink()
        halfway.stopped(func, share(X))
        changed = X.copy()
        changed[39, 1] = -1
        with pytest.raises(ValueError, match=r"what differs: array 0\."):
            halfway.tried(func, changed)
        assert_same(np.array(halfway.tried(func, X.copy())), X * 2)


class TestItems:
    def test_items_are_continued_by_ranges(self, halfway):
        def func(row):
            halfway.check(row[0])
            return row.sum(), row * 2

        out = (halfway.out, halfway.folder / "Z.npy")
        halfway.stopped(func, X, verb=map_items, out=out)
        options = {"balance": "dynamic", "n_jobs": 2, "backend": "loky"}
        results = halfway.tried(func, X, verb=map_items, out=out, **options)
        assert_same(tuple(map(np.array, results)), (X.sum(axis=1), X * 2))
        assert sorted(halfway.ran()) == list(range(20, 40))

    def test_items_must_give_one_dtype(self, halfway):
        with pytest.raises(ValueError, match="dtype"):
            halfway.tried(lambda x: int(x) if x < 20 else x, np.arange(40.0), verb=map_items)

    @pytest.mark.parametrize("backend", ["sequential", "threading"])
    def test_kernels_over_items_are_continued(self, backend, halfway):
        limits = np.array([30.0])  # is read as an argument, so changed between two runs

        @numba.njit
        def root(x, limit):
            if x >= limit[0]:
                raise ValueError("stop")
            return np.sqrt(x), x + 1

        Z = np.arange(40.0)
        out = (halfway.out, halfway.folder / "Z.npy")
        options = {"verb": map_items, "out": out, "backend": backend, "n_jobs": 2}
        with pytest.raises(ValueError, match="stop"):
            halfway.tried(root, Z, args=(limits,), **options)
        with pytest.raises(ValueError, match=r"what differs: args\[0\]\."):
            halfway.tried(root, Z, args=(limits * 2,), **options)
        with pytest.raises(ValueError, match="stop"):
            halfway.tried(root, Z, args=(limits,), **options)
        assert any("done by an earlier run" in text for text in last_report().notes)
        marks = halfway.ledger.read_bytes()[-10:]
        # The share that begins at item 20 is run up to the failing one, however late the other is.
        assert marks[5:7] == b"\1\1"
        assert marks[7] != 1

    def test_continued_kernels_give_the_results_of_an_undisturbed_run(self, halfway, monkeypatch):
        @numba.njit
        def root(x):
            return np.sqrt(x), x + 1

        Z = np.arange(40.0)
        out = (halfway.out, halfway.folder / "Z.npy")
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(OSError, match="full"):
                halfway.tried(root, Z, verb=map_items, out=out)
        content = bytearray(halfway.ledger.read_bytes())
        content[-5:] = bytes(5)  # as if it had been killed halfway
        halfway.ledger.write_bytes(content)
        results = halfway.tried(root, Z, verb=map_items, out=out, backend="threading", n_jobs=2)
        assert_same(tuple(map(np.array, results)), (np.sqrt(Z), Z + 1))
        assert sum(worker.items for worker in last_report().workers) == 20


class TestErrors:
    def test_filled_items_are_tried_again(self, halfway):
        broken = halfway.folder / "broken"

        def func(chunk):
            halfway.check(chunk[0, 0])
            if 10 in chunk and broken.exists():
                raise ArithmeticError("broken")
            if 60 in chunk and broken.exists():
                raise KeyboardInterrupt
            return chunk * 2

        broken.touch()
        with pytest.raises(KeyboardInterrupt):
            halfway.tried(func, X, on_error="fill")
        broken.unlink()
        halfway.log.unlink()
        assert_same(np.array(halfway.tried(func, X, on_error="fill")), X * 2)
        assert halfway.ran() == [4, 28, 32, 36]

    def test_items_that_fail_again_are_filled(self, halfway):
        def func(chunk):
            halfway.check(40 if chunk[0, 0] == 60 else 0)
            if 10 in chunk:
                raise ArithmeticError("broken")
            return chunk * 2

        expected = X * 2
        expected[5] = -1
        options = {"on_error": "collect", "fill_value": -1}
        result, failures = halfway.tried(func, X, **options)
        assert_same(np.array(result), expected)
        assert [f[:2] for f in failures] == [(5, 6)]
        assert halfway.left() == ["Y.npy"]

    def test_a_run_in_which_every_item_fails_is_not_complete(self, halfway):
        def func(chunk):
            raise ArithmeticError("broken")

        result, failures = halfway.tried(func, X, on_error="collect")
        assert result is None
        assert len(failures) == 40
        assert not halfway.out.exists()

    def test_results_of_another_dtype_than_those_in_the_file_are_refused(self, halfway):
        kind = halfway.folder / "kind"

        def func(chunk):
            halfway.check(chunk[0, 0])
            return chunk.astype("i8" if kind.exists() else "f8")

        halfway.stopped(func, X)
        kind.touch()
        with pytest.raises(ValueError, match=r"int64 \(4, 2\).*float64"):
            halfway.tried(func, X)
        kind.unlink()
        assert_same(np.array(halfway.tried(func, X)), X)


@pytest.mark.fault(27)
class TestRefusals:
    """Everything that must be the same for a run to continue."""

    @staticmethod
    def refused(halfway, what, func, *arrays, **options):
        before = halfway.ledger.read_bytes(), (halfway.folder / "Y.npy.part").read_bytes()
        with pytest.raises(ValueError, match="is of another computation") as caught:
            halfway.tried(func, *arrays, **options)
        differing = str(caught.value).split("what differs: ")[1].split(". To start over")[0]
        assert set(differing.split(", ")) == set(what)
        assert str(halfway.ledger) in str(caught.value)
        assert noted(halfway.log) == []
        after = halfway.ledger.read_bytes(), (halfway.folder / "Y.npy.part").read_bytes()
        assert after == before

    def test_another_function_is_refused(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        parts = ["func", "func.halfway", "func.factor"]
        self.refused(halfway, parts, lambda chunk: chunk * 2, X)
        self.refused(halfway, ["func.factor"], doubling(halfway.check, 3), X)
        assert_same(np.array(halfway.tried(doubling(halfway.check), X)), X * 2)

    def test_other_arguments_are_refused(self, halfway):
        def func(chunk, *_, axis=0, func=0, **__):
            halfway.check(chunk[0, 0])
            return chunk * 2

        first = {"args": (1, "a", np.arange(3)), "kwargs": {"scale": 1.0, "table": {"a": [1]}}}
        halfway.stopped(func, X, **first)
        for what, change in {
            "args[0]": {"args": (2, "a", np.arange(3))},
            "args[1]": {"args": (1, "b", np.arange(3))},
            "args[2]": {"args": (1, "a", np.array([0, 1, 3]))},
            "args[3]": {"args": (1, "a", np.arange(3), 4)},
            "kwargs['scale']": {"kwargs": {"scale": 2.0, "table": {"a": [1]}}},
            "kwargs['table']": {"kwargs": {"scale": 1.0, "table": {"a": [2]}}},
        }.items():
            self.refused(halfway, [what], func, X, **{**first, **change})
        assert_same(np.array(halfway.tried(func, X, **first)), X * 2)

    @pytest.mark.parametrize(
        "name", ["axis", "func", "items", "dtype", "chunksize", "depth", "array 0", "args[0]"]
    )
    def test_arguments_named_like_other_parts_are_compared(self, name, halfway):
        def func(chunk, *_, **__):
            halfway.check(chunk[0, 0])
            return chunk * 2

        halfway.stopped(func, X, args=(1,), kwargs={name: 1})
        with pytest.raises(ValueError, match="is of another computation"):
            halfway.tried(func, X, args=(1,), kwargs={name: 2})
        assert noted(halfway.log) == []
        assert_same(np.array(halfway.tried(func, X, args=(1,), kwargs={name: 1})), X * 2)

    def test_other_arrays_are_refused(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X, X)
        changed = X.copy()
        changed[0, 0] = -0.0
        self.refused(halfway, ["array 0"], func, changed, X)
        self.refused(halfway, ["array 1"], func, X, X[::-1])
        self.refused(halfway, ["array 1"], func, X, X.astype(">f8"))
        self.refused(halfway, ["array 1", "axis"], func, X)
        self.refused(
            halfway,
            ["array 0", "array 1", "items", "the number of ranges"],
            func,
            X[:36],
            X[:36],
        )

    @pytest.mark.parametrize(
        ("what", "options"),
        [
            (["chunksize", "the number of ranges"], {"chunksize": 5}),
            (["dtype"], {"dtype": "f4"}),
            (["depth"], {"depth": 1}),
            (["axis", "items", "out_axis", "the number of ranges"], {"axis": 1}),
            (["out_axis"], {"out_axis": 1}),
            (["writable"], {"writable": True}),
        ],
    )
    def test_other_options_that_decide_values_are_refused(self, what, options, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        self.refused(halfway, what, func, X, **options)

    def test_another_verb_is_refused(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        self.refused(halfway, ["called with"], func, X, verb=map_items)

    def test_another_number_of_outputs_is_refused(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        out = (halfway.out, halfway.folder / "Z.npy")
        self.refused(halfway, ["outputs", "out_axis"], func, X, out=out, out_axis=(0, 0))

    def test_outputs_that_are_no_files_are_refused(self, halfway):
        for out in (None, np.empty((40, 2)), (halfway.out, np.empty((40, 2)))):
            with pytest.raises(ValueError, match="resume=True needs out= as a path"):
                map_array(lambda c: c, X, out=out, resume=True)
        assert halfway.left() == []

    def test_options_that_decide_no_values_may_change(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X, backend="sequential", n_jobs=1, balance="static")
        options = {"n_jobs": 3, "balance": "dynamic", "backend": "threading"}
        options |= {"timeout": 60, "retries": 5, "retry_on": OSError, "on_error": "fill"}
        assert_same(np.array(halfway.tried(func, X, **options)), X * 2)
        assert sorted(halfway.ran()) == LATER


class TestFormat:
    """Its format, as the docstring of `taskcarrier.arrays.resume.ledger_file` has it."""

    @staticmethod
    def parsed(path):
        content = path.read_bytes()
        first, second, rest = content.split(b"\n", 2)
        header = json.loads(second.decode("ascii"))
        at = header["marks_at"]
        assert content[len(content) - len(rest) : at] == bytes(at - len(content) + len(rest))
        return first, header, content[at:]

    def test_the_file_is_as_documented(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X, X, kwargs={}, args=(3, "x"))
        first, header, marks = self.parsed(halfway.ledger)
        assert first == b"TaskCarrier ledger 2"
        assert set(header) == {"marks_at", "chunks", "computes"}
        assert header["marks_at"] % 4096 == 0
        assert header["chunks"] == 10
        assert marks[:5] == b"\1" * 5
        assert len(marks) == 10
        assert 1 not in marks[5:]
        assert set(header["computes"]) == {"digests", "sampled"}
        assert header["computes"]["sampled"] == {}
        computes = header["computes"]["digests"]
        assert {"func", "args[0]", "args[1]", "array 0", "array 1"} < set(computes)
        assert {"axis", "items", "chunksize", "dtype", "out_axis", "depth"} < set(computes)
        assert all(isinstance(word, str) for word in computes.values())
        assert computes["array 0"] == computes["array 1"]

    def test_the_file_is_readable_only_by_its_owner(self, halfway):
        halfway.stopped(doubling(halfway.check), X)
        assert stat.S_IMODE(halfway.ledger.stat().st_mode) == 0o600

    def test_the_file_is_placed_beside_the_target_of_a_link(self, halfway):
        folder = halfway.folder / "elsewhere"
        folder.mkdir()
        halfway.out.symlink_to(folder / "Z.npy")
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        assert sorted(path.name for path in folder.iterdir()) == ["Z.npy.ledger", "Z.npy.part"]
        halfway.tried(func, X)
        assert_same(np.load(folder / "Z.npy"), X * 2)
        assert halfway.ran() == LATER

    @pytest.mark.parametrize("n", [100, 1000, 30_000])
    def test_many_names_make_a_long_header(self, n, halfway):
        func = doubling(halfway.check)
        options = {"args": tuple(range(n // 100)), "kwargs": {"n" * n: 1}}
        halfway.stopped(func, X, **options)
        _, header, marks = self.parsed(halfway.ledger)
        assert header["marks_at"] % 4096 == 0
        assert marks[:5] == b"\1" * 5
        assert_same(np.array(halfway.tried(func, X, **options)), X * 2)
        assert halfway.ran() == LATER

    def test_names_need_not_be_ascii(self, halfway):
        def func(chunk, **_):
            halfway.check(chunk[0, 0])
            return chunk * 2

        halfway.stopped(func, X, kwargs={"größe": 1, "\n": 2})
        _, header, _ = self.parsed(halfway.ledger)
        assert {"kwargs['größe']", "kwargs['\\n']"} < set(header["computes"]["digests"])
        with pytest.raises(ValueError, match=r"what differs: kwargs\['größe'\]\."):
            halfway.tried(func, X, kwargs={"größe": 2, "\n": 2})
        assert_same(np.array(halfway.tried(func, X, kwargs={"größe": 1, "\n": 2})), X * 2)

    def test_marks_may_start_at_another_offset(self, halfway):
        func = doubling(halfway.check)
        halfway.stopped(func, X)
        _, header, marks = self.parsed(halfway.ledger)
        header["marks_at"] = 4 * 4096
        text = b"TaskCarrier ledger 2\n" + json.dumps(header).encode() + b"\n"
        halfway.ledger.write_bytes(text.ljust(4 * 4096, b"\0") + marks)
        assert_same(np.array(halfway.tried(func, X)), X * 2)
        assert halfway.ran() == LATER


class TestLedgerFile:
    DIGESTS = {"func": "ab", "array 0": "cd"}  # noqa: RUF012  # a constant of the tests

    def kept(self, folder, n=5, **changes):
        digests = {**self.DIGESTS, **changes}
        return LedgerFile(str(folder / "Y.npy"), n, Computation(digests, {}, []))

    def test_marks_outlive_the_object(self, tmp_path):
        kept = self.kept(tmp_path)
        assert kept.is_new
        assert kept.begin(start_over=True) == 0
        kept.marks.open("write")[[1, 3]] = 1
        kept.close()
        again = self.kept(tmp_path)
        assert not again.is_new
        assert again.begin(start_over=False) == 2
        assert again.marks.open("read").tolist() == [0, 1, 0, 1, 0]
        assert again.begin(start_over=True) == 0
        again.close()

    def test_only_one_run_at_a_time_may_hold_the_file(self, tmp_path):
        kept = self.kept(tmp_path)
        for changes in ({}, {"func": "other"}):
            with pytest.raises(BlockingIOError, match="another run is at work on this output"):
                self.kept(tmp_path, **changes)
        kept.close()
        self.kept(tmp_path).close()

    def test_the_error_names_what_differs(self, tmp_path):
        self.kept(tmp_path).close()
        for changes, what in [
            ({"func": "x"}, "func"),
            ({"array 0": "x"}, "array 0"),
            ({"more": "x"}, "more"),
            ({"func": "x", "array 0": "y"}, "func, array 0"),
        ]:
            with pytest.raises(ValueError, match=f"what differs: {what}\\. To start over"):
                self.kept(tmp_path, **changes)
        with pytest.raises(ValueError, match="what differs: the number of ranges"):
            self.kept(tmp_path, n=6)
        self.kept(tmp_path).close()

    def test_a_refusal_keeps_neither_lock_nor_descriptor(self, tmp_path):
        self.kept(tmp_path).close()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # as quick as can be
        for _ in range(5):
            with pytest.raises(ValueError, match="what differs"):
                self.kept(tmp_path, func="other")
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208  # likewise
        self.kept(tmp_path).close()

    def test_no_other_file_is_made(self, tmp_path):
        kept = self.kept(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Y.npy.ledger"]
        kept.remove()
        kept.remove()  # another run may have removed it
        kept.close()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 100_000])
    def test_a_file_holds_any_number_of_marks(self, n, tmp_path):
        kept = self.kept(tmp_path, n)
        marks = kept.marks.open("write")
        assert marks.shape == (n,)
        marks[-1] = 1
        assert kept.begin(start_over=False) == 1
        kept.close()
        assert (tmp_path / "Y.npy.ledger").stat().st_size % 4096 == n % 4096

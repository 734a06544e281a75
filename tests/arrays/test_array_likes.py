"""Array-likes: read by range, turned into their values, or refused by name."""

import threading

import numpy as np
import pytest

from taskcarrier import last_report, map_array, map_chunks, map_items, reduce_array, share
from tests.helpers import never
from tests.strategies import assert_same, each_run, keep_pools_warm, run_script

pools = keep_pools_warm(2)


class OnDisk:
    """An array in a file of another format, which can only be sliced."""

    def __init__(self, values):
        self._values = values
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, index):
        if not isinstance(index, tuple):
            index = (index,)
        assert all(isinstance(one, slice) for one in index)
        return self._values[index].copy()

    def __array__(self, *_, **__):
        raise AssertionError("read as a whole")


class Broken(OnDisk):
    def __getitem__(self, index):
        first, *_ = index if isinstance(index, tuple) else (index,)
        if first.stop > 10:
            raise OSError("no longer there")
        return super().__getitem__(index)


class TestReadByRange:
    @pytest.mark.parametrize("axis", [0, 1, -1])
    @pytest.mark.parametrize("chunksize", [1, 7, None, 100])
    def test_array_likes_are_read_by_range_along_every_axis(self, chunksize, axis, run):
        X = np.random.default_rng(0).normal(size=(20, 13))
        result = map_array(np.square, OnDisk(X), axis=axis, chunksize=chunksize, **run)
        assert_same(result, X**2)

    def test_array_likes_are_read_by_range_in_every_verb(self, run):
        X = np.arange(60).reshape(20, 3)
        disk = OnDisk(X)
        assert_same(map_items(lambda x, y: x + y, disk, X, **run), X * 2)
        chunks = map_chunks(lambda c: (c.tolist(), c.flags.writeable), disk, chunksize=8, **run)
        assert chunks == [(X[i : i + 8].tolist(), False) for i in (0, 8, 16)]
        assert reduce_array(np.sum, disk, combine=lambda a, b: a + b, **run) == X.sum()

    @pytest.mark.parametrize("boundary", ["reflect", "wrap", "none"])
    def test_array_likes_are_read_with_neighbours(self, boundary, run):
        X = np.arange(20) ** 2
        options = {"depth": 3, "boundary": boundary, "chunksize": 6, **run}
        found = map_chunks(np.copy, OnDisk(X), **options)
        expected = map_chunks(np.copy, X, **options)
        assert [one.tolist() for one in found] == [one.tolist() for one in expected]

    def test_an_error_while_reading_is_treated_like_one_of_the_function(self, run):
        with pytest.raises(OSError, match="no longer there"):
            map_array(np.square, Broken(np.arange(20.0)), chunksize=5, **run)

    def test_the_report_says_that_an_array_is_read_by_range(self):
        map_array(np.square, OnDisk(np.arange(20.0)), backend="loky", n_jobs=2)
        assert last_report().bytes_copied == 0
        assert any("read by range" in note for note in last_report().notes)

    def test_array_likes_of_the_main_program_are_read_by_range(self, tmp_path):
        code = (
            "import numpy as np\n"
            "from taskcarrier import map_array\n"
            "class Ramp:\n"
            "    shape, dtype, ndim = (20,), np.dtype('f8'), 1\n"
            "    def __getitem__(self, index):\n"
            "        (index,) = index if isinstance(index, tuple) else (index,)\n"
            "        return np.arange(20.0)[index]\n"
            "if __name__ == '__main__':\n"
            "    Y = map_array(np.sqrt, Ramp(), backend='loky', n_jobs=2)\n"
            "    print(np.array_equal(Y, np.sqrt(np.arange(20.0))))\n"
        )
        assert run_script(tmp_path, code).strip() == "True"

    def test_array_likes_can_be_shared(self):
        X = np.arange(20.0).reshape(5, 4)

        class Whole(OnDisk):
            def __getitem__(self, index):
                return self._values[index]

        assert_same(share(Whole(X)), X)


@pytest.mark.one_case
@each_run
def test_zarr_arrays_on_disk_are_mapped(backend, balance, tmp_path):
    pytest.importorskip("zarr", reason="zarr arrays are what this is about")
    # In a program of its own: zarr leaves threads behind.
    code = (
        "import sys\n"
        "import numpy as np\n"
        "import zarr\n"
        "from taskcarrier import last_report, map_array, map_items\n"
        "folder, backend, balance = sys.argv[1:]\n"
        "run = dict(backend=backend, balance=balance, n_jobs=2)\n"
        "if __name__ == '__main__':\n"
        "    X = np.random.default_rng(0).normal(size=(50, 30))\n"
        "    stored = zarr.open(folder + '/X.zarr', mode='w', shape=X.shape, chunks=(7, 11),\n"
        "        dtype=X.dtype)\n"
        "    stored[...] = X\n"
        "    for axis in (0, 1):\n"
        "        for chunksize in (3, None):\n"
        "            Y = map_array(np.square, stored, axis=axis, chunksize=chunksize, **run)\n"
        "            assert last_report().backend == backend\n"
        "            assert Y.tobytes() == (X ** 2).tobytes()\n"
        "    Y = map_items(np.sort, stored, out=folder + '/Y.npy', dtype='f4', **run)\n"
        "    assert np.array_equal(np.load(folder + '/Y.npy'), np.sort(X, 1).astype('f4'))\n"
        "    print('right')\n"
    )
    assert run_script(tmp_path, code, str(tmp_path), backend, balance).strip() == "right"


class TestPandas:
    @pytest.fixture(scope="class")
    @staticmethod
    def pd():
        return pytest.importorskip("pandas", reason="its objects are what this is about")

    def test_pandas_series_become_their_values(self, pd, run):
        values = np.arange(20.0)
        for index in (None, range(20, 0, -1), np.arange(20) / 2, list("abcdefghijklmnopqrst")):
            series = pd.Series(values, index=index)
            assert_same(map_array(np.sqrt, series, chunksize=3, **run), np.sqrt(values))

    def test_pandas_frames_become_their_values(self, pd, run):
        X = np.arange(60.0).reshape(20, 3)
        frame = pd.DataFrame(X, columns=list("abc"))
        for axis in (0, 1):
            assert_same(map_array(np.sqrt, frame, axis=axis, chunksize=2, **run), np.sqrt(X))
        assert_same(map_array(np.add, frame["a"], frame["c"], **run), X[:, 0] + X[:, 2])

    def test_pandas_columns_of_dates_and_words_become_their_values(self, pd, run):
        dates = pd.Series(np.arange(5).astype("M8[ns]"))
        assert_same(map_array(np.copy, dates, **run), np.arange(5).astype("M8[ns]"))
        words = pd.Series(["a", "bc", "d"], dtype=object)
        assert map_array(np.copy, words, **run).tolist() == ["a", "bc", "d"]
        categories = pd.Series(["a", "b", "a"], dtype="category")
        assert map_array(np.copy, categories, **run).tolist() == ["a", "b", "a"]

    def test_subclasses_of_pandas_series_become_their_values(self, pd):
        class Mine(pd.Series):
            pass

        series = Mine([1.0, 2.0, 3.0], index=[10.0, 20.0, 30.0])
        result = map_array(np.negative, series, chunksize=2, backend="sequential")
        assert_same(result, -np.arange(1.0, 4.0))


class TestXarray:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_xarray_arrays_become_their_values(self, axis, run):
        xarray = pytest.importorskip("xarray", reason="its objects are what this is about")
        X = np.arange(60.0).reshape(20, 3)
        array = xarray.DataArray(X, dims=("time", "place"), coords={"place": list("abc")})
        assert_same(map_array(np.sqrt, array, axis=axis, chunksize=2, **run), np.sqrt(X))


class TestSequences:
    @pytest.mark.parametrize(
        "values", [[1, 2, 3], (1.5, 2.5), range(5), [[1, 2], [3, 4]], [True, False], ["a", "bc"]]
    )
    def test_sequences_of_numbers_and_words_become_arrays(self, values, run):
        assert_same(map_array(np.copy, values, **run), np.array(values))

    def test_ragged_sequences_are_refused(self):
        for verb in (map_array, map_items, map_chunks):
            with pytest.raises(ValueError, match="inhomogeneous") as caught:
                verb(never, [[1, 2], [3]])
            assert "array 0 could not become an array" in "\n".join(caught.value.__notes__)
        with pytest.raises(ValueError, match="inhomogeneous") as caught:
            map_array(never, np.zeros(2), [[1, 2], [3]])
        assert "array 1" in "\n".join(caught.value.__notes__)


class MaskedReads:
    """Gives masked arrays from a number of items on, as netCDF4 does for missing values."""

    def __init__(self, least):
        self.values = np.arange(12.0).reshape(4, 3)
        self.least = least

    shape, ndim, dtype = (4, 3), 2, np.dtype("f8")

    def __getitem__(self, index):
        found = self.values[index]
        return found if found.size < self.least else np.ma.masked_array(found, found == 2)


@pytest.mark.fault(31)
class TestRefused:
    @pytest.mark.parametrize("number", [0, 1])
    def test_masked_arrays_are_refused(self, number):
        arrays = [np.zeros(3), np.zeros(3)]
        arrays[number] = np.ma.masked_array(np.zeros(3), [0, 1, 0])
        with pytest.raises(TypeError, match=rf"array {number} is a masked array.*X\.filled"):
            map_array(never, *arrays)

    @pytest.mark.parametrize(
        "value",
        [
            [np.ma.masked_array([1.0, 2.0], [0, 1])] * 2,
            (np.zeros(2), np.ma.masked_array([1.0, 2.0])),
            [1.0, np.ma.masked],
            [[np.zeros(2)], [np.ma.zeros(2)]],
        ],
    )
    @pytest.mark.parametrize("verb", [map_array, map_items, map_chunks, share])
    def test_sequences_of_masked_arrays_are_refused(self, verb, value):
        with pytest.raises(TypeError, match=r"array 0 .* masks would be lost: pass each item's"):
            verb(never, value) if verb is not share else share(value)

    def test_objects_that_become_masked_arrays_are_refused(self):
        class Masked:
            def __array__(self, dtype=None, copy=None):
                return np.ma.masked_array([1.0, 2.0], [0, 1])

        with pytest.raises(TypeError, match=r"array 0 .* masks would be lost: pass its"):
            map_array(never, Masked())

    @pytest.mark.parametrize("verb", [map_array, map_items, map_chunks, share])
    def test_array_likes_that_read_masked_arrays_are_refused(self, verb):
        with pytest.raises(TypeError, match="masks would be lost: have it give plain arrays"):
            verb(never, MaskedReads(0)) if verb is not share else share(MaskedReads(0))

    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_array_likes_that_sometimes_read_masked_arrays_are_refused(self, axis, backend):
        with pytest.raises(TypeError, match="masks would be lost: have it give plain arrays"):
            map_array(np.sqrt, MaskedReads(1), axis=axis, chunksize=2, n_jobs=2, backend=backend)

    @pytest.mark.parametrize("kind", ["csr_array", "coo_matrix", "lil_array", "csc_matrix"])
    def test_sparse_arrays_are_refused(self, kind):
        sparse = pytest.importorskip("scipy.sparse", reason="its arrays are what this is about")
        with pytest.raises(TypeError, match=r"array 0 is a sparse matrix: pass X\.toarray\(\)"):
            map_array(never, getattr(sparse, kind)(np.eye(3)))

    def test_subclasses_of_sparse_arrays_are_refused(self):
        sparse = pytest.importorskip("scipy.sparse", reason="its arrays are what this is about")

        class Mine(sparse.csr_array):
            pass

        with pytest.raises(TypeError, match="array 0 is a sparse matrix"):
            map_array(never, Mine(np.eye(3)))

    def test_dask_arrays_are_refused(self):
        dask = pytest.importorskip("dask.array", reason="its arrays are what this is about")
        with pytest.raises(TypeError, match=r"array 0 is a dask array: pass X\.compute\(\)"):
            map_array(never, dask.zeros((4, 3)))

    @pytest.mark.parametrize("value", [3, 2.5, np.float64(1), np.array(1), None, {"a": 1}, {1}])
    def test_values_without_an_axis_are_refused(self, value):
        with pytest.raises(TypeError, match="array 0 has no axis to map over"):
            map_array(never, value)

    @pytest.mark.parametrize("value", ["text", b"text", b"X.npy", "X.csv"])
    def test_text_is_refused(self, value):
        with pytest.raises(TypeError, match=r"a path must end in \.npy"):
            map_array(never, value)


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is Point and self.x == other.x

    __hash__ = None


@pytest.mark.fault(30)
class TestObjects:
    def test_objects_are_mapped_to_objects(self, run):
        X = np.array([Point(i) for i in range(23)] + [None, "text", {"a": [1, 2]}], object)
        for chunksize in (1, 4, None):
            assert map_array(np.copy, X, chunksize=chunksize, **run).tolist() == X.tolist()

    def test_objects_are_mapped_to_numbers_and_back(self, run):
        X = np.array([Point(i) for i in range(20)], object).reshape(5, 4)
        numbers = map_array(
            lambda c: np.array([p.x for p in c.flat]).reshape(c.shape), X, axis=1, **run
        )
        assert_same(numbers, np.arange(20).reshape(5, 4))
        points = map_items(lambda x: Point(int(x)), np.arange(20), dtype=object, **run)
        assert points.tolist() == X.ravel().tolist()

    @pytest.mark.parametrize("axis", [0, 1])
    def test_arrays_of_objects_of_any_layout_are_mapped(self, axis, run):
        X = np.array([str(i) * i for i in range(30)], object).reshape(6, 5)
        for view in (X, X.T, X[::-1, ::-1], X[::3, 1:], np.asfortranarray(X)):
            result = map_array(np.copy, view, axis=axis, chunksize=2, **run)
            assert result.tolist() == view.tolist()

    def test_arrays_of_objects_are_read_with_neighbours(self, run):
        X = np.array([Point(i) for i in range(11)], object)
        found = map_chunks(lambda c: [p.x for p in c], X, depth=3, chunksize=2, **run)
        padded = np.pad(np.arange(11), 3, "symmetric").tolist()
        assert found == [padded[i : i + 6 + min(2, 11 - i)] for i in range(0, 11, 2)]

    def test_arrays_of_objects_are_mapped_beside_numbers(self, run):
        X = np.array([Point(i) for i in range(11)], object)
        result = map_items(lambda p, y: p.x * y, X, np.arange(11.0), chunksize=3, **run)
        assert_same(result, np.arange(11.0) ** 2)

    def test_arrays_of_objects_without_items_give_an_empty_result(self, run):
        result = map_array(np.copy, np.empty((0, 3), object), **run)
        assert (result.shape, result.dtype) == ((0, 3), np.dtype(object))

    def test_the_report_says_that_objects_are_pickled(self):
        map_array(np.copy, np.array([1, {}], object), backend="loky", n_jobs=2)
        assert any("pickled by range" in note for note in last_report().notes)

    def test_objects_that_cannot_be_pickled_are_named_by_range(self):
        X = np.array([1, 2, threading.Lock(), 4], object)
        with pytest.raises(TypeError, match="pickle") as caught:
            map_array(never, X, chunksize=2, backend="loky", n_jobs=2)
        assert "items 2:4" in "\n".join(caught.value.__notes__)
        result = map_array(np.copy, X, backend="threading", n_jobs=2)
        assert result[2] is X[2]

    def test_objects_of_the_main_program_are_mapped(self, tmp_path):
        code = (
            "import numpy as np\n"
            "from taskcarrier import map_array, map_items\n"
            "class Thing:\n"
            "    def __init__(self, x):\n"
            "        self.x = x\n"
            "    def doubled(self):\n"
            "        return Thing(self.x * 2)\n"
            "if __name__ == '__main__':\n"
            "    X = np.array([Thing(i) for i in range(5)], object)\n"
            "    options = dict(backend='loky', n_jobs=2)\n"
            "    Y = map_items(Thing.doubled, X, **options)\n"
            "    Z = map_array(np.copy, Y, **options)\n"
            "    assert all(type(one) is Thing for one in Z)\n"
            "    print([one.x for one in Z])\n"
        )
        assert run_script(tmp_path, code).strip() == "[0, 2, 4, 6, 8]"


@pytest.mark.fault(30)
class TestStringsOfAnyLength:
    @pytest.fixture(scope="class")
    @staticmethod
    def words():
        words = ["", "a", "λ" * 40, "word " * 300] * 6
        return np.array(words, np.dtypes.StringDType())

    @pytest.mark.parametrize("chunksize", [1, 5, None])
    def test_strings_of_any_length_are_mapped(self, chunksize, words, run):
        result = map_array(np.copy, words, chunksize=chunksize, **run)
        assert result.dtype == words.dtype
        assert result.tolist() == words.tolist()
        result = map_array(np.strings.str_len, words[::-1], chunksize=chunksize, **run)
        assert result.tolist() == [len(word) for word in words.tolist()[::-1]]

    def test_numbers_are_mapped_to_strings_of_any_length(self, words, run):
        kind = words.dtype
        result = map_array(lambda c: c.astype(kind), np.arange(20), chunksize=3, **run)
        assert result.dtype == kind
        assert result.tolist() == [str(i) for i in range(20)]

    def test_items_give_strings_of_any_length(self, words, run):
        kind, options = words.dtype, {"chunksize": 5, **run}
        X = np.arange(20)
        result = map_items(lambda i: np.array(["a", "b" * int(i)], kind), X, **options)
        assert result.dtype == kind
        assert result.tolist() == [["a", "b" * i] for i in range(20)]
        for func in (lambda word: word, lambda word: np.array(word, kind)):
            result = map_items(func, words, dtype=kind, **options)
            assert result.dtype == kind
            assert result.tolist() == words.tolist()
        mixed = map_items(lambda i: np.array("b" * i, kind) if i % 2 else "a" * i, X, **options)
        assert mixed.dtype == kind
        assert mixed.tolist() == ["ab"[i % 2] * i for i in range(20)]
        with pytest.raises(TypeError, match=r"None \(NoneType\) for item 7"):
            map_items(lambda i: None if i == 7 else "a", X, dtype=kind, **options)

    def test_failed_strings_of_any_length_are_filled(self, words, run):
        def func(chunk):
            if (chunk == "a").any():
                raise ValueError("a")
            return chunk

        result, failures = map_array(
            func, words, on_error="collect", fill_value="none", chunksize=5, **run
        )
        assert [failure.start for failure in failures] == list(range(1, 24, 4))
        expected = ["none" if word == "a" else word for word in words.tolist()]
        assert result.tolist() == expected
        options = {"chunksize": 5, **run}
        result, _ = map_array(func, words, on_error="collect", **options)
        assert result.tolist() == ["" if word == "a" else word for word in words.tolist()]
        with pytest.raises(TypeError, match="have no NaN: pass fill_value="):
            map_array(func, words, on_error="fill", **options)
        with pytest.raises(TypeError, match="fill_value=3 is no value of dtype StringDType"):
            map_array(func, words, on_error="fill", fill_value=3, **options)


if not hasattr(np.dtypes, "StringDType"):  # NumPy 1 has none
    del TestStringsOfAnyLength

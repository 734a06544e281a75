"""Arrays that functions carry and write to: whether the caller sees it depends on their memory."""

import functools
import os
import tempfile
from multiprocessing import shared_memory

import numba
import numpy as np
import pytest

from taskcarrier import (
    StaticParallelMapper,
    empty,
    load,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
    share,
)
from taskcarrier.memory import (
    memmaps,
)
from tests.strategies import OF_BALANCE, assert_same, each_run, keep_pools_warm, run_script

pools = keep_pools_warm(2)

N = 9


def loaded(folder):
    np.save(folder / "X.npy", np.zeros(N))
    return load(folder / "X.npy", "r+")


def memmap(folder, mode="w+"):
    path = folder / "X.raw"
    if mode != "w+":
        np.zeros(N).tofile(path)
    return np.memmap(path, "f8", mode, shape=(N,))


def masked(_):
    return np.ma.array(empty(N), mask=np.arange(N) == 1, copy=False)


def fields(_):
    return empty(N, [("a", "i2"), ("b", "f8")])["b"]


SEEN = {
    "empty": lambda _: empty(N),
    "in Fortran order": lambda _: empty((N, 2), order="F")[:, 1],
    "share": lambda _: share(np.zeros(N)),
    "large": lambda _: empty((N, 100_000))[:, 7],
    "load": loaded,
    "memmap w+": memmap,
    "memmap r+": lambda folder: memmap(folder, "r+"),
    "ndarray over a memmap": lambda folder: np.asarray(memmap(folder)),
    "slice": lambda _: empty(3 * N)[N : 2 * N],
    "reversed": lambda _: empty(N)[::-1],
    "every other": lambda _: empty(2 * N)[::2],
    "transposed": lambda _: empty((2, N)).T[:, 0],
    "field": fields,
    "subclass": lambda _: empty(N).view(np.rec.recarray),
    "masked": masked,
}

PRIVATE = {
    "ordinary": lambda _: np.zeros(N),
    "large": lambda _: np.zeros((N, 100_000))[:, 7],
    "result of a map": lambda _: map_array(np.zeros_like, np.ones(N), backend="loky", n_jobs=2),
    "result in a file": lambda folder: map_array(
        np.zeros_like, np.ones(N), out=folder / "Y.npy", backend="loky", n_jobs=2
    ),
    "memmap c": lambda folder: memmap(folder, "c"),
}


def by_closure(array):
    return lambda i: array.__setitem__(i, i + 1)


def by_partial(array):
    return functools.partial(np.ndarray.__setitem__, array)


class Holder:
    def __init__(self, array):
        self.array = array

    def put(self, i):
        self.array[i] = i + 1


def by_bound_object(array):
    return Holder(array).put


def in_a_container(array):
    places = {"here": [array]}
    return lambda i: places["here"][0].__setitem__(i, i + 1)


@pytest.mark.fault(40)
class TestWrites:
    @each_run
    @pytest.mark.parametrize("kind", SEEN)
    def test_writes_to_carried_arrays_are_seen_by_the_caller(
        self, kind, backend, balance, tmp_path
    ):
        array = SEEN[kind](tmp_path)
        OF_BALANCE[balance](n_jobs=2, backend=backend).map(by_closure(array), range(N))
        assert_same(np.array(array), np.arange(1.0, N + 1))

    @pytest.mark.parametrize("carried", [by_bound_object, in_a_container])
    @pytest.mark.parametrize("kind", ["empty", "memmap r+"])
    def test_writes_are_seen_however_the_array_is_carried(self, kind, carried, tmp_path):
        array = SEEN[kind](tmp_path)
        StaticParallelMapper(n_jobs=2, backend="loky").map(carried(array), range(N))
        assert_same(np.array(array), np.arange(1.0, N + 1))

    def test_writes_by_a_partial_are_seen(self):
        array = empty(N)
        mapper = StaticParallelMapper(n_jobs=2, backend="loky")
        mapper.map(by_partial(array), range(N), np.arange(1.0, N + 1))
        assert_same(np.array(array), np.arange(1.0, N + 1))

    def test_writes_go_to_the_file(self, tmp_path):
        array = loaded(tmp_path)
        StaticParallelMapper(n_jobs=2, backend="loky").map(by_closure(array), range(N))
        assert_same(np.load(tmp_path / "X.npy"), np.arange(1.0, N + 1))

    def test_writes_to_shared_memory_of_the_standard_library_are_seen(self):
        memory = shared_memory.SharedMemory(create=True, size=8 * N)
        try:
            array = np.ndarray(N, "f8", memory.buf)
            StaticParallelMapper(n_jobs=2, backend="loky").map(by_closure(array), range(N))
            seen = np.array(array)
            del array
        finally:
            memory.close()
            memory.unlink()
        assert_same(seen, np.arange(1.0, N + 1))

    @pytest.mark.parametrize("kind", PRIVATE)
    def test_writes_to_all_other_arrays_stay_in_the_worker(self, kind, tmp_path):
        array = PRIVATE[kind](tmp_path)
        StaticParallelMapper(n_jobs=2, backend="loky").map(by_closure(array), range(N))
        assert_same(np.array(array), np.zeros(N))

    def test_writes_to_read_only_views_are_refused(self):
        array = empty(N)
        view = array.view()
        view.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            StaticParallelMapper(n_jobs=1, backend="sequential").map(by_closure(view), range(N))

    def test_workers_see_the_writes_of_each_other(self):
        counts = empty(2, "i8")

        def count(i):
            counts[i] += 1
            return int(counts[i])

        mapper = StaticParallelMapper(n_jobs=1, backend="loky")
        assert mapper.map(count, [0, 0, 1, 0]) == [1, 2, 1, 3]
        assert counts.tolist() == [3, 1]

    @pytest.mark.parametrize("verb", [map_array, map_items, map_chunks, reduce_array])
    def test_writes_are_seen_in_every_verb(self, verb):
        seen = empty(N, "?")

        def func(x):
            seen[np.asarray(x, int)] = True
            return x

        X = np.arange(float(N))
        more = {"combine": np.add} if verb is reduce_array else {}
        verb(func, X, backend="loky", n_jobs=2, chunksize=1, **more)
        assert seen.all()

    def test_writes_are_seen_in_imap(self):
        array = empty(N)
        with StaticParallelMapper(n_jobs=2, backend="loky") as mapper:
            list(mapper.imap(by_closure(array), range(N)))
        assert_same(np.array(array), np.arange(1.0, N + 1))

    @pytest.mark.parametrize("verb", [map_array, map_chunks])
    def test_writes_to_arrays_in_args_are_refused_with_the_remedy(self, verb):
        with pytest.raises(ValueError, match="read-only") as caught:
            verb(lambda _, a: a.fill(1), np.arange(4.0), args=(empty(3),), backend="loky", n_jobs=2)
        assert any("taskcarrier.empty" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
    def test_writes_to_arrays_in_shared_are_refused_with_the_remedy(self, backend):
        mapper = StaticParallelMapper(n_jobs=2, backend=backend)
        with pytest.raises(ValueError, match="read-only") as caught:
            mapper.map(lambda i, a: a.__setitem__(0, i), range(3), shared={"a": empty(3)})
        assert any(
            "arrays in shared= are read-only; what every" in n for n in caught.value.__notes__
        )

    def test_a_function_may_carry_an_array_that_is_also_its_argument(self):
        array = empty(4)

        def func(chunk, again):
            array[chunk.astype(int)] = 1
            assert not again.flags.writeable
            return chunk

        map_array(func, np.arange(4.0), args=(array,), backend="loky", n_jobs=2)
        assert array.all()


PROGRAM = """
import numpy as np
from taskcarrier import StaticParallelMapper, empty

out = empty((5,))
plain = np.zeros(5)

def put(i):
    out[i] = i
    plain[i] = i

if __name__ == "__main__":
    StaticParallelMapper(n_jobs=2, backend="loky").map(put, range(5))
    print(out.tolist(), plain.tolist())
"""


@pytest.mark.fault(40)
def test_writes_to_globals_of_a_program_are_seen_if_they_are_shared(tmp_path):
    expected = "[0.0, 1.0, 2.0, 3.0, 4.0] [0.0, 0.0, 0.0, 0.0, 0.0]\n"
    assert run_script(tmp_path, PROGRAM) == expected


@pytest.mark.fault(40)
class TestFilesWithoutTheirName:
    @staticmethod
    def check(array):
        StaticParallelMapper(n_jobs=2, backend="loky").map(by_closure(array), range(N))
        assert_same(np.array(array), np.arange(1.0, N + 1))

    @pytest.mark.parametrize("is_replaced", [False, True])
    def test_a_removed_file_is_written_through_its_descriptor(self, is_replaced, tmp_path):
        array = memmap(tmp_path)
        (tmp_path / "X.raw").unlink()
        if is_replaced:
            np.zeros(N).tofile(tmp_path / "X.raw")
        self.check(array)
        if is_replaced:
            assert not np.fromfile(tmp_path / "X.raw").any()

    def test_a_temporary_file_is_written_through_its_descriptor(self, tmp_path):
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            self.check(np.memmap(file, "f8", "w+", shape=(N,)))

    def test_a_file_in_memory_is_written_through_its_descriptor(self):
        with os.fdopen(os.memfd_create("file of tests"), "r+b") as file:
            file.truncate(8 * N)
            self.check(np.memmap(file, "f8", "r+", shape=(N,)))

    def test_unlinked_shared_memory_is_written(self):
        memory = shared_memory.SharedMemory(create=True, size=8 * N)
        try:
            memory.unlink()
            self.check(np.ndarray(N, "f8", memory.buf))
        finally:
            memory.close()

    def test_files_without_name_and_descriptor_are_refused(self, tmp_path, monkeypatch):
        array = memmap(tmp_path)
        (tmp_path / "X.raw").unlink()
        monkeypatch.setattr(memmaps, "_find_open_descriptor", lambda *_: None)
        mapper = StaticParallelMapper(n_jobs=2, backend="loky")
        with pytest.raises(ValueError, match=r"memmap of shape \(9,\).*writeable = False"):
            mapper.map(by_closure(array), range(N))
        array.flags.writeable = False
        assert mapper.map(lambda i: float(array[i]), range(N)) == [0.0] * N


class Measured(np.ndarray):
    __slots__ = ("unit",)

    def __reduce__(self):
        return rebuilt, (np.asarray(self), self.unit)


def rebuilt(values, unit):
    array = values.view(Measured)
    array.unit = unit
    return array


class Linked(np.ndarray):
    def __array_finalize__(self, other):
        self.links = getattr(other, "links", [])


@pytest.mark.fault(40)
class TestSubclasses:
    def test_subclasses_that_pickle_themselves_keep_their_place_in_memory(self):
        array = empty(N).view(Measured)
        array.unit = "m"
        mapper = StaticParallelMapper(n_jobs=2, backend="loky")
        assert mapper.map(lambda i: (by_closure(array)(i), array.unit)[1], range(N)) == ["m"] * N
        assert_same(np.asarray(array), np.arange(1.0, N + 1))

    def test_subclasses_may_refer_to_themselves(self):
        array = empty(N).view(Linked)
        array.links = [array]

        def put(i):
            array.links[0][i] = i + 1
            return array.links[0] is array

        assert StaticParallelMapper(n_jobs=2, backend="loky").map(put, range(N)) == [True] * N
        assert_same(np.asarray(array), np.arange(1.0, N + 1))


@pytest.mark.fault(40)
class TestResume:
    @pytest.mark.parametrize("kind", SEEN)
    def test_resume_with_a_carried_writable_array_is_refused(self, kind, tmp_path):
        array = SEEN[kind](tmp_path)

        def func(chunk):
            array[chunk.astype(int)] = 1
            return chunk

        with pytest.raises(ValueError, match=r"func\.array\. A range that an earlier run"):
            map_array(func, np.arange(float(N)), out=tmp_path / "Y.npy", resume=True)
        assert not np.array(array).any()
        assert not list(tmp_path.glob("Y.npy*"))

    def test_resume_with_a_writable_array_in_an_attribute_is_refused(self, tmp_path):
        def func(chunk):
            func.log[0] = 1
            return chunk

        func.log = empty(9)
        with pytest.raises(ValueError, match=r"func: attribute log\. A range"):
            map_array(func, np.arange(float(N)), out=tmp_path / "Y.npy", resume=True)

    def test_resume_is_right_for_kernels_which_only_read_carried_arrays(self, tmp_path):
        array = share(np.full(N, 2.0))
        kernel = numba.njit(lambda chunk: chunk * array[0])
        X = np.arange(float(N))
        result = map_array(kernel, X, out=tmp_path / "Y.npy", resume=True, n_jobs=1)
        assert_same(np.array(result), X * 2)

    @pytest.mark.parametrize("place", ["input", "args"])
    def test_resume_is_right_for_inputs_and_arguments(self, place, tmp_path):
        X, Z = np.arange(float(N)), memmap(tmp_path)
        Z[:] = 2
        out = {"out": tmp_path / "Y.npy", "resume": True, "n_jobs": 1}
        if place == "input":
            result = map_array(lambda z, x: z * x, Z, X, **out)
        else:
            result = map_array(lambda x, z: z * x, X, args=(Z[0:1],), **out)
        assert_same(np.array(result), X * 2)

    def test_resume_is_right_where_the_carried_array_is_read_only(self, tmp_path):
        array = share(np.full(N, 2.0))
        array.flags.writeable = False
        X = np.arange(float(N))
        result = map_array(
            lambda chunk: chunk * array[0], X, out=tmp_path / "Y.npy", resume=True, n_jobs=1
        )
        assert_same(np.array(result), X * 2)


@pytest.mark.fault(40)
def test_a_range_that_is_run_again_writes_again():
    count = empty(1, "i8")

    def dying(i):
        count[0] += 1
        if count[0] == 1:
            os._exit(3)
        return i

    assert StaticParallelMapper(n_jobs=2, backend="loky").map(dying, [5]) == [5]
    assert count[0] == 2

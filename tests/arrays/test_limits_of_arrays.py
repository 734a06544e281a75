"""Arrays at the ends of what is possible: many axes, many ranges, more bytes than 32 bits count."""

import logging
import re
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.lib.format import open_memmap

from taskcarrier import last_report, load, map_array, map_chunks, map_items, reduce_array
from tests.strategies import (
    EVERYWHERE,
    GIB,
    SMALL_RUNS,
    assert_same,
    contract,
    each_parallel_run,
    each_run,
    keep_pools_warm,
)

MAX_AXES = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


pools = keep_pools_warm(2)


def of_many_axes(longest):
    """An array with as many axes as NumPy allows; a few are longer than one."""
    shape = [1] * MAX_AXES
    shape[longest] = 5
    shape[(longest + 7) % MAX_AXES] = 3
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.fault(32)
class TestManyAxes:
    @pytest.mark.parametrize("longest", [0, 1, MAX_AXES // 2, MAX_AXES - 1])
    def test_every_one_of_many_axes_can_be_mapped(self, longest):
        X = of_many_axes(longest)
        for axis in (longest, longest - MAX_AXES, (longest + 7) % MAX_AXES, (longest + 1) % 3):
            result = contract(np.sqrt, np.abs(X), axis=axis, chunksize=2, runs=SMALL_RUNS)
            assert_same(result, np.sqrt(np.abs(X)))

    @pytest.mark.parametrize("longest", [0, MAX_AXES - 1])
    def test_items_of_many_axes_lose_an_axis_and_get_it_back(self, longest):
        X = of_many_axes(longest)
        for backend, balance in EVERYWHERE:
            options = {"backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 2}
            result = map_items(lambda x: x + 1, X, axis=longest, out_axis=longest, **options)
            assert_same(result, X + 1)

    @each_run
    def test_many_reversed_axes_are_mapped_with_neighbours(self, backend, balance):
        X = of_many_axes(3).T[..., ::-1]
        axis = X.shape.index(5)
        result = map_array(
            lambda c: c + np.roll(c, 1, axis) + np.roll(c, -1, axis),
            X,
            axis=axis,
            depth=1,
            boundary="wrap",
            chunksize=1,
            backend=backend,
            balance=balance,
            n_jobs=2,
        )
        assert_same(result, X + np.roll(X, 1, axis) + np.roll(X, -1, axis))

    @each_run
    def test_a_result_may_have_as_many_axes_as_numpy_allows(self, backend, balance, tmp_path):
        path = tmp_path / "Y.npy"
        shape = (1,) * (MAX_AXES - 1)
        result = map_array(
            lambda c: c.reshape(-1, *shape),
            np.arange(6.0),
            out=path,
            chunksize=2,
            backend=backend,
            balance=balance,
            n_jobs=2,
        )
        assert_same(result, np.arange(6.0).reshape(6, *shape))
        assert np.array_equal(np.load(path), result)

    @each_run
    def test_one_axis_too_many_is_an_error_of_numpy(self, backend, balance):
        with pytest.raises((ValueError, RuntimeError, IndexError), match=str(MAX_AXES)):
            map_items(
                lambda x: np.zeros((1,) * MAX_AXES),
                np.zeros(4),
                backend=backend,
                balance=balance,
                n_jobs=2,
            )


@pytest.mark.fault(32)
class TestManyRanges:
    @pytest.mark.thorough
    @each_run
    def test_a_hundred_thousand_ranges_are_mapped(self, backend, balance):
        X = np.arange(100_000.0)
        result = map_array(np.negative, X, chunksize=1, backend=backend, balance=balance, n_jobs=2)
        assert last_report().ranges == len(X)
        assert_same(result, -X)

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("backend", "balance"), [("threading", "dynamic"), ("loky", "dynamic")]
    )
    def test_twenty_thousand_partial_results_are_collected(self, backend, balance):
        X = np.arange(20_000)
        options = {"backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 1}
        assert map_chunks(_first, X, **options) == list(range(20_000))
        assert reduce_array(_first, X, combine=max, **options) == 19_999

    @pytest.mark.thorough
    @each_parallel_run
    def test_five_thousand_failures_are_each_named(self, backend, balance):
        result, failures = map_items(
            _odd_only,
            np.arange(10_000),
            on_error="collect",
            fill_value=-1,
            backend=backend,
            balance=balance,
            n_jobs=2,
        )
        assert [failure[:2] for failure in failures] == [(i, i + 1) for i in range(0, 10_000, 2)]
        assert np.array_equal(result[1::2], np.arange(1, 10_000, 2))
        assert (result[::2] == -1).all()

    @each_parallel_run
    def test_a_chunksize_may_exceed_every_length(self, backend, balance):
        X = np.arange(10.0)
        options = {"backend": backend, "balance": balance, "n_jobs": 2}
        assert_same(map_array(np.negative, X, chunksize=10**30, **options), -X)
        assert last_report().ranges == 1


@pytest.mark.fault(32)
@each_parallel_run
def test_a_hundred_million_items_are_mapped(backend, balance):
    X = np.arange(10**8, dtype=np.uint8)  # begins again every 256
    result = map_array(np.invert, X, backend=backend, balance=balance, n_jobs=2)
    assert_same(result, ~X)
    assert last_report().items == 10**8


def _first(chunk):
    return int(chunk[0])


def _odd_only(x):
    if x % 2 == 0:
        raise ValueError(x)
    return x


@each_run
def test_terabytes_that_repeat_one_item_are_not_expanded(backend, balance):
    X = np.broadcast_to(np.arange(3.0), (4, 1 << 36, 3))
    result = map_array(
        lambda c: np.array([c.nbytes], dtype=np.int64),
        X,
        chunksize=1,
        backend=backend,
        balance=balance,
        n_jobs=2,
    )
    assert np.array_equal(result, np.full(4, (1 << 36) * 3 * 8))


class PrivateMemory(threading.Thread):
    """The most that the children of this process had to themselves, in bytes, summed up."""

    def __init__(self):
        super().__init__(daemon=True)
        self.private = self.anonymous = self.n_samples = 0
        self._over = threading.Event()

    def run(self):
        me = psutil.Process()
        while not self._over.wait(0.05):
            facts = [self._facts(child.pid) for child in me.children(recursive=True)]
            self.private = max(self.private, sum(private for private, _ in facts))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in facts))
            self.n_samples += any(private for private, _ in facts)

    @staticmethod
    def _facts(pid):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:  # it has just ended
            return 0, 0
        sizes = {name: int(n) << 10 for name, n in re.findall(r"(\w+): +(\d+) kB", text)}
        return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Anonymous"]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join()


def _twice_plus_one(chunk):
    return chunk * 2 + 1


@pytest.mark.fault(32)
@pytest.mark.thorough
@pytest.mark.timeout(900)  # disks differ
@pytest.mark.parametrize("balance", ["static", "dynamic"])
def test_five_gibibytes_through_files_in_little_memory(balance, tmp_path):
    source, target = tmp_path / "X.npy", tmp_path / "Y.npy"
    block = 1 << 24
    n_blocks = 5 * GIB // 8 // block
    X = open_memmap(source, "w+", np.int64, (n_blocks * block,))
    for start in range(0, len(X), block):
        X[start : start + block] = np.arange(start, start + block)
    X.flush()
    del X
    with PrivateMemory() as memory:
        Y = map_array(
            _twice_plus_one, load(source), out=target, backend="loky", n_jobs=2, balance=balance
        )
    report = last_report()
    assert (report.backend, report.bytes_copied) == ("loky", 0)
    assert Y.nbytes == 5 * GIB
    for start in range(0, len(Y), block):
        part = Y[start : start + block]
        assert np.array_equal(part, np.arange(2 * start + 1, 2 * (start + block) + 1, 2))
    assert Y.nbytes < target.stat().st_size <= Y.nbytes + 4096
    assert memory.n_samples > 5
    said = (
        f"{memory.n_samples} samples: private {memory.private:,} at most, anonymous "
        f"{memory.anonymous:,}, {report.seconds:.1f} s"
    )
    logging.getLogger(__name__).info(said)
    assert memory.private < 300_000_000, said

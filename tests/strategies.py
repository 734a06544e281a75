"""Arrays of every layout and dtype, and what the tests of maps share.

NumPy and the plain call are the oracle. `contract` holds a map to it on every backend, balance and
number of workers; `same_bits` is what "equal" means here.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import taskcarrier
from taskcarrier import DynamicParallelMapper, StaticParallelMapper, map_array

ROOT = Path(__file__).parents[1]
GIB = 1 << 30

DTYPES = [
    np.dtype(dtype)
    for dtype in (
        "<f8", ">f8", "<f4", ">f4", "f2", "g", "F", "D", ">c16",
        "?", "i1", "u2", ">i4", "<i8", ">u8",
        "S3", "U2", ">U2", "M8[s]", ">M8[ns]", "m8[us]", ">m8[D]", "V5",
        [("a", "i1"), ("b", ">f8")],
        np.dtype([("a", "i1"), ("b", "f8"), ("c", "U1")], align=True),
        [("a", [("x", "f4"), ("y", "M8[s]")]), ("b", "i2", (2, 3))],
    )
]  # fmt: skip
REALS = [np.dtype(dtype) for dtype in ("<f8", ">f8", "<f4", "i1", ">i4", "<i8", "u2")]

# Every backend, balance and number of workers. Many processes take long to start, so they are left
# to `make test-all`, which has the profile of Hypothesis with the most examples.
N_PROCESSES = (2, 3, 8) if settings.default.max_examples >= 100 else (2, 3)
RUNS = [
    ("sequential", "static", 1),
    *[("threading", balance, n) for balance in ("static", "dynamic") for n in (1, 2, 3, 8)],
    ("loky", "static", 1),
    *[("loky", balance, n) for balance in ("static", "dynamic") for n in N_PROCESSES],
]
# One run of each backend, for many small cases.
SMALL_RUNS = [("sequential", "static", 1), ("threading", "dynamic", 2), ("loky", "static", 2)]
PARALLEL = [
    (backend, balance) for backend in ("threading", "loky") for balance in ("static", "dynamic")
]
BACKENDS = ["sequential", "threading", "loky"]
# One run of each sort, for what does not depend on the number of workers.
EVERYWHERE = [("sequential", "static"), *PARALLEL]
PAIRS = [(backend, balance, 2) for backend, balance in EVERYWHERE]
# Those that raise the error of the lowest failing range, the same each time.
ORDERED = [run for run in EVERYWHERE if run[0] == "sequential" or run[1] == "dynamic"]
LOKY = {"backend": "loky", "n_jobs": 2}
OF_BALANCE = {"static": StaticParallelMapper, "dynamic": DynamicParallelMapper}
# `make test` has one of each backend, `make test-all` has every balance.
ONE_OF_EACH = [("sequential", "static"), ("threading", "dynamic"), ("loky", "static")]
LEFT_TO_ALL = [run for run in EVERYWHERE if run not in ONE_OF_EACH]


def each_of(runs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Give a test the parameters `backend` and `balance`."""
    marks = {run: pytest.mark.thorough if run in LEFT_TO_ALL else () for run in runs}
    values = [pytest.param(*run, marks=mark) for run, mark in marks.items()]
    return pytest.mark.parametrize(("backend", "balance"), values)


each_run = each_of(EVERYWHERE)
each_parallel_run = each_of(PARALLEL)
each_ordered_run = pytest.mark.parametrize(("backend", "balance"), ORDERED)
each_balance = pytest.mark.parametrize(
    "balance", [pytest.param("static", marks=pytest.mark.thorough), "dynamic"]
)


def examples(number: int) -> Any:
    """Have Hypothesis try so many examples in `make test-all`, and fewer in `make test`."""
    return settings(max_examples=round(number * settings.default.max_examples / 100))


def warm_pools(*n_jobs: int, backends: tuple[str, ...] = ("threading", "loky")) -> None:
    """Start the pools before a test, so that its leak check does not count them."""
    for n in n_jobs:
        for backend in backends:
            map_array(np.copy, np.zeros(n), n_jobs=n, backend=backend)


def shut_down_pools() -> None:
    taskcarrier.shutdown()


def keep_pools_warm(*n_jobs: int, warm_up: Callable[[], object] = lambda: None) -> Any:
    """Return the fixture `pools` of a module, which has warm pools before each test.

    They are started again if there are none, after a test that ended them or left something behind.
    """

    @pytest.fixture
    def pools() -> None:
        if not any(thread.name == "taskcarrier-keeper" for thread in threading.enumerate()):
            warm_pools(*n_jobs)
            warm_up()

    return pools


def keep_runs_warm() -> Any:
    """Return the fixture `pools` of a module that has the pools of all `RUNS`."""
    return keep_pools_warm(*N_PROCESSES, warm_up=lambda: warm_pools(8, backends=("threading",)))


def same_bits(result: np.ndarray, expected: np.ndarray) -> bool:
    """Compare dtypes, shapes and bytes, without padding, which belongs to no value."""
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return False
    if result.dtype.names:
        return all(same_bits(result[name], expected[name]) for name in result.dtype.names)
    if result.dtype.char in "gG":
        return bool(
            np.array_equal(result, expected, equal_nan=True)
            and np.array_equal(np.signbit(result.real), np.signbit(expected.real))
        )
    return result.tobytes() == expected.tobytes()


def assert_same(result: Any, expected: Any, what: object = "") -> None:
    """Assert that arrays, or tuples of them, are equal bit for bit."""
    if isinstance(expected, tuple):
        assert isinstance(result, tuple), what
        assert len(result) == len(expected), what
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other, what)
    else:
        assert type(result) is np.ndarray, what
        assert result.dtype == expected.dtype, what
        assert result.shape == expected.shape, what
        assert same_bits(result, expected), what
        assert result.flags.writeable, what


def contract(
    func: Callable[..., Any],
    *arrays: Any,
    runs: Any = RUNS,
    verb: Callable[..., Any] = map_array,
    **options: Any,
) -> Any:
    """Return the result of a map, after checking that every run gives the same bits."""
    reference: Any = None
    for backend, balance, n_jobs in runs:
        run = dict(backend=backend, balance=balance, n_jobs=n_jobs)  # noqa: C408  # names of options
        result = verb(func, *arrays, **run, **options)
        if reference is None:
            reference = result
        assert_same(result, reference, run)
    return reference


def filled(dtype: np.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Make values that a careless copy would change."""
    array = np.zeros(shape, dtype)
    if dtype.names:
        for name in dtype.names:
            base, inner = dtype[name].base, dtype[name].shape
            array[name] = filled(base, shape + inner, rng)
    elif dtype.kind == "b":
        array[...] = rng.integers(0, 2, shape)
    elif dtype.kind == "U":
        points = rng.integers(1, 0x3000, (*shape, dtype.itemsize // 4))
        points = np.ascontiguousarray(points.astype(np.dtype("u4").newbyteorder(dtype.byteorder)))
        array[...] = points.view(dtype)[..., 0]
    elif dtype.char in "gG":
        array[...] = rng.choice([np.nan, -0.0, np.inf, 1 / 3, 5e-324], shape)
    elif array.size:
        array = np.frombuffer(rng.bytes(array.nbytes), dtype).reshape(shape).copy()
        special = rng.random(shape) < 0.3
        if dtype.kind in "mM":
            array[special] = "NaT"
        elif dtype.kind == "f":
            payload = np.uint64(0x7FF8_DEAD_BEEF_0001).view("f8")
            smallest = np.finfo(dtype).smallest_subnormal
            picks = np.array([-0.0, payload, smallest, -np.inf], dtype)
            array[special] = rng.choice(picks, int(special.sum()))
    return array


# A layout makes of values a container, and a function from it to a view with these values.
View = Callable[[np.ndarray], np.ndarray]
Layout = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, View]]


def plain(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    return values, lambda c: c


def fortran(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    return values.T, lambda c: c.T


def permuted(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    order = rng.permutation(values.ndim)
    return values.transpose(order), lambda c: c.transpose(np.argsort(order))


def flipped(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    axes = tuple(int(axis) for axis in np.flatnonzero(rng.integers(0, 2, values.ndim)))
    return np.flip(values, axes), lambda c: np.flip(c, axes)


def stepped(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    steps = [int(step) for step in rng.integers(1, 5, values.ndim)]
    every = tuple(slice(None, None, step) for step in steps)
    lengths = [n * step for n, step in zip(values.shape, steps, strict=True)]
    container = filled(values.dtype, tuple(lengths), rng)
    container[every] = values
    return container, lambda c: c[every]


def repeated(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    axis = int(rng.integers(values.ndim))
    one = values[(slice(None),) * axis + (slice(0, 1),)]
    return one, lambda c: np.broadcast_to(c, values.shape, subok=True)


def windows(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    axis = int(rng.integers(values.ndim))
    width = min(2, values.shape[axis])
    slide = np.lib.stride_tricks.sliding_window_view
    return values, lambda c: slide(c, width, axis=axis, subok=True)


def unaligned(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    raw = np.frombuffer(b"x" + values.tobytes(), np.uint8)
    return raw, lambda c: c[1:].view(values.dtype).reshape(values.shape)


def field(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, View]:
    record = np.dtype([("before", "i1"), ("value", values.dtype), ("after", "V40")])
    container = np.zeros(values.shape, record)
    container["value"] = values
    return container, lambda c: c["value"]


OUTER: list[Layout] = [plain, fortran, permuted, flipped, stepped]
INNER: list[Layout] = [*OUTER, repeated, windows, unaligned, field]
PLACES = ["memory", "r", "r+", "c"]


@dataclass
class Sample:
    """An array and how it was made."""

    container: np.ndarray
    view: View
    layouts: tuple[str, ...]
    place: str

    def __repr__(self) -> str:
        array = self.view(self.container)
        return f"<{array.dtype} {array.shape} {'/'.join(self.layouts)} in {self.place}>"

    @contextmanager
    def array(self) -> Iterator[np.ndarray]:
        """Open the array, in memory or over a file that exists within the block."""
        if self.place == "memory" or self.container.nbytes == 0:
            yield self.view(self.container)
            return
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.container.tobytes())
            file.flush()
            mode: Any = self.place
            yield self.view(
                np.memmap(file.name, self.container.dtype, mode, shape=self.container.shape)
            )


@st.composite
def samples(
    draw: st.DrawFn, dtypes: list[np.dtype] = DTYPES, *, max_side: int = 5, min_dims: int = 1
) -> Sample:
    """Draw arrays of 1 to 4 axes (5 for windows), some without items, in any layout and place."""
    shape = draw(st.lists(st.integers(0, max_side), min_size=min_dims, max_size=4))
    longest = draw(st.integers(0, len(shape) - 1))
    shape[longest] = draw(st.integers(0, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inner = draw(st.sampled_from(INNER))
    # Bytes can be viewed as another dtype only if they are contiguous.
    outer = plain if inner is unaligned else draw(st.sampled_from(OUTER))
    middle, show_inner = inner(filled(draw(st.sampled_from(dtypes)), tuple(shape), rng), rng)
    container, show_outer = outer(middle, rng)
    return Sample(
        np.ascontiguousarray(container),
        lambda c: show_inner(show_outer(c)),
        (inner.__name__, outer.__name__),
        draw(st.sampled_from(PLACES)),
    )


def chunksizes() -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(1, 25)


def axes_of(array: np.ndarray) -> st.SearchStrategy[int]:
    return st.integers(-array.ndim, array.ndim - 1)


# Scripts: for faults of a whole program, and for definitions in `__main__`.


def start_script(
    folder: Path, code: str, *arguments: str, prefix: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start a script as its own program, in its own session."""
    path = folder / "script.py"
    path.write_text(code, encoding="utf-8")
    return subprocess.Popen(
        [*prefix, sys.executable, str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def run_script(folder: Path, code: str, *arguments: str, **options: Any) -> str:
    """Run a script, which must succeed, and return its output."""
    process = start_script(folder, code, *arguments, **options)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    return out

"""Numba kernels in threads: fused loops against serial loops, ``prange`` and ``guvectorize``.

Numba has one threading layer for each process, so what is compared with its own threads runs in a
process for each layer.

Each arm makes ten Mandelbrot calls in a row. Single calls in turns measured more of the arm before:
OpenMP's threads spin for some milliseconds after a loop, and after other threads Linux has put both
of ours on one of two cores for the first 4 to 8 ms of 13 (as `sched_getcpu` showed; a pause between
the arms made it worse). Under ``omp`` the documented form over ours was 1.11 (0.77
to 1.88) in single calls, and 1.15 (1.13 to 1.17) with ten in a row.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

import taskcarrier
from bench import ours
from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare, repeated

N_JOBS = 2
LAYERS = ("omp", "workqueue", "tbb")
SERIAL = "serial jitted loop"
OURS = {balance: f"ours {balance}" for balance in ours.BALANCES}


@numba.njit
def steps(count: int) -> float:
    """Do `count` dependent divisions: about 2.5 ns each, nothing to vectorise, no memory."""
    x = 1.0
    for _ in range(count):
        x = 1.0 + 1.0 / x
    return x


@numba.njit
def steps_serial(counts: Any) -> Any:
    """Do the steps in a serial loop, which everything is measured against."""
    out = np.empty(len(counts))
    for i in range(len(counts)):
        out[i] = steps(counts[i])
    return out


@numba.njit(parallel=True)
def steps_prange(counts: Any) -> Any:
    """Do the steps in the same loop, shared out by numba."""
    out = np.empty(len(counts))
    for i in numba.prange(len(counts)):
        out[i] = steps(counts[i])
    return out


def _steps_row(count: Any, out: Any) -> None:
    out[0] = steps(count)


@numba.njit
def escape(x: float, y: float, limit: int) -> int:
    """Count the steps until a point of the Mandelbrot set's plane escapes; 255 if it does not."""
    z = 0.0j
    for i in range(limit):
        z = z * z + complex(x, y)
        if z.real * z.real + z.imag * z.imag >= 4:  # the radius is 2
            return i
    return 255


@numba.njit
def mandelbrot_row(y: float, xs: Any, limit: int, out: Any) -> None:
    """Compute one row of the picture."""
    for j in range(len(xs)):
        out[j] = escape(xs[j], y, limit)


@numba.njit(parallel=True)
def mandelbrot_prange(ys: Any, xs: Any, limit: int) -> Any:
    """Compute the picture as in numba's documentation: the outer loop, over columns, by ``prange``.

    The half of the columns with more work has 1.20 times the mean's steps (8.19 of 13.64 million
    with 1000 x 1500 points and 20 steps at most). So with two threads, nothing that takes the same
    time for a step can be more than 1.20 times faster.
    """
    out = np.empty((len(ys), len(xs)), np.uint8)
    for j in numba.prange(len(xs)):
        for i in range(len(ys)):
            out[i, j] = escape(xs[j], ys[i], limit)
    return out


@numba.njit(parallel=True)
def mandelbrot_rows(ys: Any, xs: Any, limit: int) -> Any:
    """Compute the picture by rows, of which the first half is the mirror image of the second."""
    out = np.empty((len(ys), len(xs)), np.uint8)
    for i in numba.prange(len(ys)):
        mandelbrot_row(ys[i], xs, limit, out[i])
    return out


@numba.njit
def mandelbrot_serial(ys: Any, xs: Any, limit: int) -> Any:
    """Compute the picture on one core."""
    out = np.empty((len(ys), len(xs)), np.uint8)
    for i in range(len(ys)):
        mandelbrot_row(ys[i], xs, limit, out[i])
    return out


def run(settings: Settings) -> list[Comparison]:
    """Measure once what does not depend on the threading layer, and the rest for each layer."""
    found = [_cheap(settings), _short(settings), _empty(settings), _recipe(settings)]
    found.append(_first_call(settings))
    for layer in LAYERS:
        found += _in_layer(layer, settings)
    return found


# Independent of numba's own threads


def _shares(name: str) -> list[Promise]:
    """Return promises about the share of a perfect division between two cores that is reached."""
    least, aim = {"cheap": (0.90, 0.97), "short": (0.90, 0.97), "even": (0.92, 0.98)}[name]
    return [
        Promise(
            SERIAL, arm, least, aim, scale=1 / N_JOBS, label=f"{arm}: share of serial / {N_JOBS}"
        )
        for arm in OURS.values()
    ]


def _mapped(
    stack: ExitStack, kernel: Callable[..., Any], X: np.ndarray, **options: Any
) -> list[Arm]:
    return [
        Arm(
            OURS[balance],
            partial(
                ours.warm_mapper(stack, balance, N_JOBS, "threading").map_items,
                kernel,
                X,
                **options,
            ),
        )
        for balance in ours.BALANCES
    ]


def _cheap(settings: Settings) -> Comparison:
    counts = np.full(settings.pick(full=10**7, quick=10**6, tiny=10**3), 8)
    with ExitStack() as stack:
        arms = [Arm(SERIAL, partial(steps_serial, counts)), *_mapped(stack, steps, counts)]
        return compare(
            f"kernels: {len(counts):,} even items of about 20 ns, default chunksize",
            arms,
            rounds=settings.turns(full=9, quick=3),
            promises=_shares("cheap"),
        )


def _short(settings: Settings) -> Comparison:
    counts = np.full(settings.pick(full=10**6, quick=10**5, tiny=10**2), 400)
    with ExitStack() as stack:
        arms = [
            Arm(SERIAL, partial(steps_serial, counts)),
            *_mapped(stack, steps, counts, chunksize=1),
        ]
        return compare(
            f"kernels: {len(counts):,} even items of about 1 µs, chunksize=1",
            arms,
            rounds=settings.turns(full=9, quick=3),
            promises=_shares("short"),
        )


def _empty(settings: Settings) -> Comparison:
    X = np.zeros(64)
    calls = settings.pick(full=500, quick=100, tiny=2)
    with ExitStack() as stack:
        arms = []
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "threading")
            arms.append(Arm(OURS[balance], repeated(partial(mapper.map_items, _nothing, X), calls)))
        return compare(
            "kernels: a kernel that does nothing on 64 items, in a warm mapper",
            arms,
            rounds=settings.turns(full=11, quick=5),
            promises=[
                Promise(arm, None, 0.25, 0.15, at_most=True, scale=1e3, label=f"{arm}, ms")
                for arm in OURS.values()
            ],
        )


@numba.njit
def _nothing(x: float) -> float:
    return x


@numba.njit("void(double[:],double[:],double[:])", nogil=True)
def documented(result: Any, a: Any, b: Any) -> None:
    """Run the kernel of numba's page about threads."""
    for i in range(len(result)):
        result[i] = math.exp(2.1 * a[i] + 3.2 * b[i])


def documented_chunk(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Run the documented kernel on chunks."""
    result = np.empty_like(a)
    documented(result, a, b)
    return result


def _four_threads(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Run numba's own recipe: a thread for each quarter."""
    n = len(a)
    result = np.empty(n)
    length = (n + 3) // 4
    threads = [
        threading.Thread(
            target=documented,
            args=[array[i * length : (i + 1) * length] for array in (result, a, b)],
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def _recipe(settings: Settings) -> Comparison:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, settings.pick(full=10**6, quick=10**5, tiny=100)))
    calls = settings.pick(full=20, quick=10, tiny=1)
    with ExitStack() as stack:
        arms = [
            Arm("its own 4 threads", repeated(partial(_four_threads, a, b), calls)),
        ]
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, N_JOBS, "threading")
            mapped = partial(mapper.map_array, documented_chunk, a, b, writable=True)
            arms.append(Arm(OURS[balance], repeated(mapped, calls)))
        return compare(
            f"kernels: numba's documented example, {len(a):,} doubles, map_array in threads",
            arms,
            rounds=settings.turns(full=9, quick=3),
            promises=[Promise("its own 4 threads", arm, 1.0, 1.1) for arm in OURS.values()],
        )


def _first_call(settings: Settings) -> Comparison:
    X = np.linspace(0, 1, 64)

    def first() -> Measured:
        kernel = numba.njit(lambda x: math.sqrt(x) + math.sin(x))
        kernel.compile((numba.float64,))  # not counted
        result = taskcarrier.map_items(kernel, X, n_jobs=N_JOBS)
        return Measured(taskcarrier.last_report().compiling, result)

    return compare(
        "kernels: the first call, compile time beyond that of the kernel itself",
        [Arm("fused loop", first)],
        rounds=settings.turns(full=7, quick=3),
        promises=[Promise("fused loop", None, 1.0, 0.4, at_most=True, label="seconds")],
    )


# Against numba's own threads, in a process for each layer


def _in_layer(layer: str, settings: Settings) -> list[Comparison]:
    library = Path(sys.prefix) / "lib"
    if layer == "tbb" and not list(library.glob("libtbb.so*")):
        return []
    environment = {
        **os.environ,
        "NUMBA_THREADING_LAYER": layer,
        "NUMBA_NUM_THREADS": str(N_JOBS),
        "LD_LIBRARY_PATH": str(library),
    }
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder) / "ask", Path(folder) / "answer"
        ask.write_bytes(pickle.dumps(settings))
        subprocess.run(
            [sys.executable, "-m", "bench.kernels", str(ask), str(answer)],
            env=environment,
            check=True,
        )
        found: list[Comparison] = pickle.loads(answer.read_bytes())
    return found


def _against_numba(settings: Settings) -> list[Comparison]:
    layer = _layer()
    n = settings.pick(full=20_000, quick=2_000, tiny=20)
    rising = np.arange(1, n + 1) * 2
    costs = {"even": np.full(n, n), "triangular": rising, "falling": rising[::-1].copy()}
    found = []
    for name, counts in costs.items():
        with ExitStack() as stack:
            arms = [
                Arm(SERIAL, partial(steps_serial, counts)),
                Arm("prange", partial(steps_prange, counts)),
            ]
            if layer == "tbb":
                arms.append(Arm("prange, chunks of 16", _in_chunks(partial(steps_prange, counts))))
            arms.append(Arm("guvectorize", partial(_guvectorized, _gufunc(), counts)))
            arms += _mapped(stack, steps, counts)
            even = name == "even"
            promises = _shares("even") if even else []
            rivals = ["prange"] if even else ["prange", "guvectorize"]
            required, aim = (0.95, 1.0) if even else (1.3, 1.4)
            if layer != "tbb":  # which can share out dynamically: published, not promised
                promises += [
                    Promise(rival, OURS["static" if even else "dynamic"], required, aim)
                    for rival in rivals
                ]
            found.append(
                compare(
                    f"kernels: {n:,} items, {name} cost, threading layer {layer}",
                    arms,
                    rounds=settings.turns(full=7, quick=3),
                    reference=OURS["dynamic"],
                    promises=promises,
                )
            )
    return [*found, _mandelbrot(settings, layer)]


def _layer() -> str:
    steps_prange(np.ones(4, np.int64))
    layer: str = numba.threading_layer()
    return layer


def _gufunc() -> Any:
    return numba.guvectorize(["void(int64, float64[:])"], "()->()", target="parallel")(_steps_row)


def _guvectorized(func: Any, counts: np.ndarray) -> np.ndarray:
    result: np.ndarray = func(counts)
    return result


def _in_chunks(call: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """Return the call with pieces of 16 iterations, which TBB gives to free threads."""

    def run() -> np.ndarray:
        before = numba.set_parallel_chunksize(16)
        try:
            return call()
        finally:
            numba.set_parallel_chunksize(before)

    return run


def _mandelbrot(settings: Settings, layer: str) -> Comparison:
    scale = settings.pick(full=1, quick=5, tiny=50)
    ys = np.linspace(-1, 1, 1000 // scale)
    xs = np.linspace(-2, 1, 1500 // scale)
    limit = 20
    with ExitStack() as stack:
        options = {"args": (xs, limit), "out_shape": len(xs), "dtype": np.uint8}
        by_rows = partial(mandelbrot_rows, ys, xs, limit)
        arms = [
            Arm(SERIAL, partial(mandelbrot_serial, ys, xs, limit)),
            Arm("parallel=True, as documented", partial(mandelbrot_prange, ys, xs, limit)),
            Arm("parallel=True, by rows", by_rows),
        ]
        if layer == "tbb":
            arms.append(Arm("by rows, chunks of 16", _in_chunks(by_rows)))
        arms += _mapped(stack, mandelbrot_row, ys, **options)
        calls = settings.pick(full=10, quick=3, tiny=1)
        return compare(
            f"kernels: Mandelbrot, {len(ys)} x {len(xs)}, by rows, threading layer {layer}",
            [Arm(arm.name, repeated(arm.run, calls)) for arm in arms],
            rounds=settings.turns(full=7, quick=3),
            reference=OURS["dynamic"],
            promises=[Promise("parallel=True, as documented", OURS["dynamic"], 1.2, 1.4)],
        )


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_bytes(pickle.dumps(_against_numba(pickle.loads(asked.read_bytes()))))

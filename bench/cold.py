"""A program's first default call, in a process of its own, against the plain call in another.

Each program imports NumPy and the library and makes its data before its clock starts: what is timed
is the call, with all that the library loads or starts in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare
from bench.work import measure_step

N_JOBS = 2
PROGRAM = """
import time
import numpy as np
from taskcarrier import StaticParallelMapper, map_array
from bench import work
{setup}
begin = time.perf_counter()
result = {call}
print(time.perf_counter() - begin)
import hashlib
print(hashlib.sha256(np.asarray(result).tobytes()).hexdigest())
"""
MAP_ARRAY = f"map_array(work.{{func}}, X, n_jobs={N_JOBS})"
MAP_LIST = f"StaticParallelMapper({N_JOBS}).map(work.{{func}}, X)"
LIST = "[work.{func}(x) for x in X]"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A first call: its function, how ``X`` is made (from ``STEPS`` for Python), and the calls."""

    name: str
    func: str
    setup: str
    steps: float = 0.0  # seconds of Python work, in steps of `work.spin_item`
    ours: str = MAP_ARRAY
    plain: str = "work.{func}(X)"
    is_long: bool = False


STARTS = [
    Start(name="NumPy, 1 ms", func="sqrt_sin", setup="X = np.linspace(0, 1, 100_000)"),
    Start(name="NumPy, 30 ms", func="sqrt_sin", setup="X = np.linspace(0, 1, 3_000_000)"),
    Start(name="Python, 10 ms", func="spin", setup="X = np.full(100, STEPS // 100)", steps=0.01),
    Start(name="Python, 40 ms", func="spin", setup="X = np.full(400, STEPS // 400)", steps=0.04),
    Start(
        name="list, 20 ms",
        func="spin_item",
        setup="X = [STEPS // 100] * 100",
        steps=0.02,
        ours=MAP_LIST,
        plain=LIST,
    ),
    Start(
        name="Python, even, 1 s",
        func="spin",
        setup="X = np.full(1000, STEPS // 1000)",
        steps=1.0,
        is_long=True,
    ),
    Start(
        name="Python, rising, 1.5 s",
        func="spin",
        setup="X = np.linspace(1, STEPS // 500, 1000).astype(int)",
        steps=1.5,
        is_long=True,
    ),
    Start(
        name="list, 2 s",
        func="spin_item",
        setup="X = [STEPS // 200] * 200",
        steps=2.0,
        ours=MAP_LIST,
        plain=LIST,
        is_long=True,
    ),
]


def run(settings: Settings) -> list[Comparison]:
    """Start every program in turn with its plain counterpart."""
    step = measure_step()
    starts = STARTS if settings.scale == "full" else STARTS[1::3]
    return [_study(settings, start, step) for start in starts]


def _study(settings: Settings, start: Start, step: float) -> Comparison:
    seconds = start.steps * settings.pick(full=1.0, quick=0.3, tiny=0.01)
    setup = start.setup.replace("STEPS", str(int(seconds / step)))
    calls = {"plain": start.plain, "default": start.ours}
    programs = {
        name: PROGRAM.format(setup=setup, call=call.format(func=start.func))
        for name, call in calls.items()
    }
    more = "default - plain, ms"
    promise = (
        Promise("default", "plain", required=0.95, aim=0.75, at_most=True)
        if start.is_long
        else Promise("default", "plain", 50, 20, True, scale=1e3, label=more, difference=True)
    )
    return compare(
        f"cold: a program's first call, {start.name}",
        [Arm(name, partial(_start, program)) for name, program in programs.items()],
        rounds=settings.turns(full=7 if start.is_long else 15, quick=3),
        promises=[promise],
    )


def _start(program: str) -> Measured:
    # As in `imports`: without compiled files every program would compile the package again.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, digest = done.stdout.split()
    return Measured(float(seconds), digest)

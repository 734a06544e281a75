"""How much memory a map over a large array needs beyond its input.

Every run has a fresh interpreter of its own. While the map runs, a thread reads every few
milliseconds how much memory this process and its children hold (proportional set size, so shared
pages count once in all) and how much shared memory the machine holds. The amount is the larger of
the two rises, in units of the input. The output is part of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.machine import process_tree
from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare
from bench.work import sqrt_sin

N_JOBS = 2
PAUSE = 0.005  # seconds between two readings; a 256 MB map takes a hundred times as long
ARMS = {
    "plain": "plain NumPy",
    "static": "ours static",
    "dynamic": "ours dynamic",
    "static-cold": "ours static, workers started by the call",
    "dynamic-cold": "ours dynamic, workers started by the call",
    "joblib": "joblib loky",
}


_PAGE_NBYTES = 4096


def run(settings: Settings) -> list[Comparison]:
    """Measure the peak of every arm."""
    if not Path("/proc/self/smaps_rollup").exists():
        print("memory: needs Linux's /proc/<pid>/smaps_rollup, left out")
        return []
    length = settings.pick(full=2**25, quick=2**21, tiny=2**12)
    arms = [Arm(name, partial(_in_fresh_interpreter, key, length)) for key, name in ARMS.items()]
    size = f"{8 * length / 2**20:.3g} MiB"
    return [
        compare(
            f"memory: extra peak of sqrt(c) * sin(c) over {size}, loky, {N_JOBS} jobs",
            arms,
            rounds=settings.turns(full=3, quick=1),
            reference="ours static",
            unit="x input",
            promises=[
                Promise(ARMS[key], None, required=2.35, aim=2.1, at_most=True)
                for key in ("static", "dynamic", "static-cold", "dynamic-cold")
            ],
        )
    ]


def _in_fresh_interpreter(key: str, length: int) -> Measured:
    command = [sys.executable, "-m", "bench.memory", key, str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    # Other programs may give back memory meanwhile and hide a small rise; ratios need some.
    return Measured(max(found["rise"], _PAGE_NBYTES) / found["input"], found["checksum"])


def main() -> None:
    """Measure one arm in this interpreter and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("length", type=int)
    chosen = parser.parse_args()
    X = np.random.default_rng(0).random(chosen.length) * 100
    with ExitStack() as stack:
        call = _call(chosen.arm, stack)
        if not chosen.arm.endswith("cold"):
            call(X[:1024])
        gc.collect()
        with watch() as peak:
            Y = call(X)
    print(json.dumps({"rise": peak.rise, "input": X.nbytes, "checksum": zlib.crc32(Y)}))


def _call(key: str, stack: ExitStack) -> Callable[[np.ndarray], np.ndarray]:
    """Open the arm; each imports only what it needs, or the imports would count as its memory."""
    if key == "plain":
        return sqrt_sin
    if key == "joblib":
        from bench.peers import joblib_loky

        return partial(stack.enter_context(joblib_loky(N_JOBS)), sqrt_sin)
    from bench import ours

    return partial(ours.function(key.removesuffix("-cold"), N_JOBS, "loky"), sqrt_sin)


@dataclass
class Peak:
    """Highest reading so far, less the first one, in bytes."""

    held: int
    shared: int
    rise: int = 0

    def read(self) -> None:
        """Take one reading."""
        rises = (held_by_tree() - self.held, shared_memory() - self.shared)
        self.rise = max(self.rise, *rises)


@contextmanager
def watch() -> Iterator[Peak]:
    """Watch this process and its children until the block ends."""
    peak = Peak(held_by_tree(), shared_memory())
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(PAUSE):
            peak.read()

    thread = threading.Thread(target=look, name="memory-watch")
    thread.start()
    try:
        yield peak
        peak.read()
    finally:
        ended.set()
        thread.join()


def held_by_tree() -> int:
    """Return bytes held by this process and its descendants; shared pages count once in all."""
    return sum(_field(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in process_tree(os.getpid()))


def shared_memory() -> int:
    """Return bytes of shared memory on the whole machine, mapped or not."""
    return _field("/proc/meminfo", "Shmem:")


def _field(path: str, name: str) -> int:
    """Return the value of a ``name: 123 kB`` line in bytes; 0 if the process is gone."""
    for line in _text(Path(path)).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    main()

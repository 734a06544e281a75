"""From one ``.npy`` file to another, by rows: files that are too large to hold in memory.

The files lie in a temporary folder that is removed in the end. Input and outputs stay in the page
cache where there is room, so this is about processors and page faults, not about disks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import taskcarrier
from bench import ours
from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare

N_JOBS = 2
COLUMNS = 512
ROWS = 256  # of a chunk of the serial arms: 1 MiB, as ours has by itself
SERIAL = "serial, np.memmap by chunks"
BEST_OF_OURS = "ours dynamic, threads"
KINDS = {"processes": "loky", "threads": "threading"}


def centred(rows: np.ndarray) -> np.ndarray:
    """Take the mean off each row."""
    return rows - rows.mean(axis=1, keepdims=True)


def run(settings: Settings) -> list[Comparison]:
    """Measure the way from file to file in processes and threads against one thread."""
    rows = settings.pick(full=2**19, quick=2**15, tiny=2**7)
    nbytes = 8 * rows * COLUMNS
    with tempfile.TemporaryDirectory() as folder:
        # The input, the answer that others are compared with, this arm's answer, and the next one.
        if shutil.disk_usage(folder).free < 4 * nbytes:
            print(f"files: needs {4 * nbytes / 2**30:.3g} GiB of temporary files, left out")
            return []
        source, target = Path(folder, "input.npy"), Path(folder, "output.npy")
        _make(source, rows)
        writers: dict[str, Callable[[Path, Path], object]] = {
            SERIAL: _memmap,
            "serial, reads and writes by chunks": _streams,
        }
        promises = []
        for kind, backend in KINDS.items():
            for balance in ours.BALANCES:
                name = f"ours {balance}, {kind}"
                writers[name] = partial(_ours, balance, backend)
                promises.append(Promise(SERIAL, name, required=1.6, aim=1.9))
        return [
            compare(
                f"files: the mean off each row of {COLUMNS} floats, {nbytes / 2**20:,.4g} MiB from "
                f"a .npy file to another, {N_JOBS} jobs",
                [Arm(n, partial(_written, w, source, target)) for n, w in writers.items()],
                rounds=settings.turns(full=5, quick=3),
                reference=BEST_OF_OURS,
                promises=promises,
                notes=["nobody waits for the disk: outputs are in the page cache when time stops"],
            )
        ]


def _written(write: Callable[[Path, Path], object], source: Path, target: Path) -> Measured:
    os.sync()  # this arm shall not pay for what was written before
    begin = time.perf_counter()
    result = write(source, target)
    seconds = time.perf_counter() - begin
    del result
    answer = np.load(target, mmap_mode="r")
    target.unlink()  # it lives as long as the answer
    return Measured(seconds, answer)


def _ours(balance: str, backend: str, source: Path, target: Path) -> np.ndarray:
    return taskcarrier.map_array(
        centred, source, out=target, balance=balance, n_jobs=N_JOBS, backend=backend
    )


def _memmap(source: Path, target: Path) -> np.ndarray:
    X = np.load(source, mmap_mode="r")
    Y = np.lib.format.open_memmap(target, "w+", X.dtype, X.shape)
    # Views of the base class: slices of a memmap cost more.
    rows, results = X.view(np.ndarray), Y.view(np.ndarray)
    for start in range(0, len(rows), ROWS):
        results[start : start + ROWS] = centred(rows[start : start + ROWS])
    return Y


def _streams(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        version = np.lib.format.read_magic(reader)
        assert version == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(reader)
        end = reader.tell()
        reader.seek(0)
        writer.write(reader.read(end))  # the same header
        buffer = np.empty((ROWS, *shape[1:]), dtype)
        for start in range(0, shape[0], ROWS):
            rows = buffer[: min(ROWS, shape[0] - start)]
            reader.readinto(rows.data.cast("B"))
            writer.write(centred(rows).data.cast("B"))


def _make(path: Path, n_rows: int) -> None:
    random = np.random.default_rng(0)
    X = np.lib.format.open_memmap(path, "w+", np.float64, (n_rows, COLUMNS))
    for start in range(0, n_rows, ROWS):
        random.random(out=X[start : start + ROWS].view(np.ndarray))

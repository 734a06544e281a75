"""What the tests of what goes wrong share."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import psutil

import taskcarrier
from taskcarrier import DynamicParallelMapper, StaticParallelMapper, map_array
from tests.faults.functions import pid_chunk
from tests.strategies import PARALLEL, ROOT, start_script

RUNS = [("sequential", "static"), *PARALLEL]
ORDERED = [run for run in RUNS if run[0] == "sequential" or run[1] == "dynamic"]
BALANCES = ["static", "dynamic"]
OF_BALANCE = {"static": StaticParallelMapper, "dynamic": DynamicParallelMapper}


def gone(process):
    """Ended; in a container nobody may be there to bury it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes, seconds):
    deadline = time.monotonic() + seconds
    while not all(gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def running(folder, code, *arguments, ready="ready", **environment):
    """A script that has said it is ready, and the processes below it."""
    process = start_script(folder, code, *arguments, **environment)
    below = []
    try:
        line = process.stdout.readline()
        assert line.strip() == ready, process.communicate(timeout=10)
        below = psutil.Process(process.pid).children(recursive=True)
        yield process, below
    finally:
        for one in [process, *below]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        process.communicate()
        assert all_gone(below, 60)  # until then they may hold locks


def present(missing, n_items):
    """Which items are in none of the missing ranges."""
    there = np.ones(n_items, bool)
    for start, stop in missing:
        there[start:stop] = False
    return there


def worker_pids():
    map_array(pid_chunk, np.arange(2), n_jobs=2, backend="loky", balance="static")
    return [int(worker.name.split()[1]) for worker in taskcarrier.last_report().workers]


def output_of(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

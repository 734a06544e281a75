"""Helpers of the tests of faults."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

import taskcarrier
from taskcarrier import map_array
from tests.faults.functions import pid_chunk
from tests.strategies import ROOT, start_script


def gone(process):
    """Tell whether a process has ended; in a container it may stay a zombie."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes, seconds):
    """Wait for the end of processes, and tell whether it came in time."""
    deadline = time.monotonic() + seconds
    while not all(gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def running(folder, code, *arguments, ready="ready", **environment):
    """Start a script, wait until it is ready, and find the processes below it."""
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
    """Return a mask of the items that are in none of the missing ranges."""
    there = np.ones(n_items, bool)
    for start, stop in missing:
        there[start:stop] = False
    return there


def worker_pids():
    """Return the pids of the two warm workers."""
    map_array(pid_chunk, np.arange(2), n_jobs=2, backend="loky", balance="static")
    return [int(worker.name.split()[1]) for worker in taskcarrier.last_report().workers]


def output_of(code, **environment):
    """Run code in a new interpreter, where warnings are errors, and return its output."""
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


def unshared(*mounts):
    """Return a prefix that runs a command with its own mounts, or None if not permitted."""
    script = " && ".join(["mount --make-rprivate /", *mounts, 'exec "$@"'])
    prefix = ("unshare", "-m", "sh", "-c", script, "sh")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return prefix if tried.returncode == 0 else None


def opened_up(aside):
    """Return mounts that let every user run this Python; `aside` is an empty folder."""
    mounts = []
    needed = {Path(sys.executable).resolve(), Path(np.__file__), ROOT}
    for closed in {one for path in needed for one in path.parents if not one.stat().st_mode & 1}:
        mounts += [f"mount --bind '{closed}' '{aside}'", f"mount -t tmpfs -o mode=755 t '{closed}'"]
        for name in {
            path.relative_to(closed).parts[0] for path in needed if closed in path.parents
        }:
            below = f"'{closed / name}'"
            mounts += [f"mkdir {below}", f"mount --bind '{aside / name}' {below}"]
    return mounts

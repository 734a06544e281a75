"""The machine the benches run on, and what else it is doing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "taskcarrier",
    "numpy",
    "joblib",
    "numba",
    "dask",
    "mpire",
    "scikit-learn",
    "matplotlib",
    "threadpoolctl",
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
    "LOKY_MAX_CPU_COUNT",
)


def machine() -> dict[str, Any]:
    """Return the facts without which a time means nothing."""
    return {
        "cpus": os.cpu_count(),
        "usable cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu": _cpu_name(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def describe_machine(facts: dict[str, Any]) -> str:
    """Return the facts of `machine` in words, for the head of the output."""
    versions = ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items() if version
    )
    threads = " ".join(f"{name}={value}" for name, value in facts["threads"].items())
    load = f"{facts['load'][0]:.1f}" if facts["load"] else "unknown"
    return (
        f"{facts['usable cpus'] or facts['cpus']} cpus ({facts['cpu']}), {facts['system']}\n"
        f"Python {facts['python']}, {versions}\n"
        f"thread variables: {threads or 'none set'}; load before the start: {load}"
    )


def watch_others() -> Callable[[], float | None]:
    """Start watching; return a function that says how many cpus other programs kept busy since.

    It returns None where there is no ``/proc/stat``.
    """
    if not Path("/proc/stat").exists():
        return lambda: None
    begin, busy = time.perf_counter(), _busy_elsewhere()

    def tell() -> float:
        return max(0.0, (_busy_elsewhere() - busy) / (time.perf_counter() - begin))

    return tell


def _busy_elsewhere() -> float:
    """Return cpu seconds since boot of everything but this process and its descendants."""
    user, nice, system, _, _, *rest = _text(Path("/proc/stat")).split("\n", 1)[0].split()[1:9]
    everything = sum(int(ticks) for ticks in (user, nice, system, *rest))
    own = sum(sum(int(t) for t in _stat(pid)[11:15]) for pid in process_tree(os.getpid()))
    return (everything - own) / os.sysconf("SC_CLK_TCK")


def process_tree(root: int) -> list[int]:
    """Return ``root`` and all its descendants (Linux)."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: int(_stat(pid)[1]) for pid in pids}
    found = [root]
    for pid in found:  # grows during the loop
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` from the third on; zeros if the process is gone."""
    # The second field is the command in brackets and may hold spaces and brackets itself.
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["0"] * 50


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"

"""The choice of where a run takes place: pure decisions, each with its reason.

`read_facts` reads the state of the process once; `choose` turns the user's wishes and those
facts into a `Choice`, and can be tested without any worker.
"""

from __future__ import annotations

import _thread
import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from taskcarrier.arguments import check_integer
from taskcarrier.scheduling.gil import GilWaits
from taskcarrier.system import cgroups
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.system.late_imports import is_ending, late_hooks
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.loop import is_in_worker

OWN = ("sequential", "threading", "loky")
"""The backends of our own workers; any other name is one that was registered with joblib."""

# Other words for these. The original's word "multiprocessing", which is joblib's too, means our
# processes.
ALIASES = {"threads": "threading", "processes": "loky", "multiprocessing": "loky"}

BACKENDS = (*OWN, "auto", *ALIASES)


@dataclass(frozen=True)
class Facts:
    """The facts about the process and the call on which the choice depends.

    Attributes
    ----------
    cores : int
        The number of cores this process may use (affinity and cgroup limits count).
    is_in_worker : bool
        Whether the call comes from inside one of our workers.
    is_nested_in_joblib : bool
        Whether the call comes from inside a task of joblib.
    active_backend, active_n_jobs : str or None, int or None
        The backend and n_jobs that an active `joblib.parallel_config` sets.
    is_daemonic : bool
        Whether this process may not have children (a worker of `multiprocessing.Pool`).
    has_gil : bool
        Whether the interpreter has a global lock.
    has_processes : bool
        Whether the platform can run our worker processes.
    has_threads : bool
        Whether Python starts threads (before 3.12.2, not after the main thread has ended).
    """

    cores: int
    is_in_worker: bool = False
    is_nested_in_joblib: bool = False
    active_backend: str | None = None
    active_n_jobs: int | None = None
    is_daemonic: bool = False
    has_gil: bool = True
    has_processes: bool = True
    has_threads: bool = True


@dataclass(frozen=True)
class Choice:
    """The backend and number of workers of a run, with the reason.

    Attributes
    ----------
    backend : str
        ``"sequential"``, ``"threading"`` or ``"loky"``; else the name of a backend that was
        registered with joblib.
    n_jobs : int
        The number of workers, at least 1; 1 exactly for ``"sequential"``. For a backend that was
        registered with joblib, which alone knows its workers, the number that was asked for:
        negative numbers count from all of them.
    reason : str
        Why this backend was chosen.
    begins_in_caller : bool
        Whether the caller begins, and measures whether workers of this backend pay.
    may_use_threads : bool
        Whether the user allows threads for any function, also where processes are the default.
    alone_seconds : float
        The seconds up to which the caller does a run alone, because workers did not help before.
    gil_waits : GilWaits
        What is known of the function from earlier calls; the run adds to it.
    """

    backend: str
    n_jobs: int
    reason: str
    begins_in_caller: bool = False
    may_use_threads: bool = False
    alone_seconds: float = 0.0
    gil_waits: GilWaits = field(default_factory=GilWaits, compare=False, repr=False)


def check_backend(backend: object) -> str | None:
    """Return the user's `backend` in our words; a `ValueError` names the allowed ones."""
    if backend is None:
        return None
    if isinstance(backend, str) and backend in BACKENDS:
        return ALIASES.get(backend, backend)
    others = [name for name in _list_registered() if name not in BACKENDS]
    if not isinstance(backend, str) or backend not in others:
        raise ValueError(
            f"backend must be None or one of {_list_in_words(BACKENDS)}, or for lists a name that "
            f"is registered with joblib (now {_list_in_words(others)}), got {backend!r}"
        )
    return backend


def check_for_arrays(backend: str | None, asked: str = "got ") -> None:
    """Raise a `ValueError` for a backend that only maps over lists; `asked` says who wants it."""
    if backend is not None and backend not in (*OWN, "auto"):
        raise ValueError(
            f"{asked}backend={backend!r}, which maps over arrays cannot use: only our own workers "
            "read and write arrays in place. Map over a list (mapper.map, fit_many), or pass "
            f"backend= as one of {_list_in_words(BACKENDS)}"
        )


def _list_in_words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _list_registered() -> list[str]:
    """Return the names that joblib knows, including those that it loads only on demand."""
    load_joblib()
    from joblib.parallel import BACKENDS as REGISTERED  # noqa: PLC0415  # loaded already
    from joblib.parallel import EXTERNAL_BACKENDS  # noqa: PLC0415  # likewise

    return sorted({*REGISTERED, *EXTERNAL_BACKENDS})


def check_n_jobs(n_jobs: object) -> int | None:
    """Return the user's `n_jobs`; raise if it is neither None nor a non-zero integer."""
    if n_jobs is None:
        return None
    value = check_integer(n_jobs, "n_jobs", "a non-zero integer or None; -1 means all cores")
    if value == 0:
        raise ValueError("n_jobs must not be 0; -1 means all cores, 1 runs in the caller")
    return value


def count_workers(n_jobs: int | None, facts: Facts) -> int:
    """Return the number of workers for `n_jobs`, by joblib's rule for negative numbers.

    None means what joblib's configuration sets, else 1 inside a task of joblib, else all cores.
    """
    n_jobs = _resolve_n_jobs(n_jobs, facts)
    return n_jobs if n_jobs > 0 else max(1, facts.cores + 1 + n_jobs)


def _resolve_n_jobs(n_jobs: int | None, facts: Facts) -> int:
    """Return `n_jobs` as a non-zero integer, with the default in place of None."""
    if n_jobs is None:
        n_jobs = facts.active_n_jobs
    if n_jobs is None:
        n_jobs = 1 if facts.is_nested_in_joblib else -1
    return n_jobs


def choose(
    n_jobs: int | None,
    backend: str | None,
    facts: Facts,
    *,
    releases_gil: str = "",
    own_threads: bool = False,
    lists: bool = False,
    can_begin: bool = False,
) -> Choice:
    """Decide where a run takes place.

    Parameters
    ----------
    n_jobs, backend : int or None, str or None
        The user's wishes, already checked.
    facts : Facts
        The state of the process.
    releases_gil : str
        Why the function is known to run without the interpreter's lock; empty if it is not.
    own_threads : bool
        Whether the function is known to start its own threads (numba's ``parallel=True``).
    lists : bool
        Whether the map is over a list, which any backend that joblib knows can run.
    can_begin : bool
        Whether the caller can begin the run itself.

    >>> choose(None, None, Facts(cores=4)).backend
    'loky'
    >>> choose(3, None, Facts(cores=4), releases_gil="the function releases the GIL").reason
    'the function releases the GIL'
    """
    active = None if backend else _get_configured_backend(facts)
    if not lists:
        check_for_arrays(backend)
        check_for_arrays(active, "joblib's active configuration asks for ")
    wanted = None if backend == "auto" else backend or active
    is_ours = wanted is None or wanted in OWN
    workers = count_workers(n_jobs, facts) if is_ours else _resolve_n_jobs(n_jobs, facts)
    wanted_reason = "asked for" if backend else "joblib's active configuration"
    selected, reason = _select_backend(
        (wanted, wanted_reason), workers, facts, releases_gil, own_threads
    )
    if selected == "loky":
        if not facts.has_processes:
            raise OSError("worker processes need Linux; pass backend='threading'")
        if facts.is_daemonic:
            selected, reason = "sequential", "a daemonic process may not start worker processes"
    if selected == "threading" and not facts.has_threads:
        selected, reason = "sequential", "the program is ending, and Python starts no more threads"
    return Choice(
        selected,
        1 if selected == "sequential" else workers,
        reason,
        begins_in_caller=can_begin and wanted is None and selected != "sequential",
        may_use_threads=backend == "auto",
    )


def _select_backend(
    wish: tuple[str | None, str],
    workers: int,
    facts: Facts,
    releases_gil: str,
    own_threads: bool,
) -> tuple[str, str]:
    """Return a backend and the reason for it: the `wish` if possible, else what suits best."""
    wanted, wanted_reason = wish
    if facts.is_in_worker:
        return "sequential", "called inside a worker"
    if own_threads and wanted != "loky":
        # Under numba's workqueue layer, the process aborts when a second thread enters such a
        # function.
        return "sequential", "parallel=True: one range at a time, on numba's own threads"
    if workers == 1 and wanted != "sequential":
        return "sequential", "n_jobs is 1"
    if wanted is not None:
        return wanted, wanted_reason
    for applies, reason in (
        (bool(releases_gil), releases_gil),
        (not facts.has_gil, "the interpreter has no GIL"),
        (not facts.has_processes, "worker processes need Linux"),
    ):
        if applies:
            return "threading", reason
    return "loky", "the default"


def _get_configured_backend(facts: Facts) -> str | None:
    """Return the backend of an active `joblib.parallel_config`, in our words."""
    return "loky" if facts.active_backend == "multiprocessing" else facts.active_backend


def read_facts(*, follows_joblib: bool = True) -> Facts:
    """Return the state of this process, with joblib's configuration if that is to be followed."""
    if is_in_worker():
        return Facts(cores=1, is_in_worker=True)
    if not _has_cloudpickle():
        load_joblib()  # its copy may be needed
    active_backend, active_n_jobs, nested = (
        _read_joblib_config() if follows_joblib else (None, None, False)
    )
    # Another thread may be importing this module, and then the process is no child of its.
    current_process = getattr(sys.modules.get("multiprocessing.process"), "current_process", None)
    return Facts(
        cores=count_cores(),
        is_nested_in_joblib=nested,
        active_backend=active_backend,
        active_n_jobs=active_n_jobs,
        is_daemonic=current_process is not None and bool(current_process().daemon),
        has_gil=getattr(sys, "_is_gil_enabled", lambda: True)(),
        has_processes=sys.platform == "linux",
        has_threads=not is_ending() or _can_start_threads(),
    )


@functools.cache
def _has_cloudpickle() -> bool:
    return "cloudpickle" in sys.modules or importlib.util.find_spec("cloudpickle") is not None


def _can_start_threads() -> bool:
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError:
        return False
    return True


_import_lock = ModuleLock(forks_wait=True)


def load_joblib() -> None:
    """Import joblib, which takes 45 ms."""
    _load("joblib.parallel")


def load_pickling() -> None:
    """Import what pickles jobs for worker processes."""
    _load("taskcarrier.workers.pickling")


def load_pool() -> None:
    """Import the modules that start worker processes."""
    _load("taskcarrier.workers.processes.pool")


def load_processes() -> None:
    """Import all modules that runs in worker processes need."""
    _load(
        "taskcarrier.workers.processes.pool",
        "multiprocessing.spawn",
        "multiprocessing.resource_tracker",
        "taskcarrier.worker_died",
        "taskcarrier.workers.pickling",
        "taskcarrier.workers.processes.grid_run",
        "taskcarrier.workers.processes.stream_run",
    )


def _load(*modules: str) -> None:
    """Import modules, one thread at a time: joblib's modules import each other in circles.

    A thread that is not interrupted does this, because an import that is cut short leaves modules
    half made. If this thread is inside an import itself, it does this alone: the other thread might
    wait for it.
    """
    if all(map(_loaded.__contains__, modules)):
        return
    if any(map(_is_being_imported, list(sys.modules.values()))):
        _import(modules)
    else:
        run_sheltered(functools.partial(_import, modules))


def _is_being_imported(module: object) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _import(modules: tuple[str, ...]) -> None:
    with _import_lock, late_hooks():
        for module in modules:
            importlib.import_module(module)
            _loaded.add(module)


_loaded: set[str] = set()

_cores: dict[object, int] = {}


def count_cores() -> int:
    """Return how many cores this process may use, by the rule of joblib and all cgroups' quotas.

    `joblib.cpu_count` is no use: it is 1 where joblib can make no semaphore (`/dev/shm` is full or
    missing), and our workers need none; and joblib takes long to import. The count is kept for as
    long as affinity and joblib's own limits stay the same (counting takes 80 µs, most of it reading
    quotas).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    asked = os.environ.get("LOKY_MAX_CPU_COUNT")
    switch = os.environ.get("JOBLIB_MULTIPROCESSING", "1")
    key = (affinity, asked, switch)
    if key not in _cores:
        limits = [os.cpu_count() or 1, affinity, None if asked is None else int(asked)]
        allowed = min(limit for limit in limits if limit is not None)
        quota = cgroups.count_cores()
        if quota != float("inf"):
            allowed = min(allowed, math.ceil(quota))
        _cores[key] = 1 if switch.strip() == "0" else max(1, allowed)
    return _cores[key]


def is_joblib_configured() -> bool:
    """Return whether a `joblib.parallel_config` may be active in this thread."""
    parallel: Any = sys.modules.get("joblib.parallel")
    if parallel is None:
        return False
    default = getattr(parallel, "default_parallel_config", None)
    local = getattr(parallel, "_backend", None)
    return local is None or default is None or getattr(local, "config", default) is not default


def _read_joblib_config() -> tuple[str | None, int | None, bool]:
    """Return backend and n_jobs of an active `joblib.parallel_config`, and if we are nested."""
    if "joblib" not in sys.modules:
        return None, None, False
    load_joblib()  # another thread may be importing it
    from joblib.parallel import get_active_backend  # noqa: PLC0415  # loaded already

    backend, n_jobs = get_active_backend()
    nested = bool(getattr(backend, "nesting_level", 0))
    # joblib does not say whether the backend was set or is its default. But it makes a new default
    # on each request, so the same object twice was set. (Its type says nothing: without semaphores
    # the default is threads.)
    was_set = get_active_backend()[0] is backend
    if not was_set and not _requires_threads():
        return None, n_jobs, nested
    return _get_joblib_name(backend), n_jobs, nested


def _requires_threads() -> bool:
    """Return whether joblib's configuration requires shared memory, which only threads have."""
    from joblib.parallel import get_active_backend  # noqa: PLC0415  # loaded already

    try:
        # A preference only changes a default, but one that contradicts a requirement is an error.
        get_active_backend(prefer="processes")
    except ValueError:
        return True
    return False


def _get_joblib_name(backend: object) -> str:
    from joblib.parallel import BACKENDS as REGISTERED  # noqa: PLC0415  # loaded already

    for name, kind in REGISTERED.items():
        if type(backend) is kind:
            return str(name)
    kind_name = type(backend).__name__
    return "sequential" if kind_name == "SequentialBackend" else kind_name

"""Where a run takes place: pure decisions, each with its reason.

`facts_now` reads the state of the process once; `choose` turns the user's wishes and those
facts into a `Choice`, and can be tested without any worker.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import importlib
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from taskcarrier.arguments import check_integer
from taskcarrier.system import cgroups
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import run_sheltered
from taskcarrier.system.locks import ModuleLock
from taskcarrier.workers.loop import is_in_worker

OWN = ("sequential", "threading", "loky")
"""Where our own workers run; any other name is one that was registered with joblib."""

# Other words for these; the original's word, which is joblib's too, means our processes.
_ALIASES = {"threads": "threading", "processes": "loky", "multiprocessing": "loky"}

BACKENDS = (*OWN, *_ALIASES)


@dataclass(frozen=True)
class Facts:
    """What the process and the call bring along.

    Attributes
    ----------
    cores : int
        Cores this process may use (affinity and cgroup limits count).
    is_in_worker : bool
        Whether the call comes from inside a worker of ours.
    nested_in_joblib : bool
        Whether it comes from inside a task of joblib.
    active_backend, active_n_jobs : str or None, int or None
        What an active `joblib.parallel_config` sets.
    daemonic : bool
        Whether this process may not have children (a worker of `multiprocessing.Pool`).
    has_gil : bool
        Whether the interpreter has a global lock.
    has_processes : bool
        Whether the platform can run our worker processes.
    has_threads : bool
        Whether Python starts threads (before 3.12.2 no more once the main thread has ended).
    """

    cores: int
    is_in_worker: bool = False
    nested_in_joblib: bool = False
    active_backend: str | None = None
    active_n_jobs: int | None = None
    daemonic: bool = False
    has_gil: bool = True
    has_processes: bool = True
    has_threads: bool = True


@dataclass(frozen=True)
class Choice:
    """How many workers, where, and why.

    Attributes
    ----------
    backend : str
        ``"sequential"``, ``"threading"`` or ``"loky"``; else the name of a backend that was
        registered with joblib.
    n_jobs : int
        Workers, at least 1; 1 exactly for ``"sequential"``. Where the backend is a registered one,
        which alone knows its workers, what was asked for: negative numbers count from all of them.
    reason : str
        Why this backend.
    """

    backend: str
    n_jobs: int
    reason: str


def check_backend(backend: object) -> str | None:
    """`backend` as the user may pass it; a `ValueError` names the allowed words."""
    if backend is None:
        return None
    if isinstance(backend, str) and backend in BACKENDS:
        return _ALIASES.get(backend, backend)
    others = [name for name in _check_registered() if name not in BACKENDS]
    if not isinstance(backend, str) or backend not in others:
        raise ValueError(
            f"backend must be None or one of {_list_in_words(BACKENDS)}, or for lists a name that is "
            f"registered with joblib (now {_list_in_words(others)}), got {backend!r}"
        )
    return backend


def check_for_arrays(backend: str | None, asked: str = "got ") -> None:
    """A `ValueError` for a backend that can map over lists only; `asked` says who wants it."""
    if backend is not None and backend not in OWN:
        raise ValueError(
            f"{asked}backend={backend!r}, which maps over arrays cannot use: only our own workers "
            "read and write arrays in place. Map over a list (mapper.map, fit_many), or pass "
            f"backend= as one of {_list_in_words(BACKENDS)}"
        )


def _list_in_words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _check_registered() -> list[str]:
    """Names that joblib knows, those among them that it loads when they are asked for."""
    load_joblib()
    from joblib.parallel import BACKENDS as REGISTERED  # noqa: PLC0415  # loaded already
    from joblib.parallel import EXTERNAL_BACKENDS  # noqa: PLC0415  # likewise

    return sorted({*REGISTERED, *EXTERNAL_BACKENDS})


def check_n_jobs(n_jobs: object) -> int | None:
    """`n_jobs` as the user may pass it: None or a non-zero integer."""
    if n_jobs is None:
        return None
    value = check_integer(n_jobs, "n_jobs", "a non-zero integer or None; -1 means all cores")
    if value == 0:
        raise ValueError("n_jobs must not be 0; -1 means all cores, 1 runs in the caller")
    return value


def count_workers(n_jobs: int | None, facts: Facts) -> int:
    """Workers for an `n_jobs`: joblib's rule for negative numbers, all cores for None."""
    n_jobs = _get_wish(n_jobs, facts)
    return n_jobs if n_jobs > 0 else max(1, facts.cores + 1 + n_jobs)


def _get_wish(n_jobs: int | None, facts: Facts) -> int:
    """An `n_jobs` as it is asked for here: a non-zero integer."""
    if n_jobs is None:
        n_jobs = facts.active_n_jobs
    if n_jobs is None:
        n_jobs = 1 if facts.nested_in_joblib else -1
    return n_jobs


def choose(
    n_jobs: int | None,
    backend: str | None,
    facts: Facts,
    *,
    releases_gil: str = "",
    own_threads: bool = False,
    lists: bool = False,
) -> Choice:
    """Decide where a run takes place.

    Parameters
    ----------
    n_jobs, backend : int or None, str or None
        The user's wishes, already checked.
    facts : Facts
        The state of the process.
    releases_gil : str
        What is known to run without the interpreter's lock, in words; nothing if that is not known.
    own_threads : bool
        Whether it is known to start threads of its own (numba's ``parallel=True``).
    lists : bool
        Whether the map is over a list, for which any backend will do that joblib knows.

    >>> choose(None, None, Facts(cores=4))
    Choice(backend='loky', n_jobs=4, reason='the default')
    >>> choose(3, None, Facts(cores=4), releases_gil="the function releases the GIL").reason
    'the function releases the GIL'
    """
    active = None if backend else _follow_config(facts)
    if not lists:
        check_for_arrays(backend)
        check_for_arrays(active, "joblib's active configuration asks for ")
    wanted = backend or active
    is_ours = wanted is None or wanted in OWN
    workers = count_workers(n_jobs, facts) if is_ours else _get_wish(n_jobs, facts)
    why = "asked for" if backend else "joblib's active configuration"
    where, reason = _where((wanted, why), workers, facts, releases_gil, own_threads)
    if where == "loky":
        if not facts.has_processes:
            raise OSError("worker processes need Linux; pass backend='threading'")
        if facts.daemonic:
            where, reason = "sequential", "a daemonic process may not start worker processes"
    if where == "threading" and not facts.has_threads:
        where, reason = "sequential", "the program is ending, and Python starts no more threads"
    return Choice(where, 1 if where == "sequential" else workers, reason)


def _where(
    asked: tuple[str | None, str],
    workers: int,
    facts: Facts,
    releases_gil: str,
    own_threads: bool,
) -> tuple[str, str]:
    """The backend that is wanted, and why: what is asked for, else what suits best."""
    wanted, why = asked
    if facts.is_in_worker:
        return "sequential", "called inside a worker"
    if own_threads and wanted != "loky":
        # Under numba's workqueue layer a second thread that enters one aborts the process.
        return "sequential", "parallel=True: one range at a time, on numba's own threads"
    if workers == 1 and wanted != "sequential":
        return "sequential", "n_jobs is 1"
    if wanted is not None:
        return wanted, why
    for applies, reason in (
        (bool(releases_gil), releases_gil),
        (not facts.has_gil, "the interpreter has no GIL"),
        (not facts.has_processes, "worker processes need Linux"),
    ):
        if applies:
            return "threading", reason
    return "loky", "the default"


def _follow_config(facts: Facts) -> str | None:
    """The backend of an active `joblib.parallel_config`, in our words."""
    return "loky" if facts.active_backend == "multiprocessing" else facts.active_backend


def facts_now(*, follows_joblib: bool = True) -> Facts:
    """The state of this process; of joblib's configuration only if it is to be followed."""
    if is_in_worker():
        return Facts(cores=1, is_in_worker=True)
    load_joblib()
    active_backend, active_n_jobs, nested = (
        _joblib_config() if follows_joblib else (None, None, False)
    )
    multiprocessing = sys.modules.get("multiprocessing")
    return Facts(
        cores=count_cores(),
        nested_in_joblib=nested,
        active_backend=active_backend,
        active_n_jobs=active_n_jobs,
        daemonic=multiprocessing is not None and bool(multiprocessing.current_process().daemon),
        has_gil=getattr(sys, "_is_gil_enabled", lambda: True)(),
        has_processes=sys.platform == "linux",
        has_threads=not _is_ending() or _starts_threads(),
    )


def _is_ending() -> bool:
    """Whether the main thread has ended, or is waiting for the others to end."""
    return bool(threading._SHUTTING_DOWN)  # type: ignore[attr-defined]  # no public way


def _starts_threads() -> bool:
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError:
        return False
    return True


_loading = ModuleLock(forks_wait=True)


def load_joblib() -> None:
    """Import joblib, which takes 140 ms; only runs need it."""
    _load("joblib.parallel")


def load_processes() -> None:
    """Import what worker processes need."""
    _load("taskcarrier.workers.pickling", "taskcarrier.workers.processes.pool")


def _load(*modules: str) -> None:
    """Import modules, one thread at a time: those of joblib import each other in circles.

    This is done in a thread that is not interrupted, because an import that is cut short leaves
    modules half made. Where this thread is inside an import itself, the other might wait for it.
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
    with _loading, _late_hooks():
        for module in modules:
            importlib.import_module(module)
            _loaded.add(module)


_loaded: set[str] = set()


@contextmanager
def _late_hooks() -> Iterator[None]:
    """Have modules loaded that joblib needs, also by a thread that outlives the main thread.

    From then on Python takes no hooks of executors that end their threads, and their modules cannot
    be imported. What is registered here is called when all threads of the program have ended.
    """
    register = threading._register_atexit  # type: ignore[attr-defined]  # no public way
    if not _is_ending():
        yield
        return
    threading._register_atexit = atexit.register  # type: ignore[attr-defined]  # likewise
    try:
        yield
    finally:
        threading._register_atexit = register  # type: ignore[attr-defined]  # likewise


_cores: dict[object, int] = {}


def count_cores() -> int:
    """Cores this process may use, as loky counts them, and by the quotas of all its cgroups.

    Not by `joblib.cpu_count`: that is 1 where joblib can make no semaphore (`/dev/shm` is full, or
    not there), which our workers do not need. Kept for as long as affinity and joblib's own limits
    stay the same (counting takes 80 µs, most of it reading quotas).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    switch = os.environ.get("JOBLIB_MULTIPROCESSING", "1")
    key = (affinity, os.environ.get("LOKY_MAX_CPU_COUNT"), switch)
    if key not in _cores:
        from joblib.externals.loky import cpu_count  # noqa: PLC0415  # takes 140 ms, for runs only

        quota = cgroups.cores()
        allowed = cpu_count() if quota == float("inf") else min(cpu_count(), math.ceil(quota))
        _cores[key] = 1 if switch.strip() == "0" else max(1, allowed)
    return _cores[key]


def _joblib_config() -> tuple[str | None, int | None, bool]:
    """Backend and n_jobs of an active `joblib.parallel_config`, and whether we are nested."""
    if "joblib" not in sys.modules:
        return None, None, False
    from joblib.parallel import get_active_backend  # noqa: PLC0415  # loaded already

    backend, n_jobs = get_active_backend()
    nested = bool(getattr(backend, "nesting_level", 0))
    # joblib does not say whether the backend was set or is its default, but it makes its default
    # for everybody who asks. (Its kind does not tell: without semaphores the default is threads.)
    was_set = get_active_backend()[0] is backend
    if not was_set and not _requires_threads():
        return None, n_jobs, nested
    return _joblib_name(backend), n_jobs, nested


def _requires_threads() -> bool:
    """Whether joblib's configuration requires shared memory, which only threads have."""
    from joblib.parallel import get_active_backend  # noqa: PLC0415  # loaded already

    try:
        # What is preferred changes only a default; but what contradicts is an error.
        get_active_backend(prefer="processes")
    except ValueError:
        return True
    return False


def _joblib_name(backend: object) -> str:
    from joblib.parallel import BACKENDS as REGISTERED  # noqa: PLC0415  # loaded already

    for name, kind in REGISTERED.items():
        if type(backend) is kind:
            return str(name)
    kind_name = type(backend).__name__
    return "sequential" if kind_name == "SequentialBackend" else kind_name

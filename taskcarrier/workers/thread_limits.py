"""One thread inside each worker, so that all together are no more than the workers.

Worker processes are born with the usual environment variables set to one. Threads, and the
caller where it maps itself, share one process, so there one counted guard limits BLAS while any
run is open: the first caller saves and limits, the last one restores (each restoring its own
would leave a limit behind when two overlap). OpenBLAS's limit holds for the whole process while
it lasts, the caller's own threads included. Limits on OpenMP and on numba's threads hold only in
the thread that sets them: workers that are threads do so for themselves, for good.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Holder, Holders
from taskcarrier.system.locks import ModuleLock

_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


# Threads that libraries may use inside a worker, and in the caller while it maps. Not the cores'
# share of each worker: BLAS sums up in another order with another number of threads, so results
# would depend on n_jobs.
INNER_THREADS = 1


def inner_environment() -> dict[str, str]:
    """Environment of a worker process.

    What the user has set for this process does not count there: results would depend on it.
    """
    return dict.fromkeys(_VARIABLES, str(INNER_THREADS))


class _CountedLimit:
    """One limit on BLAS threads for all runs of this process that overlap."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._runs = Holders()  # those that are open
        self._is_on = False
        self._limited: dict[int, tuple[Any, int]] = {}  # libraries, and what they are set to again
        self._controller: Any = None
        self._n_modules = -1
        self._generation = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        generation, run = self._generation, Holder()
        try:
            with self._lock:
                # Entered first: another run of this thread may begin and end while it is put on.
                self._runs.add(run)
                if not self._is_on:
                    self._put_on()
                    self._is_on = True
            yield
        finally:
            if generation == self._generation:  # else this is a forked child, see `restart`
                with self._lock:
                    self._runs.discard(run)
                    if not self._runs:
                        self._is_on = False
                        self._lift()

    def _put_on(self) -> None:
        # Not by the controller's own `limit`: it asks every library for everything it knows, which
        # takes 15 µs of a call that takes 0.2 ms in all.
        for library in self.find_libraries().lib_controllers:
            before = library.get_num_threads() if library.user_api == "blas" else None
            if before is not None and before != INNER_THREADS:
                # Written down first; and gone from there last, or an exception that comes between
                # leaves the limit on for ever.
                self._limited[id(library)] = library, before
                _limit(library, INNER_THREADS)

    def _lift(self) -> None:
        for key, (library, before) in self._limited.copy().items():
            _limit(library, before)
            self._limited.pop(key, None)  # another run of this thread may have come between

    def restart(self) -> None:
        """In a forked child: the runs are its parent's."""
        self._generation += 1
        if self._runs:
            self._runs = Holders()
            self._is_on = False
            self._lift()

    def find_libraries(self) -> Any:
        """The libraries with threads of their own that are loaded now."""
        # Looking for libraries takes 0.7 ms; again only when modules were loaded since.
        if self._n_modules != len(sys.modules):
            from threadpoolctl import ThreadpoolController  # noqa: PLC0415  # runs only

            self._controller = ThreadpoolController()
            self._n_modules = len(sys.modules)
        return self._controller


def _limit(library: Any, n_threads: int) -> None:
    """Set the number of threads of a library, whichever thread asks.

    From threadpoolctl 3.8 on, the thread that limits OpenBLAS first is the only one whose limits
    count until it gives this up, and who does is asked under a lock that a signal handler in the
    same thread would wait for. But the last run to end may belong to another thread, and a run may
    begin in a signal handler.
    """
    getattr(library, "_real_set_num_threads", library.set_num_threads)(n_threads)


limited = _CountedLimit()
"""The process's guard: ``with limited.open():``."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=limited.restart)


class _OwnLimits(threading.local):
    """What a worker that is a thread has limited for itself."""

    n_modules = -1


_own = _OwnLimits()


def limit_this_thread() -> None:
    """One thread of OpenMP and of numba for what this thread, a worker, calls from now on.

    Both count for the thread that says so. Asked again when modules were loaded since.
    """
    if _own.n_modules == len(sys.modules):
        return
    _own.n_modules = len(sys.modules)
    for library in limited.find_libraries().lib_controllers:
        if library.user_api == "openmp":
            library.set_num_threads(INNER_THREADS)
    parallel: Any = sys.modules.get("numba.np.ufunc.parallel")
    # Before it has started its threads, to ask numba about them would start them.
    if parallel is not None and parallel._is_initialized:
        parallel.set_num_threads(INNER_THREADS)


def serial_joblib() -> None:
    """Make joblib serial in this thread, for as long as the thread lives."""
    if "joblib" in sys.modules:
        import joblib  # noqa: PLC0415  # loaded already

        joblib.parallel_config(backend="sequential", n_jobs=1)

"""Limits on the threads of libraries: one thread inside each worker, so no more than workers.

Worker processes start with the usual environment variables set to one. Threads, and the caller
when it maps itself, share one process. There one counted guard limits BLAS while any run is open:
the first run saves and limits, the last one restores (if each restored its own, a limit would be
left behind when two overlap). OpenBLAS's limit holds for the whole process while it lasts, the
caller's own threads included. Limits on OpenMP and on numba's threads hold only in the thread that
sets them: workers that are threads set them for themselves, for good.
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


# The number of threads that libraries may use inside a worker, and in the caller while it maps. It
# is not each worker's share of the cores: BLAS sums in a different order with a different number of
# threads, so results would depend on n_jobs.
INNER_THREADS = 1


def make_worker_environment() -> dict[str, str]:
    """Return the environment variables that limit threads in a worker process.

    What the user has set for this process does not count, or results would depend on it.
    """
    return dict.fromkeys(_VARIABLES, str(INNER_THREADS))


class _CountedLimit:
    """One limit on BLAS threads for all runs of this process that overlap."""

    def __init__(self) -> None:
        self._lock = ModuleLock()
        self._runs = Holders()  # the open ones
        self._is_on = False
        self._saved: dict[int, tuple[Any, int]] = {}  # libraries, and the number to restore
        self._controller: Any = None
        self._n_modules = -1
        self._generation = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        generation, run = self._generation, Holder()
        try:
            with self._lock:
                # Add the run first: while the limit is set, another run of this thread may begin
                # and end.
                self._runs.add(run)
                if not self._is_on:
                    self._set_limits()
                    self._is_on = True
            yield
        finally:
            if generation == self._generation:  # else this is a forked child: see `restart`
                with self._lock:
                    self._runs.discard(run)
                    if not self._runs:
                        self._is_on = False
                        self._restore_limits()

    def _set_limits(self) -> None:
        # The controller's own `limit` is slower: it asks every library for everything it knows,
        # which takes 15 µs of a call that takes 0.2 ms in all.
        for library in self.find_libraries().lib_controllers:
            before = library.get_num_threads() if library.user_api == "blas" else None
            if before is not None and before != INNER_THREADS:
                # Save this before limiting, and remove it after restoring: otherwise an exception
                # in between would leave the limit on for ever.
                self._saved[id(library)] = library, before
                _set_num_threads(library, INNER_THREADS)

    def _restore_limits(self) -> None:
        for key, (library, before) in self._saved.copy().items():
            _set_num_threads(library, before)
            self._saved.pop(key, None)  # another run of this thread may have done so

    def restart(self) -> None:
        """Forget the open runs, in a forked child: they are its parent's."""
        self._generation += 1
        if self._runs:
            self._runs = Holders()
            self._is_on = False
            self._restore_limits()

    def find_libraries(self) -> Any:
        """Return the loaded libraries that have threads of their own."""
        # Looking for libraries takes 0.7 ms, so look again only when modules were loaded since.
        if self._n_modules != len(sys.modules):
            from threadpoolctl import ThreadpoolController  # noqa: PLC0415  # runs only

            self._controller = ThreadpoolController()
            self._n_modules = len(sys.modules)
        return self._controller


def _set_num_threads(library: Any, n_threads: int) -> None:
    """Set the number of threads of a library, from any thread.

    From threadpoolctl 3.8 on, only limits by the thread that first limited OpenBLAS count, until it
    gives this up. Which thread that is, is asked under a lock that a signal handler in the same
    thread would wait for. But the last run to end may belong to another thread, and a run may begin
    in a signal handler.
    """
    getattr(library, "_real_set_num_threads", library.set_num_threads)(n_threads)


thread_limit = _CountedLimit()
"""The guard of this process: ``with thread_limit.open():``."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=thread_limit.restart)


class _OwnLimits(threading.local):
    """The limits that a worker thread has set for itself."""

    n_modules = -1
    is_joblib_serial = False


_own = _OwnLimits()


def limit_this_thread() -> None:
    """Limit OpenMP and numba to one thread in this thread, a worker, from now on.

    Both limits hold for the thread that sets them. Called again, this does something only if
    modules were loaded since.
    """
    if _own.n_modules == len(sys.modules):
        return
    _own.n_modules = len(sys.modules)
    for library in thread_limit.find_libraries().lib_controllers:
        if library.user_api == "openmp":
            library.set_num_threads(INNER_THREADS)
    parallel: Any = sys.modules.get("numba.np.ufunc.parallel")
    # Before numba has started its threads, asking it about them would start them.
    if parallel is not None and parallel._is_initialized:
        parallel.set_num_threads(INNER_THREADS)


def make_joblib_serial() -> None:
    """Make joblib serial in this thread, for as long as the thread lives, if it is loaded."""
    if "joblib" in sys.modules and not _own.is_joblib_serial:
        import joblib  # noqa: PLC0415  # loaded already

        joblib.parallel_config(backend="sequential", n_jobs=1)
        _own.is_joblib_serial = True

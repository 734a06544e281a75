"""The pools of this process: lent to runs, kept warm in between, and ended when idle.

One pool serves one run at a time; runs that overlap (from several threads of the program) get
different pools. A keeper thread ends a pool that was not used for `IDLE_SECONDS`, unless a mapper's
``with`` block is open. A forked child starts without pools.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, cast

from taskcarrier.memory import parent_memory
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import Holder, Holders, run_sheltered
from taskcarrier.system.locks import Lock
from taskcarrier.workers.choose import load_pool, load_processes
from taskcarrier.workers.threads import ThreadPool

if TYPE_CHECKING:
    from taskcarrier.workers.processes.pool import ProcessPool

    Pool = ThreadPool | ProcessPool

# As long as joblib keeps idle workers.
IDLE_SECONDS = 300.0

# Backend, number of workers, whether they can read the caller's memory, and the user they run as.
_Key = tuple[str, int, bool, tuple[int, ...]]


class _Lease:
    """A lease of a pool, for as long as this object lives: ``with lease as pool:``."""

    place: _Place

    def __enter__(self) -> Pool:
        return self.place.pool

    def __exit__(self, *_: object) -> None:
        self.place.lease = _FREE
        self.place.used = time.monotonic()
        _pools.end_unless_kept(self.place)


class _Place:
    """A pool, with a weak reference to its lease, which counts for as long as the lease lives."""

    def __init__(self, key: _Key, pool: Pool) -> None:
        self.key = key
        self.pool = pool
        self.lease = _FREE
        self.used = time.monotonic()
        self._lock = Lock()

    def runs_as_another(self, user: tuple[int, ...]) -> bool:
        """Return whether the pool's workers run as a user other than `user`."""
        return self.key[3] not in {(), user}

    @property
    def was_lost(self) -> bool:
        """Whether the lease is gone although the pool was not given back."""
        return self.lease is not _FREE and self.lease() is None

    def lend(self, on_lost: Callable[[object], None]) -> _Lease | None:
        """Return a lease of the pool if it is free. If the lease gets lost, `on_lost` is called.

        `on_lost` must be C code.
        """
        before = self.lease
        if before() is not None:
            return None
        lease = _Lease()
        lease.place = self
        reference = weakref.ref(lease, on_lost)
        with self._lock:  # no calls in here, so not even a signal handler can come in between
            is_free = self.lease is before
            if is_free:
                self.lease = reference
        return lease if is_free else None


_FREE = weakref.ref(_Lease())
"""A dead reference, in place of the lease of a pool that was given back."""
_PERMANENT_LEASE = _Lease()
"""The lease of pools that have ended, so that they are never lent again."""


class _Pools:
    """All pools, lent or not.

    A pool is added in the thread that makes it, and removed in the thread that ends it; no
    exception from outside can come in either. A pool is free if its lease was given back or is
    gone. So no pool can get lost, wherever the caller is interrupted.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._warm_holders = Holders()
        self._keeper: threading.Thread | None = None
        self._keeper_inbox: SimpleQueue[object] = SimpleQueue()  # an entry makes it look again
        self._keeper_is_idle = threading.Event()  # it ends no pool now
        self._keeper_lock = threading.Lock()  # only in threads that are not interrupted

    def take(self, key: _Key) -> _Lease:
        while True:
            for place in sorted(self._places, key=_last_used, reverse=True):
                if place.key == key and (lease := place.lend(self._keeper_inbox.put)):
                    return lease
            run_sheltered(partial(self._add_pool, key))

    def take_warm(self, key: _Key, n_workers: int) -> _Lease | None:
        """Return a lease of a pool whose first workers are ready; None if there is none.

        It is of no account whether its workers can read the caller's memory.
        """
        backend, n, _, user = key
        for place in sorted(self._places, key=_last_used, reverse=True):
            is_fit = place.key[:2] == (backend, n) and place.key[3] == user
            if is_fit and (lease := place.lend(self._keeper_inbox.put)):
                pool = cast("ProcessPool", place.pool)
                if pool.are_ready(n_workers):
                    return lease
                place.lease = _FREE
        return None

    def has_warm(self, key: _Key) -> bool:
        places = [place for place in self._places.copy() if place.key == key]
        return any(place.lease() is None and place.pool.is_warm for place in places)

    def has_any(self, key: _Key) -> bool:
        return any(place.key == key for place in self._places.copy())

    def prepare(self, key: _Key) -> None:
        if not any(place.key == key and place.lease() is None for place in self._places.copy()):
            run_sheltered(partial(self._prepare, key))

    def _prepare(self, key: _Key) -> None:
        with suppress(OSError, RuntimeError, MemoryError):  # the run will meet it again
            cast("ProcessPool", self._add_pool(key)).start_server()

    def _add_pool(self, key: _Key) -> Pool:
        pool = _new_pool(key)
        self._places.append(_Place(key, pool))
        self._ensure_keeper()
        return pool

    def _ensure_keeper(self) -> bool:
        """Start the keeper unless there is one; return whether there is one now."""
        with self._keeper_lock:
            if self._keeper is None:
                inbox: SimpleQueue[object] = SimpleQueue()
                is_idle = threading.Event()
                is_idle.set()
                keeper = threading.Thread(
                    target=self._run_keeper,
                    args=(inbox, is_idle),
                    name="taskcarrier-keeper",
                    daemon=True,
                )
                self._keeper_inbox, self._keeper_is_idle = inbox, is_idle
                self._keeper = keeper
                try:
                    keeper.start()
                except (RuntimeError, MemoryError):
                    self._keeper = None
            return self._keeper is not None

    def end_unless_kept(self, place: _Place) -> None:
        """End a pool that was given back if it lacks workers that it needed, or has no keeper.

        Where no more workers can be started, idle ones are not kept from others. If this is cut
        short, the keeper ends the pool.
        """
        if (place.pool.lacks_workers or self._keeper is None) and place in self._places:
            run_sheltered(partial(self._end_unless_kept, place))

    def _end_unless_kept(self, place: _Place) -> None:
        is_kept = not place.pool.lacks_workers and self._ensure_keeper()
        if not is_kept and (lease := place.lend(self._keeper_inbox.put)):
            self._end_pools([lease], wait=False)

    @contextmanager
    def keep_warm(self) -> Iterator[None]:
        holder = Holder()
        try:
            self._warm_holders.add(holder)
            yield
        finally:
            self._warm_holders.discard(holder)

    def end_pools_of_others(self, user: tuple[int, ...]) -> None:
        """End idle processes that run as a user which this program no longer is."""
        if any(place.runs_as_another(user) for place in self._places.copy()):
            run_sheltered(partial(self._end_pools_of_others, user))

    def _end_pools_of_others(self, user: tuple[int, ...]) -> None:
        places = [place for place in self._places.copy() if place.runs_as_another(user)]
        self._end_pools(self._lend_free(places))

    def shutdown(self, *, wait: bool, caller: int = 0) -> None:
        self._end_pools(self._lend_idle(), wait=wait)
        with self._keeper_lock:
            keeper, is_idle = self._keeper, self._keeper_is_idle
            is_done = not self._places
            if is_done:
                self._keeper = None
                self._keeper_inbox.put(None)
        # A finalizer that runs in the keeper may have called this.
        if wait and keeper is not None and keeper.ident != caller:
            is_idle.wait()  # it may be ending a pool that could not be leased here
            if is_done:
                keeper.join()

    def drop_after_fork(self) -> None:
        for place in self._places:
            place.pool.drop_after_fork()
        self.__init__()  # type: ignore[misc]  # a forked child has its own, locks included

    def _lend_idle(self, since: float = math.inf) -> list[_Lease]:
        """Lease the pools that have been free since then, so that no other run gets them."""
        return self._lend_free([place for place in self._places.copy() if place.used <= since])

    def _lend_free(self, places: list[_Place]) -> list[_Lease]:
        """Lease those of the pools that are free."""
        return [lease for place in places if (lease := place.lend(self._keeper_inbox.put))]

    def _end_pools(self, leases: list[_Lease], *, wait: bool = True) -> None:
        for lease in leases:
            lease.place.lease = weakref.ref(_PERMANENT_LEASE)
            self._places.remove(lease.place)
        for lease in leases:
            lease.place.pool.close(wait=wait)

    def _end_lost_pools(self) -> None:
        """End pools whose lease was lost, if others were made in their place in the meantime.

        Also end those that are short of workers.
        """
        for place in self._places.copy():
            similar = [other for other in self._places if other.key == place.key]
            if place.pool.lacks_workers or (place.was_lost and len(similar) > 1):
                self._end_pools(self._lend_free([place]))

    def _run_keeper(self, inbox: SimpleQueue[object], is_idle: threading.Event) -> None:
        """End pools that were idle for long; the keeper itself ends when none is left."""
        me = threading.current_thread()
        while True:
            with self._keeper_lock:
                if self._keeper is not me:
                    return
                if not self._places:
                    self._keeper = None
                    return
            with suppress(Empty):
                inbox.get(timeout=self._seconds_to_wait())
            is_idle.clear()  # before the first lease
            try:
                self._end_lost_pools()
                if not self._warm_holders:
                    self._end_pools(self._lend_idle(time.monotonic() - IDLE_SECONDS))
            finally:
                is_idle.set()

    def _seconds_to_wait(self) -> float:
        times = [place.used for place in self._places.copy() if place.lease() is None]
        if not times:
            return IDLE_SECONDS
        return max(1.0, min(times) + IDLE_SECONDS - time.monotonic())


_last_used = attrgetter("used")


def _new_pool(key: _Key) -> Pool:
    backend, n_jobs, *_ = key
    if backend == "threading":
        return ThreadPool(n_jobs)
    from taskcarrier.workers.processes.pool import ProcessPool  # noqa: PLC0415  # loads joblib

    return ProcessPool(n_jobs)


_pools = _Pools()


def thread_pool(n: int) -> AbstractContextManager[ThreadPool]:
    """Lease a warm pool of `n` threads for the length of a ``with`` block."""
    return cast("AbstractContextManager[ThreadPool]", _pools.take(("threading", n, True, ())))


def process_pool(n: int) -> AbstractContextManager[ProcessPool]:
    """Lease a warm pool of `n` worker processes for the length of a ``with`` block."""
    key = _process_key(n)
    # A function must not run as root once the program has given that up.
    _pools.end_pools_of_others(key[-1])
    return cast("AbstractContextManager[ProcessPool]", _pools.take(key))


def warm_process_pool(n: int, n_workers: int) -> AbstractContextManager[ProcessPool] | None:
    """Lease a pool of `n` processes of which the first `n_workers` are ready; None if none is."""
    lease = _pools.take_warm(("loky", n, True, _get_user()), n_workers)
    return cast("AbstractContextManager[ProcessPool] | None", lease)


def prepare_processes(n: int) -> None:
    """Import what runs in `n` worker processes need, while a fork server for these starts.

    None is started if there is a pool of them that is free.
    """
    load_pool()
    _pools.prepare(_process_key(n))
    load_processes()


def _process_key(n: int) -> _Key:
    return "loky", n, parent_memory.available(), _get_user()


def _get_user() -> tuple[int, ...]:
    return (*os.getresuid(), *os.getresgid(), *os.getgroups())


def start_processes(n: int) -> None:
    """Start `n` worker processes, unless that many are idle already."""
    with process_pool(n) as processes:
        processes.start_workers()


def has_warm_processes(n: int) -> bool:
    """Return whether a pool of `n` worker processes is free whose workers have all started."""
    return _pools.has_warm(_process_key(n))


def has_processes(n: int) -> bool:
    """Return whether there is a pool of `n` worker processes, lent or not, ready or not."""
    return _pools.has_any(_process_key(n))


def keep_warm() -> AbstractContextManager[None]:
    """Return a context; while it is open, no idle worker is ended."""
    return _pools.keep_warm()


_hooks_before: list[Callable[[], object]] = []
_shutdown_hooks: list[Callable[[], object]] = []


def call_before_shutdown(hook: Callable[[], object]) -> None:
    """Make `shutdown` call `hook` before it ends workers; it gives back those that it holds."""
    _hooks_before.append(hook)


def call_at_shutdown(hook: Callable[[], object]) -> None:
    """Make `shutdown` call `hook` too, which drops something that is kept for the next call."""
    _shutdown_hooks.append(hook)


def shutdown() -> None:
    """End all idle workers now and wait until they are gone; forget what is kept warm.

    Workers that are busy for another thread of the program finish their run first and stay
    warm after it. The next call starts new workers. They import all modules again, so this is
    also how to make workers use a reloaded module.

    Examples
    --------
    >>> import taskcarrier
    >>> taskcarrier.shutdown()
    """
    for hook in _hooks_before:
        hook()
    run_sheltered(partial(_pools.shutdown, wait=True, caller=threading.get_ident()))
    for hook in _shutdown_hooks:
        hook()


def _shutdown_at_exit(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:
        _pools.shutdown(wait=False)


atexit.register(_shutdown_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.drop_after_fork)

"""The pools of this process: lent to runs, kept warm in between, ended when idle.

One pool serves one run at a time; runs that overlap (from several threads of the caller) get
pools of their own. A pool that nobody has used for `IDLE_SECONDS` is ended by a keeper
thread, unless a mapper's ``with`` block is open. A forked child starts without pools.
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
from taskcarrier.workers.threads import ThreadPool

if TYPE_CHECKING:
    from taskcarrier.workers.processes.pool import ProcessPool

    Pool = ThreadPool | ProcessPool

# As long as joblib keeps idle workers.
IDLE_SECONDS = 300.0

# Backend, number of workers, whether they can read the caller's memory, and as whom they run.
_Key = tuple[str, int, bool, tuple[int, ...]]


class _Lease:
    """A pool is lent for as long as this lives: ``with lease as pool:``."""

    place: _Place

    def __enter__(self) -> Pool:
        return self.place.pool

    def __exit__(self, *_: object) -> None:
        self.place.lease = _FREE
        self.place.used = time.monotonic()
        _pools.end_unless_kept(self.place)


class _Place:
    """A pool, and who has it: a reference to a lease, which counts for as long as that lives."""

    def __init__(self, key: _Key, pool: Pool) -> None:
        self.key = key
        self.pool = pool
        self.lease = _FREE
        self.used = time.monotonic()
        self._lock = threading.Lock()

    def runs_as_another(self, user: tuple[int, ...]) -> bool:
        """Whether its workers run as somebody else."""
        return self.key[3] not in {(), user}

    @property
    def was_lost(self) -> bool:
        """Whether the lease is gone, and the pool was not given back."""
        return self.lease is not _FREE and self.lease() is None

    def lent(self, when_lost: Callable[[object], None]) -> _Lease | None:
        """A lease of the pool, if it is free; should that get lost, this C code is called."""
        before = self.lease
        if before() is not None:
            return None
        lease = _Lease()
        lease.place = self
        mine = weakref.ref(lease, when_lost)
        with self._lock:  # nothing is called in here, so not even a signal handler comes between
            is_free = self.lease is before
            if is_free:
                self.lease = mine
        return lease if is_free else None


_FREE = weakref.ref(_Lease())
"""What stands in place of the lease of a pool that was given back."""
_OURS = _Lease()
"""That of pools that have ended, so that they are never lent again."""


class _Pools:
    """All pools, lent or not.

    A pool comes here in the thread that makes it, and leaves in the one that ends it; in neither
    comes an exception from outside. That it is free is found by its lease, be that given back or
    just gone. So none can get lost, wherever the caller is interrupted.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._held_warm = Holders()
        self._keeper: threading.Thread | None = None
        self._to_keeper: SimpleQueue[object] = SimpleQueue()  # has it look again
        self._keeping = threading.Lock()  # likewise only in threads that are not interrupted

    def take(self, key: _Key) -> _Lease:
        while True:
            for place in sorted(self._places, key=_last_used, reverse=True):
                if place.key == key and (lease := place.lent(self._to_keeper.put)):
                    return lease
            run_sheltered(partial(self._add, key))

    def _add(self, key: _Key) -> None:
        self._places.append(_Place(key, _new_pool(key)))
        self._has_keeper()

    def _has_keeper(self) -> bool:
        """Whether there is one, or could be started."""
        with self._keeping:
            if self._keeper is None:
                inbox: SimpleQueue[object] = SimpleQueue()
                keeper = threading.Thread(
                    target=self._keep, args=(inbox,), name="taskcarrier-keeper", daemon=True
                )
                self._to_keeper, self._keeper = inbox, keeper
                try:
                    keeper.start()
                except (RuntimeError, MemoryError):
                    self._keeper = None
            return self._keeper is not None

    def end_unless_kept(self, place: _Place) -> None:
        """End a pool that was given back, if it lacks workers that it needed, or has no keeper.

        Where no more can be started, nothing is kept from others. Should this be cut short, the
        keeper ends it.
        """
        if (place.pool.is_short or self._keeper is None) and place in self._places:
            run_sheltered(partial(self._end_unless_kept, place))

    def _end_unless_kept(self, place: _Place) -> None:
        keeps = not place.pool.is_short and self._has_keeper()
        if not keeps and (lease := place.lent(self._to_keeper.put)):
            self._end([lease], wait=False)

    @contextmanager
    def keep_warm(self) -> Iterator[None]:
        holder = Holder()
        try:
            self._held_warm.add(holder)
            yield
        finally:
            self._held_warm.discard(holder)

    def end_those_of_others(self, user: tuple[int, ...]) -> None:
        """End idle processes that run as somebody whom this program has given up to be."""
        if any(place.runs_as_another(user) for place in self._places.copy()):
            run_sheltered(partial(self._end_those_of_others, user))

    def _end_those_of_others(self, user: tuple[int, ...]) -> None:
        places = [place for place in self._places.copy() if place.runs_as_another(user)]
        self._end(self._leases(places))

    def shutdown(self, *, wait: bool, caller: int = 0) -> None:
        self._end(self._idle(), wait=wait)
        keeper = None
        with self._keeping:
            if not self._places:
                keeper, self._keeper = self._keeper, None
                self._to_keeper.put(None)
        # A finalizer that runs there may have called this.
        if wait and keeper is not None and keeper.ident != caller:
            keeper.join()

    def forget(self) -> None:
        for place in self._places:
            place.pool.forget()
        self.__init__()  # type: ignore[misc]  # a forked child has its own, locks included

    def _idle(self, since: float = math.inf) -> list[_Lease]:
        """Pools that were free since then; they are lent no more."""
        return self._leases([place for place in self._places.copy() if place.used <= since])

    def _leases(self, places: list[_Place]) -> list[_Lease]:
        """Of those that are free."""
        return [lease for place in places if (lease := place.lent(self._to_keeper.put))]

    def _end(self, leases: list[_Lease], *, wait: bool = True) -> None:
        for lease in leases:
            lease.place.lease = weakref.ref(_OURS)
            self._places.remove(lease.place)
        for lease in leases:
            lease.place.pool.close(wait=wait)

    def _end_lost_pools(self) -> None:
        """End pools that were lost for a time, if others were made in their place meanwhile.

        And those that are short of workers.
        """
        for place in self._places.copy():
            alike = [other for other in self._places if other.key == place.key]
            if place.pool.is_short or (place.was_lost and len(alike) > 1):
                self._end(self._leases([place]))

    def _keep(self, inbox: SimpleQueue[object]) -> None:
        """End pools that were idle for long; the keeper goes when none is left."""
        me = threading.current_thread()
        while True:
            with self._keeping:
                if self._keeper is not me:
                    return
                if not self._places:
                    self._keeper = None
                    return
            with suppress(Empty):
                inbox.get(timeout=self._seconds_to_wait())
            self._end_lost_pools()
            if not self._held_warm:
                self._end(self._idle(time.monotonic() - IDLE_SECONDS))

    def _seconds_to_wait(self) -> float:
        idle = [place.used for place in self._places.copy() if place.lease() is None]
        if not idle:
            return IDLE_SECONDS
        return max(1.0, min(idle) + IDLE_SECONDS - time.monotonic())


_last_used = attrgetter("used")


def _new_pool(key: _Key) -> Pool:
    backend, n_jobs, *_ = key
    if backend == "threading":
        return ThreadPool(n_jobs)
    from taskcarrier.workers.processes.pool import ProcessPool  # noqa: PLC0415  # loads joblib

    return ProcessPool(n_jobs)


_pools = _Pools()


def thread_pool(n: int) -> AbstractContextManager[ThreadPool]:
    """A warm pool of `n` threads for the length of a ``with`` block."""
    return cast("AbstractContextManager[ThreadPool]", _pools.take(("threading", n, True, ())))


def process_pool(n: int) -> AbstractContextManager[ProcessPool]:
    """A warm pool of `n` worker processes for the length of a ``with`` block."""
    # A function must not run as root once the program has given that up.
    user = (*os.getresuid(), *os.getresgid(), *os.getgroups())
    _pools.end_those_of_others(user)
    key = ("loky", n, parent_memory.available(), user)
    return cast("AbstractContextManager[ProcessPool]", _pools.take(key))


def keep_warm() -> AbstractContextManager[None]:
    """No idle worker is ended while this context is open."""
    return _pools.keep_warm()


_also: list[Callable[[], object]] = []


def call_at_shutdown(let_go: Callable[[], object]) -> None:
    """Have `shutdown` call something too that is kept for the next call."""
    _also.append(let_go)


def shutdown() -> None:
    """End all idle workers now, and wait until they are gone; forget what is kept warm.

    Workers that are busy for another thread of the program finish their run first and stay
    warm after it. The next call starts new workers; they import modules afresh, so this is
    also how a reloaded module is brought to the workers.

    Examples
    --------
    >>> import taskcarrier
    >>> taskcarrier.shutdown()
    """
    run_sheltered(partial(_pools.shutdown, wait=True, caller=threading.get_ident()))
    for let_go in _also:
        let_go()


def _shutdown_at_exit(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:
        _pools.shutdown(wait=False)


atexit.register(_shutdown_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.forget)

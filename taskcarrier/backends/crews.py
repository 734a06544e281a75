"""The crews of this process: lent to runs, kept warm in between, ended when idle.

One crew serves one run at a time; runs that overlap (from several threads of the caller) get
crews of their own. A crew that nobody has used for `IDLE_SECONDS` is ended by a keeper
thread, unless a mapper's ``with`` block is open. A forked child starts without crews.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, cast

from taskcarrier import caller_memory
from taskcarrier.backends.threads import ThreadCrew
from taskcarrier.contexts import contextmanager

if TYPE_CHECKING:
    from taskcarrier.backends.processes import ProcessCrew

    Crew = ThreadCrew | ProcessCrew

# As long as joblib keeps idle workers.
IDLE_SECONDS = 300.0

# Backend, number of workers, whether they can read the caller's memory, and as whom they run.
_Key = tuple[str, int, bool, tuple[int, ...]]


class _Crews:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[tuple[float, _Key, Crew]] = []
        self._lent: set[Crew] = set()
        self._held_warm = 0
        self._keeper: threading.Thread | None = None

    def take(self, key: _Key) -> Crew:
        with self._changed:
            crew = self._idle_one(key) or _new_crew(key)
            self._lent.add(crew)
        return crew

    def _idle_one(self, key: _Key) -> Crew | None:
        for entry in reversed(self._idle.copy()):
            if entry[1] == key:
                # It may be gone: a signal handler may have begun a map in this thread just now.
                with suppress(ValueError):
                    self._idle.remove(entry)
                    return entry[2]
        return None

    def give_back(self, key: _Key, crew: Crew) -> None:
        with self._changed:
            if crew not in self._lent:  # forgotten in a fork, or ended by `shutdown`
                return
            self._lent.discard(crew)
            keeps = not crew.is_short and self._has_keeper()
            if keeps:
                self._idle.append((time.monotonic(), key, crew))
        if not keeps:  # where no more can be started, nothing is kept from others
            crew.close(wait=False)

    def _has_keeper(self) -> bool:
        """Whether there is one, or could be started."""
        if self._keeper is None:
            keeper = threading.Thread(target=self._keep, name="taskcarrier-keeper", daemon=True)
            try:
                keeper.start()
            except (RuntimeError, MemoryError):
                return False
            self._keeper = keeper
        return True

    @contextmanager
    def held_warm(self) -> Iterator[None]:
        with self._changed:
            self._held_warm += 1
        try:
            yield
        finally:
            with self._changed:
                self._held_warm -= 1

    def end_those_of_others(self, user: tuple[int, ...]) -> None:
        """End idle processes that run as somebody whom this program has given up to be."""
        with self._changed:
            others = [entry for entry in self._idle if entry[1][3] not in {(), user}]
            self._idle = [entry for entry in self._idle if entry not in others]
        for _, _, crew in others:
            crew.close()

    def shutdown(self, *, wait: bool) -> None:
        with self._changed:
            idle, self._idle = self._idle, []
            keeper, self._keeper = self._keeper, None
            self._changed.notify_all()
        for _, _, crew in idle:
            crew.close(wait=wait)
        if wait and keeper is not None and keeper is not threading.current_thread():
            keeper.join()

    def forget(self) -> None:
        for crew in [crew for _, _, crew in self._idle] + list(self._lent):
            crew.forget()
        self.__init__()  # type: ignore[misc]  # a forked child starts anew, locks and all

    def _keep(self) -> None:
        """End crews that were idle for long; the keeper goes when none is left."""
        me = threading.current_thread()
        while True:
            with self._changed:
                # Asked before waiting too: `shutdown` may have come before this thread did.
                if self._keeper is me:
                    self._changed.wait(self._seconds_to_wait())
                if self._keeper is not me:
                    return
                expired = self._expired()
                if not self._idle and not self._lent:
                    self._keeper = None
            for crew in expired:
                crew.close()
            if self._keeper is not me:
                return

    def _seconds_to_wait(self) -> float:
        if not self._idle:
            return IDLE_SECONDS
        return max(1.0, min(since for since, _, _ in self._idle) + IDLE_SECONDS - time.monotonic())

    def _expired(self) -> list[Crew]:
        if self._held_warm:
            return []
        limit = time.monotonic() - IDLE_SECONDS
        expired = [crew for since, _, crew in self._idle if since <= limit]
        self._idle = [entry for entry in self._idle if entry[0] > limit]
        return expired


def _new_crew(key: _Key) -> Crew:
    backend, n_jobs, *_ = key
    if backend == "threading":
        return ThreadCrew(n_jobs)
    from taskcarrier.backends.processes import ProcessCrew  # noqa: PLC0415  # loads joblib

    return ProcessCrew(n_jobs)


_crews = _Crews()


def thread_crew(n: int) -> AbstractContextManager[ThreadCrew]:
    """A warm crew of `n` threads for the length of a ``with`` block."""
    return cast("AbstractContextManager[ThreadCrew]", _lent(("threading", n, True, ())))


def process_crew(n: int) -> AbstractContextManager[ProcessCrew]:
    """A warm crew of `n` worker processes for the length of a ``with`` block."""
    # A function must not run as root once the program has given that up.
    user = (*os.getresuid(), *os.getresgid(), *os.getgroups())
    _crews.end_those_of_others(user)
    key = ("loky", n, caller_memory.available(), user)
    return cast("AbstractContextManager[ProcessCrew]", _lent(key))


@contextmanager
def _lent(key: _Key) -> Iterator[Crew]:
    crew = _crews.take(key)
    try:
        yield crew
    finally:
        _crews.give_back(key, crew)


def held_warm() -> AbstractContextManager[None]:
    """No idle worker is ended while this context is open."""
    return _crews.held_warm()


_also: list[Callable[[], object]] = []


def at_shutdown(let_go: Callable[[], object]) -> None:
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
    _crews.shutdown(wait=True)
    for let_go in _also:
        let_go()


def _at_exit(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:
        _crews.shutdown(wait=False)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crews.forget)

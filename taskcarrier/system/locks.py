"""Locks that outlast every call: those of modules.

Three things happen to them that do not happen to a lock of one run. A signal handler, or a
finalizer that the garbage collector runs, may begin a map in a thread that is inside one: so each
can be taken again by the thread that holds it, and what it guards must be right if that happens at
any point. A program may fork while another thread is inside: the child has no such thread, so each
is renewed there. And if the other thread is importing a module, the child would wait for ever for
Python's own lock on that module: so a fork waits until such a lock is free.

And an exception may come from outside (`taskcarrier.system.interrupts`) when one has just been taken. So
``with`` must reach the C code of the lock itself: a method of ours between the two would be left
with the lock taken, for good.
"""

from __future__ import annotations

import os
from _thread import RLock
from typing import Self

_locks: list[ModuleLock] = []


class ModuleLock(RLock):  # type: ignore[misc]  # it can be inherited from: the stubs are wrong
    """A lock for the variables of a module: ``with lock:``.

    Parameters
    ----------
    forks_wait : bool
        Whether a fork of this process waits until no other thread is inside.
    """

    _forks_wait: bool

    def __new__(cls, *, forks_wait: bool = False) -> Self:  # noqa: D102  # as above
        lock = super().__new__(cls)
        lock._forks_wait = forks_wait
        _locks.append(lock)
        return lock

    def before_fork(self) -> None:
        """Wait, if forks do."""
        if self._forks_wait:
            self.acquire()

    def after_fork(self) -> None:
        """Undo `before_fork`, in parent and child."""
        if self._forks_wait:
            self.release()

    def renew(self) -> None:
        """In a forked child: no other thread can be inside."""
        self.after_fork()
        if self.acquire(blocking=False):
            self.release()
        else:
            self._at_fork_reinit()  # type: ignore[attr-defined]  # what Python does to its own


def _before_fork() -> None:
    for lock in _locks:
        lock.before_fork()


def _after_fork_in_parent() -> None:
    for lock in _locks:
        lock.after_fork()


def _after_fork_in_child() -> None:
    for lock in _locks:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )

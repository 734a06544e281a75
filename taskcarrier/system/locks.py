"""Locks that no exception from outside leaves taken, and locks of modules, which outlast calls.

Three things happen to the locks of modules that do not happen to a lock of one run:

- A signal handler, or a finalizer that the garbage collector runs, may begin a map in a thread that
  holds such a lock. So that thread can take it again, and the guarded data must be valid if this
  happens at any point.
- The program may fork while another thread holds the lock. The child has no such thread, so the
  lock is renewed there.
- If the other thread is importing a module, the child would wait for ever for Python's own lock on
  that module. So a fork waits until such a lock is free.

An exception may also come from outside (`taskcarrier.system.interrupts`) just after a lock was
taken. So ``with`` must call the C code of the lock directly: if a method of ours stood between the
two, such an exception could end it with the lock still held, for good. Python 3.14 is an exception:
there it may come after the C code too, before the block begins, and then the block's end is not
called (CPython's gh-148874, mended in 3.15). After a method in Python it does not.
"""

from __future__ import annotations

import logging  # noqa: F401  # before `register_at_fork` below: see `_before_fork`
import os
import sys
from typing import Self

if sys.version_info[:2] == (3, 14):
    from _thread import RLock

    class ReentrantLock(RLock):  # type: ignore[misc]  # it can be subclassed: the stubs are wrong
        """A reentrant lock; an exception from outside does not leave it taken."""

        def __enter__(self) -> bool:  # type: ignore[override]  # ``with`` gives no arguments
            """Take the lock, or raise an exception from outside and leave it as it was."""
            taken: list[bool] = []
            try:
                taken.extend(map(self.acquire, (True,)))  # one call into C: taken, and known to be
            except BaseException:
                if taken:
                    self.release()
                raise
            return True

    Lock = ReentrantLock
else:
    from _thread import RLock as ReentrantLock
    from threading import Lock

__all__ = ["Lock", "ModuleLock", "ReentrantLock"]

_locks: list[ModuleLock] = []


class ModuleLock(ReentrantLock):  # type: ignore[misc]  # as above
    """A lock for the variables of a module: ``with lock:``.

    Parameters
    ----------
    forks_wait : bool
        Whether a fork of this process waits until no other thread holds the lock.
    """

    _forks_wait: bool

    def __new__(cls, *, forks_wait: bool = False) -> Self:  # noqa: D102  # as above
        lock = super().__new__(cls)
        lock._forks_wait = forks_wait
        _locks.append(lock)
        return lock

    def before_fork(self) -> None:
        """Take the lock, if forks wait for it."""
        if self._forks_wait:
            self.acquire()

    def after_fork(self) -> None:
        """Undo `before_fork`, in the parent or the child."""
        if self._forks_wait:
            self.release()

    def renew(self) -> None:
        """Renew the lock in a forked child, where no other thread can hold it."""
        self.after_fork()
        if self.acquire(blocking=False):
            self.release()
        else:
            self._at_fork_reinit()  # type: ignore[attr-defined]  # as Python does with its own locks


def _before_fork() -> None:
    """Take the locks that forks wait for.

    Functions that are registered later are called earlier. `logging` registers one that takes its
    own lock; a thread that holds one of ours while it imports modules may need that lock. So
    `logging` must be imported before this function is registered.
    """
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

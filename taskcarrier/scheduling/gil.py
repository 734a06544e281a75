"""Whether a function may go on in threads: judged by the interpreter's lock, then by a trial.

While the function runs in the caller, a thread that runs no user code wants the lock now and then.
If the function releases it, the thread gets it at once. If not, it gets it only when Python makes
the function give it up, after the switch interval (5 ms). So no second thread has to call the
function to find that out.

A function can release the lock and still not be fit for threads, because it takes a lock of its
own, or takes the interpreter's again and again. So threads are on trial at first: they must spend
as large a share of their time on a core as the caller did alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

SAMPLE_SECONDS = 0.0002
"""While nothing is known of a function, the lock is wanted so often. No sleep is much shorter."""

# The waits after which the judgement is believed, and those that were long.
_ENOUGH = 4
_ENOUGH_LONG = 2
# When there are more, the old ones count half.
_MOST = 256
# The part of the waits that must have been short. With less, two threads do no more than 1.4 times
# the work of one.
_LEAST_FREE = 0.7
# The share of a thread's time on a core, of what the caller had alone, that is enough.
_LEAST_SHARE = 0.75
# A function that is on a core for a smaller share of the time waits for something else, and two
# threads have room on one core.
_WAITING_SHARE = 0.5
# The report mentions a function that releases the lock after so many waits, this part short.
_ENOUGH_TO_TELL = 20
_FREE_SHARE_TO_TELL = 0.9
# Threads that have waited for a core for a larger part of the time are not judged.
_BUSY_MACHINE = 0.1


class GilWaits:
    """How long a thread had to wait for the interpreter's lock while a function ran.

    Attributes
    ----------
    n_free, n_held : int
        How often it got the lock at once, and how often not before the function had to give it up.
    has_failed : bool
        Whether threads were tried, and were of no use.
    """

    def __init__(self) -> None:
        self.n_free = 0
        self.n_held = 0
        self.has_failed = False

    def add(self, seconds: float) -> None:
        """Add a wait.

        >>> waits = GilWaits()
        >>> for seconds in (1e-5, 2e-5, 0.0, 1e-5):
        ...     waits.add(seconds)
        >>> waits.is_released, waits.free_share
        (True, 1.0)
        """
        if seconds < sys.getswitchinterval() / 2:
            self.n_free += 1
        else:
            self.n_held += 1
        if self.n_free + self.n_held > _MOST:
            self.n_free //= 2
            self.n_held //= 2

    @property
    def free_share(self) -> float:
        """The part of the time in which the function did not have the lock; 0 if unknown."""
        return self.n_free / max(1, self.n_free + self.n_held)

    @property
    def is_released(self) -> bool | None:
        """Whether the function releases the lock most of the time; None if that is not known."""
        if self.n_free + self.n_held < _ENOUGH and self.n_held < _ENOUGH_LONG:
            return None
        return self.free_share >= _LEAST_FREE

    @property
    def is_worth_telling(self) -> bool:
        """Whether it is certain that the function releases the lock nearly always."""
        is_certain = self.n_free + self.n_held >= _ENOUGH_TO_TELL and not self.has_failed
        return is_certain and self.free_share >= _FREE_SHARE_TO_TELL

    def describe(self) -> str:
        """Return what is known, in words."""
        if self.has_failed:
            return "threads were tried, and waited for each other"
        n_looks = self.n_free + self.n_held
        return f"the function had released the GIL at {self.n_free} of {n_looks} looks"

    @property
    def is_fit_for_threads(self) -> bool | None:
        """Whether threads are worth a trial; None if that is not known."""
        return False if self.has_failed else self.is_released


def judge_shares(shares: Sequence[float], queued: float, share_alone: float) -> bool | None:
    """Return whether threads are of use, by the shares of their time that they were on a core.

    Parameters
    ----------
    shares : sequence of float
        The share of each thread, of the time in which it did not wait for a core.
    queued : float
        The largest part of a thread's time in which it was ready to run, and had no core.
    share_alone : float
        The share of the caller's thread when it ran the function alone.

    Returns
    -------
    bool or None
        None if the machine is too busy to say.

    Examples
    --------
    >>> judge_shares([0.98, 0.95], 0.0, 1.0), judge_shares([0.5, 0.48], 0.0, 1.0)
    (True, False)
    >>> judge_shares([0.02, 0.03], 0.0, 0.02)  # the function sleeps
    True
    >>> judge_shares([0.5, 0.48], 0.3, 1.0) is None
    True
    """
    if share_alone < _WAITING_SHARE or min(shares) >= _LEAST_SHARE * share_alone:
        return True
    return None if queued > _BUSY_MACHINE else False

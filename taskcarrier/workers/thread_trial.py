"""Threads on trial: they run chunks, and whether they are of use is not known yet.

The caller and the threads take chunks in ascending order. When the trial is over, the chunks that
are left are one range, whatever the balance. They are run by the rule of the run, or by others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from taskcarrier.scheduling.balance import Balance, Dynamic
from taskcarrier.scheduling.gil import GilWaits, judge_shares
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.locks import Lock
from taskcarrier.system.thread_clocks import ThreadClock, ThreadTimes
from taskcarrier.workers.hand_overs import ThreadHandOver
from taskcarrier.workers.records import WorkerStats

# The length of a trial: twice the time after which Python makes a thread give up the lock.
WINDOW_SECONDS = 0.01
# Threads that look useless are watched for so many windows before they are stopped; and for so many
# if the machine is busy.
_MOST_WINDOWS = 2
_MOST_BUSY_WINDOWS = 10


class TrialBalance:
    """The rule of a run whose threads are on trial (`taskcarrier.scheduling.balance.Balance`).

    Parameters
    ----------
    balance : Balance
        The rule for what is left after the trial.

    Attributes
    ----------
    first_left : int or None
        The first chunk that was left when the trial was over.
    is_passed : bool
        Whether the threads go on.
    """

    def __init__(self, balance: Balance) -> None:
        self.name = balance.name
        self.first_left: int | None = None
        self.is_passed = False
        self._balance = balance
        self._lock = Lock()

    def plan(self, worker: int, n_workers: int, n_chunks: int, first: int = 0) -> range:  # noqa: ARG002  # the rules share one signature
        """Return no chunks: none is reserved for one worker."""
        return range(0)

    def chunks(
        self, ledger: Ledger, worker: int, n_workers: int, n_chunks: int, first: int = 0
    ) -> Iterator[int]:
        """Yield the chunks of one worker, each in hand when it is yielded."""
        yield from Dynamic().chunks(ledger, worker, n_workers, n_chunks, first)
        with self._lock:
            first_left = self.first_left
        if first_left is not None and self.is_passed:
            yield from self._balance.chunks(ledger, worker, n_workers, n_chunks, first_left)

    def end(self, ledger: Ledger, n_chunks: int, *, is_passed: bool) -> None:
        """End the trial."""
        if is_passed and isinstance(self._balance, Dynamic):
            return  # it goes on as it is
        with self._lock:
            self.first_left = ledger.stop_claims(n_chunks)
            self.is_passed = is_passed


class ThreadTrial:
    """The trial of the threads of a run: when it begins, and how it ends.

    Parameters
    ----------
    hand_over : ThreadHandOver
        How threads come to the rest.
    balance : TrialBalance
        The rule by which they take chunks.
    waits : GilWaits
        What is known of the function.
    n_chunks : int
        The number of chunks of the run.
    """

    def __init__(
        self, hand_over: ThreadHandOver, balance: TrialBalance, waits: GilWaits, n_chunks: int
    ) -> None:
        self.hand_over = hand_over
        self.balance = balance
        self._waits = waits
        self._n_chunks = n_chunks
        self._caller = threading.current_thread()
        self._share_alone = 1.0
        self._clocks: list[ThreadClock] = []
        self._times: list[ThreadTimes] = []
        self._n_windows = 0

    def note_begin(self) -> None:
        """Note that the caller is just about to call the function."""
        self._clocks = [ThreadClock(self._caller)]
        self._times = self._read()

    def begin(self) -> None:
        """Begin the trial of threads that have just begun."""
        choice = self.hand_over.choice
        self.hand_over.choice = replace(choice, reason=self._waits.describe())
        begin = self._times[0]
        self._clocks += map(ThreadClock, self.hand_over.list_threads())
        self._times = self._read()
        self._share_alone, _ = self._times[0].shares_since(begin)

    def _read(self) -> list[ThreadTimes]:
        return [clock.read() for clock in self._clocks]

    def look(self, ledger: Ledger) -> float | None:
        """End the trial if it can be judged; return the seconds after which to look again."""
        if ledger.n_claimed() >= self._n_chunks:
            return None  # threads that have ended tell nothing
        try:
            is_passed = self._judge()
        except OSError:  # a thread is gone, and the program is ending
            return None
        if is_passed is None:
            return WINDOW_SECONDS
        self._waits.has_failed = not is_passed
        self.balance.end(ledger, self._n_chunks, is_passed=is_passed)
        return None

    def _judge(self) -> bool | None:
        before, self._times = self._times, self._read()
        self._n_windows += 1
        shares = [new.shares_since(old) for old, new in zip(before, self._times, strict=True)]
        on_core, queued = zip(*shares, strict=True)
        is_passed = judge_shares(on_core, max(queued), self._share_alone)
        if is_passed is False and self._n_windows < _MOST_WINDOWS:
            return None
        is_undecided = is_passed is None and self._n_windows < _MOST_BUSY_WINDOWS
        return None if is_undecided else is_passed is not False

    def take_back(self, ledger: Ledger) -> tuple[int, list[WorkerStats]] | None:
        """Return the first chunk that is left, and the threads' stats; None unless it was failed.

        Waits until the threads have ended.
        """
        first = self.balance.first_left
        if first is None or self.balance.is_passed or ledger.is_halted:
            return None
        stats = self.hand_over.take_back()
        ledger.go_on(first)
        return first, stats

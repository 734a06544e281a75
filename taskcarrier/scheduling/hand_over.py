"""Whether it pays to hand the rest of a run to workers: arithmetic on what the caller measured."""

from __future__ import annotations

from taskcarrier.record import record

MARGIN = 1.3
"""A hand-over must promise to save its cost times this: that varies by as much between calls."""

# The chunks after which their costs are believed; before, a decision needs more time spent.
_ENOUGH_CHUNKS = 3


@record(kw_only=True)
class Offer:
    """What it takes to have the rest of a run done by workers.

    Attributes
    ----------
    n_workers : int
        The number of workers that would share it.
    busy_seconds : float
        Seconds that the caller spends on the hand-over instead of on chunks.
    wait_seconds : float
        Seconds until the workers begin, in which the caller goes on with chunks.
    item_seconds : float
        Seconds that each item costs beside its work: to reach a worker, and for its result to come
        back.
    """

    n_workers: int
    busy_seconds: float
    wait_seconds: float = 0.0
    item_seconds: float = 0.0


class ItemCost:
    """The seconds that an item takes, estimated from the chunks so far.

    The first chunk is often dear, because caches are cold. It counts until two others are known.
    """

    def __init__(self) -> None:
        self.n_chunks = 0
        self.total_seconds = 0.0
        self._n_items = 0
        self._first = (0, 0.0)

    def add(self, n_items: int, seconds: float) -> None:
        """Add a chunk."""
        self.n_chunks += 1
        self.total_seconds += seconds
        self._n_items += n_items
        if self.n_chunks == 1:
            self._first = n_items, seconds

    @property
    def item_seconds(self) -> float:
        """The seconds of one item; 0 if nothing is known."""
        n_items, seconds = self._n_items, self.total_seconds
        if self.n_chunks >= _ENOUGH_CHUNKS:
            n_items, seconds = n_items - self._first[0], seconds - self._first[1]
        return seconds / n_items if n_items else 0.0

    def is_believed(self, offer: Offer) -> bool:
        """Return whether enough is known to decide on an offer.

        It is after some chunks, or as soon as the caller has spent twice what the hand-over costs
        it: then no estimate can be so wrong that waiting had been much better.
        """
        return self.n_chunks >= _ENOUGH_CHUNKS or self.total_seconds >= 2 * offer.busy_seconds


def estimate_saving(n_items: int, n_chunks: int, seconds_per_item: float, offer: Offer) -> float:
    """Return the seconds that a hand-over saves; negative if it costs some.

    Parameters
    ----------
    n_items, n_chunks : int
        What is left to do.
    seconds_per_item : float
        What an item costs in the caller.
    offer : Offer
        What workers would cost.

    Examples
    --------
    >>> offer = Offer(n_workers=2, busy_seconds=0.001)
    >>> round(estimate_saving(100, 10, 0.001, offer), 4)
    0.0487
    >>> estimate_saving(10, 1, 0.001, offer) < 0  # one chunk cannot be shared
    True
    """
    if n_chunks == 0:
        return 0.0
    left = max(0.0, n_items * seconds_per_item - offer.wait_seconds)
    most_chunks = -(-n_chunks // offer.n_workers)  # of one worker
    saved = left * (1 - most_chunks / n_chunks)
    return saved - n_items * offer.item_seconds - MARGIN * offer.busy_seconds


class MeasuredSeconds:
    """Seconds that something takes on this machine: a first guess, corrected by what is measured.

    One measurement counts for a quarter, and never leads further from the guess than fourfold: one
    busy moment of the machine must not decide on all later calls.
    """

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self.seconds = guess

    def add(self, measured: float) -> None:
        """Take a measurement into account."""
        limited = min(max(measured, self._guess / 4), 4 * self._guess)
        self.seconds += (limited - self.seconds) / 4


class MissedSeconds:
    """The seconds that workers would have saved in calls that were too short to start them.

    Once they add up to what starting takes, it is begun: then no series of calls, wherever it ends,
    takes more than twice as long as it would with the better of the two choices.

    Examples
    --------
    >>> missed = MissedSeconds()
    >>> missed.add(0.2)
    >>> missed.are_enough(0.3)
    False
    >>> missed.add(0.1)
    >>> missed.are_enough(0.3)
    True
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Add what workers would have saved in a call."""
        self._seconds += seconds

    def are_enough(self, cost: float) -> bool:
        """Return whether starting workers, at this cost, would have paid."""
        return self._seconds >= cost

    def forget(self) -> None:
        """Start over: workers are being started."""
        self._seconds = 0.0

"""Whether it pays to hand the rest of a run to workers: arithmetic on what the caller measured."""

from __future__ import annotations

from dataclasses import dataclass

# A hand-over must promise to save more than its measured cost by this factor: what it costs varies
# that much from one call to the next.
MARGIN = 1.3


# The chunks after which their costs are believed; before, a decision needs more time spent.
_ENOUGH_CHUNKS = 3


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What it takes to have the rest of a run done by workers.

    Attributes
    ----------
    n_workers : int
        The number of workers that would share it.
    engage_seconds : float
        Seconds until they begin.
    item_seconds : float
        Seconds that each item costs beside its work: to reach a worker, and for its result to come
        back.
    """

    n_workers: int
    engage_seconds: float
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

        It is after some chunks, or as soon as the caller has spent twice what it costs to engage
        workers: then no estimate can be so wrong that waiting had been much better.
        """
        return self.n_chunks >= _ENOUGH_CHUNKS or self.total_seconds >= 2 * offer.engage_seconds


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
    >>> offer = Offer(n_workers=2, engage_seconds=0.001)
    >>> round(estimate_saving(100, 10, 0.001, offer), 4)
    0.0487
    >>> estimate_saving(10, 1, 0.001, offer) < 0  # one chunk cannot be shared
    True
    """
    if n_chunks == 0:
        return 0.0
    alone = n_items * seconds_per_item
    most_chunks = -(-n_chunks // offer.n_workers)  # of one worker
    shared = alone * most_chunks / n_chunks + n_items * offer.item_seconds
    return alone - shared - MARGIN * offer.engage_seconds

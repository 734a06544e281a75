"""Whether it pays to hand the rest of a run to workers: arithmetic on what the caller measured."""

from __future__ import annotations

from dataclasses import dataclass

# A hand-over must promise to save more than its measured cost by this factor: what it costs varies
# that much from one call to the next.
MARGIN = 1.3


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
        Seconds that each item costs beside its work: to reach a worker, and its result to come back.
    """

    n_workers: int
    engage_seconds: float
    item_seconds: float = 0.0


class ItemCost:
    """The seconds that an item takes, estimated from the chunks so far.

    The first chunk is often dear, because caches are cold. It counts until two others are known.
    """

    def __init__(self) -> None:
        self._first = (0, 0.0)
        self._others = (0, 0.0)
        self._n_others = 0

    def add(self, n_items: int, seconds: float) -> None:
        """Add a chunk."""
        if self._first[0] == 0:
            self._first = n_items, seconds
        else:
            self._others = self._others[0] + n_items, self._others[1] + seconds
            self._n_others += 1

    @property
    def seconds(self) -> float:
        """The seconds of one item; 0 if nothing is known."""
        n_items, seconds = self._others
        if self._n_others < 2:
            n_items, seconds = n_items + self._first[0], seconds + self._first[1]
        return seconds / n_items if n_items else 0.0


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

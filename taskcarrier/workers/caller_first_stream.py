"""A work queue that begins in the caller, and goes on with workers if that pays.

The caller runs each batch when it is put, and measures what an item costs. How many items will come
is not known. So it is assumed that as many come as have come already, and one for each worker at
least. Reading the input is code of the user's, and so help waits for the end of an item here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

from taskcarrier.notes import get_text, warn_user
from taskcarrier.scheduling.hand_over import ItemCost, estimate_saving
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.queues import BatchResult, UnsendableError, WorkQueue
from taskcarrier.workers.records import RunResult
from taskcarrier.workers.serial import SerialQueue
from taskcarrier.workers.stream_hand_over import StreamHandOver


class CallerFirstQueue:
    """A work queue (`taskcarrier.workers.queues.WorkQueue`) that begins in the caller.

    Parameters
    ----------
    caller : SerialQueue
        The queue of the caller.
    hand_over : StreamHandOver
        How workers come to the rest.

    Attributes
    ----------
    notes : list of str
        Notes for the report.
    """

    def __init__(self, caller: SerialQueue, hand_over: StreamHandOver) -> None:
        self.notes: list[str] = []
        self._caller = caller
        self._hand_over = hand_over
        self._context: AbstractContextManager[WorkQueue] | None = None
        self._workers: WorkQueue | None = None
        self._cost = ItemCost()
        self._n_done = 0
        self._is_stuck = False  # whether the function cannot be sent to workers

    @property
    def choice(self) -> Choice:
        """Where the rest runs."""
        return self._hand_over.choice

    @property
    def runs_in_caller(self) -> bool:
        """Whether `put` runs the batch."""
        return self._workers is None

    @property
    def ledger(self) -> Ledger:
        """The record of what was done."""
        return self._caller.ledger if self._workers is None else self._workers.ledger

    @property
    def has_room(self) -> bool:
        """Whether a batch would be taken."""
        return self._caller.has_room if self._workers is None else self._workers.has_room

    def explain(self) -> str:
        """Return the reason for where items ran, in words."""
        took = f"an item took {self._cost.item_seconds:.2g} s in the caller"
        if self.runs_in_caller:
            return f"{took}: workers would have saved nothing"
        choice = self._hand_over.choice
        where = "processes" if choice.backend == "loky" else f"threads, as {choice.reason}"
        return f"{took}: the rest was handed over to {where}"

    def put(self, start: int, items: Sequence[Any]) -> None:
        """Run the items now, or have workers run them, which may take over just here."""
        if self._workers is None and self._pays():
            self._hand_over_rest()
        if self._workers is None:
            with self._hand_over.look_at_function():
                self._caller.put(start, items)
            return
        try:
            self._workers.put(start, items)
        except UnsendableError as unsendable:
            if len(items) > 1:
                raise
            self._warn("an item", unsendable.error)
            self._caller.put(start, items)

    def _pays(self) -> bool:
        if self._is_stuck or self._n_done == 0 or not self._hand_over.decide():
            return False
        offer = self._hand_over.make_offer()
        n_left = max(self._n_done, offer.n_workers)
        saving = estimate_saving(n_left, n_left, self._cost.item_seconds, offer)
        return saving > 0 and self._cost.is_believed(offer)

    def _hand_over_rest(self) -> None:
        try:
            if not self._hand_over.is_ready():
                return
            self._context = self._hand_over.open_queue()
            self._workers = self._context.__enter__()
        except Exception as error:
            if is_raised_by_handler(error):
                raise
            self._is_stuck = True
            self._warn("the function", error)
        else:
            self._workers.ledger.count_before(self._n_done)

    def _warn(self, what: str, error: Exception) -> None:
        text = (
            f"{what} could not be sent to worker processes ({type(error).__name__}: "
            f"{get_text(error)}), so it runs in the caller"
        )
        if not self.notes:
            warn_user(f"{text}; make it picklable, or pass backend='threading'")
            self.notes.append(text)

    def get(self, seconds: float) -> list[BatchResult]:
        """Return the results that have come; if there are none, wait up to `seconds` for one."""
        results = self._caller.get(0.0)
        if self._workers is None:
            for batch in results:
                n_items = batch.stop - batch.start
                self._cost.add(n_items, batch.busy_ns / 1e9)
                self._n_done += n_items
            return results
        return [*results, *self._workers.get(0.0 if results else seconds)]

    def close(self) -> RunResult:
        """Stop the workers, without waiting for those that do not finish their range soon."""
        own = self._caller.close()
        if self._workers is None:
            return own
        result = self._workers.close()
        result.worker_stats.insert(0, own.worker_stats[0])
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._hand_over.close()
        if self._context is not None:
            self._context.__exit__(*error)

"""Short maps over kernels: the loop that an earlier call has compiled, and little else.

Such a call is one or a few calls of the loop (`taskcarrier.arrays.kernels.loops`) by the caller, or
by a crew. If the kernel raises, the general way says where; it calls the kernel for no item again.
If the call takes too long, the general way runs it from its beginning, unless the kernel runs
Python, prints or draws random numbers: nothing else could notice that.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Self

import numpy as np

from taskcarrier.arrays.kernels.compiler import FoundLoop, find_loop
from taskcarrier.arrays.kernels.fused import to_loop_arguments
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.short_calls import Patience, ShortCall
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.records import Raised

# Python handles Ctrl-C between two calls of a loop. The first has one item. After a call that takes
# fewer seconds, the next has so many times the items; after one that takes so many times longer,
# that part of them.
_CALL_SECONDS = 0.001
_GROWTH = 4

_free_ledgers: list[Ledger] = []


class LoopWork:
    """The work of one call (`taskcarrier.short_calls.ShortWork`).

    Parameters
    ----------
    found : FoundLoop
        The loop, and what the kernel returns.
    arrays : tuple of ndarray
        The mapped arrays.
    args : tuple
        Further arguments: numbers.
    patience : Patience, optional
        The time that the call may take.
    """

    def __init__(
        self,
        found: FoundLoop,
        arrays: tuple[np.ndarray, ...],
        args: tuple[Any, ...],
        patience: Patience | None,
    ) -> None:
        self.outcomes: dict[int, Any] = {}
        self._loop, self._result = found.loop, found.result
        self._arrays = arrays  # which live as long as their addresses are in use
        self._n_items = len(arrays[0])
        self._outs = [np.empty(self._n_items, dtype) for dtype in self._result.dtypes]
        self._arguments = [
            *to_loop_arguments(arrays, [0] * len(arrays)),
            *to_loop_arguments(self._outs, [0] * len(self._outs)),
            *args,
        ]
        self._n_at_once = 1
        self._patience = patience
        self._done: list[tuple[int, int]] = []  # ranges of items

    @classmethod
    def find(
        cls,
        call: ShortCall,
        arrays: tuple[np.ndarray, ...],
        args: tuple[Any, ...],
        most_nbytes: int,
    ) -> Self | None:
        """Return the work of a call; None if no loop was compiled for it.

        And if the results have more than `most_nbytes` bytes: the general way asks for room first.
        """
        found = find_loop(call.func, arrays, args)
        if found is None:
            return None
        if len(arrays[0]) * sum(dtype.itemsize for dtype in found.result.dtypes) > most_nbytes:
            return None
        # A call whose time is up is run from its beginning.
        may_begin_again = call.known is not None and not found.has_effects
        return cls(found, arrays, args, Patience(call.func) if may_begin_again else None)

    def run_unit(self, start: int, stop: int) -> bool:
        """Run a unit, in any thread; return whether the call is still usual."""
        ledger = _take_ledger()
        begin = start
        while begin < stop:
            if begin > start and self._patience is not None and self._patience.has_ended:
                return False
            end = min(stop, begin + self._n_at_once)
            before = perf_counter()
            try:
                # It claims nothing.
                self._loop(
                    ledger.address, ledger.row_address(0), begin, end, 0, 0, 0, 1, self._n_items,
                    *self._arguments,
                )  # fmt: skip
            except Exception as error:
                if is_raised_by_handler(error):
                    raise
                _, item = ledger.loop_position(0)
                self._done.append((start, item))
                self.outcomes[item] = Raised(error)
                return False
            seconds = perf_counter() - before
            if seconds < _CALL_SECONDS and end < stop:
                self._n_at_once *= _GROWTH
            elif seconds > _GROWTH * _CALL_SECONDS:
                self._n_at_once = -(-self._n_at_once // _GROWTH)
            begin = end
        _free_ledgers.append(ledger)
        self._done.append((start, stop))
        return True

    def join_results(self) -> np.ndarray | tuple[np.ndarray, ...] | None:
        """Return the result; None if some of it is missing, with the outcomes if it has failed."""
        if self.outcomes:
            # The results are not needed: the call ends with an error.
            zeros = tuple(np.zeros((), dtype)[()] for dtype in self._result.dtypes)
            zero = zeros if self._result.is_tuple else zeros[0]
            for start, stop in self._done:
                self.outcomes.update(dict.fromkeys(range(start, stop), zero))
            return None
        if sum(stop - start for start, stop in self._done) < self._n_items:
            return None
        return tuple(self._outs) if self._result.is_tuple else self._outs[0]


def _take_ledger() -> Ledger:
    """Return a ledger that no other loop uses now, for the item in which a loop is."""
    try:
        return _free_ledgers.pop()
    except IndexError:
        return Ledger.with_address(1)

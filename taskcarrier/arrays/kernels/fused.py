"""Fused loops as tasks: what a compiled loop over items needs to know, and what becomes of errors.

The loop itself is compiled in `taskcarrier.arrays.kernels.compiler`. In threads it claims ranges by itself
(`run_all`); in the caller, and where the kernel must get private copies, it is called range by range
as any other function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from taskcarrier.arguments import own_or_read_only
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.memory.strides import address_of, items_first
from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.records import PartialResult
from taskcarrier.workers.task import IN_PLACE, Deliver, Job, Propose


@dataclass(frozen=True, eq=False)
class FusedTask:
    """A compiled loop over the items of arrays of this process.

    Attributes
    ----------
    loop : callable
        The loop (`taskcarrier.arrays.kernels.compiler.fused_loop`).
    arrays, axes : list of ndarray, list of int
        The mapped arrays, and the mapped axis of each.
    outs : list of ndarray
        The outputs, their mapped axis first.
    extras : tuple
        What else the kernel gets.
    n_items : int
        Items along the mapped axis.
    takes_copies : bool
        Whether it gets private, writable copies of its items.
    copies_args : bool
        Whether every worker gets such copies of arrays in its arguments.
    collect_errors : bool
        Whether errors are collected; else the first one ends the run.
    """

    loop: Callable[..., None]
    arrays: list[np.ndarray]
    axes: list[int]
    outs: list[np.ndarray]
    extras: tuple[Any, ...]
    n_items: int
    takes_copies: bool
    copies_args: bool
    collect_errors: bool
    _ledgers: list[Ledger] = field(default_factory=list)

    @cached_property
    def array_arguments(self) -> list[Any]:
        """The mapped arrays as the loop takes them."""
        return _all_arguments(self.arrays, self.axes)

    @cached_property
    def out_arguments(self) -> list[Any]:
        """The outputs as the loop takes them."""
        return _all_arguments(self.outs, [0] * len(self.outs))

    def halt(self) -> None:
        """The call is over: loops that are told what to run write nothing any more."""
        for ledger in list(self._ledgers):
            ledger.halt()

    def open(self, propose: Propose) -> FusedRunner:  # noqa: ARG002, D102  # all is known; as in Task
        return FusedRunner(self)


class FusedRunner:
    """A `FusedTask` opened in one worker."""

    def __init__(self, task: FusedTask) -> None:
        self._task = task
        # What is passed by address must live as long as this.
        self._extras = [own_or_read_only(value, own=task.copies_args) for value in task.extras]
        self._after: list[Any] = []
        for value in self._extras:
            if isinstance(value, np.ndarray):
                self._after += [address_of(value), value.shape, value.strides]
            else:
                self._after.append(value)

    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Claim ranges and run them until there are none; without the GIL, but for errors."""
        plan = job.balance.plan(worker, job.n_workers, len(job.grid))
        first, last = (plan.start, plan.stop) if job.balance.name == "static" else (0, -1)
        chunksize = min(job.grid.chunksize, job.grid.n_items)  # a word holds it
        parts = PartialResult([], [])
        begin = end = 0
        while True:
            try:
                claims = (first, last, len(job.grid), chunksize)
                self._run(ledger, worker, (begin, end, *claims), self._task.array_arguments)
                break
            except Exception as error:
                index, item = ledger.loop_position(worker)
                if not self._task.collect_errors:
                    add_note(error, f"func failed on item {item}")
                    raise
                parts.faults.append((item, item + 1, error))
                start = begin if begin < end and begin // chunksize == index else index * chunksize
                begin, end = item + 1, job.grid.range_of(index)[1]
                ledger.count(worker, begin - start, finished=begin == end)
                first = max(first, index + 1)
        if parts.faults:
            deliver(parts.faults[0][0], parts)

    def __call__(self, start: int, stop: int) -> Any:
        """Run one range, with private copies if the kernel wants them."""
        ledger = self._own_ledger
        parts = PartialResult([], [])
        arrays = self._task.array_arguments
        if self._task.takes_copies:
            copies = [
                _copy_items(items_first(array, axis)[start:stop])
                for array, axis in zip(self._task.arrays, self._task.axes, strict=True)
            ]
            arrays = _all_arguments(copies, [0] * len(copies))
            # The loop counts items from the first of all.
            arrays[::4] = [
                first - start * step for first, step in zip(arrays[::4], arrays[1::4], strict=True)
            ]
        begin = start
        while begin < stop:
            try:
                self._run(ledger, 0, (begin, stop, 0, 0, 0, 1), arrays)  # claims nothing
                break
            except Exception as error:
                _, item = ledger.loop_position(0)
                if not self._task.collect_errors or is_of_the_program(error):
                    add_note(error, f"func failed on item {item}")
                    raise
                parts.faults.append((item, item + 1, error))
                begin = item + 1
        return parts if parts.faults else IN_PLACE

    @cached_property
    def _own_ledger(self) -> Ledger:
        """Of this worker alone, where it is told what to run."""
        ledger = Ledger.with_address(1)
        self._task._ledgers.append(ledger)
        return ledger

    def _run(
        self,
        ledger: Ledger,
        worker: int,
        ranges: tuple[int, ...],
        arrays: list[Any],
    ) -> None:
        self._task.loop(
            ledger.address,
            ledger.row_address(worker),
            *ranges,
            self._task.n_items,
            *arrays,
            *self._task.out_arguments,
            *self._after,
        )

    def facts(self) -> tuple[int, Spec] | None:
        """Nothing: what results are like is known before."""
        return None


def _copy_items(items: np.ndarray) -> np.ndarray:
    """A private copy whose items lie as they did: the loop was compiled for that."""
    if items[0].flags.f_contiguous and not items[0].flags.c_contiguous:
        backwards = (0, *range(items.ndim - 1, 0, -1))
        return items.transpose(backwards).copy(order="C").transpose(backwards)
    return items.copy(order="C")


def _all_arguments(arrays: list[np.ndarray], axes: list[int]) -> list[Any]:
    """Arrays as fused loops take them: address, then of an item its stride, shape and strides."""
    arguments: list[Any] = []
    for array, axis in zip(arrays, axes, strict=True):
        shape, strides = array.shape, array.strides
        arguments += [
            address_of(array),
            strides[axis],
            shape[:axis] + shape[axis + 1 :],
            strides[:axis] + strides[axis + 1 :],
        ]
    return arguments

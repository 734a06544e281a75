"""Fused loops as tasks: the arguments of a compiled loop over items, and how errors are handled.

The loop is compiled in `taskcarrier.arrays.kernels.compiler`. In threads it claims chunks itself
(`run_all`). In the caller, and if the kernel must get private copies, it is called for one range
after the other like any other function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from taskcarrier.memory.strides import address_of, move_items_first
from taskcarrier.memory.views import copy_or_make_read_only
from taskcarrier.notes import add_note
from taskcarrier.record import record
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.records import DeliveredFailure, PartialResult
from taskcarrier.workers.task import (
    IN_PLACE,
    CompiledTask,
    Deliver,
    Job,
    RunRange,
    WorkerContext,
)

if TYPE_CHECKING:
    from taskcarrier.arrays.kernels.signatures import WritableArgs  # loads numba


@record(kw_only=True)
class FusedTask:
    """A compiled loop over the items of arrays of this process.

    Attributes
    ----------
    loop : callable
        The loop (`taskcarrier.arrays.kernels.compiler.compile_loop`).
    arrays : list of ndarray
        The mapped arrays.
    axes : list of int
        The mapped axis of each array.
    outs : list of ndarray
        The outputs, with their mapped axis first.
    extras : tuple
        The further arguments of the kernel.
    n_items : int
        The number of items along the mapped axis.
    writable_args : WritableArgs
        Of which arguments a worker gets private, writable copies.
    collect_errors : bool
        Whether errors are collected; otherwise the first one ends the run.
    """

    loop: Callable[..., None]
    arrays: list[np.ndarray]
    axes: list[int]
    outs: list[np.ndarray]
    extras: tuple[Any, ...]
    n_items: int
    writable_args: WritableArgs
    collect_errors: bool
    _ledgers: list[Ledger] = field(default_factory=list)

    @cached_property
    def array_arguments(self) -> list[Any]:
        """The mapped arrays, as arguments of the loop."""
        return to_loop_arguments(self.arrays, self.axes)

    @cached_property
    def out_arguments(self) -> list[Any]:
        """The outputs, as arguments of the loop."""
        return to_loop_arguments(self.outs, [0] * len(self.outs))

    def halt(self) -> None:
        """Keep loops that run given ranges from writing any more: the call is over."""
        for ledger in list(self._ledgers):
            ledger.halt()

    def start(self, worker: WorkerContext) -> RunRange:  # noqa: ARG002  # nothing to agree on
        """Start the loop in a worker that passes it the ranges to run."""
        return FusedRunner(self).run


class ClaimingTask(FusedTask, CompiledTask):
    """A fused loop that claims chunks by itself."""

    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Claim chunks and run them until none is left."""
        FusedRunner(self).run_all(job, ledger, worker, deliver)


class FusedRunner:
    """A `FusedTask` that was started in one worker."""

    def __init__(self, task: FusedTask) -> None:
        self._task = task
        # Arrays that are passed by address must live as long as the runner.
        self._extras = [
            copy_or_make_read_only(value, own=task.writable_args.args) for value in task.extras
        ]
        self._extra_arguments: list[Any] = []
        for value in self._extras:
            if isinstance(value, np.ndarray):
                self._extra_arguments += [address_of(value), value.shape, value.strides]
            else:
                self._extra_arguments.append(value)

    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Claim chunks and run them until none are left; the GIL is taken for errors only."""
        plan = job.balance.plan(worker, job.n_workers, len(job.grid), job.begun.first)
        next_own, stop_own = (plan.start, plan.stop) if job.balance.name == "static" else (0, -1)
        chunksize = min(job.grid.chunksize, job.grid.n_items)  # so that it fits into a word
        partial = PartialResult([], [])
        begin = end = 0
        while True:
            try:
                claims = (next_own, stop_own, len(job.grid), chunksize)
                self._run_loop(ledger, worker, (begin, end, *claims), self._task.array_arguments)
                break
            except Exception as error:
                index, item = ledger.loop_position(worker)
                if not self._task.collect_errors:
                    add_note(error, f"func failed on item {item}")
                    raise
                partial.failures.append(DeliveredFailure(item, item + 1, error))
                start = begin if begin < end and begin // chunksize == index else index * chunksize
                begin, end = item + 1, job.grid.range_of(index)[1]
                ledger.count(worker, begin - start, finished=begin == end)
                next_own = max(next_own, index + 1)
        if partial.failures:
            deliver(partial.failures[0].start, partial)

    def run(self, start: int, stop: int) -> Any:
        """Run one range, with private copies if the kernel needs them."""
        ledger = self._own_ledger
        partial = PartialResult([], [])
        arrays = self._task.array_arguments
        if self._task.writable_args.items:
            copies = [
                _copy_items(move_items_first(array, axis)[start:stop])
                for array, axis in zip(self._task.arrays, self._task.axes, strict=True)
            ]
            arrays = to_loop_arguments(copies, [0] * len(copies))
            # The loop counts items from the first of the whole array, so shift addresses.
            arrays[::4] = [
                address - start * stride
                for address, stride in zip(arrays[::4], arrays[1::4], strict=True)
            ]
        begin = start
        while begin < stop:
            try:
                self._run_loop(ledger, 0, (begin, stop, 0, 0, 0, 1), arrays)  # claims nothing
                break
            except Exception as error:
                _, item = ledger.loop_position(0)
                if not self._task.collect_errors or is_raised_by_handler(error):
                    add_note(error, f"func failed on item {item}")
                    raise
                partial.failures.append(DeliveredFailure(item, item + 1, error))
                begin = item + 1
        return partial if partial.failures else IN_PLACE

    @cached_property
    def _own_ledger(self) -> Ledger:
        """The ledger of this worker alone, for ranges that it is called with."""
        ledger = Ledger.with_address(1)
        self._task._ledgers.append(ledger)
        return ledger

    def _run_loop(
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
            *self._extra_arguments,
        )


def _copy_items(items: np.ndarray) -> np.ndarray:
    """Return a private copy whose items have the same layout: the loop was compiled for that."""
    if items[0].flags.f_contiguous and not items[0].flags.c_contiguous:
        backwards = (0, *range(items.ndim - 1, 0, -1))
        return items.transpose(backwards).copy(order="C").transpose(backwards)
    return items.copy(order="C")


def to_loop_arguments(arrays: Sequence[np.ndarray], axes: Sequence[int]) -> list[Any]:
    """Return arrays as arguments of fused loops: address; stride, shape and strides of an item."""
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

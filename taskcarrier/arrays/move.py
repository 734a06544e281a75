"""How the work of a map gets from the caller's memory to worker processes, when it has begun."""

from __future__ import annotations

from dataclasses import dataclass, replace

from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.outputs.buffers import LocalBuffer, SharedBuffer, open_place
from taskcarrier.arrays.outputs.request import OutputRequest
from taskcarrier.arrays.outputs.specs import Spec
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.ledger import Begun
from taskcarrier.workers.records import PartialResult
from taskcarrier.workers.snapshots import Snapshot
from taskcarrier.workers.task import Deliver, Task


@dataclass(eq=False)
class ArrayMove:
    """The move of a call over arrays (`taskcarrier.workers.task.Move`).

    Attributes
    ----------
    call : ArrayCall
        The call.
    snapshot : Snapshot
        Its function as it was before the caller called it.
    request : OutputRequest or None
        What the user said about outputs; None if results are for the caller.
    buffer : LocalBuffer or None
        The outputs in the caller's memory, likewise.
    moved : SharedBuffer or None
        The outputs in shared memory, after the move.
    """

    call: ArrayCall
    snapshot: Snapshot
    request: OutputRequest | None = None
    buffer: LocalBuffer | None = None
    moved: SharedBuffer | None = None

    def count_item_bytes(self) -> tuple[float, float]:
        """Return the bytes of an item, and those of its result as far as they are known."""
        inputs = self.call.inputs
        returned = 0 if self.buffer is None else self.buffer.nbytes
        return inputs.nbytes / inputs.n_items, returned / inputs.n_items

    def move(self, staging: Staging, begun: Begun, deliver: Deliver) -> Task:
        """Return the task for processes, with the results of what was done before."""
        if self.buffer is not None and self.request is not None:
            shared = self.call.make_shared_buffer()
            self.request.move(self.buffer, shared)
            if begun.proposal is not None:
                n_done = min(begun.first * self.call.grid.chunksize, self.call.inputs.n_items)
                _move_results(self.buffer, shared, begun.proposal, n_done, deliver)
            self.moved = shared
        call = replace(self.call, call=self.snapshot.restore())
        return call.make_work(staging, self.moved).task


def _move_results(
    local: LocalBuffer, shared: SharedBuffer, spec: Spec, n_done: int, deliver: Deliver
) -> None:
    """Copy the results of the first `n_done` items to shared memory, or deliver them."""
    done = [(slice(None),) * axis + (slice(0, n_done),) for axis in spec.axes]
    arrays = [open_place(place) for place in local.make_places(spec)]
    places = shared.make_places(spec)
    if places is None:
        results = [array[index] for array, index in zip(arrays, done, strict=True)]
        deliver(0, PartialResult([(slice(0, n_done), results)], []))
        return
    outputs = shared.get_outputs(len(spec.parts))
    for array, index, place, output in zip(arrays, done, places, outputs, strict=True):
        if output.place is None:  # else it lies where the caller has written it
            open_place(place)[index] = array[index]

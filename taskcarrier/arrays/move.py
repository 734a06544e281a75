"""How the work of a map gets from the caller's memory to worker processes, when it has begun."""

from __future__ import annotations

from dataclasses import dataclass, field

from taskcarrier.arrays.call import ArrayCall
from taskcarrier.arrays.kernels.prepare import PreparedCall
from taskcarrier.arrays.outputs.buffers import LocalBuffer, SharedBuffer, open_place
from taskcarrier.arrays.outputs.request import OutputRequest
from taskcarrier.arrays.outputs.specs import DeferredResult, Spec
from taskcarrier.workers.call import Call
from taskcarrier.workers.snapshots import Snapshot
from taskcarrier.workers.task import Task


@dataclass(eq=False)
class ArrayMove:
    """The move of a call over arrays (`taskcarrier.workers.task.Move`).

    It is made before the caller calls the function.

    Attributes
    ----------
    call : ArrayCall
        The call.
    request : OutputRequest or None
        What the user said about outputs; None if results are for the caller.
    buffer : LocalBuffer or None
        The outputs in the caller's memory, likewise.
    snapshot : Snapshot
        Its function as it was before the caller called it.
    moved : SharedBuffer or None
        The outputs in shared memory, once processes have begun.
    notes : list of str
        Notes for the report, known when the task is made.
    kept : list of DeferredResult
        Results of the caller that do not fit there: they are written first of all that is deferred.
    """

    call: ArrayCall
    request: OutputRequest | None = None
    buffer: LocalBuffer | None = None
    moved: SharedBuffer | None = None
    snapshot: Snapshot = field(init=False)
    notes: list[str] = field(default_factory=list)
    kept: list[DeferredResult] = field(default_factory=list)
    _prepared: PreparedCall | None = None
    _shared: SharedBuffer | None = None

    def __post_init__(self) -> None:
        staging = self.call.settings.new_staging()
        self.snapshot = Snapshot(self.call.call, self._make_sent, staging)

    def _make_sent(self) -> Call:
        self._prepared = self.call.prepare(in_processes=True)
        return self._prepared.call

    def count_item_bytes(self) -> tuple[float, float]:
        """Return the bytes of an item, and those of its result as far as they are known."""
        inputs = self.call.inputs
        returned = 0 if self.buffer is None else self.buffer.nbytes
        return inputs.nbytes / inputs.n_items, returned / inputs.n_items

    @property
    def runs_user_code(self) -> bool:
        """Whether the arrays hold Python objects."""
        return any(dtype.hasobject for dtype in self.call.inputs.dtypes)

    def make_task(self, first: int) -> Task:  # noqa: ARG002  # arrays are sent as a whole
        """Return the task for processes, which writes to shared memory."""
        if self.buffer is not None and self.request is not None:
            self._shared = self.call.make_shared_buffer()
            self.request.move(self.buffer, self._shared)
        return self.call.make_work(
            self.snapshot.staging, self._shared, prepared=self._prepared
        ).task

    def begin(self) -> None:
        """Let the outputs lie where processes write them."""
        self.moved = self._shared

    def carry(self, items: tuple[int, int], proposal: Spec, agreed: Spec) -> None:
        """Copy the caller's results of `items` to shared memory, or keep them for the caller.

        They are kept if they are Python objects, or if their spec is not the agreed one. Some items
        may have failed, or were delivered: what lies in their place is of no use.
        """
        if self.buffer is None or self._shared is None:
            return
        start, stop = items
        where = slice(start, stop)
        indices = [(slice(None),) * axis + (where,) for axis in proposal.axes]
        arrays = [open_place(place) for place in self.buffer.make_places(proposal)]
        results = [array[index] for array, index in zip(arrays, indices, strict=True)]
        places = self._shared.make_places(proposal)
        if places is None or proposal != agreed:
            self.kept.append((where, results))
            return
        outputs = self._shared.get_outputs(len(proposal.parts))
        for result, index, place, output in zip(results, indices, places, outputs, strict=True):
            if output.place is None:  # else it lies where the caller has written it
                open_place(place)[index] = result

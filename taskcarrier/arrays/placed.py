"""Maps whose results are put in place: from a checked call and request to the result."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from taskcarrier.arrays.call import ArrayCall, Outcomes, Work
from taskcarrier.arrays.kernels.prepare import FusedLoop, fuse_loop
from taskcarrier.arrays.move import ArrayMove
from taskcarrier.arrays.outputs.buffers import LocalBuffer, OutputBuffer
from taskcarrier.arrays.outputs.request import OutputRequest
from taskcarrier.arrays.outputs.specs import DeferredResult, DisagreementError, Spec
from taskcarrier.notes import add_note
from taskcarrier.run import (
    ResumedMarks,
    RunOutcome,
    raise_first_failure,
    raise_if_missing,
)
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.introspect import is_jitted
from taskcarrier.workers.records import DeliveredFailure, RangeFailure, list_failed_ranges

if TYPE_CHECKING:
    from taskcarrier.arrays.resume.ledger_file import LedgerFile


@dataclass(eq=False)
class PlacedMap:
    """A checked map whose results are put in place.

    Attributes
    ----------
    call : ArrayCall
        The function and the arrays.
    request : OutputRequest
        Where results go.
    on_error : str
        What becomes of failures.
    resume : bool
        Whether the map goes on where an earlier one ended.
    """

    call: ArrayCall
    request: OutputRequest
    on_error: str
    resume: bool

    def run(self, outcomes: Outcomes | None = None) -> Any:
        """Run the map; return what the verb returns.

        `outcomes` are what the function has returned or raised before (`ArrayTask.outcomes`).
        """
        call, request = self.call, self.request
        ledger_file = self._open_ledger_file() if self.resume else None
        buffer: OutputBuffer | None = None
        fusion: FusedLoop | None = None
        try:
            executor = call.decide(outcomes)
            buffer = self._make_buffer(executor)
            request.apply_to(
                buffer,
                keep_files=ledger_file is not None,
                is_resumed=ledger_file is not None and not ledger_file.is_new,
            )
            marks = None if ledger_file is None else _reset_marks(ledger_file, buffer)
            fusion, fusing_ns = (None, 0) if outcomes else self._fuse(executor, buffer)
            work = (
                call.make_work(executor.staging, buffer, fusing_ns, outcomes=outcomes)
                if fusion is None
                else Work(fusion.task, fusion.notes, fusing_ns)
            )
            move = (
                ArrayMove(call, request, buffer)
                if isinstance(buffer, LocalBuffer) and executor.may_move
                else None
            )
            outcome = call.execute(work, executor, move=move, resumed=marks)
            kept: list[DeferredResult] = []
            if move is not None and move.moved is not None:
                buffer.close()
                buffer, kept = move.moved, move.kept
            spec, arrays, failures = self._complete(buffer, fusion, outcome, kept)
            result = None if spec is None else request.finish(buffer, spec, arrays)
            if ledger_file is not None and result is not None:
                ledger_file.remove()
        finally:
            if fusion is not None:
                fusion.task.halt()
            if buffer is not None:
                buffer.close()
            request.discard()
            if ledger_file is not None:
                ledger_file.close()
            if outcomes:  # errors that were not raised refer to frames, and these to them
                outcomes.clear()
        return self._hand_out(result, failures)

    def _open_ledger_file(self) -> LedgerFile:
        """Open the ledger file beside the first output."""
        request = self.request
        if not request.paths or len(request.paths) != len(request.entries):
            raise ValueError(
                "resume=True needs out= as a path that ends in .npy (or several of them)"
            )
        options = {
            "out_axis": request.out_axis,
            "outputs": (len(request.paths), request.is_tuple),
            "dtype": request.dtypes if any(one is not None for one in request.dtypes) else None,
        }
        return self.call.open_ledger_file(request.paths[0], options)

    def _make_buffer(self, executor: Executor) -> OutputBuffer:
        """Make memory for outputs where the workers will write."""
        inputs = self.call.inputs
        if executor.staging is None:
            return LocalBuffer(n_items=inputs.n_items, order=inputs.order)
        return self.call.make_shared_buffer()

    def _fuse(self, executor: Executor, buffer: OutputBuffer) -> tuple[FusedLoop | None, int]:
        """Return a compiled loop over the items, if one is possible, and the nanoseconds it took.

        A map that can be resumed uses none whose results are cast at the end.
        """
        call, retry_policy = self.call, self.call.settings.retry_policy
        if not call.by_item or not isinstance(buffer, LocalBuffer) or call.inputs.n_items == 0:
            return None, 0
        if not is_jitted(call.call.func) or executor.may_move:
            return None, 0  # the results of a loop could not be moved to processes
        if retry_policy.retry_on or call.streams is not None:
            return None, 0  # both are handled around each call from Python
        begin = monotonic_ns()
        fusion = fuse_loop(
            call.call,
            call.inputs,
            buffer,
            call.row,
            writable=call.writable,
            collect_errors=call.collect_errors,
            # Timeouts and marks of finished ranges need Python code between two ranges.
            may_claim=executor.can_run_compiled
            and retry_policy.timeout is None
            and not self.resume,
        )
        if fusion is not None and self.resume:
            earlier = buffer.earlier_spec
            if fusion.uncast_results:
                fusion = None
            elif earlier is not None and earlier.parts != fusion.spec.parts:
                raise ValueError(
                    f"func gives {fusion.spec.describe(buffer.n_items)}, but the earlier run gave "
                    f"{earlier}; remove its .ledger to start over, or choose another out="
                )
        return fusion, monotonic_ns() - begin

    def _complete(
        self,
        buffer: OutputBuffer,
        fusion: FusedLoop | None,
        outcome: RunOutcome,
        kept: list[DeferredResult],
    ) -> tuple[Spec | None, list[np.ndarray], list[DeliveredFailure]]:
        """Return spec and outputs of a run, if there are any, and the failures.

        `kept` are results to be written before those that were delivered. Raises what went wrong in
        the run.
        """
        call = self.call
        describe = call.inputs.describe
        if fusion is None:
            spec = check_agreement(outcome, call, promote_dtypes=buffer.promote_dtypes)
            spec = spec or buffer.earlier_spec
        else:
            spec = fusion.spec
        call.explain_ufunc_errors(outcome)
        raise_first_failure(outcome, describe)
        delivered = [parts for _, parts in outcome.delivered]
        failures = call.collect_failures(delivered)
        deferred = [*kept, *(result for parts in delivered for result in parts.results)]
        if fusion is not None:
            deferred += fusion.cast_deferred(failures)
            if sum(stop - start for start, stop, _ in failures) == call.inputs.n_items:
                spec = None  # every item failed: unknown, as it would be without a loop
        if spec is None:
            raise_if_missing(outcome, describe, outcome.missing, lambda: None)
            return None, [], failures
        arrays = buffer.complete(
            spec, deferred, [slice(start, stop) for start, stop, _ in failures]
        )
        partial = tuple(arrays) if spec.is_tuple else arrays[0]
        raise_if_missing(outcome, describe, outcome.missing, lambda: partial)
        return spec, arrays, failures

    def _hand_out(self, result: Any, failures: list[DeliveredFailure]) -> Any:
        """Return what the verb returns; raise if all items failed and errors are not collected."""
        if self.on_error == "collect":
            return result, list_failed_ranges(failures)
        if result is None:
            error = failures[0].error
            failures.clear()
            add_note(error, "every item failed, so the shape of the result is not known")
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        failures.clear()  # their tracebacks refer to it too
        return result


def _reset_marks(resumed: LedgerFile, buffer: OutputBuffer) -> ResumedMarks:
    """Return the marks of an earlier run, or none of them if its results are of no use."""
    n_done = resumed.begin(start_over=buffer.earlier_spec is None)
    return ResumedMarks(resumed.marks, n_done, resumed.notes)


def check_agreement(outcome: RunOutcome, call: ArrayCall, *, promote_dtypes: bool) -> Spec | None:
    """Return the spec that results agree on; give the outcome a failure for each that differs.

    The reference is the lowest chunk that has a result. Under dynamic balance and in the
    caller, both that chunk and the lowest one that differs from it are the same on every run.
    If no worker that is left agrees with the results in place, the reference is the spec that a
    worker proposed which has died since.
    """
    first_specs = [
        (*stats.facts, stats.name) for stats in outcome.worker_stats if stats.facts is not None
    ]
    first_proposal: Spec | None = outcome.first_proposal
    if not first_specs or first_proposal is None:
        return first_proposal  # if any, from a worker that has died since
    if any(
        first_proposal.agrees(spec, promote_dtypes=promote_dtypes) for _, spec, _ in first_specs
    ):
        reference_start, reference, _ = min(first_specs, key=lambda first: first[0])
    else:
        reference_start, reference = None, first_proposal
    chunksize = call.grid.chunksize
    failures = {
        start // chunksize: RangeFailure(
            call.grid.range_of(start // chunksize), DisagreementError(spec), name
        )
        for start, spec, name in first_specs
        if not reference.agrees(spec, promote_dtypes=promote_dtypes)
    }
    others = []
    for failure in outcome.failures:
        if isinstance(failure.error, DisagreementError):
            if not reference.agrees(failure.error.spec, promote_dtypes=promote_dtypes):
                failures.setdefault(failure.start // chunksize, failure)
        else:
            others.append(failure)
    for failure in failures.values():
        failure.error = _make_disagreement_error(failure, reference_start, reference, call)
    outcome.failures = sorted([*failures.values(), *others], key=lambda failure: failure.start)
    return first_proposal


def _make_disagreement_error(
    failure: RangeFailure, reference_start: int | None, reference: Spec, call: ArrayCall
) -> BaseException:
    assert isinstance(failure.error, DisagreementError)  # for the type checker
    assert failure.range is not None  # likewise
    start, stop = failure.range

    def describe(spec: Spec, length: int) -> str:
        return spec.describe_item() if call.by_item else spec.describe(length)

    if reference_start is None:
        expected = f"{describe(reference, stop - start)} in a worker that has died since"
    else:
        first, last = call.grid.range_of(reference_start // call.grid.chunksize)
        expected = f"{describe(reference, last - first)} for items {first}:{last}"
    has_text = any(dtype.kind in "SU" for dtype, _ in reference.parts)
    remedy = "pass dtype=" + ", of text with a length, as 'U20'" * has_text
    if call.by_item:
        return ValueError(
            f"func returned {describe(failure.error.spec, 1)} for each of the items "
            f"{start}:{stop}, but {expected}; every item must give results of the same shape and "
            f"dtype ({remedy}); a mapper returns a list of results of any shape"
        )
    return ValueError(
        f"func returned {failure.error.spec.describe(stop - start)} for axis "
        f"{call.inputs.axes[0]}, items {start}:{stop}, but {expected}; it must return the same "
        "dtype and the same shape but for the mapped axis for every chunk (for example with "
        f".astype, or {remedy}); results of any shape go to map_chunks, or to a mapper"
    )

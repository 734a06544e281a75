"""One call over arrays, from its arguments to its results: the part that all verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any

import numpy as np

from taskcarrier.arguments import check_callable, check_chunksize, check_extras
from taskcarrier.arrays.inputs.check import Inputs, check_inputs
from taskcarrier.arrays.inputs.halos import Halo, check_halo
from taskcarrier.arrays.inputs.sources import local_sources, sources_for_processes
from taskcarrier.arrays.kernels.prepare import FusedLoop, RowOutput, fuse_loop, prepare_call
from taskcarrier.arrays.outputs.buffers import LocalBuffer, OutputBuffer, SharedBuffer
from taskcarrier.arrays.outputs.request import OutputRequest
from taskcarrier.arrays.outputs.specs import DisagreementError, Spec
from taskcarrier.arrays.resume.computation import Computation
from taskcarrier.arrays.resume.ledger_file import LedgerFile
from taskcarrier.arrays.task import ArrayTask
from taskcarrier.notes import add_note, get_text
from taskcarrier.random_streams import RandomStreams, WithRandomStream, random_streams_for
from taskcarrier.run import (
    ResumedMarks,
    RunOutcome,
    Settings,
    decide,
    execute,
    raise_first_failure,
    raise_if_missing,
    run_nothing,
)
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid, item_grid
from taskcarrier.scheduling.retries import WithRetries
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import check_for_arrays
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.introspect import is_jitted
from taskcarrier.workers.records import Fault, PartialResult, RangeFailure
from taskcarrier.workers.task import Task

# What to pass instead of an array that holds no numbers, by the kind of its dtype.
_NO_NUMBERS = {
    **dict.fromkeys(
        "SUTO",
        "pass X.astype(float) if its text is numbers, or the columns of numbers alone (of a data "
        "frame, frame.select_dtypes('number'))",
    ),
    "V": "pass its fields one by one, X['name']",
}


@dataclass(frozen=True, eq=False)
class _Work:
    """A task, and what is known of it before it runs."""

    task: Task
    notes: list[str]
    compiling_ns: int
    can_split: bool = False


@dataclass(eq=False, kw_only=True)
class ArrayCall:
    """A checked call of a function over ranges of arrays."""

    settings: Settings
    call: Call
    inputs: Inputs
    grid: ChunkGrid
    halo: Halo | None
    writable: bool
    by_item: bool
    collect_errors: bool
    started_ns: int
    row: RowOutput | None = None
    streams: RandomStreams | None = None

    @classmethod
    def from_options(
        cls,
        settings: Settings,
        func: Callable[..., Any],
        arrays: tuple[Any, ...],
        options: Mapping[str, Any],
        *,
        by_item: bool = False,
        collect_errors: bool = False,
        row: RowOutput | None = None,
    ) -> ArrayCall:
        """Check the arguments of a verb and make a call of them; an error says what is wrong."""
        started_ns = monotonic_ns()
        check_callable(func)
        inputs = check_inputs(arrays, options["axis"])
        extra_args, extra_kwargs = check_extras(options["args"], options["kwargs"])
        rng = options["rng"]
        if rng is not None and "rng" in extra_kwargs:
            raise TypeError("rng is given twice: as an option, and in kwargs")
        size = check_chunksize(options["chunksize"])
        halo = None
        if not by_item:
            halo = check_halo(options["depth"], options["boundary"], options["cval"], inputs)
        halo_depth = 0 if halo is None else halo.depth
        return cls(
            settings=settings,
            call=Call(func, extra_args, extra_kwargs),
            inputs=inputs,
            grid=item_grid(inputs.n_items, size)
            if by_item
            else chunk_grid(inputs.n_items, inputs.item_nbytes, size, halo_depth),
            halo=halo,
            writable=bool(options["writable"]),
            by_item=by_item,
            collect_errors=collect_errors,
            started_ns=started_ns,
            row=row,
            streams=None if rng is None else random_streams_for(func, rng),
        )

    @property
    def extras(self) -> tuple[Any, ...]:
        """The further arguments that the function gets."""
        return (*self.call.args, *self.call.kwargs.values())

    def with_function(self, func: Callable[..., Any]) -> ArrayCall:
        """Return the same call with another function, which gets chunks and nothing else."""
        return replace(self, call=Call(func), by_item=False, row=None, streams=None)

    def open_ledger_file(self, path: str, options: Mapping[str, object]) -> LedgerFile:
        """Open the ledger file of this computation, beside the output at `path`.

        `options` are further values that decide the results.
        """
        details = {
            "called with": "items" if self.by_item else "chunks",
            "writable": self.writable,
            "out_shape": None if self.row is None else self.row.shape,
            "rng": self.streams,
            **options,
        }
        computation = Computation.of(self.call, self.inputs, self.grid, self.halo, details)
        return LedgerFile(path, len(self.grid), computation)

    def run_in_place(
        self, request: OutputRequest, resumed: LedgerFile | None = None
    ) -> tuple[Any, list[Fault]]:
        """Run with results put in place; return the result of the verb, and the faults.

        With `resumed`, chunks that an earlier run has finished are left as they are.
        """
        executor = self._decide()
        buffer = self._make_buffer(executor)
        fusion: FusedLoop | None = None
        try:
            request.apply_to(
                buffer,
                keep_files=resumed is not None,
                is_resumed=resumed is not None and not resumed.is_new,
            )
            marks = None if resumed is None else _reset_marks(resumed, buffer)
            fusion, fusing_ns = self._fuse(executor, buffer, run_in_place=resumed is not None)
            if fusion is None:
                work = self._make_work(executor, buffer, fusing_ns)
            else:
                work = _Work(fusion.task, fusion.notes, fusing_ns)
            outcome = execute(
                work.task,
                self.grid,
                executor,
                self.settings,
                started_ns=self.started_ns,
                notes=work.notes,
                compiling=work.compiling_ns / 1e9,
                collect_errors=self.collect_errors,
                can_split=work.can_split,
                resumed=marks,
            )
            spec, arrays, faults = self._complete(buffer, fusion, outcome)
            return None if spec is None else request.finish(buffer, spec, arrays), faults
        finally:
            if fusion is not None:
                fusion.task.halt()
            buffer.close()
            request.discard()

    def _complete(
        self,
        buffer: OutputBuffer,
        fusion: FusedLoop | None,
        outcome: RunOutcome,
    ) -> tuple[Spec | None, list[np.ndarray], list[Fault]]:
        """Return spec and outputs of a run, if there are any, and the faults.

        Raises what went wrong in the run.
        """
        if fusion is None:
            spec = check_agreement(outcome, self, promote_dtypes=buffer.promote_dtypes)
            spec = spec or buffer.earlier_spec
        else:
            spec = fusion.spec
        self._explain_ufunc_errors(outcome)
        raise_first_failure(outcome, self.inputs.describe)
        delivered = [parts for _, parts in outcome.delivered]
        faults = self._collect_faults(delivered)
        deferred = [result for parts in delivered for result in parts.results]
        if fusion is not None:
            deferred += fusion.cast_deferred(faults)
            if sum(stop - start for start, stop, _ in faults) == self.inputs.n_items:
                spec = None  # every item failed: unknown, as it would be without a loop
        if spec is None:
            raise_if_missing(outcome, self.inputs.describe, outcome.missing, lambda: None)
            return None, [], faults
        arrays = buffer.complete(spec, deferred, [slice(start, stop) for start, stop, _ in faults])
        partial = tuple(arrays) if spec.is_tuple else arrays[0]
        raise_if_missing(outcome, self.inputs.describe, outcome.missing, lambda: partial)
        return spec, arrays, faults

    def run_collect(self) -> tuple[dict[int, Any], list[Fault]]:
        """Run the call; return results by the start of their range, and the faults."""
        executor = self._decide()
        work = self._make_work(executor, None, 0)
        outcome = execute(
            work.task,
            self.grid,
            executor,
            self.settings,
            started_ns=self.started_ns,
            notes=work.notes,
            compiling=work.compiling_ns / 1e9,
            collect_errors=self.collect_errors,
        )
        self._explain_ufunc_errors(outcome)
        raise_first_failure(outcome, self.inputs.describe)
        delivered = [parts for _, parts in outcome.delivered]
        results = {
            where.start: result
            for parts in delivered
            for where, result in parts.results
            if isinstance(where, slice)
        }
        faults = self._collect_faults(delivered)
        done = results.keys() | {start for start, _, _ in faults}
        ranges = list(map(self.grid.range_of, range(len(self.grid))))
        missing = [bounds for bounds in ranges if bounds[0] not in done]

        def list_results() -> list[Any]:
            return [results.get(start) for start, _ in ranges]

        raise_if_missing(outcome, self.inputs.describe, missing, list_results)
        return results, faults

    def _explain_ufunc_errors(self, outcome: RunOutcome) -> None:
        """Add notes to errors of ufuncs that say which array holds no numbers."""
        for failure in outcome.failures:
            if isinstance(failure.error, TypeError) and "ufunc" in get_text(failure.error):
                for number, dtype in enumerate(self.inputs.dtypes):
                    if remedy := _NO_NUMBERS.get(dtype.kind):
                        add_note(failure.error, f"array {number} has dtype {dtype}: {remedy}")

    def _decide(self) -> Executor:
        check_for_arrays(self.settings.backend)
        if self.inputs.n_items == 0:
            return run_nothing()
        return decide(self.settings, self.call.func, self.extras)

    def _make_buffer(self, executor: Executor) -> OutputBuffer:
        """Make memory for outputs where the workers will write."""
        n_items, order = self.inputs.n_items, self.inputs.order
        if executor.staging is None:
            return LocalBuffer(n_items=n_items, order=order)
        segment = self.settings.segment(self.inputs.nbytes)
        return SharedBuffer(n_items=n_items, order=order, segment=segment)

    def _fuse(
        self, executor: Executor, buffer: OutputBuffer, *, run_in_place: bool
    ) -> tuple[FusedLoop | None, int]:
        """Return a compiled loop over the items, if one is possible, and the nanoseconds it took.

        With `run_in_place`, a loop whose results are cast at the end is not used.
        """
        if not self.by_item or not isinstance(buffer, LocalBuffer) or self.inputs.n_items == 0:
            return None, 0
        if not is_jitted(self.call.func):
            return None, 0
        if self.settings.retry_policy.retry_on or self.streams is not None:
            return None, 0  # both are handled around each call from Python
        begin = monotonic_ns()
        fusion = fuse_loop(
            self.call,
            self.inputs,
            buffer,
            self.row,
            writable=self.writable,
            collect_errors=self.collect_errors,
            # Timeouts and marks of finished ranges need Python code between two ranges.
            may_claim=executor.can_run_compiled
            and self.settings.retry_policy.timeout is None
            and not run_in_place,
        )
        if fusion is not None and run_in_place:
            earlier = buffer.earlier_spec
            if fusion.uncast_results:
                fusion = None
            elif earlier is not None and earlier.parts != fusion.spec.parts:
                raise ValueError(
                    f"func gives {fusion.spec.describe(buffer.n_items)}, but the earlier run gave "
                    f"{earlier}; remove its .ledger to start over, or choose another out="
                )
        return fusion, monotonic_ns() - begin

    def _make_work(self, executor: Executor, buffer: OutputBuffer | None, fusing_ns: int) -> _Work:
        """Return the function as a task over the arrays: compiled, with its inputs in place."""
        staging = executor.staging
        func = self.call.func if self.row is None else self.row.wrap_function(self.call.func)
        if self.streams is not None:
            func = WithRandomStream(func, self.streams)
        prepared = prepare_call(
            replace(self.call, func=func),
            self.inputs,
            self.grid.range_of(0),
            self.halo,
            by_item=self.by_item,
            writable=self.writable,
            in_processes=staging is not None,
        )
        notes: list[str] = []
        if staging is None:
            sources = local_sources(self.inputs, self.halo)
        else:
            sources, notes = sources_for_processes(self.inputs, self.grid, self.halo, staging)
        call = prepared.call
        if self.settings.retry_policy.retry_on:
            retry_policy = self.settings.retry_policy
            copies_inputs = prepared.writable or prepared.copies_args
            retrying = WithRetries(
                call.func, retry_policy.retry_on, retry_policy.retries, copies_inputs
            )
            call = replace(call, func=retrying)
        task = ArrayTask(
            call=call,
            sources=sources,
            axes=self.inputs.axes,
            by_item=self.by_item,
            writable=prepared.writable,
            copies_args=prepared.copies_args,
            halo=self.halo,
            buffer=buffer,
            collect_errors=self.collect_errors,
            can_give_objects=self._can_give_objects(buffer),
            in_processes=staging is not None,
            passes_index=self.streams is not None,
            chunksize=self.grid.chunksize,
        )
        return _Work(
            task,
            notes + prepared.notes,
            fusing_ns + prepared.compiling_ns,
            # If a range has one random stream, a part of it would draw other numbers.
            can_split=buffer is not None
            and self.halo is None
            and (self.by_item or self.streams is None),
        )

    def _can_give_objects(self, buffer: OutputBuffer | None) -> bool:
        """Return whether items may give any object: if an input or an output has such a dtype."""
        takes_objects = any(dtype.hasobject for dtype in self.inputs.dtypes)
        return takes_objects or (buffer is not None and buffer.asks_for_objects)

    def _collect_faults(self, delivered: list[PartialResult]) -> list[Fault]:
        # Keyed by range: the fault of a range whose worker died may have come before that, and
        # again from the worker that ran it next.
        faults_by_range = {fault[:2]: fault for parts in delivered for fault in parts.faults}
        for parts in delivered:  # else a cycle: errors refer to frames that refer to `delivered`
            parts.faults.clear()
        faults = [faults_by_range[bounds] for bounds in sorted(faults_by_range)]
        for start, stop, error in faults:
            add_note(error, f"while mapping {self.inputs.describe(start, stop)}")
        return faults


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
                failures.setdefault(failure.place // chunksize, failure)
        else:
            others.append(failure)
    for failure in failures.values():
        failure.error = _make_disagreement_error(failure, reference_start, reference, call)
    outcome.failures = sorted([*failures.values(), *others], key=lambda failure: failure.place)
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
    if call.by_item:
        return ValueError(
            f"func returned {describe(failure.error.spec, 1)} for each of the items "
            f"{start}:{stop}, but {expected}; every item must give results of the same shape and "
            "dtype (pass dtype=); a mapper returns a list of results of any shape"
        )
    return ValueError(
        f"func returned {failure.error.spec.describe(stop - start)} for axis "
        f"{call.inputs.axes[0]}, items {start}:{stop}, but {expected}; it must return the same "
        "dtype and the same shape but for the mapped axis for every chunk (for example with "
        ".astype, or pass dtype=); results of any shape go to map_chunks, or to a mapper"
    )

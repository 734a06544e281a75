"""One call over arrays, from its arguments to its results: the part that all verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from taskcarrier.arguments import check_callable, check_chunksize
from taskcarrier.arrays.inputs.check import Inputs, check_inputs
from taskcarrier.arrays.inputs.halos import Halo, check_halo
from taskcarrier.arrays.inputs.sources import local_sources, sources_for_processes
from taskcarrier.arrays.kernels.prepare import PreparedCall, RowOutput, prepare_call
from taskcarrier.arrays.outputs.buffers import OutputBuffer, SharedBuffer
from taskcarrier.arrays.outputs.stacking import ObjectRule, holds_objects
from taskcarrier.arrays.task import ArrayTask
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, get_text
from taskcarrier.random_streams import RandomStreams, WithRandomStream, random_streams_for
from taskcarrier.record import record
from taskcarrier.run import (
    ResumedMarks,
    RunOutcome,
    Settings,
    decide,
    execute,
    remember_call,
    run_nothing,
)
from taskcarrier.scheduling import history
from taskcarrier.scheduling.grid import ChunkGrid, chunk_grid, item_grid
from taskcarrier.scheduling.retries import WithRetries
from taskcarrier.workers.call import Call, check_extras
from taskcarrier.workers.choose import check_for_arrays
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.introspect import is_jitted
from taskcarrier.workers.records import DeliveredFailure, PartialResult
from taskcarrier.workers.replay import ReplayExecutor
from taskcarrier.workers.task import Move, Task

if TYPE_CHECKING:
    from taskcarrier.arrays.resume.ledger_file import LedgerFile

# What to pass instead of an array that holds no numbers, by the kind of its dtype.
_NO_NUMBERS = {
    **dict.fromkeys(
        "SUTO",
        "pass X.astype(float) if its text is numbers, or the columns of numbers alone (of a data "
        "frame, frame.select_dtypes('number'))",
    ),
    "V": "pass its fields one by one, X['name']",
}


Outcomes = dict[int, Any] | ReplayExecutor
"""What is known of a call before it goes the general way: what the function has returned or raised
in the caller (`ArrayTask.outcomes`), or the executor with what worker processes have returned."""


@record
class Work:
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
        from taskcarrier.arrays.resume import computation, ledger_file  # noqa: PLC0415  # rarely needed, and slow: 11 ms

        details = {
            "called with": "items" if self.by_item else "chunks",
            "writable": self.writable,
            "out_shape": None if self.row is None else self.row.shape,
            "rng": self.streams,
            **options,
        }
        this = computation.Computation.from_call(
            self.call, self.inputs, self.grid, self.halo, details
        )
        return ledger_file.LedgerFile(path, len(self.grid), this)

    def explain_ufunc_errors(self, outcome: RunOutcome) -> None:
        """Add notes to errors of ufuncs that say which array holds no numbers."""
        for failure in outcome.failures:
            if isinstance(failure.error, TypeError) and "ufunc" in get_text(failure.error):
                for number, dtype in enumerate(self.inputs.dtypes):
                    if remedy := _NO_NUMBERS.get(dtype.kind):
                        add_note(failure.error, f"array {number} has dtype {dtype}: {remedy}")

    def decide(self, outcomes: Outcomes | None = None) -> Executor:
        """Return where the call runs; it has run already where `outcomes` are an executor."""
        if isinstance(outcomes, ReplayExecutor):
            return outcomes
        check_for_arrays(self.settings.backend)
        if self.inputs.n_items == 0:
            return run_nothing()
        size = self.inputs.n_items, self.inputs.nbytes
        return decide(self.settings, self.call.func, self.extras, size=size)

    def prepare(self, *, in_processes: bool) -> PreparedCall:
        """Return the function as workers call it: compiled, with its random stream and retries."""
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
            in_processes=in_processes,
        )
        retry_policy = self.settings.retry_policy
        if not retry_policy.retry_on:
            return prepared
        copies_inputs = prepared.writable or prepared.copies_args
        retrying = WithRetries(
            prepared.call.func, retry_policy.retry_on, retry_policy.retries, copies_inputs
        )
        return replace(prepared, call=replace(prepared.call, func=retrying))

    def make_work(
        self,
        staging: Staging | None,
        buffer: OutputBuffer | None,
        fusing_ns: int = 0,
        prepared: PreparedCall | None = None,
        outcomes: Outcomes | None = None,
    ) -> Work:
        """Return the function as a task over the arrays: compiled, with its inputs in place.

        Copies for worker processes go to `staging`; None if workers share the caller's memory.
        `outcomes` are what the function has returned or raised before (`ArrayTask.outcomes`).
        """
        prepared = prepared or self.prepare(in_processes=staging is not None)
        notes: list[str] = []
        if staging is None:
            sources = local_sources(self.inputs, self.halo)
        else:
            sources, notes = sources_for_processes(self.inputs, self.grid, self.halo, staging)
        task = ArrayTask(
            call=prepared.call,
            sources=sources,
            axes=self.inputs.axes,
            by_item=self.by_item,
            writable=prepared.writable,
            copies_args=prepared.copies_args,
            halo=self.halo,
            buffer=buffer,
            collect_errors=self.collect_errors,
            objects=self._find_object_rule(buffer),
            in_processes=staging is not None,
            passes_index=self.streams is not None,
            chunksize=self.grid.chunksize,
            outcomes=outcomes if isinstance(outcomes, dict) else {},
            returned=outcomes.returned if isinstance(outcomes, ReplayExecutor) else {},
        )
        return Work(
            task,
            notes + prepared.notes,
            fusing_ns + prepared.compiling_ns,
            # If a range has one random stream, a part of it would draw other numbers.
            can_split=buffer is not None
            and self.halo is None
            and (self.by_item or self.streams is None),
        )

    def execute(
        self,
        work: Work,
        executor: Executor,
        *,
        move: Move | None,
        resumed: ResumedMarks | None = None,
    ) -> RunOutcome:
        """Run the work, and remember how long it took."""
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
            resumed=resumed,
            move=move,
        )
        func, args = self.call.func, self.call.args
        subject = history.find_known_kernel(func, args) if is_jitted(func) else func
        if subject is not None:
            size = self.inputs.n_items, self.inputs.nbytes
            remember_call(subject, *size, executor, outcome, is_kernel=is_jitted(func))
        return outcome

    def make_shared_buffer(self) -> SharedBuffer:
        """Make memory for outputs that worker processes share."""
        inputs = self.inputs
        segment = self.settings.segment(inputs.nbytes)
        return SharedBuffer(n_items=inputs.n_items, order=inputs.order, segment=segment)

    def _find_object_rule(self, buffer: OutputBuffer | None) -> ObjectRule:
        """Return what becomes of objects that items give, by the dtypes of outputs and inputs."""
        asked = [] if buffer is None else buffer.asked_dtypes
        if any(dtype.kind == "O" for dtype in asked):
            return "keep"
        has_objects = any(map(holds_objects, asked)) or any(d.hasobject for d in self.inputs.dtypes)
        return "allow" if has_objects else "refuse"

    def collect_failures(self, delivered: list[PartialResult]) -> list[DeliveredFailure]:
        """Return the failures in what was delivered, in ascending order, with notes."""
        # Keyed by range: the failure of a range whose worker died may have come before that, and
        # again from the worker that ran it next.
        failures_by_range = {failed[:2]: failed for parts in delivered for failed in parts.failures}
        for parts in delivered:  # else a cycle: errors refer to frames that refer to `delivered`
            parts.failures.clear()
        failures = [failures_by_range[bounds] for bounds in sorted(failures_by_range)]
        for start, stop, error in failures:
            add_note(error, f"while mapping {self.inputs.describe(start, stop)}")
        return failures

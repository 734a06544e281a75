"""One run: from a task and a grid to an outcome and a report.

`taskcarrier.arrays` and `taskcarrier.lists` make a task and a grid, ask `decide` where to run, and
pass both to `execute`. The outcome says which ranges failed, which workers died and which ranges
have no result. The modules that made the task raise the errors, because they know the words for it.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from taskcarrier import progress
from taskcarrier.memory.segments import Recycler, Segment, SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, get_text
from taskcarrier.record import record
from taskcarrier.report import Report, ReportMaker, WorkerReport, keep_report
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import Balance, Serial, get_balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.history import Known
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RetryPolicy
from taskcarrier.system.exceptions import raise_again
from taskcarrier.workers import choose as choices
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executor import Executor
from taskcarrier.workers.executors import make_executor
from taskcarrier.workers.introspect import has_own_threads, releases_gil
from taskcarrier.workers.records import RangeFailure, RunResult, WorkerDeath, WorkerStats
from taskcarrier.workers.serial import SerialExecutor
from taskcarrier.workers.task import Job, Move, Task

if TYPE_CHECKING:
    from taskcarrier.errors import WorkerDiedError

Describe = Callable[[int, int], str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run: the checked options of a mapper or of one call."""

    balance: Balance
    n_jobs: int | None = None
    backend: str | None = None
    verbosity: int = 0
    temp_folder: str | None = None
    recycler: Recycler | None = None
    keep_report: Callable[[Report | ReportMaker], None] = keep_report
    retry_policy: RetryPolicy = DEFAULT_POLICY
    gil_reason: str = ""  # why the code that the function calls is known to release the GIL

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Settings:
        """Make settings from the options of a function; raise an error if one is wrong."""
        retry_policy = RetryPolicy.from_arguments(
            options["timeout"], options["retries"], options.get("retry_on", ())
        )
        return cls(
            balance=get_balance(options["balance"]),
            n_jobs=choices.check_n_jobs(options["n_jobs"]),
            backend=choices.check_backend(options["backend"]),
            retry_policy=retry_policy,
        )

    @property
    def may_be_short(self) -> bool:
        """Whether a call may take the short way (`taskcarrier.short_calls`)."""
        policy = self.retry_policy
        return self.verbosity < 1 and policy.timeout is None and not policy.retry_on

    @property
    def folder(self) -> str | None:
        """The folder in which shared memory lies; None for memory."""
        return find_folder(self.temp_folder)

    def new_staging(self) -> Staging:
        """Return a new staging for the copies of a run."""
        return Staging(self.folder, self.recycler)

    def segment(self, nbytes: int) -> Segment:
        """Return an empty segment for about `nbytes` bytes."""
        if self.recycler is None:
            return Segment.create(self.folder)
        return self.recycler.segment(nbytes, self.folder)


def find_folder(temp_folder: str | None) -> str | None:
    """Return the folder in which shared memory lies, by what the user says; None for memory."""
    return temp_folder or os.environ.get("JOBLIB_TEMP_FOLDER")


@record
class ResumedMarks:
    """The marks that an earlier run left.

    Attributes
    ----------
    marks : SharedView
        One byte for each chunk.
    n_done : int
        The number of marked chunks.
    notes : list of str
        Notes for the report.
    """

    marks: SharedView
    n_done: int
    notes: list[str]


@dataclass(eq=False, kw_only=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    worker_stats : list of WorkerStats
        The stats of every worker that reported back, in order.
    delivered : list of (int, object)
        The start of each range whose result the task did not put in place, and the result.
    failures : list of RangeFailure
        Failed ranges, in ascending order.
    deaths : list of WorkerDeath
        Workers that died and whose ranges were not run by others.
    n_deaths : int
        The number of all workers that died.
    missing : list of (int, int)
        Ranges without a result, in ascending order, as far as the marks show.
    first_proposal : object
        What the workers agreed on, see `SetOnce`; None if nothing.
    item_seconds : float
        What an item took in the caller before the rest was handed over; 0 if it was not.
    is_refused : bool
        Whether the rest could not be handed over.
    report : Report
        The report, for people.
    """

    worker_stats: list[WorkerStats]
    delivered: list[tuple[int, Any]]
    failures: list[RangeFailure]
    deaths: list[WorkerDeath]
    n_deaths: int = 0
    missing: list[tuple[int, int]]
    first_proposal: Any
    item_seconds: float = 0.0
    is_refused: bool = False
    report: Report


def decide(
    settings: Settings,
    func: Callable[..., Any],
    extras: Sequence[Any] = (),
    *,
    over_lists: bool = False,
    size: tuple[int, int] = (0, 0),
    known: Known | None = None,
) -> Executor:
    """Choose where to run `func` with further arguments `extras`; raise an error if it cannot run.

    Backends that are registered with joblib can map lists only, which `over_lists` allows. `size`
    are the items of the call and their bytes, `known` is what stands for `func` in the history.
    """
    gil_reason = settings.gil_reason or (
        "the function releases the GIL" if releases_gil(func) else ""
    )
    choice = choices.choose(
        settings.n_jobs,
        settings.backend,
        choices.read_facts(follows_joblib=settings.n_jobs is None or settings.backend is None),
        releases_gil=gil_reason,
        own_threads=has_own_threads(func, extras),
        lists=over_lists,
        can_begin=settings.retry_policy.timeout is None,
    )
    timeout = settings.retry_policy.timeout
    if choice.begins_in_caller:
        subject = known or func
        choice = replace(
            choice,
            alone_seconds=history.find_alone_seconds(subject, *size),
            gil_waits=history.find_gil_waits(subject, *size),
        )
    return make_executor(choice, settings.backend, settings.new_staging, timeout)


def run_nothing() -> Executor:
    """Return the executor of a run without items."""
    return SerialExecutor(Choice("sequential", 1, "there is nothing to map"))


def execute(
    task: Task,
    grid: ChunkGrid,
    executor: Executor,
    settings: Settings,
    *,
    started_ns: int,
    notes: Sequence[str] = (),
    compiling: float = 0.0,
    collect_errors: bool = False,
    can_split: bool = False,
    resumed: ResumedMarks | None = None,
    move: Move | None = None,
) -> RunOutcome:
    """Run a task over all chunks of a grid.

    Parameters
    ----------
    task : Task
        The work to do.
    grid : ChunkGrid
        The chunks of the task; at least one.
    executor : Executor
        Where to run.
    settings : Settings
        How to run.
    started_ns : int
        When the call began, for the report.
    notes : sequence of str
        Further notes for the report.
    compiling : float
        Seconds since `started_ns` that were spent on compiling the function.
    collect_errors : bool
        Whether ranges that fail are delivered, as a `PartialResult`; else the first ends the run.
    can_split : bool
        Whether the task can run parts of a chunk.
    resumed : ResumedMarks, optional
        The chunks that an earlier run finished; they are left out.
    move : Move, optional
        How the work gets to worker processes, if the caller begins it.
    """
    job = Job(
        task,
        executor.balance or settings.balance,
        grid,
        min(executor.choice.n_jobs, len(grid)),
        retry_policy=settings.retry_policy,
        collect_errors=collect_errors,
        can_split=can_split,
        marks=None if resumed is None else resumed.marks,
        folder=settings.folder,
        move=move,
    )
    n_before = 0 if resumed is None else min(resumed.n_done * grid.chunksize, grid.n_items)
    make_run_report = partial(
        make_report,
        job,
        executor,
        chunksize=grid.chunksize,
        ranges=len(grid),
        items=grid.n_items,
        compiling=compiling,
        started_ns=started_ns,
    )
    notes = [*notes, *_describe_resumed(resumed, grid)]
    delivered: list[tuple[int, Any]] = []
    try:
        with progress.progress_bar(
            settings.verbosity, grid.n_items, job.n_workers, n_before
        ) as tick:
            result = executor.run(
                job, lambda start, result: delivered.append((start, result)), tick
            )
    except BaseException as error:
        # Without this, `last_report` would return the report of an earlier run.
        ending = f"ended by {type(error).__name__}; what its workers did is not counted"
        no_result = RunResult([], None, is_halted=True)
        settings.keep_report(make_run_report(no_result, notes=[*notes, ending]))
        raise
    report = make_run_report(result, notes=[*notes, *executor.notes, *describe_deaths(result)])
    settings.keep_report(report)
    progress.log_report(settings.verbosity, report)
    failures = _gather_failures(result)
    n_done = sum(stats.n_items for stats in result.worker_stats)
    if n_done != grid.n_items and not failures and not result.deaths and resumed is None:
        raise _make_lost_error(f"only {n_done} of {grid.n_items} items were run")
    # A filter may turn a warning into an exception, which must not replace a real one.
    with suppress(Warning) if failures else nullcontext():
        show_worker_warnings(result.worker_stats)
    return RunOutcome(
        worker_stats=result.worker_stats,
        delivered=delivered,
        failures=failures,
        deaths=result.unrecovered_deaths,
        n_deaths=len(result.deaths),
        missing=result.missing,
        first_proposal=result.first_proposal,
        item_seconds=result.item_seconds,
        is_refused=result.is_refused,
        report=report,
    )


def remember_call(
    func: Any,
    n_items: int,
    nbytes: int,
    executor: Executor,
    outcome: RunOutcome,
    *,
    is_kernel: bool = False,
) -> None:
    """Remember how long a call took if that decides on the next one.

    That is a call that was begun in the caller, or one in threads or processes, of which is
    remembered what all workers took: none of them was lost, nor waited for another process.
    """
    report = outcome.report
    busy_seconds = sum(worker.busy for worker in report.workers)
    if report.backend == "loky" and not executor.begins_in_caller:
        if outcome.failures or outcome.n_deaths:
            history.forget_busy(func)
        else:
            history.remember_busy(func, busy_seconds, n_items, nbytes)
        return
    if not executor.begins_in_caller and report.backend != "threading":
        return
    if outcome.failures:
        history.forget(func if executor.begins_in_caller else history.find_known_in_threads(func))
    elif not executor.begins_in_caller:
        known = history.find_known_in_threads(func)
        history.remember(known, busy_seconds, n_items, nbytes)
    elif is_kernel:
        # What the caller spent on each chunk is little of what the threads' loops did.
        history.remember(func, busy_seconds, n_items, nbytes)
    elif outcome.is_refused:
        # Not tried in every call: that may take long, and warns.
        history.remember_shared(func, math.inf, n_items, nbytes, has_paid=False)
    elif report.backend == "sequential":
        history.remember(func, report.seconds, n_items, nbytes)
        history.remember_left_alone(func, report.seconds, n_items, nbytes)
    else:
        has_paid = report.seconds < outcome.item_seconds * n_items
        history.remember_shared(func, report.seconds, n_items, nbytes, has_paid=has_paid)


def _gather_failures(result: RunResult) -> list[RangeFailure]:
    """Return the failures of a run and of its workers, in ascending order."""
    failures = list(result.failures)
    for stats in result.worker_stats:
        if stats.failure is not None:
            stats.failure.worker = stats.name
            failures.append(stats.failure)
    return sorted(failures, key=lambda failure: failure.start)


def show_worker_warnings(worker_stats: list[WorkerStats]) -> None:
    """Show the warnings of worker processes, each once, as the caller's filters say."""
    unique = {warning.key: warning for stats in worker_stats for warning in stats.warnings}
    for warning in unique.values():
        message: Any = warning.message  # a text or a warning, as it was given
        place = warning.filename, warning.lineno, warning.module
        warnings.warn_explicit(message, warning.category, *place, _get_registry(warning.module))


_other_registries: dict[str | None, dict[Any, Any]] = {}


def _get_registry(module: str | None) -> dict[Any, Any]:
    """Return the record of warnings that were shown for a module; filters like "default" use it."""
    imported = sys.modules.get(module or "")
    if imported is None:  # only workers have imported it
        return _other_registries.setdefault(module, {})
    registry: dict[Any, Any] = vars(imported).setdefault("__warningregistry__", {})
    return registry


def _describe_resumed(resumed: ResumedMarks | None, grid: ChunkGrid) -> list[str]:
    """Return notes for the report about an earlier run."""
    if resumed is None:
        return []
    done = f"{resumed.n_done} of {len(grid)} ranges were done by an earlier run"
    return [*([done] if resumed.n_done else []), *resumed.notes]


def describe_deaths(result: RunResult) -> list[str]:
    """Return notes for the report about workers that died."""
    if not result.deaths:
        return []
    from taskcarrier.errors import describe_death  # noqa: PLC0415  # slow, and rarely needed

    return [
        describe_death(
            death, None if death.range is None else f"items {death.range[0]}:{death.range[1]}"
        )
        for death in result.deaths
    ]


def add_failure_note(error: BaseException, where: str, worker: str, attempt: int = 1) -> None:
    """Add a note to an error that says in which range it was raised, and by which worker."""
    add_note(error, f"while mapping {where} ({worker}, attempt {attempt})")


def raise_first_failure(outcome: RunOutcome, describe: Describe) -> None:
    """Raise the failure of the lowest range, if any, with notes about where, and about others."""
    if not outcome.failures:
        return
    first, *others = outcome.failures
    error = first.error
    if first.range is not None:
        add_failure_note(error, describe(*first.range), first.worker, first.attempt)
    for other in others:
        where = f"all of {other.worker}" if other.range is None else describe(*other.range)
        kind = type(other.error).__name__
        add_note(error, f"also failed: {where}: {kind}: {get_text(other.error)}")
    for death in outcome.deaths:
        add_note(error, f"also, {_describe_dead_worker(death, describe)}")
    try:
        raise_again(error)
    finally:
        # The traceback refers to this frame and, where the calling thread did the work, to the
        # frames below it. None of them may refer to the error: a cycle would keep the run's shared
        # memory until the next garbage collection.
        for failure in (first, *others):
            vars(failure).pop("error")
        del first, error, others
        outcome.failures = []
        for stats in outcome.worker_stats:
            stats.failure = None


def raise_if_missing(
    outcome: RunOutcome,
    describe: Describe,
    missing: list[tuple[int, int]],
    partial: Callable[[], object],
) -> None:
    """Raise an error if ranges have no result: the last check before a result is returned.

    `partial` returns the result so far, for `WorkerDiedError`.
    """
    if not missing:
        return
    if outcome.deaths:
        raise _make_died_error(outcome, describe, missing, partial())
    others = f" and {len(missing) - 1} more ranges" if missing[1:] else ""
    raise _make_lost_error(f"there is no result for {describe(*missing[0])}{others}")


def _make_lost_error(loss: str) -> RuntimeError:
    return RuntimeError(
        f"{loss}, though nothing failed; did the function fork, or write to memory that is not "
        "its own?"
    )


def _make_died_error(
    outcome: RunOutcome, describe: Describe, missing: list[tuple[int, int]], partial: object
) -> WorkerDiedError:
    """Return the error for workers that died, with everything that the others finished."""
    from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

    # The worker with the lowest range in hand is named first; workers without a range come last.
    death, *others = sorted(
        outcome.deaths, key=lambda death: (death.range is None, death.range or (0, 0))
    )
    error = make_died_error(
        death,
        None if death.range is None else describe(*death.range),
        f"; {len(missing)} range{'s' * (len(missing) != 1)} without a result (.missing lists "
        "them, .partial holds what the other workers finished)",
    )
    error.missing = missing
    error.partial = partial
    for other in others:
        add_note(error, f"also, {_describe_dead_worker(other, describe)}")
    return error


def _describe_dead_worker(death: WorkerDeath, describe: Describe) -> str:
    from taskcarrier.errors import describe_death  # noqa: PLC0415  # slow, and rarely needed

    return describe_death(death, None if death.range is None else describe(*death.range))


def make_report(
    job: Job,
    executor: Executor,
    result: RunResult,
    *,
    chunksize: int,
    ranges: int,
    items: int,
    notes: Sequence[str],
    started_ns: int,
    compiling: float = 0.0,
) -> Report:
    """Return the report of a run that has just ended."""
    wall = (monotonic_ns() - started_ns) / 1e9 - compiling
    is_sequential = executor.choice.backend == "sequential"  # then no process has read anything
    n_staged = 0 if executor.staging is None or is_sequential else executor.staging.nbytes
    workers = tuple(
        WorkerReport(
            stats.name,
            stats.n_ranges,
            stats.n_items,
            stats.busy_ns / 1e9,
            max(0.0, wall - stats.busy_ns / 1e9),
        )
        for stats in result.worker_stats
    )
    return Report(
        backend=executor.choice.backend,
        reason=executor.choice.reason,
        # If the caller was to hand over the rest, and has not, it has finished it alone.
        balance=Serial.name if is_sequential else job.balance.name,
        n_jobs=min(executor.choice.n_jobs, job.n_workers),
        chunksize=chunksize,
        ranges=ranges,
        items=items,
        bytes_copied=result.nbytes_sent + n_staged,
        seconds=wall,
        workers=workers,
        notes=tuple(notes),
        compiling=compiling,
    )

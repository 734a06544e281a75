"""One run: grid, ledger, workers and task, to an outcome and a report.

The faces (arrays, lists) make a task and a grid, ask `decide` where to run, and give both to
`execute`. What comes back says which chunks failed, which workers died and which ranges have
no result; raising is the face's decision, so that it can say it in the face's words.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from taskcarrier import progress
from taskcarrier.memory.segments import Recycler, Segment, SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, text_of
from taskcarrier.report import Report, WorkerReport, keep_report
from taskcarrier.scheduling.balance import Balance, Dynamic, Static, get_balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RetryPolicy
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers import choose as choices
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.introspect import has_own_threads, releases_gil
from taskcarrier.workers.loop import local_sink, run_worker
from taskcarrier.workers.pools import process_pool, thread_pool
from taskcarrier.workers.records import RangeFailure, RunResult, WorkerDeath, WorkerStats
from taskcarrier.workers.task import Deliver, Job, Task
from taskcarrier.workers.thread_limits import limited

if TYPE_CHECKING:
    from taskcarrier.errors import WorkerDiedError

Describe = Callable[[int, int], str]


@dataclass(frozen=True)
class Settings:
    """How to run, as a mapper or a call's own arguments say it; already checked."""

    balance: Balance
    n_jobs: int | None = None
    backend: str | None = None
    verbosity: int = 0
    temp_folder: str | None = None
    recycler: Recycler | None = None
    keep_report: Callable[[Report], None] = keep_report
    retry_policy: RetryPolicy = DEFAULT_POLICY
    known: str = ""  # why what the function calls is known to release the GIL

    @classmethod
    def from_arguments(
        cls,
        balance: object,
        n_jobs: object,
        backend: object,
        *,
        timeout: object,
        retries: object,
        retry_on: object,
    ) -> Settings:
        """From the arguments of a function; a mapper passes its own settings as `balance`."""
        retry_policy = RetryPolicy.from_arguments(timeout, retries, retry_on)
        if isinstance(balance, Settings):
            return (
                balance
                if retry_policy is balance.retry_policy
                else replace(balance, retry_policy=retry_policy)
            )
        return cls(
            get_balance(balance),
            choices.check_n_jobs(n_jobs),
            choices.check_backend(backend),
            retry_policy=retry_policy,
        )

    @property
    def folder(self) -> str | None:
        """Where shared memory lies: a folder, or None for memory."""
        return self.temp_folder or os.environ.get("JOBLIB_TEMP_FOLDER")

    def new_staging(self) -> Staging:
        """Where a run's copies go."""
        return Staging(self.folder, self.recycler)

    def segment(self, nbytes: int) -> Segment:
        """An empty segment for about so many bytes."""
        if self.recycler is None:
            return Segment.create(self.folder)
        return self.recycler.segment(nbytes, self.folder)


@dataclass(frozen=True, eq=False)
class ResumedMarks:
    """Marks that an earlier run has left.

    Attributes
    ----------
    marks : SharedView
        A byte for each chunk.
    n_done : int
        How many chunks are marked.
    notes : list of str
        What the report should say.
    """

    marks: SharedView
    n_done: int
    notes: list[str]


@dataclass(eq=False)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    worker_stats : list of WorkerStats
        Of every worker that reported back, in order.
    failures : list of RangeFailure
        Ascending by range.
    deaths : list of WorkerDeath
        Workers that ended by themselves and whose ranges were not run by others.
    missing : list of (int, int)
        Ranges without a result, ascending, as far as marks tell.
    report : Report
        For people.
    first_proposal : object
        What the workers have settled on; None if nothing.
    """

    worker_stats: list[WorkerStats]
    failures: list[RangeFailure]
    deaths: list[WorkerDeath]
    missing: list[tuple[int, int]]
    report: Report
    first_proposal: Any = None


def decide(
    settings: Settings,
    func: Callable[..., Any],
    extras: Sequence[Any] = (),
    *,
    lists: bool = False,
) -> Choice:
    """Where this run takes place, of `func` with such further arguments; an error if it cannot.

    Only `lists` can be mapped by backends that are registered with joblib.
    """
    known = settings.known or ("the function releases the GIL" if releases_gil(func) else "")
    choice = choices.choose(
        settings.n_jobs,
        settings.backend,
        choices.facts_now(follows_joblib=settings.n_jobs is None or settings.backend is None),
        releases_gil=known,
        own_threads=has_own_threads(func, extras),
        lists=lists,
    )
    if choice.backend in choices.OWN:
        return choice
    if settings.retry_policy.timeout is not None:
        raise ValueError(
            f"timeout= cannot be kept on backend={choice.backend!r}, whose workers are not ours to "
            "stop; leave it out, or pass backend='loky'"
        )
    from taskcarrier.workers import joblib_backends  # noqa: PLC0415  # loads joblib

    return joblib_backends.with_worker_count(choice, settings.backend)


def execute(
    task: Task,
    grid: ChunkGrid,
    choice: Choice,
    settings: Settings,
    *,
    started_ns: int,
    staging: Staging | None = None,
    notes: Sequence[str] = (),
    compiling: float = 0.0,
    runs_all: bool = False,
    collect_errors: bool = False,
    can_split: bool = False,
    resumed: ResumedMarks | None = None,
    deliver: Deliver = lambda start, result: None,  # noqa: ARG005  # for tasks that put all in place
) -> RunOutcome:
    """Run a task over all chunks of a grid.

    Parameters
    ----------
    task : Task
        The work.
    grid : ChunkGrid
        Its chunks; at least one.
    choice : Choice
        Where.
    settings : Settings
        How.
    started_ns : int
        When the call began, for the report.
    staging : Staging, optional
        Where this run's copies are; processes need it.
    notes : sequence of str
        What else the report should say.
    compiling : float
        Seconds since then that went into compiling the function.
    runs_all : bool
        Whether the task is compiled and claims by itself, where it runs in threads.
    collect_errors : bool
        Whether ranges that fail are delivered as faults (`PartialResult`); else the first ends the run.
    can_split : bool
        Whether the task can run parts of a chunk.
    resumed : ResumedMarks, optional
        What an earlier run has finished, which is left out.
    deliver : callable, optional
        Takes ``(start, result)`` of every range whose result is not put in place by the task;
        called from worker threads or from this one.
    """
    n_workers = min(choice.n_jobs, len(grid))
    job = Job(
        task,
        _balance(choice, settings),
        grid,
        n_workers,
        # Only between ranges it can be seen how long one took, and be marked that it is done.
        runs_all=runs_all
        and choice.backend == "threading"
        and settings.retry_policy.timeout is None
        and resumed is None,
        retry_policy=settings.retry_policy,
        collect_errors=collect_errors,
        can_split=can_split,
        marks=_marks(grid, choice) if resumed is None else resumed.marks,
        folder=settings.folder,
    )
    n_before = 0 if resumed is None else min(resumed.n_done * grid.chunksize, grid.n_items)
    report_on = partial(
        report_of,
        job,
        choice,
        staging=staging,
        chunksize=grid.chunksize,
        ranges=len(grid),
        items=grid.n_items,
        compiling=compiling,
        started_ns=started_ns,
    )
    notes = [*notes, *_describe_resumed(resumed, grid)]
    try:
        with progress.progress_bar(settings.verbosity, grid.n_items, n_workers, n_before) as tick:
            ran, of_function = _run(job, choice, settings, staging, deliver, tick=tick)
    except BaseException as error:
        # Or the report would be that of an earlier run.
        ended = f"ended by {type(error).__name__}; what its workers did is not counted"
        settings.keep_report(
            report_on(RunResult([], 0, None, is_halted=True), notes=[*notes, ended])
        )
        raise
    worker_stats = ran.worker_stats
    report = report_on(ran, notes=[*notes, *of_function, *describe_deaths(ran)])
    settings.keep_report(report)
    progress.log_report(settings.verbosity, report)
    failures = list(ran.failures)
    for stats in worker_stats:
        if stats.failure is not None:
            stats.failure.worker = stats.name
            failures.append(stats.failure)
    failures.sort(key=lambda failure: failure.place)
    done = sum(stats.items for stats in worker_stats)
    if done != grid.n_items and not failures and not ran.deaths and resumed is None:
        raise _make_lost_error(f"only {done} of {grid.n_items} items were run")
    # A filter may make an exception of a warning, which must not take the place of a real one.
    with suppress(Warning) if failures else nullcontext():
        warn_again(worker_stats)
    return RunOutcome(worker_stats, failures, ran.fatal, ran.missing, report, ran.first_proposal)


def _run(
    job: Job,
    choice: Choice,
    settings: Settings,
    staging: Staging | None,
    deliver: Deliver,
    *,
    tick: Callable[[Ledger], None] | None,
) -> tuple[RunResult, Sequence[str]]:
    """Run a job where it was decided, and say what was found in its function."""
    if choice.backend == "sequential":
        return _run_here(job, deliver, tick), ()
    if choice.backend == "threading":
        with thread_pool(choice.n_jobs) as threads:
            return threads.run(job, deliver, tick), ()
    if choice.backend not in choices.OWN:
        from taskcarrier.workers import joblib_backends  # noqa: PLC0415  # loads joblib

        return joblib_backends.run(job, choice, settings.backend, deliver, tick), ()
    choices.load_processes()
    from taskcarrier.workers.pickling import pickle_task  # noqa: PLC0415  # loads joblib

    assert staging is not None  # for the type checker
    payload = pickle_task(job, staging)
    with process_pool(choice.n_jobs) as processes:
        return processes.run(job, payload, deliver, tick), payload.notes


def _balance(choice: Choice, settings: Settings) -> Balance:
    """How chunks are shared out there: joblib gives the next to whoever is free."""
    if choice.backend == "sequential":
        return Static()
    return settings.balance if choice.backend in choices.OWN else Dynamic()


def warn_again(worker_stats: list[WorkerStats]) -> None:
    """Give the caller's filters what worker processes have warned of, once."""
    worker_warning = {one.key: one for stats in worker_stats for one in stats.warnings}
    for one in worker_warning.values():
        message: Any = one.message  # a text or a warning, as it was given
        place = one.filename, one.lineno, one.module
        warnings.warn_explicit(message, one.category, *place, _registry_of(one.module))


_other_registries: dict[str | None, dict[Any, Any]] = {}


def _registry_of(module: str | None) -> dict[Any, Any]:
    """What Python has shown of a module's warnings: filters such as "default" go by it."""
    found = sys.modules.get(module or "")
    if found is None:  # workers alone have imported it
        return _other_registries.setdefault(module, {})
    progress_bar: dict[Any, Any] = vars(found).setdefault("__warningregistry__", {})
    return progress_bar


def _marks(grid: ChunkGrid, choice: Choice) -> SharedView | None:
    """Memory for the marks of more chunks than the ledger of a pool has room for."""
    if choice.backend != "loky" or len(grid) <= OWN_MARKS:
        return None
    segment = Segment.create()
    segment.reserve(len(grid))
    return SharedView(segment, 0, (len(grid),), (1,), np.dtype(np.uint8))


def _describe_resumed(resumed: ResumedMarks | None, grid: ChunkGrid) -> list[str]:
    """What the report says of an earlier run."""
    if resumed is None:
        return []
    done = f"{resumed.n_done} of {len(grid)} ranges were done by an earlier run"
    return [*([done] if resumed.n_done else []), *resumed.notes]


def describe_deaths(ran: RunResult) -> list[str]:
    """What the report says of workers that died."""
    if not ran.deaths:
        return []
    from taskcarrier.errors import describe_death  # noqa: PLC0415  # slow, and rarely needed

    return [
        describe_death(
            death, None if death.range is None else f"items {death.range[0]}:{death.range[1]}"
        )
        for death in ran.deaths
    ]


def raise_failure(outcome: RunOutcome, describe: Describe) -> None:
    """Raise the failure of the lowest range, if any, with what is known added as notes."""
    if not outcome.failures:
        return
    first, *others = outcome.failures
    error = first.error
    if first.range is not None:
        add_note(
            error,
            f"while mapping {describe(*first.range)} ({first.worker}, attempt {first.attempt})",
        )
    for other in others:
        where = f"all of {other.worker}" if other.range is None else describe(*other.range)
        kind = type(other.error).__name__
        add_note(error, f"also failed: {where}: {kind}: {text_of(other.error)}")
    for death in outcome.deaths:
        add_note(error, f"also, {_obituary(death, describe)}")
    try:
        raise_again(error)
    finally:
        # The traceback refers to this frame and, where the caller did the work, to those below
        # it, so none of them may refer to the error: a cycle would keep the run's shared memory
        # until the next garbage collection.
        for failure in (first, *others):
            vars(failure).pop("error")
        del first, error, others
        outcome.failures = []
        for stats in outcome.worker_stats:
            stats.failure = None


def refuse_missing(
    outcome: RunOutcome,
    describe: Describe,
    missing: list[tuple[int, int]],
    partial: Callable[[], object],
) -> None:
    """Raise if ranges have no result: the last count before a result is returned as whole.

    `partial` makes what there is of it.
    """
    if not missing:
        return
    if outcome.deaths:
        raise _make_died_error(outcome, describe, missing, partial())
    others = f" and {len(missing) - 1} more ranges" if missing[1:] else ""
    raise _make_lost_error(f"there is no result for {describe(*missing[0])}{others}")


def _make_lost_error(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}, though nothing failed; did the function fork, or write to memory that is not "
        "its own?"
    )


def _make_died_error(
    outcome: RunOutcome, describe: Describe, missing: list[tuple[int, int]], partial: object
) -> WorkerDiedError:
    """The error for workers that died, with everything the others did finish."""
    from taskcarrier.errors import make_died_error  # noqa: PLC0415  # slow, and rarely needed

    # The lowest range in hand names the error; whoever had none comes last.
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
        add_note(error, f"also, {_obituary(other, describe)}")
    return error


def _obituary(death: WorkerDeath, describe: Describe) -> str:
    from taskcarrier.errors import describe_death  # noqa: PLC0415  # slow, and rarely needed

    return describe_death(death, None if death.range is None else describe(*death.range))


class _WatchedLedger(Ledger):
    """A ledger of the caller's own thread, which looks at it between two chunks."""

    tick: Callable[[Ledger], None]

    def finish(self, worker: int, n_items: int) -> None:
        super().finish(worker, n_items)
        self.tick(self)


def _run_here(job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:
    ledger: Ledger
    if tick is None:
        ledger = Ledger.local(1)
    else:
        ledger = watched = _WatchedLedger.local(1)
        watched.tick = tick
    ledger.marks = job.open_marks()
    # The function may set others, whose exceptions are errors of its own.
    handlers = Handlers() if job.collect_errors or job.retry_policy.retry_on else None
    with limited.open():
        stats = run_worker(job, ledger, 0, local_sink(deliver))
    del handlers
    stats.name = "caller"
    return RunResult.read([stats], ledger, job.grid)


def report_of(
    job: Job,
    choice: Choice,
    ran: RunResult,
    staging: Staging | None,
    *,
    chunksize: int,
    ranges: int,
    items: int,
    notes: Sequence[str],
    started_ns: int,
    compiling: float = 0.0,
) -> Report:
    """What a run did that has just ended."""
    wall = (monotonic_ns() - started_ns) / 1e9 - compiling
    workers = tuple(
        WorkerReport(
            stats.name,
            stats.ranges,
            stats.items,
            stats.busy_ns / 1e9,
            max(0.0, wall - stats.busy_ns / 1e9),
        )
        for stats in ran.worker_stats
    )
    return Report(
        backend=choice.backend,
        reason=choice.reason,
        balance="serial" if choice.backend == "sequential" else job.balance.name,
        n_jobs=job.n_workers,
        chunksize=chunksize,
        ranges=ranges,
        items=items,
        bytes_copied=ran.nbytes_sent + (0 if staging is None else staging.nbytes),
        seconds=wall,
        workers=workers,
        notes=tuple(notes),
        compiling=compiling,
    )

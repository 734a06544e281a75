"""One run: grid, ledger, workers and task, to an outcome and a report.

The faces (arrays, lists) make a task and a grid, ask `decide` where to run, and give both to
`execute`. What comes back says which cells failed, which workers died and which ranges have
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
from taskcarrier.scheduling.grid import Grid
from taskcarrier.scheduling.ledger import OWN_MARKS, Ledger
from taskcarrier.scheduling.retries import USUAL, Recovery
from taskcarrier.system.exceptions import raise_again
from taskcarrier.system.interrupts import Handlers
from taskcarrier.workers import choose as choices
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.introspect import has_own_threads, releases_gil
from taskcarrier.workers.loop import outlet_here, work
from taskcarrier.workers.pools import process_crew, thread_crew
from taskcarrier.workers.records import Account, Death, Failure, Ran
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
    recovery: Recovery = USUAL
    known: str = ""  # why what the function calls is known to release the GIL

    @classmethod
    def of_call(
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
        recovery = Recovery.checked(timeout, retries, retry_on)
        if isinstance(balance, Settings):
            return balance if recovery is balance.recovery else replace(balance, recovery=recovery)
        return cls(
            get_balance(balance),
            choices.check_n_jobs(n_jobs),
            choices.check_backend(backend),
            recovery=recovery,
        )

    @property
    def folder(self) -> str | None:
        """Where shared memory lies: a folder, or None for memory."""
        return self.temp_folder or os.environ.get("JOBLIB_TEMP_FOLDER")

    def staging(self) -> Staging:
        """Where a run's copies go."""
        return Staging(self.folder, self.recycler)

    def segment(self, nbytes: int) -> Segment:
        """An empty segment for about so many bytes."""
        if self.recycler is None:
            return Segment.create(self.folder)
        return self.recycler.segment(nbytes, self.folder)


@dataclass(frozen=True, eq=False)
class Kept:
    """Marks that an earlier run has left.

    Attributes
    ----------
    marks : SharedView
        A byte for each cell.
    n_done : int
        How many cells are marked.
    notes : list of str
        What the report should say.
    """

    marks: SharedView
    n_done: int
    notes: list[str]


@dataclass(eq=False)
class Outcome:
    """How a run ended.

    Attributes
    ----------
    accounts : list of Account
        Of every worker that reported back, in order.
    failures : list of Failure
        Ascending by range.
    deaths : list of Death
        Workers that ended by themselves and whose ranges were not run by others.
    missing : list of (int, int)
        Ranges without a result, ascending, as far as marks tell.
    report : Report
        For people.
    agreed : object
        What the workers have settled on; None if nothing.
    """

    accounts: list[Account]
    failures: list[Failure]
    deaths: list[Death]
    missing: list[tuple[int, int]]
    report: Report
    agreed: Any = None


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
    if settings.recovery.timeout is not None:
        raise ValueError(
            f"timeout= cannot be kept on backend={choice.backend!r}, whose workers are not ours to "
            "stop; leave it out, or pass backend='loky'"
        )
    from taskcarrier.workers import joblib_backends  # noqa: PLC0415  # loads joblib

    return joblib_backends.counted(choice, settings.backend)


def execute(
    task: Task,
    grid: Grid,
    choice: Choice,
    settings: Settings,
    *,
    started_ns: int,
    staging: Staging | None = None,
    notes: Sequence[str] = (),
    compiling: float = 0.0,
    sweeps: bool = False,
    collects: bool = False,
    narrows: bool = False,
    kept: Kept | None = None,
    deliver: Deliver = lambda start, result: None,  # noqa: ARG005  # for tasks that put all in place
) -> Outcome:
    """Run a task over all cells of a grid.

    Parameters
    ----------
    task : Task
        The work.
    grid : Grid
        Its cells; at least one.
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
    sweeps : bool
        Whether the task is compiled and claims by itself, where it runs in threads.
    collects : bool
        Whether ranges that fail are delivered as faults (`Parts`); else the first ends the run.
    narrows : bool
        Whether the task can run parts of a cell.
    kept : Kept, optional
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
        sweeps=sweeps
        and choice.backend == "threading"
        and settings.recovery.timeout is None
        and kept is None,
        recovery=settings.recovery,
        collects=collects,
        narrows=narrows,
        marks=_marks(grid, choice) if kept is None else kept.marks,
        folder=settings.folder,
    )
    n_before = 0 if kept is None else min(kept.n_done * grid.chunksize, grid.n_items)
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
    notes = [*notes, *_resumed(kept, grid)]
    try:
        with progress.shown(settings.verbosity, grid.n_items, n_workers, n_before) as tick:
            ran, of_function = _run(job, choice, settings, staging, deliver, tick=tick)
    except BaseException as error:
        # Or the report would be that of an earlier run.
        ended = f"ended by {type(error).__name__}; what its workers did is not counted"
        settings.keep_report(report_on(Ran([], 0, None, halted=True), notes=[*notes, ended]))
        raise
    accounts = ran.accounts
    report = report_on(ran, notes=[*notes, *of_function, *recovered(ran)])
    settings.keep_report(report)
    progress.log_report(settings.verbosity, report)
    failures = list(ran.failures)
    for account in accounts:
        if account.failure is not None:
            account.failure.worker = account.name
            failures.append(account.failure)
    failures.sort(key=lambda failure: failure.place)
    done = sum(account.items for account in accounts)
    if done != grid.n_items and not failures and not ran.deaths and kept is None:
        raise _lost_silently(f"only {done} of {grid.n_items} items were run")
    # A filter may make an exception of a warning, which must not take the place of a real one.
    with suppress(Warning) if failures else nullcontext():
        warn_again(accounts)
    return Outcome(accounts, failures, ran.fatal, ran.missing, report, ran.agreed)


def _run(
    job: Job,
    choice: Choice,
    settings: Settings,
    staging: Staging | None,
    deliver: Deliver,
    *,
    tick: Callable[[Ledger], None] | None,
) -> tuple[Ran, Sequence[str]]:
    """Run a job where it was decided, and say what was found in its function."""
    if choice.backend == "sequential":
        return _run_here(job, deliver, tick), ()
    if choice.backend == "threading":
        with thread_crew(choice.n_jobs) as threads:
            return threads.run(job, deliver, tick), ()
    if choice.backend not in choices.OWN:
        from taskcarrier.workers import joblib_backends  # noqa: PLC0415  # loads joblib

        return joblib_backends.run(job, choice, settings.backend, deliver, tick), ()
    choices.load_processes()
    from taskcarrier.workers.pickling import pack  # noqa: PLC0415  # loads joblib

    assert staging is not None  # for the type checker
    parcel = pack(job, staging)
    with process_crew(choice.n_jobs) as processes:
        return processes.run(job, parcel, deliver, tick), parcel.notes


def _balance(choice: Choice, settings: Settings) -> Balance:
    """How cells are shared out there: joblib gives the next to whoever is free."""
    if choice.backend == "sequential":
        return Static()
    return settings.balance if choice.backend in choices.OWN else Dynamic()


def warn_again(accounts: list[Account]) -> None:
    """Give the caller's filters what worker processes have warned of, once."""
    heard = {one.key: one for account in accounts for one in account.warnings}
    for one in heard.values():
        message: Any = one.message  # a text or a warning, as it was given
        place = one.filename, one.lineno, one.module
        warnings.warn_explicit(message, one.category, *place, _shown_of(one.module))


_shown_elsewhere: dict[str | None, dict[Any, Any]] = {}


def _shown_of(module: str | None) -> dict[Any, Any]:
    """What Python has shown of a module's warnings: filters such as "default" go by it."""
    found = sys.modules.get(module or "")
    if found is None:  # workers alone have imported it
        return _shown_elsewhere.setdefault(module, {})
    shown: dict[Any, Any] = vars(found).setdefault("__warningregistry__", {})
    return shown


def _marks(grid: Grid, choice: Choice) -> SharedView | None:
    """Memory for the marks of more cells than the ledger of a crew has room for."""
    if choice.backend != "loky" or len(grid) <= OWN_MARKS:
        return None
    segment = Segment.create()
    segment.reserve(len(grid))
    return SharedView(segment, 0, (len(grid),), (1,), np.dtype(np.uint8))


def _resumed(kept: Kept | None, grid: Grid) -> list[str]:
    """What the report says of an earlier run."""
    if kept is None:
        return []
    done = f"{kept.n_done} of {len(grid)} ranges were done by an earlier run"
    return [*([done] if kept.n_done else []), *kept.notes]


def recovered(ran: Ran) -> list[str]:
    """What the report says of workers that died."""
    if not ran.deaths:
        return []
    from taskcarrier.errors import obituary  # noqa: PLC0415  # slow, and rarely needed

    return [
        obituary(death, None if death.range is None else f"items {death.range[0]}:{death.range[1]}")
        for death in ran.deaths
    ]


def raise_failure(outcome: Outcome, describe: Describe) -> None:
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
        for account in outcome.accounts:
            account.failure = None


def refuse_missing(
    outcome: Outcome,
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
        raise _died_error(outcome, describe, missing, partial())
    others = f" and {len(missing) - 1} more ranges" if missing[1:] else ""
    raise _lost_silently(f"there is no result for {describe(*missing[0])}{others}")


def _lost_silently(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}, though nothing failed; did the function fork, or write to memory that is not "
        "its own?"
    )


def _died_error(
    outcome: Outcome, describe: Describe, missing: list[tuple[int, int]], partial: object
) -> WorkerDiedError:
    """The error for workers that died, with everything the others did finish."""
    from taskcarrier.errors import death_of  # noqa: PLC0415  # slow, and rarely needed

    # The lowest range in hand names the error; whoever had none comes last.
    death, *others = sorted(
        outcome.deaths, key=lambda death: (death.range is None, death.range or (0, 0))
    )
    error = death_of(
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


def _obituary(death: Death, describe: Describe) -> str:
    from taskcarrier.errors import obituary  # noqa: PLC0415  # slow, and rarely needed

    return obituary(death, None if death.range is None else describe(*death.range))


class _WatchedLedger(Ledger):
    """A ledger of the caller's own thread, which looks at it between two cells."""

    tick: Callable[[Ledger], None]

    def lay_down(self, worker: int, n_items: int) -> None:
        super().lay_down(worker, n_items)
        self.tick(self)


def _run_here(job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> Ran:
    ledger: Ledger
    if tick is None:
        ledger = Ledger.local(1)
    else:
        ledger = watched = _WatchedLedger.local(1)
        watched.tick = tick
    ledger.marks = job.marks_here()
    # The function may set others, whose exceptions are errors of its own.
    handlers = Handlers() if job.collects or job.recovery.retry_on else None
    with limited.open():
        account = work(job, ledger, 0, outlet_here(deliver))
    del handlers
    account.name = "caller"
    return Ran.read([account], ledger, job.grid)


def report_of(
    job: Job,
    choice: Choice,
    ran: Ran,
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
            account.name,
            account.ranges,
            account.items,
            account.busy_ns / 1e9,
            max(0.0, wall - account.busy_ns / 1e9),
        )
        for account in ran.accounts
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

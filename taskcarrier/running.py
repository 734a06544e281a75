"""One run: grid, ledger, workers and task, to an outcome and a report.

The faces (arrays, lists) make a task and a grid, ask `decide` where to run, and give both to
`execute`. What comes back says which cells failed, which workers died and which ranges have
no result; raising is the face's decision, so that it can say it in the face's words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from taskcarrier import progress
from taskcarrier.backends import choice as choices
from taskcarrier.backends.choice import Choice
from taskcarrier.backends.crews import process_crew, thread_crew
from taskcarrier.backends.functions import has_own_threads, releases_gil
from taskcarrier.backends.inner import limited
from taskcarrier.backends.work import (
    Account,
    Death,
    Deliver,
    Failure,
    Job,
    Ran,
    Task,
    add_note,
    text_of,
    work,
)
from taskcarrier.balance import Balance, Static, get_balance
from taskcarrier.ledger import Ledger
from taskcarrier.partition import Grid
from taskcarrier.report import Report, WorkerReport, keep_report
from taskcarrier.segments import Recycler, Segment, Staging

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

    @classmethod
    def of_call(cls, balance: object, n_jobs: object, backend: object) -> Settings:
        """From the arguments of a function; a mapper passes its own settings as `balance`."""
        if isinstance(balance, Settings):
            return balance
        return cls(
            get_balance(balance), choices.check_n_jobs(n_jobs), choices.check_backend(backend)
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


@dataclass(eq=False)
class Outcome:
    """How a run ended.

    Attributes
    ----------
    accounts : list of Account
        Of every worker that reported back, in order.
    failures : list of Failure
        Ascending by cell.
    deaths : list of Death
        Workers that ended by themselves.
    missing : list of int
        Cells that no surviving worker has finished though nothing failed, ascending.
    report : Report
        For people.
    agreed : object
        What the workers have settled on; None if nothing.
    """

    accounts: list[Account]
    failures: list[Failure]
    deaths: list[Death]
    missing: list[int]
    report: Report
    agreed: Any = None


def decide(settings: Settings, func: Callable[..., Any], extras: Sequence[Any] = ()) -> Choice:
    """Where this run takes place, of `func` with such further arguments; an error if it cannot."""
    return choices.choose(
        settings.n_jobs,
        settings.backend,
        choices.facts_now(),
        releases_gil=releases_gil(func),
        own_threads=has_own_threads(func, extras),
    )


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
    deliver: Deliver = lambda cell, result: None,  # noqa: ARG005  # for tasks that put all in place
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
    deliver : callable, optional
        Takes ``(cell, result)`` of every cell whose result is not put in place by the task;
        called from worker threads or from this one.
    """
    n_workers = min(choice.n_jobs, len(grid))
    balance: Balance = Static() if choice.backend == "sequential" else settings.balance
    job = Job(task, balance, grid, n_workers, sweeps=sweeps and choice.backend == "threading")
    with progress.shown(settings.verbosity, grid.n_items, n_workers) as tick:
        if choice.backend == "sequential":
            ran = _run_here(job, deliver, tick)
        elif choice.backend == "threading":
            with thread_crew(choice.n_jobs) as threads:
                ran = threads.run(job, deliver, tick)
        else:
            choices.load_processes()
            from taskcarrier.backends.parcels import pack  # noqa: PLC0415  # loads joblib

            assert staging is not None  # for the type checker
            parcel = pack(job, staging)
            with process_crew(choice.n_jobs) as processes:
                ran = processes.run(job, parcel, deliver, tick)
    accounts, deaths = ran.accounts, ran.deaths
    missing = _missing(job, deaths, ran.given_out)
    report = _report(
        job, choice, accounts, staging, notes=notes, compiling=compiling, started_ns=started_ns
    )
    settings.keep_report(report)
    progress.log_report(settings.verbosity, report)
    failures = [account.failure for account in accounts if account.failure is not None]
    for account in accounts:
        if account.failure is not None:
            account.failure.worker = account.name
    failures.sort(key=_by_cell)
    done = sum(account.items for account in accounts)
    if done != grid.n_items and not failures and not deaths:
        raise RuntimeError(
            f"only {done} of {grid.n_items} items were run, though nothing failed; did the "
            "function fork, or write to memory that is not its own?"
        )
    return Outcome(accounts, failures, deaths, missing, report, ran.agreed)


def raise_failure(outcome: Outcome, grid: Grid, describe: Describe) -> None:
    """Raise the failure of the lowest cell, if any, with what is known added as notes."""
    if not outcome.failures:
        return
    first, *others = outcome.failures
    error = first.error
    if first.cell >= 0:
        add_note(error, f"while mapping {describe(*grid.bounds(first.cell))} ({first.worker})")
    for other in others:
        where = describe(*grid.bounds(other.cell)) if other.cell >= 0 else f"all of {other.worker}"
        kind = type(other.error).__name__
        add_note(error, f"also failed: {where}: {kind}: {text_of(other.error)}")
    for death in outcome.deaths:
        add_note(error, f"also, {_obituary(death, grid, describe)}")
    try:
        raise error
    finally:
        # The traceback refers to this frame, so this frame must not refer to the error: a
        # cycle would keep the run's shared memory until the next garbage collection.
        del first, error, others
        outcome.failures = []
        for account in outcome.accounts:
            account.failure = None


def died_error(
    outcome: Outcome, grid: Grid, describe: Describe, missing: list[int], partial: object
) -> WorkerDiedError:
    """The error for workers that died, with everything the others did finish."""
    from taskcarrier.errors import WorkerDiedError  # noqa: PLC0415  # slow, and rarely needed

    # The lowest range in hand names the error; whoever had none comes last.
    death, *others = sorted(
        outcome.deaths, key=lambda death: len(grid) if death.cell is None else death.cell
    )
    in_hand = None if death.cell is None else grid.bounds(death.cell)
    ranges = [grid.bounds(cell) for cell in missing]
    error = WorkerDiedError(
        f"{_obituary(death, grid, describe)}; {len(ranges)} of {len(grid)} ranges have no result "
        "(.missing lists them, .partial holds what the other workers finished)",
        worker=death.name,
        exitcode=death.exitcode,
        in_hand=in_hand,
    )
    error.missing = ranges
    error.partial = partial
    for other in others:
        add_note(error, f"also, {_obituary(other, grid, describe)}")
    return error


def _obituary(death: Death, grid: Grid, describe: Describe) -> str:
    from taskcarrier.errors import describe_exit  # noqa: PLC0415  # slow, and rarely needed

    at_work = (
        "between two ranges"
        if death.cell is None
        else f"while mapping {describe(*grid.bounds(death.cell))}"
    )
    hint = (
        "; the kernel kills so when memory runs out, and some libraries crash so"
        if death.exitcode is not None and death.exitcode < 0
        else ""
    )
    return f"worker {death.worker} ({death.name}) {describe_exit(death.exitcode)} {at_work}{hint}"


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
    with limited.open():
        account = work(job, ledger, 0, deliver)
    account.name = "caller"
    return Ran.read([account], [], ledger)


def _missing(job: Job, deaths: list[Death], given_out: int) -> list[int]:
    if not deaths:
        return []
    cells = {death.cell for death in deaths if death.cell is not None}
    for death in deaths:
        cells.update(death.unstarted)
    if job.balance.name == "dynamic":
        cells.update(range(min(given_out, len(job.grid)), len(job.grid)))
    return sorted(cells)


def _report(
    job: Job,
    choice: Choice,
    accounts: list[Account],
    staging: Staging | None,
    *,
    notes: Sequence[str],
    compiling: float,
    started_ns: int,
) -> Report:
    wall = (monotonic_ns() - started_ns) / 1e9 - compiling
    workers = tuple(
        WorkerReport(
            account.name,
            account.ranges,
            account.items,
            account.busy_ns / 1e9,
            max(0.0, wall - account.busy_ns / 1e9),
        )
        for account in accounts
    )
    return Report(
        backend=choice.backend,
        reason=choice.reason,
        balance="serial" if choice.backend == "sequential" else job.balance.name,
        n_jobs=job.n_workers,
        chunksize=job.grid.chunksize,
        ranges=len(job.grid),
        items=job.grid.n_items,
        bytes_copied=0 if staging is None else staging.nbytes,
        seconds=wall,
        workers=workers,
        notes=tuple(notes),
        compiling=compiling,
    )


def _by_cell(failure: Failure) -> int:
    return failure.cell

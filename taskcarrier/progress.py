"""What users can watch of a run: a progress bar that counts items, and a logged report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from taskcarrier.report import Report
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.contexts import contextmanager


@contextmanager
def progress_bar(
    verbosity: int, n_items: int | None, n_workers: int, n_before: int = 0
) -> Iterator[Callable[[Ledger], None] | None]:
    """Show a progress bar; yield a function to call now and then with the run's ledger.

    Yields None if nothing is shown, as where there is no standard error. `n_items` is None where
    the number of items is not known; `n_before` items were done before the run.
    """
    if verbosity < 1 or sys.stderr is None or getattr(sys.stderr, "closed", False):
        yield None
        return
    from tqdm.std import TqdmDefaultWriteLock, tqdm  # noqa: PLC0415  # only when progress is shown

    class Bar(tqdm):  # type: ignore[misc]  # untyped
        # `tick` refreshes the bar; tqdm's own thread would outlive it.
        monitor_interval = 0

    if not hasattr(tqdm, "_lock"):  # none was set or used yet
        # tqdm's own lock for threads. Its default has one for processes too; where multiprocessing
        # does not fork by default (Python 3.14), that is a named semaphore with a watching process.
        Bar.set_lock(TqdmDefaultWriteLock.th_lock)

    with Bar(total=n_items, initial=n_before, unit="item") as bar:

        def tick(ledger: Ledger) -> None:
            bar.update(n_before + ledger.n_items_done(n_workers) - bar.n)

        yield tick


def log_report(verbosity: int, report: Report) -> None:
    """Log the report of a run if `verbosity` asks for it."""
    if verbosity >= 2:  # noqa: PLR2004  # documented in the mappers
        import logging  # noqa: PLC0415  # takes 3 ms, and is rarely needed

        logging.getLogger("taskcarrier").info("%s", report)

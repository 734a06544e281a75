"""Reports of runs: facts from the ledger, as a table for people and a dict for programs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from taskcarrier.notes import count_noun

# Less is spent on looking up what was compiled before.
_LEAST_COMPILING = 0.001


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did.

    Attributes
    ----------
    name : str
        ``"caller"``, ``"thread 0"`` or ``"process 4711"`` (the process id).
    ranges, items : int
        Ranges and items that it finished.
    busy, idle : float
        Seconds spent in the function and in putting its results in place; the rest of the run.
    """

    name: str
    ranges: int
    items: int
    busy: float
    idle: float

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The cells of its row in the report's table."""
        return (
            self.name,
            f"{self.ranges:,}",
            f"{self.items:,}",
            f"{self.busy:.4f}",
            f"{self.idle:.4f}",
        )


_COLUMNS = ("worker", "ranges", "items", "busy s", "idle s")


@dataclass(frozen=True)
class Report:
    """What one run did.

    Attributes
    ----------
    backend : str
        Where it ran: ``"sequential"``, ``"threading"``, ``"loky"`` or, for lists, the name of a
        backend that was registered with joblib.
    reason : str
        Why it ran there.
    balance : str
        ``"static"`` or ``"dynamic"``; ``"serial"`` in the caller. Registered backends are dynamic.
    n_jobs : int
        The number of workers that could take part (never more than ranges).
    chunksize : int
        Items per range; the last range may be shorter, and in streams any of them.
    ranges, items : int
        Ranges and items of the whole run.
    bytes_copied : int
        Bytes of arrays, and of the items of lists, that worker processes read or that were copied
        for them in this run; data that they see in place count 0. On a registered backend, the
        bytes that it was given to send.
    seconds : float
        Time from the first step of the call to its last, without `compiling`.
    workers : tuple of WorkerReport
        One for each worker; on a registered backend one for each that ran a range.
    notes : tuple of str
        What else is worth knowing, such as inputs that had to be pickled.
    compiling : float
        Seconds that went into compiling the function, before anything ran.
    """

    backend: str
    reason: str
    balance: str
    n_jobs: int
    chunksize: int
    ranges: int
    items: int
    bytes_copied: int
    seconds: float
    workers: tuple[WorkerReport, ...]
    notes: tuple[str, ...] = ()
    compiling: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers."""
        return asdict(self)

    @property
    def _head(self) -> list[str]:
        """The lines above the table."""
        work = (
            f"{count_noun(self.items, 'item')} in {count_noun(self.ranges, 'range')} of up to "
            f"{self.chunksize:,}, "
            f"{self.balance} balance, backend {self.backend} ({self.reason})"
        )
        cost = f"{self.seconds:.4g} s in all"
        if self.bytes_copied:
            cost += f", {self.bytes_copied:,} bytes read or copied by processes"
        if self.compiling >= _LEAST_COMPILING:
            cost += f", after {self.compiling:.3g} s of compiling"
        return [work, cost, *self.notes]

    def _repr_html_(self) -> str:
        """Return the report as an HTML table, which notebooks show."""
        import html  # noqa: PLC0415  # rarely needed

        head = "<br>".join(map(html.escape, self._head))
        names = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in worker.cells) + "</tr>"
            for worker in self.workers
        )
        return f"<p>{head}</p><table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>"

    def __str__(self) -> str:
        width = max([6, *(len(worker.name) for worker in self.workers)])
        rows = [_COLUMNS, *(worker.cells for worker in self.workers)]
        lines = [
            f"{worker:<{width}}  {ranges:>8}  {items:>12}  {busy:>8}  {idle:>8}"
            for worker, ranges, items, busy, idle in rows
        ]
        return "\n".join([*self._head, *lines])


ReportMaker = Callable[[], Report]
"""A function that makes a report, when somebody asks for it."""


class MadeOnce:
    """A `ReportMaker` that gives the same report each time."""

    def __init__(self, make: ReportMaker) -> None:
        self._make = make
        self._report: Report | None = None

    def __call__(self) -> Report:
        """Return the report, which is made if it is not there yet."""
        if self._report is None:
            self._report = self._make()
        return self._report


_kept = threading.local()


def keep_report(report: Report | ReportMaker) -> None:
    """Keep the report as the last one of this thread."""
    _kept.report = report


def last_report() -> Report:
    """Return the report of the last run that was started from this thread.

    Returns
    -------
    Report
        After a run that failed too: what it did until then. If the call was interrupted, the
        report says so and lists no workers.

    Raises
    ------
    LookupError
        Nothing was run from this thread yet.

    Examples
    --------
    >>> import numpy as np
    >>> from taskcarrier import last_report, map_array
    >>> _ = map_array(np.sqrt, np.arange(10.0), n_jobs=1)
    >>> last_report().items
    10
    """
    try:
        report = _kept.report
    except AttributeError:
        raise LookupError("nothing was run from this thread yet") from None
    if not isinstance(report, Report):
        report = _kept.report = report()
    return report  # type: ignore[no-any-return]  # attributes of a thread-local

"""A task, and the job that every worker of a run gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from taskcarrier.memory.segments import SharedView
from taskcarrier.scheduling.balance import Balance
from taskcarrier.scheduling.grid import Grid
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import USUAL, Recovery
from taskcarrier.workers.parent_state import Surroundings

NOTHING = object()
"""What a cell returns whose result is already where it belongs."""


class Cells(Protocol):
    """A task opened in one worker."""

    def __call__(self, start: int, stop: int) -> Any:
        """Run one cell; its result, or `NOTHING` if it was put in place."""

    def facts(self) -> Any:
        """Small, picklable things the caller must know when the worker is done."""


Agree = Callable[[Any], Any]


class Task(Protocol):
    """Work on ``range(n)``, in a form that can travel."""

    def open(self, agree: Agree) -> Cells:
        """Called once in each worker, before its first cell.

        With `agree` workers settle on a value: it takes a proposal and returns the first of all.
        """


class FedCells(Cells, Protocol):
    """Cells whose items are handed to them, block by block."""

    def hold(self, start: int, read: Callable[[], Sequence[Any]]) -> None:
        """Items from `start` on are what `read` returns; ranges of these are run next."""


class Sweep(Protocol):
    """Cells that need no loop around them, in a thread of the caller."""

    def sweep(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run cells until there are none or the run is halted; the ledger knows how far it came."""


@dataclass(frozen=True, eq=False)
class Job:
    """What every worker of a run is given.

    Attributes
    ----------
    task : Task
        The work.
    balance : Balance
        How its cells are shared out.
    grid : Grid
        These cells.
    n_workers : int
        How many there are.
    surroundings : Surroundings
        What the function sees of the caller.
    sweeps : bool
        Whether what the task opens into is a `Sweep`.
    fed : bool
        Whether it opens into `FedCells`; then grid and balance tell nothing.
    recovery : Recovery
        How long a range may take, and what is tried again.
    collects : bool
        Whether errors of ranges are delivered; else the first ends the run.
    narrows : bool
        Whether parts of a cell can be run.
    marks : SharedView or None
        Where the cells are marked, if the ledger's own place will not do.
    folder : str or None
        Where processes put large results that are not put in place; memory if None.
    """

    task: Task
    balance: Balance
    grid: Grid
    n_workers: int
    surroundings: Surroundings = field(default_factory=Surroundings.here)
    sweeps: bool = False
    fed: bool = False
    recovery: Recovery = USUAL
    collects: bool = False
    narrows: bool = False
    marks: SharedView | None = None
    folder: str | None = None

    def marks_here(self) -> memoryview | None:
        """Its own place for marks, in this process."""
        return None if self.marks is None else self.marks.open("write").data


Deliver = Callable[[int, Any], None]
"""Takes the start of a range and its result."""

"""A task, and the job that every worker of a run gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from taskcarrier.memory.segments import SharedView
from taskcarrier.scheduling.balance import Balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RetryPolicy
from taskcarrier.workers.parent_state import ParentState

IN_PLACE = object()
"""What a chunk returns whose result is already where it belongs."""


class RangeRunner(Protocol):
    """A task opened in one worker."""

    def __call__(self, start: int, stop: int) -> Any:
        """Run one chunk; its result, or `IN_PLACE` if it was put in place."""

    def facts(self) -> Any:
        """Small, picklable things the caller must know when the worker is done."""


Propose = Callable[[Any], Any]


class Task(Protocol):
    """Work on ``range(n)``, in a form that can travel."""

    def open(self, propose: Propose) -> RangeRunner:
        """Called once in each worker, before its first chunk.

        With `propose` workers settle on a value: it takes a proposal and returns the first of all.
        """


class BatchRunner(RangeRunner, Protocol):
    """Chunks whose items are handed to them, block by block."""

    def hold(self, start: int, read: Callable[[], Sequence[Any]]) -> None:
        """Items from `start` on are what `read` returns; ranges of these are run next."""


class CompiledRunner(Protocol):
    """Chunks that need no loop around them, in a thread of the caller."""

    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run chunks until there are none or the run is halted; the ledger knows how far it came."""


@dataclass(frozen=True, eq=False)
class Job:
    """What every worker of a run is given.

    Attributes
    ----------
    task : Task
        The work.
    balance : Balance
        How its chunks are shared out.
    grid : ChunkGrid
        These chunks.
    n_workers : int
        How many there are.
    parent_state : ParentState
        What the function sees of the caller.
    runs_all : bool
        Whether what the task opens into is a `CompiledRunner`.
    is_streamed : bool
        Whether it opens into `BatchRunner`; then grid and balance tell nothing.
    retry_policy : RetryPolicy
        How long a range may take, and what is tried again.
    collect_errors : bool
        Whether errors of ranges are delivered; else the first ends the run.
    can_split : bool
        Whether parts of a chunk can be run.
    marks : SharedView or None
        Where the chunks are marked, if the ledger's own place will not do.
    folder : str or None
        Where processes put large results that are not put in place; memory if None.
    """

    task: Task
    balance: Balance
    grid: ChunkGrid
    n_workers: int
    parent_state: ParentState = field(default_factory=ParentState.capture)
    runs_all: bool = False
    is_streamed: bool = False
    retry_policy: RetryPolicy = DEFAULT_POLICY
    collect_errors: bool = False
    can_split: bool = False
    marks: SharedView | None = None
    folder: str | None = None

    def open_marks(self) -> memoryview | None:
        """Its own place for marks, in this process."""
        return None if self.marks is None else self.marks.open("write").data


Deliver = Callable[[int, Any], None]
"""Takes the start of a range and its result."""

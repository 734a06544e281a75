"""Tasks, and the job that every worker of a run gets."""

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
"""What a runner returns for a range whose result is already in place."""


class RangeRunner(Protocol):
    """A task that was opened in one worker."""

    def __call__(self, start: int, stop: int) -> Any:
        """Run one range; return its result, or `IN_PLACE` if that was put in place."""

    def facts(self) -> Any:
        """Return small, picklable facts that the caller must know when the worker is done."""


Propose = Callable[[Any], Any]


class Task(Protocol):
    """Work on ``range(n)``, in a form that can travel."""

    def open(self, propose: Propose) -> RangeRunner:
        """Open the task in a worker: called once in each, before its first chunk.

        With `propose`, workers agree on a value: it takes a proposal and returns the first of all.
        """


class BatchRunner(RangeRunner, Protocol):
    """A runner whose items are handed to it, batch by batch."""

    def hold(self, start: int, read: Callable[[], Sequence[Any]]) -> None:
        """Take a batch: `read` returns the items from `start` on. Ranges of it are run next."""


class CompiledRunner(Protocol):
    """A runner that needs no loop around it, in a thread of the caller's process."""

    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run chunks until none is left or the run is halted; the ledger records the progress."""


@dataclass(frozen=True, eq=False)
class Job:
    """All that a worker must know of a run.

    Attributes
    ----------
    task : Task
        The work.
    balance : Balance
        The rule by which workers come by chunks.
    grid : ChunkGrid
        The division of all items into chunks.
    n_workers : int
        The number of workers.
    parent_state : ParentState
        The state of the caller that the function sees.
    runs_all : bool
        Whether the task opens into a `CompiledRunner`.
    is_streamed : bool
        Whether the task opens into a `BatchRunner`; then grid and balance mean nothing.
    retry_policy : RetryPolicy
        How long a range may take, and which ranges are tried again.
    collect_errors : bool
        Whether errors of ranges are delivered; otherwise the first error ends the run.
    can_split : bool
        Whether parts of a chunk can be run.
    marks : SharedView or None
        Where the chunks are marked, if not in the ledger's own bytes.
    folder : str or None
        Where processes put large results that are not put in place; None for memory.
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
        """Return the job's own bytes for marks, mapped in this process; None if it has none."""
        return None if self.marks is None else self.marks.open("write").data


Deliver = Callable[[int, Any], None]
"""A function that takes the start of a range and its result."""

"""Tasks, and the job that every worker of a run gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from taskcarrier.memory.segments import SharedView
from taskcarrier.record import record
from taskcarrier.scheduling.balance import Balance
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import NOT_BEGUN, Begun, Ledger
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RetryPolicy
from taskcarrier.workers.call import Call
from taskcarrier.workers.parent_state import ParentState

if TYPE_CHECKING:
    from taskcarrier.workers.records import WorkerStats
    from taskcarrier.workers.snapshots import Snapshot

IN_PLACE = object()
"""What a task returns for a range whose result is already in place."""

RunRange = Callable[[int, int], Any]
"""A task that was started in one worker: takes ``(start, stop)`` and returns the result of that
range, or `IN_PLACE`."""

Deliver = Callable[[int, Any], None]
"""A function that takes the start of a range and its result."""


@dataclass(eq=False)
class WorkerContext:
    """What a task may use in one worker.

    Attributes
    ----------
    number : int
        The worker's number, from 0.
    propose : callable
        Takes a value, and returns the first one that any worker has proposed: so workers agree.
    facts : object
        A small, picklable value that the task leaves for the caller.
    batch : tuple of int and callable
        In streams, the batch of which ranges are run: its first item's number, and a function
        that reads its items.
    """

    number: int
    propose: Callable[[Any], Any]
    facts: Any = None
    batch: tuple[int, Callable[[], Sequence[Any]]] = (0, tuple)


class Task(Protocol):
    """Work on ``range(n)``, in a form that can travel."""

    def start(self, worker: WorkerContext) -> RunRange:
        """Start the task in a worker: called once in each, before its first range."""


class CompiledTask(ABC):
    """A task that can also claim chunks by itself, in compiled code in a thread of the caller's."""

    @abstractmethod
    def start(self, worker: WorkerContext) -> RunRange:
        """Start the task in a worker, as any `Task`."""

    @abstractmethod
    def run_all(self, job: Job, ledger: Ledger, worker: int, deliver: Deliver) -> None:
        """Run chunks until none is left or the run is halted; the ledger records the progress."""


class ShareTask(ABC):
    """A task over the chunks that static balance gives to a worker, whose data it has.

    It is pickled without this data, its share, as its class, its call and further arguments.
    """

    call: Call

    @property
    @abstractmethod
    def arguments(self) -> tuple[Any, ...]:
        """What makes it in a worker: ``type(task)(call, share, *arguments)``."""

    @abstractmethod
    def start(self, worker: WorkerContext) -> RunRange:
        """Start the task in a worker, as any `Task`."""

    @abstractmethod
    def run_share(self, job: Job, ledger: Ledger, stats: WorkerStats, deliver: Deliver) -> None:
        """Run the worker's chunks; keep in the stats what is not delivered."""


class Move(Protocol):
    """How the work of a run gets from the caller's memory to worker processes.

    Attributes
    ----------
    snapshot : Snapshot
        The function as it was before the caller called it.
    """

    snapshot: Snapshot

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the report, known when the task is made."""

    @property
    def runs_user_code(self) -> bool:
        """Whether making the task may run code of the user's, which pickles objects."""

    def count_item_bytes(self) -> tuple[float, float]:
        """Return the bytes of an item, and those of its result as far as they are known."""

    def make_task(self, first: int) -> Task:
        """Return the task for processes, which will run chunks from `first` on at the earliest."""

    def begin(self) -> None:
        """Let processes have the run: called when they have begun."""

    def carry(self, items: tuple[int, int], proposal: Any, agreed: Any) -> None:
        """Bring the caller's results of `items` where those of processes lie.

        `proposal` is what the caller has proposed, and `agreed` what the workers agree on.
        """


@record
class Job:
    """All that a worker must know of a run.

    Attributes
    ----------
    task : Task
        The work; a `CompiledTask` claims chunks by itself.
    balance : Balance
        The rule by which workers come by chunks; without meaning in streams.
    grid : ChunkGrid
        The division of all items into chunks; without meaning in streams.
    n_workers : int
        The number of workers.
    parent_state : ParentState
        The state of the caller that the function sees.
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
    begun : Begun
        What was done of the run before; the workers go on from there.
    move : Move or None
        How the work gets to worker processes, if the caller begins a run over a grid.
    snapshot : Snapshot or None
        The function as it was before the caller called it, if the caller begins a stream.
    """

    task: Task
    balance: Balance
    grid: ChunkGrid
    n_workers: int
    _: KW_ONLY
    parent_state: ParentState = field(default_factory=ParentState.capture)
    retry_policy: RetryPolicy = DEFAULT_POLICY
    collect_errors: bool = False
    can_split: bool = False
    marks: SharedView | None = None
    folder: str | None = None
    begun: Begun = NOT_BEGUN
    move: Move | None = None
    snapshot: Snapshot | None = None

    def open_marks(self) -> memoryview | None:
        """Return the job's own bytes for marks, mapped in this process; None if it has none."""
        return None if self.marks is None else self.marks.open("write").data

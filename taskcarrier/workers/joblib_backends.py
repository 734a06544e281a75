"""Lists on backends that others have registered with joblib, such as those of Dask and Ray.

`joblib.Parallel` is handed a task for each chunk, a block of items with its number, and shares these
out; there is no ledger that its workers could see. They call the function with the code of our own
workers, and what they send back is a result or an error that is packed as ours are, so that neither
a strange exception nor a strange result depends on how the backend pickles.

What travels. Workers that share memory with the caller are given the objects themselves. To others
everything goes as bytes: the function, what every call gets, and the memory of large arrays in
that are one plain array of bytes each, the same object in every task, because that is what
backends know to send once (Dask scatters it, kin of loky's map it from a file). The rest of a task
is its block.

Who stops. Results are taken in the order of the blocks, so the lowest that fails is the one raised;
from then on no further task is made, and those under way are waited for. Deaths of workers are the
backend's own affair: its error, or its way to try again.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol, cast

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from taskcarrier.notes import add_note
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.parent_state import ParentState
from taskcarrier.workers.pickled_errors import pickle_error, unpickle_error
from taskcarrier.workers.pickling import pickle_apart, pickle_items, unpickle_items
from taskcarrier.workers.records import RangeFailure, RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import limited


class Calls(Protocol):
    """How a function is called with items: a dataclass, which is pickled without the keywords."""

    call: Call

    def bind_shared(self) -> Calls:
        """The same in a worker."""

    def call_items(self, items: Sequence[Any], start: int) -> Any:
        """Results of items from `start` on."""


class ListTask(Protocol):
    """A task of a list: what is done, and with what."""

    calls: Any  # Calls, which `replace` does not see as a dataclass
    items: Sequence[Any]


def with_worker_count(choice: Choice, backend: str | None) -> Choice:
    """The same with the number of workers that there are, or in the caller if that is one.

    Parameters
    ----------
    choice : Choice
        Of a registered backend.
    backend : str or None
        Its name, None for that of the active `joblib.parallel_config`, which may have more to say.
    """
    with _use_backend(backend):  # an ImportError if it is loaded now and cannot be
        n_workers = joblib.effective_n_jobs(choice.n_jobs)
    if n_workers < 1:
        raise RuntimeError(f"backend {choice.backend!r} has no worker: start some, then map")
    if n_workers == 1:  # joblib would run it here too
        return Choice("sequential", 1, f"backend {choice.backend!r} has one worker")
    return replace(choice, n_jobs=n_workers)


def run(
    job: Job,
    choice: Choice,
    backend: str | None,
    deliver: Deliver,
    tick: Callable[[Ledger], None] | None,
) -> RunResult:
    """Run a job over a list to its end; accounts of those workers that had a block."""
    ledger = Ledger.local(job.n_workers)
    failures: list[RangeFailure] = []
    worker_stats = _StatsByWorker()
    with _use_backend(backend):
        there, _ = get_active_backend()
        shares_memory = getattr(there, "supports_sharedmem", False)
        streams = getattr(there, "supports_return_generator", False)
        parallel = joblib.Parallel(
            n_jobs=choice.n_jobs, return_as="generator" if streams else "list"
        )
        sender = (_Sender if shares_memory else _ByteSender)(job)
        tasks = _generate_tasks(job, ledger, sender, failures)
        with _close_early(_results(parallel, tasks)) as results:
            for done in results:
                stats = worker_stats.call_items(done.worker)
                stats.busy_ns += done.busy_ns
                failure = _failure(done, deliver, stats.name)
                if failure is not None:
                    ledger.halt()
                    failures.append(failure)
                    continue
                stats.ranges += 1
                stats.items += done.n_items
                ledger.finish(0, done.n_items)
                if tick is not None:
                    tick(ledger)
    ran = RunResult.read(worker_stats.all, ledger)
    ran.failures = failures
    ran.nbytes_sent = sender.nbytes
    return ran


def _use_backend(backend: str | None) -> AbstractContextManager[Any]:
    """Where `joblib.Parallel` finds the backend; it loads some of them when this is entered."""
    if backend is None:
        return nullcontext()
    return cast("AbstractContextManager[Any]", joblib.parallel_config(backend=backend))


class _Worker(NamedTuple):
    """Who ran a block."""

    node: str
    pid: int
    thread: int

    @classmethod
    def here(cls) -> _Worker:
        return cls(socket.gethostname(), os.getpid(), threading.get_ident())


class _Done(NamedTuple):
    """What comes back of a block: its result, or the error that ended it; packed or not."""

    start: int
    n_items: int
    worker: _Worker
    busy_ns: int
    failed: bool
    result: Any
    is_packed: bool = False


class _StatsByWorker:
    """Accounts of workers, in the order in which they are first heard of."""

    def __init__(self) -> None:
        self._by_worker: dict[_Worker, WorkerStats] = {}
        self._here = _Worker.here()

    def call_items(self, worker: _Worker) -> WorkerStats:
        if worker not in self._by_worker:
            number = len(self._by_worker)
            self._by_worker[worker] = WorkerStats(number, self._name(worker))
        return self._by_worker[worker]

    def _name(self, worker: _Worker) -> str:
        if worker == self._here:
            return "caller"
        place = worker[:2]
        thread = sum(other[:2] == place for other in self._by_worker)
        if place == self._here[:2]:
            return f"thread {thread}"
        name = f"process {worker.pid}"
        if worker.node != self._here.node:
            name += f" on {worker.node}"
        return f"{name}, thread {thread}" if thread else name

    @property
    def all(self) -> list[WorkerStats]:
        return list(self._by_worker.values())


_Task = tuple[Callable[..., "_Done"], tuple[Any, ...], dict[str, Any]]
"""A task of joblib's: what is called, with what."""


class _Sender:
    """Makes tasks of blocks, for workers that share memory with the caller."""

    nbytes = 0  # that were copied

    def __init__(self, job: Job) -> None:
        self._calls: Calls = cast("ListTask", job.task).calls.bind_shared()
        self._surroundings = job.parent_state

    def task(self, items: Sequence[Any], start: int) -> _Task:
        return _run, (self._calls, items, start, self._surroundings), {}


class _ByteSender(_Sender):
    """The same for workers that do not; they get bytes."""

    def __init__(self, job: Job) -> None:
        calls = cast("ListTask", job.task).calls
        own = replace(calls, call=Call(calls.call.func)), job.parent_state
        try:
            packed = pickle_apart(own, calls.call.kwargs)
        except Exception as error:
            add_note(
                error,
                "taskcarrier could not pickle the function or its arguments for the backend's "
                "workers; make them picklable, or use backend='threading'",
            )
            raise
        self._pieces = [np.frombuffer(piece, np.uint8) for piece in packed]
        self.nbytes = sum(piece.nbytes for piece in self._pieces)

    def task(self, items: Sequence[Any], start: int) -> _Task:
        packed = pickle_items(items)
        self.nbytes += len(packed)
        where = start, start + len(items)
        return _run_packed, (packed, where, *self._pieces), {}


def _generate_tasks(
    job: Job, ledger: Ledger, sender: _Sender, failures: list[RangeFailure]
) -> Iterator[_Task]:
    """Tasks for all chunks. Joblib asks for them in any thread, so errors are for the caller."""
    items = cast("ListTask", job.task).items
    for index in range(len(job.grid)):
        if ledger.is_halted:
            return
        start, stop = job.grid.range_of(index)
        try:
            task = sender.task(items[start:stop], start)
        except Exception as error:
            if is_of_the_program(error):
                raise
            add_note(
                error,
                "taskcarrier could not pickle these items for the backend's workers; use "
                "backend='threading' if they cannot be pickled",
            )
            failures.append(RangeFailure((start, stop), error, "caller"))
            ledger.halt()
            return
        yield task


def _results(parallel: Any, tasks: Iterator[_Task]) -> Generator[_Done, None, None]:
    """What comes back, block by block in order; all at the end where the backend cannot do that."""
    yield from parallel(tasks)


@contextmanager
def _close_early(results: Generator[_Done, None, None]) -> Iterator[Generator[_Done, None, None]]:
    """Have joblib end when the block does, which is early only after an interrupt."""
    try:
        yield results
    finally:
        with suppress(Warning):  # of results that nobody takes; a filter may make errors of them
            results.close()


def _run(calls: Calls, items: Sequence[Any], start: int, parent_state: ParentState) -> _Done:
    """In a worker: one block."""
    begin = monotonic_ns()
    failed = False
    was_worker = this_thread.is_worker
    try:
        this_thread.is_worker = True
        with limited.open(), parent_state.apply_within():
            result = calls.call_items(items, start)
    except BaseException as error:  # noqa: BLE001  # also exits: the caller raises
        result, failed = error, True
    finally:
        this_thread.is_worker = was_worker
    return _Done(start, len(items), _Worker.here(), monotonic_ns() - begin, failed, result)


def _run_packed(packed_items: bytes, where: tuple[int, int], *pieces: np.ndarray) -> _Done:
    """In a worker that has nothing of the caller's: the same, from bytes to bytes."""
    begin = monotonic_ns()
    start, stop = where
    doing = "unpickled the function or its arguments"
    try:
        own, shared, *blocks = (piece.data for piece in pieces)
        calls, parent_state = pickle.loads(own)
        kwargs = pickle.loads(shared, buffers=blocks)
        calls = replace(calls, call=Call(calls.call.func, (), kwargs)).bind_shared()
        doing = "unpickled these items"
        items = pickle.loads(packed_items)
    except BaseException as error:  # noqa: BLE001  # likewise
        add_note(error, f"while a worker {doing}")
        busy_ns = monotonic_ns() - begin
        done = _Done(start, stop - start, _Worker.here(), busy_ns, failed=True, result=error)
    else:
        done = _run(calls, items, start, parent_state)
    return _pickle_done(done)


def _pickle_done(done: _Done) -> _Done:
    result = done.result
    if not done.failed:
        try:
            return done._replace(result=pickle_items(result), is_packed=True)
        except Exception as error:  # noqa: BLE001  # whatever pickling a user's object raises
            add_note(error, "taskcarrier could not pickle the result for the caller")
            result = error
    return done._replace(failed=True, result=pickle_error(result), is_packed=True)


def _failure(done: _Done, deliver: Deliver, worker: str) -> RangeFailure | None:
    """In the caller: the result is delivered, or what stands in its way is returned."""
    result = done.result
    where = (done.start, done.start + done.n_items)
    if done.failed:
        return RangeFailure(where, unpickle_error(result) if done.is_packed else result, worker)
    if done.is_packed:
        try:
            result = unpickle_items(result)
        except Exception as error:
            if is_of_the_program(error):
                raise
            add_note(error, "taskcarrier could not unpickle this result of a worker")
            return RangeFailure(where, error, worker)
    deliver(done.start, result)
    return None

"""Lists on backends that others have registered with joblib, such as those of Dask and Ray.

`joblib.Parallel` gets one task for each chunk, with the chunk's items and its start, and shares the
tasks out; its workers see no ledger. They call the function with the code of our own workers. The
result or error that they send back is packed as ours are, so that even unusual exceptions and
results do not depend on how the backend pickles.

What travels. Workers that share memory with the caller get the objects themselves. Other workers
get everything as bytes: the function, the arguments of every call, and the memory of large arrays
among them. Each is one plain array of bytes, the same object in every task, because
backends know to send such an array once (Dask scatters it, relatives of loky map it from a file).
The rest of a task is its chunk.

How a run stops. Results are taken in the order of the chunks, so the error of the lowest chunk that
fails is the one raised. From then on no further task is made, and those under way are waited for.
The backend itself handles deaths of workers, by an error or by trying again.
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
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.contexts import contextmanager
from taskcarrier.system.interrupts import is_raised_by_handler
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.loop import this_thread
from taskcarrier.workers.parent_state import ParentState
from taskcarrier.workers.pickled_errors import pickle_error, unpickle_error
from taskcarrier.workers.pickling import pickle_apart, pickle_items, unpickle_items
from taskcarrier.workers.queues import WorkQueue
from taskcarrier.workers.records import RangeFailure, RunResult, WorkerStats
from taskcarrier.workers.task import Deliver, Job
from taskcarrier.workers.thread_limits import thread_limit


class Calls(Protocol):
    """A dataclass that calls a function with items; it is pickled without the keyword arguments."""

    call: Call

    def bind_shared(self) -> Calls:
        """Return the same calls as a worker makes them."""

    def call_items(self, items: Sequence[Any], start: int) -> Any:
        """Return the results of `items`, the first of which is item number `start`."""


class ListTask(Protocol):
    """A task over a list: the calls to make, and the items."""

    calls: Any  # Calls, which `replace` does not see as a dataclass
    items: Sequence[Any]


class JoblibExecutor:
    """Runs a list on a backend that was registered with joblib.

    Parameters
    ----------
    choice : Choice
        The choice of such a backend. The executor's own has the actual number of workers.
    backend : str or None
        The backend's name; None for the active `joblib.parallel_config`, which may set more.
    """

    balance = Dynamic()  # joblib shares out
    staging = None
    notes: Sequence[str] = ()
    can_run_compiled = False
    may_move = False
    begins_in_caller = False
    runs_in_caller = False

    def __init__(self, choice: Choice, backend: str | None) -> None:
        self._backend = backend
        with _use_backend(backend):  # an ImportError if joblib cannot load it
            n_workers = joblib.effective_n_jobs(choice.n_jobs)
        if n_workers < 1:
            raise RuntimeError(f"backend {choice.backend!r} has no worker: start some, then map")
        self.choice = replace(choice, n_jobs=n_workers)

    def run(self, job: Job, deliver: Deliver, tick: Callable[[Ledger], None] | None) -> RunResult:
        """Run a job over a list to its end; the result has stats of workers that had a chunk."""
        ledger = Ledger.local(job.n_workers)
        failures: list[RangeFailure] = []
        worker_stats = _StatsByWorker()
        with _use_backend(self._backend):
            active_backend, _ = get_active_backend()
            shares_memory = getattr(active_backend, "supports_sharedmem", False)
            can_stream = getattr(active_backend, "supports_return_generator", False)
            parallel = joblib.Parallel(
                n_jobs=self.choice.n_jobs, return_as="generator" if can_stream else "list"
            )
            sender = (_Sender if shares_memory else _ByteSender)(job)
            tasks = _generate_tasks(job, ledger, sender, failures)
            with _close_early(_generate_results(parallel, tasks)) as results:
                for result in results:
                    stats = worker_stats.get(result.worker)
                    stats.busy_ns += result.busy_ns
                    failure = _deliver_result(result, deliver, stats.name)
                    if failure is not None:
                        ledger.halt()
                        failures.append(failure)
                        continue
                    stats.n_ranges += 1
                    stats.n_items += result.n_items
                    ledger.finish(0, result.n_items)
                    if tick is not None:
                        tick(ledger)
        run_result = RunResult.read(worker_stats.all, ledger)
        run_result.failures = failures
        run_result.nbytes_sent = sender.nbytes
        return run_result

    def stream(self, job: Job) -> AbstractContextManager[WorkQueue]:  # noqa: ARG002  # as in Executor
        """Raise a `ValueError`: joblib takes no items as they come."""
        raise ValueError(
            f"imap cannot use backend {self.choice.backend!r} ({self.choice.reason}): only our own "
            "workers take items as they come; use map, or pass backend='loky' or 'threading'"
        )


def _use_backend(backend: str | None) -> AbstractContextManager[Any]:
    """Return a context in which `joblib.Parallel` uses the backend; entering it may load it."""
    if backend is None:
        return nullcontext()
    return cast("AbstractContextManager[Any]", joblib.parallel_config(backend=backend))


class _Worker(NamedTuple):
    """The identity of a worker that ran a chunk."""

    node: str
    pid: int
    thread: int

    @classmethod
    def current(cls) -> _Worker:
        return cls(socket.gethostname(), os.getpid(), threading.get_ident())


class _Result(NamedTuple):
    """The result of a chunk, or the error that ended it; packed or not."""

    start: int
    n_items: int
    worker: _Worker
    busy_ns: int
    has_failed: bool
    value: Any
    is_packed: bool = False


class _StatsByWorker:
    """The stats of all workers, in the order in which their first results came."""

    def __init__(self) -> None:
        self._by_worker: dict[_Worker, WorkerStats] = {}
        self._caller = _Worker.current()

    def get(self, worker: _Worker) -> WorkerStats:
        if worker not in self._by_worker:
            number = len(self._by_worker)
            self._by_worker[worker] = WorkerStats(number, self._name(worker))
        return self._by_worker[worker]

    def _name(self, worker: _Worker) -> str:
        if worker == self._caller:
            return "caller"
        process = worker[:2]
        thread = sum(other[:2] == process for other in self._by_worker)
        if process == self._caller[:2]:
            return f"thread {thread}"
        name = f"process {worker.pid}"
        if worker.node != self._caller.node:
            name += f" on {worker.node}"
        return f"{name}, thread {thread}" if thread else name

    @property
    def all(self) -> list[WorkerStats]:
        return list(self._by_worker.values())


_Task = tuple[Callable[..., "_Result"], tuple[Any, ...], dict[str, Any]]
"""A task of joblib: a function, its arguments and its keyword arguments."""


class _Sender:
    """Makes tasks of chunks, for workers that share memory with the caller."""

    nbytes = 0  # the bytes that were copied

    def __init__(self, job: Job) -> None:
        self._calls: Calls = cast("ListTask", job.task).calls.bind_shared()
        self._parent_state = job.parent_state

    def make_task(self, items: Sequence[Any], start: int) -> _Task:
        return _run_chunk, (self._calls, items, start, self._parent_state), {}


class _ByteSender(_Sender):
    """Makes tasks of chunks for workers that do not share memory: they get bytes."""

    def __init__(self, job: Job) -> None:
        calls = cast("ListTask", job.task).calls
        calls_and_state = replace(calls, call=Call(calls.call.func)), job.parent_state
        try:
            packed = pickle_apart(calls_and_state, calls.call.kwargs)
        except Exception as error:  # pickling a user's object can raise anything
            add_note(
                error,
                "taskcarrier could not pickle the function or its arguments for the backend's "
                "workers; make them picklable, or use backend='threading'",
            )
            raise
        self._pieces = [np.frombuffer(piece, np.uint8) for piece in packed]
        self.nbytes = sum(piece.nbytes for piece in self._pieces)

    def make_task(self, items: Sequence[Any], start: int) -> _Task:
        packed = pickle_items(items)
        self.nbytes += len(packed)
        bounds = start, start + len(items)
        return _run_packed_chunk, (packed, bounds, *self._pieces), {}


def _generate_tasks(
    job: Job, ledger: Ledger, sender: _Sender, failures: list[RangeFailure]
) -> Iterator[_Task]:
    """Yield the tasks of all chunks. Joblib asks in any thread, so `failures` takes the errors."""
    items = cast("ListTask", job.task).items
    for index in range(len(job.grid)):
        if ledger.is_halted:
            return
        start, stop = job.grid.range_of(index)
        try:
            task = sender.make_task(items[start:stop], start)
        except Exception as error:  # pickling a user's object can raise anything
            if is_raised_by_handler(error):
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


def _generate_results(parallel: Any, tasks: Iterator[_Task]) -> Generator[_Result, None, None]:
    """Yield the results of chunks in order, or all at the end if the backend cannot stream them."""
    yield from parallel(tasks)


@contextmanager
def _close_early(
    results: Generator[_Result, None, None],
) -> Iterator[Generator[_Result, None, None]]:
    """End joblib's call when the ``with`` block ends, which is early only after an interrupt."""
    try:
        yield results
    finally:
        with suppress(Warning):  # about results not taken; a filter may make an error of it
            results.close()


def _run_chunk(
    calls: Calls, items: Sequence[Any], start: int, parent_state: ParentState
) -> _Result:
    """Run one chunk in a worker."""
    begin = monotonic_ns()
    has_failed = False
    was_worker = this_thread.is_worker
    try:
        this_thread.is_worker = True
        with thread_limit.open(), parent_state.apply_within():
            value = calls.call_items(items, start)
    except BaseException as error:  # noqa: BLE001  # also exits: the caller raises
        value, has_failed = error, True
    finally:
        this_thread.is_worker = was_worker
    return _Result(start, len(items), _Worker.current(), monotonic_ns() - begin, has_failed, value)


def _run_packed_chunk(packed_items: bytes, bounds: tuple[int, int], *pieces: np.ndarray) -> _Result:
    """Run one chunk, from bytes to bytes, in a worker that shares no memory with the caller."""
    begin = monotonic_ns()
    start, stop = bounds
    step = "unpickled the function or its arguments"
    try:
        packed_calls, packed_kwargs, *buffers = (piece.data for piece in pieces)
        calls, parent_state = pickle.loads(packed_calls)
        kwargs = pickle.loads(packed_kwargs, buffers=buffers)
        calls = replace(calls, call=Call(calls.call.func, (), kwargs)).bind_shared()
        step = "unpickled these items"
        items = pickle.loads(packed_items)
    except BaseException as error:  # noqa: BLE001  # likewise
        add_note(error, f"while a worker {step}")
        busy_ns = monotonic_ns() - begin
        result = _Result(
            start, stop - start, _Worker.current(), busy_ns, has_failed=True, value=error
        )
    else:
        result = _run_chunk(calls, items, start, parent_state)
    return _pickle_result(result)


def _pickle_result(result: _Result) -> _Result:
    value = result.value
    if not result.has_failed:
        try:
            return result._replace(value=pickle_items(value), is_packed=True)
        except Exception as error:  # noqa: BLE001  # pickling a user's object can raise anything
            add_note(error, "taskcarrier could not pickle the result for the caller")
            value = error
    return result._replace(has_failed=True, value=pickle_error(value), is_packed=True)


def _deliver_result(result: _Result, deliver: Deliver, worker: str) -> RangeFailure | None:
    """Deliver a result in the caller, or return the failure that prevents this."""
    value = result.value
    bounds = (result.start, result.start + result.n_items)
    if result.has_failed:
        return RangeFailure(bounds, unpickle_error(value) if result.is_packed else value, worker)
    if result.is_packed:
        try:
            value = unpickle_items(value)
        except Exception as error:  # pickling a user's object can raise anything
            if is_raised_by_handler(error):
                raise
            add_note(error, "taskcarrier could not unpickle this result of a worker")
            return RangeFailure(bounds, error, worker)
    deliver(result.start, value)
    return None

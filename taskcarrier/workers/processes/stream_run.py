"""A feed of worker processes (`taskcarrier.workers.queues`).

Which way the data goes. A block's items are pickled once; what is large of it lies in a segment, so
that a message to a worker always fits into its socket and sending never waits. Results come as in
any run. Each worker runs its blocks in the order in which they were sent, so what it died on, and
what it has not begun, is known here, from the ledger's word and from what has come.

A worker that dies is replaced. What it had in hand is given out again as `taskcarrier.scheduling.retries`
says, before new blocks; if that is given up, the error comes in place of the result.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from taskcarrier.memory.segments import Segment
from taskcarrier.memory.staging import Staging
from taskcarrier.notes import add_note, in_words
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Again
from taskcarrier.system.interrupts import is_of_the_program
from taskcarrier.workers.loop import timeout_error
from taskcarrier.workers.pickling import Parcel, pack_items, unpack_items
from taskcarrier.workers.processes.grid_run import (
    GRACE_SECONDS,
    LONGEST_WAIT,
    Watch,
    Worker,
    end_the_late,
)
from taskcarrier.workers.processes.worker import (
    KEPT,
    RESULTS,
    PackedBlock,
    account_from,
    block_order,
    order,
    results_from,
)
from taskcarrier.workers.queues import AHEAD, Came, UnsendableError, came_of, raise_and_forget
from taskcarrier.workers.records import Account, Death, Parts, Ran
from taskcarrier.workers.task import Job

# A worker starts, and imports what the function needs, in less; after that it has hung.
_STARTING_SECONDS = 60.0
# A pickle from this size on lies in a segment too. Far below what a socket holds.
_SENT_NBYTES = 1 << 14


@dataclass(frozen=True, eq=False)
class _Block:
    """A range that a worker was given or is to be given, and the block that its items are of."""

    again: Again
    first: int
    packed: PackedBlock
    segment: Segment | None
    nbytes: int


class ProcessFeed:
    """The caller's side.

    Parameters
    ----------
    job : Job
        The run.
    ledger : Ledger
        Of the crew, fresh.
    parcel : Parcel
        The packed job.
    living : callable
        Takes a number; the worker of that number, a new one if the last has died.
    """

    runs_here = False

    def __init__(
        self, job: Job, ledger: Ledger, parcel: Parcel, living: Callable[[int], Worker]
    ) -> None:
        self.ledger = ledger
        self._job = job
        self._parcel = parcel
        self._living = living
        self._watch = Watch()
        self._workers: dict[int, Worker] = {}  # at work
        self._to_end: dict[int, Worker] = {}  # those that wait to be told that nothing more comes
        self._told: dict[int, Worker] = {}  # and those that know
        self._handed: dict[int, deque[_Block]] = {}
        self._n_come: dict[int, int] = {}  # results since the worker began
        self._items_come: dict[int, int] = {}  # ... and items in them
        self._waiting: deque[_Block] = deque()  # to be handed out before new blocks
        self._overdue: dict[int, tuple[int, int]] = {}
        self._idle_deaths: dict[int, int] = {}
        self._accounts: list[Account] = []
        self._deaths: list[Death] = []
        self._failed: Account | None = None
        self._nbytes_sent = 0
        self._memory_kept = False

    @property
    def has_room(self) -> bool:
        """Whether a worker would take a further block, maybe one that has not begun."""
        return not self._waiting and (
            self._may_begin or any(len(self._handed[one]) < AHEAD for one in self._workers)
        )

    @property
    def _may_begin(self) -> bool:
        """Whether a further worker may; not once some have left because another has failed."""
        return len(self._workers) == len(self._handed) < self._job.n_workers

    def give(self, start: int, items: Sequence[object]) -> None:
        """Hand items to the worker that has least to do."""
        stop = start + len(items)
        large: list[memoryview] = []
        try:
            packed = pack_items(items, large)
        except Exception as error:
            if is_of_the_program(error):
                raise
            add_note(
                error,
                f"taskcarrier could not pickle {in_words(start, stop)} for worker processes; use "
                "backend='threading' if they cannot be pickled",
            )
            raise UnsendableError(error) from None
        nbytes = len(packed) + sum(map(len, large))
        self._nbytes_sent += nbytes
        staging, segment, places = Staging(self._job.folder), None, []
        for block in large:
            segment, offset = staging.add(block)
            places.append((offset, len(block)))
        content = pickle.dumps((packed, places))
        where: PackedBlock = content
        if len(content) > _SENT_NBYTES:
            segment, offset = staging.add(memoryview(content))
            where = (offset, len(content))
        self._waiting.append(_Block(Again(start, stop), start, where, segment, nbytes))
        self._hand_out()

    def take(self, seconds: float) -> list[Came]:
        """What has come; if nothing has, wait until something does, or so many seconds."""
        came: list[Came] = []
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if (timeout := self._job.recovery.timeout) is not None:
                next_due = end_the_late(
                    timeout, self._workers, self._in_hand, self.ledger, self._overdue
                )
                left = min(left, next_due)
            for number, worker, has_ended in self._watch.wait(left):
                says_more = self._take_in(number, worker, came)
                if number not in self._workers:
                    continue
                if has_ended:
                    self._bury(number, worker, came)
                elif not says_more:
                    self._watch.listen_no_more(worker)
            if self._failed is not None:
                raise_and_forget(self._failed)
            self._hand_out()
            if came or time.monotonic() >= deadline:
                return came

    def close(self) -> Ran:
        """Stop: workers at the end of their range, or soon by force.

        When all is done, a worker that is there still is one that has just been started: it gets
        the time to.
        """
        is_done = not self._waiting and not any(self._handed.values())
        if not is_done:
            self.ledger.halt()
        try:
            self._end(_STARTING_SECONDS if is_done else GRACE_SECONDS)
        finally:
            if self._memory_kept:
                for segment in self._parcel.segments:
                    segment.retire()
        self._accounts.sort(key=lambda account: account.worker)
        ran = Ran.read(self._accounts, self.ledger)
        ran.deaths = self._deaths
        ran.nbytes_sent = self._nbytes_sent
        return ran

    # Workers

    def _begin(self, number: int) -> None:
        worker = self._living(number)
        self.ledger.begin(number)
        self._n_come[number] = self._items_come[number] = 0
        self._handed[number] = deque()
        worker.is_free = False
        self._send(worker, order([], self._parcel.data, fed=True), self._parcel.fds)
        self._workers[number] = self._to_end[number] = worker
        self._watch.add(number, worker)

    def _send(self, worker: Worker, message: bytes, fds: list[int]) -> None:
        # A worker that is just dying is seen by its descriptor.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.channel.send(message, fds)

    def _leave(self, number: int) -> None:
        self._watch.drop(self._workers.pop(number))
        self._overdue.pop(number, None)

    def _end(self, seconds: float) -> None:
        """Tell workers that nothing more comes; those that do not report soon are killed."""
        deadline = time.monotonic() + seconds
        try:
            for number in list(self._to_end):
                self._send(self._to_end[number], b"", [])
                self._told[number] = self._to_end.pop(number)
            for number, worker in list(self._workers.items()):
                self._take_in(number, worker, None)  # what has come may not have been looked at
            while self._workers and (left := deadline - time.monotonic()) > 0:
                for number, worker, has_ended in self._watch.wait(min(left, LONGEST_WAIT)):
                    says_more = self._take_in(number, worker, None)
                    if number in self._workers and (has_ended or not says_more):
                        self._give_up(number, worker)
        finally:
            # Also whoever was not told: it would take the next run for a block of this one.
            for number, worker in {**self._to_end, **self._workers}.items():
                self._give_up(number, worker)
            self._to_end = {}
        for worker in self._told.values():
            worker.is_free = True  # it has reported, or it is dead

    def _give_up(self, number: int, worker: Worker) -> None:
        """End a worker that has not reported, or was not told to; what came of it counts."""
        if number in self._workers:
            self._leave(number)
            self._accounts.append(self._account_of_dead(number, worker))
        worker.kill()
        worker.reap()

    def _account_of_dead(self, number: int, worker: Worker) -> Account:
        return Account(number, worker.name, self._n_come[number], self._items_come[number])

    # Blocks and results

    def _hand_out(self) -> None:
        while self._waiting:
            number = min(self._workers, key=lambda one: len(self._handed[one]), default=None)
            if self._may_begin and (number is None or self._handed[number]):
                number = len(self._handed)  # all have something in hand: another begins
                self._begin(number)
            if number is None:  # all have left, because of one whose error has not come yet
                return
            if len(self._handed[number]) >= AHEAD:
                return
            block = self._waiting.popleft()
            self._handed[number].append(block)
            fds = [] if block.segment is None else [block.segment.fd]
            message = block_order(block.again, block.first, block.packed)
            self._send(self._workers[number], message, fds)

    def _take_in(self, number: int, worker: Worker, came: list[Came] | None) -> bool:
        """Read what a worker says; without `came` results are counted and not unpickled."""
        says_more = worker.channel.read()
        for message in worker.channel.messages():
            data, _ = message
            if data[:1] == RESULTS:
                on_disk = self._job.folder is not None
                for _, packed, large in results_from(message, on_disk=on_disk):
                    block = self._handed[number].popleft()
                    self._n_come[number] += 1
                    self._items_come[number] += block.again.stop - block.again.start
                    if came is not None:
                        came.append(_unpacked(block, packed, large))
            else:
                # At first: if this is cut short, the worker has reported all the same.
                self._memory_kept |= data[1:2] == KEPT
                self._leave(number)
                account = account_from(data[2:])
                account.name = worker.name
                self._accounts.append(account)
                if account.failure is not None:
                    self._failed = account
        return says_more

    # Deaths

    def _in_hand(self, number: int) -> Again | None:
        """The range that a worker has in hand, if its result has not come."""
        position = self.ledger.again_in_hand(number)
        if position is None or position < self._n_come[number]:
            return None
        # Results of ranges before it may have come and not been read yet.
        return self._handed[number][position - self._n_come[number]].again

    def _bury(self, number: int, worker: Worker, came: list[Came]) -> None:
        """A worker has died: see to what it had in hand, and put another in its place."""
        held, overdue = self._in_hand(number), self._overdue.get(number)
        self._leave(number)
        del self._to_end[number]
        exitcode = worker.reap()
        death = Death.of(number, worker.name, exitcode, held, overdue)
        self._deaths.append(death)
        self._accounts.append(self._account_of_dead(number, worker))
        if self.ledger.halted:  # by a worker that did not live to tell why
            raise self._error_of(death)
        rest = self._handed.pop(number)
        nexts: list[_Block] = []
        recovery = self._job.recovery
        if held is None:
            # It was dying when it began, or died between two blocks.
            idle = 0 if self._n_come[number] else self._idle_deaths.get(number, 0) + 1
            self._idle_deaths[number] = idle
            if idle > max(1, recovery.retries):
                raise self._error_of(death)
        else:
            block = rest.popleft()
            if death.was_late:
                parts = recovery.after_timeout(held)
            elif overdue is not None:  # it had come to this one meanwhile, which is not to blame
                parts = [held]
            else:
                parts = recovery.after_death(held, narrows=True)
            nexts = [replace(block, again=part) for part in parts]
            if not parts:
                error: Exception
                if death.was_late:
                    error = timeout_error(recovery)
                    add_note(error, f"{worker.name} was killed")
                else:
                    error = self._error_of(death)
                fault = Parts([], [(held.start, held.stop, error)])
                came.append(Came(held.start, held.stop, fault))
        self._waiting.extendleft(reversed([*nexts, *rest]))
        self._begin(number)

    def _error_of(self, death: Death) -> Exception:
        from taskcarrier.errors import death_of  # noqa: PLC0415  # slow, and rarely needed

        if death.range is None:
            return death_of(death, None)
        return death_of(death, in_words(*death.range))


def _unpacked(block: _Block, packed: bytes, large: list[memoryview]) -> Came:
    start, stop, _ = block.again
    nbytes = block.nbytes + len(packed) + sum(map(len, large))
    try:
        result = unpack_items(packed, large)
    except Exception as error:
        if is_of_the_program(error):
            raise
        add_note(error, "taskcarrier could not unpickle this result of a worker process")
        result = Parts([], [(start, stop, error)])
    return came_of(result)._replace(nbytes=nbytes)

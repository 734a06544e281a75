"""One run on a pool of processes: nothing is lost, whichever worker dies at whichever step.

Most of it is scripted: workers run the real loop of a worker process, but in this thread, over
memory in which they die in front of a chosen write, claim, message or call.
"""

import itertools
import os
import pickle
import signal
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.errors import WorkerDiedError
from taskcarrier.memory.segments import Segment, SharedView
from taskcarrier.memory.staging import Staging
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.counters import ThreadCounter, ThreadSetOnce
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import (
    DONE,
    OWN_MARKS,
    PENDING,
    RECLAIMED,
    SENT,
    Ledger,
    ledger_nbytes,
)
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.workers.pickling import Payload, pickle_task
from taskcarrier.workers.processes import grid_run as module
from taskcarrier.workers.processes import worker
from taskcarrier.workers.processes.grid_run import GridRun
from taskcarrier.workers.records import PartialResult
from taskcarrier.workers.task import IN_PLACE, Job
from tests.clocks import LATE, LONG
from tests.errors import Killed
from tests.helpers import BALANCES
from tests.workers.processes import helpers
from tests.workers.processes.mortals import (
    SIGKILL,
    Fate,
    MortalCounter,
    MortalMemory,
    Process,
)

by_balance = pytest.mark.parametrize("balance", BALANCES, ids=lambda rule: rule.name)


class Task:
    """Doubles items.

    Parameters
    ----------
    place : array, optional
        Where results are put; else they are delivered.
    deadly : collection of int
        Items that kill.
    """

    def __init__(self, place=None, deadly=()):
        self.place = place
        self.deadly = deadly
        self.calls = []
        self.fate = Fate()

    def start(self, worker):
        self.fate.step()
        return self.run

    def run(self, start, stop):
        self.fate.step()
        self.calls.append((start, stop))
        if any(start <= item < stop for item in self.deadly):
            self.fate.left = 0
        self.fate.step()
        if self.place is None:
            return doubled(start, stop)
        self.place[start:stop] = doubled(start, stop)
        return IN_PLACE


def doubled(start, stop):
    return [2 * item for item in range(start, stop)]


class ScriptedPool:
    """Scripted workers of one run.

    Parameters
    ----------
    job : Job
        The run.
    fates : iterable of int or None
        When the worker processes die, in the order in which they are started; those beyond do not.
    batch_seconds : float
        How long results are kept back, to be sent together.
    """

    def __init__(self, job, fates=(), batch_seconds=0.0):
        self.job = job
        self.batch_seconds = batch_seconds
        self.ledger = Ledger(
            memoryview(bytearray(ledger_nbytes(job.n_workers))).cast("q"),
            ThreadCounter(),
            ThreadSetOnce(),
            memoryview(bytearray(len(job.grid))),
        )
        self.ledger.reset(job.n_workers)
        self.ledger.set_marks(None, len(job.grid))
        self.delivered = {}
        self.fates = iter(fates)
        self.processes = []
        self.waiting = []
        self.lost = []  # for each dead worker, ranges that it had run or begun in vain
        self.run = GridRun(
            job, self.ledger, self.delivered.__setitem__, Payload(b"", []), self.get_worker
        )

    def get_worker(self, number):
        """Return a new process that waits for its run."""
        name = f"process {len(self.processes)}"
        process = Process(number, name, Fate(next(self.fates, None)))
        self.processes.append(process)
        self.waiting.append(process)
        return process

    def started(self):
        """Start all processes, each with its order."""
        for number in range(self.job.n_workers):
            self.run.start(number, self.get_worker(number))
        return self

    def live(self, process):
        """Let a process run until it is done or dies."""
        task, fate, words = self.job.task, process.fate, self.ledger
        task.fate = fate
        n_calls = len(task.calls)
        ledger = Ledger(
            MortalMemory(words._words, fate),
            MortalCounter(words._counter, fate),
            words._set_once,
            MortalMemory(words._own_marks, fate),
        )
        data, fds = process.inside.receive()
        try:
            with (
                patch.object(worker, "unpickle_task", lambda data, fds: self.job),
                patch.object(worker, "_BATCH_SECONDS", self.batch_seconds),
                patch.object(worker, "_FIRST_BATCH_SECONDS", self.batch_seconds),
            ):
                worker._run_payload(process.number, process.inside, ledger, data, fds)
        except Killed:
            self.lost.append(self.lost_with(process, task.calls[n_calls:]))
            process.end()

    def lost_with(self, process, calls):
        """Return the ranges that a process has run whose results are lost."""
        arrived = {start for data in process.inside.results for start, *_ in pickle.loads(data[1:])}
        marks, size = self.ledger.marks, self.job.grid.chunksize
        return [
            (start, stop)
            for start, stop in calls
            if marks[start // size] in {PENDING, RECLAIMED}
            or (marks[start // size] == SENT and start not in arrived)
        ]

    def to_the_end(self):
        """Return the result of the run; each process runs when it is started."""
        try:
            self.started()
            for _ in range(1000):
                if not self.run.is_running():
                    return self.run.make_result()
                while self.waiting:
                    self.live(self.waiting.pop(0))
                self.run.step(0)
            pytest.fail("it does not end")
        finally:
            self.close()

    def calls_expected(self):
        """Count every chunk once, and the ranges that dead workers have lost."""
        indices = map(self.job.grid.range_of, range(len(self.job.grid)))
        return Counter(indices) + Counter(itertools.chain(*self.lost))

    def results(self):
        """Return the result of each item, or -1 for those without."""
        found = np.full(self.job.grid.n_items, -1) if self.job.task.place is None else None
        if found is None:
            return self.job.task.place.tolist()
        for start, result in self.delivered.items():
            if isinstance(result, list):
                found[start : start + len(result)] = result
        return found.tolist()

    def __enter__(self):
        return self.started()

    def __exit__(self, *_):
        self.close()

    def close(self):
        for process in self.processes:
            if process.pidfd >= 0:
                process.close()


def scripted(
    *,
    balance=None,
    n_items=8,
    chunksize=2,
    n_workers=1,
    in_place=False,
    deadly=(),
    fates=(),
    batch_seconds=0.0,
    **others,
):
    task = Task(np.full(n_items, -1) if in_place else None, deadly)
    job = Job(task, balance or Dynamic(), ChunkGrid(n_items, chunksize), n_workers, **others)
    return ScriptedPool(job, fates, batch_seconds)


WAYS = {
    "in place": {"in_place": True},
    "sent at once": {},
    "sent in the end": {"batch_seconds": LONG},
}
by_way = pytest.mark.parametrize("way", WAYS)


# The number of steps after which a worker has its first range in hand.
IN_FIRST_RANGE = {"static": 3, "dynamic": 5}


def at_every_step(before, **options):
    """Yield runs in which the process after those `before` dies at its first step, second, ..."""
    for n_steps in itertools.count():
        pool = scripted(fates=[*before, n_steps], **options)
        ran = pool.to_the_end()
        yield pool, ran
        if pool.processes[len(before)].fate.left:
            return  # it had steps left in the end


@by_balance
@by_way
class TestDeathAtAnyStep:
    # A worker that is alone, the first of two, and the second.
    @pytest.mark.parametrize(("before", "n_workers"), [([], 1), ([], 2), ([None], 2)], ids=str)
    def test_only_lost_ranges_are_run_again(self, balance, way, before, n_workers):
        n_deaths = 0
        for pool, ran in at_every_step(before, balance=balance, n_workers=n_workers, **WAYS[way]):
            assert pool.results() == doubled(0, 8)
            assert (ran.unrecovered_deaths, ran.missing, ran.failures) == ([], [], [])
            assert not ran.is_halted
            assert Counter(pool.job.task.calls) == pool.calls_expected()
            n_deaths = max(n_deaths, len(ran.deaths))
        assert n_deaths == 1

    def test_only_lost_ranges_are_run_again_by_a_replacement(self, balance, way):
        for pool, ran in at_every_step(
            [IN_FIRST_RANGE[balance.name]], balance=balance, **WAYS[way]
        ):
            assert pool.results() == doubled(0, 8)
            assert (ran.unrecovered_deaths, ran.missing, ran.failures) == ([], [], [])
            again = Counter(pool.job.task.calls) - pool.calls_expected()
            # An attempt that is just finished may be run once more.
            assert again in (Counter(), Counter([(0, 2)]))

    def test_finished_ranges_are_not_given_up(self, balance, way):
        retry_policy = RetryPolicy(retries=1)
        options = {"balance": balance, "retry_policy": retry_policy, **WAYS[way]}
        n_fatal = 0
        for pool, ran in at_every_step([IN_FIRST_RANGE[balance.name]], **options):
            for part in ran.missing:
                mark = pool.ledger.marks[part[0] // 2]
                assert mark != DONE
                assert mark != SENT or part[0] not in pool.delivered
            n_fatal += len(ran.unrecovered_deaths)
        assert n_fatal > 0

    def test_every_item_is_counted_in_the_stats(self, balance, way):
        for pool, ran in at_every_step([], balance=balance, **WAYS[way]):
            (last,) = [one for one in ran.worker_stats if one.name == pool.processes[-1].name]
            assert last.failure is None
            done = sum(stats.n_items for stats in ran.worker_stats)
            n_lost = sum(stop - start for start, stop in itertools.chain(*pool.lost))
            # A range that was finished and lost counts for both workers that finished it.
            assert 8 - 2 * len(ran.deaths) <= done <= 8 + n_lost

    def test_without_retries_no_range_is_run_twice(self, balance, way):
        retry_policy = RetryPolicy(retries=0)
        for pool, ran in at_every_step([], balance=balance, retry_policy=retry_policy, **WAYS[way]):
            assert max(Counter(pool.job.task.calls).values(), default=0) <= 1
            for item, result in enumerate(pool.results()):
                is_missing = any(start <= item < stop for start, stop in ran.missing)
                assert result == 2 * item or is_missing
            assert bool(ran.unrecovered_deaths) == bool(ran.missing)

    def test_without_retries_every_lost_range_can_be_collected(self, balance, way):
        options = {"retry_policy": RetryPolicy(retries=0), "collect_errors": True, **WAYS[way]}
        for pool, ran in at_every_step([], balance=balance, **options):
            assert (ran.unrecovered_deaths, ran.missing) == ([], [])
            failures = [
                failure
                for result in pool.delivered.values()
                if isinstance(result, PartialResult)
                for failure in result.failures
            ]
            assert all(isinstance(failure.error, WorkerDiedError) for failure in failures)
            failed = {item for start, stop, _ in failures for item in range(start, stop)}
            for item, result in enumerate(pool.results()):
                assert result == 2 * item or item in failed


some_fates = st.lists(st.none() | st.integers(0, 40), max_size=8)
some_options = st.builds(
    dict,
    st.sampled_from([{"in_place": True}, {}, {"batch_seconds": LONG}]),
    balance=st.sampled_from(BALANCES),
    n_workers=st.integers(1, 3),
    n_items=st.integers(0, 9),
    chunksize=st.integers(1, 9),
)


class TestManyDeaths:
    @given(some_options, some_fates)
    def test_many_deaths_lose_no_result(self, options, fates):
        pool = scripted(**options, fates=fates, retry_policy=RetryPolicy(retries=len(fates) + 1))
        ran = pool.to_the_end()
        assert pool.results() == doubled(0, options["n_items"])
        assert (ran.unrecovered_deaths, ran.missing, ran.failures) == ([], [], [])
        assert len(ran.deaths) <= sum(process.has_ended for process in pool.processes)

    @given(
        some_options,
        some_fates,
        st.sets(st.integers(0, 8), max_size=2),
        st.integers(0, 2),
        st.fixed_dictionaries({"can_split": st.booleans(), "collect_errors": st.booleans()}),
    )
    def test_every_item_without_a_result_is_missing(self, options, fates, deadly, retries, ways):
        retry_policy = RetryPolicy(retries=retries)
        pool = scripted(**options, fates=fates, deadly=deadly, retry_policy=retry_policy, **ways)
        ran = pool.to_the_end()
        assert ran.missing == sorted(ran.missing)
        assert bool(ran.missing) <= bool(ran.unrecovered_deaths)
        failures = [
            failure[:2]
            for parts in pool.delivered.values()
            if isinstance(parts, PartialResult)
            for failure in parts.failures
        ]
        said = {item for part in [*ran.missing, *failures] for item in range(*part)}
        without = {i for i, result in enumerate(pool.results()) if result != 2 * i}
        kill = deadly & set(range(options["n_items"]))
        assert kill <= without <= said
        if all(ways.values()) and retries and not any(fate is not None for fate in fates):
            assert said == kill  # nothing else is blamed


class TestNarrowing:
    @pytest.mark.parametrize("retries", [1, 2, 5])
    @pytest.mark.parametrize("n_items", [1, 2, 3, 8, 13])
    @by_balance
    def test_a_killing_item_is_found_with_one_death_for_each_halving(
        self, n_items, retries, balance
    ):
        for deadly in range(n_items):
            pool = scripted(
                balance=balance,
                n_items=n_items,
                chunksize=n_items,
                deadly={deadly},
                retry_policy=RetryPolicy(retries=retries),
                can_split=True,
                collect_errors=True,
            )
            ran = pool.to_the_end()
            ranges = [death.range for death in ran.deaths]
            assert ranges[: retries + 1] == [(0, n_items)] * (retries + 1)
            for (start, stop), (first, last) in itertools.pairwise(ranges[retries:]):
                assert start <= first <= deadly < last <= stop
                assert last - first <= (stop - start + 1) // 2
            assert ranges[-1] == (deadly, deadly + 1)
            assert [death.attempt for death in ran.deaths] == list(range(1, len(ranges) + 1))
            (failure,) = pool.delivered[deadly].failures
            assert failure[:2] == (deadly, deadly + 1)
            expected = doubled(0, n_items)
            expected[deadly] = -1
            assert pool.results() == expected
            assert ran.unrecovered_deaths == ran.missing == []

    def test_two_killing_items_in_one_range_are_found(self):
        pool = scripted(
            n_items=16,
            chunksize=16,
            deadly={3, 11},
            can_split=True,
            collect_errors=True,
            in_place=True,
        )
        ran = pool.to_the_end()
        assert set(pool.delivered) == {3, 11}
        assert [i for i, result in enumerate(pool.results()) if result != 2 * i] == [3, 11]
        assert ran.unrecovered_deaths == []

    def test_a_range_that_cannot_be_split_is_collected_whole(self):
        pool = scripted(deadly={3}, collect_errors=True, retry_policy=RetryPolicy(retries=1))
        ran = pool.to_the_end()
        assert [death.range for death in ran.deaths] == [(2, 4)] * 2
        ((start, stop, error),) = pool.delivered[2].failures
        assert (start, stop) == (2, 4)
        assert isinstance(error, WorkerDiedError)
        assert (error.exitcode, error.in_hand, error.attempt) == (SIGKILL, (2, 4), 2)
        assert "items 2:4" in str(error)
        assert [i for i, result in enumerate(pool.results()) if result < 0] == [2, 3]


@by_balance
class TestGivenUp:
    def test_a_range_is_given_up_at_once_without_retries(self, balance):
        pool = scripted(
            balance=balance, deadly={3}, n_workers=2, retry_policy=RetryPolicy(retries=0)
        )
        ran = pool.to_the_end()
        (death,) = ran.deaths
        assert ran.unrecovered_deaths == [death]
        assert (death.range, death.attempt, death.exitcode) == ((2, 4), 1, SIGKILL)
        assert pool.job.task.calls.count((2, 4)) == 1

    @pytest.mark.parametrize("retries", [1, 2])
    def test_a_range_is_given_up_after_its_attempts(self, balance, retries):
        pool = scripted(
            balance=balance, deadly={3}, n_workers=2, retry_policy=RetryPolicy(retries=retries)
        )
        ran = pool.to_the_end()
        assert [death.attempt for death in ran.deaths] == list(range(1, retries + 2))
        assert ran.unrecovered_deaths == ran.deaths[-1:]
        assert pool.job.task.calls.count((2, 4)) == retries + 1

    def test_the_other_worker_continues_after_a_range_is_given_up(self, balance):
        pool = scripted(
            balance=balance,
            n_items=20,
            deadly={1},
            n_workers=2,
            retry_policy=RetryPolicy(retries=0),
            in_place=True,
        )
        ran = pool.to_the_end()
        assert not ran.is_halted
        # By static balance, ranges that no worker has begun were those of the dead worker.
        expected = [(0, 2)] if balance == Dynamic() else [(i, i + 2) for i in range(0, 10, 2)]
        assert ran.missing == expected
        gone = {item for part in expected for item in range(*part)}
        assert [i for i, r in enumerate(pool.results()) if r < 0] == sorted(gone)

    def test_only_pieces_of_a_narrowed_range_are_missing(self, balance):
        pool = scripted(
            balance=balance, n_items=8, chunksize=8, deadly={4}, can_split=True, in_place=True
        )
        ran = pool.to_the_end()
        results = pool.results()
        missing = [item for part in ran.missing for item in range(*part)]
        assert missing == [i for i, result in enumerate(results) if result < 0]
        assert missing[0] == 4
        assert ran.unrecovered_deaths[-1].range == (4, 5)


class TestIdleDeaths:
    """Workers that die before they have begun with a range, or between two."""

    @pytest.mark.parametrize(("retries", "n_deaths"), [(0, 2), (1, 2), (2, 3), (5, 6)])
    @by_balance
    def test_a_worker_that_dies_repeatedly_between_ranges_is_given_up(
        self, balance, retries, n_deaths
    ):
        pool = scripted(balance=balance, fates=[0] * 20, retry_policy=RetryPolicy(retries=retries))
        ran = pool.to_the_end()
        assert len(ran.deaths) == n_deaths
        assert ran.unrecovered_deaths == ran.deaths[-1:]
        assert [death.range for death in ran.deaths] == [None] * n_deaths
        assert ran.missing == list(map(pool.job.grid.range_of, range(4)))
        assert pool.job.task.calls == []

    @by_balance
    def test_a_few_deaths_between_ranges_cost_nothing(self, balance):
        pool = scripted(balance=balance, fates=[0, 0])
        ran = pool.to_the_end()
        assert len(ran.deaths) == 2
        assert ran.unrecovered_deaths == []
        assert pool.results() == doubled(0, 8)

    def test_deaths_are_counted_from_zero_after_a_finished_range(self):
        n_steps = self.steps_to_do_something()
        pool = scripted(balance=Static(), in_place=True, fates=[0, 0, n_steps, 0, 0])
        ran = pool.to_the_end()
        assert [death.range for death in ran.deaths] == [None] * 5
        assert pool.job.task.calls == list(map(pool.job.grid.range_of, range(4)))
        assert (ran.unrecovered_deaths, ran.missing) == ([], [])

    def steps_to_do_something(self):
        """Return how many steps finish one range and leave none in hand."""
        runs = at_every_step([], balance=Static(), in_place=True)
        for n_steps, (pool, ran) in enumerate(runs):
            (dead,) = (one for one in ran.worker_stats if one.name == pool.processes[0].name)
            if ran.deaths[0].range is None and dead.n_items == 2:
                return n_steps
        return pytest.fail("there is no such moment")

    @by_balance
    def test_ranges_done_by_another_worker_are_not_missing(self, balance):
        # Processes 0, 2 and 3 are worker 0, one after the other.
        pool = scripted(balance=balance, fates=[0, None, 0, 0], n_workers=2)
        ran = pool.to_the_end()
        assert [death.worker for death in ran.deaths] == [0, 0, 0]
        expected = [] if balance == Dynamic() else [(0, 2), (2, 4)]
        assert ran.missing == expected
        assert [i for i, r in enumerate(pool.results()) if r < 0] == list(range(2 * len(expected)))

    def test_a_worker_may_die_after_its_report(self):
        pool = scripted()
        with pool:
            (process,) = pool.processes
            pool.live(process)
            process.end()
            pool.run.step(0)
            assert not pool.run.is_running()
            ran = pool.run.make_result()
        assert ran.deaths == []
        assert [stats.n_items for stats in ran.worker_stats] == [8]


def order_of(process):
    """Return the attempts in the order of a process."""
    data, _ = process.inside.receive()
    return worker.Order.unpack(data).attempts


class TestTimeout:
    """The test sets the state of workers itself."""

    def overdue(self, **options):
        """Return a pool whose worker has its first range in hand for too long."""
        retry_policy = RetryPolicy(timeout=LONG, **options.pop("retry_policy", {}))
        pool = scripted(retry_policy=retry_policy, **options).started()
        pool.ledger.hold(0, 0)
        self.since(pool, LONG + 1)
        return pool

    def since(self, pool, seconds):
        pool.ledger.set_start_time(0, time.monotonic_ns() - round(seconds * 1e9))

    def test_a_worker_in_time_is_not_killed(self):
        pool = self.overdue()
        with pool_closed(pool):
            for seconds in (0, LONG / 2):
                self.since(pool, seconds)
                pool.run.step(0)
            assert pool.processes[0].n_kills == 0

    def test_an_overdue_worker_is_killed_once(self):
        pool = self.overdue()
        with pool_closed(pool):
            for _ in range(3):
                pool.run.step(0)
            assert pool.processes[0].n_kills == 1

    def test_no_worker_is_killed_for_a_finished_range(self):
        pool = self.overdue()
        with pool_closed(pool):
            pool.ledger.marks[0] = DONE
            pool.run.step(0)
            pool.ledger.finish(0, 2)
            pool.run.step(0)
            assert pool.processes[0].n_kills == 0

    def test_no_worker_is_killed_before_it_has_begun(self):
        pool = scripted(retry_policy=RetryPolicy(timeout=1e-9))
        with pool:
            time.sleep(0.01)
            pool.run.step(0)
            assert pool.processes[0].n_kills == 0

    def test_the_time_of_a_range_does_not_count_for_the_next(self):
        pool = self.overdue()
        with pool_closed(pool):
            pool.ledger.marks[0] = DONE
            pool.ledger.finish(0, 2)
            pool.ledger.hold(0, 1)  # it is about to look at the clock
            pool.run.step(0)
            assert pool.processes[0].n_kills == 0

    def test_a_late_range_ends_the_run(self):
        pool = self.overdue()
        with pool_closed(pool):
            pool.run.step(0)
            pool.processes[0].end()
            pool.run.step(0)
            assert not pool.run.is_running()
            ran = pool.run.make_result()
        (failure,) = ran.failures
        assert (failure.range, failure.attempt, failure.worker) == ((0, 2), 1, "process 0")
        assert isinstance(failure.error, TimeoutError)
        assert "took longer than timeout=60 seconds" in str(failure.error)
        assert failure.error.__notes__ == ["process 0 was killed"]
        assert ran.is_halted
        assert ran.unrecovered_deaths == []
        assert [death.range for death in ran.deaths] == [(0, 2)]

    def test_a_late_range_is_collected(self):
        pool = self.overdue(collect_errors=True)
        with pool_closed(pool):
            pool.run.step(0)
            pool.processes[0].end()
            pool.run.step(0)
            ((start, stop, error),) = pool.delivered[0].failures
            assert (start, stop) == (0, 2)
            assert isinstance(error, TimeoutError)
            pool.live(pool.processes[1])
            pool.run.step(0)
            assert not pool.run.is_running()
            assert pool.run.make_result().failures == []
        assert pool.job.task.calls == [(2, 4), (4, 6), (6, 8)]

    def test_a_range_begun_before_the_kill_is_not_to_blame(self):
        pool = self.overdue(balance=Static())
        with pool_closed(pool):
            pool.run.step(0)
            pool.ledger.marks[0] = DONE
            pool.ledger.finish(0, 2)
            pool.ledger.hold(0, 1)
            pool.processes[0].end()
            pool.run.step(0)
            assert pool.run.is_running()
            assert order_of(pool.processes[1]) == [Attempt(2, 4, 1)]
            assert not pool.ledger.is_halted

    def test_a_kill_between_two_ranges_blames_none(self):
        pool = self.overdue(balance=Static())
        with pool_closed(pool):
            pool.run.step(0)
            pool.ledger.marks[0] = DONE
            pool.ledger.finish(0, 2)
            pool.processes[0].end()
            pool.run.step(0)
            assert order_of(pool.processes[1]) == []
            assert not pool.ledger.is_halted

    def test_a_late_range_is_run_again_if_retry_on_says_so(self):
        pool = self.overdue(retry_policy={"retries": 1, "retry_on": (TimeoutError,)})
        with pool_closed(pool):
            pool.run.step(0)
            pool.processes[0].end()
            pool.run.step(0)
            assert order_of(pool.processes[1]) == [Attempt(0, 2, 2)]
            pool.ledger.hold_attempt(0, 0)
            self.since(pool, LONG + 1)
            pool.run.step(0)
            assert pool.processes[1].n_kills == 1
            pool.processes[1].end()
            pool.run.step(0)
            assert not pool.run.is_running()
            (failure,) = pool.run.make_result().failures
        assert (failure.range, failure.attempt) == ((0, 2), 2)

    def test_a_late_range_is_not_run_again_for_other_exceptions(self):
        pool = self.overdue(retry_policy={"retries": 1, "retry_on": (ValueError,)})
        with pool_closed(pool):
            pool.run.step(0)
            pool.processes[0].end()
            pool.run.step(0)
            assert not pool.run.is_running()
            assert [failure.attempt for failure in pool.run.make_result().failures] == [1]

    def test_a_timeout_holds_for_a_worker_that_was_done_before_it_was_killed(self):
        # Worker 0 is killed too late to be hit; what worker 1 has lost is then given to it.
        pool = self.overdue(n_workers=2, balance=Dynamic())
        with pool_closed(pool):
            pool.run.step(0)
            lost = pool.ledger.claim(1)
            pool.ledger.clear_row(1)  # its claim was not written down
            pool.processes[1].end()
            pool.live(pool.processes[0])
            pool.run.step(0)
            pool.live(pool.processes[2])
            pool.run.step(0)
            assert pool.run.is_running()
            assert order_of(pool.processes[3]) == [Attempt(*pool.job.grid.range_of(lost))]
            pool.ledger.hold_attempt(0, 0)
            self.since(pool, LONG + 1)
            pool.run.step(0)
            assert pool.processes[3].n_kills == 1

    def test_a_run_waits_no_longer_than_to_the_next_timeout(self):
        pool = scripted(retry_policy=RetryPolicy(timeout=0.1))
        with pool:
            pool.ledger.hold(0, 0)
            pool.ledger.set_start_time(0, time.monotonic_ns())
            pool.run.step(None)  # nothing happens until then
            pool.run.step(0)
            assert pool.processes[0].n_kills == 1


class pool_closed:  # noqa: N801  # read as a function
    def __init__(self, pool):
        self.pool = pool

    def __enter__(self):
        return self.pool

    def __exit__(self, *_):
        self.pool.close()


class TestAbort:
    def test_workers_that_do_not_stop_are_killed(self, monkeypatch):
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.01)
        pool = scripted(n_workers=2)
        with pool:
            pool.run.close()
            assert pool.ledger.is_halted
            assert [process.n_kills for process in pool.processes] == [1, 1]
            assert [process.pidfd for process in pool.processes] == [-1, -1]
            assert pool.run._supervisor.at_work == {}

    def test_workers_that_stop_are_not_killed(self, monkeypatch):
        monkeypatch.setattr(module, "GRACE_SECONDS", LONG)
        pool = scripted(n_workers=2)
        with pool:
            pool.ledger.halt()
            for process in pool.processes:
                pool.live(process)
            pool.run.close()
            assert [process.n_kills for process in pool.processes] == [0, 0]
            assert pool.job.task.calls == []

    def test_results_that_came_are_not_unpickled_after_an_abort(self, monkeypatch):
        monkeypatch.setattr(module, "GRACE_SECONDS", LONG)
        pool = scripted(n_workers=2)
        with pool:
            for process in pool.processes:
                pool.live(process)
            pool.run.close()
            assert pool.job.task.calls
            assert pool.delivered == {}

    def test_dead_workers_are_not_replaced_after_an_abort(self, monkeypatch):
        monkeypatch.setattr(module, "GRACE_SECONDS", LONG)
        pool = scripted(n_workers=2)
        with pool:
            for process in pool.processes:
                process.end()
            pool.run.close()
            assert len(pool.processes) == 2


# From here on, processes are real


def run(*args, **options):
    ran, delivered = helpers.run(*args, **options)
    return ran, dict(delivered)


def seen(folder, *words):
    """Count earlier calls with these words."""
    path = Path(folder, "-".join(map(str, words)))
    with path.open("ab") as file:
        file.write(b".")
        return file.tell() - 1


def dies_once(start, stop, at, how, folder):
    """Die in the range that begins at `at`, the first time."""
    n_before = seen(folder, start)
    if start == at and n_before == 0:
        die(how)
    return start, stop


def die(how):
    if how < 0:
        os.kill(os.getpid(), -how)
    os._exit(how)


def dies_always(start, stop, deadly):
    if start <= deadly < stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return start, stop


def hangs(start, stop, at, n_times, folder):
    """Take for ever in the range that begins at `at`, `n_times` times."""
    if start == at and seen(folder, start) < n_times:
        time.sleep(LONG)
    return start, stop


def in_pieces(n_items, chunksize=2):
    return {
        start: (start, min(start + chunksize, n_items)) for start in range(0, n_items, chunksize)
    }


@pytest.fixture
def no_core_files():
    import resource

    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.mark.one_case
@by_balance
class TestRealDeaths:
    @pytest.mark.usefixtures("no_core_files")
    @pytest.mark.parametrize("how", [0, 7, -signal.SIGKILL, -signal.SIGSEGV])
    def test_a_worker_that_dies_once_costs_nothing(self, pool, balance, how, tmp_path):
        ran, delivered = run(pool, dies_once, 6, how, str(tmp_path), balance=balance)
        (death,) = ran.deaths
        assert (death.exitcode, death.range, death.attempt) == (how, (6, 8), 1)
        assert (ran.unrecovered_deaths, ran.missing, ran.failures) == ([], [], [])
        assert delivered == in_pieces(20)
        assert {stats.worker for stats in ran.worker_stats} == {0, 1}
        assert death.name in {stats.name for stats in ran.worker_stats}
        # Only ranges that it had not sent yet are run again.
        counts = {int(path.name): path.stat().st_size for path in tmp_path.iterdir()}
        assert set(counts) == set(range(0, 20, 2))
        assert counts[6] == 2

    @pytest.mark.thorough
    def test_all_workers_may_die_at_once(self, pool, balance, tmp_path):
        ran, delivered = run(pool, dies_once_each, str(tmp_path), balance=balance, n_items=8)
        assert len(ran.deaths) == 4
        assert sorted(death.range for death in ran.deaths) == sorted(in_pieces(8).values())
        assert ran.unrecovered_deaths == []
        assert delivered == in_pieces(8)

    def test_results_on_their_way_survive_a_death(self, pool, balance, tmp_path):
        ran, delivered = run(
            pool, dies_once, 398, 7, str(tmp_path), balance=balance, n_items=400, n_workers=1
        )
        assert len(ran.deaths) == 1
        assert delivered == in_pieces(400)

    def test_there_may_be_more_chunks_than_marks_in_the_ledger(self, pool, balance, tmp_path):
        n_chunks = OWN_MARKS + 500
        segment, results = Segment.create(), Segment.create()
        segment.reserve(n_chunks)
        results.reserve(8 * n_chunks)
        marks = SharedView(segment, 0, (n_chunks,), (1,), np.dtype(np.uint8))
        place = SharedView(results, 0, (n_chunks,), (8,), np.dtype(np.int64))
        task = InPlace(place, OWN_MARKS + 250, str(tmp_path))
        job = Job(task, balance, ChunkGrid(n_chunks, 1), 2, marks=marks)
        ran = pool.run(job, pickle_task(job, Staging()), lambda *_: pytest.fail("in place"), None)
        (death,) = ran.deaths
        assert death.range == (OWN_MARKS + 250, OWN_MARKS + 251)
        assert (ran.unrecovered_deaths, ran.missing) == ([], [])
        assert np.array_equal(place.open("read"), 2 * np.arange(n_chunks))
        assert np.isin(marks.open("read"), [DONE]).all()

    def test_a_range_is_narrowed_down_to_the_item_that_kills(self, pool, balance):
        retry_policy = RetryPolicy(retries=1)
        ran, delivered = run(
            pool,
            dies_always,
            5,
            balance=balance,
            chunksize=8,
            retry_policy=retry_policy,
            can_split=True,
            collect_errors=True,
        )
        assert [death.range for death in ran.deaths] == [(0, 8)] * 2 + [(4, 6), (5, 6)]
        assert [death.attempt for death in ran.deaths] == [1, 2, 3, 4]
        (failure,) = delivered.pop(5).failures
        assert failure[:2] == (5, 6)
        assert isinstance(failure[2], WorkerDiedError)
        assert delivered.pop(8) == (8, 16)
        assert delivered.pop(16) == (16, 20)
        assert sorted(delivered.values()) == [(0, 4), (4, 5), (6, 7), (7, 8)]

    def test_a_range_that_always_kills_is_given_up(self, pool, balance):
        retry_policy = RetryPolicy(retries=0)
        ran, delivered = run(pool, dies_always, 19, balance=balance, retry_policy=retry_policy)
        assert [death.range for death in ran.unrecovered_deaths] == [(18, 20)]
        assert (18, 20) in ran.missing
        # Each range has its result or is missing.
        assert sorted([*delivered.values(), *ran.missing]) == sorted(in_pieces(20).values())

    @pytest.mark.thorough
    def test_the_pool_is_whole_after_a_death(self, pool, balance):
        run(pool, dies_always, 0, balance=balance)
        ran, delivered = run(pool, dies_always, -1, balance=balance)
        assert ran.deaths == []
        assert len(ran.worker_stats) == 2
        assert delivered == in_pieces(20)

    @pytest.mark.thorough
    def test_a_death_is_seen_though_a_grandchild_holds_the_socket(self, pool, balance, tmp_path):
        ran, delivered = run(pool, fork_and_die, str(tmp_path), balance=balance)
        assert [(death.exitcode, death.range) for death in ran.deaths] == [(7, (0, 2))]
        assert delivered == in_pieces(20)


def dies_once_each(start, stop, folder):
    if seen(folder, start) == 0:
        os._exit(7)
    return start, stop


def fork_and_die(start, stop, folder):
    if start == 0 and seen(folder, start) == 0:
        if os.fork() == 0:
            # Outlives its parent for a moment, holding all that it has inherited.
            time.sleep(0.3)
            os._exit(0)
        os._exit(7)
    return start, stop


class InPlace:
    """Doubles items into shared memory, and dies once in one range."""

    def __init__(self, place, at, folder):
        self.place = place
        self.at = at
        self.folder = folder

    def start(self, worker):
        array = self.place.open("write")

        def run(start, stop):
            if start == self.at and seen(self.folder, start) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            array[start:stop] = 2 * np.arange(start, stop)
            return IN_PLACE

        return run


@pytest.mark.one_case
@by_balance
class TestRealTimeouts:
    def test_a_worker_whose_range_is_late_is_killed(self, pool, balance, tmp_path):
        retry_policy = RetryPolicy(timeout=LATE)
        ran, _ = run(pool, hangs, 4, 9, str(tmp_path), balance=balance, retry_policy=retry_policy)
        (failure,) = ran.failures
        (death,) = ran.deaths
        assert failure.range == death.range == (4, 6)
        assert isinstance(failure.error, TimeoutError)
        assert death.exitcode == SIGKILL
        assert ran.is_halted
        assert ran.unrecovered_deaths == []
        assert (4, 6) in ran.missing

    def test_a_late_range_of_a_real_process_is_collected(self, pool, balance, tmp_path):
        retry_policy = RetryPolicy(timeout=LATE)
        ran, delivered = run(
            pool,
            hangs,
            4,
            9,
            str(tmp_path),
            balance=balance,
            retry_policy=retry_policy,
            collect_errors=True,
        )
        (failure,) = delivered.pop(4).failures
        assert failure[:2] == (4, 6)
        assert isinstance(failure[2], TimeoutError)
        expected = in_pieces(20)
        del expected[4]
        assert delivered == expected
        assert not ran.is_halted

    def test_a_late_range_of_a_real_process_is_run_again(self, pool, balance, tmp_path):
        retry_policy = RetryPolicy(timeout=LATE, retries=2, retry_on=(TimeoutError,))
        ran, delivered = run(
            pool, hangs, 4, 2, str(tmp_path), balance=balance, retry_policy=retry_policy
        )
        assert [death.range for death in ran.deaths] == [(4, 6)] * 2
        assert ran.failures == []
        assert delivered == in_pieces(20)

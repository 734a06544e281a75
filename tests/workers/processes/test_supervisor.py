"""The rules for worker processes: deadlines, deaths, replacements, and their end.

The workers are scripted: a test sends their messages and lets them die.
"""

import gc
import itertools
import weakref

import pytest

from taskcarrier.memory.segments import Segment
from taskcarrier.scheduling.balance import Dynamic
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.scheduling.retries import Attempt, RetryPolicy
from taskcarrier.workers.pickling import Payload
from taskcarrier.workers.processes.grid_run import GridRun
from taskcarrier.workers.processes.stream_run import StreamRun
from taskcarrier.workers.processes.supervisor import Supervisor, Watch, unpickle_result
from taskcarrier.workers.processes.worker import (
    FREE,
    KEPT,
    STATS,
    Order,
    _Outbox,
    _pickle_stats,
)
from taskcarrier.workers.records import RangeFailure, WorkerStats
from taskcarrier.workers.task import Job
from tests.clocks import LONG
from tests.interrupted import interrupted_at
from tests.workers.helpers import ready
from tests.workers.processes.mortals import SIGKILL, Fate, Process


class Source:
    """A source of ranges that writes down what the supervisor tells it.

    Parameters
    ----------
    n_workers : int
        The number of workers, all of which are started.
    """

    def __init__(self, n_workers=1, *, is_streamed=False, payload=None, **options):
        job = Job(None, Dynamic(), ChunkGrid(8, 2), n_workers, **options)
        self.ledger = Ledger.local(n_workers)
        self.supervisor = Supervisor(
            self, job, self.ledger, payload or Payload(b"job", []), is_streamed=is_streamed
        )
        self.in_hand = {}
        self.n_done = {}
        self.results, self.halts, self.given_up, self.replaced = [], [], [], []
        self.processes = [Process(n, f"process {n}", Fate()) for n in range(n_workers)]

    def __enter__(self):
        for number, process in enumerate(self.processes):
            self.supervisor.start(number, process)
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.pidfd >= 0:
                process.close()

    def range_in_hand(self, number):
        return self.in_hand.get(number)

    def count_done(self, number, name):
        return WorkerStats(number, name, self.n_done.get(number, 0))

    def take_result(self, number, start, packed, large):
        self.results.append((number, start, unpickle_result(packed, large)))

    def check_halt(self, death):
        self.halts.append(death.range)

    def give_up(self, death, error):
        self.given_up.append((death.range, error))

    def replace_worker(self, number, in_hand, nexts):
        self.replaced.append((number, in_hand, nexts))

    def die(self, in_hand=None):
        """Let the last process die with a range in hand, and have that seen."""
        process = self.processes[-1]
        self.in_hand[process.number] = in_hand
        process.end()
        self.supervisor.step(0)

    def start_another(self):
        """Start another process as worker 0."""
        self.processes.append(Process(0, f"process {len(self.processes)}", Fate()))
        self.supervisor.start(0, self.processes[-1])


def report(process, *, memory=FREE, failure=None):
    stats = WorkerStats(process.number, n_ranges=3, failure=failure)
    process.inside.send(STATS + memory + _pickle_stats(stats))


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(Watch, "wait", lambda *_: pytest.fail("it waits"))


class TestMessages:
    def test_a_worker_gets_the_job_and_its_attempts(self):
        source = Source()
        attempts = [Attempt(2, 4, 2), Attempt(0, 1, 3)]
        source.supervisor.start(0, source.processes[0], attempts)
        data, _ = source.processes[0].inside.receive()
        assert Order.unpack(data) == Order(b"job", attempts)
        assert not source.processes[0].is_free
        source.__exit__()

    def test_results_and_stats_of_a_worker_arrive(self):
        with Source() as source:
            (process,) = source.processes
            outbox = _Outbox(process.inside, None, 0.02)
            outbox.deliver(0, "one")
            outbox.deliver(2, "two")
            outbox.flush()
            report(process)
            source.supervisor.step(0)
            assert source.results == [(0, 0, ("one", None)), (0, 2, ("two", None))]
            assert process.is_free
            assert source.supervisor.at_work == {}
            result = source.supervisor.make_result()
        assert [(stats.name, stats.n_ranges) for stats in result.worker_stats] == [("process 0", 3)]
        assert result.deaths == []
        assert not source.supervisor.has_ended

    def test_a_failure_ends_the_run(self):
        with Source() as source:
            report(source.processes[0], failure=RangeFailure((0, 2), ValueError("no")))
            source.supervisor.step(0)
            assert source.supervisor.has_ended
            assert source.ledger.is_halted
            assert str(source.supervisor.failed.failure.error) == "no"

    @pytest.mark.parametrize(("memory", "is_retired"), [(FREE, False), (KEPT, True)])
    def test_memory_that_a_function_holds_on_to_is_retired(self, memory, is_retired, monkeypatch):
        retired = []

        def retire(self):
            retired.append(self)

        monkeypatch.setattr(Segment, "retire", retire)
        with Source(payload=Payload(b"job", [segment := Segment.create()])) as source:
            report(source.processes[0], memory=memory)
            source.supervisor.step(0)
            source.supervisor.end(0)
        assert retired == [segment] * is_retired

    def test_a_result_that_cannot_be_unpickled_is_an_error_with_a_note(self):
        result, error = unpickle_result(b"no pickle", [])
        assert result is None
        assert any("could not unpickle this result" in note for note in error.__notes__)


class TestDeaths:
    def test_the_range_in_hand_is_run_again(self):
        with Source() as source:
            source.die(Attempt(0, 2))
            (death,) = source.supervisor.deaths
        assert (death.name, death.exitcode, death.range) == ("process 0", SIGKILL, (0, 2))
        assert source.halts == [(0, 2)]
        assert source.replaced == [(0, Attempt(0, 2), [Attempt(0, 2, 2)])]
        assert source.given_up == []

    @pytest.mark.parametrize(
        ("can_split", "nexts"), [(True, [Attempt(0, 1, 4), Attempt(1, 2, 4)]), (False, [])]
    )
    def test_a_range_that_kills_is_split_or_given_up(self, can_split, nexts):
        with Source(can_split=can_split) as source:
            source.die(Attempt(0, 2, 3))
        assert source.replaced == [(0, Attempt(0, 2, 3), nexts)]
        assert source.given_up == ([] if nexts else [((0, 2), None)])

    def test_no_range_is_run_again_once_a_death_is_not_made_good(self):
        with Source() as source:
            source.supervisor.unrecovered_deaths.append("a death")
            source.die(Attempt(0, 2))
        assert source.given_up == [((0, 2), None)]

    def test_deaths_with_nothing_in_hand_are_counted_by_number(self):
        with Source(retry_policy=RetryPolicy(retries=2)) as source:
            source.die()
            for n_done in (0, 1, 0, 0):  # the third has done something
                source.start_another()
                source.n_done[0] = n_done
                source.die()
            assert source.given_up == []
            source.start_another()
            source.die()
        assert source.given_up == [(None, None)]
        assert source.replaced == [(0, None, [])] * 6

    def test_what_dead_workers_did_is_counted(self):
        with Source() as source:
            source.n_done[0] = 5
            source.die(Attempt(0, 2))
            source.start_another()
            report(source.processes[1])
            source.supervisor.step(0)
            result = source.supervisor.make_result()
        assert [stats.n_ranges for stats in result.worker_stats] == [5, 3]


class TestDeadlines:
    @staticmethod
    def overdue(**policy):
        """Return a source whose worker was killed for its range."""
        source = Source(retry_policy=RetryPolicy(timeout=1, **policy)).__enter__()
        source.in_hand[0] = Attempt(0, 2)
        source.ledger.set_start_time(0, 1)
        source.supervisor.step(0)
        assert source.processes[0].n_kills == 1
        return source

    def test_a_late_range_is_given_up(self):
        source = self.overdue()
        source.die(Attempt(0, 2))
        ((part, error),) = source.given_up
        assert part == (0, 2)
        assert str(error) == "a range took longer than timeout=1 seconds"
        assert error.__notes__ == ["process 0 was killed"]
        assert source.replaced == [(0, Attempt(0, 2), [])]
        assert [death.was_late for death in source.supervisor.deaths] == [True]

    def test_a_late_range_is_run_again_if_the_policy_says_so(self):
        source = self.overdue(retries=1, retry_on=(TimeoutError,))
        source.die(Attempt(0, 2))
        assert source.replaced == [(0, Attempt(0, 2), [Attempt(0, 2, 2)])]
        assert source.given_up == []

    def test_a_range_begun_after_the_late_one_keeps_its_attempts(self):
        source = self.overdue(retries=0)
        source.die(Attempt(2, 4))
        assert source.replaced == [(0, Attempt(2, 4), [Attempt(2, 4)])]
        assert [death.was_late for death in source.supervisor.deaths] == [False]


class TestEnd:
    def test_workers_that_do_not_report_are_killed(self):
        with Source(2) as source:
            report(source.processes[0])
            source.supervisor.end(0)
            assert [process.n_kills for process in source.processes] == [0, 1]
            assert [process.is_free for process in source.processes] == [True, False]
            assert [stats.n_ranges for stats in source.supervisor.make_result().worker_stats] == [
                3,
                0,
            ]

    def test_workers_of_a_stream_are_free_when_they_know_its_end(self):
        with Source(2, is_streamed=True) as source:
            first, second = source.processes
            report(first)
            source.supervisor.step(0)
            assert not first.is_free  # an order would be taken for a batch
            report(second)
            source.supervisor.end(0)
            assert first.is_free
            assert second.is_free
            for process in source.processes:
                assert Order.unpack(process.inside.receive()[0]) == Order(
                    b"job", [], is_streamed=True
                )
                assert process.inside.receive() == (b"", [])

    @pytest.mark.usefixtures("no_waiting")
    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_a_worker_whose_start_was_cut_short_is_not_waited_for(self, is_streamed, monkeypatch):
        source = Source(is_streamed=is_streamed)
        (process,) = source.processes
        with monkeypatch.context() as patch:
            patch.setattr(process.channel, "send", raise_interrupt)
            with pytest.raises(KeyboardInterrupt):
                source.supervisor.start(0, process)
        source.supervisor.end(LONG)
        assert process.n_kills == 1
        assert not process.is_free
        assert source.supervisor.at_work == {}

    @pytest.mark.usefixtures("no_waiting")
    def test_a_worker_to_which_no_order_was_sent_is_left_alone(self, monkeypatch):
        source = Source()
        (process,) = source.processes
        process.is_free = True
        monkeypatch.setattr(Watch, "add", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            source.supervisor.start(0, process)
        source.supervisor.end(LONG)
        assert process.n_kills == 0
        process.close()

    def test_nothing_is_sent_to_a_worker_whose_death_was_being_handled(self, monkeypatch):
        with Source(is_streamed=True) as source:
            (process,) = source.processes
            process.end()
            reap = process.reap

            def interrupted_reap():
                reap()
                raise KeyboardInterrupt

            monkeypatch.setattr(process, "reap", interrupted_reap)
            with pytest.raises(KeyboardInterrupt):
                source.supervisor.step(0)
            source.supervisor.end(LONG)
            assert source.supervisor.at_work == {}


@pytest.mark.parametrize("is_streamed", [False, True])
class TestInterrupts:
    """Only workers that wait for an order are free, wherever an exception comes from outside."""

    @pytest.fixture
    def make_source(self, is_streamed, monkeypatch):
        monkeypatch.setattr(Process, "reap", lambda _: SIGKILL)  # its descriptors are closed here

        def make():
            source = Source(3, is_streamed=is_streamed)
            for process in source.processes:
                process.is_free = True
            return source

        return make

    @staticmethod
    def start_and_step(source):
        """Start three workers: one reports, one dies, one goes on."""
        for number, process in enumerate(source.processes):
            source.supervisor.start(number, process)
        report(source.processes[0])
        source.processes[1].end()
        source.supervisor.step(0)

    @staticmethod
    def check_free(source, is_streamed):
        """Check what the workers that count as free have got; return the others."""
        for process in source.processes:
            if process.is_free and not process.has_ended:
                contents, _ = ready(process.inside)
                assert len(contents) in ({0, 2} if is_streamed else {0, 1})
                assert contents[1:] in ([], [b""])
                assert process is source.processes[0] or not contents
        return [process for process in source.processes if not process.is_free]

    def test_a_run_that_was_interrupted_can_be_ended(self, make_source, is_streamed):
        for step in itertools.count():
            source = make_source()
            is_interrupted = interrupted_at(step, lambda: self.start_and_step(source))  # noqa: B023  # called at once
            source.supervisor.end(0)
            for process in self.check_free(source, is_streamed):
                assert process.n_kills or process.has_ended
            source.__exit__()
            if not is_interrupted:
                break
        assert step > 50

    def test_the_end_may_be_interrupted(self, make_source, is_streamed):
        for step in itertools.count():
            source = make_source()
            self.start_and_step(source)
            is_interrupted = interrupted_at(step, lambda: source.supervisor.end(0))  # noqa: B023  # called at once
            self.check_free(source, is_streamed)
            source.__exit__()
            if not is_interrupted:
                break
        assert step > 10


def raise_interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [GridRun, StreamRun])
def test_a_run_is_freed_as_soon_as_it_is_dropped(kind):
    job = Job(None, Dynamic(), ChunkGrid(8, 2), 1)
    arguments = [job, Ledger.local(1), Payload(b"", []), None]
    if kind is GridRun:
        arguments.insert(2, None)
    gc.disable()
    try:
        run = kind(*arguments)
        dropped = weakref.ref(run)
        del run
        assert dropped() is None
    finally:
        gc.enable()

"""One run, from a task to an outcome, and what is raised for it."""

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import warnings
import weakref
from pathlib import Path
from time import monotonic_ns

import numpy as np
import pytest

from taskcarrier import StaticParallelMapper, map_array, map_chunks, progress, reduce_array
from taskcarrier.errors import WorkerDiedError
from taskcarrier.memory.segments import Recycler, Segment, SharedView
from taskcarrier.report import Report, last_report
from taskcarrier.run import (
    ResumedMarks,
    RunOutcome,
    Settings,
    decide,
    execute,
    raise_first_failure,
    raise_if_missing,
)
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.scheduling.ledger import DONE, OWN_MARKS, PENDING, ledger_nbytes
from taskcarrier.scheduling.retries import DEFAULT_POLICY, RetryPolicy
from taskcarrier.workers.call import Call
from taskcarrier.workers.choose import Choice
from taskcarrier.workers.executors import make_executor
from taskcarrier.workers.processes.grid_run import GridRun
from taskcarrier.workers.records import PartialResult, RangeFailure, WorkerDeath, WorkerStats
from taskcarrier.workers.task import IN_PLACE
from tests.clocks import LATE, stopped_clock
from tests.errors import SpeechlessError
from tests.helpers import Calls, both, describe, in_place
from tests.strategies import keep_pools_warm, start_script

pools = keep_pools_warm(2)

BACKENDS = {"sequential": 1, "threading": 2, "loky": 2}


class Proposes(Calls):
    """A task that may propose something, and leaves facts."""

    def __init__(self, func, args=(), proposal=None):
        super().__init__(Call(func, args))
        self.proposal = proposal

    def start(self, worker):
        if self.proposal is not None:
            worker.propose(self.proposal)
        run = super().start(worker)
        worker.facts = "facts"
        return run


def fail_everywhere(start, stop):
    raise ValueError(f"at {start}")


def die_at_four(start, stop):
    if start <= 4 < stop:
        os._exit(7)
    return start, stop


def die_once_at_four(start, stop, mark):
    if start == 4 and not Path(mark).exists():
        Path(mark).touch()
        os._exit(7)
    return start, stop


def die_once_at_four_in_place(start, stop, mark):
    die_once_at_four(start, stop, mark)
    return IN_PLACE


def warn_at_even(start, stop):
    warnings.warn(f"at {start % 4}", UserWarning, stacklevel=1)
    return start, stop


def run(
    func,
    backend="sequential",
    *args,
    grid=None,
    balance=None,
    n_jobs=None,
    notes=(),
    proposal=None,
    resumed=None,
    collect_errors=False,
    can_split=False,
    **others,
):
    settings = Settings(balance=balance or Dynamic(), **others)
    choice = Choice(backend, n_jobs or BACKENDS[backend], "a test")
    outcome = execute(
        Proposes(func, args, proposal),
        grid or ChunkGrid(20, 2),
        make_executor(choice, backend, settings.new_staging, None),
        settings,
        started_ns=monotonic_ns(),
        notes=notes,
        collect_errors=collect_errors,
        can_split=can_split,
        resumed=resumed,
    )
    return outcome, dict(outcome.delivered)


ALL = {start: (start, start + 2) for start in range(0, 20, 2)}


def outcome_with(failures=(), deaths=(), missing=()):
    return RunOutcome(
        worker_stats=[],
        delivered=[],
        failures=list(failures),
        deaths=list(deaths),
        missing=list(missing),
        first_proposal=None,
        report=None,
    )


def from_options(**options):
    defaults = {"balance": "static", "n_jobs": None, "backend": None}
    retry_policy = {"timeout": None, "retries": 2, "retry_on": ()}
    return Settings.from_options({**defaults, **retry_policy, **options})


class TestSettings:
    def test_options_of_a_call_give_settings(self):
        settings = from_options(balance="dynamic", n_jobs=-2, backend="multiprocessing")
        assert settings == Settings(balance=Dynamic(), n_jobs=-2, backend="loky")

    def test_options_of_a_call_give_a_retry_policy(self):
        settings = from_options(timeout=3, retries=5, retry_on=OSError)
        assert settings == Settings(balance=Static(), retry_policy=RetryPolicy(3.0, 5, (OSError,)))
        assert from_options().retry_policy is DEFAULT_POLICY

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"balance": "guided"}, ValueError),
            ({"n_jobs": 0}, ValueError),
            ({"n_jobs": "2"}, TypeError),
            ({"backend": "mpi"}, ValueError),
            ({"timeout": 0}, ValueError),
            ({"retries": -1}, ValueError),
            ({"retries": 1.5}, TypeError),
            ({"retry_on": KeyboardInterrupt}, TypeError),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, error):
        (name,) = arguments
        with pytest.raises(error, match=f"{name} must"):
            from_options(**arguments)

    def test_the_temporary_folder_comes_from_the_mapper_or_the_environment(
        self, monkeypatch, tmp_path
    ):
        monkeypatch.delenv("JOBLIB_TEMP_FOLDER", raising=False)
        assert Settings(balance=Static()).folder is None
        monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
        assert Settings(balance=Static()).folder == str(tmp_path)
        assert Settings(balance=Static(), temp_folder="other").folder == "other"

    def test_memory_lies_in_the_temporary_folder(self, tmp_path):
        settings = Settings(balance=Static(), temp_folder=str(tmp_path))
        (view,) = settings.new_staging().share([np.arange(10.0)])
        for segment in (settings.segment(100), view.segment):
            assert segment.on_disk
            assert os.fstat(segment.fd).st_dev == tmp_path.stat().st_dev

    def test_memory_comes_from_the_recycler(self):
        recycler = Recycler()
        settings = Settings(balance=Static(), recycler=recycler)
        segment = settings.segment(1000)
        segment.reserve(1000)
        inode = os.fstat(segment.fd).st_ino
        del segment
        (view,) = settings.new_staging().share([np.arange(100.0)])
        assert os.fstat(view.segment.fd).st_ino == inode
        recycler.close()


class TestDecide:
    def test_given_arguments_are_followed(self):
        choice = decide(Settings(balance=Static(), n_jobs=3, backend="threading"), len).choice
        assert (choice.backend, choice.n_jobs, choice.reason) == ("threading", 3, "asked for")

    def test_the_backend_depends_on_the_function(self):
        assert decide(Settings(balance=Static(), n_jobs=3), np.isnan).choice.backend == "threading"
        assert decide(Settings(balance=Static(), n_jobs=3), len).choice.backend == "loky"


@pytest.mark.parametrize("balance", [Static(), Dynamic()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", BACKENDS)
class TestExecute:
    def test_a_good_run_has_no_failures(self, backend, balance):
        outcome, delivered = run(both, backend, balance=balance)
        assert delivered == ALL
        assert (outcome.failures, outcome.deaths, outcome.missing) == ([], [], [])
        assert [stats.facts for stats in outcome.worker_stats] == ["facts"] * BACKENDS[backend]

    def test_the_report_describes_the_run(self, backend, balance):
        outcome, _ = run(in_place, backend, balance=balance)
        report = outcome.report
        assert report is last_report()
        assert (report.backend, report.reason, report.n_jobs) == (
            backend,
            "a test",
            BACKENDS[backend],
        )
        assert report.balance == ("serial" if backend == "sequential" else balance.name)
        assert (report.chunksize, report.ranges, report.items) == (2, 10, 20)
        assert sum(worker.items for worker in report.workers) == 20
        assert sum(worker.ranges for worker in report.workers) == 10
        assert report.seconds > 0
        for worker in report.workers:
            assert worker.busy >= 0
            assert worker.idle == pytest.approx(max(0.0, report.seconds - worker.busy))
        names = {"sequential": "caller", "threading": "thread ", "loky": "process "}
        assert all(worker.name.startswith(names[backend]) for worker in report.workers)

    def test_notes_are_in_the_report(self, backend, balance):
        outcome, _ = run(in_place, backend, balance=balance, notes=["one", "two"])
        assert outcome.report.notes == ("one", "two")
        assert run(in_place, backend, balance=balance)[0].report.notes == ()

    def test_the_outcome_has_the_first_proposal(self, backend, balance):
        outcome, _ = run(both, backend, balance=balance, proposal=b"settled")
        assert outcome.first_proposal == b"settled"
        # The next run of the same pool starts without a proposal.
        assert run(both, backend, balance=balance)[0].first_proposal is None

    def test_there_are_never_more_workers_than_chunks(self, backend, balance):
        outcome, delivered = run(both, backend, balance=balance, grid=ChunkGrid(3, 5))
        assert delivered == {0: (0, 3)}
        assert outcome.report.n_jobs == len(outcome.worker_stats) == 1

    def test_failures_are_sorted_and_name_their_worker(self, backend, balance):
        outcome, delivered = run(fail_everywhere, backend, balance=balance)
        ranges = [failure.range for failure in outcome.failures]
        assert ranges == sorted(ranges)
        assert ranges[0] == (0, 2) or balance == Static()
        assert delivered == {}
        names = {worker.name for worker in outcome.report.workers}
        assert {failure.worker for failure in outcome.failures} <= names
        for failure in outcome.failures:
            assert str(failure.error) == f"at {failure.range[0]}"

    def test_the_report_is_kept_by_the_settings(self, backend, balance):
        kept = []
        outcome, _ = run(both, backend, balance=balance, keep_report=kept.append)
        assert kept == [outcome.report]

    def test_chunks_finished_by_an_earlier_run_are_left_out(self, backend, balance):
        view = marks_of(10)
        marks = view.open("write")
        marks[[0, 4, 5, 9]] = DONE
        outcome, delivered = run(
            both, backend, balance=balance, resumed=ResumedMarks(view, 4, ["found"])
        )
        assert sorted(delivered) == [2, 4, 6, 12, 14, 16]
        assert marks.all()
        assert sum(worker.items for worker in outcome.report.workers) == 12
        assert outcome.report.notes == ("4 of 10 ranges were done by an earlier run", "found")

    def test_warnings_pass_the_filters_of_the_caller(self, backend, balance):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _, delivered = run(warn_at_even, backend, balance=balance)
        assert delivered == ALL
        assert {str(one.message) for one in seen} == {"at 0", "at 2"}
        assert {one.category for one in seen} == {UserWarning}
        assert {Path(one.filename) for one in seen} == {Path(__file__)}
        if backend == "loky":
            assert len(seen) == 2  # each once, though several workers have warned

    def test_a_filter_may_turn_a_warning_into_an_error(self, backend, balance):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if backend == "loky":
                with pytest.raises(UserWarning, match="at"):
                    run(warn_at_even, backend, balance=balance)
            else:
                outcome, _ = run(warn_at_even, backend, balance=balance)
                assert isinstance(outcome.failures[0].error, UserWarning)


def marks_of(n_chunks):
    segment = Segment.create()
    segment.reserve(n_chunks)
    return SharedView(segment, 0, (n_chunks,), (1,), np.dtype(np.uint8))


AGAIN = """
import warnings
from taskcarrier import StaticParallelMapper

def func(n):
    warnings.warn("look", stacklevel=1)
    return n

if __name__ == "__main__":
    for filters in ("default", "always", "once", "default"):
        with warnings.catch_warnings():
            warnings.simplefilter(filters)
            for _ in range(3):
                StaticParallelMapper(n_jobs=2, backend="BACKEND").map(func, range(1))
    print("end")
"""


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_filters_that_show_a_warning_once_hold_over_several_runs(backend, tmp_path):
    with start_script(tmp_path, AGAIN.replace("BACKEND", backend)) as program:
        out, err = program.communicate(timeout=60)
    assert out == "end\n"
    assert err.count("UserWarning: look") == 1 + 3 + 1 + 1


def warn_and_fail(start, stop):
    warnings.warn("look", UserWarning, stacklevel=1)
    raise LookupError(start)


def test_an_error_takes_precedence_over_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome, _ = run(warn_and_fail, "loky")
    assert {type(failure.error) for failure in outcome.failures} == {LookupError}


class TestWatching:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_progress_ends_with_all_items(self, backend, monkeypatch):
        seen = []
        monkeypatch.setattr(progress, "progress_bar", lambda *_: Watch(seen))
        run(both, backend)
        assert seen[-1] == 20
        assert seen == sorted(seen)
        if backend == "sequential":
            assert seen == list(range(2, 22, 2))

    @pytest.mark.thorough
    def test_progress_ends_with_all_items_though_a_worker_died(self, monkeypatch, tmp_path):
        seen = []
        monkeypatch.setattr(progress, "progress_bar", lambda *_: Watch(seen))
        outcome, _ = run(
            die_once_at_four_in_place, "loky", str(tmp_path / "mark"), balance=Static()
        )
        assert len(outcome.report.workers) == 3
        assert seen[-1] == 20

    def test_progress_begins_with_what_was_done_before(self, monkeypatch):
        asked = []
        monkeypatch.setattr(progress, "progress_bar", lambda *args: asked.append(args) or Watch([]))
        view = marks_of(4)
        view.open("write")[[1, 3]] = DONE  # the last range is shorter
        run(both, grid=ChunkGrid(7, 2), resumed=ResumedMarks(view, 2, []))
        assert asked == [(0, 7, 1, 4)]

    def test_report_is_logged(self, caplog, monkeypatch):
        monkeypatch.setattr(progress, "progress_bar", lambda *_: Watch([]))
        with caplog.at_level("INFO", logger="taskcarrier"):
            outcome, _ = run(both, verbosity=2)
        assert [record.getMessage() for record in caplog.records] == [str(outcome.report)]

    def test_an_error_of_the_watcher_is_a_failure_in_the_caller(self, monkeypatch):
        monkeypatch.setattr(progress, "progress_bar", lambda *_: Watch([], KeyboardInterrupt()))
        outcome, _ = run(both)
        assert isinstance(outcome.failures[0].error, KeyboardInterrupt)


class Watch:
    """Stands for the progress bar."""

    def __init__(self, seen, error=None):
        self.seen = seen
        self.error = error

    def __enter__(self):
        return self.tick

    def __exit__(self, *_):
        pass

    def tick(self, ledger):
        self.seen.append(ledger.n_items_done(ledger_workers(ledger)))
        if self.error is not None:
            raise self.error


def ledger_workers(ledger):
    of_none, of_one = ledger_nbytes(0), ledger_nbytes(1)
    return (8 * len(ledger._words) - of_none) // (of_one - of_none)


@pytest.mark.one_case
@pytest.mark.parametrize("balance", [Static(), Dynamic()], ids=lambda rule: rule.name)
class TestDeaths:
    def test_a_range_whose_worker_died_is_run_again(self, balance, tmp_path):
        outcome, delivered = run(die_once_at_four, "loky", str(tmp_path / "mark"), balance=balance)
        assert delivered == ALL
        assert (outcome.failures, outcome.deaths, outcome.missing) == ([], [], [])
        assert [note for note in outcome.report.notes if "exited with code 7" in note]
        assert "while mapping items 4:6" in " ".join(outcome.report.notes)

    @pytest.mark.thorough
    def test_deaths_are_repaired_with_more_chunks_than_marks_in_the_ledger(self, balance, tmp_path):
        n_items = OWN_MARKS + 100
        outcome, delivered = run(
            die_once_at_four,
            "loky",
            str(tmp_path / "mark"),
            balance=balance,
            grid=ChunkGrid(n_items, 1),
        )
        assert outcome.deaths == []
        assert (tmp_path / "mark").exists()
        assert delivered == {item: (item, item + 1) for item in range(n_items)}

    @pytest.mark.thorough
    def test_every_item_in_place_counts_once_despite_deaths(self, balance, tmp_path):
        outcome, _ = run(die_once_at_four_in_place, "loky", str(tmp_path / "mark"), balance=balance)
        assert sum(worker.items for worker in outcome.report.workers) == 20

    def test_a_range_that_kills_is_given_up_after_its_retries(self, balance):
        outcome, delivered = run(
            die_at_four, "loky", balance=balance, retry_policy=RetryPolicy(retries=1)
        )
        (death,) = outcome.deaths
        assert (death.exitcode, death.range, death.attempt) == (7, (4, 6), 2)
        assert (4, 6) in outcome.missing
        # Each range has its result or is missing.
        assert sorted([*delivered.values(), *outcome.missing]) == sorted(ALL.values())
        assert len([note for note in outcome.report.notes if "exited with code 7" in note]) == 2

    def test_a_range_that_kills_is_never_run_again_without_retries(self, balance):
        outcome, _ = run(die_at_four, "loky", balance=balance, retry_policy=RetryPolicy(retries=0))
        (death,) = outcome.deaths
        assert (death.range, death.attempt) == ((4, 6), 1)

    @pytest.mark.thorough
    def test_a_range_that_kills_is_narrowed_down(self, balance):
        outcome, delivered = run(
            die_at_four,
            "loky",
            balance=balance,
            grid=ChunkGrid(20, 8),
            can_split=True,
            retry_policy=RetryPolicy(retries=1),
        )
        (death,) = outcome.deaths
        assert death.range == (4, 5)
        assert outcome.missing[0] == (4, 5)
        there = {item for part in [*delivered.values(), *outcome.missing] for item in range(*part)}
        assert there == set(range(20))

    def test_a_range_that_kills_is_collected(self, balance):
        outcome, delivered = run(
            die_at_four,
            "loky",
            balance=balance,
            collect_errors=True,
            can_split=True,
            retry_policy=RetryPolicy(retries=1),
        )
        assert (outcome.failures, outcome.deaths, outcome.missing) == ([], [], [])
        parts = delivered.pop(4)
        assert isinstance(parts, PartialResult)
        ((start, stop, error),) = parts.failures
        assert (start, stop, error.exitcode) == (4, 5, 7)
        expected = {**ALL, 5: (5, 6)}
        del expected[4]
        assert delivered == expected

    def test_ranges_are_missing_when_the_only_worker_dies(self, balance):
        outcome, _ = run(
            die_at_four,
            "loky",
            balance=balance,
            n_jobs=1,
            grid=ChunkGrid(20, 4),
            retry_policy=RetryPolicy(retries=0),
        )
        assert [death.range for death in outcome.deaths] == [(4, 8)]
        assert outcome.missing[-4:] == [(4, 8), (8, 12), (12, 16), (16, 20)]


def hang_at_four(start, stop):
    if start == 4:
        time.sleep(60)
    return start, stop


class TestTimeout:
    def test_a_range_that_hangs_in_a_process_is_a_failure(self):
        outcome, _ = run(hang_at_four, "loky", retry_policy=RetryPolicy(timeout=LATE))
        (failure,) = outcome.failures
        assert failure.range == (4, 6)
        assert isinstance(failure.error, TimeoutError)
        assert failure.worker.startswith("process ")
        assert outcome.deaths == []
        assert (4, 6) in outcome.missing

    @pytest.mark.parametrize("backend", ["sequential", "threading"])
    def test_a_range_that_cannot_be_stopped_is_a_failure_at_its_end(self, backend, monkeypatch):
        clock = stopped_clock(monkeypatch)
        ended = []

        def slow(start, stop):
            if start == 4:
                clock.sleep(0.3)
            ended.append(start)
            return start, stop

        outcome, delivered = run(slow, backend, retry_policy=RetryPolicy(timeout=0.2))
        (failure,) = outcome.failures
        assert failure.range == (4, 6)
        assert isinstance(failure.error, TimeoutError)
        assert 4 in ended
        assert 4 not in delivered


def interrupt_the_caller(chunk):
    if chunk[0] == 40:
        os.kill(multiprocessing.parent_process().pid, signal.SIGINT)
    time.sleep(0.01)
    return chunk


class TestInterrupt:
    @pytest.mark.parametrize("balance", ["static", "dynamic"])
    def test_an_interrupt_ends_a_run_in_processes(self, balance):
        with pytest.raises(KeyboardInterrupt):
            map_array(
                interrupt_the_caller,
                np.arange(1000),
                chunksize=1,
                n_jobs=2,
                backend="loky",
                balance=balance,
            )
        _, delivered = run(both, "loky")
        assert delivered == ALL


DEATH = (
    "worker 2 (process 7, attempt 3) killed by signal 9 (SIGKILL) while mapping <12:14>; "
    "the kernel kills so when memory runs out"
)


class TestRaiseFailure:
    def test_nothing_is_raised_if_nothing_failed(self):
        assert raise_first_failure(outcome_with(), describe) is None

    def test_the_lowest_failure_is_raised_with_notes(self):
        error, other = ValueError("no"), KeyError("k")
        failures = [
            RangeFailure((6, 8), error, "thread 1", attempt=2),
            RangeFailure((10, 12), other, "thread 0"),
        ]
        death = WorkerDeath(2, "process 7", -9, (12, 14), 3)
        with pytest.raises(ValueError, match="no") as info:
            raise_first_failure(outcome_with(failures, [death]), describe)
        assert info.value is error
        assert info.value.__notes__ == [
            "while mapping <6:8> (thread 1, attempt 2)",
            "also failed: <10:12>: KeyError: 'k'",
            f"also, {DEATH}",
        ]

    def test_a_failure_before_any_range_is_raised_without_notes(self):
        error = OSError("no")
        with pytest.raises(OSError, match="no"):
            raise_first_failure(outcome_with([RangeFailure(None, error, "thread 1")]), describe)
        assert not hasattr(error, "__notes__")

    def test_other_failures_before_any_range_are_noted(self):
        failures = [RangeFailure(None, OSError("no"), "a"), RangeFailure(None, OSError("no"), "b")]
        with pytest.raises(OSError, match="no") as info:
            raise_first_failure(outcome_with(failures), describe)
        assert info.value.__notes__ == ["also failed: all of b: OSError: no"]

    def test_other_failures_without_a_text_are_noted(self):
        failures = [
            RangeFailure((0, 2), OSError("no"), "a"),
            RangeFailure((2, 4), SpeechlessError(), "b"),
        ]
        with pytest.raises(OSError, match="no") as info:
            raise_first_failure(outcome_with(failures), describe)
        assert any("SpeechlessError" in note for note in info.value.__notes__)

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    def test_exits_are_raised_too(self, error):
        with pytest.raises(type(error)) as info:
            raise_first_failure(outcome_with([RangeFailure((0, 2), error, "caller")]), describe)
        assert info.value is error

    def test_raising_a_failure_keeps_nothing_alive(self):
        class Thing:
            pass

        thing = Thing()
        there = weakref.ref(thing)
        outcome = outcome_with([RangeFailure((0, 2), ValueError(thing), "caller")])
        del thing
        gc.disable()
        try:
            with contextlib.suppress(ValueError):
                raise_first_failure(outcome, describe)
            assert there() is None
        finally:
            gc.enable()


def refused(outcome, missing, partial=None):
    with pytest.raises((WorkerDiedError, RuntimeError)) as info:
        raise_if_missing(outcome, describe, missing, lambda: partial)
    return info.value


class TestRefuseMissing:
    def test_nothing_is_refused_if_nothing_is_missing(self):
        raise_if_missing(
            outcome_with(deaths=[WorkerDeath(0, "a", 3, None)]), describe, [], pytest.fail
        )

    def test_the_error_has_the_facts_of_the_death(self):
        deaths = [WorkerDeath(1, "process 7", 3, None), WorkerDeath(0, "process 8", -11, (4, 6), 3)]
        missing = [(4, 6), (18, 19)]
        error = refused(outcome_with(deaths=deaths), missing, "partial")
        assert isinstance(error, WorkerDiedError)
        assert (error.worker, error.exitcode, error.in_hand) == ("process 8", -11, (4, 6))
        assert error.attempt == 3
        assert error.missing == missing
        assert error.partial == "partial"
        text = str(error)
        assert "worker 0 (process 8, attempt 3) killed by signal 11 (SIGSEGV)" in text
        assert "while mapping <4:6>" in text
        assert "2 ranges without a result" in text
        assert error.__notes__ == [
            "also, worker 1 (process 7) exited with code 3 between two ranges"
        ]

    def test_the_death_at_the_lowest_range_is_named(self):
        deaths = [
            WorkerDeath(0, "a", 3, (8, 9)),
            WorkerDeath(1, "b", 4, (2, 3)),
            WorkerDeath(2, "c", 5, (4, 5)),
        ]
        error = refused(outcome_with(deaths=deaths), [(2, 3)])
        assert (error.worker, error.in_hand) == ("b", (2, 3))
        assert "1 range without a result" in str(error)
        assert [note.split()[3] for note in error.__notes__] == ["(c)", "(a)"]

    def test_a_death_with_nothing_in_hand_is_described(self):
        error = refused(outcome_with(deaths=[WorkerDeath(1, "process 7", None, None)]), [(0, 1)])
        assert error.in_hand is None
        assert "worker 1 (process 7) gone between two ranges" in str(error)

    @pytest.mark.parametrize(
        ("missing", "text"),
        [
            ([(2, 4)], "there is no result for <2:4>, though nothing failed"),
            ([(2, 4), (6, 8), (8, 9)], "there is no result for <2:4> and 2 more ranges, though"),
        ],
    )
    def test_missing_ranges_without_a_death_are_a_runtime_error(self, missing, text):
        error = refused(outcome_with(), missing)
        assert type(error) is RuntimeError
        assert text in str(error)


# The final check of a run: each of these removes something that the run itself does not notice.


def lose_a_claim(monkeypatch):
    claimed = Static.chunks

    def chunks(*given):
        return (index for index in claimed(*given) if index != 3)

    monkeypatch.setattr(Static, "chunks", chunks)


def lose_a_mark(monkeypatch):
    make_result = GridRun.make_result

    def without_one(self):
        self.ledger.marks[3] = PENDING
        return make_result(self)

    monkeypatch.setattr(GridRun, "make_result", without_one)


def lose_a_result(monkeypatch):
    take = GridRun.take_result

    def all_but_one(self, number, start, packed, large):
        if start != 3:
            take(self, number, start, packed, large)

    monkeypatch.setattr(GridRun, "take_result", all_but_one)


@pytest.mark.usefixtures("general_way")  # which claims chunks
@pytest.mark.parametrize("backend", ["sequential", "threading"])
def test_a_range_that_no_worker_ran_is_refused(backend, monkeypatch, tmp_path):
    options = {"chunksize": 1, "n_jobs": BACKENDS[backend], "backend": backend}
    X = np.arange(8.0)
    lose_a_claim(monkeypatch)
    with pytest.raises(RuntimeError, match="only 7 of 8 items were run, though nothing failed"):
        map_array(np.sqrt, X, **options)
    Y = tmp_path / "Y.npy"
    with pytest.raises(RuntimeError, match="no result for axis 0, items 3:4 of an array"):
        map_array(np.sqrt, X, out=Y, resume=True, **options)
    assert not Y.exists()
    monkeypatch.undo()
    assert np.array_equal(map_array(np.sqrt, X, out=Y, resume=True, **options), np.sqrt(X))


@pytest.mark.usefixtures("general_way")  # which has marks
def test_a_range_without_a_mark_is_refused(monkeypatch, tmp_path):
    options = {"chunksize": 1, "n_jobs": 2, "backend": "loky"}
    X = np.arange(8.0)
    lose_a_mark(monkeypatch)
    for more in ({}, {"out": np.empty(8)}, {"out": tmp_path / "Y.npy"}):
        with pytest.raises(RuntimeError, match="no result for axis 0, items 3:4 of an array"):
            map_array(np.sqrt, X, **options, **more)
    assert not (tmp_path / "Y.npy").exists()


@pytest.mark.usefixtures("general_way")
def test_a_result_that_never_came_is_refused(monkeypatch):
    options = {"chunksize": 1, "n_jobs": 2, "backend": "loky"}
    X = np.arange(8.0)
    lose_a_result(monkeypatch)
    with pytest.raises(RuntimeError, match="no result for axis 0, items 3:4 of an array"):
        map_chunks(np.sqrt, X, **options)
    with pytest.raises(RuntimeError, match="no result for axis 0, items 3:4 of an array"):
        reduce_array(np.sum, X, combine=np.add, **options)
    with pytest.raises(RuntimeError, match="no result for item 3, though"):
        StaticParallelMapper(2, backend="loky", chunksize=1).map(float, range(8))


def test_worker_stats_become_worker_reports():
    kept = []
    outcome, _ = run(both, keep_report=kept.append)
    stats = outcome.worker_stats[0]
    assert isinstance(stats, WorkerStats)
    (worker,) = kept[0].workers
    assert isinstance(kept[0], Report)
    assert (worker.name, worker.ranges, worker.items) == ("caller", stats.n_ranges, stats.n_items)
    assert worker.busy == stats.busy_ns / 1e9

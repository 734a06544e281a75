"""One run, from a task to an outcome, and what is raised for it."""

import contextlib
import gc
import os
import weakref
from time import monotonic_ns

import numpy as np
import pytest

from taskcarrier import progress
from taskcarrier.backends.choice import Choice
from taskcarrier.backends.crews import shutdown
from taskcarrier.backends.work import NOTHING, Account, Call, Death, Failure
from taskcarrier.balance import Dynamic, Static
from taskcarrier.errors import WorkerDiedError
from taskcarrier.partition import Grid
from taskcarrier.report import Report, last_report
from taskcarrier.running import (
    Outcome,
    Settings,
    decide,
    died_error,
    execute,
    raise_failure,
)
from taskcarrier.segments import Recycler

BACKENDS = {"sequential": 1, "threading": 2, "loky": 2}


class Calls:
    def __init__(self, func, proposal=None):
        self.call = Call(func)
        self.proposal = proposal

    def open(self, agree):
        if self.proposal is not None:
            agree(self.proposal)
        return self

    def __call__(self, start, stop):
        return self.call.func(start, stop)

    def facts(self):
        return "facts"


def both(start, stop):
    return start, stop


def in_place(start, stop):
    return NOTHING


def fail_everywhere(start, stop):
    raise ValueError(f"at {start}")


def die_at_four(start, stop):
    if start == 4:
        os._exit(7)
    return start


def describe(start, stop):
    return f"<{start}:{stop}>"


def run(
    func,
    backend="sequential",
    *,
    grid=None,
    balance=None,
    n_jobs=None,
    notes=(),
    proposal=None,
    **others,
):
    settings = Settings(balance or Dynamic(), **others)
    delivered = {}
    outcome = execute(
        Calls(func, proposal),
        grid or Grid(20, 2),
        Choice(backend, n_jobs or BACKENDS[backend], "a test"),
        settings,
        started_ns=monotonic_ns(),
        staging=settings.staging() if backend == "loky" else None,
        notes=notes,
        deliver=delivered.__setitem__,
    )
    return outcome, delivered


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Workers that are there before the watch for leaks begins, so they stay for all tests."""
    run(both, "loky")
    yield
    shutdown()


def outcome_with(failures=(), deaths=(), missing=()):
    return Outcome([], list(failures), list(deaths), list(missing), report=None)


class TestSettings:
    def test_of_a_call(self):
        settings = Settings.of_call("dynamic", -2, "multiprocessing")
        assert settings == Settings(Dynamic(), -2, "loky")

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (("guided", 1, None), ValueError),
            (("static", 0, None), ValueError),
            (("static", "2", None), TypeError),
            (("static", 1, "dask"), ValueError),
        ],
    )
    def test_bad_arguments(self, arguments, error):
        with pytest.raises(error, match=r"(balance|n_jobs|backend) must"):
            Settings.of_call(*arguments)

    def test_folder(self, monkeypatch, tmp_path):
        monkeypatch.delenv("JOBLIB_TEMP_FOLDER", raising=False)
        assert Settings(Static()).folder is None
        monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
        assert Settings(Static()).folder == str(tmp_path)
        assert Settings(Static(), temp_folder="other").folder == "other"

    def test_memory_lies_in_the_folder(self, tmp_path):
        settings = Settings(Static(), temp_folder=str(tmp_path))
        (view,) = settings.staging().share([np.arange(10.0)])
        for segment in (settings.segment(100), view.segment):
            assert segment.on_disk
            assert os.fstat(segment.fd).st_dev == tmp_path.stat().st_dev

    def test_memory_comes_from_the_recycler(self):
        recycler = Recycler()
        settings = Settings(Static(), recycler=recycler)
        segment = settings.segment(1000)
        segment.reserve(1000)
        inode = os.fstat(segment.fd).st_ino
        del segment
        (view,) = settings.staging().share([np.arange(100.0)])
        assert os.fstat(view.segment.fd).st_ino == inode
        recycler.close()


class TestDecide:
    def test_wishes_are_followed(self):
        choice = decide(Settings(Static(), n_jobs=3, backend="threading"), len)
        assert (choice.backend, choice.n_jobs, choice.reason) == ("threading", 3, "asked for")

    def test_functions_are_looked_at(self):
        assert decide(Settings(Static(), n_jobs=3), np.isnan).backend == "threading"
        assert decide(Settings(Static(), n_jobs=3), len).backend == "loky"


@pytest.mark.parametrize("balance", [Static(), Dynamic()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("backend", BACKENDS)
class TestExecute:
    def test_outcome_of_a_good_run(self, backend, balance):
        outcome, delivered = run(both, backend, balance=balance)
        assert delivered == {cell: (2 * cell, 2 * cell + 2) for cell in range(10)}
        assert (outcome.failures, outcome.deaths, outcome.missing) == ([], [], [])
        assert [account.facts for account in outcome.accounts] == ["facts"] * BACKENDS[backend]

    def test_report(self, backend, balance):
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

    def test_what_workers_settled_on_is_told(self, backend, balance):
        outcome, _ = run(both, backend, balance=balance, proposal=b"settled")
        assert outcome.agreed == b"settled"
        # The next run of the same crew begins anew.
        assert run(both, backend, balance=balance)[0].agreed is None

    def test_never_more_workers_than_cells(self, backend, balance):
        outcome, delivered = run(both, backend, balance=balance, grid=Grid(3, 5))
        assert delivered == {0: (0, 3)}
        assert outcome.report.n_jobs == len(outcome.accounts) == 1

    def test_failures_ascend_and_know_their_worker(self, backend, balance):
        outcome, delivered = run(fail_everywhere, backend, balance=balance)
        cells = [failure.cell for failure in outcome.failures]
        assert cells == sorted(cells)
        assert cells[0] == 0 or balance == Static()
        assert delivered == {}
        names = {worker.name for worker in outcome.report.workers}
        assert {failure.worker for failure in outcome.failures} <= names
        for failure in outcome.failures:
            assert str(failure.error) == f"at {2 * failure.cell}"

    def test_report_goes_where_the_settings_say(self, backend, balance):
        kept = []
        outcome, _ = run(both, backend, balance=balance, keep_report=kept.append)
        assert kept == [outcome.report]


class TestWatching:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_progress_ends_with_all_items(self, backend, monkeypatch):
        seen = []
        monkeypatch.setattr(progress, "shown", lambda *_: Watch(seen))
        run(both, backend)
        assert seen[-1] == 20
        assert seen == sorted(seen)
        if backend == "sequential":
            assert seen == list(range(2, 22, 2))

    def test_report_is_logged(self, caplog, monkeypatch):
        monkeypatch.setattr(progress, "shown", lambda *_: Watch([]))
        with caplog.at_level("INFO", logger="taskcarrier"):
            outcome, _ = run(both, verbosity=2)
        assert [record.getMessage() for record in caplog.records] == [str(outcome.report)]

    def test_an_error_of_the_watcher_is_a_failure_in_the_caller(self, monkeypatch):
        monkeypatch.setattr(progress, "shown", lambda *_: Watch([], KeyboardInterrupt()))
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
        self.seen.append(ledger.items_done(ledger_workers(ledger)))
        if self.error is not None:
            raise self.error


def ledger_workers(ledger):
    return len(ledger._words) // 8 - 2


class TestDeaths:
    def test_static(self):
        outcome, _ = run(die_at_four, "loky", balance=Static())
        (death,) = outcome.deaths
        assert (death.exitcode, death.cell, death.worker) == (7, 2, 0)
        assert outcome.missing == [2, 3, 4]
        assert [account.worker for account in outcome.accounts] == [1]
        assert outcome.report.workers[0].items == 10

    def test_dynamic(self):
        outcome, _ = run(die_at_four, "loky")
        assert [death.cell for death in outcome.deaths] == [2]
        assert outcome.missing == [2]

    def test_dynamic_with_nobody_left(self):
        outcome, _ = run(die_at_four, "loky", n_jobs=2, grid=Grid(8, 4))
        assert outcome.missing == [1]
        outcome, _ = run(die_at_four, "loky", n_jobs=1, grid=Grid(20, 4))
        assert outcome.accounts == []
        assert outcome.missing == [1, 2, 3, 4]


DEATH = (
    "worker 2 (process 7) killed by signal 9 (SIGKILL) while mapping <12:14>; "
    "the kernel kills so when memory runs out, and some libraries crash so"
)


class SpeechlessError(Exception):
    def __str__(self):
        raise ZeroDivisionError


class TestRaiseFailure:
    def test_nothing_failed(self):
        assert raise_failure(outcome_with(), Grid(20, 2), describe) is None

    def test_the_lowest_with_what_is_known(self):
        error, other = ValueError("no"), KeyError("k")
        failures = [Failure(3, error, "thread 1"), Failure(5, other, "thread 0")]
        death = Death(2, "process 7", -9, 6)
        with pytest.raises(ValueError, match="no") as info:
            raise_failure(outcome_with(failures, [death]), Grid(20, 2), describe)
        assert info.value is error
        assert info.value.__notes__ == [
            "while mapping <6:8> (thread 1)",
            "also failed: <10:12>: KeyError: 'k'",
            f"also, {DEATH}",
        ]

    def test_before_any_cell(self):
        error = OSError("no")
        with pytest.raises(OSError, match="no"):
            raise_failure(outcome_with([Failure(-1, error, "thread 1")]), Grid(20, 2), describe)
        assert not hasattr(error, "__notes__")

    def test_others_before_any_cell(self):
        failures = [Failure(-1, OSError("no"), "a"), Failure(-1, OSError("no"), "b")]
        with pytest.raises(OSError, match="no") as info:
            raise_failure(outcome_with(failures), Grid(20, 2), describe)
        assert not any("<-2:0>" in note for note in info.value.__notes__)

    def test_others_without_words(self):
        failures = [Failure(0, OSError("no"), "a"), Failure(1, SpeechlessError(), "b")]
        with pytest.raises(OSError, match="no") as info:
            raise_failure(outcome_with(failures), Grid(20, 2), describe)
        assert any("SpeechlessError" in note for note in info.value.__notes__)

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
    def test_exits_too(self, error):
        with pytest.raises(type(error)) as info:
            raise_failure(outcome_with([Failure(0, error, "caller")]), Grid(20, 2), describe)
        assert info.value is error

    def test_keeps_nothing_alive(self):
        class Thing:
            pass

        thing = Thing()
        there = weakref.ref(thing)
        outcome = outcome_with([Failure(0, ValueError(thing), "caller")])
        del thing
        gc.disable()
        try:
            with contextlib.suppress(ValueError):
                raise_failure(outcome, Grid(20, 2), describe)
            assert there() is None
        finally:
            gc.enable()


class TestDiedError:
    def test_facts(self):
        deaths = [Death(1, "process 7", 3, None), Death(0, "process 8", -11, 2)]
        outcome = outcome_with(deaths=deaths, missing=[2, 9])
        error = died_error(outcome, Grid(19, 2), describe, outcome.missing, "partial")
        assert isinstance(error, WorkerDiedError)
        assert (error.worker, error.exitcode, error.in_hand) == ("process 8", -11, (4, 6))
        assert error.missing == [(4, 6), (18, 19)]
        assert error.partial == "partial"
        text = str(error)
        assert "worker 0 (process 8) killed by signal 11 (SIGSEGV) while mapping <4:6>" in text
        assert "2 of 10 ranges have no result" in text
        assert error.__notes__ == [
            "also, worker 1 (process 7) exited with code 3 between two ranges"
        ]

    def test_nothing_in_hand(self):
        outcome = outcome_with(deaths=[Death(1, "process 7", None, None)])
        error = died_error(outcome, Grid(20, 2), describe, [], None)
        assert error.in_hand is None
        assert "worker 1 (process 7) gone between two ranges" in str(error)


def test_an_account_is_turned_into_a_report():
    kept = []
    outcome, _ = run(both, keep_report=kept.append)
    account = outcome.accounts[0]
    assert isinstance(account, Account)
    (worker,) = kept[0].workers
    assert isinstance(kept[0], Report)
    assert (worker.name, worker.ranges, worker.items) == ("caller", account.ranges, account.items)
    assert worker.busy == account.busy_ns / 1e9

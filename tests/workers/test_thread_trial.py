"""Threads on trial, and what becomes of what they leave."""

import threading
import warnings

import numpy as np
import pytest

from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    fit_many,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
)
from taskcarrier.scheduling import history
from taskcarrier.scheduling.balance import Dynamic, Static
from taskcarrier.scheduling.gil import GilWaits
from taskcarrier.scheduling.ledger import Ledger
from taskcarrier.system.thread_clocks import ThreadTimes
from taskcarrier.workers import hand_overs, thread_trial
from taskcarrier.workers.loop import is_worker_process
from taskcarrier.workers.thread_trial import ThreadTrial, TrialBalance
from tests.clocks import LONG
from tests.strategies import keep_pools_warm

X = np.arange(24.0)
pools = keep_pools_warm(2)
RULES = [Static(), Dynamic()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("n_before", [0, 3, 20])
@pytest.mark.parametrize("is_passed", [True, False])
def test_every_chunk_is_taken_once_or_left(rule, n_before, is_passed):
    balance, ledger = TrialBalance(rule), Ledger.local(2)
    ledger.go_on(2)
    workers = [balance.chunks(ledger, number, 2, 20, 2) for number in range(2)]
    taken = [next(workers[n % 2]) for n in range(min(n_before, 18))]
    assert taken == list(range(2, 2 + len(taken)))
    balance.end(ledger, 20, is_passed=is_passed)
    taken += [index for worker in workers for index in worker]
    first_left = 2 + min(n_before, 18)
    if is_passed:
        assert sorted(taken) == list(range(2, 20))
    else:
        assert balance.first_left == first_left
        assert sorted(taken) == list(range(2, first_left))
    assert balance.plan(0, 2, 20, 2) == range(0)


def test_after_the_trial_static_balance_cuts_the_rest_in_equal_parts():
    balance, ledger = TrialBalance(Static()), Ledger.local(2)
    workers = [balance.chunks(ledger, number, 2, 20) for number in range(2)]
    assert [next(worker) for worker in workers] == [0, 1]
    balance.end(ledger, 20, is_passed=True)
    assert [list(worker) for worker in workers] == [list(range(2, 11)), list(range(11, 20))]


class Clock:
    """A clock that gives these times, one after the other."""

    times: dict

    def __init__(self, thread):
        self.times = iter(Clock.times[thread])

    def read(self):
        return ThreadTimes(*next(self.times))


class Threads:
    choice = hand_overs.Choice("threading", 2, "")

    def list_threads(self):
        return ["other"]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # on core, queued, at the end of each window of a second
        ([(0, 0), (0.9, 0)], [True]),
        ([(0, 0), (0.5, 0), (1.4, 0)], [None, True]),
        ([(0, 0), (0.5, 0), (1.0, 0)], [None, False]),
        ([(0, 0), *[(n / 2, n / 4) for n in range(1, 11)]], [*[None] * 9, True]),
    ],
)
def test_a_trial_takes_as_many_windows_as_it_needs(monkeypatch, other, expected):
    monkeypatch.setattr(thread_trial, "ThreadClock", Clock)
    n_windows = len(other) - 1
    me = threading.current_thread()
    Clock.times = {
        me: [(0, 0, 0), *((1 + n, 1 + n, 0) for n in range(n_windows + 1))],
        "other": [(1 + n, *times) for n, times in enumerate(other)],
    }
    waits, ledger = GilWaits(), Ledger.local(2)
    trial = ThreadTrial(Threads(), TrialBalance(Static()), waits, 20)
    trial.note_begin()
    trial.begin()
    assert "GIL" in trial.hand_over.choice.reason
    for answer in expected[:-1]:
        assert answer is None
        assert trial.look(ledger) == thread_trial.WINDOW_SECONDS
        assert trial.balance.first_left is None
    assert trial.look(ledger) is None
    assert trial.balance.first_left == 0
    assert (trial.balance.is_passed, waits.has_failed) == (expected[-1], not expected[-1])


def test_a_run_whose_chunks_are_all_taken_is_not_judged():
    ledger = Ledger.local(1)
    ledger.go_on(20)
    waits = GilWaits()
    trial = ThreadTrial(Threads(), TrialBalance(Static()), waits, 20)
    assert trial.look(ledger) is None
    assert not waits.has_failed
    assert trial.take_back(ledger) is None


# Whole calls


judged = threading.Event()


@pytest.fixture
def judge(monkeypatch, hand_over_after):
    """Return a function that has every function tried in threads, with this judgement.

    The caller runs one chunk; then `wait_for_judgement` holds the second chunk and those after it
    until the judgement has come.
    """

    def decide(answer, *, is_released=True):
        judged.clear()
        waits = GilWaits()
        waits.n_free, waits.n_held = (10, 0) if is_released else (0, 10)
        monkeypatch.setattr(history, "find_gil_waits", lambda *_: waits)
        monkeypatch.setattr(thread_trial, "WINDOW_SECONDS", 0.0)
        monkeypatch.setattr(ThreadTrial, "_judge", lambda self: answer)
        hand_over_after(1)
        return waits

    end = TrialBalance.end

    def end_and_tell(self, *args, **kwargs):
        end(self, *args, **kwargs)
        judged.set()

    monkeypatch.setattr(TrialBalance, "end", end_and_tell)
    return decide


def double(chunk):
    wait_for_judgement(chunk)
    return 2 * chunk


def wait_for_judgement(chunk):
    if not is_worker_process() and np.ravel(chunk)[0] >= 2:
        assert judged.wait(LONG)


def end_waiting():
    judged.set()


def names():
    return [worker.name.split()[0] for worker in last_report().workers]


@pytest.mark.parametrize("balance", ["static", "dynamic"])
class TestCalls:
    def test_threads_that_are_of_use_go_on(self, judge, balance):
        judge(True)
        result = map_array(double, X, chunksize=2, n_jobs=2, balance=balance, backend="auto")
        assert (result == 2 * X).all()
        report = last_report()
        assert (report.backend, report.n_jobs, report.balance) == ("threading", 2, balance)
        assert names() == ["caller", "thread"]
        assert sum(worker.items for worker in report.workers) == 24
        assert "released the GIL at 10 of 10 looks" in report.reason

    def test_what_other_threads_leave_goes_to_processes(self, judge, balance):
        waits = judge(False)
        result = map_array(double, X, chunksize=2, n_jobs=2, balance=balance, backend="auto")
        assert (result == 2 * X).all()
        report = last_report()
        assert (report.backend, report.balance) == ("loky", balance)
        assert names() == ["caller", "thread", "process", "process"]
        assert sum(worker.items for worker in report.workers) == 24
        assert waits.has_failed
        assert "threads were tried, and waited for each other" in report.reason

    def test_a_function_that_holds_the_lock_goes_to_processes(self, judge, balance):
        judge(None, is_released=False)
        judged.set()
        result = map_array(double, X, chunksize=2, n_jobs=2, balance=balance, backend="auto")
        assert (result == 2 * X).all()
        assert names() == ["caller", "process", "process"]
        assert "the function had released the GIL at 0 of 10 looks" in last_report().reason

    @pytest.mark.parametrize("answer", [True, False])
    def test_every_verb_gives_what_it_gives_alone(self, judge, balance, answer):
        def pair(chunk):
            return double(chunk), chunk.astype(int)

        cases = [
            (map_array, pair, {"chunksize": 2}),
            (map_array, double, {"chunksize": 3, "depth": 1, "boundary": "reflect"}),
            (map_items, double, {"chunksize": 2}),
            (map_chunks, double, {"chunksize": 2}),
            (reduce_array, lambda chunk: double(chunk).sum(), {"chunksize": 2, "combine": np.add}),
        ]
        for verb, func, options in cases:
            judge(answer)
            ours = verb(func, X, n_jobs=2, balance=balance, backend="auto", **options)
            assert last_report().backend == ("threading" if answer else "loky")
            judged.set()
            np.testing.assert_equal(ours, verb(func, X, n_jobs=1, balance=balance, **options))

    @pytest.mark.parametrize("answer", [True, False])
    def test_lists(self, judge, balance, answer):
        judge(answer)
        kind = StaticParallelMapper if balance == "static" else DynamicParallelMapper
        mapper = kind(n_jobs=2, backend="auto", chunksize=2)
        assert mapper.map(double, list(X)) == list(2 * X)
        assert mapper.report.backend == ("threading" if answer else "loky")

    @pytest.mark.parametrize("answer", [True, False])
    @pytest.mark.parametrize("number", [0, 2, 3, 4, 11])
    def test_the_first_error_is_raised(self, judge, balance, answer, number):
        def func(chunk):
            if chunk[0] == 2 * number:
                end_waiting()
                raise LookupError(number)
            return double(chunk)

        judge(answer)
        with pytest.raises(LookupError) as caught:
            map_array(func, X, chunksize=2, n_jobs=2, balance=balance, backend="auto")
        (note,) = [n for n in caught.value.__notes__ if n.startswith("while mapping")]
        assert f"items {2 * number}:{2 * number + 2}" in note


def test_what_cannot_be_pickled_is_finished_in_the_caller(judge):
    judge(False)
    lock = threading.Lock()

    def func(chunk):
        wait_for_judgement(chunk)
        with lock:
            return 2 * chunk

    with pytest.warns(UserWarning, match="could not be handed over"):
        result = map_array(func, X, chunksize=2, n_jobs=2, backend="auto")
    assert (result == 2 * X).all()
    assert names() == ["caller", "thread"]
    assert sum(worker.items for worker in last_report().workers) == 24


def test_an_interrupt_while_threads_are_taken_back_ends_the_call(judge, monkeypatch):
    judge(False)

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hand_overs.ThreadHandOver, "take_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            map_array(double, X, chunksize=2, n_jobs=2, backend="auto")
    for answer in (False, True):
        judge(answer)
        assert (map_array(double, X, chunksize=2, n_jobs=2, backend="auto") == 2 * X).all()


@pytest.mark.filterwarnings("ignore:resume compares the type alone of func:UserWarning")
def test_a_file_that_can_be_resumed_is_whole(judge, tmp_path):
    judge(False)
    path = tmp_path / "out.npy"
    options = {"chunksize": 2, "n_jobs": 2, "out": path, "resume": True}
    result = map_array(double, X, backend="auto", **options)
    assert (result == 2 * X).all()
    assert (np.load(path) == 2 * X).all()
    assert last_report().backend == "loky"


def test_a_run_may_end_before_its_threads_are_judged(judge):
    judge(False)
    short = X[:6]
    judged.set()
    assert (map_array(double, short, chunksize=2, n_jobs=2, backend="auto") == 2 * short).all()


@pytest.mark.parametrize(("is_released", "expected"), [(True, "threading"), (False, "loky")])
def test_streams_are_not_tried(judge, is_released, expected):
    judge(None, is_released=is_released)
    judged.set()
    mapper = DynamicParallelMapper(n_jobs=2, backend="auto")
    assert list(mapper.imap(double, iter(X), chunksize=2)) == list(2 * X)
    assert mapper.report.backend == expected


def test_streams_find_out_while_the_caller_is_in_the_function(monkeypatch, hand_over_after):
    hand_over_after(1)
    waits = GilWaits()
    monkeypatch.setattr(history, "find_gil_waits", lambda *_: waits)
    known = threading.Event()
    add = GilWaits.add

    def add_free(self, seconds):
        add(self, 0.0)
        if self.is_released:
            known.set()

    monkeypatch.setattr(GilWaits, "add", add_free)

    def func(item):
        assert known.wait(LONG)
        return 2 * item

    mapper = DynamicParallelMapper(n_jobs=2, backend="auto")
    assert list(mapper.imap(func, iter(X), chunksize=2)) == list(2 * X)


def test_fits(judge):
    linear_model = pytest.importorskip("sklearn.linear_model")
    judge(True)
    judged.set()
    rows = np.random.default_rng(0).random((40, 3))
    models = [linear_model.Ridge(alpha) for alpha in (0.5, 1.0, 2.0)]
    fitted = fit_many(models, rows, rows @ np.arange(3.0), n_jobs=2, backend="auto")
    assert last_report().backend == "threading"
    for model, alone in zip(fitted, models, strict=True):
        assert (model.coef_ == alone.fit(rows, rows @ np.arange(3.0)).coef_).all()


class TestAdvice:
    @pytest.fixture(autouse=True)
    def any_saving_counts(self, monkeypatch):
        monkeypatch.setattr("taskcarrier.workers.caller_chunks._SAVING_TO_TELL", -1e9)
        monkeypatch.setattr("taskcarrier.workers.caller_chunks._SECONDS_TO_TELL", -1e9)

    def call(self, monkeypatch, n_free, **options):
        waits = GilWaits()
        waits.n_free = n_free
        monkeypatch.setattr(history, "find_gil_waits", lambda *_: waits)
        map_array(np.ndarray.__neg__, X, chunksize=2, n_jobs=2, **options)
        return [note for note in last_report().notes if "GIL" in note]

    def test_the_report_says_what_threads_would_have_saved(self, monkeypatch, hand_over_after):
        hand_over_after(100)
        (note,) = self.call(monkeypatch, 30)
        assert "released the GIL at 30 of 30 looks: backend='threading' or 'auto'" in note

    def test_it_is_silent_if_that_is_not_known(self, monkeypatch, hand_over_after):
        hand_over_after(100)
        assert self.call(monkeypatch, 19) == []
        assert self.call(monkeypatch, 30, backend="auto") == []

    def test_a_small_saving_is_not_worth_a_word(self, monkeypatch, hand_over_after):
        monkeypatch.setattr("taskcarrier.workers.caller_chunks._SECONDS_TO_TELL", LONG)
        hand_over_after(100)
        assert self.call(monkeypatch, 30) == []


def test_the_default_never_calls_a_function_from_two_threads(judge):
    judge(True)
    judged.set()
    threads = set()

    def func(chunk):
        threads.add(threading.get_ident())
        return 2 * chunk

    with warnings.catch_warnings():
        assert (map_array(func, X, chunksize=2, n_jobs=2) == 2 * X).all()
    assert threads == {threading.get_ident()}

"""Workers that die, hang, or run out of memory: their ranges are run again, or named."""

import itertools
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from operator import add

import numpy as np
import psutil
import pytest

from taskcarrier import (
    StaticParallelMapper,
    WorkerDiedError,
    last_report,
    map_array,
    map_chunks,
    map_items,
    reduce_array,
    share,
)
from tests.clocks import LATE, LONG, stopped_clock
from tests.faults.functions import note, noted, pid_chunk, span, times
from tests.faults.helpers import all_gone, present, worker_pids
from tests.strategies import (
    EVERYWHERE,
    LOKY,
    OF_BALANCE,
    assert_same,
    each_balance,
    each_run,
    keep_pools_warm,
    run_script,
)

pytestmark = pytest.mark.one_case  # workers die in each

HERE = [run for run in EVERYWHERE if run[0] != "loky"]


pools = keep_pools_warm(2)


KILLS = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "signal 9 (SIGKILL)"),
    "SIGSEGV": (lambda: os.kill(os.getpid(), signal.SIGSEGV), -11, "signal 11 (SIGSEGV)"),
    "exit": (lambda: os._exit(3), 3, "exited with code 3"),
}


def mapped_list(func, X, *, balance, **options):
    """A map over a list, as an array."""
    return np.array(OF_BALANCE[balance](**LOKY, chunksize=8).map(func, X.tolist(), **options))


def mapped_items(func, X, **options):
    return map_items(func, X, chunksize=8, **LOKY, **options)


class DeadlyError(Exception):
    """Ends the process that sends it to the caller."""

    def __reduce__(self):
        os._exit(3)


class DeadlyExit(SystemExit):
    """The same, of a kind that is no `Exception`."""

    def __reduce__(self):
        os._exit(3)


class DeadlyWarning(UserWarning):
    """The same, sent when a worker has finished."""

    def __reduce__(self):
        os._exit(3)


def fails_on_five(x, kind=DeadlyError):
    if np.any(np.asarray(x) == 5):
        raise kind("five")
    return x


# Every verb, and what it returns when all goes well.
VERBS = {
    "map_array": lambda func, X, **run: map_array(func, X, chunksize=1, **LOKY, **run),
    "map_items": lambda func, X, **run: map_items(func, X, chunksize=2, **LOKY, **run),
    "map_chunks": lambda func, X, **run: np.concatenate(
        map_chunks(func, X, chunksize=2, **LOKY, **run)
    ),
    "reduce_array": lambda func, X, **run: reduce_array(
        func, X, chunksize=1, combine=lambda *both: np.concatenate(both), **LOKY, **run
    ),
    "map": lambda func, X, balance, **run: np.array(
        OF_BALANCE[balance](**LOKY).map(func, X.tolist(), **run)
    ),
    "imap": lambda func, X, balance, **run: np.array(
        list(OF_BALANCE[balance](**LOKY).imap(func, X.tolist(), **run))
    ),
}
each_verb = pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=() if verb in {"map_array", "imap"} else pytest.mark.thorough)
        for verb in VERBS
    ],
)


# A worker dies, and its range is run again


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("way", "balance"), [("SIGKILL", "static"), ("SIGSEGV", "dynamic"), ("exit", "dynamic")]
)
def test_a_death_costs_nothing_when_the_range_then_succeeds(way, balance, tmp_path):
    die, _, words = KILLS[way]
    log = tmp_path / "log"

    def func(chunk):
        if times(log, span(chunk)) == 1 and chunk[0] in {6, 21}:
            die()
        return chunk * 2

    X = np.arange(30.0)
    assert_same(map_array(func, X, chunksize=3, balance=balance, **LOKY), X * 2)
    expected = Counter(span(X[start : start + 3]) for start in range(0, 30, 3))
    assert Counter(noted(log)) == expected + Counter(["6:9", "21:24"])
    told = [text for text in last_report().notes if words in text]
    assert len(told) == 2
    assert all("while mapping items" in text for text in told)
    assert sum(worker.items for worker in last_report().workers) == 30


@pytest.mark.fault(11)
@each_balance
def test_deaths_do_not_show_in_results_of_other_verbs(balance, tmp_path):
    log = tmp_path / "log"

    def dies_first(x):
        at = int(np.ravel(x)[-1])
        if at in {7, 12} and times(log, at) == 1:
            os._exit(1)
        return x

    X, options = np.arange(20.0), {"balance": balance, "chunksize": 5, **LOKY}
    text = reduce_array(lambda c: str(dies_first(c)), X, combine=add, **options)
    assert text == "".join(str(X[start : start + 5]) for start in range(0, 20, 5))
    log.unlink(missing_ok=True)
    assert [c.tolist() for c in map_chunks(dies_first, X, **options | {"chunksize": 4})] == [
        list(range(start, start + 4)) for start in range(0, 20, 4)
    ]
    log.unlink(missing_ok=True)
    assert_same(map_items(dies_first, X, **options), X)
    assert len(noted(log)) == 4
    log.unlink()
    assert OF_BALANCE[balance](**LOKY, chunksize=5)(dies_first, range(20)) == list(range(20))
    assert len(noted(log)) == 4


@pytest.mark.fault(11)
@each_balance
def test_results_lost_with_a_worker_are_computed_again(balance, tmp_path):
    def func(i):
        if i == 450 and times(tmp_path / "log", i) == 1:
            os._exit(3)
        return [i]

    mapper = OF_BALANCE[balance](**LOKY, chunksize=1)
    assert mapper(func, range(600)) == [[i] for i in range(600)]


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("retries", "kind", "balance"),
    [(0, DeadlyError, "static"), (1, DeadlyError, "dynamic"), (0, DeadlyExit, "dynamic")],
)
@each_verb
def test_an_error_that_kills_while_it_is_pickled_is_a_death(verb, retries, kind, balance):
    X, func = np.arange(10.0), partial(fails_on_five, kind=kind)
    with pytest.raises(WorkerDiedError, match="exited with code 3 while mapping") as caught:
        VERBS[verb](func, X, balance=balance, retries=retries)
    start, stop = caught.value.in_hand
    assert start <= 5 < stop
    if verb != "imap":  # results before it were handed out
        assert any(start <= 5 < stop for start, stop in caught.value.missing)
    assert_same(VERBS[verb](lambda x: x, X, balance=balance), X)


@pytest.mark.fault(11)
@each_balance
@each_verb
def test_an_error_that_kills_while_it_is_pickled_once_costs_nothing(verb, balance, tmp_path):
    log = tmp_path / "log"

    def fails_once(x):
        if np.any(np.asarray(x) == 5) and times(log, 5) == 1:
            raise DeadlyError("five")
        return x

    X = np.arange(10.0)
    assert_same(VERBS[verb](fails_once, X, balance=balance), X)
    assert noted(log) == ["5", "5"]
    assert any("exited with code 3" in text for text in last_report().notes)


@pytest.mark.fault(10, 11)
@each_balance
@each_verb
def test_a_warning_that_kills_while_it_is_pickled_costs_nothing(verb, balance):
    def warns(x):
        if np.any(np.asarray(x) == 5):
            warnings.warn(DeadlyWarning("five"), stacklevel=1)
        return x

    X = np.arange(10.0)
    assert_same(VERBS[verb](warns, X, balance=balance), X)


@pytest.mark.thorough
@pytest.mark.fault(11)
@each_balance
def test_an_error_that_kills_while_it_is_pickled_completes_no_file(balance, tmp_path):
    X, Y = np.arange(10.0), tmp_path / "Y.npy"
    switch = tmp_path / "switch"

    def func(chunk):
        if chunk[0] == 5 and not switch.exists():
            raise DeadlyError("five")
        return chunk * 2

    for options in ({}, {"resume": True}):
        with pytest.raises(WorkerDiedError, match="items 5:6"):
            map_array(func, X, out=Y, chunksize=1, balance=balance, retries=0, **options, **LOKY)
        assert not Y.exists()
    switch.touch()
    result = map_array(func, X, out=Y, chunksize=1, balance=balance, resume=True, **LOKY)
    assert np.array_equal(result, X * 2)


@pytest.mark.thorough
@pytest.mark.fault(11, 13)
def test_an_error_that_kills_while_it_is_pickled_can_be_collected():
    X = np.arange(10.0)
    result, (failed,) = map_items(fails_on_five, X, on_error="collect", retries=0, **LOKY)
    assert (failed.start, failed.stop) == (5, 6)
    assert isinstance(failed.error, WorkerDiedError)
    assert_same(np.delete(result, 5), np.delete(X, 5))


@pytest.mark.thorough
@pytest.mark.fault(2, 11)
@each_balance
def test_an_error_that_arrives_is_raised_though_another_kills_while_it_is_pickled(
    balance, tmp_path
):
    log, begun = tmp_path / "log", tmp_path / "begun"

    def func(i):
        if i == 0:
            while not begun.exists():  # else the other may find the run halted, and go
                time.sleep(0.005)
            note(log, i)
            raise DeadlyError("zero")
        if i == 9:
            begun.touch()
            while len(noted(log)) < 2:  # after the death, the run goes on
                time.sleep(0.005)
            raise ValueError("nine")
        return i

    mapper = OF_BALANCE[balance](**LOKY, chunksize=1)
    with pytest.raises(ValueError, match="nine"):
        mapper.map(func, range(10))
    assert mapper.map(float, range(10)) == list(range(10))


@pytest.mark.fault(11)
@pytest.mark.parametrize(("way", "balance"), [("SIGKILL", "static"), ("exit", "dynamic")])
def test_a_range_that_always_kills_costs_no_other_worker(balance, way):
    die, exitcode, words = KILLS[way]
    X = np.arange(60.0).reshape(30, 2)

    def func(chunk):
        time.sleep(0.002)
        if chunk[0, 0] <= 12 < chunk[-1, 1]:
            die()
        return chunk * 2

    def pids():
        return set(map_array(pid_chunk, np.arange(8), chunksize=1, **LOKY).tolist())

    before = pids()
    with pytest.raises(WorkerDiedError, match="while mapping axis 0, items 6:7 of") as caught:
        map_array(func, X, chunksize=3, balance=balance, **LOKY)
    error = caught.value
    assert isinstance(error, BrokenProcessPool)
    assert words in str(error)
    assert (error.exitcode, error.in_hand, error.attempt) == (exitcode, (6, 7), 5)
    assert f"({error.worker}, attempt 5)" in str(error)
    others = [(9, 12), (12, 15)] if balance == "static" else []
    assert error.missing == [(6, 7), (7, 8), (8, 9), *others]
    there = present(error.missing, 30)
    assert_same(error.partial[there], (X * 2)[there])
    after = pids()
    assert len(before & after) == 1
    assert len(after) == 2
    assert_same(map_array(lambda c: c * 2, X, balance=balance, **LOKY), X * 2)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("way", "balance"), [("SIGKILL", "static"), ("exit", "dynamic")])
def test_an_item_of_a_list_that_always_kills_is_named(balance, way):
    die, exitcode, words = KILLS[way]

    def func(i):
        time.sleep(0.001)
        if i == 13:
            die()
        return str(i)

    mapper = OF_BALANCE[balance](**LOKY, chunksize=5)
    with pytest.raises(WorkerDiedError, match="while mapping item 13;") as caught:
        mapper(func, range(60))
    error = caught.value
    assert words in str(error)
    assert (error.exitcode, error.in_hand) == (exitcode, (13, 14))
    missing = {i for start, stop in error.missing for i in range(start, stop)}
    assert 13 in missing
    assert not missing & {10, 11, 12}
    assert missing < set(range(60))
    assert error.partial == [None if i in missing else str(i) for i in range(60)]
    assert mapper(str, range(3)) == ["0", "1", "2"]


@pytest.mark.fault(11)
@each_balance
def test_without_retries_nothing_is_run_twice(balance, tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        note(log, span(chunk))
        if 13 in chunk:
            os._exit(3)
        return chunk * 2

    X = np.arange(40)
    with pytest.raises(WorkerDiedError, match="items 12:16 of") as caught:
        map_array(func, X, chunksize=4, retries=0, balance=balance, **LOKY)
    assert (caught.value.in_hand, caught.value.attempt) == ((12, 16), 1)
    assert "attempt" not in str(caught.value)
    assert max(Counter(noted(log)).values()) == 1
    there = present(caught.value.missing, 40)
    assert sum(there) == 4 * (len(noted(log)) - 1)
    assert_same(caught.value.partial[there], (X * 2)[there])


@pytest.mark.thorough
@each_balance
def test_all_items_without_a_result_are_missing_when_every_worker_dies(balance):
    def func(chunk):
        time.sleep(0.002)
        if chunk[0] in {4, 5, 14}:
            os._exit(3)
        return chunk * 2

    X = np.arange(20)
    with pytest.raises(WorkerDiedError) as caught:
        map_array(func, X, chunksize=1, balance=balance, **LOKY)
    error = caught.value
    assert any(text.startswith("also, worker") for text in error.__notes__)
    there = present(error.missing, 20)
    if error.partial is None:
        assert not there.any(), "nothing is handed over, but some ranges are said not to be missing"
    else:
        assert_same(error.partial[there], (X * 2)[there])


@each_balance
@pytest.mark.parametrize("retries", [0, 2])
def test_a_death_and_a_failure_at_once_are_both_told(retries, balance, tmp_path):
    def func(chunk):
        (tmp_path / str(chunk[0])).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.001)
        if chunk[0] == 0:
            os._exit(3)
        time.sleep(0.2)
        raise LookupError("also this")

    options = {"chunksize": 1, "balance": balance, "retries": retries, **LOKY}
    with pytest.raises(LookupError, match="also this") as caught:
        map_array(func, np.arange(2), **options)
    # With retries left it is not known to be the range's fault.
    assert any("exited with code 3" in text for text in last_report().notes)
    assert retries or any("exited with code 3" in text for text in caught.value.__notes__)


@pytest.mark.fault(11)
def test_results_unlike_those_of_a_worker_that_died_are_refused(tmp_path):
    def func(chunk):
        if chunk[0] >= 10:  # the second worker, by static balance
            (tmp_path / str(chunk[0])).touch()
            if chunk[0] == 15:
                os._exit(3)
            return np.full((1, 4), -1, "i2")
        while not (tmp_path / "15").exists():
            time.sleep(0.001)
        return chunk * 2.0

    with pytest.raises(ValueError, match=r"in a worker that has died since") as caught:
        map_array(func, np.arange(20), chunksize=1, retries=0, **LOKY)
    assert "int16 (1, 4) in a worker" in str(caught.value)
    assert "items 0:1" in str(caught.value)
    assert any("exited with code 3" in text for text in caught.value.__notes__)


@each_balance
@pytest.mark.parametrize("at_once", [False, True], ids=["long before", "just before"])
def test_an_idle_worker_that_was_killed_is_replaced(balance, at_once):
    mapper, X = OF_BALANCE[balance](**LOKY), np.arange(8)
    with mapper:
        for number in (0, 1):
            mapper(str, range(4))
            victim = psutil.Process(int(mapper.report.workers[number].name.split()[1]))
            victim.kill()
            assert at_once or all_gone([victim], 5)
            assert_same(mapper.map_array(lambda c: c * 2, X), X * 2)
            assert mapper(str, range(5)) == ["0", "1", "2", "3", "4"]


# Kills at random moments


@pytest.mark.fault(12)
def test_a_worker_killed_at_any_moment_does_not_show_in_the_result():
    rng = np.random.default_rng(5)
    X = np.arange(4000.0)
    died = 0
    deadline = time.monotonic() + LONG
    for number in itertools.count():
        if number >= 6 and died:
            break
        assert time.monotonic() < deadline, "no kill has hit a worker at work"
        balance = ("static", "dynamic")[number % 2]
        victim = psutil.Process(worker_pids()[number // 2 % 2])
        timer = threading.Timer(rng.uniform(0.001, 0.02), victim.kill)
        timer.start()
        try:
            result = map_array(
                lambda c: time.sleep(0.0002) or c * 2, X, chunksize=40, balance=balance, **LOKY
            )
            assert_same(result, X * 2)
            died += any("signal 9" in text for text in last_report().notes)
        finally:
            timer.join()
            assert all_gone([victim], LONG)


def random_kills(stop, log, chance, killed):
    """Kill a worker that has come to work every now and then; those who have wrote their pids."""
    while not stop.wait(chance.uniform(0.02, 0.2)):
        for pid in map(int, set(noted(log)) - {str(process.pid) for process in killed}):
            with suppress(psutil.NoSuchProcess):
                victim = psutil.Process(pid)
                victim.kill()
                killed.append(victim)
                break


@pytest.mark.fault(12)
@each_balance
@pytest.mark.thorough
def test_many_kills_do_not_show_in_results(balance, tmp_path):
    log = tmp_path / "log"

    def slow(x):
        note(log, os.getpid())
        time.sleep(0.001)
        return x * 2

    X, killed, stop = np.arange(400.0), [], threading.Event()
    options = {"balance": balance, "retries": 100}
    killer = threading.Thread(target=random_kills, args=(stop, log, random.Random(3), killed))
    deadline = time.monotonic() + LONG
    killer.start()
    try:
        while len(killed) < 2:
            assert time.monotonic() < deadline, "the killer has found nobody"
            assert_same(map_array(slow, X, chunksize=1, **options, **LOKY), X * 2)
            assert_same(mapped_list(slow, X, **options), X * 2)
            chunks = map_chunks(slow, X, chunksize=2, **options, **LOKY)
            assert_same(np.concatenate(chunks), X * 2)
    finally:
        stop.set()
        killer.join()
        assert all_gone(killed, LONG)


# One item that always kills


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("item", "halves", "balance"),
    [
        (0, ["0:4", "0:2", "0:1"], "dynamic"),
        (5, ["4:6", "5:6"], "static"),
        (5, ["4:6", "5:6"], "dynamic"),
        (7, ["7:8"], "static"),
    ],
)
def test_an_item_that_kills_is_found_by_one_death_for_each_halving(item, halves, balance, tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        note(log, f"{span(chunk)} {item in chunk}")
        if item in chunk:
            os.kill(os.getpid(), signal.SIGKILL)
        return chunk * 2

    X = np.arange(24.0)
    with pytest.raises(WorkerDiedError, match=f"axis 0, items {item}:{item + 1} of") as caught:
        map_array(func, X, chunksize=8, retries=1, balance=balance, **LOKY)
    deaths = [line.split()[0] for line in noted(log) if line.endswith("True")]
    assert deaths == ["0:8", "0:8", *halves]
    error = caught.value
    assert (error.in_hand, error.attempt) == ((item, item + 1), len(deaths))
    assert sum("signal 9" in text for text in last_report().notes) == len(deaths)
    assert (item, item + 1) in error.missing
    there = present(error.missing, 24)
    assert_same(error.partial[there], (X * 2)[there])


@pytest.mark.thorough
@pytest.mark.fault(13)
@pytest.mark.parametrize(("verb", "balance"), [(mapped_items, "static"), (mapped_list, "dynamic")])
def test_a_single_item_that_kills_is_named_in_every_verb(verb, balance, tmp_path):
    def func(x):
        if x == 5:
            note(tmp_path / "log", "killed")
            os._exit(3)
        return x * 2

    with pytest.raises(WorkerDiedError, match=r"items? 5(:6 of|;)") as caught:
        verb(func, np.arange(24.0), balance=balance)
    assert caught.value.in_hand == (5, 6)
    assert len(noted(tmp_path / "log")) == 5  # three times the range, two halvings


@pytest.mark.thorough
@pytest.mark.fault(13)
@each_balance
def test_items_that_kill_are_filled_and_the_rest_is_kept(balance):
    def func(chunk):
        if not {5, 17}.isdisjoint(chunk.tolist()):
            os._exit(3)
        if 6 in chunk:
            raise ValueError("six")
        return chunk * 2

    X = np.arange(24.0)
    options = {"balance": balance, "chunksize": 8, "retries": 1, **LOKY}
    result, failures = map_array(func, X, on_error="collect", **options)
    expected = np.where(np.isin(X, [5, 6, 17]), np.nan, X * 2)
    assert_same(result, expected)
    assert [(f.start, f.stop, type(f.error)) for f in failures] == [
        (5, 6, WorkerDiedError),
        (6, 7, ValueError),
        (17, 18, WorkerDiedError),
    ]
    assert (failures[0].error.exitcode, failures[0].error.in_hand) == (3, (5, 6))
    assert "axis 0, items 5:6 of" in failures[0].error.__notes__[0]
    filled = map_array(func, X[:16], on_error="fill", fill_value=-1, **options)
    assert_same(filled, np.where(np.isnan(expected), -1, expected)[:16])


@pytest.mark.fault(13)
@each_balance
def test_items_that_kill_are_collected_by_items_and_lists(balance):
    def func(x):
        if x == 7:
            os._exit(3)
        if x == 6:
            raise ValueError("six")
        return x * 2

    X = np.arange(24.0)
    options = {"on_error": "collect", "balance": balance, "retries": 1}
    wanted = [(6, 7, ValueError), (7, 8, WorkerDiedError)]
    result, failures = mapped_items(func, X, **options)
    assert_same(result, np.where(np.isin(X, [6, 7]), np.nan, X * 2))
    assert [(f.start, f.stop, type(f.error)) for f in failures] == wanted
    mapper = OF_BALANCE[balance](**LOKY, chunksize=8)
    listed, failures = mapper.map(func, range(24), on_error="collect", retries=1)
    assert listed == [None if i in {6, 7} else 2 * i for i in range(24)]
    assert [(f.start, f.stop, type(f.error)) for f in failures] == wanted


@pytest.mark.fault(13)
@each_balance
@pytest.mark.parametrize(
    "call",
    [
        lambda func, X, **options: map_array(func, X, depth=1, **options),
        map_chunks,
        lambda func, X, **options: reduce_array(func, X, combine=np.maximum, **options),
    ],
    ids=["map_array with depth", "map_chunks", "reduce_array"],
)
def test_ranges_that_cannot_be_split_are_named_whole(call, balance, tmp_path):
    def func(chunk):
        if 20 in chunk:
            note(tmp_path / "log", len(chunk))
            os._exit(3)
        return chunk

    with pytest.raises(WorkerDiedError, match="axis 0, items 16:24 of") as caught:
        call(func, np.arange(32), chunksize=8, balance=balance, **LOKY)
    assert (caught.value.in_hand, caught.value.attempt) == ((16, 24), 3)
    assert len(set(noted(tmp_path / "log"))) == 1
    assert len(noted(tmp_path / "log")) == 3


@pytest.mark.thorough
@pytest.mark.fault(13)
def test_chunks_that_kill_are_collected_whole():
    def func(chunk):
        if 20 in chunk:
            os._exit(3)
        return chunk.sum()

    options = {"chunksize": 8, "retries": 1, "on_error": "collect", **LOKY}
    results, failures = map_chunks(func, np.arange(32), **options)
    assert results == [28, 92, None, 220]
    assert [(f.start, f.stop, type(f.error)) for f in failures] == [(16, 24, WorkerDiedError)]


# Ranges that take too long


@pytest.mark.fault(14)
@each_balance
def test_a_range_that_hangs_is_killed_and_named(balance, tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        if 5 in chunk:
            note(log, os.getpid())
            time.sleep(60)
        return chunk

    X = np.arange(32.0)
    with pytest.raises(TimeoutError, match=rf"timeout={LATE} seconds") as caught:
        map_array(func, X, chunksize=4, timeout=LATE, balance=balance, **LOKY)
    (pid,) = noted(log)
    assert not psutil.pid_exists(int(pid))
    assert f"process {pid} was killed" in caught.value.__notes__
    place = f"axis 0, items 4:8 of an array of shape (32,) (process {pid}, attempt 1)"
    assert f"while mapping {place}" in caught.value.__notes__
    assert_same(map_array(lambda c: c * 2, X, balance=balance, **LOKY), X * 2)


@pytest.mark.fault(14)
@each_balance
def test_the_others_go_on_when_a_range_hangs(balance):
    def func(x):
        if x in {5, 21}:
            time.sleep(60)
        return x * 2

    X = np.arange(32.0)
    hung = np.isin(X // 8, [0, 2])
    options = {"timeout": LATE, "balance": balance, "on_error": "collect"}
    result, failures = map_items(func, X, chunksize=8, **options, **LOKY)
    assert_same(result, np.where(hung, np.nan, X * 2))
    assert [(f.start, f.stop, type(f.error)) for f in failures] == [
        (0, 8, TimeoutError),
        (16, 24, TimeoutError),
    ]
    mapper = OF_BALANCE[balance](**LOKY, chunksize=8)
    results, failures = mapper.map(func, range(32), timeout=LATE, on_error="collect")
    assert results == [None if hung[i] else 2 * i for i in range(32)]
    assert [f[:2] for f in failures] == [(0, 8), (16, 24)]


@pytest.mark.fault(14)
@each_run
def test_the_timeout_counts_for_a_range_and_not_for_the_run(backend, balance):
    run = {"n_jobs": 2, "backend": backend, "balance": balance}
    X = np.arange(16.0 if backend == "sequential" else 32.0)
    result = map_array(lambda c: time.sleep(0.17) or c, X, chunksize=1, timeout=LATE, **run)
    assert_same(result, X)
    assert last_report().seconds > LATE


@pytest.mark.fault(14)
@pytest.mark.parametrize(("backend", "balance"), HERE)
def test_a_range_that_cannot_be_stopped_is_late_at_its_end(backend, balance, monkeypatch):
    clock = stopped_clock(monkeypatch)

    def func(chunk):
        if 5 in chunk:
            clock.sleep(0.2)
        return chunk * 2

    X = np.arange(16.0)
    options = {"timeout": 0.1, "backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 4}
    with pytest.raises(
        TimeoutError, match=r"took .* s, longer than timeout=0\.1 seconds"
    ) as caught:
        map_array(func, X, **options)
    notes = "\n".join(caught.value.__notes__)
    assert "only processes can be stopped within a range" in notes
    assert "while mapping axis 0, items 4:8 of" in notes
    result, failures = map_array(func, X, on_error="collect", **options)
    assert_same(result, np.where(X // 4 == 1, np.nan, X * 2))
    assert [f[:2] for f in failures] == [(4, 8)]


@pytest.mark.fault(14)
@each_run
def test_nothing_is_written_after_a_call_that_took_too_long(backend, balance):
    def func(chunk):
        time.sleep(0.4 if chunk[0] < 8 else 0.0)
        return chunk + 1.0

    out, X = share(np.zeros(16)), np.arange(16.0)
    options = {"backend": backend, "balance": balance, "n_jobs": 2, "chunksize": 4}
    with pytest.raises(TimeoutError):
        map_array(func, X, out=out, timeout=0.1, **options)
    then = out.copy()
    time.sleep(0.5)
    assert_same(out.copy(), then)


@pytest.mark.fault(14)
@each_run
def test_a_late_range_is_run_again_if_retry_on_says_so(backend, balance, tmp_path, monkeypatch):
    if backend == "loky":
        be_late, timeout = partial(time.sleep, LONG), LATE
    else:
        be_late, timeout = partial(stopped_clock(monkeypatch).sleep, 0.4), 0.2

    def func(chunk):
        if times(tmp_path / f"{span(chunk)}", 0) == 1 and chunk[0] == 4:
            be_late()
        return chunk * 2

    X = np.arange(12.0)
    run = {"n_jobs": 2, "backend": backend, "balance": balance}
    result = map_array(func, X, chunksize=4, timeout=timeout, retry_on=TimeoutError, **run)
    assert_same(result, X * 2)
    assert [len(noted(tmp_path / name)) for name in ("0:4", "4:8", "8:12")] == [1, 2, 1]


@pytest.mark.fault(14)
def test_a_range_that_is_always_late_is_given_up_after_its_retries(tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        if chunk[0] == 4:
            note(log, "hangs")
            time.sleep(60)
        return chunk

    options = {"chunksize": 4, "timeout": LATE, "retries": 1, "retry_on": TimeoutError, **LOKY}
    with pytest.raises(TimeoutError) as caught:
        map_array(func, np.arange(12), **options)
    assert any("items 4:8" in text and "attempt 2)" in text for text in caught.value.__notes__)
    assert len(noted(log)) == 2


# Failures that pass

SCRIPT = {0: 0, 8: 1, 16: 2, 24: 0}


@pytest.mark.fault(15)
@each_run
def test_chunks_are_called_again_as_often_as_they_fail(backend, balance, tmp_path):
    def func(chunk):
        at = int(chunk[0])
        if times(tmp_path / str(at), "call") <= SCRIPT[at]:
            raise ConnectionError("once more")
        return chunk * 2

    X = np.arange(32.0)
    run = {"n_jobs": 2, "backend": backend, "balance": balance, "chunksize": 8}
    result = map_array(func, X, retry_on=(ConnectionError, KeyError), **run)
    assert_same(result, X * 2)
    assert {at: len(noted(tmp_path / str(at))) for at in SCRIPT} == {0: 1, 8: 2, 16: 3, 24: 1}


@pytest.mark.fault(15)
@each_run
def test_only_items_that_fail_are_called_again(backend, balance, tmp_path):
    def func(x):
        at = int(x)
        if times(tmp_path / str(at), "call") <= SCRIPT.get(at, 0):
            raise ConnectionError("once more")
        return x * 2

    def calls():
        found = {path.name: len(noted(path)) for path in tmp_path.iterdir()}
        for path in tmp_path.iterdir():
            path.unlink()
        return found

    X, expected = np.arange(32.0), {str(at): 1 + SCRIPT.get(at, 0) for at in range(32)}
    run = {"n_jobs": 2, "backend": backend}
    options = {"chunksize": 5, "retry_on": OSError}  # its subclasses too
    assert_same(map_items(func, X, balance=balance, **options, **run), X * 2)
    assert calls() == expected
    mapper = OF_BALANCE[balance](chunksize=5, **run)
    assert mapper.map(func, range(32), retry_on=OSError) == list(range(0, 64, 2))
    assert calls() == expected


@pytest.mark.fault(15)
@each_run
@pytest.mark.parametrize(("kind", "n_calls"), [(ConnectionError, 3), (LookupError, 1)])
def test_an_item_that_fails_too_often_or_with_another_error_is_raised(
    kind, n_calls, backend, balance, tmp_path
):
    log = tmp_path / "log"

    def func(x):
        if x == 3:
            note(log, "call")
            raise kind("no more")
        return x

    run = {"n_jobs": 2, "backend": backend}
    for call in (
        lambda: map_items(func, np.arange(8), balance=balance, retry_on=ConnectionError, **run),
        lambda: OF_BALANCE[balance](**run).map(func, range(8), retry_on=ConnectionError),
    ):
        with pytest.raises(kind, match="no more") as caught:
            call()
        assert len(noted(log)) == n_calls
        said = [text for text in caught.value.__notes__ if text == "func was called 3 times"]
        assert len(said) == (n_calls > 1)
        log.unlink()


@pytest.mark.fault(15)
@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_errors_are_collected_after_all_retries(backend, tmp_path):
    log = tmp_path / "log"

    def func(chunk):
        note(log, span(chunk))
        if 9 in chunk:
            raise ConnectionError
        return chunk

    options = {"n_jobs": 2, "backend": backend, "chunksize": 4, "retries": 1}
    options |= {"retry_on": ConnectionError, "on_error": "fill", "fill_value": -1}
    X = np.arange(16)
    assert_same(map_array(func, X, **options), np.where(X == 9, -1, X))
    counts = Counter(noted(log))
    assert all(counts[word] == 2 for word in ("8:12", "8:10", "9:10")), counts
    assert all(counts[word] == 1 for word in ("0:4", "4:8", "12:16", "8:9", "10:12")), counts


@pytest.mark.fault(15)
def test_deaths_and_exceptions_are_counted_apart(tmp_path):
    def func(chunk):
        if chunk[0] == 4:
            number = times(tmp_path / "log", "call")
            if number in {2, 4}:
                os._exit(3)
            if number <= 4:
                raise ConnectionError
        return chunk * 2

    X = np.arange(12.0)
    assert_same(map_array(func, X, chunksize=4, retry_on=ConnectionError, **LOKY), X * 2)
    assert len(noted(tmp_path / "log")) == 5  # raises, dies; raises, dies; returns


# Memory runs out

HUNGRY = """
import resource
import numpy as np
from taskcarrier import map_array, map_items

def hungry(chunk):
    if chunk[0] == 2:
        np.ones(1 << 30)
    return chunk

def leaking(x):
    kept = []
    while x == 3:
        kept.append(bytearray(1 << 27))
    return x

if __name__ == "__main__":
    X = np.arange(6)
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    for backend in ("sequential", "threading", "loky"):
        run = {"n_jobs": 2, "backend": backend, "chunksize": 1}
        for verb, func, where in ((map_array, hungry, "2:3"), (map_items, leaking, "3:4")):
            try:
                verb(func, X, **run)
            except MemoryError as error:
                assert any(f"axis 0, items {where} of" in note for note in error.__notes__)
            else:
                raise SystemExit("there was room")
            assert map_array(np.negative, X, **run).tolist() == [0, -1, -2, -3, -4, -5]
    print("fine")
"""


@pytest.mark.thorough
@pytest.mark.fault(16)
def test_a_memory_error_names_its_range(tmp_path):
    assert run_script(tmp_path, HUNGRY, OPENBLAS_NUM_THREADS="1") == "fine\n"


@pytest.mark.fault(16)
def test_a_worker_killed_by_sigkill_hints_at_memory():
    mapper = StaticParallelMapper(**LOKY)
    with pytest.raises(WorkerDiedError, match=r"SIGKILL.*memory runs out"):
        mapper.map(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(2), retries=0)

"""The benches run, and their framework lets no wrong result be timed. No clock decides here."""

import json
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bench import balancing
from bench.__main__ import LONG, USUAL, main
from bench.machine import machine, watch_others
from bench.peers import PEERS, cut, open_peers
from bench.timing import (
    Arm,
    Comparison,
    Measured,
    Promise,
    Settings,
    Spread,
    WrongResultError,
    compare,
    mixed,
    repeated,
    same,
    timed,
)
from tests.strategies import ROOT

PROMISES = {
    "sqrt_sin": 8,
    "chain": 4,
    "reducing": 4,
    "halo": 4,
    "items": 4,
    "lists": 5,
    "fits": 4,
    "forest": 3,
    "files": 4,
    "kernels": 28 if list((Path(sys.prefix) / "lib").glob("libtbb.so*")) else 25,
    "even": 1,
    "triangular": 1,
    "empty": 7,
    "memory": 4,
    "imports": 2,
    "cold": 3,  # tiny, it has three programs
    "claims": 0,
    "defaults": 7,
    "long_tasks": 5,
}


def python(*words):
    """Run in another interpreter: peers warn, and keep threads and processes."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fixed(name, *amounts):
    """Make an arm with known amounts (the first one is for the checking pass)."""
    left = iter((0.0, *amounts))
    return Arm(name, lambda: Measured(next(left), "answer"))


# Each is a program that imports its peers, which takes more than five seconds.
@pytest.mark.parametrize(
    "name",
    [
        "empty",
        *[pytest.param(n, marks=pytest.mark.thorough) for n in PROMISES if n != "empty"],
    ],
)
def test_every_bench_runs_tiny(name, tmp_path):
    printed = python("bench", name, "--tiny", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    tables = found["benches"][name]
    for table in tables:
        assert table["title"] in printed
        for part in table.get("workloads", [table]):
            assert {len(amounts) for amounts in part["amounts"].values()} == {part["rounds"]}
    # The peers of an optional extra are measured, or named as missing.
    promises = sum(len(table["promises"]) for table in tables)
    if name == "sqrt_sin" and find_spec("dask") is None:
        assert "dask threads: not installed" in printed
        promises += 4
    if name == "halo" and find_spec("scipy") is None:
        assert "scipy is not installed" in printed
        promises += 4
    elif name == "halo" and not (find_spec("skimage") and find_spec("dask")):
        assert "skimage: not installed" in printed
        promises += 4
    if name == "lists" and find_spec("mpire") is None:
        assert "mpire: not installed" in printed
        promises += 1
    if name in {"fits", "forest"} and find_spec("sklearn") is None:
        assert f"{name}: scikit-learn is not installed" in printed
        promises = PROMISES[name]
    assert promises == PROMISES[name]
    assert found["machine"]["versions"]["numpy"] == np.__version__


def test_balancing_writes_data_and_figure(tmp_path):
    printed = python("bench", "balancing", "--tiny", "--out", tmp_path)
    lines = (tmp_path / "load_balancing.csv").read_text().splitlines()
    assert lines[0] == "task,mapper,size,repeat,seconds"
    assert len({line.rsplit(",", 2)[0] for line in lines}) == len(lines)
    if find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in printed
    else:
        assert (tmp_path / "load_balancing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_demo_runs_tiny():
    printed = python("bench.demo", "--tiny")
    assert "equal to the last bit" in printed
    if find_spec("sklearn") is None:
        assert "scikit-learn is not installed" in printed
    else:
        assert "the same distances for all" in printed


def test_demo_runs_as_a_file():
    command = [sys.executable, str(ROOT / "bench" / "demo.py"), "--help"]
    assert "--tiny" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_bench_is_tested_and_described():
    assert {*USUAL, *LONG} == {*PROMISES, "balancing"}
    text = (ROOT / "bench" / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in (*USUAL, *LONG))


def test_wrong_answer_fails_before_any_time_counts():
    calls = []

    def wrong():
        calls.append("wrong")
        return np.zeros(3) + 1e-300

    def right():
        calls.append("right")
        return np.zeros(3)

    with pytest.raises(WrongResultError, match="'wrong' and 'right' disagree"):
        compare("t", [Arm("right", right), Arm("wrong", wrong)], rounds=5)
    assert calls == ["right", "wrong"]


def test_answer_that_turns_wrong_later_fails_too():
    answers = iter([1, 1, 2])
    arms = [Arm("steady", lambda: 1), Arm("fickle", lambda: next(answers))]
    with pytest.raises(WrongResultError, match="fickle"):
        compare("t", arms, rounds=5)
    assert next(answers, None) is None


def test_measured_answers_are_compared_too():
    arms = [Arm("one", repeated(lambda: 1, 3)), Arm("two", repeated(lambda: 2, 3))]
    with pytest.raises(WrongResultError):
        compare("t", arms, rounds=1)


def test_a_wrong_bench_is_exit_status_1(monkeypatch, capsys):
    def run(settings):
        raise WrongResultError("arm differs")

    monkeypatch.setattr("bench.even.run", run)
    assert main(["even", "--tiny"]) == 1
    assert "even: WRONG RESULT: arm differs" in capsys.readouterr().err


@pytest.mark.parametrize(("amount", "status"), [(1.0, 0), (3.0, 1)])
def test_strict_tells_a_missed_promise(monkeypatch, capsys, amount, status):
    promise = Promise("a", None, required=2, aim=1, at_most=True)
    found = Comparison("t", "a", {"a": [amount]}, [promise])
    monkeypatch.setattr("bench.even.run", lambda settings: [found])
    assert main(["even", "--strict"]) == status
    assert main(["even"]) == 0


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["evne"])
    assert "unknown: evne" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.arange(3.0), False),
        (np.arange(3), np.arange(4), False),
        (np.zeros((1, 3)), np.zeros(3), False),
        ([1, 2], [1, 2], True),
        ([1, 2], (1, 2), False),
        (np.ones(1), [1.0], False),
    ],
)
def test_same_compares_results_bit_for_bit(left, right, equal):
    assert same(left, right) is equal


def test_arms_take_turns():
    order = []
    arms = [Arm(name, lambda name=name: order.append(name)) for name in "abc"]
    compare("t", arms, rounds=100)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds[0] == "abc"  # answers are compared first
    assert [*map(len, map(set, rounds))] == [3] * 101
    assert len(set(rounds)) == 6
    assert mixed(arms, 4) == mixed(arms, 4)


def test_ratios_are_taken_within_each_round():
    promise = Promise("b", "a", required=2, aim=4)
    found = compare("t", [fixed("a", 1, 10, 2), fixed("b", 3, 20, 8)], rounds=3, promises=[promise])
    assert found.ratio("b", "a") == Spread(median=3, low=2, high=4)
    assert [(spread.median, verdict) for _, spread, verdict in found.judged()] == [(3, "kept")]
    assert "3.00 [2.00-4.00]" in str(found)


def test_differences_are_taken_within_each_round():
    promise = Promise("b", "a", required=4, aim=1, at_most=True, scale=2, difference=True)
    found = compare("t", [fixed("a", 1, 10, 2), fixed("b", 3, 11, 5)], rounds=3, promises=[promise])
    assert [(spread, verdict) for _, spread, verdict in found.judged()] == [
        (Spread(median=4, low=2, high=6), "kept")
    ]


def test_only_the_call_of_a_timed_arm_is_timed(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(clock))
    assert timed(lambda: [1, 2], sum)() == Measured(amount=2.0, answer=3)


def test_many_rounds_are_summarised_by_quartiles():
    assert Spread.of([float(n) for n in range(9)]) == Spread(4, 0, 8)
    assert Spread.of([float(n) for n in range(13)]) == Spread(6, 3, 9)


@pytest.mark.parametrize(
    ("at_most", "value", "verdict"),
    [
        (False, 7, "aim reached"),
        (False, 5, "kept"),
        (False, 3, "MISSED"),
        (True, 3, "aim reached"),
        (True, 5, "kept"),
        (True, 7, "MISSED"),
    ],
)
def test_verdicts_follow_required_and_aim(at_most, value, verdict):
    required, aim = (6, 4) if at_most else (4, 6)
    assert Promise("a", None, required, aim, at_most).verdict(value) == verdict


def test_small_sizes_are_not_judged():
    promise = Promise("a", None, required=2, aim=1, at_most=True)
    found = Comparison("t", "a", {"a": [9.0]}, [promise], binding=False)
    assert found.judged()[0][2] == "not judged"
    assert not found.missed


def test_promise_about_an_absent_arm_is_not_judged():
    found = compare("t", [fixed("a", 1)], rounds=1, promises=[Promise("dask", "a", 1, 2)])
    assert found.judged() == []
    assert "promised" not in str(found)


def test_absent_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpire", None)
    with ExitStack() as stack:
        opened, absent = open_peers(stack, ["mpire"], 2, np.sqrt, np.ones(4))
    assert opened == {}
    assert absent == ["mpire: not installed (mpire), left out"]
    assert "mpire" in PEERS


@pytest.mark.parametrize(("length", "parts"), [(10, 3), (2, 5), (0, 2)])
def test_cut_covers_everything_in_order(length, parts):
    slices = cut(length, parts)
    assert len(slices) == parts
    assert [i for s in slices for i in range(length)[s]] == list(range(length))


def judged(workload=None, **amounts):
    """Return a workload whose arms took these seconds; unless said otherwise, one hour."""
    from bench.overview import SEQUENTIAL_OR_PROCESSES, Judged

    rounds = len(next(iter(amounts.values())))
    names = (*SEQUENTIAL_OR_PROCESSES, "threading", "default")
    arms = {name: [3600.0] * rounds for name in names} | amounts
    return Judged(workload or made("a"), Comparison("t", "plain", arms))


def made(name, **fields):
    from bench.workloads import Workload

    return Workload(name=name, group="g", func=np.sqrt, make=np.ones, n_items=1, **fields)


def test_a_third_of_the_workloads_is_held_out_in_each_kind():
    from bench.workloads import list_workloads

    workloads = list_workloads()
    held_out = [one for one in workloads if one.is_held_out]
    assert len({one.name for one in workloads}) == len(workloads) >= 36
    assert len(workloads) / 3 <= len(held_out) <= len(workloads) / 2
    assert {one.group for one in held_out} == {one.group for one in workloads}


def test_workloads_are_chosen_by_a_word():
    workload = made("sort 200")
    assert [workload.is_asked_for(word) for word in (None, "sort", "g", "fft")] == [1, 1, 1, 0]


def test_a_word_that_no_workload_has_is_refused():
    with pytest.raises(SystemExit, match="no workload has 'nothing' in its name or group"):
        main(["defaults", "--tiny", "--only", "nothing"])


@pytest.mark.parametrize(
    ("above", "below", "ratio"),
    [(180, 100, 1.2), (150, 100, 1.0), (100, 100, 1.0), (50, 100, 0.5), (200, 50, 2.8)],
)
def test_an_offset_is_left_out_but_makes_no_ratio_better_than_one(above, below, ratio):
    from bench.overview import lessened_ratio

    assert lessened_ratio(above, below, 60) == pytest.approx(ratio)


def test_offsets_count_in_short_calls_only_and_never_against_the_plain_call():
    short = judged(plain=[1e-3], loop=[1e-3], default=[1.16e-3])
    assert short.ratio("default", "loop").median == pytest.approx(1.1)
    assert short.ratio("default", "plain").median == pytest.approx(1.16)
    long = judged(plain=[1.0], loop=[1e-3], default=[1.16e-3])
    assert long.ratio("default", "loop").median == pytest.approx(1.16)


def test_the_best_is_one_arm_for_all_rounds():
    row = judged(plain=[1, 9, 2], loop=[9, 1, 9], default=[2, 2, 2])
    assert row.best("default") == "plain"
    assert row.ratio("default", "best") == Spread(median=1, low=2 / 9, high=2)


def test_threads_are_a_bar_for_the_default_only_if_the_function_is_known_to_be_free():
    amounts = {"plain": [4.0], "threading": [2.0], "default": [4.0], "auto": [2.0]}
    row = judged(**amounts)
    assert (row.best("default"), row.best("auto")) == ("plain", "threading")
    assert judged(made("a", is_known_free=True), **amounts).best("default") == "threading"


def test_overview_names_the_workloads_that_miss_a_promise():
    from bench.overview import Overview

    good = judged(plain=[4.0], loop=[4.0], default=[4.0])
    bad = judged(made("slow", is_held_out=True), plain=[1.0], loop=[4.0], default=[2.0])
    found = Overview([good, bad])
    assert found.missed == [
        "default / plain, each of 20 ms or more",
        "default / best, each workload",
        "default / best, geometric mean",
    ]
    assert "default / best, each workload: missed by slow 2.00" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["promises"][1]["missed by"] == {"slow": 2.0}
    assert "default / best, geometric mean" not in str(Overview([good, bad], is_part=True))
    found.binding = False
    assert not found.missed


@pytest.mark.parametrize(
    ("microseconds", "verdict"), [(49, "aim reached"), (75, "kept"), (83, "MISSED")]
)
def test_an_aim_has_the_smaller_offset(microseconds, verdict):
    from bench.overview import Overview

    row = judged(plain=[20e-6], loop=[20e-6], default=[microseconds * 1e-6])
    assert Overview([row]).judged()[0].verdict == verdict


def test_plain_calls_and_loops_do_the_work_of_the_library():
    from bench.defaults import list_calls
    from bench.workloads import make_floats

    workload = made("chain", chained=2)
    calls = list_calls(workload, make_floats(64))
    expected = calls["plain"]()
    assert same(calls["loop"](), expected)
    assert same(calls["sequential"](), expected)


def test_settings_choose_by_scale():
    assert Settings().turns(full=5, quick=3) == 5
    assert Settings("tiny").turns(full=5, quick=3) == 1
    assert Settings("quick", rounds=2).turns(full=5, quick=3) == 2


def test_slope_and_meeting_of_curves_are_found():
    assert balancing.slope([0, 100, 200], [0.5, 1.0, 1.5]) == pytest.approx(0.005)
    sizes, serial = [0, 50, 100, 150], [0, 5, 10, 15]
    assert balancing.meeting(sizes, serial, [1, 6, 11, 16]) == "does not beat serial"
    told = balancing.meeting(sizes, serial, [1, 4, 11, 14])
    assert told == "beats serial from 50 items, and always from 150"
    assert "always from 0" in balancing.meeting(sizes, serial, [-1, 4, 9, 14])


def test_machine_facts_are_plain_data():
    json.dumps(machine())


def test_own_work_is_not_taken_for_other_programs():
    others = watch_others()
    sum(range(3_000_000))
    found = others()
    assert found is None or found >= 0

"""Runs that are killed and go on: the same bytes as an undisturbed run, and nothing done twice."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from taskcarrier import map_array
from tests.faults.functions import note, noted
from tests.faults.helpers import running
from tests.strategies import assert_same, keep_pools_warm, run_script

pytestmark = pytest.mark.one_case  # each starts programs

SERIAL = {"backend": "sequential", "chunksize": 4}


pools = keep_pools_warm(2)


KILLED = """
import os, random, signal, sys, time
import numpy as np
from taskcarrier import map_array

folder, backend, balance, who, seed = sys.argv[1:]
OUT, OTHER, LOG, MOST = (f"{folder}/{name}" for name in ("Y.npy", "Z.npy", "log", "most"))
X = np.arange(1200.0).reshape(400, 3)
run = {"n_jobs": 2, "backend": backend, "balance": balance, "chunksize": 4}

def func(chunk):
    fd = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{int(chunk[0, 0]) // 12}\\n".encode())
    os.close(fd)
    time.sleep(0.004)
    while n_calls() > most_calls():  # it is to be killed before it comes to its end
        time.sleep(0.004)
    return np.sqrt(chunk)

def n_calls():
    return os.path.getsize(LOG) // 2 if os.path.exists(LOG) else 0  # lines of about two bytes

def most_calls():
    return os.path.getsize(MOST)

def child():
    # Its own group, as that of a terminal; workers that outlive it may still hold the ledger.
    os.setsid()
    deadline = time.monotonic() + 30
    while True:
        try:
            return map_array(func, X, out=OUT, resume=True, **run)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)

if __name__ == "__main__":
    chance = random.Random(int(seed))
    kills = 0
    while True:
        wanted = n_calls() + chance.randrange(5, 45) if kills < 2 else 10**6
        with open(MOST, "wb") as file:
            file.truncate(wanted + 10)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child()
                code = 0
            finally:
                os._exit(code)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and n_calls() < wanted:
            time.sleep(0.001)
        if ended != (0, 0):
            assert os.waitstatus_to_exitcode(ended[1]) == 0
            break
        time.sleep(chance.uniform(0, 0.01))
        (os.killpg if who == "group" else os.kill)(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    os.rename(LOG, LOG + ".all")
    map_array(func, X, out=OTHER, **run)
    with open(OUT, "rb") as one, open(OTHER, "rb") as other:
        assert one.read() == other.read()
    print(kills)
"""


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("backend", "balance", "who"),
    [
        ("threading", "static", "group"),
        ("threading", "dynamic", "group"),
        ("loky", "static", "parent"),
        ("loky", "dynamic", "group"),
    ],
)
def test_a_killed_run_continues_and_gives_the_same_bytes(backend, balance, who, tmp_path):
    seed = str(len(backend + balance + who))
    kills = int(run_script(tmp_path, KILLED, str(tmp_path), backend, balance, who, seed))
    assert kills == 2
    counts = Counter(map(int, noted(tmp_path / "log.all")))
    assert sorted(counts) == list(range(100))
    assert sum(counts.values()) <= 100 + kills * 2 * 2  # two workers
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"Y.npy", "Z.npy", "log", "log.all", "most", "script.py"}


@pytest.fixture
def stopped(tmp_path):
    """A run that ended after five of ten ranges, and its function, which does not stop again."""
    log, stop = tmp_path / "log", tmp_path / "stop"

    def func(chunk):
        note(log, int(chunk[0]))
        if chunk[0] >= 20 and stop.exists():
            raise LookupError("stop")
        return chunk * 2

    stop.touch()
    with pytest.raises(LookupError, match="stop"):
        map_array(func, np.arange(40.0), out=tmp_path / "Y.npy", resume=True, **SERIAL)
    stop.unlink()
    assert noted(log) == ["0", "4", "8", "12", "16", "20"]
    log.unlink()
    return func


def go_on(func, folder):
    """The rest of a `stopped` run: its result, and the ranges that were run."""
    result = map_array(func, np.arange(40.0), out=folder / "Y.npy", resume=True, **SERIAL)
    assert sorted(path.name for path in folder.glob("Y.npy*")) == ["Y.npy"]
    return np.array(result), [int(line) for line in noted(folder / "log")]


def marks_at(ledger):
    """Where the marks of the ranges begin."""
    return ledger.stat().st_size - 10


@pytest.mark.fault(27)
def test_finished_ranges_are_not_run_again(stopped, tmp_path):
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert ran == [20, 24, 28, 32, 36]


@pytest.mark.fault(27)
@pytest.mark.parametrize("n_marks", [0, 1, 3, 9])
def test_ranges_whose_marks_are_cut_off_are_run_again(n_marks, stopped, tmp_path):
    ledger = tmp_path / "Y.npy.ledger"
    os.truncate(ledger, marks_at(ledger) + n_marks)
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert ran == list(range(4 * min(n_marks, 5), 40, 4))


@pytest.mark.fault(27)
def test_ranges_with_torn_marks_are_run_again(stopped, tmp_path):
    ledger = tmp_path / "Y.npy.ledger"
    content = bytearray(ledger.read_bytes())
    content[marks_at(ledger) :] = bytes([1, 255, 1, 2, 0, 3, 77, 4, 254, 128])
    ledger.write_bytes(content)
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert ran == [4, 12, 16, 20, 24, 28, 32, 36]


def header(marks_at, computes):
    """What a ledger begins with."""
    second = json.dumps({"marks_at": marks_at, "chunks": 10, "computes": computes})
    return f"TaskCarrier ledger 2\n{second}\n".encode()


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"notes to myself\n",
        b"\x93NUMPY\x01\x00",
        b"TaskCarrier ledger 1\n{}\n",
        b"TaskCarrier ledger 2\n",
        b"TaskCarrier ledger 2\n{}\n",
        b"TaskCarrier ledger 2\nnull\n",
        header(4096, []),
        header("x", {"digests": {}, "sampled": {}}),
        header(4096, {"digests": {}, "sampled": {"array 0": {}}}),
        b"TaskCarrier ledger 2\n" + b"[" * 100_000 + b"\n",
        os.urandom(10_000),
    ],
    ids=range(12),
)
def test_a_file_that_is_no_ledger_is_refused_and_kept(content, stopped, tmp_path):
    ledger = tmp_path / "Y.npy.ledger"
    ledger.write_bytes(content)
    with pytest.raises(ValueError, match=r"Y\.npy\.ledger is no ledger .* remove it"):
        go_on(stopped, tmp_path)
    assert ledger.read_bytes() == content
    assert noted(tmp_path / "log") == []
    ledger.unlink()
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert ran == list(range(0, 40, 4))


@pytest.mark.fault(27)
def test_a_ledger_without_its_output_starts_over(stopped, tmp_path):
    (tmp_path / "Y.npy.part").unlink()
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert ran == list(range(0, 40, 4))


@pytest.mark.fault(27)
@pytest.mark.parametrize("nbytes", [0, 5, 100, 128, 200, 447])
def test_a_truncated_output_never_gives_wrong_results(nbytes, stopped, tmp_path):
    os.truncate(tmp_path / "Y.npy.part", nbytes)
    result, ran = go_on(stopped, tmp_path)
    assert_same(result, np.arange(40.0) * 2)
    assert set(ran) >= set(range(20, 40, 4))


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["Y.npy.ledger", "Y.npy.part"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo"])
def test_links_and_pipes_are_not_followed(kind, name, stopped, tmp_path):
    path, target = tmp_path / name, tmp_path / "elsewhere"
    content = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        if kind == "link":
            target.write_bytes(content)
        path.symlink_to(target)
    with pytest.raises(FileExistsError, match="no ordinary file of this user's") as caught:
        go_on(stopped, tmp_path)
    assert caught.value.filename == str(path)
    assert noted(tmp_path / "log") == []
    assert target.read_bytes() == content if kind == "link" else not target.exists()


HOLDING = """
import sys, time
import numpy as np
from taskcarrier import map_array

def func(chunk):
    if chunk[0] == 0:
        print("ready", flush=True)
        time.sleep(60)
    return chunk * 2

if __name__ == "__main__":
    run = {"n_jobs": 2, "backend": sys.argv[2], "chunksize": 4}
    map_array(func, np.arange(40.0), out=sys.argv[1], resume=True, **run)
"""


@pytest.mark.fault(27)
@pytest.mark.parametrize("backend", ["sequential", "loky"])
def test_two_runs_at_once_do_not_share_an_output(backend, stopped, tmp_path):
    path = tmp_path / "Y.npy"
    ledger = tmp_path / "Y.npy.ledger"
    ledger.unlink()
    with running(tmp_path, HOLDING, str(path), backend):
        content = ledger.read_bytes()
        with pytest.raises(BlockingIOError, match="another run is at work") as caught:
            go_on(stopped, tmp_path)
        assert caught.value.filename == str(ledger)
        assert noted(tmp_path / "log") == []
        assert ledger.read_bytes()[: len(content) - 10] == content[:-10]
    # It is killed, and its ledger is of another function.
    with pytest.raises(ValueError, match="is of another computation; what differs: func"):
        go_on(stopped, tmp_path)

"""What goes wrong: in tasks, in workers, in the program around them. Nothing lost, nothing left."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

import taskcarrier
from taskcarrier import (
    DynamicParallelMapper,
    StaticParallelMapper,
    TaskError,
    WorkerDiedError,
    empty,
    map_array,
    map_chunks,
    map_items,
    segments,
    share,
)
from tests.strategies import (
    PARALLEL,
    assert_same,
    cooled_crews,
    run_script,
    start_script,
    warm_crews,
)

RUNS = [("sequential", "static"), *PARALLEL]
ORDERED = [run for run in RUNS if run[0] == "sequential" or run[1] == "dynamic"]
BALANCES = ["static", "dynamic"]
OF_BALANCE = {"static": StaticParallelMapper, "dynamic": DynamicParallelMapper}
SHM = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def crews():
    warm_crews(2)
    yield
    cooled_crews()


def gone(process):
    """Ended; in a container nobody may be there to bury it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes, seconds):
    deadline = time.monotonic() + seconds
    while not all(gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def running(folder, code, *arguments, ready="ready", **environment):
    """A script that has said it is ready, and the processes below it."""
    process = start_script(folder, code, *arguments, **environment)
    below = []
    try:
        line = process.stdout.readline()
        assert line.strip() == ready, process.communicate(timeout=10)
        below = psutil.Process(process.pid).children(recursive=True)
        yield process, below
    finally:
        for one in [process, *below]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        process.communicate()


# Errors of the task


class TwoWordsError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.first, self.second = first, second


class HoldingError(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.fault(1)
@pytest.mark.parametrize(("backend", "balance"), RUNS)
def test_an_error_keeps_its_type_and_arguments_and_names_axis_and_range(backend, balance):
    def func(chunk):
        if chunk[0, 0] == 6:
            raise ValueError("odd", 6)
        return chunk

    X = np.tile(np.arange(12), (5, 1))
    with pytest.raises(ValueError, match="odd") as caught:
        map_array(func, X, axis=1, chunksize=3, n_jobs=2, backend=backend, balance=balance)
    assert caught.value.args == ("odd", 6)
    notes = caught.value.__notes__
    assert any("axis 1, items 6:9 of an array of shape (5, 12)" in note for note in notes)
    if backend == "loky":
        assert 'raise ValueError("odd", 6)' in str(caught.value.__cause__)


@pytest.mark.fault(2)
@pytest.mark.parametrize(("backend", "balance"), ORDERED)
def test_of_several_errors_the_lowest_is_raised_on_every_run(backend, balance):
    def func(chunk):
        if chunk[0] in {9, 10, 25}:
            raise LookupError(int(chunk[0]))
        return chunk

    for _ in range(20):
        with pytest.raises(LookupError) as caught:
            map_array(func, np.arange(40), chunksize=1, n_jobs=2, backend=backend, balance=balance)
        assert caught.value.args == (9,)


@pytest.mark.fault(2)
@pytest.mark.parametrize(("backend", "balance"), PARALLEL)
def test_of_two_errors_at_once_the_other_is_in_the_notes(backend, balance, tmp_path):
    def func(chunk):
        (tmp_path / str(chunk[0])).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.001)
        raise LookupError(f"here {chunk[0]}")

    with pytest.raises(LookupError, match="here 0") as caught:
        map_array(func, np.arange(2), chunksize=1, n_jobs=2, backend=backend, balance=balance)
    notes = "\n".join(caught.value.__notes__)
    assert "also failed: axis 0, items 1:2 of an array of shape (2,): LookupError: here 1" in notes


@pytest.mark.fault(2)
@pytest.mark.parametrize("balance", BALANCES)
def test_workers_stop_at_their_next_range_after_an_error(balance):
    def func(chunk):
        if chunk[0] == 0:
            raise LookupError
        time.sleep(0.02)
        return chunk

    began = time.monotonic()
    with pytest.raises(LookupError):
        map_array(func, np.arange(400), chunksize=1, n_jobs=2, backend="loky", balance=balance)
    assert time.monotonic() - began < 2  # all of it takes four seconds


@pytest.mark.fault(3)
@pytest.mark.parametrize(("backend", "balance"), RUNS)
@pytest.mark.parametrize("kind", [TwoWordsError, HoldingError])
def test_errors_that_do_not_travel_well(backend, balance, kind):
    arguments = ("one", "two") if kind is TwoWordsError else ("one",)

    def func(chunk):
        raise kind(*arguments)

    if backend == "loky":
        with pytest.raises((kind, TaskError), match="one") as caught:
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
        if isinstance(caught.value, TaskError):
            assert caught.value.type_name.endswith(kind.__name__)
            assert kind.__name__ in str(caught.value)
            assert "raise kind" in str(caught.value.__cause__)
    else:
        with pytest.raises(kind, match="one"):
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
    assert_same(
        map_array(np.sqrt, np.arange(4.0), n_jobs=2, backend=backend), np.sqrt(np.arange(4.0))
    )


def recurse(n):
    return recurse(n + 1)


ESCAPES = {
    "exit": (lambda c: sys.exit(7), SystemExit, (7,)),
    "interrupt": (lambda c: _raise(KeyboardInterrupt("here")), KeyboardInterrupt, ("here",)),
    "memory": (lambda c: _raise(MemoryError("full")), MemoryError, ("full",)),
    "recursion": (lambda c: recurse(0), RecursionError, None),
    "stop": (lambda c: _raise(StopIteration(3)), StopIteration, (3,)),
    "generator exit": (lambda c: _raise(GeneratorExit()), GeneratorExit, ()),
}


def _raise(error):
    raise error


@pytest.mark.fault(4)
@pytest.mark.parametrize("case", sorted(ESCAPES))
def test_exits_and_interrupts_of_the_task_arrive_as_themselves(case):
    func, kind, arguments = ESCAPES[case]
    for backend, balance in RUNS:
        with pytest.raises(kind) as caught:
            map_array(func, np.arange(4), n_jobs=2, backend=backend, balance=balance)
        assert arguments is None or caught.value.args == arguments
        with pytest.raises(kind):
            OF_BALANCE[balance](n_jobs=2, backend=backend)(func, range(4))
        assert map_array(np.sign, np.arange(2), n_jobs=2, backend=backend).tolist() == [0, 1]


@pytest.mark.fault(9)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_function_that_cannot_be_pickled_fails_before_anything_runs(balance, tmp_path):
    lock = threading.Lock()

    def func(chunk):
        (tmp_path / "ran").touch()
        return chunk if lock else None

    taskcarrier.shutdown()
    before = psutil.Process().children(recursive=True)
    with pytest.raises(TypeError, match="lock") as caught:
        map_array(func, np.arange(4), n_jobs=2, backend="loky", balance=balance)
    assert any("could not pickle the function" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match="lock"):
        map_array(np.add, np.arange(4), args=(lock,), n_jobs=2, backend="loky", balance=balance)
    assert not (tmp_path / "ran").exists()
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize("balance", BALANCES)
def test_a_failed_call_keeps_no_shared_memory_in_the_workers(balance):
    def func(chunk):
        if chunk[0] < 0:
            raise ValueError("negative")
        return np.full(len(chunk), os.getpid())

    def mapped():
        found = 0
        for child in psutil.Process().children():
            maps = (
                Path(f"/proc/{child.pid}/smaps")
                .read_text(encoding="utf-8")
                .split("taskcarrier (deleted)")
            )
            found += sum(int(part.split("Size:")[1].split()[0]) for part in maps[1:])
        return found  # kB

    map_array(func, np.zeros(4), n_jobs=2, backend="loky", balance=balance)
    before = mapped()
    for _ in range(3):
        with pytest.raises(ValueError, match="negative"):
            map_array(func, np.full(1_000_000, -1.0), n_jobs=2, backend="loky", balance=balance)
    assert mapped() - before < 8_000


@pytest.mark.parametrize("balance", BALANCES)
def test_a_failed_call_leaves_nothing_to_the_garbage_collector(balance):
    def failing(chunk):
        raise LookupError

    def fail():
        with suppress(LookupError):
            map_array(failing, np.arange(9), n_jobs=2, backend="loky", balance=balance)
        with suppress(LookupError):
            OF_BALANCE[balance](2, backend="loky")(failing, range(9))
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    gc.disable()
    try:
        before = fail()
        assert [fail() for _ in range(3)] == [before] * 3
    finally:
        gc.enable()


# Workers that die


def pid_chunk(chunk):
    return np.full(len(chunk), os.getpid())


KILLS = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "signal 9 (SIGKILL)"),
    "exit": (lambda: os._exit(3), 3, "exited with code 3"),
}


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("way", "balance"),
    [("SIGKILL", "static"), ("SIGKILL", "dynamic"), ("exit", "static"), ("exit", "dynamic")],
)
def test_a_worker_that_dies_costs_its_ranges_and_no_other_worker(balance, way):
    die, exitcode, words = KILLS[way]
    X = np.arange(60.0).reshape(30, 2)

    def func(chunk):
        time.sleep(0.002)
        if chunk[0, 0] <= 12 < chunk[-1, 1]:
            die()
        return chunk * 2

    def pids():
        run = {"n_jobs": 2, "backend": "loky", "balance": "static"}
        return set(map_array(pid_chunk, np.arange(8), chunksize=1, **run).tolist())

    before = pids()
    with pytest.raises(WorkerDiedError, match="while mapping axis 0, items 6:9") as caught:
        map_array(func, X, chunksize=3, n_jobs=2, backend="loky", balance=balance)
    error = caught.value
    assert isinstance(error, BrokenProcessPool)
    assert words in str(error)
    assert (error.exitcode, error.in_hand) == (exitcode, (6, 9))
    assert error.worker in str(error)
    dead = int(error.worker.split()[-1])
    assert dead in before
    assert (6, 9) in error.missing
    assert error.missing == sorted(error.missing)
    if balance == "dynamic":
        assert error.missing == [(6, 9)]
    else:
        assert error.missing == [(6, 9), (9, 12), (12, 15)]
    there = np.ones(30, bool)
    for start, stop in error.missing:
        there[start:stop] = False
    assert_same(error.partial[there], (X * 2)[there])
    after = pids()
    assert before - {dead} < after
    assert len(after) == 2
    assert_same(map_array(lambda c: c * 2, X, n_jobs=2, backend="loky", balance=balance), X * 2)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("way", "balance"), [("SIGKILL", "static"), ("exit", "dynamic")])
def test_a_worker_that_dies_on_a_list(balance, way):
    die, exitcode, words = KILLS[way]

    def func(i):
        time.sleep(0.001)
        if i == 13:
            die()
        return str(i)

    mapper = OF_BALANCE[balance](n_jobs=2, backend="loky", chunksize=5)
    with pytest.raises(WorkerDiedError, match="while mapping items 10:15") as caught:
        mapper(func, range(60))
    error = caught.value
    assert words in str(error)
    assert (error.exitcode, error.in_hand) == (exitcode, (10, 15))
    missing = {i for start, stop in error.missing for i in range(start, stop)}
    assert {10, 11, 12, 13, 14} <= missing
    assert missing < set(range(60))
    assert error.partial == [None if i in missing else str(i) for i in range(60)]
    assert mapper(str, range(3)) == ["0", "1", "2"]


@pytest.mark.parametrize("balance", BALANCES)
def test_when_every_worker_dies_all_that_has_no_result_is_missing(balance):
    def func(chunk):
        time.sleep(0.002)
        if chunk[0] in {4, 5, 14}:
            os._exit(3)
        return chunk * 2

    X = np.arange(20)
    with pytest.raises(WorkerDiedError) as caught:
        map_array(func, X, chunksize=1, n_jobs=2, backend="loky", balance=balance)
    error = caught.value
    assert any(note.startswith("also, worker") for note in error.__notes__)
    there = np.ones(20, bool)
    for start, stop in error.missing:
        there[start:stop] = False
    if error.partial is None:
        assert not there.any(), "nothing is handed over, but some ranges are said not to be missing"
    else:
        assert_same(error.partial[there], (X * 2)[there])


@pytest.mark.parametrize("balance", BALANCES)
def test_a_worker_that_dies_and_another_that_fails(balance, tmp_path):
    def func(chunk):
        (tmp_path / str(chunk[0])).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.001)
        if chunk[0] == 0:
            os._exit(3)
        time.sleep(0.2)
        raise LookupError("also this")

    with pytest.raises(LookupError, match="also this") as caught:
        map_array(func, np.arange(2), chunksize=1, n_jobs=2, backend="loky", balance=balance)
    assert any("exited with code 3" in note for note in caught.value.__notes__)


@pytest.mark.fault(11)
def test_results_unlike_those_of_a_worker_that_died_are_refused(tmp_path):
    def func(chunk):
        if chunk[0] >= 10:  # the second worker, by static balance
            (tmp_path / str(chunk[0])).touch()
            if chunk[0] == 15:
                os._exit(3)
            return np.full((1, 4), -1, "i2")
        while not (tmp_path / "11").exists():
            time.sleep(0.001)
        return chunk * 2.0

    with pytest.raises(ValueError, match=r"in a worker that has died since") as caught:
        map_array(func, np.arange(20), chunksize=1, n_jobs=2, backend="loky")
    assert "int16 (1, 4) in a worker" in str(caught.value)
    assert "items 0:1" in str(caught.value)
    assert any("exited with code 3" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("at_once", [False, True], ids=["long before", "just before"])
def test_an_idle_worker_that_was_killed_is_replaced(balance, at_once):
    mapper, X = OF_BALANCE[balance](n_jobs=2, backend="loky"), np.arange(8)
    with mapper:
        for number in (0, 1):
            mapper(str, range(4))
            victim = psutil.Process(int(mapper.report.workers[number].name.split()[1]))
            victim.kill()
            assert at_once or all_gone([victim], 5)
            assert_same(mapper.map_array(lambda c: c * 2, X), X * 2)
            assert mapper(str, range(5)) == ["0", "1", "2", "3", "4"]


@pytest.mark.fault(12)
def test_workers_killed_at_any_moment_give_right_results_or_the_error():
    rng = np.random.default_rng(5)
    X = np.arange(4000.0)
    died = 0
    for number in range(6):
        balance = BALANCES[number % 2]
        victim = psutil.Process(worker_pids()[number // 2 % 2])
        timer = threading.Timer(rng.uniform(0.001, 0.02), victim.kill)
        timer.start()
        try:
            result = map_array(
                lambda c: time.sleep(0.0002) or c * 2,
                X,
                chunksize=40,
                n_jobs=2,
                backend="loky",
                balance=balance,
            )
            assert_same(result, X * 2)
        except WorkerDiedError as error:
            died += 1
            there = np.ones(4000, bool)
            for start, stop in error.missing:
                there[start:stop] = False
            assert not there.all()
            assert_same(error.partial[there], (X * 2)[there])
        finally:
            timer.join()
            assert all_gone([victim], 5)
    assert died > 0


def worker_pids():
    map_array(pid_chunk, np.arange(2), n_jobs=2, backend="loky", balance="static")
    return [int(worker.name.split()[1]) for worker in taskcarrier.last_report().workers]


# The end of the program


LONG = """
import os, signal, sys, time
import numpy as np

# A shell's background jobs, and all they start, are born deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from taskcarrier import map_array, DynamicParallelMapper

where, what = sys.argv[1:3]
n_jobs = 2
run = {"n_jobs": n_jobs, "backend": where}

def work(chunk):
    if chunk[0] >= 0:
        time.sleep(0.05 if where == "threading" else 30)
    return chunk

def warm(chunk):
    time.sleep(0.05)
    return chunk

if __name__ == "__main__":
    map_array(warm, np.arange(4), chunksize=1, **run)
    print("ready", flush=True)
    try:
        if what == "idle":
            time.sleep(60)
        elif what == "list":
            DynamicParallelMapper(n_jobs, backend=where)(lambda i: work([i]), range(1000))
        else:
            map_array(work, np.arange(1000), chunksize=1, balance=what, **run)
    except KeyboardInterrupt as error:
        print(type(error).__name__, flush=True)
        assert map_array(np.negative, np.arange(4), **run).tolist() == [0, -1, -2, -3]
        print("works again", flush=True)
"""


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("where", "what", "whole_group"),
    [
        ("loky", "static", True),
        ("loky", "list", False),
        ("threading", "dynamic", True),
        ("sequential", "static", False),
    ],
)
def test_ctrl_c_ends_the_map_soon_and_leaves_nothing(where, what, whole_group, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    in_memory = set(SHM.iterdir())
    with running(tmp_path, LONG, where, what, JOBLIB_TEMP_FOLDER=str(folder)) as (process, below):
        assert len([b for b in below if b.is_running()]) >= (2 if where == "loky" else 0)
        time.sleep(0.1)
        began = time.monotonic()
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        else:
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "KeyboardInterrupt\n"
        assert time.monotonic() - began < 2
        assert process.stdout.readline() == "works again\n"
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (0, "", "")
        assert all_gone(below, 5)
    assert list(folder.iterdir()) == []
    assert set(SHM.iterdir()) <= in_memory


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("how", "what"),
    [("SIGKILL", "idle"), ("SIGKILL", "static"), ("SIGTERM", "idle"), ("SIGTERM", "dynamic")],
)
def test_workers_end_when_their_parent_is_killed(how, what, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    in_memory = set(SHM.iterdir())
    with running(tmp_path, LONG, "loky", what, JOBLIB_TEMP_FOLDER=str(folder)) as (process, below):
        time.sleep(0.1)
        assert len(below) >= 2
        assert not any(gone(worker) for worker in below)
        process.send_signal(getattr(signal, how))
        assert process.wait(5) == -getattr(signal, how)
        assert all_gone(below, 5)
    assert list(folder.iterdir()) == []
    assert set(SHM.iterdir()) <= in_memory


def test_a_program_that_ends_does_not_wait_for_its_warm_workers(tmp_path):
    code = """
import numpy as np
from taskcarrier import map_array
if __name__ == "__main__":
    for backend in ("threading", "loky"):
        print(map_array(lambda c: c + 1, np.arange(3), n_jobs=2, backend=backend))
"""
    began = time.monotonic()
    assert run_script(tmp_path, code) == "[1 2 3]\n[1 2 3]\n"
    assert time.monotonic() - began < 20


FORK = """
import os, sys
import numpy as np
from taskcarrier import StaticParallelMapper, map_array

def pids(chunk): return np.full(len(chunk), os.getpid())
run = {"n_jobs": 2, "backend": "loky", "chunksize": 1}

if __name__ == "__main__":
    with StaticParallelMapper(2, backend="loky") as mapper:
        ours = set(map_array(pids, np.arange(4), **run).tolist())
        shared = map_array(np.negative, np.arange(1000.0), n_jobs=2, backend="loky")
        child = os.fork()
        if child == 0:
            theirs = set(map_array(pids, np.arange(4), **run).tolist())
            assert len(theirs) == 2 and not theirs & ours
            assert (mapper.map_array(lambda c: -c, shared) == np.arange(1000.0)).all()
            threads = map_array(np.sqrt, np.arange(4.0), n_jobs=2, backend="threading")
            assert threads.tolist() == np.sqrt(np.arange(4.0)).tolist()
            if sys.argv[1] == "hard":
                os._exit(0)
            sys.exit(0)  # with all hooks
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert set(map_array(pids, np.arange(4), **run).tolist()) == ours
        assert (mapper.map_array(lambda c: -c, shared) == np.arange(1000.0)).all()
    print("fine")
"""


@pytest.mark.parametrize("end", ["hard", "soft"])
def test_a_forked_child_maps_by_itself_and_harms_no_worker_of_its_parent(end, tmp_path):
    assert run_script(tmp_path, FORK, end) == "fine\n"


# Memory and files


def unshared(*mounts):
    """A prefix that runs a command in mounts of its own, or None where that is not permitted."""
    script = " && ".join(["mount --make-rprivate /", *mounts, 'exec "$@"'])
    prefix = ("unshare", "-m", "sh", "-c", script, "sh")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return prefix if tried.returncode == 0 else None


@pytest.mark.fault(23)
def test_a_small_shared_memory_file_system_is_no_limit(tmp_path):
    prefix = unshared("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import os
import numpy as np
from taskcarrier import map_array
if __name__ == "__main__":
    space = os.statvfs("/dev/shm")
    assert space.f_blocks * space.f_frsize == 64 << 20
    X = np.ones((1 << 19, 64))
    assert X.nbytes == 256 << 20
    Y = map_array(lambda c: c + 1, X, n_jobs=2, backend="loky")
    assert (Y == 2).all()
    print("fine")
"""
    assert run_script(tmp_path, code, prefix=prefix) == "fine\n"


@pytest.mark.fault(23)
def test_a_full_disk_is_an_error_with_sizes_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = unshared(f"mount -t tmpfs -o size=4m tmpfs '{disk}'")
    if prefix is None:
        pytest.skip("mounting needs root")
    code = """
import errno, gc, os, sys
import numpy as np
from taskcarrier import DynamicParallelMapper, StaticParallelMapper
if __name__ == "__main__":
    disk = sys.argv[1]
    free = os.statvfs(disk).f_bavail
    for kind in (StaticParallelMapper, DynamicParallelMapper):
        mapper = kind(2, temp_folder=disk, backend="loky")
        for X, func in (
            (np.ones(1 << 20), lambda c: c[:]),                     # the input is too large
            (np.ones(1 << 17), lambda c: np.ones((len(c), 64))),    # the output is
        ):
            try:
                mapper.map_array(func, X)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                text = str(error)
                assert "bytes left" in text and "bytes:" in text, text
            else:
                raise SystemExit("no error")
            assert os.listdir(disk) == []
        # What fits still works.
        assert (mapper.map_array(lambda c: c + 1, np.ones(1000)) == 2).all()
        try:
            mapper(len, [b"x" * (8 << 20)])
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            raise SystemExit("no error")
    from taskcarrier import shutdown
    del mapper
    gc.collect()
    shutdown()
    assert os.statvfs(disk).f_bavail == free
    print("fine")
"""
    assert run_script(tmp_path, code, str(disk), prefix=prefix) == "fine\n"


@pytest.mark.fault(24)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_temporary_folder_with_spaces_shows_no_files(balance, tmp_path):
    folder = tmp_path / "a folder with spaces, ünd mehr"
    folder.mkdir()

    def func(chunk):
        return np.full(len(chunk), len(list(folder.iterdir())))

    mapper = OF_BALANCE[balance](n_jobs=2, temp_folder=str(folder), backend="loky")
    with mapper:
        seen = mapper.map_array(func, np.arange(100_000.0))
        assert not seen.any()
        assert mapper(lambda i: list(folder.iterdir()), range(4)) == [[]] * 4
        again = mapper.map_array(np.negative, seen)
        assert mapper.report.bytes_copied == 0
        assert not again.any()
        assert list(folder.iterdir()) == []
        # It is that file system's space that the results take.
        assert any(str(folder) in str(link.readlink()) for link in _links())
    assert mapper.map_array(np.sign, np.arange(3)).tolist() == [0, 1, 1]


def _links():
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            link.readlink()
            yield link


@pytest.mark.fault(24)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_missing_temporary_folder_is_named(by, tmp_path, monkeypatch):
    missing = str(tmp_path / "not there")
    if by == "environment":
        monkeypatch.setenv("JOBLIB_TEMP_FOLDER", missing)
        mapper = StaticParallelMapper(2, backend="loky")
    else:
        mapper = StaticParallelMapper(2, temp_folder=missing, backend="loky")
    for call in (lambda: mapper.map_array(np.sign, np.arange(4)), lambda: mapper(abs, range(4))):
        with pytest.raises(OSError, match="existing folder") as caught:
            call()
        assert caught.value.errno == errno.ENOENT
        assert caught.value.filename == missing


# Inside other workers, and beside them


def deeper(chunk, depth, backend):
    """As many to each item as there are maps inside one another."""
    if depth == 0:
        return chunk + 1
    inner = map_array(deeper, chunk, args=(depth - 1, backend), n_jobs=2, backend=backend)
    report = taskcarrier.last_report()
    assert (report.n_jobs, report.backend) == (1, "sequential"), report
    assert report.reason == "called inside a worker"
    return inner + 1


@pytest.mark.fault(19)
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_maps_inside_workers_are_serial_three_deep(backend):
    X = np.arange(6)
    result = map_array(deeper, X, args=(2, backend), n_jobs=2, backend=backend, chunksize=2)
    assert_same(result, X + 3)
    assert taskcarrier.last_report().n_jobs == 2


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_lists_inside_lists_inside_lists(backend):
    def lowest(i):
        return [i]

    def middle(i):
        return DynamicParallelMapper(2, backend="threading")(lowest, [i])

    def highest(i):
        return DynamicParallelMapper(2, backend="loky")(middle, [i, i + 1])

    result = StaticParallelMapper(2, backend=backend)(highest, range(3))
    assert result == [[[[i]], [[i + 1]]] for i in range(3)]


INSIDE = """
import sys, warnings
import numpy as np
from taskcarrier import DynamicParallelMapper, last_report, map_array

X = np.arange(3000.0).reshape(1000, 3)

def check(n):
    for options in ({}, {"n_jobs": 2, "backend": "loky"}, {"n_jobs": 2, "backend": "threading"}):
        Y = map_array(lambda c: c * n, X, **options)
        assert (Y == X * n).all(), options
        report = last_report()
        assert sum(worker.items for worker in report.workers) == 1000
        mapper = DynamicParallelMapper(**options)
        assert mapper(lambda i: i * n, range(30)) == [i * n for i in range(30)]
    return last_report().backend

if __name__ == "__main__":
    where = sys.argv[1]
    if where == "pool":
        import multiprocessing
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
            found = pool.map(check, [2, 3, 4])
    else:
        import joblib
        parallel = joblib.Parallel(n_jobs=2, backend=where)
        found = parallel(joblib.delayed(check)(n) for n in (2, 3, 4))
    assert len(found) == 3
    assert map_array(lambda c: c, np.arange(4), n_jobs=2, backend="loky").tolist() == [0, 1, 2, 3]
    print("fine")
"""


@pytest.mark.fault(19)
@pytest.mark.parametrize("where", [("loky", ""), ("threading", ""), ("pool", "fork")], ids="-".join)
def test_maps_inside_workers_of_others_are_right(where, tmp_path):
    assert run_script(tmp_path, INSIDE, *where, OMP_NUM_THREADS="1") == "fine\n"


# As it was before


@pytest.mark.fault(20)
def test_many_small_calls_leave_descriptors_and_threads_flat():
    def round_of_calls():
        for backend, balance in RUNS:
            run = {"n_jobs": 2, "backend": backend, "balance": balance}
            assert map_array(np.negative, X, **run)[-1] == -9
            OF_BALANCE[balance](2, backend=backend)(abs, range(4))
            with suppress(ZeroDivisionError):
                map_array(lambda c: 1 // 0, X, **run)

    def counted():
        gc.collect()
        children = psutil.Process().children()
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
            [(child.pid, child.num_fds(), child.num_threads()) for child in children],
        )

    X = np.arange(10.0)
    round_of_calls()
    before = counted()
    for _ in range(20):  # 300 calls
        round_of_calls()
    after = counted()
    assert after[:2] == before[:2]
    for (pid, fds, threads), (pid_before, fds_before, threads_before) in zip(
        after[2], before[2], strict=True
    ):
        assert (pid, threads) == (pid_before, threads_before)
        assert fds <= fds_before + 60  # what a failed run held goes with the next collection there


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("backend", "balance", "ending"),
    [(*run, ending) for run in RUNS for ending in ("well", "error")]
    + [("loky", "dynamic", "death")],
)
def test_the_state_of_the_program_is_as_before(backend, balance, ending):
    def state():
        return {
            "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "random": np.random.get_state(legacy=False)["state"]["key"].tobytes(),  # noqa: NPY002  # the one not to be changed
            "errors": np.geterr(),
            "hooks": (sys.excepthook, threading.excepthook, sys.getswitchinterval()),
            "folder": Path.cwd(),
            "path": list(sys.path),
        }

    def func(chunk):
        if chunk[0] == 2 and ending == "error":
            raise ZeroDivisionError
        if chunk[0] == 2 and ending == "death":
            os._exit(1)
        return chunk

    before = state()
    with suppress(ZeroDivisionError, WorkerDiedError):
        map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend=backend, balance=balance)
    assert state() == before


@pytest.mark.fault(21)
def test_limits_on_the_threads_of_libraries_are_as_before():
    from threadpoolctl import threadpool_info

    def limits():
        return [(library["filepath"], library["num_threads"]) for library in threadpool_info()]

    np.ones((2, 2)) @ np.ones((2, 2))
    before = limits()
    assert before, "no library that can be limited was loaded"
    inside = map_array(
        lambda c: np.full(len(c), max(n["num_threads"] for n in threadpool_info())),
        np.arange(4),
        n_jobs=4,
        backend="threading",
    )
    assert inside.tolist() == [1] * 4
    assert limits() == before
    with pytest.raises(ZeroDivisionError):
        map_array(lambda c: 1 // 0, np.arange(4), n_jobs=4, backend="threading")
    assert limits() == before


def test_the_output_of_a_script_names_what_is_wrong(tmp_path):
    code = """
import numpy as np
from taskcarrier import map_array
def func(chunk):
    if chunk[0] == 2: raise ValueError("as it was raised")
    return chunk
if __name__ == "__main__":
    map_array(func, np.arange(4), chunksize=1, n_jobs=2, backend="loky")
"""
    process = start_script(tmp_path, code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError: as it was raised" in err
    assert "while mapping axis 0, items 2:3 of an array of shape (4,)" in err
    assert 'if chunk[0] == 2: raise ValueError("as it was raised")' in err


class TestForks:
    """Forks by the caller and by the function: nobody's data change under anybody's eyes."""

    def test_a_forked_child_keeps_its_values_when_memory_is_recycled(self):
        code = """
import multiprocessing as mp
import numpy as np
from taskcarrier import DynamicParallelMapper

def kid(end):
    end.recv()
    end.send((float(Y.min()), float(Y.max())))

X = np.ones(1_000_000)
context = mp.get_context("fork")
with DynamicParallelMapper(2, backend="loky") as mapper:
    Y = mapper.map_array(lambda chunk: chunk * 1, X)
    ours, theirs = context.Pipe()
    child = context.Process(target=kid, args=(theirs,))
    child.start()
    del Y
    for factor in (97, 98, 99):
        Z = mapper.map_array(lambda chunk: chunk * factor, X)
    ours.send(0)
    print(*ours.recv())
    child.join()
"""
        assert output_of(code) == "1.0 1.0"

    @pytest.mark.parametrize("how", ["returns", "raises"])
    def test_a_function_that_forks_goes_on_once(self, how):
        code = f"""
import os
import numpy as np
from taskcarrier import map_array

def func(chunk):
    if chunk[0] == 0 and os.fork() == 0 and {how == "raises"}:
        raise KeyError("in the copy")
    return chunk + 1

X = np.arange(100.0)
Y = map_array(func, X, n_jobs=2, backend="loky", balance="dynamic", chunksize=1)
assert np.array_equal(Y, X + 1)
assert np.array_equal(map_array(np.sqrt, X, n_jobs=2, backend="loky"), np.sqrt(X))
print("right")
"""
        assert output_of(code) == "right"

    def test_a_fork_while_a_map_is_open_gives_the_child_its_blas_threads_back(self):
        code = """
import os, threading
import numpy as np
from threadpoolctl import threadpool_info
from taskcarrier import map_array

def counts():
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

before = counts()
inside, go_on = threading.Event(), threading.Event()

def func(chunk):
    inside.set()
    go_on.wait()
    return chunk

thread = threading.Thread(
    target=map_array, args=(func, np.zeros(2)), kwargs={"n_jobs": 2, "backend": "threading"}
)
thread.start()
inside.wait()
pid = os.fork()
if pid == 0:
    right = counts() == before
    right &= bool(np.array_equal(map_array(np.copy, np.ones(3), n_jobs=1), np.ones(3)))
    os._exit(0 if right and counts() == before else 1)
_, status = os.waitpid(pid, 0)
go_on.set()
thread.join()
print(os.waitstatus_to_exitcode(status), counts() == before)
"""
        assert output_of(code) == "0 True"


def output_of(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_more_than_a_thousand_open_descriptors_do_not_matter():
    code = """
import os, resource
import numpy as np
from taskcarrier import map_array
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
X = np.arange(10.0)
print(np.array_equal(map_array(np.sqrt, X, backend="loky", n_jobs=2), np.sqrt(X)))
"""
    assert output_of(code) == "True"


def test_a_crew_that_cannot_start_leaves_no_descriptor():
    code = """
import os, resource, warnings
import numpy as np
import taskcarrier
X = np.arange(10.0)
taskcarrier.map_array(np.sqrt, X, backend="loky", n_jobs=2)  # imports everything
taskcarrier.shutdown()
count = lambda: len(os.listdir("/proc/self/fd"))
before = count()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for room in range(1, 11):  # with more, loky itself leaves a pipe of its own open
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, hard))
    try:
        taskcarrier.map_array(np.sqrt, X, backend="loky", n_jobs=2)
    except OSError:
        pass
    else:
        raise AssertionError("there was room")
    taskcarrier.shutdown()
resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
print(count() - before)
"""
    assert output_of(code) == "0"


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
@pytest.mark.parametrize("rule", ["raise", "ignore"])
def test_floating_point_errors_are_treated_as_the_caller_says(backend, rule):
    X = np.array([1.0, 0.0])
    with np.errstate(all=rule):
        if rule == "raise":
            with pytest.raises(FloatingPointError):
                map_array(lambda chunk: 1 / chunk, X, n_jobs=2, backend=backend)
        else:
            result = map_array(lambda chunk: 1 / chunk, X, n_jobs=2, backend=backend)
            assert result.tolist() == [1.0, np.inf]


def test_relative_paths_mean_what_they_mean_in_the_caller(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "word").write_text(name)
    mapper = taskcarrier.StaticParallelMapper(2, backend="loky")
    for name in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / name)
        assert mapper(lambda path: open(path).read(), ["word"] * 2) == [name] * 2  # noqa: PTH123, SIM115  # a relative path


@pytest.mark.parametrize("order", ["half", "transposed", "reversed", "broadcast", "gaps"])
def test_what_a_function_adds_up_over_an_argument_does_not_depend_on_the_backend(order):
    W = np.random.default_rng(0).normal(size=(600, 401)).astype("f4")
    W = {
        "half": lambda: np.asfortranarray(W)[::2],
        "transposed": lambda: W.reshape(200, 3, 401).transpose(2, 0, 1)[::2],
        "reversed": lambda: W[::-1, ::-1],
        "broadcast": lambda: np.broadcast_to(W[0], (300, 401)),
        "gaps": lambda: W[::7, ::5],
    }[order]()
    X = np.ones(4)
    results = [
        map_array(lambda c, W: c * W.sum(), X, args=(W,), n_jobs=n, backend=backend)
        for backend, n in (("sequential", 1), ("threading", 2), ("loky", 2))
    ]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_bits_do_not_depend_on_the_users_blas_threads():
    code = """
import numpy as np
from taskcarrier import map_array
X = np.random.default_rng(0).normal(size=(4, 1_000_000))
func = lambda chunk: np.array([row @ row for row in chunk])
runs = [("sequential", 1), ("threading", 2), ("loky", 2)]
results = [map_array(func, X, chunksize=1, n_jobs=n, backend=b).tobytes() for b, n in runs]
print(len(set(results)))
"""
    assert output_of(code, OPENBLAS_NUM_THREADS="2") == "1"


class Stubborn(Exception):  # noqa: N818  # it is no error of ours
    def add_note(self, note):
        raise RuntimeError("no notes, please")


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_an_exception_that_refuses_notes_keeps_its_type(backend):
    def func(chunk):
        raise Stubborn("as I am")

    with pytest.raises(Stubborn, match="as I am"):
        map_array(func, np.zeros(4), n_jobs=2, backend=backend)


@pytest.mark.fault(19)
def test_a_run_reads_its_own_ledger_though_its_crew_is_lent_again(monkeypatch):
    X = np.arange(64.0)

    def halved(x):
        return x * 0.5

    def tripled(x):
        return int(x) * 3

    report, others = taskcarrier.running._report, []

    def interrupted(*args, **options):
        # Another thread's turn, when the crew of this run has been given back.
        if not others:
            others.append(
                threading.Thread(
                    target=map_items, args=(tripled, X), kwargs={"backend": "loky", "n_jobs": 2}
                )
            )
            others[0].start()
            others[0].join()
        return report(*args, **options)

    monkeypatch.setattr(taskcarrier.running, "_report", interrupted)
    assert_same(map_items(halved, X, backend="loky", n_jobs=2), X * 0.5)
    assert others


@pytest.mark.fault(19)
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_the_first_calls_may_come_from_several_threads(backend, tmp_path):
    code = """
    import sys, threading
    import numpy as np
    from taskcarrier import map_array
    X, barrier, right = np.arange(64.0), threading.Barrier(3), []
    def go():
        barrier.wait()
        right.append(np.array_equal(map_array(np.sqrt, X, backend=sys.argv[1], n_jobs=2), X**0.5))
    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(right)
    """
    for _ in range(3):
        assert run_script(tmp_path, textwrap.dedent(code), backend).strip() == "[True, True, True]"


class TestPagesThatAreTakenOut:
    """Nobody who still looks at shared memory sees zeros, and nothing is kept."""

    @pytest.mark.parametrize("argument", [False, True])
    def test_a_child_that_a_worker_s_function_has_forked_keeps_its_values(self, argument, tmp_path):
        def spawn(chunk, *arrays):
            seen = arrays[0] if arrays else chunk
            if os.fork() == 0:
                while not (tmp_path / "freed").exists():
                    time.sleep(0.01)
                part = tmp_path / f"part-{os.getpid()}"
                part.write_text(f"{seen.min()} {seen.max()}", encoding="utf-8")
                part.rename(tmp_path / f"child-{os.getpid()}")
                os._exit(0)

        X = share(np.arange(1.0, 300_001.0))
        args = (share(X),) if argument else ()
        map_chunks(spawn, X, args=args, chunksize=150_000, backend="loky", n_jobs=2)
        del X, args
        gc.collect()
        (tmp_path / "freed").touch()
        deadline = time.monotonic() + 20
        while len(found := list(tmp_path.glob("child-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        texts = sorted(path.read_text(encoding="utf-8") for path in found)
        whole = ["1.0 300000.0"] * 2
        assert texts == (whole if argument else ["1.0 150000.0", "150001.0 300000.0"])

    def test_forks_while_other_threads_share(self):
        stop = threading.Event()

        def sharing():
            while not stop.is_set():
                empty(10)

        threads = [threading.Thread(target=sharing) for _ in range(3)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                segments._retire_all()
                segments.live_mappings()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(interval)

    def test_memory_is_free_again_though_no_descriptor_is_left(self, tmp_path):
        code = """
        import os, resource
        import numpy as np
        from taskcarrier import empty, map_chunks
        from taskcarrier.segments import locate
        X = empty(1 << 20)
        X[:] = 1
        map_chunks(len, X, backend="loky", n_jobs=2)
        fd = os.dup(locate(X).segment.fd)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        held = []
        try:
            while True:
                held.append(open("/dev/null"))
        except OSError:
            pass
        del X
        print(os.fstat(fd).st_blocks)
        """
        assert run_script(tmp_path, textwrap.dedent(code)).strip() == "0"

    def test_the_end_of_a_program_is_silent(self, tmp_path):
        code = """
        import builtins, collections
        import numpy as np
        from taskcarrier import StaticParallelMapper, map_array, share
        X = share(np.arange(1e5))
        np.kept = X, map_array(np.sqrt, X, backend="loky", n_jobs=2)
        mapper = StaticParallelMapper(n_jobs=2, backend="loky").__enter__()
        builtins.kept = mapper, mapper.map_array(np.sqrt, X)
        collections.kept = X.base
        """
        process = start_script(tmp_path, textwrap.dedent(code))
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
